"""`metarl.evaluation.single_task`."""

import sys

from metarl.evaluation import single_task

sys.modules[__name__] = single_task
