"""`python -m tnl` is the command `tnl`; torchrun starts it as `torchrun ... -m tnl train ...`."""

import sys

from tnl.cli import main

sys.exit(main())
