"""A ResNet-50 recipe with Lightning: trains, compares and evaluates runs with ``ProxSGD``.

Needs the ``train`` extra: ``pip install '.[train]'`` in the sources' folder. Importing the package
does not.

The modules, in the order of a run:

- ``files`` and ``terminal``: whole files, a lock on the output folder, printing that goes on;
- ``settings`` and ``options``: everything that defines a run, as options and as a YAML file;
- ``processes``: which of several processes this one is;
- ``images``, ``walk``, ``folders``, ``layouts``: an image file, the files below a folder, class
  folders, folders for splits;
- ``groups``, ``splits``: images of one scene; training, validation and test parts, label noise;
- ``loaders``: batches that depend on the seed and the epoch alone;
- ``digits``, ``data``: the images of a run, made of these;
- ``checkpoints`` and ``weights``: files of others, read without trust;
- ``model``: the ResNet-50, and the Lightning module with ``ProxSGD``;
- ``shapes``: a ResNet-50 without some of its channels, in checkpoints;
- ``channel_choice``, ``removal``, ``steered_removal`` and ``channel_methods``: which channels go,
  and their removal while training, by importance or by a group lasso;
- ``callbacks``: progress, history, checkpoints and stopping;
- ``former``: files of versions that had two sets;
- ``forecast``, ``ahead``: what an l1 will do, strengths for it, what runs will take;
- ``checks``, ``describe``, ``train``, ``measure`` and ``results``: one run, what is refused before
  it, what is said of it, what comes out;
- ``arms``, ``compare``, ``verdicts``, ``errors``: several runs and what may be concluded from them;
- ``tune`` and ``trials``: each regulariser's strength, by the validation images;
- ``evaluate``, ``intervals``, ``provenance``: what a checkpoint does, within which limits, and
  whether the images trained or chose it;
- ``predict`` and ``predictions``: class and probabilities of each image;
- ``plots`` and ``tensorboard``: pictures;
- ``run_folders``, ``report_plots``, ``report_page`` and ``report``: ``report.html``, from the files
  in an output folder;
- ``compaction``, ``onnx_export``, ``latency``, ``cost``: a checkpoint with fewer channels, in other
  formats, its time and its size;
- ``command_line``, ``commands``, ``training_commands``, ``channel_commands`` and
  ``patch_command``: the command line.
"""
