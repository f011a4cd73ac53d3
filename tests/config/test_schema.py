"""Configs in and out, and the one line that tells a user what is wrong."""

import math

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from metarl.agents import agent_configs
from metarl.config.schema import RunConfig, dump_config, embedded_configs, find_config, load_config, parse_flags
from metarl.errors import UserError


@pytest.fixture
def write(tmp_path):
    def to_file(text):
        path = tmp_path / "mine.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return to_file


def problem(source, *flags):
    """The one line of a mistake."""
    with pytest.raises(UserError) as error:
        load_config(source, flags)
    text = str(error.value)
    assert len(text.splitlines()) == 1 and "Traceback" not in text and "pydantic" not in text
    return text


@pytest.mark.parametrize("name", embedded_configs())
def test_embedded_configs_load_and_come_back_from_yaml(name, tmp_path):
    config = load_config(name)
    assert config.stages[0].iterations > 0
    path = tmp_path / "copy.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
    assert embedded_configs()[name].read_text().startswith("# ")  # `metarl list configs` shows this line


@pytest.mark.parametrize("name", [*embedded_configs(), *agent_configs()])
def test_neither_embedded_configs_nor_defaults_repeat_what_published_code_got_wrong(name):
    """In a first epoch the ratio is 1: PPO's clip binds from the second on. The score function's Hessian is biased."""
    agent = load_config(name).agent if name in embedded_configs() else agent_configs()[name]()
    stepping = getattr(agent, "outer", agent)  # RL² is its own PPO; TRPO and plain gradients have no epochs
    assert getattr(stepping, "epochs", 2) >= 2
    assert getattr(agent, "estimator", "lvc") != "score_function"


def test_values_that_are_hard_to_write_come_back(tmp_path):
    config = RunConfig.model_validate(
        {
            "seed": 2**63,
            "agent": {"outer": {"lr": 1e-300}, "inner_lr": 0.1 + 0.2, "hidden_sizes": []},
            "stages": [{"name": "no: yes # π 'x' \"y\"", "tasks": {"family": "custom", "name": "null"}}],
        }
    )
    (tmp_path / "a.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "a.yaml") == config


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**40),
    outer_lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    hidden_sizes=st.lists(st.integers(1, 9), max_size=3),
    name=st.text(st.characters(exclude_categories=["Cs"])),
    wedges=st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True),
)
def test_every_config_comes_back_from_yaml(tmp_path_factory, seed, outer_lr, hidden_sizes, name, wedges):
    tasks = {"family": "navigation", "name": "cued_wedges", "wedges": wedges}
    agent = {"outer": {"lr": outer_lr}, "hidden_sizes": hidden_sizes}
    config = RunConfig.model_validate({"seed": seed, "agent": agent, "stages": [{"name": name, "tasks": tasks}]})
    path = tmp_path_factory.mktemp("yaml") / "a.yaml"
    path.write_bytes(dump_config(config).encode())
    assert load_config(path) == config


# Mistakes in a file


def test_an_unknown_key_is_named_with_its_path_and_the_nearest(write):
    path = write("agent: {inner_lrr: 0.1}")
    assert problem(path) == f"{path}: agent.inner_lrr: unknown setting; did you mean 'inner_lr'?"
    path = write("stages: [{iteration: 3, tasks: {family: navigation, horizn: 5}}]")
    text = problem(path)
    assert "stages.0.iteration: unknown setting; did you mean 'iterations'?" in text
    assert "stages.0.tasks.horizn: unknown setting; did you mean 'horizon'?" in text


@pytest.mark.parametrize(
    ("text", "where", "found"),
    [
        ("agent: {outer: {lr: -1}}", "agent.outer.lr", "got -1, expected greater than 0"),
        ("agent: {gamma: 1.5}", "agent.gamma", "got 1.5, expected less than or equal to 1"),
        ("num_tasks: 0", "num_tasks", "got 0, expected greater than or equal to 1"),
        ("agent: {inner_lr: .nan}", "agent.inner_lr", "got nan, expected a finite number"),
        ("agent: {inner_lr: .inf}", "agent.inner_lr", "got inf, expected a finite number"),
        ("agent: {inner_lr: 'nan'}", "agent.inner_lr", "got 'nan', expected a finite number"),
        ("stages: []", "stages", "at least 1 item"),
        ("num_tasks: many", "num_tasks", "got 'many', expected a valid integer"),
        ("num_tasks: 2.5", "num_tasks", "got 2.5, expected a valid integer"),
        ("num_tasks: {a: 1}", "num_tasks", "expected a valid integer"),
        ("agent: 5", "agent", "got 5, expected"),
        ("agent:", "agent", "got None, expected"),
        (
            "agent: {name: rl2, input_time: perhaps}",
            "agent.input_time",
            "got 'perhaps', expected a valid boolean",
        ),
        ("agent: {activation: gelu}", "agent.activation", "got 'gelu', expected 'tanh' or 'relu'"),
        ("device: gpu", "device", "got 'gpu', expected 'auto', 'cpu' or 'cuda'"),
        ("stages: {iterations: 3}", "stages", "expected"),
        ("stages: [{tasks: {family: navigatoin}}]", "stages.0.tasks", "did you mean 'navigation'?"),
        ("stages: [{tasks: {name: goals}}]", "stages.0.tasks", "family"),
        ("stages: [{tasks: {family: mujoco, name: AntDirr}}]", "stages.0.tasks.name", "did you mean 'AntDir'?"),
        ("stages: [{tasks: {family: mujoco, horizon: 9999}}]", "stages.0.tasks.horizon", "less than or equal to 1000"),
        (
            "stages: [{tasks: {family: metaworld, benchmark: ML1, name: reach-v9}}]",
            "stages.0.tasks",
            "did you mean 'reach-v3'? `metarl list envs` shows all",
        ),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(write, text, where, found):
    path = write(text)
    message = problem(path)
    assert message.startswith(f"{path}: {where}: ")
    assert found in message


def test_every_mistake_is_told_at_once(write):
    message = problem(write("{seed: -1, num_tasks: 0, colour: blue}"))
    assert all(name in message for name in ("seed", "num_tasks", "colour"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 0\nagent: [1, 2\n", ":3:1: not valid YAML"),
        ("seed: 0\nagent:\n\tinner_lr: 1", ":3:1: not valid YAML"),
        ("seed: 'abc", "not valid YAML"),
        ("seed: \x00", "not valid YAML"),
        (b"seed: \xff\xfe", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("", "expected settings such as `seed: 0`, found nothing"),
        ("# nothing but a comment", "found nothing"),
        ("seed", "found 'seed'"),
        ("[1, 2]", "found [1, 2]"),
        ("seed: 2020-13-45", "not valid YAML"),
        ("[" * 3000, "not valid YAML"),
        ("'a\\nb': 1\n? \"two\\nlines\"\n: 2", "unknown setting"),
        ("1: 2", "1"),
    ],
)
def test_what_is_not_settings_is_told_with_line_and_column(write, text, expected):
    path = write(text)
    message = problem(path)
    assert message.startswith(str(path)) and expected in message


def test_yaml_never_builds_objects(write, tmp_path):
    marker = tmp_path / "executed"
    for text in (
        f"seed: !!python/object/apply:os.mkdir ['{marker}']",
        f"!!python/object/new:os.mkdir ['{marker}']",
        "agent: !!python/object:metarl.agents.maml.maml.MamlPpoConfig {}",
        "seed: !!python/name:os.system",
    ):
        assert "not valid YAML" in problem(write(text))
        assert not marker.exists()
        with pytest.raises(UserError):
            load_config("quickstart", ["--seed", text.partition(": ")[2] or text])
        assert not marker.exists()
    yaml.unsafe_load(f"!!python/object/apply:os.mkdir ['{marker}']")
    assert marker.exists()  # it would have been executed


def test_an_unknown_config_is_named_with_the_nearest(tmp_path):
    for name in ("quickstrat", "runs/quickstrat.yaml", str(tmp_path / "quickstrat.yml")):
        message = problem(name)
        assert repr(name) in message and "did you mean 'quickstart'?" in message and "metarl list configs" in message
    assert "did you mean" not in problem("zzz")
    assert str(tmp_path) in problem(tmp_path)  # a directory is no config
    assert find_config("quickstart").is_file()


# Flags


def test_flags_are_laid_over_nested_and_listed_settings():
    flags = (
        "--seed 7 --agent.inner-lr=0.25 --agent.outer.lr 1e-4 --agent.hidden-sizes 32 16 "
        "--agent.normalizer-iterations 7 "
        "--stages.0.tasks.horizon 9 --stages.0.iterations 3 --evaluation.rollouts-per-task null --device cpu"
    )
    config, before = load_config("navigation_maml_ppo", flags.split()), load_config("navigation_maml_ppo")
    assert (config.seed, config.agent.inner_lr, config.agent.outer.lr) == (7, 0.25, 1e-4)
    assert config.agent.hidden_sizes == (32, 16) and config.agent.normalizer_iterations == 7
    assert (config.stages[0].tasks.horizon, config.stages[0].iterations) == (9, 3)
    assert config.evaluation.rollouts_per_task is None and config.device == "cpu"
    assert config.agent.outer.max_kl == before.agent.outer.max_kl == 0.2  # of the file, not the default 0.05
    assert config.stages[0].tasks.name == before.stages[0].tasks.name


def test_a_flag_may_choose_another_agent_or_outer_step_than_the_file():
    """What both have stays as the file says; the settings of the old one alone are dropped, none of a flag is."""

    def load(flags=""):
        return load_config("navigation_maml_ppo", flags.split()).agent

    agent = load("--agent.name fomaml")
    assert (agent.name, agent.outer.max_kl, agent.normalizer_iterations) == ("fomaml", 0.2, 0)
    agent = load("--agent.name maml_trpo")
    assert (agent.outer.name, agent.outer.max_kl, agent.normalizer_iterations) == ("trpo", 0.01, 0)  # not PPO's .2
    agent = load("--agent.name anil --agent.outer.name trpo --agent.outer.cg-iterations 7")
    assert (agent.outer.name, agent.outer.max_kl, agent.outer.cg_iterations) == ("trpo", 0.01, 7)
    agent = load("--agent.name reptile --agent.outer.name gradient --agent.outer.lr 0.5")
    assert (agent.outer.name, agent.outer.lr) == ("gradient", 0.5)
    assert load() == load("--agent.name maml_ppo") == load("--agent.outer.name ppo")
    found = problem("navigation_maml_ppo", "--agent.outer.name", "trpo")
    assert "--agent.outer.name: got 'trpo', expected 'ppo'" in found


def test_the_settings_of_an_agent_are_its_own():
    """A near name is sought among those of the chosen agent and outer step alone."""
    for flags, expected in (
        ("--agent.name imaml --agent.proximl 3", "--agent.proximl: unknown setting; did you mean --agent.proximal?"),
        ("--agent.proximal 3", "--agent.proximal: unknown setting"),
        ("--agent.name fomaml --agent.outer.name trop", "got 'trop', expected one of ppo, trpo, gradient; did you"),
        ("--agent.name fomalm", "did you mean 'fomaml'?"),
        ("--agent.adapted-modules heads", "got 'heads', expected all or any of layer_0, layer_1, head, log_std"),
        ("--agent.init-std 3", "init_std is 3.0; expected between min_std 0.05 and max_std 2.0"),
        ("--agent.name meta_dropout --agent.estimator dice", "--agent.estimator: got 'dice', expected 'lvc'"),
    ):
        message = problem("navigation_maml_ppo", *flags.split())
        assert expected in message
    assert "did you mean" not in problem("navigation_maml_ppo", "--agent.proximal", "3")


def test_a_flag_may_choose_another_memory_or_critic_than_the_file():
    def load(flags=""):
        return load_config("ml10_rl2", flags.split()).agent

    assert (load().memory.name, load().memory.size, load().critic.name) == ("gru", 256, "linear")
    transformer = load("--agent.memory.name transformer --agent.memory.context 64").memory
    assert (transformer.name, transformer.size, transformer.context) == ("transformer", 64, 64)  # the size is its own
    assert load("--agent.critic.name separate --agent.critic.sizes 32").critic.sizes == (32,)
    agent = load_config("navigation_maml_ppo", ["--agent.name", "rl2", "--agent.memory.name", "lstm"]).agent
    assert (agent.name, agent.memory.name) == ("rl2", "lstm")
    back = load("--agent.name maml_ppo --agent.outer.epochs 3")
    assert (back.name, back.outer.epochs, back.gamma) == ("maml_ppo", 3, 0.99)
    for flags, expected in (
        ("--agent.memory.contxt 3", "--agent.memory.contxt: unknown setting"),
        ("--agent.memory.name transformer --agent.memory.contxt 3", "did you mean --agent.memory.context?"),
        ("--agent.memory.name gur", "got 'gur', expected one of gru, lstm, transformer, episodic; did you mean 'gru'"),
        ("--agent.memory.name episodic --agent.memory.heads 3", "size is 128, heads is 3; expected a multiple"),
        (
            "--agent.critic.name separate --agent.critic.loss-coef 0",
            "--agent.critic.loss-coef: got 0, expected greater",
        ),
        ("--agent.free-episodes 10", "free_episodes is 10 of trial_episodes 10; one must count"),
        ("--agent.observation-entries 3 3", "name one twice"),
    ):
        assert expected in problem("ml10_rl2", *flags.split()), flags


def test_a_memory_in_an_agent_without_one_is_an_unknown_setting(write):
    with pytest.raises(UserError, match=r"agent\.memory: unknown setting"):
        load_config(write("agent: {name: maml_ppo, memory: {name: gru}}"))


def test_lists_negative_numbers_and_repetition():
    assert parse_flags(["--a", "1", "2", "--b", "[3, 4]", "--c", "5"]) == {("a",): [1, 2], ("b",): [3, 4], ("c",): 5}
    assert parse_flags(["--a", "-1", "--b=-2.5", "--c", "x", "-3"]) == {("a",): -1, ("b",): -2.5, ("c",): ["x", -3]}
    assert parse_flags(["--a", "1", "--a", "2"]) == {("a",): 2}
    assert parse_flags(["--a.b-c.0.d_e=x=y"]) == {("a", "b_c", "0", "d_e"): "x=y"}
    assert parse_flags([]) == {}
    assert "--seed: got -3, expected greater than or equal to 0" in problem("quickstart", "--seed", "-3")
    assert "--agent.outer.lr: got -1" in problem("quickstart", "--agent.outer.lr", "-1")


def test_a_flag_makes_stages_and_sections_that_the_file_leaves_out(write):
    config = load_config(write("seed: 3"), ["--stages.0.iterations", "5", "--evaluation.num-tasks", "2"])
    assert (config.seed, config.stages[0].iterations, config.evaluation.num_tasks) == (3, 5, 2)
    assert len(config.stages) == 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--agent.inner-lrr 0.1", "--agent.inner-lrr: unknown setting; did you mean --agent.inner-lr?"),
        ("--num-taks 3", "--num-taks: unknown setting; did you mean --num-tasks?"),
        (
            "--stages.0.tasks.horizn 5",
            "--stages.0.tasks.horizn: unknown setting; did you mean --stages.0.tasks.horizon",
        ),
        ("--num-tasks 0", "--num-tasks: got 0, expected greater than or equal to 1"),
        ("--agent.gamma 1.5", "--agent.gamma: got 1.5, expected less than or equal to 1"),
        ("--agent.gamma .nan", "--agent.gamma: got nan, expected a finite number"),
        ("--agent.gamma nan", "--agent.gamma: got 'nan', expected a finite number"),
        ("--num-tasks many", "--num-tasks: got 'many', expected a valid integer"),
        ("--seed", "--seed has no value"),
        ("--seed --num-tasks 3", "--seed has no value"),
        ("--seed 1 2", "--seed: expected a valid integer"),
        ("extra --seed 1", "unexpected argument 'extra'"),
        ("--seed.deep 3", "--seed.deep"),
        ("--stages.3.iterations 5", "there is no stages.3; the list has 1 item"),
        ("--stages.first.iterations 5", "there is no stages.first"),
        ("--stages.².iterations 5", "there is no stages.²"),
        ("--stages.-1.iterations 5", "there is no stages"),
        ("--stages.iterations 5", "--stages.iterations: choose an item of the list, e.g. --stages.0.iterations"),
        ("--agent.hidden-sizes.0 5", "--agent.hidden-sizes.0"),
        ("--seed 2020-13-45", "--seed"),
        ("--seed {", "--seed"),
        ("--", "no value"),
    ],
)
def test_a_mistaken_flag_is_told_in_its_own_words(flags, expected):
    assert expected in problem("quickstart", *flags.split())


# Anything at all

YAML_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["metaworld", "reach-v9", "2020-13-45", "0b_", "._", "1e400", "!!binary x", "<<", "*a", "&a"]),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(
            st.sampled_from(["seed", "agent", "stages", "tasks", "family", "name", "inner_lr", "iterations", "x", ""])
            | st.text(max_size=4),
            children,
            max_size=4,
        )
    ),
    max_leaves=12,
)
TREES = st.dictionaries(
    st.sampled_from(["seed", "agent", "stages", "evaluation", "num_tasks", "x"]), YAML_VALUES, max_size=4
)


@settings(max_examples=300)
@given(
    st.text()
    | st.text(st.sampled_from("ab1:-[]{},&*!|>%@`'\"#?\n\t .~"))
    | TREES.map(yaml.safe_dump)
    | TREES.map(lambda tree: yaml.safe_dump(tree).replace("'", ""))
)
@example("seed: 2020-13-45")
@example("seed: 0b_")
@example("a: &a [*a]")
@example("stages: &a [*a]")
@example("agent: &a {agent: *a}")
@example("? [1]\n: 2")
@example("'a\\u2028b': 1")
@example("stages: [[[[]]]]")
@example("{" * 2000)
def test_arbitrary_yaml_never_raises_anything_but_a_user_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "arbitrary.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        config = load_config(path)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert isinstance(config, RunConfig) and math.isfinite(config.agent.inner_lr)


@settings(max_examples=200)
@given(st.lists(st.text(max_size=12) | st.sampled_from(["--seed", "--stages.0", "--agent.inner-lr", "=", "1", "{"])))
@example(["--seed", "2020-13-45"])
@example(["--stages.².iterations", "5"])
@example(["--stages", "3", "--stages.0.iterations", "5"])
@example(["--", "5"])
def test_arbitrary_flags_never_raise_anything_but_a_user_error(flags):
    try:
        load_config("quickstart", flags)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
