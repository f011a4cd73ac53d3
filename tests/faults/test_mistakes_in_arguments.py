"""Mistakes in arguments: each gives one line with cause and fix, at once, and leaves nothing behind.

The numbers are those of the cases in docs/reliability.md. What a process of its own adds nothing to runs in this one.
"""

import pytest

from tests.faults.small_runs import listing

VERBS = ("train", "evaluate", "export", "play", "inspect", "list", "doctor", "plot", "baseline")


# 1: no arguments, words that are no verbs


def test_case_01_no_arguments_show_help(cli):
    done = cli()
    assert (done.status, done.err) == (2, "")
    assert all(f"\n  {verb} " in done.out for verb in VERBS)
    asked = cli("--help")
    assert (asked.status, asked.out) == (0, done.out)


def test_case_01_an_unknown_verb_is_answered_with_the_nearest(mistake):
    mistake("trian", "quickstart", expected=["unknown verb 'trian'", "did you mean 'train'?", *VERBS, "metarl --help"])


NO_VERBS = ("", " ", "-", "--", "---", "-x", "--versoin", "help", "train ", "train\n", "träin", "\uff10")


@pytest.mark.parametrize("word", [*NO_VERBS, "\x1b[31mtrain", "x" * 100_000, "../train", "train;ls", "$(train)"])
def test_case_01_whatever_the_verb_is_the_line_is_one(refused, word):
    refused(word, "quickstart", expected=["unknown verb", "expected one of train, "])


@pytest.mark.parametrize("word", ["TRAIN", "Train", "trian", "train.", "evalute", "lst", "doctro", "insepct", "plt"])
def test_case_01_near_verbs_are_suggested(refused, word):
    assert "did you mean '" in refused(word)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train", "name a config"),
        ("train --seed 1", "name a config"),
        ("train --", "name a config"),
        ("evaluate", "run_dir"),
        ("export run", "FILE.onnx"),
        ("export run policy", "does not end in .onnx"),
        ("play", "run_dir"),
        ("plot", "RUN_DIR"),
        ("inspect", "run_dir"),
        ("list", "what"),
        ("list everything", "'envs', 'agents', 'stability', 'configs'"),
        ("doctor who", "who"),
        ("baseline", "name a config"),
        ("inspect one two", "two"),
        ("evaluate run --nonsense", "--nonsense"),
        ("evaluate run --split both", "'test', 'train'"),
        ("evaluate run --num-tasks", "--num-tasks"),
        ("evaluate run --num-tasks 0", "an integer ≥ 1"),
        ("evaluate run --num-tasks -1", "an integer ≥ 1"),
        ("evaluate run --num-tasks 1.5", "'1.5'"),
        ("evaluate run --num-tasks ²", "'²'"),
        ("evaluate run --num-tasks ٣", "'٣'"),
        ("evaluate run --num-workers -1", "an integer ≥ 0"),
        ("evaluate run --seed 1e3", "'1e3'"),
        ("evaluate run --device tpu", "'auto', 'cpu', 'cuda'"),
        ("evaluate run --checkpoint newest", "latest, best or the number of an iteration"),
        ("evaluate run --json=", "--json"),
        ("evaluate run --json .", "is a folder"),
        ("play run --fps nan", "a number above 0"),
        ("play run --fps inf", "a number above 0"),
        ("play run --speed -1", "a number above 0"),
        ("play run --video .", "is a folder"),
        ("train quickstart --max-iterations 0", "more than 0"),
        ("train quickstart --max-iterations x", "'x'"),
        ("train quickstart --max-minutes nan", "more than 0"),
        ("train quickstart --max-minutes=-inf", "more than 0"),
        ("train quickstart --resume --overwrite", "are mutually exclusive"),
    ],
)
def test_case_01_arguments_that_a_verb_does_not_take(refused, words, expected):
    refused(*words.split(" "), expected=[expected])


def test_case_01_a_number_of_a_thousand_digits_is_not_printed_back(refused):
    for flags in (["--num-tasks", "9" * 5000], ["--seed", "9" * 5000], ["--json", "9" * 5000]):
        assert len(refused("evaluate", "run", *flags)) < 2100


# 2: flags that are none


def test_case_02_a_misspelt_flag_is_answered_with_the_nearest(mistake, tmp_path):
    message = mistake("train", "quickstart", "--agent.inner-lrr", "0.1")
    assert message == "metarl: --agent.inner-lrr: unknown setting; did you mean --agent.inner-lr?\n"
    assert listing(tmp_path) == {}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--agent.inner-lr", "--agent.inner-lr has no value"),
        ("--agent.inner-lr=", "--agent.inner-lr has an empty value"),
        ("--agent.inner-lr  ", "--agent.inner-lr has an empty value"),
        ("--agent.inner-lr --seed 1", "--agent.inner-lr has no value"),
        ("--agent.inner-lr 0.1 0.2", "--agent.inner-lr: expected a valid number"),
        ("--agnet.inner-lr 0.1", "--agnet.inner-lr: unknown setting; did you mean --agent?"),
        ("--agent.outer.lrr 0.1", "--agent.outer.lrr: unknown setting; did you mean --agent.outer.lr?"),
        ("--agent.inner.lr 0.1", "--agent.inner.lr: unknown setting; did you mean --agent.inner-lr?"),
        ("--seed.x 1", "--seed.x"),
        ("--Seed 1", "--Seed: unknown setting; did you mean --seed?"),
        ("--sëed 1", "--sëed: unknown setting; did you mean --seed?"),
        ("---seed 1", "did you mean --seed?"),
        ("-s 1", "unexpected argument '-s'"),
        ("seed 1", "unexpected argument 'seed'"),
        ("-- --seed 1", "-- has no value"),
        ("--=1", "'--=1' names no setting"),
        ("--.=1", "'--.=1' names no setting"),
        ("--agent. 1", "'--agent.' names no setting"),
        ("--agent..inner-lr 1", "'--agent..inner-lr' names no setting"),
        ("--agent maml", "--agent: got 'maml', expected nested settings"),
        ("--agent null", "--agent: got None, expected nested settings"),
        ("--agent {inner-lr:1}", "--agent"),
        ("--agent.name maml", "--agent.name: got 'maml', expected one of maml_ppo"),
        ("--agent.name 7", "expected one of maml_ppo"),
        ("--stages.0 1", "--stages.0: choose an item of the list"),
        ("--stages.9.iterations 1", "there is no stages.9"),
        ("--stages.-1.iterations 1", "there is no stages.-1"),
        ("--stages.0.tasks.nmae reach-v3", "did you mean --stages.0.tasks.name?"),
        (
            "--stability ewcc",
            "--stability.0: got 'ewcc', expected one of ewc, replay, l2, mas, mer; did you mean 'ewc'?",
        ),
        ("--stability.ewc.coef 1", "there is no stability.ewc"),
        ("--agent.hidden-sizes [64,0]", "--agent.hidden-sizes.1: got 0"),
        ("--num-tasks [", "--num-tasks: got '[', expected a valid integer"),
        ("--stages.0.name \udcff", "'\\udcff' is not valid UTF-8"),
        ("--seed 2020-13-45", "--seed: got '2020-13-45', expected a valid integer"),
    ],
)
def test_case_02_mistaken_flags(refused, flags, expected):
    refused("train", "quickstart", *flags.split(" "), expected=[expected])
