"""Forgetting shown and cured: a sequence of stages with and without stability methods, over several seeds.

    scripts/continual_study.py cued_rl2                      all arms, seeds 0 1 2, about 10 minutes on 2 cores
    scripts/continual_study.py cued_rl2 --sweep              EWC's coefficient: stability against plasticity
    scripts/continual_study.py rotated_rl2 --arms fine_tuning replay --seeds 5

Every arm is `metarl train` with a config that comes with metarl and some flags, which are printed; a run that has
finished is not repeated. Writes a table and plots beside the runs. Intervals are 95 % bootstrap intervals of the mean over
seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from metarl.config import load_config
from metarl.plotting import stability_plasticity
from metarl.statistics import stratified_bootstrap_ci

STUDIES: dict[str, tuple[str, dict[str, str]]] = {
    "cued_rl2": (
        "continual_cued_wedges_rl2",
        {
            "fine_tuning": "",
            "ewc": "--stability ewc",
            "replay": "--stability replay",
            "ewc_replay": "--stability ewc replay",
            "joint": "--control joint",
            "scratch": "--control scratch",
        },
    ),
}
"""By name: the config, and the flags of each arm."""
