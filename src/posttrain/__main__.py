"""`python -m posttrain` is the command `posttrain`."""

import sys

from posttrain.cli import main

sys.exit(main())
