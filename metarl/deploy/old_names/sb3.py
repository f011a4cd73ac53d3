"""`metarl.deploy.sb3`."""

import sys

from metarl.deploy import sb3

sys.modules[__name__] = sb3
