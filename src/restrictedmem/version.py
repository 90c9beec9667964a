"""The package's version, for modules that must not import ``restrictedmem`` itself."""

__version__ = "0.1.0"
