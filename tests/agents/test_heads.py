"""The stage as an input: cues are not normalised and choose the head; means stay within the bounds."""

import pytest
import torch

from metarl.agents import build
from metarl.agents.maml.maml import MamlPpoConfig
from metarl.agents.rl2.config import Rl2Config
from metarl.build import distribution_of
from metarl.config.schema import load_config
from metarl.deploy.policy import load
from metarl.errors import UserError
from metarl.nn.distributions import DiagonalGaussian, GaussianHead
from metarl.nn.mlp import MlpPolicy
from metarl.nn.normalizer import Normalizer
from metarl.rl.surrogates import weighted_mean
from metarl.training.loop import train
from metarl.types import TimeStep
from tests.agents.rollouts import iteration, make_agent
from tests.agents.specs import spec
from tests.stability import agents as with_memory

STAGES, PLAIN, ACTIONS = 3, 2, 2
SIZE = PLAIN + STAGES
KINDS = {
    "maml": MamlPpoConfig(hidden_sizes=(8,)),
    "rl2": Rl2Config(memory={"size": 8}, encoder_sizes=(8,), critic={"sizes": (8,)}),
}


def agent_with_heads(kind):
    return build(KINDS[kind], spec(SIZE, ACTIONS, "cpu", 0, STAGES, True))


def time_step(stage, observations):
    cue = torch.eye(STAGES)[stage].expand(len(observations), STAGES)
    whole = torch.cat([observations, cue], -1)[:, None]
    shape = whole.shape[:2]
    return TimeStep(whole, torch.full(shape, torch.nan), torch.ones(shape, dtype=bool), torch.ones(shape, dtype=bool))


def means(agent, stage, observations):
    noise = torch.zeros(len(observations), 1, ACTIONS)
    return agent.act(time_step(stage, observations), noise, agent.initial_state(len(observations)))[0]


def head(agent):
    """Weights `[heads · A, F]` of the output layer."""
    parameters = agent.parameters()
    return parameters["policy.weight_1"] if "policy.weight_1" in parameters else parameters["policy.head.mean.0.weight"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_has_an_output_layer_of_its_own(kind):
    agent, observations = agent_with_heads(kind), torch.randn(4, PLAIN, generator=torch.Generator().manual_seed(0))
    assert len(head(agent)) == STAGES * ACTIONS
    before = [means(agent, stage, observations) for stage in range(STAGES)]
    with torch.no_grad():
        head(agent)[ACTIONS : 2 * ACTIONS] += 1.0  # the second stage's
    after = [means(agent, stage, observations) for stage in range(STAGES)]
    assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [True, False, True]


def test_a_head_says_what_a_policy_with_that_layer_alone_says():
    several, one = (
        MlpPolicy(SIZE, GaussianHead(ACTIONS), (8,), heads=STAGES),
        MlpPolicy(SIZE, GaussianHead(ACTIONS), (8,)),
    )
    params = several.init(torch.Generator().manual_seed(0))
    params["bias_1"] = torch.arange(6.0)
    observations = time_step(2, torch.randn(4, PLAIN)).observations[:, 0]
    chosen = {**params, "weight_1": params["weight_1"][4:], "bias_1": params["bias_1"][4:]}
    torch.testing.assert_close(
        several.distribution(params, observations).mode, one.distribution(chosen, observations).mode
    )


def test_entries_that_stay_raw_are_not_normalised():
    """In the first stage the first cue is always 1; normalised, the first 0 would be −1 / floor."""
    normalizer = Normalizer.identity(3, 0.01, (1, 3))
    data = torch.tensor([[5.0, 1.0, 0.0], [7.0, 1.0, 0.0]])
    normalizer = normalizer.update(data, torch.ones(2, dtype=bool))
    torch.testing.assert_close(normalizer(data), torch.tensor([[-1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]))
    torch.testing.assert_close(normalizer(torch.tensor([6.0, 0.0, 1.0])), torch.tensor([0.0, 0.0, 1.0]))


@pytest.mark.parametrize("name", ["continual_cued_wedges_rl2", "navigation_maml_ppo"])
@pytest.mark.parametrize("cue", ["input", "head"])
def test_a_run_that_is_told_its_stage_is_loaded_and_evaluated_as_such(tmp_path, name, cue):
    """The normaliser learns, and the cue reaches the policy as 0 and 1."""
    flags = ["--stage-id", cue, "--num-tasks=2", "--rollouts-per-task=2", "--evaluation.num-tasks=2"]
    tasks = "{family: navigation, name: rotated_wedges, horizon: 4}"
    flags += ["--stages", f"[{{for_each: {{wedges: [0, 1]}}, tasks: {tasks}, iterations: 1}}]"]
    flags += ["--agent.normalizer-iterations=null"]
    if name.endswith("rl2"):
        flags += ["--agent.skip-inputs=true"]
    run = train(load_config(name, flags), run_dir=tmp_path)
    assert run.finished
    policy = load(tmp_path)
    assert policy.spaces.observation_size == 4
    statistics = policy.agent.normalizer
    assert statistics.count > 0
    assert statistics.mean[2:4].tolist() == [0.0, 0.0] and statistics.variance[2:4].tolist() == [1.0, 1.0]
    for stage, expected in (("wedge 0", [1.0, 0.0]), ("wedge 1", [0.0, 1.0]), (None, [0.0, 1.0])):
        tasks = distribution_of(policy.config, stage=stage)
        observation, _ = tasks.make(tasks.test_tasks[0]).reset()
        assert observation[2:].tolist() == expected
    with pytest.raises(UserError, match="the run has no stage 'third'; it has wedge 0, wedge 1"):
        distribution_of(policy.config, stage="third")


def test_a_head_needs_the_inputs_that_choose_it():
    config = Rl2Config(memory={"size": 8}, encoder_sizes=(8,), skip_inputs=False)
    with pytest.raises(UserError, match=r"agent\.skip_inputs must be true"):
        build(config, spec(SIZE, ACTIONS, "cpu", 0, STAGES, True))


def test_a_policy_may_see_the_memory_alone():
    """The features are the memory's 8 numbers, not those and the inputs."""
    config = Rl2Config(memory={"size": 8}, encoder_sizes=(8,), skip_inputs=False)
    agent = build(config, spec(PLAIN, ACTIONS, "cpu", 0))
    assert agent.parameters()["policy.head.mean.0.weight"].shape == (ACTIONS, 8)
    with torch.no_grad():
        agent.policy.trunk.encoder[0][0].weight.zero_()
    state, noise = agent.initial_state(2), torch.zeros(2, 1, ACTIONS)
    plain = [
        TimeStep(torch.full((2, 1, PLAIN), value), *time_step(0, torch.zeros(2, PLAIN))[1:]) for value in (0.0, 9.0)
    ]
    assert torch.equal(*(agent.act(each, noise, state)[0] for each in plain))


def test_saturation_by_hand():
    """(1.5 − 1)² + 0 = 0.25 and 0 + (3 − 1)² = 4, the last step without weight: mean 2.125."""
    mean = torch.tensor([[1.5, -1.0], [0.2, -3.0], [9.0, 9.0]])
    saturation = DiagonalGaussian(mean, torch.zeros(2)).saturation()
    assert weighted_mean(saturation, torch.tensor([1.0, 1.0, 0.0])).item() == pytest.approx(2.125)


def test_the_penalty_on_saturation_pulls_adapted_means_back():
    """All else equal: the outer loss is larger by the coefficient times the saturation of the adapted policies."""
    agents = [make_agent(saturation_coef=coef, inner_lr=1e-9) for coef in (0.0, 2.0)]
    for agent in agents:
        with torch.no_grad():
            agent.meta.theta["bias_2"].fill_(3.0)
    rollouts = iteration(agents[0])
    losses = [agent.update((), rollouts)["train/loss"] for agent in agents]
    # Means are 3 but for some hundredths: 2 · 2 · (3 − 1)² = 16.
    assert losses[1] - losses[0] == pytest.approx(16.0, rel=0.05)
    pulled = [agent.meta.theta["bias_2"].mean().item() for agent in agents]
    assert pulled[1] < 3.0 and pulled[1] < pulled[0]


def test_the_penalty_on_saturation_pulls_means_of_an_agent_with_a_memory_back():
    biases = []
    for coef in (0.0, 10.0):
        agent = with_memory.make("gru", saturation_coef=coef, lr=0.01, max_kl=1e9)
        with torch.no_grad():
            agent.policy.head.mean[0].bias.fill_(3.0)
        agent.update((), with_memory.iteration(agent))
        biases.append(agent.policy.head.mean[0].bias.mean().item())
    assert biases[1] < 2.98 and biases[1] < biases[0]
