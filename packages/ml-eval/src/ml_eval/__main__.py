"""`python -m ml_eval`."""

import sys

from ml_eval.cli import main

sys.exit(main())
