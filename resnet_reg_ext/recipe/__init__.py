"""A ResNet-50 recipe: real images, a training run with ProxSGD, and what regularisation did.

Needs the ``demo`` extra: ``pip install 'resnet_reg_ext[demo]'``. Importing the package does not.
"""
