"""`metarl play`."""

from __future__ import annotations

import argparse
import contextlib
import math
from pathlib import Path

from metarl.cli.arguments import Parser, add_checkpoint, add_task_selection, new_file, not_negative, run_folder
from metarl.errors import UserError
from metarl.runs.lock import own_folder


def play(arguments: list[str]) -> int:
    """Record an episode before and after adaptation."""
    parser = Parser(
        "metarl play",
        description="Record an episode of one task before and one after adaptation, side by side, as MP4 and GIF.",
        epilog="An agent of the MAML family adapts as in training, on episodes that are not shown. For an agent with a "
        "memory, the first and the last episode of one trial are shown. Both episodes start from the same seed.",
    )
    parser.add_argument("run_dir", type=run_folder, help="a run directory of `metarl train`")
    add_checkpoint(parser)
    add_task_selection(parser, "--task", "the task, e.g. reach-v3 or reach-v3:7 (default: the first task of the run)")
    parser.add_argument(
        "--seed", type=not_negative, default=0, help="seed of both episodes and all actions (default: 0)"
    )
    parser.add_argument("--deterministic", action="store_true", help="use mean actions instead of sampled ones")
    parser.add_argument(
        "--video", metavar="FILE.mp4", type=new_file, help="path of the MP4; writes no GIF without --gif"
    )
    parser.add_argument(
        "--gif", metavar="FILE.gif", type=new_file, help="path of the GIF; writes no MP4 without --video"
    )
    parser.add_argument("--fps", type=_above_zero, default=20.0, help="approximate frame rate of the MP4 (default: 20)")
    parser.add_argument(
        "--speed",
        type=_above_zero,
        metavar="X",
        help="playback speed relative to real time (default: 1, adjusted so that a full episode lasts 4 to 15 s)",
    )
    options = parser.parse_args(arguments)

    from metarl.envs.drawing.rendering import check_gl, check_mp4, write_gif, write_mp4

    check_gl()  # first: the environments import MuJoCo, which fails on an unknown MUJOCO_GL

    from rich.console import Console

    from metarl.build import task_of
    from metarl.deploy.play import play as record
    from metarl.deploy.policy import load
    from metarl.envs import FAMILIES, make

    policy = load(options.run_dir, checkpoint=options.checkpoint)
    if options.task is None and any(stage.tasks.family not in FAMILIES for stage in policy.config.stages):
        raise UserError("the run has custom tasks; call metarl.play.play(metarl.load(…), env) from Python")
    task = task_of(policy.config, options.task, options.split, options.stage)
    mp4, gif = _files(options, task.name)
    if mp4 is not None:
        check_mp4()
    console = Console(markup=False)  # task names may have brackets
    with console.status("playing and rendering"), contextlib.closing(make(task, render_mode="rgb_array")) as env:
        play = record(
            policy,
            env,
            seed=options.seed,
            deterministic=options.deterministic,
            fps=options.fps,
            speed=options.speed,
            title=f"{task.name}, {options.split} task {task.index}",
        )
    for phase, total, success in zip(("before", "after"), play.returns, play.success, strict=True):
        solved = "" if success is None else "solved" if success else "not solved"
        print(f"{phase} adaptation".ljust(20) + f"return {total:9.2f}  {solved}".rstrip())
    for path, write in ((mp4, write_mp4), (gif, write_gif)):
        if path is not None:
            with console.status("writing"):
                write(play.frames, path, play.fps)
            print(path)
    return 0


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0")
    return value


def _files(options: argparse.Namespace, name: str) -> tuple[Path | None, Path | None]:
    """Return the paths of the MP4 and the GIF, None for one not asked for; raises UserError if one is not usable."""
    mp4, gif = options.video, options.gif
    if mp4 is not None and mp4.suffix.lower() == ".gif" and gif is None:
        mp4, gif = None, mp4
    if mp4 is None and gif is None:
        _, _, index = (options.task or "").partition(":")
        parts = ["play", name, index, "train" if options.split == "train" else ""]
        stem = own_folder(Path(options.run_dir), "plots") / "_".join(filter(None, parts))
        mp4, gif = stem.with_name(f"{stem.name}.mp4"), stem.with_name(f"{stem.name}.gif")
    for flag, path, suffix in (("--video", mp4, ".mp4"), ("--gif", gif, ".gif")):
        if path is None:
            continue
        if path.suffix.lower() != suffix:
            raise UserError(f"{flag} {path}: expected a file name that ends in {suffix}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{flag} {path}: cannot create its folder: {error.strerror}") from error
        if path.is_dir():
            raise UserError(f"{flag} {path} is a folder; name a file")
    return mp4, gif
