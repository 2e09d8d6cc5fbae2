"""A ResNet-50 recipe with Lightning: trains, compares and evaluates runs with ``ProxSGD``.

Needs the ``train`` extra: ``pip install '.[train]'`` in the sources' folder. Importing the package
does not.

The modules, in the order of a run:

- ``settings``: everything that defines a run, as options and as a YAML file;
- ``images``, ``walk``, ``folders``, ``layouts``: an image file, the files below a folder, class
  folders, folders for splits;
- ``splits``: training and test parts, label noise;
- ``loaders``: batches that depend on the seed and the epoch alone;
- ``data``: the images of a run, made of these;
- ``model``: the ResNet-50, its weights, and the Lightning module with ``ProxSGD``;
- ``callbacks``: progress, history, checkpoints and stopping;
- ``train``: one run;
- ``compare``: several runs and what may be concluded from them;
- ``evaluate`` and ``plots``: what a checkpoint does, and pictures;
- ``commands``: the command line.
"""
