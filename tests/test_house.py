"""What the folders promise: one place steps environments, one knows the distribution of actions, old names import."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WRAPPERS = {  # what stands inside the loop of a foreign library
    "metarl/deploy/sb3.py": 2,  # gymnasium wrappers for stable-baselines3
    "metarl/evaluation/single_task.py": 1,  # likewise
    "metarl/evaluation/metaworld_protocol.py": 1,  # vector environments of Meta-World's own evaluation
}


def sources():
    for folder in ("metarl", "agents"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            if not name.startswith(("metarl/agents", "metarl/envs")):
                yield name, path.read_text(encoding="utf-8")


def test_collect_alone_steps_environments():
    found = {}
    for name, text in sources():
        count = len(re.findall(r"envs?\.step(?:_async)?\(", text))
        if count and name not in ("metarl/collect.py", "metarl/spaces.py"):  # the loop, and the border that it uses
            found[name] = count
    assert found == WRAPPERS


def test_the_act_of_collect_alone_asks_an_agent():
    found = {name for name, text in sources() if re.search(r"\bactor\.act\(|agent\.act\(", text)}
    assert found - {"metarl/collect.py"} == {"metarl/evaluation/ablation.py"}  # actors around an actor


def test_one_module_knows_the_distribution_of_actions():
    pattern = r"\.log_std\b|\[.log_std.\]|DiagonalGaussian\("
    code = {name: re.sub(r'"""(.|\n)*?"""', "", text) for name, text in sources()}
    assert [name for name, text in code.items() if re.search(pattern, text)] == ["metarl/nn/distributions.py"]


def test_how_an_agent_adapts_is_declared():
    pattern = r"adaptation_steps == 0|not \w*\.?adaptation_steps\b|hasattr\([^)]*trial_episodes"
    found = [name for name, text in sources() if re.search(pattern, text)]
    assert found == ["metarl/plots/report.py"]  # reports of earlier versions


@pytest.mark.parametrize("name", ["runtime", "evaluation", "baseline", "play", "sb3", "envs"])
def test_public_modules_keep_their_names(name):
    module = importlib.import_module(f"metarl.{name}")
    assert getattr(importlib.import_module("metarl"), name) is module
    wanted = {"evaluation": "MetaWorldAgent", "baseline": "reference", "play": "play", "sb3": "TrialEnv"}
    assert hasattr(module, wanted.get(name, "__doc__"))


def test_importing_the_package_loads_neither_torch_nor_a_simulator():
    code = "import metarl, sys; print([m for m in ('torch', 'mujoco', 'metaworld', 'gymnasium') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_listing_stays_short():
    for folder in (ROOT / "metarl", ROOT / "agents", ROOT / "envs"):
        for path in [folder, *(each for each in folder.rglob("*") if each.is_dir() and "__pycache__" not in each.name)]:
            assert len(list(path.glob("*.py"))) <= 16, path
    entries = [path for path in (ROOT / "metarl").iterdir() if path.name != "__pycache__"]
    assert sum(path.is_dir() for path in entries) <= 14 and sum(path.is_file() for path in entries) <= 12
