"""`metarl inspect` and `metarl list`."""

from __future__ import annotations

from pathlib import Path

from metarl.cli.arguments import Parser, one_line, run_folder


def inspect(arguments: list[str]) -> int:
    """Summarise a run directory."""
    parser = Parser("metarl inspect", description="Summarise a run directory.")
    parser.add_argument("run_dir", type=run_folder, help="a run directory of `metarl train`")
    options = parser.parse_args(arguments)

    from metarl.deploy.policy import load
    from metarl.envs.wrappers import describe_wrappers
    from metarl.runs.tracking import read_metrics

    run_dir: Path = options.run_dir
    policy = load(run_dir)
    config, lines = policy.config, read_metrics(run_dir, len(policy.config.stages))
    steps, episodes = policy.agent.adaptation_steps, policy.agent.trial_episodes
    adapts = f"trials of {episodes} episodes" if policy.has_memory else f"K = {steps}"
    print(f"agent        {config.agent.name}, {adapts}, {policy.num_parameters:,} parameters")
    print(f"observations {policy.spaces.observation_size}, actions {policy.spaces.action_size}")
    if config.stability:
        print(f"stability    {', '.join(method.name for method in config.stability)}")
    for stage in config.stages:
        tasks = ", ".join(f"{key} {value}" for key, value in stage.tasks.model_dump(exclude_none=True).items() if value)
        print(one_line(f"stage        {stage.name}: {stage.iterations} iterations of {tasks}"))
        if stage.wrappers:
            print(one_line(f"wrappers     {describe_wrappers(stage.wrappers)}"))
    # A saved policy has no log. The log of a run may be ahead of its latest checkpoint.
    saved = [line["iteration"] for line in lines if line["env_steps"] <= policy.env_steps]
    iterations = f"{saved[-1] if saved else 0} iterations, " if lines else ""
    print(f"trained      {iterations}{policy.env_steps:,} env steps")
    if policy.adapted:
        print("adapted      to one task, on recorded episodes (Policy.adapt)")
    for prefix in ("meta_train", "meta_test"):
        last = next((line for line in reversed(lines) if f"{prefix}/return_post" in line), None)
        if last:
            figures = ", ".join(f"{key} {value:.2f}" for key, value in last.items() if key.startswith(f"{prefix}/"))
            print(one_line(f"{prefix:<12} iteration {last['iteration']}: {figures.replace(f'{prefix}/', '')}"))
    last = next((line for line in reversed(lines) if "continual/average_performance" in line), None)
    if last:
        metrics = {key.removeprefix("continual/"): value for key, value in last.items() if key.startswith("continual/")}
        figures = ", ".join(f"{name} {value:.2f}" for name, value in metrics.items() if "/" not in name)
        print(one_line(f"continual    iteration {last['iteration']}: {figures}"))
    for path in sorted((run_dir / "evaluation").glob("*.json")):
        print(one_line(f"report       {path}"))
    return 0


def list_names(arguments: list[str]) -> int:
    """List envs, wrappers, agents, stability methods or configs."""
    parser = Parser(
        "metarl list", description="List the names of envs, wrappers, agents, stability methods or configs."
    )
    parser.add_argument("what", type=_kind, choices=("envs", "wrappers", "agents", "stability", "configs"))
    options = parser.parse_args(arguments)
    if options.what == "configs":
        from metarl.config.schema import embedded_configs

        for name, path in embedded_configs().items():
            first = path.read_text(encoding="utf-8").partition("\n")[0]
            print(f"{name:<45}{first.removeprefix('# ')}")
    elif options.what == "agents":
        from metarl.agents import agent_configs

        for name, agent in agent_configs().items():
            print(f"{name:<30}{agent.__doc__}")
    elif options.what == "stability":
        from metarl.stability import stability_configs

        for name, method in stability_configs().items():
            print(f"{name:<30}{method.__doc__}")
    elif options.what == "wrappers":
        from metarl.envs.wrappers import WRAPPERS

        for name, entry in WRAPPERS.items():
            print(f"{name:<30}{entry.config.__doc__}")
    else:
        from metarl.build import family_names

        for name, family in family_names().items():
            print(f"{name:<30}{family}")
    return 0


def _kind(text: str) -> str:
    """Parse what to list; `methods` is the earlier name of `stability`."""
    return "stability" if text == "methods" else text
