"""ppo_multidiscrete.py: components, masks and their sources, and the spaces that it can handle."""

import math
from pathlib import Path

import gymnasium as gym
import masked
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical

import ppo as base
import ppo_multidiscrete as ppo

SMALL = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "update_epochs": 1, "total_timesteps": 64}


def choices(sizes, mask=None, **settings) -> ppo.Choices:
    """The policy's form of MultiDiscrete actions."""
    return ppo.Choices(MultiDiscrete(sizes), mask, ppo.Args(**settings))


def places(space: ppo.Choices, logits: torch.Tensor) -> torch.Tensor:
    """The logits of the network, arranged."""
    return ppo.arrange(logits, space.layout if space.layout is None else torch.tensor(space.layout), space.exist.shape)


def make(env_id="masked/Valves-v0", env_kwargs="{}", **settings) -> ppo.Environments:
    """Environments of gymnasium, reset."""
    sizes = {"num_envs": 2} | settings
    envs = ppo.make_envs(ppo.Args(env_id=env_id, env_backend="gymnasium", env_kwargs=env_kwargs, **sizes))
    envs.reset(1)
    return envs


@pytest.fixture(autouse=True)
def forget():
    """What one test has counted or said does not count in the next."""
    masked.Valves.invalid = masked.Valves.steps = 0
    ppo.say.cache_clear()


# Probabilities --------------------------------------------------------------------------------------------------------
@st.composite
def policies(draw, empty=False):
    """Sizes of components, masks for each, logits of all and a generator."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    masks = [rng.random(size) < 0.6 for size in sizes]
    for mask in masks:
        mask[rng.integers(len(mask))] |= not (empty and rng.random() < 0.5)
    scale = draw(st.sampled_from([0.0, 1.0, 30.0]))
    return sizes, masks, torch.tensor(scale * rng.normal(size=sum(sizes)), dtype=torch.float32), rng


@settings(max_examples=100, deadline=None)
@given(policies(empty=True))
def test_aux_4_log_probabilities_and_entropy_are_those_of_the_valid_values(policy):
    """As torch.distributions has them for a categorical over the valid values alone, component by component."""
    sizes, masks, logits, rng = policy
    logits.requires_grad_()
    space = choices(sizes, np.concatenate(masks))
    valid = torch.tensor(space.masks([np.concatenate(masks)]))
    actions, log_prob, entropy, alive = [], torch.zeros(()), torch.zeros(()), torch.zeros(len(logits), dtype=bool)
    for mask, part, offset in zip(masks, logits.split(sizes), np.cumsum([0, *sizes])):
        actions.append(int(rng.choice(np.flatnonzero(mask))) if mask.any() else 0)
        if mask.any():  # without a valid value there is no choice
            only = Categorical(logits=part[torch.tensor(mask)])
            log_prob = log_prob + only.log_prob(torch.tensor(int(mask[: actions[-1]].sum())))
            entropy = entropy + only.entropy()
            alive[offset + np.flatnonzero(mask)] = True
    ours = ppo.log_probabilities(places(space, logits[None]), torch.tensor([actions]), valid)
    torch.testing.assert_close(
        torch.cat(ours).detach(), torch.stack([log_prob, entropy]).detach(), rtol=1e-5, atol=2e-5
    )
    (gradient,) = torch.autograd.grad(ours[0].sum() + ours[1].sum(), logits)
    assert gradient.isfinite().all()
    assert not gradient[~alive].any()  # nothing is learned about what cannot be chosen
    if any(mask.any() for mask in masks):
        (expected,) = torch.autograd.grad(log_prob + entropy, logits)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=2e-5)


@settings(max_examples=100, deadline=None)
@given(policies(), st.sampled_from(["flat", "factored"]))
def test_aux_4_joint_actions_are_those_of_the_valid_combinations(policy, joint):
    """One categorical over the valid combinations, whose logits are their own or the sums of their components'."""
    sizes, _, logits, rng = policy
    table = rng.random(sizes) < 0.5
    table[tuple(rng.integers(sizes))] = True
    space = choices(sizes, None if len(sizes) == 1 else table, joint_actions=joint) if not ambiguous(sizes) else None
    if space is None or len(sizes) == 1:
        return
    parts = logits.split(sizes)
    if joint == "flat":
        logits = torch.tensor(rng.normal(size=math.prod(sizes)), dtype=torch.float32)
    total = list(logits) if joint == "flat" else []
    if joint == "factored":
        total = [sum(part[i] for part, i in zip(parts, index)) for index in np.ndindex(*sizes)]
    only = Categorical(logits=torch.stack(total)[torch.tensor(table.ravel())])
    chosen = int(rng.choice(np.flatnonzero(table.ravel())))
    expected = only.log_prob(torch.tensor(int(table.ravel()[:chosen].sum()))), only.entropy()
    valid = torch.tensor(space.masks([table]))
    ours = ppo.log_probabilities(places(space, logits[None]), torch.tensor([[chosen]]), valid)
    torch.testing.assert_close(torch.cat(ours), torch.stack(expected), rtol=1e-5, atol=2e-5)
    np.testing.assert_array_equal(space.actions(np.array([[chosen]]))[0], np.unravel_index(chosen, sizes))


def ambiguous(sizes) -> bool:
    """Whether a mask over combinations has the shape of one row for each component."""
    return len(sizes) > 1 and tuple(sizes) == (len(sizes), max(sizes))


@settings(max_examples=50, deadline=None)
@given(policies())
def test_factored_without_a_mask_is_component_by_component(policy):
    """Also with masks of the components: choosing jointly is then the same as choosing one after the other."""
    sizes, masks, logits, rng = policy
    action = [int(rng.choice(np.flatnonzero(mask))) for mask in masks]
    results = []
    for joint in ("off", "factored"):
        space = choices(sizes, tuple(masks), joint_actions=joint)
        chosen = [action] if joint == "off" else [[np.ravel_multi_index(action, sizes)]]
        valid = torch.tensor(space.masks([tuple(masks)]))
        results.append(torch.cat(ppo.log_probabilities(places(space, logits[None]), torch.tensor(chosen), valid)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=5e-5)


def test_multidiscrete_1_one_ratio_for_each_sample():
    """The log-ratios of a minibatch [B] are those of whole actions."""
    space = choices([3, 2])
    agent = ppo.Agent(ppo.Features(Box(-1, 1, (4,))), space, ppo.Args())
    assert agent.actor[4].weight.shape == (5, 64)  # one head
    obs, actions = torch.randn(6, 4), torch.tensor([[0, 1]] * 6)
    logits, values = agent(obs)
    log_probs, _ = ppo.log_probabilities(logits, actions, torch.tensor(space.masks([None] * 6)))
    raw = agent.actor(obs)
    expected = raw[:, :3].log_softmax(-1)[:, 0] + raw[:, 3:].log_softmax(-1)[:, 1]
    torch.testing.assert_close(log_probs, expected)
    batch = ppo.Batch(obs, actions, None, expected - 0.1, torch.ones(6), values, values)
    *_, log_ratio = ppo.ppo_loss(log_probs, log_probs * 0, values, batch, 0.2, ppo.Args())
    torch.testing.assert_close(log_ratio, torch.full((6,), 0.1), rtol=1e-4, atol=1e-5)


def test_one_component_without_masks_is_ppo(tmp_path):
    """To the last bit: what the script adds is not in the way of what it does not need."""
    states = []
    for script in (base, ppo):
        args = {"env_id": "CartPole-v1", "env_backend": "gymnasium", "num_envs": 4, "total_timesteps": 2048}
        result = script.train(script.Args(**args, learning_rate=1e-3, runs_dir=str(tmp_path / script.SCRIPT)))
        states.append(torch.load(Path(result["run_dir"]) / "checkpoint.pt", weights_only=True))
    assert states[0]["agent"].keys() == states[1]["agent"].keys()
    assert all(torch.equal(states[0]["agent"][name], states[1]["agent"][name]) for name in states[0]["agent"])
    assert torch.equal(states[0]["moments"], states[1]["moments"])


# Forms of masks -------------------------------------------------------------------------------------------------------
SIZES = [3, 2, 4]
MASKS = [np.array([1, 0, 1], bool), np.array([0, 1], bool), np.array([1, 1, 0, 1], bool)]
ROWS = np.array([[1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 0, 1]], bool)  # without what is beyond a component's size


@pytest.mark.parametrize("kind", [bool, np.int8, np.float32, np.int64])
@pytest.mark.parametrize("form", ["row", "rows", "tuple"])
def test_masks_of_components(form, kind):
    mask = masked.given(MASKS, form)
    mask = tuple(part.astype(kind) for part in mask) if form == "tuple" else mask.astype(kind)
    space = choices(SIZES, mask)
    assert (space.shape, space.exist.shape, space.num_logits) == ((3,), (3, 4), 9)
    np.testing.assert_array_equal(space.masks([mask, mask]), [ROWS, ROWS])


@pytest.mark.parametrize("joint", ["auto", "flat", "factored"])
def test_masks_of_combinations(joint):
    table = masked.given(MASKS, "table")
    table[0, 0, 0] = True  # what no mask of components can say
    space = choices(SIZES, table, joint_actions=joint)
    assert (space.shape, space.exist.shape, space.num_logits) == ((1,), (1, 24), 9 if joint == "factored" else 24)
    np.testing.assert_array_equal(space.masks([table])[0], [table.ravel()])


def test_masks_of_components_for_joint_actions():
    space = choices(SIZES, tuple(MASKS), joint_actions="flat")
    np.testing.assert_array_equal(space.masks([tuple(MASKS)])[0], [masked.given(MASKS, "table").ravel()])


def test_masks_of_combinations_taken_apart(capsys):
    """A component keeps the values that are valid in any combination; that others may be chosen is said once."""
    table = np.zeros(SIZES, bool)
    table[0, 1, 2] = table[2, 0, 2] = True
    space = choices(SIZES, table, joint_actions="off")
    for _ in range(2):
        expected = [[1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 1, 0]]
        np.testing.assert_array_equal(space.masks([table])[0], np.array(expected, bool))
    assert capsys.readouterr().err.count("--joint-actions off: each component may take") == 1


def test_auto_has_a_logit_for_each_of_few_combinations_and_sums_for_many():
    assert choices([10, 10, 10], np.ones((10, 10, 10))).num_logits == 1000
    assert choices([10, 10, 11], np.ones((10, 10, 11))).num_logits == 31
    assert choices([10, 10, 11]).joint is choices([4], np.ones(4)).joint is False


@pytest.mark.parametrize("form", ["row", "rows", "tuple", "table"])
@pytest.mark.parametrize("joint", ["off", "flat", "factored"])
def test_aux_4_no_valid_value_is_no_choice(form, joint, capsys):
    """The first value is taken, with probability 1; it is said once."""
    nothing = [MASKS[0], MASKS[1] & False, MASKS[2]]
    space = choices(SIZES, masked.given(nothing, form), joint_actions=joint)
    for _ in range(2):
        valid = space.masks([masked.given(nothing, form)])
    assert valid.any(-1).all()
    said = capsys.readouterr().err
    assert said.count("where an action mask leaves a component no valid value, it gets the first") == 1
    if form == "table":  # then no combination is valid, and all components get their first
        assert valid.sum(-1).max() == 1 and not valid.argmax(-1).any()
        return
    log_probs, entropy = ppo.log_probabilities(
        places(space, torch.zeros(1, space.num_logits)), torch.tensor(valid.argmax(-1)), torch.tensor(valid)
    )
    assert entropy.item() == pytest.approx(math.log(2 * 3)) and log_probs.item() == pytest.approx(-math.log(2 * 3))
    assert space.actions(valid.argmax(-1))[0][1] == 0


REFUSED = {
    "too short": np.ones(8),
    "all combinations in a row": np.ones(24),
    "another shape": np.ones((3, 3)),
    "another order": np.ones((4, 2, 3)),
    "a single number": np.array(1),
    "twos": np.full(9, 2),
    "logits": np.array([0, -1e8] * 4 + [0]),
    "not a number": np.full(9, np.nan),
    "text": np.array(["yes"] * 9),
    "too few vectors": (np.ones(3), np.ones(2)),
    "vectors of other sizes": (np.ones(3), np.ones(3), np.ones(3)),
    "a tuple of numbers": (1, 1, 1),
    "a list of unequal vectors": [[1, 1, 1], [1, 1], [1, 1, 1, 1]],
    "a dictionary": {"mask": 1},
}


@pytest.mark.parametrize("case", REFUSED)
def test_masks_of_other_forms_are_refused(case):
    accepted = r"shape \[9\] for all values in a row, \[3, 4\] for a row of each component or \[3, 2, 4\] for all combi"
    with pytest.raises(ppo.InputError, match=accepted + r"nations, or a tuple of 3 vectors; not \S"):
        choices(SIZES, REFUSED[case])
    with pytest.raises(ppo.InputError, match=accepted):
        choices(SIZES, np.ones(9)).masks([REFUSED[case]])


@pytest.mark.parametrize("sizes", [[2, 2], [2, 5]])
def test_ambiguous_masks_are_refused(sizes):
    """[2, 5] may be two rows of up to five values, or all combinations. In a row or as a tuple it is clear."""
    with pytest.raises(ppo.InputError, match=r"not \[2, \d\], which can be the second or the third"):
        choices(sizes, np.ones(sizes))
    for mask in (np.ones(sum(sizes)), tuple(np.ones(size) for size in sizes)):
        assert choices(sizes, mask).masks([mask]).sum() == sum(sizes)


def test_a_single_component_has_no_ambiguous_mask():
    for mask in (np.eye(5)[2], np.eye(5)[2:3], (np.eye(5)[2],)):
        space = ppo.Choices(Discrete(5), mask, ppo.Args())
        np.testing.assert_array_equal(space.masks([mask]), np.eye(5, dtype=bool)[None, 2:3])


@pytest.mark.parametrize("first", [None, np.ones(9)])
def test_masks_come_always_or_never(first):
    space = choices(SIZES, first)
    with pytest.raises(ppo.InputError, match="each observation or with none"):
        space.masks([np.ones(9) if first is None else None])


# Sources of masks -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("source", masked.SOURCES)
@pytest.mark.parametrize("form", masked.FORMS)
def test_sources_and_forms(source, form):
    """Whatever an environment gives, and where: only valid actions are taken, in episode after episode."""
    if source == "observation" and form == "tuple":
        return  # a Box holds no tuple
    envs = make(env_kwargs=f'{{"source": "{source}", "form": "{form}", "strict": true}}', num_steps=100)
    agent = ppo.Agent(envs.observation_space, envs.action_space, ppo.Args())
    assert envs.observation_space.shape == (9,) and envs.action_space.joint == (form == "table")
    rollout = ppo.collect_rollout(agent, envs, envs.reset(1), ppo.Args(num_envs=2, num_steps=100))
    assert masked.Valves.steps >= 200 and len(rollout.ends) == 24
    assert rollout.masks.sum((-2, -1)).max() < 24 and len(np.unique(rollout.masks, axis=0)) > 50


class Three(gym.Env):
    """Gives masks in up to three places, each with another valid action."""

    def __init__(self, places):
        self.places, self.action_space = places, Discrete(3)
        part = Box(-1, 1, (2,), np.float32)
        self.observation_space = Dict(x=part, action_mask=MultiBinary(3)) if "observation" in places else part
        if "method" in places:
            self.action_masks = lambda: np.eye(3)[2]

    def reset(self, *, seed=None, options=None):
        """Observation and info."""
        super().reset(seed=seed)
        obs = np.zeros(2, np.float32)
        obs = {"x": obs, "action_mask": np.eye(3, dtype=np.int8)[0]} if "observation" in self.places else obs
        return obs, {"action_mask": np.eye(3)[1]} if "info" in self.places else {}

    def step(self, action):
        """The same again."""
        obs, info = self.reset()
        return obs, 0.0, False, False, info


gym.register("test/Three-v0", Three, disable_env_checker=True)


@pytest.mark.parametrize(
    ("given_by", "valid"),
    [("observation info method", [1, 0, 0]), ("observation method", [1, 0, 0]), ("info method", [0, 1, 0]),
     ("method", [0, 0, 1]), ("", [1, 1, 1])],
)  # fmt: skip
def test_order_of_the_sources(given_by, valid):
    envs = make("test/Three-v0", f'{{"places": "{given_by}"}}')
    np.testing.assert_array_equal(envs.masks(), np.array([[valid]] * 2, bool))
    envs.step(envs.masks().argmax(-1))
    np.testing.assert_array_equal(envs.masks(), np.array([[valid]] * 2, bool))
    assert envs.observation_space.shape == (2,)  # the mask is no feature


@pytest.mark.parametrize("source", masked.SOURCES)
@pytest.mark.parametrize("max_steps", [math.inf, 3])
def test_masks_at_an_episodes_end_are_those_of_the_next_ones_start(source, max_steps):
    """The environment has one valid action in each step, another one in every episode, and accepts no other."""
    envs = make("masked/Stamps-v0", f'{{"source": "{source}"}}')
    envs.max_steps = max_steps
    agent = ppo.Agent(envs.observation_space, envs.action_space, ppo.Args())
    rollout = ppo.collect_rollout(agent, envs, envs.reset(1), ppo.Args(num_envs=2, num_steps=60))
    assert len(rollout.ends) == 2 * 60 // min(5, max_steps)
    episode, length = rollout.obs[:-1, ..., 0], rollout.obs[:-1, ..., 1]
    np.testing.assert_array_equal(rollout.actions[..., 0], (7 * episode + length) % 60)
    np.testing.assert_array_equal(rollout.masks.argmax(-1), rollout.actions)
    assert (rollout.masks.sum(-1) == 1).all()


# EnvPool --------------------------------------------------------------------------------------------------------------
class Pool:
    """A pool of EnvPool that notes whether the actions were valid, and what the masks were."""

    def __init__(self, pool):
        self.pool, self.masks, self.invalid, self.actions, self.taken = pool, None, 0, 0, []

    def reset(self):
        """All first observations."""
        obs, info = self.pool.reset()
        self.masks, self.restart = obs["action_mask"].copy(), np.zeros(len(obs["action_mask"]), bool)
        return obs, info

    def step(self, actions, ids=None):
        """A step of all, or of some."""
        ids = np.arange(len(self.masks)) if ids is None else ids
        for i, action in zip(ids, actions):
            assert self.restart[i] == (len(ids) < len(self.masks)) or self.restart.all()
            if not self.restart[i]:  # otherwise the action is ignored
                masks = self.masks[i]
                self.actions += 1
                self.invalid += not (np.take_along_axis(masks, action[:, None], -1)[:, 0] | ~masks.any(-1)).all()
        result = self.pool.step(actions, ids.astype(np.int32))
        self.masks[ids], self.restart[ids] = result[0]["action_mask"], result[2] | result[3]
        return result


@pytest.mark.filterwarnings("ignore:.*Box (low|high)'s precision lowered")
@pytest.mark.parametrize("masks", [True, False])
def test_envpool_gets_valid_actions_only(masks):
    """Over many ends of episodes, whose masks are those of the next one's first observation."""
    pytest.importorskip("envpool")  # exists for Linux only
    args = ppo.Args(num_envs=8, num_steps=150, mask_actions=masks)
    envs = ppo.make_envs(args)
    make = envs.make
    envs.make = lambda seed: Pool(make(seed))
    agent = ppo.Agent(envs.observation_space, envs.action_space, args)
    rollout = ppo.collect_rollout(agent, envs, envs.reset(3), args)
    assert len(rollout.ends) > 4 and envs.pool.actions == 1200
    assert envs.pool.invalid == 0 if masks else envs.pool.invalid > 100
    assert rollout.masks.all() != masks
    if masks:
        restored = envs.pool.masks
        restored[..., 0] |= ~restored.any(-1)
        np.testing.assert_array_equal(envs.masks(), restored)


# Switches -------------------------------------------------------------------------------------------------------------
class Steps:
    """Trains a little and keeps rollouts and gradient steps."""

    def __init__(self, monkeypatch, tmp_path, **settings):
        self.rollouts, self.minibatches, self.log_ratios = [], [], []
        collect, step = ppo.collect_rollout, ppo.gradient_step

        def spy_collect(*inputs):
            self.rollouts.append(collect(*inputs))
            return self.rollouts[-1]

        def spy_step(agent, adam, minibatch, *rest):
            self.minibatches.append(minibatch)
            terms, log_ratio = step(agent, adam, minibatch, *rest)
            self.log_ratios.append(log_ratio)
            return terms, log_ratio

        with monkeypatch.context() as patch:
            patch.setattr(ppo, "collect_rollout", spy_collect)
            patch.setattr(ppo, "gradient_step", spy_step)
            args = ppo.Args(env_id="masked/Valves-v0", env_backend="gymnasium", runs_dir=str(tmp_path), **settings)
            self.path = ppo.train(args)["run_dir"]


@pytest.mark.parametrize("switches", [{}, {"mask_actions": False}, {"mask_loss": False}, {"joint_actions": "flat"}])
def test_aux_4_switches(switches, monkeypatch, tmp_path):
    """Where masks count; and the ratio is 1 in the first minibatch of every update, whichever policy it is of."""
    run = Steps(monkeypatch, tmp_path, **SMALL | {"total_timesteps": 160}, **switches)
    acting = np.concatenate([rollout.masks for rollout in run.rollouts])
    learning = torch.cat([minibatch.masks for minibatch in run.minibatches])
    exist = choices(SIZES, **{"joint_actions": switches.get("joint_actions", "auto")}).exist
    assert acting.shape == (80, 2, *exist.shape)
    assert (acting == exist).all() == ("mask_actions" in switches)
    assert (learning == torch.tensor(exist)).all().item() == ("mask_actions" in switches or "mask_loss" in switches)
    assert (masked.Valves.invalid == 0) == ("mask_actions" not in switches)
    assert np.take_along_axis(acting, np.concatenate([r.actions for r in run.rollouts])[..., None], -1).all()
    assert all(log_ratio.abs().max() < 1e-5 for log_ratio in run.log_ratios[::2])
    assert all(log_ratio.abs().max() > 1e-5 for log_ratio in run.log_ratios[1::2])


def test_masks_do_not_change_the_network_unless_actions_are_joint():
    sizes = {}
    for switches in ({}, {"mask_actions": False}, {"mask_loss": False}, {"joint_actions": "flat"}):
        args = ppo.Args(**switches)
        space = ppo.Choices(MultiDiscrete(SIZES), masked.given(MASKS, "row"), args)
        agent = ppo.Agent(ppo.Features(Box(-1, 1, (4,))), space, args)
        sizes[str(switches)] = len(agent.actor[4].bias), [name for name in agent.state_dict() if "layout" in name]
    assert list(sizes.values()) == [(9, [])] * 3 + [(24, [])]


def test_actions_follow_the_policy():
    """Gumbel argmax samples from the masked softmax, component by component, with gaps between the components."""
    envs = make(env_kwargs='{"sizes": [3, 2]}', num_envs=2, num_steps=2500)
    args = ppo.Args(num_envs=2, num_steps=2500)
    agent = ppo.Agent(envs.observation_space, envs.action_space, args)
    torch.nn.init.zeros_(agent.actor[4].weight)
    logits = torch.tensor([0.5, 0.3, 0.2, 0.7, 0.3]).log()
    agent.actor[4].bias.data = logits
    torch.manual_seed(0)
    rollout = ppo.collect_rollout(agent, envs, envs.reset(0), args)
    probabilities = places(envs.action_space, logits).exp().numpy() * rollout.masks
    expected = probabilities / probabilities.sum(-1, keepdims=True)
    chosen = rollout.actions[..., None] == np.arange(3)
    np.testing.assert_allclose(chosen.mean((0, 1)), expected.mean((0, 1)), atol=0.03)  # four standard errors


def test_the_most_probable_valid_action():
    envs = make()
    args = ppo.Args(num_envs=2, num_steps=40)
    agent = ppo.Agent(envs.observation_space, envs.action_space, args)
    agent.actor[4].bias.data = torch.arange(9.0)
    rollout = ppo.collect_rollout(agent, envs, envs.reset(0), args, greedy=True)
    last_valid = rollout.masks.shape[-1] - 1 - rollout.masks[..., ::-1].argmax(-1)
    np.testing.assert_array_equal(rollout.actions, last_valid)


# Spaces ---------------------------------------------------------------------------------------------------------------
ACTIONS = [
    Discrete(4),
    Discrete(4, start=-2),
    MultiDiscrete([3, 2]),
    MultiDiscrete([3, 2], start=[5, -1]),
    MultiDiscrete([[3, 2], [2, 4]]),
    MultiBinary(3),
    MultiBinary([2, 2]),
    Box(0, 3, (3,), np.int32),
    Box(np.array([0, 0]), np.array([39, 19]), dtype=np.int16),
    Box(1, 3, (2,), np.uint8),
]


@pytest.mark.parametrize("joint", ["off", "flat", "factored"])
@pytest.mark.parametrize("space", ACTIONS, ids=str)
def test_every_action_of_a_space_can_be_chosen(space, joint):
    """And nothing else; they have the space's own shape and type."""
    mine = ppo.Choices(space, None, ppo.Args(joint_actions=joint))
    every = np.stack(np.meshgrid(*map(np.arange, mine.nvec), indexing="ij"), -1).reshape(-1, len(mine.nvec))
    actions = mine.actions(every)
    assert all(space.contains(action) for action in actions)
    assert len(np.unique(actions.reshape(len(every), -1), axis=0)) == len(every) == math.prod(mine.sizes)
    assert mine.masks([None] * 2).sum() == 2 * sum(mine.nvec)


@pytest.mark.parametrize(
    "space",
    [Box(-1, 1, (2,)), Tuple([Discrete(2)]), Dict(a=Discrete(2)), MultiDiscrete([2**14, 2]), Box(0, 10**9, (2,), int)],
    ids=str,
)
def test_other_actions_are_refused(space):
    with pytest.raises(
        ppo.InputError, match="ppo_continuous.py is for Box|needs Discrete, MultiD|more than 16384 alter"
    ):
        ppo.Choices(space, None, ppo.Args())


def test_too_many_combinations_are_refused():
    assert choices([2] * 30).num_logits == 60
    with pytest.raises(ppo.InputError, match="more than 16384 alternatives with --joint-actions flat"):
        choices([2] * 30, joint_actions="flat")


IMAGE = Box(0, 255, (2, 3), np.uint8)
OBSERVATIONS = [
    (Box(-1, 1, (2, 2)), np.float32([[1, 2], [3, 4]]), [1, 2, 3, 4]),
    (Box(-1, 1, ()), np.float32(0.5), [0.5]),
    (Box(-np.inf, np.inf, (2,), np.float64), np.array([7.0, 8.0]), [7, 8]),
    (Discrete(3), 2, [0, 0, 1]),
    (Discrete(3, start=-1), -1, [1, 0, 0]),
    (MultiBinary((2, 2)), np.int8([[1, 0], [0, 1]]), [1, 0, 0, 1]),
    (MultiDiscrete([3, 2], start=[1, 0]), np.array([3, 0]), [0, 0, 1, 1, 0]),
    (MultiDiscrete([[2, 3]]), np.array([[1, 0]]), [0, 1, 1, 0, 0]),
    (Box(0, 2, (2, 1), np.int8), np.int8([[0], [2]]), [1, 0, 0, 0, 0, 1]),
    (Box(np.array([0, -3]), np.array([1, -1]), dtype=np.int32), np.array([1, -2]), [0, 1, 0, 1, 0]),
    (Box(0, 1, (3,), np.int64), np.array([1, 0, 1]), [1, 0, 1]),
    (Box(0, 63, (1,), np.int64), np.array([1]), [0, 1] + [0] * 62),
    (Box(0, 64, (1,), np.int64), np.array([60]), [60]),
    (Box(-(2**31), 2**31 - 1, (2,), np.int32), np.array([-5, 5]), [-5, 5]),
    (IMAGE, np.full((2, 3), 200, np.uint8), [200] * 6),
    (Tuple([Discrete(2), Box(-1, 1, (1,))]), (1, np.float32([0.5])), [0, 1, 0.5]),
    (Dict(b=Dict(c=Discrete(2)), a=Box(-1, 1, (1,))), {"a": np.float32([0.5]), "b": {"c": 0}}, None),
    (Dict(x=MultiBinary(2), action_mask=MultiBinary(5)), {"x": np.int8([0, 1]), "action_mask": np.ones(5)}, [0, 1]),
]


@pytest.mark.parametrize(("space", "obs", "expected"), OBSERVATIONS, ids=[str(case[0]) for case in OBSERVATIONS])
def test_observations_become_vectors(space, obs, expected):
    """Alone and many at once."""
    features = ppo.Features(space)
    expected = expected or gym.spaces.flatten(space, obs)
    vector = features.encode(obs)
    assert vector.dtype == np.float32 and features.shape == vector.shape
    np.testing.assert_array_equal(vector, expected)

    def repeated(part):
        if isinstance(part, dict):
            return {name: repeated(value) for name, value in part.items()}
        return tuple(map(repeated, part)) if isinstance(part, tuple) else np.stack([part] * 4)

    np.testing.assert_array_equal(features.encode(repeated(obs)), [expected] * 4)


def test_discrete_observations_are_encoded_as_gymnasium_does():
    space = Dict(a=Discrete(5, start=2), b=Tuple([MultiDiscrete([3, 4]), MultiBinary(3)]), c=Box(-1, 1, (2, 2)))
    space.seed(1)
    features = ppo.Features(space)
    assert features.shape == (gym.spaces.flatdim(space),)
    for _ in range(20):
        obs = space.sample()
        np.testing.assert_array_equal(features.encode(obs), gym.spaces.flatten(space, obs))


@pytest.mark.parametrize(
    "space", [gym.spaces.Sequence(Discrete(2)), gym.spaces.Text(3), Dict(action_mask=MultiBinary(2))], ids=str
)
def test_other_observations_are_refused(space):
    with pytest.raises(ppo.InputError, match="needs observations of numbers"):
        ppo.Features(space)


def test_images_are_flattened_with_a_remark(capsys):
    ppo.Features(IMAGE)
    assert "ppo_atari.py has a convolutional network" in capsys.readouterr().err


def test_product_of_masks_is_what_the_tests_say():
    """The table that these tests build is the outer product."""
    table = masked.given(MASKS, "table")
    expected = MASKS[0][:, None, None] & MASKS[1][:, None] & MASKS[2]
    np.testing.assert_array_equal(table, expected)
