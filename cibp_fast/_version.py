"""The version of the package, for `cibp_fast`, its caches and the runs."""

__version__ = "0.2.0"
