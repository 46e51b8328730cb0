"""Training of robust networks: configurations, data sets, the loop, runs, evaluation and plots.

Raises ImportError where a package of the extra `train` is missing, naming it and the extra.
"""

from importlib.util import find_spec

for _package in ("filelock", "pydantic", "tqdm", "tyro"):
    if find_spec(_package) is None:
        raise ImportError(
            f"cibp_fast's training and command line need the package {_package}, which is not "
            "installed: pip install 'cibp-fast[train]'"
        )
