"""Sequences in a config: `for_each` writes out stages, stages have names, errors quote the config as written."""

import copy

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from metarl.config.schema import RunConfig, StageConfig, as_config, dump_config, load_config
from metarl.config.sequences import CW10
from metarl.envs.mujoco.tasks import MujocoConfig
from metarl.errors import UserError

HAMMER_TO_PEG = [
    "hammer-v3",
    "push-wall-v3",
    "faucet-close-v3",
    "push-back-v3",
    "stick-pull-v3",
    "handle-press-side-v3",
    "push-v3",
    "shelf-place-v3",
    "window-close-v3",
    "peg-unplug-side-v3",
]
MUJOCO = {"family": "mujoco", "name": "HalfCheetahVel"}
METAWORLD = {"family": "metaworld", "horizon": 200}
WEDGES = {"family": "navigation", "name": "cued_wedges"}


def run_of(*stages):
    return RunConfig.model_validate({"stages": list(stages)})


def names(*stages):
    return [stage.name for stage in run_of(*stages).stages]


@pytest.fixture
def problem(tmp_path):
    def message(stages, *flags):
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({"stages": stages}), encoding="utf-8")
        with pytest.raises(UserError) as error:
            load_config(path, flags)
        assert len(str(error.value).splitlines()) == 1
        with_flags_alone = not str(error.value).startswith(str(path))
        return str(error.value) if with_flags_alone else str(error.value).replace(f"{path}: ", "")

    return message


# Stages


def test_for_each_equals_the_stages_written_by_hand():
    config = {"curriculum": {"iterations": 3}, "iterations": 7}
    template = {**config, "tasks": MUJOCO, "for_each": {"velocity": [[0, 1], [1.5, 2]]}}
    by_hand = [
        {**config, "name": "first", "tasks": MUJOCO},
        {**config, "name": "velocity 0-1", "tasks": {**MUJOCO, "velocity": (0.0, 1.0)}},
        {**config, "name": "velocity 1.5-2", "tasks": {**MUJOCO, "velocity": (1.5, 2.0)}},
        {**config, "name": "last", "tasks": MUJOCO},
    ]
    first, last = by_hand[0], by_hand[-1]
    assert run_of(first, template, last) == run_of(*by_hand)
    assert run_of(first, template, last) != run_of(first, last)


@pytest.mark.parametrize(
    ("tasks", "for_each", "expected"),
    [
        (METAWORLD, {"name": ["push-wall-v3", "hammer-v3"]}, ["push-wall-v3", "hammer-v3"]),
        (METAWORLD, {"name": "push-wall-v3"}, ["push-wall-v3"]),  # as a flag gives one value
        (WEDGES, {"wedges": [0, 2, [1, 3]]}, ["wedge 0", "wedge 2", "wedges 1-3"]),
        ({"family": "mujoco"}, {"horizon": [100, 200, 100]}, ["horizon 100", "horizon 200", "horizon 100 (2)"]),
        (
            {"family": "mujoco", "name": "HopperRandParams"},
            {"scaled": ["body_mass", ["body_mass", "dof_damping"]]},
            ["body_mass", "body_mass+dof_damping"],
        ),
        (MUJOCO, {"velocity": [[0.1 + 0.2, 1e-9 + 1]]}, ["velocity 0.3-1"]),
        ({"family": "metaworld"}, {"benchmark": ["ML10", "ML45"]}, ["ML10", "ML45"]),
    ],
)
def test_a_stage_is_named_by_what_sets_it_apart(tasks, for_each, expected):
    assert names({"tasks": tasks, "for_each": for_each}) == expected
    prefixed = [f"easy {name}" for name in expected]
    assert names({"name": "easy", "tasks": tasks, "for_each": for_each}) == prefixed


def test_every_value_is_set_in_its_stage():
    stages = run_of({"tasks": WEDGES, "for_each": {"wedges": [0, 2, [1, 3]]}}).stages
    assert [stage.tasks.wedges for stage in stages] == [(0,), (2,), (1, 3)]
    stages = run_of({"for_each": {"name": ["semicircle", "goals"]}}).stages  # of the default family
    assert [(stage.tasks.family, stage.tasks.name) for stage in stages] == [
        ("navigation", "semicircle"),
        ("navigation", "goals"),
    ]
    template = {"tasks": MujocoConfig(name="HalfCheetahVel", horizon=50), "for_each": {"seed": [1, 2]}}
    assert [stage.tasks for stage in run_of(template).stages] == [
        MujocoConfig(name="HalfCheetahVel", horizon=50, seed=seed) for seed in (1, 2)
    ]


def test_the_sequences_of_continual_world():
    cw10 = run_of({"tasks": METAWORLD, "for_each": "CW10"}).stages
    assert [stage.tasks.name for stage in cw10] == HAMMER_TO_PEG == list(CW10)
    assert [stage.name for stage in cw10] == HAMMER_TO_PEG
    assert {(stage.tasks.benchmark, stage.tasks.horizon) for stage in cw10} == {("ML1", 200)}
    cw20 = run_of({"tasks": METAWORLD, "for_each": "CW20"}).stages
    assert [stage.tasks for stage in cw20] == [stage.tasks for stage in cw10] * 2
    assert [stage.name for stage in cw20] == HAMMER_TO_PEG + [f"{name} (2)" for name in HAMMER_TO_PEG]


def test_only_the_first_stage_starts_from_another_run():
    template = {"tasks": METAWORLD, "for_each": "CW10", "init_from": "runs/before"}
    assert [stage.init_from for stage in run_of(template).stages] == ["runs/before"] + [None] * 9


def test_names_are_unique_and_those_of_single_stages_stay():
    reach = {"name": "reach-v3"}
    assert names({}) == ["meta-training"]
    assert names({"name": "meta-training"}) == ["meta-training"]
    assert names({}, {}, {"name": "meta-training"}) == ["stage 1", "stage 2", "stage 3"]
    assert names(reach, {}, reach, reach) == ["reach-v3", "stage 2", "reach-v3 (2)", "reach-v3 (3)"]
    assert names(reach, reach, {"name": "reach-v3 (2)"}) == ["reach-v3", "reach-v3 (3)", "reach-v3 (2)"]
    built = RunConfig(stages=(StageConfig(), StageConfig(), StageConfig(name="x"), StageConfig(name="x")))
    assert [stage.name for stage in built.stages] == ["stage 1", "stage 2", "x", "x (2)"]


@settings(max_examples=100)
@given(st.lists(st.sampled_from(["a", "a (2)", "a (2) (2)", "a (3)", "stage 1", "meta-training"]), min_size=1))
def test_names_are_unique_whatever_they_were(given_names):
    found = names(*({"name": name} for name in given_names))
    assert len(set(found)) == len(found)
    assert names(*({"name": name} for name in found)) == found  # a config that is read back stays as it is
    assert all(name in found for name in set(given_names) - {"meta-training"})


# In and out


def test_the_dumped_config_holds_the_stages_and_comes_back(tmp_path):
    config = run_of({"tasks": METAWORLD, "for_each": "CW20", "iterations": 3}, {"name": "x"}, {"name": "x"})
    text = dump_config(config)
    assert "for_each" not in text
    assert [stage["name"] for stage in yaml.safe_load(text)["stages"]] == [stage.name for stage in config.stages]
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    assert load_config(tmp_path / "a.yaml") == config


def test_a_mapping_works_and_stays_as_it_is():
    tree = {"stages": [{"name": "x", "tasks": dict(METAWORLD), "for_each": {"name": ["reach-v3", "reach-v3"]}}, {}]}
    before = copy.deepcopy(tree)
    config = as_config(tree)  # what `metarl.train` does with it
    assert [stage.name for stage in config.stages] == ["x reach-v3", "x reach-v3 (2)", "stage 3"]
    assert tree == before


def test_flags_are_laid_over_the_template():
    flags = ["--stages.0.iterations", "5", "--stages.0.tasks.horizon", "99", "--stages.0.for-each", "CW20"]
    stages = load_config("cw10_rl2", flags).stages
    assert len(stages) == 20
    assert {(stage.iterations, stage.tasks.horizon) for stage in stages} == {(5, 99)}
    stages = load_config("continual_half_cheetah_maml_ppo", ["--stages.1.for-each.velocity", "[0,3]", "[3,4]"]).stages
    assert [stage.name for stage in stages] == ["direction", "velocity 0-3", "velocity 3-4"]
    flags = ["--stages.0.for-each", "null", "--stages.0.tasks.name", "push-v3"]
    assert [stage.tasks.name for stage in load_config("cw10_rl2", flags).stages] == ["push-v3"]


def test_the_stage_id_is_off_by_default():
    assert RunConfig().stage_id == "none"
    assert load_config("cw10_rl2", ["--stage-id", "input"]).stage_id == "input"
    with pytest.raises(UserError, match="--stage-id: got 'yes', expected 'none', 'input' or 'head'"):
        load_config("cw10_rl2", ["--stage-id", "'yes'"])


def test_embedded_sequences_are_what_they_say():
    for name, count in (("cw10_rl2", 10), ("cw10_maml_ppo", 10), ("cw20_rl2", 20)):
        assert [stage.tasks.name for stage in load_config(name).stages] == (HAMMER_TO_PEG * 2)[:count]
        assert getattr(load_config(name).agent, "observation_entries", None) is None
        assert load_config(name).agent == load_config(name.replace("cw10", "ml10").replace("cw20", "ml10")).agent
    cheetah = [stage.tasks for stage in load_config("continual_half_cheetah_maml_ppo").stages]
    assert [(tasks.name, tasks.velocity) for tasks in cheetah] == [
        ("HalfCheetahDir", None),
        ("HalfCheetahVel", (0.0, 1.0)),
        ("HalfCheetahVel", (1.0, 2.0)),
        ("HalfCheetahVel", (2.0, 3.0)),
    ]
    hopper = [stage.tasks for stage in load_config("continual_hopper_params_rl2").stages]
    assert [tasks.scaled for tasks in hopper] == [("body_mass",), ("geom_friction",), ("dof_damping",)]
    assert {tasks.name for tasks in hopper} == {"HopperRandParams"}


# Mistakes


@pytest.mark.parametrize(
    ("for_each", "expected"),
    [
        ("CW30", "got 'CW30', expected CW10, CW20 or one field of tasks with a list of values, e.g. {name: "),
        (3, "got 3, expected CW10, CW20 or one field"),
        (["reach-v3"], "expected CW10, CW20 or one field"),
        ({}, "names 0 fields of tasks; expected exactly one, with a list of values"),
        ({"name": ["reach-v3"], "seed": [1]}, "names 2 fields of tasks (name, seed); expected exactly one"),
        ({"name": []}, "name has no values; expected at least one"),
        ({"name": None}, "name has no values; expected at least one"),
        ({"nmae": ["reach-v3"]}, "'nmae' is not a setting of metaworld tasks; did you mean 'name'?"),
        ({"velocity": [[0, 1]]}, "'velocity' is not a setting of metaworld tasks"),
        ({1: [2]}, "1 is not a setting of metaworld tasks"),
        ({"horizon": [100, 200]}, "tasks.horizon is also set; remove one of them"),
    ],
)
def test_a_wrong_for_each_is_told_in_one_line(for_each, expected, problem):
    text = problem([{}, {"tasks": METAWORLD, "for_each": for_each}])
    assert text.startswith("stages.1.for_each: ") and expected in text
    with pytest.raises(UserError, match=r"^stages\.1\.for_each: "):  # without a file, too
        as_config({"stages": [{}, {"tasks": METAWORLD, "for_each": for_each}]})


def test_continual_world_needs_meta_world(problem):
    text = problem([{"tasks": MUJOCO, "for_each": "CW10"}])
    assert text == "stages.0.for_each: got 'CW10', expected tasks of family metaworld, found mujoco"
    assert "found navigation" in problem([{"for_each": "CW10"}])


def test_mistakes_are_told_where_the_user_made_them_and_once(problem):
    template = {"tasks": METAWORLD, "for_each": "CW10"}
    assert problem([{}, template], "--stages.1.tasks.horizon", "501") == (
        "--stages.1.tasks.horizon: got 501, expected less than or equal to 500"
    )
    assert problem([{}, {**template, "iteration": 3}]) == (
        "stages.1.iteration: unknown setting; did you mean 'iterations'?"
    )
    assert problem([template, {"iterations": 0}]) == "stages.1.iterations: got 0, expected greater than or equal to 1"
    assert problem([template], "--stages.0.for-each", "CW30").startswith("--stages.0.for-each: got 'CW30', expected")
    assert problem([template], "--stages.0.foreach", "CW30") == (
        "--stages.0.foreach: unknown setting; did you mean --stages.0.for-each?"
    )
    assert "the list has 1 item" in problem([template], "--stages.3.iterations", "5")
    velocities = {"tasks": MUJOCO, "for_each": {"velocity": [[0, 1], [2, 1], [0, "x"]]}}
    text = problem([{}, velocities])
    assert "stages.1.for_each.velocity.1: velocity is (2.0, 1.0); expected" in text
    assert "stages.1.for_each.velocity.2.1: got 'x', expected a valid number" in text
    assert problem([{**template, "for_each": {"name": ["reach-v3", "hamer-v3"]}}]).startswith(
        "stages.0.tasks: unknown Meta-World task 'hamer-v3': did you mean 'hammer-v3'?"
    )
    assert problem([{**template, "name": 5}]) == "stages.0.name: got 5, expected a valid string"
    assert "stages.0.tasks: got None, expected" in problem([{**template, "tasks": None}])


def test_one_stage_alone_does_not_stand_for_several():
    with pytest.raises(ValidationError, match="expands to several stages"):
        StageConfig(for_each="CW10", tasks={"family": "metaworld", "name": "reach-v3"})
    assert StageConfig(for_each=None) == StageConfig()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["CW10", "reach-v3", "metaworld", "x"]),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "family", "horizon", "velocity", "wedges"]), children, max_size=2)
    ),
    max_leaves=6,
)
STAGES = st.fixed_dictionaries(
    {},
    optional={
        "for_each": VALUES,
        "name": VALUES,
        "tasks": VALUES | st.sampled_from([METAWORLD, MUJOCO, WEDGES, {"family": "mujoco"}]),
        "iterations": st.sampled_from([1, 0]),
    },
)


@settings(max_examples=300)
@given(st.lists(STAGES | VALUES, min_size=1, max_size=3))
def test_arbitrary_stages_never_raise_anything_but_a_user_error(stages):
    try:
        config = as_config({"stages": stages})
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert len({stage.name for stage in config.stages}) == len(config.stages) >= len(stages)


def test_a_stage_from_scratch_starts_from_no_other_run():
    stage = {"tasks": {"family": "navigation"}, "init_from": "runs/other"}
    assert as_config({"stages": [stage], "control": "joint"}).control == "joint"
    with pytest.raises(UserError, match="control: scratch starts every stage with a new agent"):
        as_config({"stages": [stage], "control": "scratch"})
