"""Few labelled images and many unlabelled ones in, a small segmentation model out."""

__version__ = "0.2.1"
