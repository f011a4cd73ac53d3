"""The help of `metarl train`: every setting, aligned and within the width."""

import re

import pytest

from metarl.config.schema import RunConfig, embedded_configs, load_config
from metarl.config.settings_help import describe_settings


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", embedded_configs())
def test_lines_fit_and_descriptions_are_aligned(name, width):
    column = width * 2 // 5
    for line in describe_settings(load_config(name), width).splitlines():
        assert len(line) <= width and line == line.rstrip()
        if line.startswith("  --") and re.search(r"\S  +\S", line):
            assert line[column] != " " and line[column - 2 : column] == "  "


def rows(*flags, name="navigation_maml_ppo"):
    """Each flag with all that is said of it, on one line."""
    text = re.sub(r"\n {4,}", " ", describe_settings(load_config(name, flags), 100))
    return {line.split()[0]: " ".join(line.split()[1:]) for line in text.splitlines() if line.startswith("  --")}


def test_types_and_values_are_written_as_flags_take_them():
    shown = rows("--agent.hidden-sizes", "[]", "--stages.0.score-range", "0", "1.5", "--device", "cpu")
    assert shown["--device"] == "{auto,cpu,cuda} device of the updates; auto: a GPU if there is one (default: cpu)"
    assert shown["--seed"].startswith("INT ") and shown["--num-envs"].startswith("INT|None ")
    assert re.fullmatch(r"INT \.\.\. .*\(default: \[\]\)", shown["--agent.hidden-sizes"])
    assert re.fullmatch(r"FLOAT FLOAT\|None .*\(default: 0.0 1.5\)", shown["--stages.0.score-range"])
    assert re.fullmatch(r"\{true,false\} .*\(default: false\)", rows("--agent.name", "rl2")["--agent.input-time"])


def test_every_value_that_help_shows_is_one_that_its_flag_takes():
    shown = rows("--agent.name", "rl2", "--stability", "ewc", "mer")
    flags = [
        word
        for flag, text in shown.items()
        if not flag.endswith("for-each")
        for word in (flag, *re.search(r"\(default: (.*)\)$", text)[1].split(" "))
    ]
    before = load_config("navigation_maml_ppo", ["--agent.name", "rl2", "--stability", "ewc", "mer"])
    assert load_config("navigation_maml_ppo", flags) == before


def test_a_union_shows_its_choices_and_the_settings_of_the_chosen_member():
    shown = rows("--agent.name", "rl2", "--agent.memory.name", "transformer", "--stability", "ewc", "mer")
    assert shown["--agent.memory.name"].startswith("{gru,lstm,transformer,episodic} ")
    assert "--agent.memory.layers" in shown and "--agent.inner-lr" not in shown
    assert "one of maml_ppo, " in shown["--agent.name"] and shown["--agent.name"].endswith("(default: rl2)")
    assert shown["--stages.0.tasks.family"].startswith("{metaworld,mujoco,navigation,custom} ")
    assert shown["--stability"].startswith("{ewc,replay,l2,mas,mer} ... ")
    assert shown["--stability"].endswith("(default: ewc mer)")
    assert rows()["--agent.outer.name"].startswith("{ppo} ")  # MAML-PPO has no other


def test_another_stage_is_shown_by_its_values_alone():
    shown = rows(name="cw10_rl2")
    assert "meta-updates" in shown["--stages.0.iterations"]
    assert re.fullmatch(r"INT \(default: \d+\)", shown["--stages.9.iterations"])
    assert shown["--stages.9.tasks.name"] == "TEXT|None (default: peg-unplug-side-v3)"


def test_a_list_in_the_description_of_a_section_stays_one():
    text = describe_settings(
        RunConfig.model_validate({"stages": [{"tasks": {"family": "metaworld", "benchmark": "ML10"}}]}), 80
    )
    assert "\n  - ML1: " in text and "\n  - ML10, ML25, ML45: " in text and "`ML1`" not in text
