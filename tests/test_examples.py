"""The examples run with the commands in their docstrings and print what they promise."""

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch

import metarl
from metarl.runtime import OnnxPolicy

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
TRAINING = {"num_workers": 0, "num_tasks": 2, "rollouts_per_task": 2, "evaluation": {"num_tasks": 1}}
AGENTS = {
    "maml": {"name": "maml_ppo", "hidden_sizes": [8]},
    "rl2": {"name": "rl2", "trial_episodes": 3, "encoder_sizes": [8], "memory": {"name": "gru", "size": 8}},
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a folder with a run `KIND` and its export `KIND.onnx` for each kind of agent."""
    folder = tmp_path_factory.mktemp("runs")
    for kind, agent in AGENTS.items():
        stage = {"tasks": {"family": "navigation", "name": "goals", "horizon": 10}, "iterations": 1}
        metarl.train({**TRAINING, "agent": agent, "stages": [stage]}, run_dir=folder / kind)
        policy = metarl.load(folder / kind)
        task = metarl.evaluation.distribution_of(policy.config).test_tasks[0]
        policy.export(folder / f"{kind}.onnx", metarl.envs.make(task))
    return folder


def run(*arguments, cwd, before="", path=None):
    """Run an example as a user does, after the code in `before`."""
    name, *rest = map(str, arguments)
    code = f"import runpy, sys; sys.argv[0] = {name!r}\n{before}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code] if before else [sys.executable, name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(path)} if path else {})
    return subprocess.run(
        [*command, *rest], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def printed(done):
    assert done.returncode == 0, done.stderr
    return done.stdout


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WITHOUT = "sys.modules.update(dict.fromkeys(('torch', 'gymnasium', 'mujoco', 'metaworld', 'pydantic', 'lerobot')))"
"""Code that makes an import of any of these raise ImportError."""

ON_A_ROBOT = ("control_loop.py", "ros2_node.py", "lerobot_runner.py")


@pytest.mark.parametrize("kind", AGENTS)
def test_the_control_loop_counts_faults_and_lets_another_policy_take_over(runs, kind):
    other = runs / f"{kind}.onnx"
    command = (EXAMPLES / "control_loop.py", runs / f"{kind}.onnx", "--watch", other, "--seconds", "3", "--rate", "100")
    lines = printed(run(*command, "--fault-every", "30", cwd=runs, before=WITHOUT)).splitlines()
    assert lines[0].startswith("300 ticks in ")
    assert lines[1].startswith("faults 10 of 10 broken readings; the last: ValueError: ")  # 300 // 30
    assert re.fullmatch(r"limited \d+, deadline misses \d+, swaps 1", lines[2])


def test_the_control_loop_keeps_its_policy_when_the_new_file_is_bad(runs, tmp_path):
    (tmp_path / "new.onnx").write_bytes((runs / "maml.onnx").read_bytes()[:-1])
    command = (EXAMPLES / "control_loop.py", runs / "maml.onnx", "--watch", "new.onnx", "--seconds", "1")
    done = run(*command, "--fault-every", "0", cwd=tmp_path)
    assert "faults 0 of 0 broken readings; the last: none" in printed(done) and "swaps 0" in done.stdout
    assert (
        done.stderr.startswith("kept the old policy: new.onnx is not a complete file") and done.stderr.count("\n") == 1
    )


@pytest.mark.parametrize(("arguments", "length"), [((), 10), (("--episode-ticks", "4"), 4)])
def test_the_control_loop_begins_episodes_as_long_as_those_of_training(runs, monkeypatch, arguments, length):
    example, starts = load("control_loop"), []

    class RecordingPolicy(OnnxPolicy):
        def predict(self, observation, state, episode_start, *rest):
            starts.append(bool(episode_start[0]))
            return super().predict(observation, state, episode_start, *rest)

    monkeypatch.setattr(example, "OnnxPolicy", RecordingPolicy)
    command = ["control_loop.py", runs / "rl2.onnx", "--seconds", "0.25", "--rate", "100", "--fault-every", "0"]
    monkeypatch.setattr(sys, "argv", [*map(str, command), *arguments])
    example.main()
    assert len(starts) == 25 and np.flatnonzero(starts).tolist() == list(range(0, 25, length))


def test_ticks_are_due_at_absolute_times_and_missed_ones_are_skipped(monkeypatch):
    example, now, waited = load("control_loop"), [100.0], []

    def sleep(seconds):
        waited.append(seconds)
        now[0] += seconds

    clock = SimpleNamespace(perf_counter=lambda: now[0], sleep=sleep)
    monkeypatch.setattr(example, "time", clock)
    durations = iter([0.0, 0.5, 3.25, 0.5])  # of the ticks' work, in periods of 1 s

    def write(_):
        now[0] += next(durations)

    robot = SimpleNamespace(read=lambda: (None, 0.0), write=write)
    loop = SimpleNamespace(step=lambda observation, reward: None)
    # Due at 0, 1, 2: the third ends at 5.25, where those of 3 and 4 are missed and that of 5 is late by 0.25; it ends
    # at 5.75.
    seconds, skipped = example.run(loop, robot, 1.0, 4)
    assert (seconds, skipped) == (5.75, 2)
    assert waited == [1.0, 0.5]


def test_the_ros_nodes_commands_go_to_zero_without_observations(runs):
    core = load("ros2_node").PolicyNode(str(runs / "maml.onnx"), lambda line: None)
    policy = OnnxPolicy(runs / "maml.onnx")
    ends = np.array([policy.action_high[0], policy.action_low[1]], np.float32)
    core.loop.swap(stand_in(policy, lambda observation, state, *_: (ends, state)))
    for _ in range(5):  # five ticks reach the ends of the range while observations come
        core.on_observation(SimpleNamespace(data=[0.1, 0.2]))
        core.tick()
    commands = np.array([core.tick() for _ in range(7)])  # and none comes
    expected = np.array([1, 1, 0.8, 0.6, 0.4, 0.2, 0])  # the third goes down by 0.2, and four more
    np.testing.assert_allclose(commands / ends, np.stack([expected, expected], 1), atol=1e-6)


def stand_in(policy, predict):
    """Return a policy with a memory of one number, to swap in for that of the node."""
    ends = {"action_low": policy.action_low, "action_high": policy.action_high}
    return SimpleNamespace(observation_size=2, action_size=2, reset=lambda: np.zeros(1), predict=predict, **ends)


def test_the_ros_node_receives_episodes_and_trials(runs):
    example, calls = load("ros2_node"), []
    core = example.PolicyNode(str(runs / "rl2.onnx"), lambda line: None)
    node = example.DryNode()
    kinds = dict.fromkeys(("Empty", "Float32", "Float32MultiArray", "Float64MultiArray", "String"), SimpleNamespace)
    example.connect(core, node, SimpleNamespace(**kinds), 0.02, qos=1)

    def predict(observation, state, episode_start, *_):
        calls.append((bool(episode_start[0]), float(state[0])))
        return np.zeros(2, np.float32), state + 1.0

    core.loop.swap(stand_in(OnnxPolicy(runs / "rl2.onnx"), predict))
    node.callbacks["observation"](SimpleNamespace(data=[0.1, 0.2]))
    for topic in (None, None, "begin_episode", None, "begin_trial", None):
        if topic:
            node.callbacks[topic](SimpleNamespace())
            node.callbacks["observation"](SimpleNamespace(data=[0.1, 0.2]))
        node.callbacks["tick"]()
    assert calls == [(True, 0.0), (False, 1.0), (True, 2.0), (False, 3.0), (True, 0.0), (False, 1.0)]


def test_the_ros_node_runs_dry(runs):
    command = (EXAMPLES / "ros2_node.py", "--dry-run", runs / "rl2.onnx")
    done = run(*command, "--new-model", runs / "rl2.onnx", cwd=runs, before=WITHOUT)
    # 100 ticks with the first observation there, ten without a new one: the third of these is the first fault.
    assert printed(done).splitlines()[0] == "published 100 commands, faults 8, swaps 1"
    assert done.stdout.splitlines()[1] == "the last command: [0.0, 0.0]" and done.stderr == "no new observation\n"
    done = run(*command, "--new-model", "none.onnx", cwd=runs)
    assert "swaps 0" in printed(done) and "kept the old model: " in done.stderr


RCLPY = {
    "rclpy/__init__.py": """
        from types import SimpleNamespace
        parameters = {}

        def init(args):
            parameters.update(word.split(":=") for word in args if ":=" in word)

        def ok():
            return True

        def shutdown():
            print("shut down")

        def create_node(name):
            return Node()

        class Node:
            def __init__(self):
                self.callbacks, self.groups = {}, {}

            def declare_parameter(self, name, default):
                return SimpleNamespace(value=type(default)(parameters.get(name, default)))

            def create_publisher(self, msg_type, topic, qos_profile):
                return SimpleNamespace(publish=lambda message: print(topic, msg_type.__name__, len(message.data)))

            def create_subscription(self, msg_type, topic, callback, qos_profile, *, callback_group=None):
                self.callbacks[topic] = lambda data: callback(msg_type(data=data))
                self.groups[topic] = callback_group

            def create_timer(self, timer_period_sec, callback):
                print("period", timer_period_sec)
                self.tick = callback

            def get_logger(self):
                return SimpleNamespace(warning=lambda line: print("warning:", line))

            def destroy_node(self):
                print("destroyed")
        """,
    "rclpy/callback_groups.py": "class MutuallyExclusiveCallbackGroup: ...",
    "rclpy/qos.py": "qos_profile_sensor_data = object()",
    "rclpy/executors.py": """
        class ExternalShutdownException(Exception): ...

        class MultiThreadedExecutor:
            def __init__(self, num_threads):
                assert num_threads == 2

            def add_node(self, node):
                self.node = node

            def spin(self):
                node = self.node
                assert node.groups["new_model"] is not None and node.groups["observation"] is None
                node.callbacks["observation"]([0.1, 0.2])
                node.callbacks["reward"](-1.0)
                node.tick()
                node.callbacks["new_model"]("none.onnx")
                node.callbacks["observation"]([0.1])
                node.tick()
                raise ExternalShutdownException
        """,
    "std_msgs/__init__.py": "",
    "std_msgs/msg.py": """
        from types import SimpleNamespace

        class Empty(SimpleNamespace): ...
        class Float32(SimpleNamespace): ...
        class Float32MultiArray(SimpleNamespace): ...
        class Float64MultiArray(SimpleNamespace): ...
        class String(SimpleNamespace): ...
        """,
}
"""The part of rclpy that the node calls, with the signatures of ROS 2 Jazzy."""


@pytest.fixture
def rclpy_folder(tmp_path):
    for name, text in RCLPY.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text), encoding="utf-8")
    return tmp_path


def test_the_ros_node_calls_rclpy(runs, rclpy_folder):
    command = (EXAMPLES / "ros2_node.py", "--ros-args", "-p", "model:=rl2.onnx", "-p", "period_s:=0.01")
    lines = printed(run(*command, cwd=runs, path=rclpy_folder)).splitlines()
    assert lines[:2] == ["period 0.01", "command Float64MultiArray 2"]
    assert lines[2].startswith("warning: kept the old model: ")
    assert lines[3] == "warning: ValueError: observation has shape (1,); expected (2,)"
    assert lines[4:] == ["command Float64MultiArray 2", "destroyed", "shut down"]


def test_the_ros_node_names_the_missing_package(runs, rclpy_folder):
    done = run(EXAMPLES / "ros2_node.py", cwd=runs)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "ros2_node.py: No module named 'rclpy'; source the setup.bash of your ROS 2 first, or try --dry-run\n"
    )
    done = run(EXAMPLES / "ros2_node.py", "--ros-args", "-p", "model:=none.onnx", cwd=runs, path=rclpy_folder)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "none.onnx" in done.stderr
    assert done.stdout.splitlines() == ["destroyed", "shut down"]


def test_the_lerobot_runner_sends_named_joints(runs):
    command = (EXAMPLES / "lerobot_runner.py", runs / "rl2.onnx", "--episodes", "2", "--steps", "3")
    lines = printed(run(*command, cwd=runs, before=WITHOUT)).splitlines()
    number = r"-?\d\.\d{3}"
    names = OnnxPolicy(runs / "rl2.onnx").metadata["action_names"]
    last = ", ".join(rf"{name}\.pos {number}" for name in names)
    assert len(lines) == 2
    for episode, line in enumerate(lines):
        assert re.fullmatch(rf"episode {episode}: 3 actions sent; the last: {last}", line)


def test_the_lerobot_runners_episodes_are_as_long_as_those_of_training(runs):
    lines = printed(run(EXAMPLES / "lerobot_runner.py", runs / "rl2.onnx", "--episodes", "1", cwd=runs)).splitlines()
    assert [line.split(";")[0] for line in lines] == ["episode 0: 10 actions sent"]


def test_a_file_without_names_is_one_line(runs, tmp_path):
    class Nameless(gymnasium.Wrapper):  # as a robot's own environment may be
        observation_names = action_names = None
        unwrapped = property(lambda self: self)

    goals = metarl.envs.distribution("navigation", name="goals")
    metarl.load(runs / "maml").export(tmp_path / "nameless.onnx", Nameless(metarl.envs.make(goals.test_tasks[0])))
    done = run(EXAMPLES / "lerobot_runner.py", "nameless.onnx", cwd=tmp_path)
    message = "the file does not name observations and actions; export it with an environment that does"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"lerobot_runner.py: {message}\n")


def test_lerobots_tensors_and_arrays_are_treated_alike(runs):
    example, exported = load("lerobot_runner"), OnnxPolicy(runs / "rl2.onnx")
    arrays, tensors = example.LeRobotPolicy(exported), example.LeRobotPolicy(exported)
    rng, state, plain = np.random.default_rng(0), None, []
    for step in range(6):
        if step == 3:  # LeRobot begins an episode: the memory is kept
            arrays.reset()
            tensors.reset()
        observations, rewards = rng.standard_normal((2, 2), np.float32), rng.standard_normal(2).astype(np.float32)
        action = arrays.select_action({"observation.state": observations, "next.reward": rewards, "task": "reach"})
        parameter = torch.nn.Parameter(torch.from_numpy(observations))  # requires a gradient
        tensor = tensors.select_action({"observation.state": parameter, "next.reward": torch.from_numpy(rewards)})
        assert isinstance(tensor, torch.Tensor) and tensor.shape == (2, 2) and not tensor.requires_grad
        np.testing.assert_array_equal(tensor.numpy(), action)
        expected, state = exported.predict(observations, state, np.full(2, step in (0, 3)), True, rewards)
        np.testing.assert_array_equal(action, expected)
        plain.append(action)
    forgot = example.LeRobotPolicy(exported)
    begun = forgot.select_action({"observation.state": observations, "next.reward": rewards})
    assert np.abs(begun - plain[-1]).max() > 1e-6
    arrays.new_task()
    np.testing.assert_array_equal(
        arrays.select_action({"observation.state": observations, "next.reward": rewards}), begun
    )


def test_a_robot_with_other_joints_is_refused(runs):
    example = load("lerobot_runner")
    policy = example.LeRobotPolicy(OnnxPolicy(runs / "maml.onnx"))
    robot = example.FakeRobot(policy.observation_keys, [*policy.action_keys, "gripper.pos"])
    with pytest.raises(ValueError, match=r"only the policy has gripper\.pos"):
        example.run_episode(robot, policy, 1, 0.0)


def test_recording_and_adapting_ends_in_a_file_for_the_robot(runs, tmp_path):
    command = (EXAMPLES / "adapt_on_recordings.py", runs / "maml", "--task", "3")
    assert printed(run(*command, "--record", "recorded", cwd=tmp_path)) == "2 episodes of goals 3 in recorded\n"
    done = run(*command, "--adapt-on", "recorded", "--save", "adapted", "--export", "new.onnx", cwd=tmp_path)
    line, *rest = printed(done).splitlines()
    assert re.fullmatch(r"return on goals 3: -\d+\.\d before, -\d+\.\d after adapting", line)
    assert rest == ["saved in adapted; load it with metarl.load", "exported to new.onnx"]
    exported, saved = OnnxPolicy(tmp_path / "new.onnx"), metarl.load(tmp_path / "adapted")
    assert exported.metadata["adapted"] and exported.metadata["task"]["index"] == 3 and saved.adapted
    expected, _ = metarl.load(runs / "maml").adapt(recorded(tmp_path)).predict(np.ones(2), deterministic=True)
    for policy in (exported, saved):
        np.testing.assert_allclose(policy.predict(np.ones(2), deterministic=True)[0], expected, atol=1e-5)


def recorded(folder):
    return [metarl.Trajectory(**np.load(path)) for path in sorted(folder.glob("recorded/*.npz"))]


@pytest.fixture
def adapt_on_recordings(tmp_path, monkeypatch, capsys):
    """Return a function that runs the example in a new folder and returns status, output and errors."""
    example = load("adapt_on_recordings")
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["adapt_on_recordings.py", *map(str, arguments)])
        return example.main(), *capsys.readouterr()

    return call


@pytest.mark.parametrize("kind", AGENTS)
def test_an_agent_adapts_to_recordings(runs, kind, adapt_on_recordings, tmp_path):
    torch.manual_seed(0)
    status, out, _ = adapt_on_recordings(runs / kind, "--record", "recorded", "--task", 3)
    assert (status, out) == (0, "2 episodes of goals 3 in recorded\n")  # one step's, or a trial's without the last
    episodes = recorded(tmp_path)
    assert [episode.actions.shape for episode in episodes] == [(10, 2)] * 2
    assert all(episode.log_probs is None for episode in episodes)
    actions = np.concatenate([episode.actions for episode in episodes])
    assert np.abs(actions).max() <= 1.0 and len(np.unique(actions)) > 20  # in the units that were sent, and exploring

    status, out, _ = adapt_on_recordings(runs / kind, "--adapt-on", "recorded", "--task", 3)
    agent = metarl.load(runs / kind)
    env = metarl.envs.make(metarl.evaluation.distribution_of(agent.config).test_tasks[3])
    returns = []
    for policy in (agent, agent.adapt(episodes)):
        (observation, _), state, reward, total, ended = env.reset(), None, None, 0.0, False
        while not ended:
            action, state = policy.predict(observation, state, deterministic=True, reward=reward)
            observation, reward, _, ended, _ = env.step(action)
            total += reward
        returns.append(total)
    assert returns[0] != returns[1]
    expected = "return on goals 3: {:.1f} before, {:.1f} after adapting\n".format(*returns)
    assert (status, out) == (0, expected)


@pytest.mark.parametrize("name", ON_A_ROBOT)
@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file or directory: 'bad.onnx'"), (b"", "bad.onnx is not a complete file of `metarl export`")],
)
def test_a_bad_model_is_one_line(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / "bad.onnx").write_bytes(content)
    arguments = ["--dry-run", "bad.onnx"] if name == "ros2_node.py" else ["bad.onnx"]
    done = run(EXAMPLES / name, *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"{name}: ") and message in done.stderr


REST = {"rewards": np.zeros(1), "terminated": np.zeros(1, bool), "truncated": np.ones(1, bool)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (None, "it is no archive of numpy.savez"),
        ({"observations": np.zeros((1, 2)), **REST}, "'actions'"),
        ({"observations": np.full((1, 2), np.nan), "actions": np.zeros((1, 2)), **REST}, "observations holds NaN"),
        ({"observations": np.array([{}]), "actions": np.zeros((1, 2)), **REST}, "allow_pickle=False"),
    ],
)
def test_a_bad_recording_is_one_line(runs, fields, message, adapt_on_recordings, tmp_path):
    (tmp_path / "recorded").mkdir()
    path = tmp_path / "recorded" / "episode.npz"
    if fields is None:
        path.write_text("no archive", encoding="utf-8")
    else:
        np.savez(path, **fields)
    status, out, error = adapt_on_recordings(runs / "maml", "--adapt-on", "recorded")
    assert (status, out, error.count("\n")) == (2, "", 1)
    start = "adapt_on_recordings.py: recorded/episode.npz is not a recorded episode: "
    assert error.startswith(start) and message in error


def test_a_missing_path_or_task_is_one_line(runs, adapt_on_recordings):
    for arguments, message in (
        ((runs / "maml", "--adapt-on", "none"), "none has no .npz files; record some with --record none"),
        (("none", "--record", "recorded"), "none holds no run"),
        ((runs / "maml", "--record", "recorded", "--task", 1000), "--task 1000: the run has 100 held-out tasks"),
    ):
        status, out, error = adapt_on_recordings(*arguments)
        assert (status, out, error.count("\n")) == (2, "", 1) and message in error
