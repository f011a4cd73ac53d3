"""`metarl plot`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from metarl.cli.arguments import Parser, any_path, run_folder
from metarl.errors import UserError
from metarl.runs.lock import own_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from metarl.config.schema import RunConfig
    from metarl.continual.metrics import Evaluation
    from metarl.plots.comparison import MethodCurve, Panel


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
    """Plot the metrics of runs."""
    parser = Parser(
        "metarl plot",
        description="Plot the metrics of runs as PNG files in the plots/ folder of each: learning.png; adaptation.png "
        "if the agent adapts; evaluation_NAME.png for each report evaluation/NAME.json; continual.png and matrix.png "
        "for runs of several stages. comparison.png compares runs on the same tasks over env steps, and "
        "stability_plasticity.png compares finished runs of several stages. Runs that differ only in their seed are "
        "seeds of one method.",
    )
    parser.add_argument(
        "run_dirs", nargs="+", type=run_folder, metavar="RUN_DIR", help="run directories of `metarl train`"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=any_path,
        help="folder for the figures of a single run (default: its plots/); for several runs, the folder for "
        "comparison.png and stability_plasticity.png (default: plots/ of the first run)",
    )
    options = parser.parse_args(arguments)
    paths = list({path.resolve(): path for path in options.run_dirs}.values())
    runs = [_read(path) for path in paths]
    for run in runs:
        folder = options.out if options.out and len(runs) == 1 else own_folder(run.path, "plots")
        for name, figure in _figures(run):
            _save(figure, folder / name)
    if len(runs) > 1:
        folder = options.out or own_folder(runs[0].path, "plots")
        _compare_on_same_tasks(runs, folder)
        _compare_sequences([run for run in runs if len(run.names) > 1], folder)
    return 0


def _read(path: Path) -> _Run:
    from metarl.config.schema import load_config
    from metarl.continual.metrics import evaluations, finished_stages
    from metarl.runs.tracking import read_metrics

    if not (path / "config.yaml").is_file():
        raise UserError(f"{path} holds no run: there is no config.yaml; train one with `metarl train CONFIG`")
    config = load_config(path / "config.yaml")
    lines = read_metrics(path, len(config.stages))
    if not (path / "metrics.jsonl").exists() and (path / "checkpoints").is_dir():
        raise UserError(f"{path} is a saved policy, which has no metrics; plot the run that it was saved from")
    if not any("meta_train/return_post" in line for line in lines):
        raise UserError(f"{path} has no metrics yet; resume it with `metarl train CONFIG --run-dir {path} --resume`")
    scores = evaluations(lines, [stage.name for stage in config.stages])
    return _Run(path, config, lines, scores, finished_stages(scores, [stage.iterations for stage in config.stages]))


def _figures(run: _Run) -> Iterator[tuple[str, Figure]]:
    from metarl.agents import adapts_by
    from metarl.continual.metrics import score_matrix
    from metarl.plots import run as plotting

    spans = plotting.stage_spans(run.lines, run.names)
    yield "learning.png", plotting.learning_curves(run.lines, spans)
    labels = {"memory": "episodes of the trial before this one", "gradient": "adaptation steps"}
    x_label = labels.get(adapts_by(run.config.agent) or "", "phase of adaptation")
    adaptation = plotting.adaptation_curves(run.lines, run.names, x_label)
    if adaptation:
        yield "adaptation.png", adaptation
    if len(run.names) > 1 and run.evaluations:
        yield "continual.png", plotting.continual_curves(run.evaluations, spans, run.names)
        pre, post = (score_matrix(run.evaluations, len(run.names), run.finished, pre=pre) for pre in (True, False))
        yield "matrix.png", plotting.score_matrices(pre, post, run.names)
    yield from _reports(run.path / "evaluation")


def _reports(folder: Path) -> Iterator[tuple[str, Figure]]:
    """Yield the figures of evaluation reports; other files are skipped with a line on stderr."""
    from metarl.plots.report import read_report, report_figure

    for path in sorted(folder.glob("*.json")):
        if path.name == "continual.json":  # shown in matrix.png
            continue
        try:
            figure = report_figure(read_report(path.read_bytes()))
        except (OSError, ValueError) as error:
            cause = getattr(error, "strerror", None) or error
            print(f"metarl: skipped {path}: it is not a report of `metarl evaluate`: {cause}", file=sys.stderr)
        else:
            yield f"evaluation_{path.stem}.png", figure


def _compare_on_same_tasks(runs: Sequence[_Run], folder: Path) -> None:
    """Plot the learning curves of runs with the same tasks; print which runs share their tasks with no other."""
    from metarl.plots.comparison import comparison

    groups = _grouped(runs, _tasks)
    if alone := [str(same[0].path) for same in groups if len(same) == 1]:
        print(f"not in comparison.png, since no other run has their tasks: {', '.join(alone)}")
    groups = [same for same in groups if len(same) > 1]
    titles = _numbered([_tasks_name(same[0].config) for same in groups])
    panels = {title: columns for title, same in zip(titles, groups, strict=True) if (columns := _panels(same))}
    if panels:
        _save(comparison(panels), folder / "comparison.png")


def _panels(runs: Sequence[_Run]) -> list[Panel]:
    """Return the learning curves of runs on the same tasks: one panel per measure, one curve per method."""
    from metarl.plots.comparison import Panel, average_scores, method_curve

    methods = _methods(runs)
    for label, seeds in methods.items():
        ends = [run.lines[-1]["iteration"] for run in seeds]
        if min(ends) < max(ends):
            shortest = seeds[ends.index(min(ends))].path
            print(f"{label} is compared up to iteration {min(ends)}, where {shortest} ends")
    if len(runs[0].names) > 1:
        scores = {label: [average_scores(run.evaluations) for run in seeds] for label, seeds in methods.items()}
        candidates = {
            "score after adaptation, mean over stages": [
                method_curve(label, points, held_out=True) for label, points in scores.items()
            ]
        }
    else:
        candidates = {
            f"{measure} after adaptation": [_learning(label, seeds, measure) for label, seeds in methods.items()]
            for measure in ("return", "success")
        }
    curves = {measure: [curve for curve in optional if curve] for measure, optional in candidates.items()}
    return [Panel(measure, of_methods) for measure, of_methods in curves.items() if of_methods]


def _learning(label: str, seeds: Sequence[_Run], measure: str) -> MethodCurve | None:
    """Return a method's curve on held-out tasks, or on training tasks if the runs were not evaluated."""
    from metarl.plots.comparison import method_curve, tracked

    for split in ("meta_test", "meta_train"):
        points = [tracked(run.lines, f"{split}/{measure}_post") for run in seeds]
        if curve := method_curve(label, points, held_out=split == "meta_test"):
            return curve
    return None


def _tasks(run: _Run) -> str:
    """Return a key of a run's tasks, and of their score ranges if it has several stages."""
    stages = run.config.stages
    return json.dumps(
        [(stage.model_dump(include={"tasks", "wrappers"}), len(stages) > 1 and stage.score_range) for stage in stages]
    )


def _tasks_name(config: RunConfig) -> str:
    """Return a title for the tasks of a run, e.g. `metaworld ML1 reach-v3, horizon 100`."""
    from metarl.envs.wrappers import describe_wrappers

    first, *others = config.stages
    if others:
        return f"{len(config.stages)} stages, {first.name} to {others[-1].name}"
    names = ("family", "benchmark", "name")
    title = dict.fromkeys(str(value) for name in names if (value := getattr(first.tasks, name, None)))
    settings = first.tasks.model_dump(exclude=set(names), exclude_defaults=True)
    details = [
        f"{key} {' '.join(map(str, value)) if isinstance(value, tuple) else value}".replace("_", " ")
        for key, value in settings.items()
    ]
    if first.wrappers:
        details.append(describe_wrappers(first.wrappers).replace("_", " "))
    return ", ".join([" ".join(title), *details])


def _compare_sequences(runs: Sequence[_Run], folder: Path) -> None:
    """Plot the stability and plasticity of finished runs of several stages; print which runs are left out."""
    from metarl.continual.metrics import final_stage_performance, forgetting, score_matrix
    from metarl.plots import run as plotting

    coordinates = {}
    for run in runs:
        matrix = score_matrix(run.evaluations, len(run.names), run.finished)
        point = final_stage_performance(matrix), 1.0 - forgetting(matrix)
        if run.finished == len(run.names) and all(map(math.isfinite, point)):
            coordinates[run.path] = point
        else:
            print(f"{run.path} is not in stability_plasticity.png: some stages have no score at their end yet")
    if len(coordinates) > 1:
        methods = _methods([run for run in runs if run.path in coordinates])
        points = [plotting.Point(label, *coordinates[run.path]) for label, seeds in methods.items() for run in seeds]
        _save(plotting.stability_plasticity(points), folder / "stability_plasticity.png")


def _grouped(runs: Iterable[_Run], key: Callable[[_Run], str]) -> list[list[_Run]]:
    """Group runs by a key, in the order given."""
    groups: dict[str, list[_Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return list(groups.values())


def _numbered(names: Sequence[str]) -> list[str]:
    """Return the names with a number after those that are not unique."""
    return [name if names.count(name) == 1 else f"{name} #{number}" for number, name in enumerate(names, 1)]


def _methods(runs: Sequence[_Run]) -> dict[str, list[_Run]]:
    """Return the runs of each method by its name, with the directory added to names that are not unique.

    Runs are seeds of one method if their configs differ only in the seed and in operational settings.
    """
    from metarl.config.schema import OPERATIONAL_SETTINGS

    groups = _grouped(runs, lambda run: run.config.model_dump_json(exclude={"seed", *OPERATIONAL_SETTINGS}))
    methods = [_method(seeds[0].config) for seeds in groups]
    names = methods
    for parts in (1, 2):
        names = [
            name if names.count(name) == 1 else f"{method}, {_folder(seeds, parts)}"
            for name, method, seeds in zip(names, methods, groups, strict=True)
        ]
    return dict(zip(_numbered(names), groups, strict=True))


def _method(config: RunConfig) -> str:
    """Return the agent's name, or in a sequence the stability methods, e.g. `ewc 10 + replay`."""
    if len(config.stages) == 1:
        return config.agent.name
    parts = [f"{item.name} {item.coef:g}" if hasattr(item, "coef") else item.name for item in config.stability]
    control = {"joint": ["joint training"], "scratch": ["from scratch"]}.get(config.control, [])
    return " + ".join([*control, *parts]) or "fine-tuning"


def _folder(seeds: Sequence[_Run], parts: int = 1) -> str:
    """Return the common name of the directories of one method's runs, e.g. `ewc` for ewc_seed0 and ewc_seed1, or ewc/0.

    Args:
        seeds: the runs of the method.
        parts: the number of path components to return, from the last.
    """
    paths = [run.path.resolve() for run in seeds]
    stems = {
        path.name.removesuffix(str(run.config.seed)).rstrip("_-. ").removesuffix("seed").rstrip("_-. ")
        for path, run in zip(paths, seeds, strict=True)
    }
    stem = paths[0].name if len(stems) > 1 else stems.pop()
    common = paths[0].with_name(stem) if stem else paths[0].parent
    return "/".join(common.parts[-parts:])


def _save(figure: Figure, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another folder with --out") from error
    print(path)
