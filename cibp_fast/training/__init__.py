"""Training of robust networks: configurations, data sets, the loop, runs, evaluation and plots.

The step on a GPU needs torch and Triton alone; the rest the packages of the extra `train`.
"""


class Contradiction(RuntimeError):
    """Says that an attack has refuted a sound certificate, which is thus wrong."""


def missing(error: ImportError) -> ImportError:
    """Returns the error of a package that is not installed, with the extra that brings it."""
    package = (error.name or "").partition(".")[0]
    return ImportError(
        f"cibp_fast's training and command line need the package {package}, which is not "
        "installed: pip install 'cibp-fast[train]'"
    )
