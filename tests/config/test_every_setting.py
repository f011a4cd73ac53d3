"""Every setting of every config does something: with another value, a small run writes something else."""

import functools
import tempfile
from typing import Literal, get_args, get_origin

import pytest

import metarl
from metarl.agents import agent_configs
from metarl.agents.maml.agent import GradientAgentConfig
from metarl.config.models import models_in, union_members
from metarl.config.schema import (
    OPERATIONAL_SETTINGS,
    CurriculumConfig,
    EvaluationConfig,
    RunConfig,
    StageConfig,
    load_config,
)
from metarl.envs import FAMILIES
from metarl.envs.wrappers import WRAPPERS
from metarl.runs.checkpoint import load_latest
from metarl.runs.tracking import read_metrics

RUN = "--device cpu --num-workers 0 --num-tasks 4 --rollouts-per-task 2 --evaluation.every-iterations 1 "
SMALL = f"{RUN} --evaluation.num-tasks 2 --stages.0.iterations 2 --stages.0.tasks.horizon 4"
MAML = f"navigation_maml_ppo {SMALL} --agent.hidden-sizes 8"
SMALL_RL2 = "--agent.encoder-sizes 8 --agent.critic.sizes 8 --agent.memory.size 8"
RL2 = f"navigation_rl2 {SMALL} {SMALL_RL2}"
STAGE = "{iterations: 2, tasks: {family: navigation, horizon: 4, name: cued_wedges}}".replace(" ", "\0")
SEQUENCE = f"navigation_maml_ppo {RUN} --agent.hidden-sizes 8 --stages [{STAGE},{STAGE}]"
SEQUENCE_RL2 = f"navigation_rl2 {RUN} {SMALL_RL2} --stages [{STAGE},{STAGE}]"

CUSTOM = "--stages.0.tasks.benchmark custom --stages.0.tasks.name null --stages.0.tasks.names [reach-v3,door-open-v3]"

WRAPPED = {  # settings of each wrapper, and other ones
    "frame_stack": ("frames: 2", "3"),
    "observation_noise": ("std: 0.1", "0.2"),
    "action_noise": ("std: 0.1", "0.2"),
    "action_delay": ("steps: 1", "2"),
    "action_repeat": ("times: 2", "3"),
    "hide_entries": ("names: [0]", "[1]"),
    "reward_scale": ("factor: 2.0", "3.0"),
    "time_limit": ("steps: 2", "3"),
}

AGENTS = {name: config for name, config in agent_configs().items() if name != "custom"}
OUTERS = {"ppo": "maml_ppo", "trpo": "maml_trpo", "gradient": "maml_vpg"}
MEMORIES = union_members(AGENTS["rl2"].model_fields["memory"])
STABILITY = union_members(RunConfig.model_fields["stability"])

SECTIONS = [
    (RunConfig, "", MAML),
    (EvaluationConfig, "evaluation", MAML),
    (StageConfig, "stages.0", SEQUENCE),
    (CurriculumConfig, "stages.0.curriculum", f"{MAML} --stages.0.curriculum.iterations 2"),
    (FAMILIES["navigation"].config, "stages.0.tasks", MAML),
    (FAMILIES["mujoco"].config, "stages.0.tasks", f"half_cheetah_dir_maml_ppo {SMALL} --agent.hidden-sizes 8"),
    (FAMILIES["metaworld"].config, "stages.0.tasks", f"ml1_reach_meta_sgd {SMALL} --agent.hidden-sizes 8"),
    (GradientAgentConfig, "agent", MAML),
    *[(AGENTS[name], "agent", RL2 if name == "rl2" else f"{MAML} --agent.name {name}") for name in AGENTS],
    *[
        (model, "agent.outer", f"{MAML} --agent.name {OUTERS[name]} --agent.outer.name {name}")
        for name, model in union_members(GradientAgentConfig.model_fields["outer"]).items()
    ],
    *[
        (model, "agent.memory", f"{RL2} --agent.memory.name {name} --agent.memory.size 8")
        for name, model in MEMORIES.items()
    ],
    (union_members(AGENTS["rl2"].model_fields["critic"])["shared"], "agent.critic", RL2),
    *[
        (model, "stability.0", f"{SEQUENCE_RL2 if name == 'replay' else SEQUENCE} --stability {name}")
        for name, model in STABILITY.items()
    ],
    *[
        (
            WRAPPERS[name].config,
            "stages.0.wrappers.0",
            f"{MAML} --stages.0.wrappers {{name:\0{name},\0{setting}}}".replace(": ", ":\0"),
        )
        for name, (setting, _) in WRAPPED.items()
    ],
]
"""A model, where a config holds it, and a run that reads its settings."""

OTHER = {
    "RunConfig.control": ("scratch", f"--stages [{STAGE},{STAGE}]"),
    "RunConfig.stage_id": ("head", f"--stages [{STAGE},{STAGE}]"),
    "EvaluationConfig.every_iterations": ("2",),
    "EvaluationConfig.num_tasks": ("3",),
    "EvaluationConfig.rollouts_per_task": ("1",),
    "StageConfig.name": ("other",),
    "StageConfig.for_each": ("{wedges:\0[[0],[1]]}",),
    "StageConfig.iterations": ("3",),
    "StageConfig.score_range": ("[-3,-1]",),
    "CurriculumConfig.iterations": ("9",),
    "NavigationConfig.name": ("cued_wedges",),
    "NavigationConfig.num_test": ("1",),
    "NavigationConfig.horizon": ("5",),
    "NavigationConfig.wedges": ("[0]", "--stages.0.tasks.name cued_wedges"),
    "MujocoConfig.name": ("HalfCheetahVel",),
    "MujocoConfig.horizon": ("5",),
    "MujocoConfig.num_train": ("3", "--stages.0.tasks.name HalfCheetahVel"),
    "MujocoConfig.num_test": ("3", "--stages.0.tasks.name HalfCheetahVel --evaluation.num-tasks 4"),
    "MujocoConfig.velocity": ("[0,1]", "--stages.0.tasks.name HalfCheetahVel"),
    "MujocoConfig.scaled": ("[body_mass]", "--stages.0.tasks.name HopperRandParams"),
    "MujocoConfig.seed": ("1", "--stages.0.tasks.name HalfCheetahVel"),
    "MetaWorldConfig.benchmark": ("ML10", "--stages.0.tasks.benchmark ML25 --stages.0.tasks.name null"),
    "MetaWorldConfig.name": ("push-v3",),
    "MetaWorldConfig.names": ("[reach-v3,push-v3]", CUSTOM),
    "MetaWorldConfig.test_names": ("[drawer-open-v3,window-open-v3]", CUSTOM),
    "MetaWorldConfig.horizon": ("5",),
    "MetaWorldConfig.reward_version": ("v1",),
    **{
        f"{WRAPPERS[name].config.__name__}.{setting.partition(':')[0]}": (other,)
        for name, (setting, other) in WRAPPED.items()
    },
    "GradientAgentConfig.hidden_sizes": ("9",),
    "GradientAgentConfig.adapted_modules": ("head",),
    "GradientAgentConfig.max_std": ("1.0", "--agent.outer.lr 0.1"),
    "GradientAgentConfig.min_std": ("1.0", "--agent.outer.lr 0.1"),
    "GradientAgentConfig.value_lr": ("0.1", "--agent.critic learned"),
    "GradientAgentConfig.value_epochs": ("3", "--agent.critic learned"),
    "GradientAgentConfig.saturation_coef": ("1.0", "--agent.outer.lr 1.0"),
    "GradientAgentConfig.normalizer_iterations": ("1",),
    "GradientAgentConfig.normalizer_floor": ("9.0",),
    "ImamlConfig.cg_iterations": ("1",),
    "AnilConfig.adapted_modules": ("[head,layer_0]",),
    "Rl2Config.trial_episodes": ("4",),
    "Rl2Config.encoder_sizes": ("9",),
    "Rl2Config.max_std": ("1.0", "--agent.entropy-coef 10.0 --agent.lr 0.1"),
    "Rl2Config.min_std": ("1.0", "--agent.lr 0.1"),
    "Rl2Config.observation_entries": ("[0]",),
    "Rl2Config.normalizer_floor": ("9.0",),
    "Rl2Config.normalizer_iterations": ("1",),
    "Rl2Config.success_bonus": ("1.0", "--stages.0.tasks.name goals --stages.0.tasks.horizon 40"),
    "Rl2Config.bptt_steps": ("2",),
    "Rl2Config.clip_eps": ("1e-4",),
    "Rl2Config.lr_decay_iterations": ("2",),
    "Rl2Config.max_kl": ("1e-9",),
    "Rl2Config.max_grad_norm": ("1e-3",),
    "Rl2Config.saturation_coef": ("1.0", "--agent.lr 1.0"),
    "PpoConfig.clip_eps": ("1e-4",),
    "PpoConfig.max_kl": ("1e-9",),
    "PpoConfig.max_grad_norm": ("1e-3",),
    "TrpoConfig.damping": ("1.0",),
    "TrpoConfig.backtrack_ratio": ("0.5", "--agent.outer.max-kl 10.0"),
    "TrpoConfig.max_backtracks": ("0", "--agent.outer.max-kl 10.0"),
    "TrpoConfig.cg_iterations": ("2",),
    "GradientConfig.max_grad_norm": ("1e-3",),
    "TransformerConfig.heads": ("2",),
    "TransformerConfig.context": ("2",),
    "TransformerConfig.size": ("12",),
    "EpisodicConfig.heads": ("2",),
    "EpisodicConfig.context": ("2",),
    "EpisodicConfig.size": ("12",),
    "LearnedCriticConfig.sizes": ("9",),
    "EwcConfig.decay": ("0.5", f"--stages [{STAGE},{STAGE},{STAGE}] --stability ewc --stability.0.anchors online"),
    "EwcConfig.anchors": ("online", f"--stages [{STAGE},{STAGE},{STAGE}] --stability ewc"),
    "EwcConfig.fisher_states": ("3",),
    "MasConfig.states": ("3",),
    "ReplayConfig.capacity": ("3",),
    "ReplayConfig.share": ("0.7",),
    "ReplayConfig.policy_coef": ("1.0",),
    "ReplayConfig.min_sample_size": ("1.0", "--stability.0.policy-coef 1.0"),
    "MerConfig.across": ("0.1", "--stability.0.batches 1"),
    "MerConfig.batches": ("1",),
}
"""Setting → another value, and flags under which it counts; for settings whose type does not suggest a value."""

EXCEPTIONS = {
    **{f"RunConfig.{name}": "changes no number: how a run is carried out" for name in OPERATIONAL_SETTINGS},
    "RunConfig.num_envs": "changes no number but by rounding: tests/test_collect.py",
    "ReplayConfig.memory_gb": "changes no number: where trials lie (tests/stability/test_reservoir.py)",
    "StageConfig.init_from": "names another run: tests/training/test_continual_training.py",
}
"""Settings that this test leaves out, and why."""


def settings_of(model):
    """The settings that a model defines itself, but for nested ones, discriminators, and those with a single choice."""
    for name in model.__annotations__:
        annotation = model.model_fields[name].annotation
        single = get_origin(annotation) is Literal and len(get_args(annotation)) == 1
        if not (single or models_in(annotation) or (model, name) == (GradientAgentConfig, "name")):
            yield name


CASES = {
    f"{model.__name__}.{name}": (model, path, run, name) for model, path, run in SECTIONS for name in settings_of(model)
}


@functools.cache
def written(*flags):
    """All that a run writes, but for its config and what the clock says."""
    with tempfile.TemporaryDirectory() as folder:
        name, *rest = [flag.replace("\0", " ") for flag in " ".join(flags).split()]
        run = metarl.train(load_config(name, rest), run_dir=f"{folder}/run")
        lines = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in read_metrics(run.run_dir)]
        state = load_latest(run.run_dir / "checkpoints").state
        return str(lines), {name: value.tolist() for name, value in state.items() if not name.startswith("random")}


def another(field, value):
    """A value of the same type."""
    annotation = field.annotation
    if get_origin(annotation) is Literal:
        return next(choice for choice in get_args(annotation) if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return value / 2 or 0.1


@pytest.mark.parametrize("case", [case for case in CASES if case not in EXCEPTIONS])
def test_another_value_gives_other_results(case):
    model, path, run, name = CASES[case]
    value, *flags = OTHER.get(case) or [another(model.model_fields[name], model.model_fields[name].default)]
    flag = "--" + f"{path}.{name}".strip(".").replace("_", "-")
    assert written(run, *flags) != written(run, *flags, f"{flag} {value}")


def test_every_wrapper_is_tried():
    assert WRAPPED.keys() == WRAPPERS.keys()


def test_the_exceptions_exist():
    assert EXCEPTIONS.keys() <= CASES.keys() and OTHER.keys() <= CASES.keys()
