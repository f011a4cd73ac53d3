"""`metarl plot`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from metarl.cli.arguments import Parser
from metarl.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from metarl.config import RunConfig
    from metarl.continual import Evaluation

_NOT_THE_METHOD = {"seed", "device", "num_workers", "checkpoint_every_iterations", "keep_checkpoints"}
"""Settings in which runs of one method may differ."""


class _Run(NamedTuple):
    path: Path
    config: RunConfig
    lines: list[dict[str, Any]]
    evaluations: list[Evaluation]
    finished: int

    @property
    def names(self) -> list[str]:
        return [stage.name for stage in self.config.stages]


def plot(arguments: list[str]) -> int:
    """Draw what runs have tracked."""
    parser = Parser(
        "metarl plot",
        description="Draw what runs have tracked, as PNG files in plots/ of each: learning.png; adaptation.png if "
        "there is any; of several stages also continual.png and matrix.png. Several such runs that have finished are "
        "compared in stability_plasticity.png, those that differ in their seed alone as one method.",
    )
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="what `metarl train` wrote")
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="for one run: where its figures go; for several: where stability_plasticity.png goes (plots/ of the "
        "first run); made if need be",
    )
    options = parser.parse_args(arguments)
    paths = list({path.resolve(): path for path in map(Path, options.run_dirs)}.values())
    runs = [_read(path) for path in paths]
    for run in runs:
        folder = options.out if options.out and len(runs) == 1 else run.path / "plots"
        for name, figure in _figures(run):
            _save(figure, folder / name)
    if len(runs) > 1:
        _compare(runs, options.out or runs[0].path / "plots")
    return 0


def _read(path: Path) -> _Run:
    from metarl.config import load_config
    from metarl.continual import evaluations, finished_stages
    from metarl.tracking import read_metrics

    if not (path / "config.yaml").is_file():
        raise UserError(f"{path} holds no run: there is no config.yaml; train one with `metarl train CONFIG`")
    config = load_config(path / "config.yaml")
    try:
        lines = read_metrics(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path / 'metrics.jsonl'}: {error}") from error
    if not any("meta_train/return_post" in line for line in lines):
        raise UserError(f"{path} has tracked nothing yet; go on with `metarl train CONFIG --run-dir {path} --resume`")
    scores = evaluations(lines, [stage.name for stage in config.stages])
    return _Run(path, config, lines, scores, finished_stages(scores, [stage.iterations for stage in config.stages]))


def _figures(run: _Run) -> Iterator[tuple[str, Figure]]:
    from metarl import plotting
    from metarl.continual import score_matrix

    spans = plotting.stage_spans(run.lines, run.names)
    yield "learning.png", plotting.learning_curves(run.lines, spans)
    in_memory = hasattr(run.config.agent, "trial_episodes")
    abscissa = "episodes of the trial before this one" if in_memory else "adaptation steps"
    adaptation = plotting.adaptation_curves(run.lines, run.names, abscissa)
    if adaptation:
        yield "adaptation.png", adaptation
    if len(run.names) > 1 and run.evaluations:
        yield "continual.png", plotting.continual_curves(run.evaluations, spans, run.names)
        pre, post = (score_matrix(run.evaluations, len(run.names), run.finished, pre=pre) for pre in (True, False))
        yield "matrix.png", plotting.score_matrices(pre, post, run.names)


def _compare(runs: Sequence[_Run], folder: Path) -> None:
    """Draw the runs that have finished several stages by stability and plasticity; say which are left out."""
    from metarl import plotting
    from metarl.continual import forgetting, plasticity, score_matrix

    sequences = [run for run in runs if len(run.names) > 1]
    compared, points = [], []
    for run in sequences:
        matrix = score_matrix(run.evaluations, len(run.names), run.finished)
        place = plasticity(matrix), 1.0 - forgetting(matrix)
        if run.finished == len(run.names) and all(map(math.isfinite, place)):
            compared.append(run)
            points.append(place)
        else:
            print(f"{run.path} is not compared: it has no scores of all its stages at their end yet")
    if len(compared) > 1:
        labelled = [plotting.Point(label, *place) for label, place in zip(_labels(compared), points, strict=True)]
        _save(plotting.stability_plasticity(labelled), folder / "stability_plasticity.png")


def _labels(runs: Sequence[_Run]) -> list[str]:
    """Return the name of each run's method: its stability methods, and its directory where that says too little.

    Runs whose configs differ in nothing but the seed, or in what has no effect on results, are of one method.
    """
    keys = [run.config.model_dump_json(exclude=_NOT_THE_METHOD) for run in runs]
    members: dict[str, list[_Run]] = {}
    for key, run in zip(keys, runs, strict=True):
        members.setdefault(key, []).append(run)
    folders = [_folder(same) for same in members.values()]
    methods = [_method(same[0].config) for same in members.values()]
    names = [
        method if methods.count(method) == 1 else f"{method}, {folder}"
        for method, folder in zip(methods, folders, strict=True)
    ]
    numbered = [name if names.count(name) == 1 else f"{name} #{number}" for number, name in enumerate(names, 1)]
    labels = dict(zip(members, numbered, strict=True))
    return [labels[key] for key in keys]


def _method(config: RunConfig) -> str:
    """Return the stability methods of a config, e.g. `ewc 10 + replay`."""
    parts = [f"{each.name} {each.coef:g}" if hasattr(each, "coef") else each.name for each in config.stability]
    return " + ".join(parts) or "fine-tuning"


def _folder(seeds: Sequence[_Run]) -> str:
    """Return what the directories of one method's runs have in common: `ewc` of ewc_seed0 and ewc_seed1, of ewc/0."""
    paths = [run.path.resolve() for run in seeds]
    stems = {
        path.name.removesuffix(str(run.config.seed)).rstrip("_-. ").removesuffix("seed").rstrip("_-. ")
        for path, run in zip(paths, seeds, strict=True)
    }
    if len(stems) > 1:
        return paths[0].name
    return stems.pop() or paths[0].parent.name


def _save(figure: Figure, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another folder with --out") from error
    print(path)
