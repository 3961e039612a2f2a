"""``python -m gpdfx``."""

import sys

from .cli.app import main

sys.exit(main())
