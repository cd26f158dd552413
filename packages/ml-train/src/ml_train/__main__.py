"""`python -m ml_train` is `ml-train`."""

import sys

from ml_train.cli import main

sys.exit(main())
