"""`python -m ordinalclip`, and what `accelerate launch -m` and `torchrun -m` start."""

import sys

from ordinalclip.cli import main

sys.exit(main())
