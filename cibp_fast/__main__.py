"""`python -m cibp_fast` is `cibp-fast`."""

from cibp_fast.cli import main

raise SystemExit(main())
