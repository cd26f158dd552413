"""Run the command with `python -m ml_convert`."""

from __future__ import annotations

import sys

from ml_convert.cli import main

sys.exit(main())
