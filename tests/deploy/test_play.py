"""`metarl play`: what is shown is what happened, and the files hold it."""

import os
import subprocess
import sys

import gymnasium
import imageio_ffmpeg
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import metarl
from metarl.cli import main
from metarl.deploy.play import Episode, Play, play
from metarl.envs import distribution, make
from metarl.errors import UserError

MAML = "--agent.adaptation-steps 2 --rollouts-per-task 3 --agent.hidden-sizes [8] --agent.outer.epochs=1"
RL2 = "--agent.trial-episodes 3 --agent.encoder-sizes [8] --agent.memory.size 8 --agent.epochs 1 --agent.minibatches 1"
SMALL = "--num-tasks 2 --num-workers 0 --device cpu --stages.0.iterations 1 --evaluation.num-tasks 1"
HORIZON = 12
PACE = ["--speed", 10, "--fps", 10]  # few frames


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A small run of each kind of agent."""
    folder = tmp_path_factory.mktemp("runs")
    for name, config, flags in (
        ("maml", "navigation_maml_ppo", MAML),
        ("rl2", "navigation_rl2", f"{RL2} --rollouts-per-task 1"),
        ("cued", "continual_cued_wedges_rl2", f"{RL2} --rollouts-per-task 1 --max-iterations 1"),
    ):
        horizon = "" if name == "cued" else f"--stages.0.tasks.horizon {HORIZON}"
        with pytest.raises(SystemExit) as error:
            main(["train", config, "--run-dir", str(folder / name), *f"{SMALL} {horizon} {flags}".split()])
        assert error.value.code == 0
    return folder


@pytest.fixture
def mistake(command):
    """Run `metarl play` with a mistake: its one line."""

    def run(*arguments):
        status, out, err = command("play", *arguments)
        assert (status, out) == (2, ""), err
        assert err.startswith("metarl: ") and len(err.splitlines()) == 1
        return err

    return run


def task_of(policy, index=0):
    tasks = policy.config.stages[0].tasks
    return distribution("navigation", name=tasks.name, horizon=tasks.horizon).test_tasks[index]


def episode(policy, env, state=None, reward=None, seed=None, deterministic=False):
    """One episode by hand: its rewards, whether each step was a success, and the state."""
    rewards, successes = [], []
    observation, _ = env.reset(seed=seed)
    ended = False
    while not ended:
        start = np.array([not rewards])
        action, state = policy.predict(observation, state, start, deterministic=deterministic, reward=reward)
        observation, reward, terminated, truncated, info = env.step(action)
        rewards.append(reward)
        successes.append(info["success"])
        ended = terminated or truncated
    return rewards, successes, state


def by_hand(policy, env, seed, deterministic=False):
    """The returns before and after adaptation."""
    torch.manual_seed(seed)
    before, _, state = episode(policy, env, seed=seed, deterministic=deterministic)
    if policy.agent.trial_episodes > 1:  # a trial of three
        between, _, state = episode(policy, env, state, before[-1], deterministic=deterministic)
        after, _, _ = episode(policy, env, state, between[-1], seed, deterministic)
    else:  # K = 2, three episodes each
        adapted = policy.adapt(policy.record(env, 3))
        adapted = adapted.adapt(adapted.record(env, 3))
        torch.manual_seed(seed)
        after, *_ = episode(adapted, env, seed=seed, deterministic=deterministic)
    return sum(before), sum(after)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("agent", ["maml", "rl2"])
def test_returns_are_those_of_the_same_thing_by_hand(runs, agent, deterministic):
    policy = metarl.load(runs / agent)
    task = task_of(policy, 3)
    global_state = torch.random.get_rng_state()
    shown = play(policy, make(task, render_mode="rgb_array"), seed=5, deterministic=deterministic)
    assert torch.equal(torch.random.get_rng_state(), global_state)
    expected = by_hand(policy, make(task), 5, deterministic)
    assert shown.returns == pytest.approx(expected, abs=1e-9)
    assert expected[0] != expected[1]


def test_the_streams_of_gpus_are_left_alone(runs, monkeypatch):
    def seeded(seed):
        raise AssertionError("the stream of a GPU was seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded)
    for name in ("maml", "rl2"):
        policy = metarl.load(runs / name)
        play(policy, make(task_of(policy), render_mode="rgb_array"), seed=5)


def test_an_episode_is_told_step_by_step(runs):
    policy = metarl.load(runs / "maml")
    task = task_of(policy)
    before = play(policy, make(task, render_mode="rgb_array"), seed=1).before
    torch.manual_seed(1)
    env = make(task, render_mode="rgb_array")
    rewards, successes, _ = episode(policy, env, seed=1)
    # 12 steps would take 1.2 s at 10 a second: they are slowed down to 4 s, 3 a second, and each is shown.
    assert before.steps == list(range(HORIZON + 1))
    np.testing.assert_allclose(before.returns, [0.0, *np.cumsum(rewards)], rtol=0, atol=1e-12)
    assert before.success == [None, *(float(value) for value in np.maximum.accumulate(successes))]
    assert len(before.frames) == HORIZON + 1
    env.reset()
    np.testing.assert_array_equal(before.frames[0], env.render())


def test_the_first_and_the_last_step_are_always_shown(runs):
    policy = metarl.load(runs / "rl2")
    shown = play(policy, make(task_of(policy), render_mode="rgb_array"), speed=10.0, fps=20.0)
    # Real time is 10 steps a second: 100 a second at this speed, so every fifth makes 20 frames a second.
    assert shown.before.steps == shown.after.steps == [0, 5, 10, 12]
    assert shown.fps == 20.0
    assert shown.num_frames == len(list(shown.frames)) == 4 + 30  # held for 1.5 s
    assert shown.adapted_by == "2 episodes in memory"


def test_speed_and_frames_a_second(runs):
    policy = metarl.load(runs / "maml")
    env = make(task_of(policy), render_mode="rgb_array")
    # 10 steps a second in real time. At half of it 5 a second, all shown; asked for 2 frames, every second or third.
    assert play(policy, env, speed=0.5).fps == 5.0
    shown = play(policy, env, speed=0.5, fps=2.5)
    assert shown.fps == 2.5 and shown.before.steps == [0, 2, 4, 6, 8, 10, 12]
    assert play(policy, env).fps == pytest.approx(3.0)  # 12 steps in 4 s
    env.unwrapped.metadata = {"render_modes": ["rgb_array"], "render_fps": 0.5}  # 24 s in real time
    assert play(policy, env).fps == pytest.approx(0.8)  # 12 steps in 15 s
    assert shown.adapted_by == "2 steps, 3 episodes each"


class Corridor(gymnasium.Env):
    """A custom environment, as large as `goals`: the episodes end after 4, 6, 8 … steps; success is unknown."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012
    render_mode = "rgb_array"
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,))
    dt = 0.02

    def __init__(self, shape=(33, 61, 3)):
        self.shape, self.length = shape, 2

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.length = 0, self.length + 2
        return np.zeros(2), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(2), 1.0, self.steps == self.length, False, {}

    def render(self):
        return np.full(self.shape, 10 * self.steps, dtype=np.uint8)


def test_a_task_of_one_s_own(runs):
    shown = play(metarl.load(runs / "rl2"), Corridor(), title="corridor", fps=50.0)
    assert (shown.returns, shown.success) == ((4.0, 8.0), (None, None))
    assert (shown.before.steps, shown.after.steps) == (list(range(5)), list(range(9)))
    assert (shown.fps, shown.speed) == (50.0, 1.0)  # nothing tells how long an episode may be
    frames = list(shown.frames)
    assert len(frames) == 9 + 75
    height, width, _ = frames[0].shape
    assert height % 2 == width % 2 == 0
    middle = 68 + 360 // 2  # the pictures are 360 high, below 68 of words
    quarters = width // 4, 3 * width // 4
    greys = [[int(frame[middle, x, 0]) for x in quarters] for frame in frames]
    # One that has ended waits for the other.
    assert greys[:9] == [[10 * min(step, 4), 10 * step] for step in range(9)]
    assert greys[9:] == [[40, 80]] * 75


@pytest.mark.parametrize(("reported", "success"), [(np.nan, None), (0.0, 0.0), (1.0, 1.0)])
def test_a_success_that_is_not_defined_is_none(runs, reported, success):
    class Telling(Corridor):
        def step(self, action):
            *step, info = super().step(action)
            return *step, {**info, "success": reported}

    assert play(metarl.load(runs / "rl2"), Telling()).success == (success, success)


def test_a_gymnasium_time_limit_tells_how_long_it_takes(runs):
    gymnasium.register("Corridor-v0", lambda: Corridor(), max_episode_steps=100)
    try:
        env = gymnasium.make("Corridor-v0", disable_env_checker=True)
    finally:
        del gymnasium.registry["Corridor-v0"]
    shown = play(metarl.load(runs / "rl2"), env)
    assert shown.speed == pytest.approx(0.5)  # 100 steps at 50 a second are 2 s; 4 s are wanted


def test_what_cannot_be_played_is_said(runs):
    policy = metarl.load(runs / "maml")
    task = task_of(policy)
    with pytest.raises(ValueError, match="render_mode is None; build the environment with"):
        play(policy, make(task))
    env = make(task, render_mode="rgb_array")
    with pytest.raises(UserError, match="already adapted"):
        play(policy.adapt(policy.record(env, 1)), env)
    with pytest.raises(UserError, match=r"observations have shape \(17,\); the agent was trained for \(2,\)"):
        play(policy, make(distribution("mujoco").train_tasks[0], render_mode="rgb_array"))
    for pace in ({"speed": 1e-9}, {"fps": 1e-9}, {"speed": 1e308}):  # not even a frame, or no number
        with pytest.raises(UserError, match=r"expected at least 0\.05 for both"):
            play(policy, env, **pace)
    with pytest.raises(ValueError, match=r"render\(\) returned uint8 \(33, 61\); expected"):
        play(policy, Corridor(shape=(33, 61)))


# What is written over the pictures


def made_up(success=(0.0, 1.0), returns=(-1234.5, 98765.4), shape=(360, 480, 3), title="reach-v3, test task 12"):
    """Two episodes of one step, black."""
    pictures = [np.zeros(shape, dtype=np.uint8)] * 2
    before, after = (
        Episode(pictures, [0, 1], [0.0, total], [None, solved]) for total, solved in zip(returns, success, strict=True)
    )
    return Play(before, after, title, "10 steps, 20 episodes each", 10.0, 0.25)


def parts(frame):
    """The words over both pictures, `[2]` strips of the header, and the footer."""
    middle = frame.shape[1] // 2
    return frame[:68, :middle], frame[:68, middle:], frame[-34:]


def gaps(strip):
    """The widest run of columns without ink between the first and the last that have some."""
    inked = np.flatnonzero((strip < 200).any((0, 2)))
    return int(np.diff(inked).max())


@pytest.mark.parametrize(
    ("shape", "title"), [((360, 480, 3), "reach-v3, test task 12"), ((64, 64, 3), "long " * 40), ((1080, 1920, 3), "x")]
)
def test_words_do_not_touch_each_other(shape, title):
    *_, last = made_up(shape=shape, title=title).frames
    for strip in parts(last)[:2]:
        assert gaps(strip[34:]) > 30  # return at the left, success at the right
        assert (strip[:, :6] == 255).all() and (strip[:, -6:] == 255).all()  # and nothing reaches the edge
    assert gaps(parts(last)[1][:34]) > 15  # the label at the left, what it adapted by at the right
    assert gaps(parts(last)[2]) > 30


def test_success_is_written_only_where_there_is_such_a_thing():
    frames = [list(made_up(success=success).frames)[-1] for success in ((0.0, 0.0), (0.0, 1.0), (None, None))]
    strips = [parts(frame)[1][34:, -150:] for frame in frames]
    green = [int(((s[..., 1] > s[..., 0].astype(int) + 60) & (s[..., 1] > s[..., 2])).sum()) for s in strips]
    assert green[0] == 0 and green[1] > 20 and green[2] == 0
    assert (strips[2] == 255).all() and not (strips[0] == 255).all()
    first, *_ = made_up().frames  # before the first step nothing is known
    assert (parts(first)[1][34:, -150:] == 255).all()


# The command


def frames_in(path):
    with Image.open(path) as gif:
        return gif.n_frames


@pytest.mark.parametrize(("agent", "printed"), [("maml", "goals"), ("rl2", "goals"), ("cued", "wedge-3")])
def test_play_writes_both_files(runs, command, agent, printed):
    status, out, err = command("play", runs / agent)
    assert (status, err) == (0, "")
    mp4, gif = (runs / agent / "plots" / f"play_{printed}.{suffix}" for suffix in ("mp4", "gif"))
    before, after, *files = out.splitlines()
    assert files == [str(mp4), str(gif)]
    count, seconds = imageio_ffmpeg.count_frames_and_secs(str(mp4))
    steps = 20 if agent == "cued" else HORIZON
    fps = steps / 4.0  # slowed down to 4 s; the last frame is held for 1.5 s
    assert count == steps + 1 + round(1.5 * fps)
    assert seconds == pytest.approx(count / fps, abs=0.1)
    assert frames_in(gif) == steps + 1  # what is held is one frame
    assert gif.stat().st_size < 3_000_000
    if agent != "cued":
        policy = metarl.load(runs / agent)
        expected = by_hand(policy, make(task_of(policy)), seed=0)
        words = [line.split() for line in (before, after)]
        assert [line[:3] for line in words] == [["before", "adaptation", "return"], ["after", "adaptation", "return"]]
        assert [line[3] for line in words] == [f"{total:.2f}" for total in expected]
        assert all(" ".join(line[4:]) in ("solved", "not solved") for line in words)


def test_play_chooses_the_task_the_stage_and_the_files(runs, command, tmp_path):
    flags = ["--task", "semicircle:2", "--split", "train", "--speed", 20]
    status, out, _ = command("play", runs / "maml", *flags)
    assert status == 0 and "plots/play_semicircle_2_train.gif" in out and "plots/play_semicircle_2_train.mp4" in out
    for number, (flags, names) in enumerate(
        (
            (["--gif", "a.gif"], ["a.gif"]),
            (["--video", "a.gif"], ["a.gif"]),
            (["--video", "a.mp4"], ["a.mp4"]),
            (["--video", "a.mp4", "--gif", "b.gif"], ["a.mp4", "b.gif"]),
        )
    ):
        folder = tmp_path / str(number)
        paths = [folder / word if "." in word else word for word in flags]
        status, out, err = command("play", runs / "cued", "--stage", "wedge 1", *PACE, *paths)
        assert (status, err) == (0, "") and out.splitlines()[2:] == [str(folder / name) for name in names]
        assert sorted(path.name for path in folder.iterdir()) == names


def test_play_is_repeated_by_its_seed(runs, command, tmp_path):
    def returns(seed):
        return command("play", runs / "rl2", "--seed", seed, "--gif", tmp_path / "a.gif")[1]

    assert returns(3) == returns(3) != returns(4)


def test_mistakes_are_told_in_one_line(runs, mistake, tmp_path, monkeypatch):
    run = runs / "maml"
    assert "holds no run" in mistake(tmp_path)
    assert "did you mean 'goals'?" in mistake(run, "--task", "gaols")
    assert "the run has no stage 'other'" in mistake(run, "--stage", "other")
    assert "there is no goals:100; the test split has 100 of goals" in mistake(run, "--task", "goals:100")
    assert "the agent was trained for" in mistake(run, "--task", "cued_wedges")
    assert "--video a.avi: expected a file name that ends in .mp4" in mistake(run, "--video", "a.avi")
    assert "--gif a.mp4: expected a file name that ends in .gif" in mistake(run, "--gif", "a.mp4")
    (tmp_path / "file").touch()
    assert "cannot create its folder" in mistake(run, "--gif", tmp_path / "file" / "a.gif")
    (tmp_path / "a.gif").mkdir()
    assert "is a folder" in mistake(run, "--gif", tmp_path / "a.gif")
    for flag in ("--speed", "--fps"):
        for value in ("0", "fast", "inf"):
            assert f"got '{value}', expected a number above 0" in mistake(run, flag, value)
    for flag in ("--speed", "--fps"):
        assert "expected at least 0.05 for both" in mistake(run, flag, "1e-9", "--video", tmp_path / "a.mp4")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    assert 'pip install "metarl[video]"' in mistake(run, "--video", tmp_path / "a.mp4")
    assert not (tmp_path / "a.mp4").exists()


def test_an_adapted_policy_is_not_played(runs, mistake, tmp_path):
    policy = metarl.load(runs / "maml")
    policy.adapt(policy.record(make(task_of(policy)), 1)).save(tmp_path / "adapted")
    assert "already adapted" in mistake(tmp_path / "adapted", "--gif", tmp_path / "a.gif")


def test_an_opengl_that_does_not_exist_is_said_at_once(tmp_path):
    """As a process of its own, for MuJoCo reads it when it is imported."""
    config = metarl.config.schema.load_config("quickstart")
    (tmp_path / "config.yaml").write_text(metarl.config.schema.dump_config(config))
    command = [sys.executable, "-c", "from metarl.cli import main; main()", "play", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "MUJOCO_GL": "foo"})
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "metarl: MUJOCO_GL=foo is not supported by MuJoCo on this system; unset it, or set it to egl or osmesa\n"
    )


def test_trials_of_one_episode_have_no_after(runs, mistake, tmp_path):
    config = (runs / "rl2" / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(config.replace("trial_episodes: 3", "trial_episodes: 1"))
    (tmp_path / "checkpoints").symlink_to(runs / "rl2" / "checkpoints")
    assert "trials have one episode" in mistake(tmp_path)


def test_custom_tasks_are_played_from_python(runs, mistake, tmp_path):
    config = metarl.load(runs / "maml").config.model_dump(mode="json")
    config["stages"][0]["tasks"] = {"family": "custom"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "checkpoints").symlink_to(runs / "maml" / "checkpoints")
    assert "metarl.play.play" in mistake(tmp_path)


def test_help_names_every_flag(command):
    status, out, _ = command("play", "--help")
    assert status == 0
    for flag in (
        "--task",
        "--stage",
        "--split",
        "--seed",
        "--deterministic",
        "--video",
        "--gif",
        "--fps",
        "--speed",
    ):
        assert flag in out
