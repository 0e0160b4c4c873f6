"""fastconv: convolutional networks in a few megabytes on top of NumPy."""

__version__ = "0.1.0"
