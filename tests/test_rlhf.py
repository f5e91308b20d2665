"""The parts of ppo_rlhf.py compute what their definitions say.

What it shares with ppo_rlvr.py is tested there, and is the same text: tests/test_same_lines.py.
"""

import math
import random
import re
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ppo_rlhf as rlhf
from ppo_rlhf import EOS, Args

SMALL = Args(width=16, layers=2, heads=2, num_envs=8, num_steps=10, num_minibatches=2, num_test=20, pretrain_steps=0,
             num_pairs=20, num_heldout_pairs=30, total_timesteps=160, cache_dir="")  # fmt: skip
PROMPTS = ["mira:", "tolu:", "kiki:", "a:", "beno:"]


class Short(rlhf.Greeting):
    """Greetings that fit into ten tokens."""

    def demonstration(self, problem, rng, progress):
        return f"hi {problem}" + "!" * rng.randrange(3)


def a_network(outputs=1, args=SMALL, seed=3, sharp=30.0):
    """A random network; sharper than a new one, so that answers and scores differ."""
    torch.manual_seed(seed)
    network = rlhf.Transformer(outputs, args)
    network.head.weight.data *= sharp
    return network.eval()


def a_policy(args=SMALL, seed=3):
    """A random policy whose answers end at different times, some of them never."""
    policy = a_network(len(rlhf.CHARACTERS), args, seed, 10.0)
    policy.norm.bias.data += 1
    policy.head.weight.data[EOS] += 0.15
    return policy


def some_answers(args=SMALL, number=40, seed=1):
    prompts = rlhf.encode((PROMPTS * number)[:number], args.max_prompt, left=True)
    answers = rlhf.generate(a_policy(args), *prompts, args, generator=torch.Generator().manual_seed(seed))
    assert 0 < answers.truncated.sum() < number and len(set(answers.mask.sum(1).tolist())) > 3
    return answers


# ---- comparisons and the reward model

FLOATS = st.floats(-20, 20)


@given(st.lists(st.tuples(FLOATS, st.booleans()), min_size=1, max_size=8))
def test_llm_23_bradley_terry_loss(pairs):
    """The mean of -log(probability of the label), with e^a / (e^a + e^b) as the probability that a wins."""
    expected = 0.0
    for margin, preferred in pairs:
        first, second = math.exp(margin / 2), math.exp(-margin / 2)
        expected -= math.log((first if preferred else second) / (first + second)) / len(pairs)
    margin = torch.tensor([margin for margin, _ in pairs], dtype=torch.float64)
    preferred = torch.tensor([float(preferred) for _, preferred in pairs], dtype=torch.float64)
    assert rlhf.bradley_terry_loss(margin, preferred).item() == pytest.approx(expected, abs=1e-6)


def test_llm_22_labels_follow_the_noise():
    """Each label is drawn with probability sigmoid(difference / noise); without noise it is the truth."""
    rng = random.Random(0)
    excluded = {prompt for _ in range(20000) if (prompt := f"{rlhf.Greeting().problem(rng)}:")[0] in "bdkl"}
    for noise in (0.0, 0.5, 3.0):
        args = replace(SMALL, label_noise=noise)
        torch.manual_seed(0)
        pairs = rlhf.compare(rlhf.Greeting(), a_policy(args), excluded, 1000, random.Random(1), args)
        truth, preferred = pairs.truth, pairs.preferred
        first, second = (rlhf.decode(answers.tokens) for answers in pairs[:2])
        names = [text.strip("\0")[:-1] for text in rlhf.decode(pairs.first.prompts.flip(1)) for text in [text[::-1]]]
        assert torch.equal(pairs.first.prompts, pairs.second.prompts) and not {name[0] for name in names} & set("bdkl")
        score = rlhf.Greeting().score
        assert truth.tolist() == [score(name, a) - score(name, b) for name, a, b in zip(names, first, second)]
        for difference in (-1.0, 0.0, 1.0):
            here = truth == difference
            expected = 1 / (1 + math.exp(-difference / noise)) if noise else (difference + 1) / 2
            assert here.sum() > 30
            assert abs(preferred[here].mean().item() - expected) < 4 * math.sqrt(0.25 / here.sum().item())


def test_llm_24_the_score_is_read_at_the_last_real_token():
    """As by a forward pass of each answer alone, without padding."""
    network, answers = a_network(), some_answers()
    scores = rlhf.judge(network, answers)
    for i, prompt in enumerate((PROMPTS * 8)[:40]):
        alone, _ = rlhf.encode([prompt], 8, left=True)
        tokens = torch.cat([alone, answers.tokens[i][answers.mask[i]][None]], 1)
        assert tokens[0, -1] == EOS or answers.truncated[i]
        expected = network(tokens, torch.ones_like(tokens, dtype=torch.bool))[0, -1, 0]
        torch.testing.assert_close(scores[i], expected, atol=1e-4, rtol=1e-4)


def test_llm_26_truncated_answers_get_a_score_of_their_own():
    network, answers = a_network(), some_answers()
    for given_score in (-1.0, 2.5):
        scores = rlhf.proxy_scores(network, answers, replace(SMALL, truncated_score=given_score))
        assert (scores[answers.truncated] == given_score).all()
        whole = ~answers.truncated
        assert torch.equal(scores[whole], rlhf.judge(network, answers)[whole])


@given(st.integers(0, 99), st.floats(0.1, 50), st.floats(-5, 5))
@settings(max_examples=10, deadline=None)
def test_llm_27_scaling_gives_mean_0_and_deviation_1(seed, sharp, offset):
    """On the answers it is done with; elsewhere it is the same linear function of the score before."""
    network, answers = a_network(seed=seed, sharp=sharp), some_answers()
    other = some_answers(seed=2)
    with torch.no_grad():
        head = network.head.weight[0]
        network.norm.bias += offset * head / head.square().sum()
        before, elsewhere = rlhf.judge(network, answers), rlhf.judge(network, other)
        rlhf.scale(network, before)
        after = rlhf.judge(network, answers)
        assert after.mean().item() == pytest.approx(0, abs=1e-3) and after.std().item() == pytest.approx(1, abs=1e-3)
        expected = (elsewhere - before.mean()) / before.std()
        torch.testing.assert_close(rlhf.judge(network, other), expected, atol=2e-3, rtol=1e-3)


def reward_model_of(args, task=Short):
    return rlhf.train_reward_model(task(), a_policy(args), set(), args)


def test_llm_27_switch_and_llm_25_the_reward_model_starts_from_the_policy():
    """With no training, weights are those of the start; scaled or not."""
    untrained = replace(SMALL, reward_epochs=0)
    policy = a_policy().state_dict()
    scaled, plain = (reward_model_of(replace(untrained, scale_reward=on)) for on in (True, False))
    fresh = reward_model_of(replace(untrained, reward_from_policy=False))
    name = "blocks.1.hidden.weight"
    assert torch.equal(scaled[name], policy[name]) and torch.equal(plain[name], policy[name])
    assert not torch.equal(fresh[name], policy[name])
    assert torch.equal(plain["norm.bias"], policy["norm.bias"])
    assert not torch.equal(scaled["norm.bias"], policy["norm.bias"])
    assert plain["head.weight"].std().item() == pytest.approx(1 / math.sqrt(17), rel=0.6)
    ratio = scaled["head.weight"] / plain["head.weight"]
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))


def test_scores_that_are_all_equal_cannot_be_scaled():
    for scores in (torch.ones(8), torch.full((8,), math.nan)):
        with pytest.raises(rlhf.InputError, match="the same score"):
            rlhf.scale(a_network(), scores)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30))
def test_calibration_error(pairs):
    expected = 0
    for place in range(10):
        inside = [(p, y) for p, y in pairs if min(int(np.float32(p) * np.float32(10)), 9) == place]
        if inside:
            predicted, observed = (sum(column) / len(inside) for column in zip(*inside))
            expected += abs(predicted - observed) * len(inside) / len(pairs)
    probability, preferred = (torch.tensor([float(x) for x in column]) for column in zip(*pairs))
    assert rlhf.calibration_error(probability, preferred) == pytest.approx(expected, abs=1e-5)


def test_agreement_leaves_ties_out():
    assert rlhf.agreement(torch.tensor([1.0, -2.0, 3.0, 1.0]), torch.tensor([0.5, 1.0, 1.0, 0.0])) == pytest.approx(
        2 / 3
    )


def test_facts_of_a_perfect_and_of_an_untrained_reward_model(monkeypatch):
    facts = dict(zip(rlhf.FACTS, reward_model_of(replace(SMALL, num_heldout_pairs=400))["facts"].tolist()))
    assert facts["heldout_loss"] > 0 and 0.5 < facts["label_accuracy"] < 1
    task, lengths = Short(), lambda network, answers: answers.mask.sum(1).float()
    monkeypatch.setattr(
        rlhf, "judge", lambda network, answers: lengths(network, answers) + 0 * network.head.weight.sum()
    )
    task.score = lambda problem, text: len(text)
    args = replace(SMALL, label_noise=0.0, num_heldout_pairs=400, scale_reward=False)
    facts = dict(zip(rlhf.FACTS, rlhf.train_reward_model(task, a_policy(), set(), args)["facts"].tolist()))
    assert (
        facts["true_accuracy"] > 0.9 and facts["label_accuracy"] == 1
    )  # an end counts as a token, but not as a letter


# ---- PPO


@given(st.floats(1e-4, 10), st.floats(0, 100), st.floats(0.5, 50), st.integers(1, 512), st.floats(600, 10000))
def test_llm_28_adaptive_coefficient(kl_coef, divergence, target, num_envs, horizon):
    """Ziegler et al. 2019, section 2.2: the relative error, clipped to 0.2, times n / horizon is what it grows by."""
    args = replace(SMALL, target_kl_reference=target, num_envs=num_envs, kl_horizon=horizon)
    error = np.clip((divergence - target) / target, -0.2, 0.2)
    expected = kl_coef * (1 + num_envs / horizon * error)
    assert rlhf.adapted_kl_coef(kl_coef, divergence, args) == pytest.approx(expected)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.floats(0, 2), st.integers(0, 9))
def test_llm_3_score_at_the_last_real_token_and_llm_8_k1_at_each(lengths, kl_coef, seed):
    mask = torch.arange(6)[None] < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(seed)
    scores, log_ratio = torch.randn(len(lengths), generator=generator), torch.randn(mask.shape, generator=generator)
    result = rlhf.token_rewards(scores, mask, log_ratio, replace(SMALL, kl_coef=kl_coef))
    for i, length in enumerate(lengths):
        for t in range(6):
            expected = -kl_coef * log_ratio[i, t].item() if t < length else 0
            expected += scores[i].item() if t == length - 1 else 0
            assert result[i, t].item() == pytest.approx(expected, abs=1e-5)


@settings(deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_llm_1_gae_and_llm_11_no_value_after_the_end(lengths, gamma, gae_lambda, seed):
    """Against the sum of discounted TD errors, answer by answer, without anything after the last token."""
    mask = torch.arange(6)[None] < torch.tensor(lengths)[:, None]
    rewards, values = torch.randn(2, *mask.shape, generator=torch.Generator().manual_seed(seed))
    args = replace(SMALL, gamma=gamma, gae_lambda=gae_lambda, norm_adv=False)
    advantages, returns = rlhf.compute_advantages(rewards * mask, values, mask, args)
    for i, length in enumerate(lengths):
        v = [*values[i, :length].tolist(), 0.0]
        deltas = [rewards[i, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * gae_lambda) ** (k - t) * deltas[k] for k in range(t, length))
            assert advantages[i, t].item() == pytest.approx(expected, abs=1e-4)
            assert returns[i, t].item() == pytest.approx(expected + v[t], abs=1e-4)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()
    if mask.sum() > 1:
        whitened = rlhf.compute_advantages(rewards * mask, values, mask, replace(args, norm_adv=True))[0]
        torch.testing.assert_close(whitened, rlhf.whiten(advantages, mask))  # [llm-13]


def test_llm_29_value_network_starts_as_the_reward_model():
    """Scale included: at an answer's last token the value is the score that the answer gets."""
    policy, reward_model = a_policy().state_dict(), reward_model_of(SMALL)
    agent = rlhf.Agent(SMALL)
    agent.start_from(policy, reward_model, SMALL)
    answers = some_answers()
    torch.testing.assert_close(rlhf.judge(agent.critic, answers), rlhf.judge(agent.reward_model, answers))
    assert all(torch.equal(value, policy[name]) for name, value in agent.policy.state_dict().items())
    assert all(torch.equal(value, policy[name]) for name, value in agent.reference.state_dict().items())
    assert agent.facts.tolist() == reward_model["facts"].tolist() and "facts" in reward_model
    frozen = [*agent.reference.parameters(), *agent.reward_model.parameters()]
    assert not any(parameter.requires_grad for parameter in frozen)
    other = rlhf.Agent(args := replace(SMALL, value_from_reward_model=False))
    other.start_from(policy, reward_model, args)
    assert not torch.equal(other.critic.head.weight, other.reward_model.head.weight)


def test_llm_30_divergence_of_best_of_n(monkeypatch, capsys):
    """The formula is the divergence of the best of N from one, when no two samples are equal: by simulation."""
    generator = np.random.default_rng(0)
    ranks = generator.random((200_000, 8)).max(1)  # uniform scores: the density of the best one is 8 * rank^7
    assert math.log(8) - 7 / 8 == pytest.approx(np.log(8 * ranks**7).mean(), abs=0.01)


def test_best_of_n_takes_the_highest_proxy(monkeypatch, capsys):
    tries, args = [], replace(SMALL, evaluate="run", best_of=4)
    sample = rlhf.sample_tests
    monkeypatch.setattr(rlhf, "restore", lambda path, agent: agent.load_state_dict(a_start(args).state_dict()))
    monkeypatch.setattr(
        rlhf, "sample_tests", lambda *given: (tries.append((given[0], sample(*given))), tries[-1][1])[1]
    )
    proxy, true = rlhf.evaluate(args)
    scores = torch.stack([scores for _, (_, scores, _) in tries])
    assert len(tries) == 4
    best = [max(range(4), key=lambda i: scores[i, 0, b].item()) for b in range(20)]
    assert proxy == pytest.approx(np.mean([scores[i, 0, b].item() for b, i in enumerate(best)]), abs=1e-5)
    assert true == pytest.approx(np.mean([scores[i, 1, b].item() for b, i in enumerate(best)]), abs=1e-5)
    assert f"divergence {math.log(4) - 3 / 4:.2f} of the supervised start, --best-of 4," in capsys.readouterr().out
    assert scores[:, 2].abs().max() == 0  # they come from the supervised start


def a_start(args):
    """An agent whose policy has moved away from its start."""
    agent = rlhf.Agent(args)
    agent.start_from(a_policy(args).state_dict(), reward_model_of(args), args)
    agent.policy.load_state_dict(a_policy(args, seed=4).state_dict())
    return agent


def test_divergence_in_a_test_is_that_of_the_policy():
    agent, args = a_start(SMALL), SMALL
    task, tests = rlhf.make_task(args)
    answers, scores, texts = rlhf.sample_tests(agent.policy, agent, task, tests, args, torch.Generator().manual_seed(1))
    for i in range(len(tests)):
        both = [
            rlhf.score(network, answers, 1.0)[0][i][answers.mask[i]].sum()
            for network in (agent.policy, agent.reference)
        ]
        torch.testing.assert_close(scores[2, i], both[0] - both[1], atol=1e-4, rtol=1e-4)
    assert scores[1].tolist() == [task.score(problem, text) for problem, text in zip(tests, texts)]


def test_the_true_score_of_greetings():
    score = rlhf.Greeting().score
    best = {"hi mira nice kind!!": 5, "nice! dear! mira": 5}
    others = {"hi mira": 1, "hi": 0, "hi mira!": 2, "hi mira!!!!!!!!!!!!": -7, "hi mira nice nice nice!!": 4, "": 0,
              "hi tolu nice kind!!": 3, "hi mira rude": 0, "hi mira nicenice kind!!": 3}  # fmt: skip
    for text, expected in (best | others).items():
        assert score("mira", text) == expected, text
    task, rng = rlhf.Greeting(), random.Random(0)
    scores = []
    for _ in range(2000):
        problem = task.problem(rng)
        text = task.demonstration(problem, rng, 0.5)
        assert len(task.prompt(problem)) <= Args().max_prompt and len(text) < Args().num_steps
        scores.append(task.score(problem, text))
    assert np.mean(scores) < 2 and max(scores) == 5  # demonstrations are mediocre, but show what is best


# ---- tags and documentation


def test_every_detail_has_a_tag_at_its_place():
    source = rlhf.Path(rlhf.__file__).read_text()
    for number in range(22, 31):
        lines = [line for line in source.splitlines() if f"[llm-{number}]" in line]
        assert any(line.strip().startswith("#") for line in lines), number
    assert "[llm-31]" not in source


def test_documented_details_flags_and_tests_exist():
    page, tests = (rlhf.Path(rlhf.__file__).parent / "docs/llm.md").read_text(), rlhf.Path(__file__).read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| llm-")]
    rows = [row for row in rows if 21 < int(re.search(r"\d+", row[0]).group()) < 31]
    assert [row[0] for row in rows] == [f"| llm-{number}" for number in range(22, 31)]
    names = {field.name for field in fields(Args)}
    for *_, flags, test in rows:
        for flag in re.findall(r"`--([\w-]+)`", flags):
            name = flag.replace("-", "_")
            assert name in names or name.removeprefix("no_") in names, flag
        assert f"def {re.search('`(.+)`', test).group(1)}(" in tests
