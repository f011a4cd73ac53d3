"""A ROS 2 node that runs an exported policy; --dry-run runs it without ROS.

    metarl export runs/reach policy.onnx
    python docs/examples/ros2_node.py --ros-args -p model:=policy.onnx
    python docs/examples/ros2_node.py --dry-run policy.onnx --new-model adapted.onnx

It subscribes to

- `observation` (std_msgs/Float32MultiArray, in the order of the model's `observation_names`),
- `reward` (Float32, of the last command),
- `new_model` (String, the path of a model that takes over, for example one adapted to a new task),

and publishes `command` (Float64MultiArray, for the forward controllers of ros2_control) once a control period: that of
the model, or the parameter `period_s`. It publishes nothing before the first observation. After three ticks without a
new one, commands go to zero by a fifth of half their range a tick: from the end of a symmetric range this takes five
ticks. A stopped node publishes nothing: let the controller below time out.

A model with a memory needs `reward` and two more topics (Empty): `begin_episode`, after the robot was put back to where
it starts, with the same task, and `begin_trial`, for another task. Without them, an episode begins after each horizon
of training.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from metarl.runtime import ControlLoop, OnnxPolicy

MAX_AGE_TICKS = 3


class PolicyNode:
    """The node without ROS: takes messages, returns commands, and reports a model that it cannot load.

    Args:
        model: path of the model.
        report: prints or logs one line.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not an exported policy.
    """

    def __init__(self, model: str, report: Callable[[str], Any]) -> None:
        policy = OnnxPolicy(Path(model))
        self.period_s: float | None = policy.metadata["control_period_s"]
        half_range = (policy.action_high - policy.action_low) / 2
        self.loop = ControlLoop(policy, np.zeros(policy.action_size), on_fault="safe", max_change=0.2 * half_range)
        self.observation_size, self._report = policy.observation_size, report
        self._observation: Any = None
        self._age_ticks, self._reward, self._fault = 0, None, ""

    def on_observation(self, message: Any) -> None:
        """Keep an observation for the next tick."""
        self._observation, self._age_ticks = np.asarray(message.data), 0

    def on_reward(self, message: Any) -> None:
        """Keep a reward for the next tick."""
        self._reward = message.data

    def on_new_model(self, message: Any) -> None:
        """Swap in another model at the next tick; called from a separate thread."""
        try:
            self.loop.swap(OnnxPolicy(Path(message.data)))
        except (OSError, ValueError) as error:
            self._report(f"kept the old model: {error}")

    def on_begin_episode(self, _message: Any) -> None:
        """Begin an episode of the same task with the next tick."""
        self.loop.begin_episode()

    def on_begin_trial(self, _message: Any) -> None:
        """Begin a trial of another task with the next tick: resets a memory."""
        self.loop.begin_trial()

    def tick(self) -> list[float] | None:
        """Return the command of one tick; None before the first observation."""
        if self._observation is None:
            return None
        stale = self._age_ticks >= MAX_AGE_TICKS
        faults = self.loop.counts.faults
        observation = np.full(self.observation_size, np.nan) if stale else self._observation
        command = self.loop.step(observation, self._reward)
        fault = "" if self.loop.counts.faults == faults else "no new observation" if stale else self.loop.last_fault
        if fault and fault != self._fault:
            self._report(fault)
        self._age_ticks, self._reward, self._fault = self._age_ticks + 1, None, fault  # a reward counts once
        return [float(value) for value in command]


def connect(core: PolicyNode, node: Any, messages: Any, period_s: float, qos: Any, load_group: Any = None) -> None:
    """Connect the core to the topics and the timer of a ROS node, or of a stand-in."""
    publisher = node.create_publisher(messages.Float64MultiArray, "command", 1)

    def tick() -> None:
        command = core.tick()
        if command is not None:
            publisher.publish(messages.Float64MultiArray(data=command))

    node.create_subscription(messages.Float32MultiArray, "observation", core.on_observation, qos)
    node.create_subscription(messages.Float32, "reward", core.on_reward, qos)
    node.create_subscription(messages.Empty, "begin_episode", core.on_begin_episode, 1)
    node.create_subscription(messages.Empty, "begin_trial", core.on_begin_trial, 1)
    node.create_subscription(messages.String, "new_model", core.on_new_model, 1, callback_group=load_group)
    node.create_timer(period_s, tick)


def run_node() -> None:
    """Run the node until it is stopped."""
    try:
        import rclpy
        from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
        from rclpy.executors import ExternalShutdownException, MultiThreadedExecutor
        from rclpy.qos import qos_profile_sensor_data
        from std_msgs import msg
    except ImportError as error:
        stop(f"{error}; source the setup.bash of your ROS 2 first, or try --dry-run")
    rclpy.init(args=sys.argv)
    node = rclpy.create_node("metarl_policy")
    try:
        model = node.declare_parameter("model", "policy.onnx").value
        core = PolicyNode(model, node.get_logger().warning)
        period_s = node.declare_parameter("period_s", core.period_s or 0.02).value
        # Loading has its own callback group and thread, so that ticks continue meanwhile.
        connect(core, node, msg, period_s, qos_profile_sensor_data, MutuallyExclusiveCallbackGroup())
        executor = MultiThreadedExecutor(num_threads=2)
        executor.add_node(node)
        executor.spin()
    except (OSError, ValueError, ImportError) as error:
        stop(str(error))
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        node.destroy_node()
        if rclpy.ok():
            rclpy.shutdown()


class DryNode:
    """A stand-in for a ROS node: keeps the callbacks of topics and timer, and the published commands."""

    def __init__(self) -> None:
        self.published: list[Any] = []
        self.callbacks: dict[str, Callable[..., None]] = {}

    def create_publisher(self, _kind: Any, _topic: str, _qos: Any) -> Any:
        """Return a publisher."""
        return SimpleNamespace(publish=self.published.append)

    def create_subscription(self, _kind: Any, topic: str, callback: Callable[..., None], _qos: Any, **_: Any) -> None:
        """Keep the callback of a topic."""
        self.callbacks[topic] = callback

    def create_timer(self, _period_s: float, callback: Callable[..., None]) -> None:
        """Keep the callback of the timer."""
        self.callbacks["tick"] = callback


def dry_run(model: str, new_model: str | None) -> None:
    """Run 100 ticks on random observations. Half-way another model takes over; the last ten get no observation."""
    try:
        core = PolicyNode(model, lambda line: print(line, file=sys.stderr))
    except (OSError, ValueError, ImportError) as error:
        stop(str(error))
    node, rng = DryNode(), np.random.default_rng(0)
    names = ("Empty", "Float32", "Float32MultiArray", "Float64MultiArray", "String")
    connect(core, node, SimpleNamespace(**dict.fromkeys(names, SimpleNamespace)), core.period_s or 0.02, qos=1)
    node.callbacks["tick"]()  # before the first observation: nothing is published
    for tick in range(100):
        if tick < 90:
            observation = rng.uniform(-0.5, 0.5, core.observation_size).tolist()
            node.callbacks["observation"](SimpleNamespace(data=observation))
            node.callbacks["reward"](SimpleNamespace(data=-1.0))
        if tick == 50 and new_model:
            node.callbacks["new_model"](SimpleNamespace(data=new_model))
        node.callbacks["tick"]()
    counts = core.loop.counts
    print(f"published {len(node.published)} commands, faults {counts.faults}, swaps {counts.swaps}")
    print(f"the last command: {node.published[-1].data}")


def stop(message: str) -> None:
    """Exit with status 2 and one line."""
    print(f"ros2_node.py: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A ROS 2 node that runs an exported policy; see the top of the file.")
    parser.add_argument("--dry-run", metavar="MODEL", help="run without ROS, on random observations")
    parser.add_argument("--new-model", metavar="MODEL", help="model that takes over half-way through a dry run")
    options, _ = parser.parse_known_args()  # the rest is for ROS
    if options.dry_run:
        dry_run(options.dry_run, options.new_model)
    else:
        run_node()
