"""A robot without torch: an environment of its own with numpy and onnxruntime alone runs what was exported."""

import json
import subprocess
import venv
from pathlib import Path

import numpy as np
import pytest

import metarl
from metarl import runtime
from metarl.evaluation.held_out import adapt_to
from metarl.spaces import Spaces
from tests.agents.deployed import make_policy

ROOT = Path(__file__).parents[2]
STEPS = 500

# Reads a line of JSON a tick, writes the action; floats keep all their digits in JSON.
ROBOT = """
import json, sys
from runtime import OnnxPolicy

policy, state = OnnxPolicy(sys.argv[1]), None
for line in sys.stdin:
    request = json.loads(line)
    action, state = policy.predict(request["observation"], state, request["start"], True, request["reward"])
    print(json.dumps(action.tolist()), flush=True)
foreign = {"torch", "gymnasium", "mujoco", "metarl", "pydantic"} & set(sys.modules)
assert not foreign, foreign
"""


@pytest.fixture(scope="module")
def robot(tmp_path_factory):
    """A Python with numpy and onnxruntime, and beside it the one file of metarl that a robot needs."""
    folder = tmp_path_factory.mktemp("robot")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    packages = ["numpy", "onnxruntime", "-c", str(ROOT / "constraints.txt")]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True, timeout=300)
    (folder / "runtime.py").write_bytes(Path(runtime.__file__).read_bytes())
    (folder / "robot.py").write_text(ROBOT)
    return folder, python


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "gru"])
def test_it_acts_as_torch_does_through_500_steps_of_reach(robot, tmp_path, name):
    folder, python = robot
    tasks = metarl.envs.distribution("metaworld", benchmark="ML1", name="reach-v3", seed=0)
    env = metarl.envs.make(tasks.test_tasks[0])
    policy = make_policy(name, Spaces(39, (-1.0,) * 4, (1.0,) * 4))
    short = metarl.envs.distribution("metaworld", benchmark="ML1", name="reach-v3", seed=0, horizon=20)
    policy = adapt_to(policy, short.test_tasks[0], rollouts_per_task=2)
    policy.export(tmp_path / "policy.onnx", env)
    process = subprocess.Popen(
        [python, "robot.py", tmp_path / "policy.onnx"], cwd=folder, stdin=-1, stdout=-1, stderr=-1, text=True
    )
    observation, _ = env.reset(seed=0)
    state, reward, actions = None, None, []
    for step in range(STEPS):
        request = {"observation": observation.tolist(), "reward": reward, "start": step == 0}
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        assert line, process.stderr.read()
        theirs = np.array(json.loads(line), np.float32)
        ours, state = policy.predict(observation, state, np.array([step == 0]), True, reward)
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5)
        observation, reward, _, _, _ = env.step(theirs)  # the loop is closed by the robot's own actions
        actions.append(theirs)
    process.stdin.close()
    assert process.wait(timeout=30) == 0, process.stderr.read()
    assert np.ptp(actions, 0).max() > 0.05, "actions that hardly change would agree in any case"
