"""A 50 Hz control loop with guard rails around an exported policy, and a policy swap while it runs.

    metarl export runs/reach policy.onnx
    python docs/examples/control_loop.py policy.onnx --watch adapted.onnx --seconds 10

`--watch` names a file that another process writes after adapting, such as docs/examples/adapt_on_recordings.py. A
second thread loads it as soon as it exists, and whenever it changes. The robot is a stand-in: replace it with your
driver, with the same `read` and `write`. Needs only numpy, onnxruntime and metarl/runtime.py.

For a policy with a memory the loop begins a new episode of the same task after each horizon of training. A driver that
puts the robot back to where it starts calls `loop.begin_episode()` then, and `loop.begin_trial()` for another task.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from metarl.runtime import ControlLoop, OnnxPolicy


class Robot:
    """A stand-in for a driver: joints that follow commanded velocities, sensors with noise and faults.

    Args:
        num_sensors: O; each sensor measures one joint.
        num_joints: A.
        period_s: time between two commands.
        fault_every: every Nth reading is broken, alternately out of range and NaN; 0: none.
    """

    def __init__(self, num_sensors: int, num_joints: int, period_s: float, fault_every: int) -> None:
        self._period_s, self._fault_every, self._rng = period_s, fault_every, np.random.default_rng(0)
        self._positions, self._velocities = np.zeros(num_joints), np.zeros(num_joints)
        self._commands, self._goal = np.zeros(num_joints), self._rng.uniform(-0.5, 0.5, num_joints)
        self._num_sensors, self._readings, self.broken_readings = num_sensors, 0, 0

    def read(self) -> tuple[NDArray[np.float64], float]:
        """Return the sensor readings `[O]` and the reward of the last command: minus the distance to the goal."""
        sensed = np.resize(self._positions, self._num_sensors) + self._rng.normal(0.0, 1e-3, self._num_sensors)
        self._readings += 1
        if self._fault_every and self._readings % self._fault_every == 0:
            self.broken_readings += 1
            sensed[0] = (np.nan, 1e6)[self.broken_readings % 2]
        return sensed, -float(np.linalg.norm(self._positions - self._goal))

    def write(self, commands: NDArray[np.float32]) -> None:
        """Command velocities `[A]`. The joints reach them with a time constant of 0.1 s."""
        self._commands = np.asarray(commands, np.float64)
        self._velocities += (self._commands - self._velocities) * (1.0 - np.exp(-self._period_s / 0.1))
        self._positions += self._velocities * self._period_s


def watch(path: Path, loop: ControlLoop, stop: threading.Event) -> None:
    """Swap in the policy in `path` whenever the file changes. A bad file is reported and changes nothing."""
    seen = None
    while not stop.is_set():
        found = path.stat().st_mtime_ns if path.is_file() else None
        if found not in (None, seen):
            try:
                loop.swap(OnnxPolicy(path))  # takes over at the next tick, atomically
            except (OSError, ValueError) as error:
                print(f"kept the old policy: {error}", file=sys.stderr)
        seen = found
        stop.wait(0.1)


def run(loop: ControlLoop, robot: Robot, period_s: float, num_ticks: int) -> tuple[float, int]:
    """Run ticks at absolute times. Return the seconds that they took, and the number of skipped ticks."""
    began, tick, skipped = time.perf_counter(), 0, 0
    for _ in range(num_ticks):
        wait_s = began + tick * period_s - time.perf_counter()  # relative to the start, so that delays do not add up
        if wait_s > 0:
            time.sleep(wait_s)
        late = int(-wait_s / period_s)  # whole periods late: skip them, no burst to catch up
        skipped, tick = skipped + max(0, late), tick + max(0, late) + 1
        observation, reward = robot.read()
        robot.write(loop.step(observation, reward))
    return time.perf_counter() - began, skipped


def main() -> None:
    """Run the loop and print its counts."""
    parser = argparse.ArgumentParser(description="An exported policy in a control loop, with guard rails.")
    parser.add_argument("policy", type=Path, help="file of `metarl export`")
    parser.add_argument("--watch", type=Path, help="file of a policy that takes over when it appears or changes")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rate", type=float, help="ticks per second (that of the file, or 50)")
    parser.add_argument("--episode-ticks", type=int, help="ticks in an episode (for a memory: its horizon of training)")
    parser.add_argument("--fault-every", type=int, default=25, metavar="N", help="break one reading in N (0: none)")
    options = parser.parse_args()
    try:
        policy = OnnxPolicy(options.policy)
        period_s = 1.0 / options.rate if options.rate else policy.metadata["control_period_s"] or 0.02
        loop = ControlLoop(
            policy,
            safe_action=np.zeros(policy.action_size),  # velocities: stand still
            on_fault="hold",
            observation_low=-10.0,
            observation_high=10.0,
            max_change=0.2 * (policy.action_high - policy.action_low) / 2,
            deadline_s=period_s,
            episode_ticks=options.episode_ticks,
        )
    except (OSError, ValueError, ImportError) as error:
        parser.exit(2, f"control_loop.py: {error}\n")
    robot = Robot(policy.observation_size, policy.action_size, period_s, options.fault_every)
    stop = threading.Event()
    watcher = threading.Thread(target=watch, args=(options.watch, loop, stop)) if options.watch else None
    if watcher:
        watcher.start()
    try:
        seconds, skipped = run(loop, robot, period_s, round(options.seconds / period_s))
    finally:  # also after Ctrl-C: stand still
        robot.write(np.zeros(policy.action_size, np.float32))
        stop.set()
        if watcher:
            watcher.join()
    counts = loop.counts
    print(f"{counts.ticks} ticks in {seconds:.2f} s: {counts.ticks / seconds:.1f} Hz, {skipped} skipped")
    print(f"faults {counts.faults} of {robot.broken_readings} broken readings; the last: {loop.last_fault or 'none'}")
    print(f"limited {counts.limited}, deadline misses {counts.deadline_misses}, swaps {counts.swaps}")


if __name__ == "__main__":
    main()
