"""The version, where the package, its build and what measures with it all read it."""

__version__ = "0.1.0"
