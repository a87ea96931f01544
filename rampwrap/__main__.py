"""``python -m rampwrap`` is the command ``rampwrap``."""

import sys

from rampwrap.cli import main

sys.exit(main())
