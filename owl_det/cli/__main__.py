"""`python -m owl_det.cli`: the same as the command `owl-det`."""

import sys

from owl_det.cli import main

sys.exit(main())
