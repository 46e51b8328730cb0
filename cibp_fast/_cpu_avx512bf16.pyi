from cibp_fast._cpu_portable import *  # noqa: F403
