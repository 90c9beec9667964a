"""The version of the package, for those who must not import the package's public face."""

__version__ = "0.1.0"
