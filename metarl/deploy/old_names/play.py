"""`metarl.deploy.play`."""

import sys

from metarl.deploy import play

sys.modules[__name__] = play
