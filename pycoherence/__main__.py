"""`python -m pycoherence`."""

import sys

from pycoherence.cli import main

sys.exit(main())
