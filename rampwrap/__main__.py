"""``python -m rampwrap`` is the command ``rampwrap``."""

import sys

from rampwrap.cli.main import main

sys.exit(main())
