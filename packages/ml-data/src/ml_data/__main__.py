"""`python -m ml_data`."""

import sys

from ml_data.cli import main

sys.exit(main())
