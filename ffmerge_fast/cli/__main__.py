"""`python -m ffmerge_fast.cli`, which needs no script on the PATH."""

import sys

from .main import main

sys.exit(main())
