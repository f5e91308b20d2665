"""The parts of ppo_rlvr.py compute what their definitions say, and what published code computes."""

import math
import random
import re
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ppo_rlvr as rlvr
from ppo_rlvr import EOS, Args

SMALL = Args(width=16, layers=2, heads=2, num_envs=8, num_steps=6, num_minibatches=2, num_test=20, pretrain_steps=0,
             group_size=4, total_timesteps=96, cache_dir="")  # fmt: skip


def lengths_mask(lengths, size):
    return torch.arange(size)[None] < torch.as_tensor(lengths)[:, None]


def data(seed=0, lengths=(6, 1, 3, 6, 2, 4, 5, 6), size=6):
    """A batch of random numbers for the loss, and what the agent says of it."""
    generator = torch.Generator().manual_seed(seed)
    noise = iter(torch.randn(7, len(lengths), size, generator=generator))
    mask = lengths_mask(lengths, size)
    old = next(noise) * 0.3 - 1
    log_probs, values = old + 0.3 * next(noise), next(noise)
    batch = rlvr.Batch(None, None, None, mask, old, old + 0.2 * next(noise), next(noise) * mask, next(noise),
                       values + 0.3 * next(noise))  # fmt: skip
    return log_probs, torch.rand(mask.shape, generator=generator), values, batch


def loss_of(args, **changes):
    log_probs, entropy, values, batch = data()
    return rlvr.ppo_loss(log_probs, entropy, values, batch._replace(**changes), args)


# ---- the model and the sampler


def a_policy(args=SMALL, seed=3, sharp=30.0):
    """A random policy; sharper than a new one, so that answers differ and end at different times."""
    torch.manual_seed(seed)
    policy = rlvr.Transformer(len(rlvr.CHARACTERS), args)
    policy.head.weight.data *= sharp
    return policy.eval()


PROMPTS = ["ab?", "c:hello?", "x", "12+3=", "a:aaaaaaaaaa?"]


@pytest.mark.parametrize("greedy", [True, False])
def test_llm_2_sampler_equals_a_forward_pass_without_cache_and_padding(greedy):
    """Each answer alone, its prompt not filled up, all tokens at once."""
    policy = a_policy()
    policy.head.weight.data[EOS] *= 2  # some end early
    prompts, mask = rlvr.encode(PROMPTS, 16, left=True)
    answers = rlvr.generate(policy, prompts, mask, SMALL, greedy, torch.Generator().manual_seed(1))
    assert 1 < len({tuple(row) for row in answers.tokens.tolist()})
    for i, prompt in enumerate(PROMPTS):
        alone, whole = rlvr.encode([prompt], 16, left=True)
        assert whole.all()
        tokens = answers.tokens[i][answers.mask[i]][None]
        logits = policy(torch.cat([alone, tokens], 1), torch.ones(1, len(prompt) + tokens.shape[1], dtype=torch.bool))
        logits = logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, tokens.T)[:, 0]
        torch.testing.assert_close(answers.log_probs[i][answers.mask[i]], expected, atol=1e-4, rtol=1e-4)
        if greedy:
            assert logits.argmax(-1).tolist() == tokens[0].tolist()


def test_llm_2_without_positions_from_the_mask_padding_changes_the_model():
    for mask_positions, same in ((True, True), (False, False)):
        args = replace(SMALL, mask_positions=mask_positions)
        policy = a_policy(args)
        padded, mask = rlvr.encode(["ab?", "a longer one"], 16, left=True)
        alone, whole = rlvr.encode(["ab?"], 16, left=True)
        close = torch.allclose(policy(padded, mask)[0, -1], policy(alone, whole)[0, -1], atol=1e-4)
        assert close == same


def test_llm_6_samples_follow_the_policy_at_its_temperature():
    args = replace(SMALL, num_steps=1, temperature=0.7)
    policy = a_policy(args)
    prompts, mask = rlvr.encode(["ab?"] * 20000, 16, left=True)
    answers = rlvr.generate(policy, prompts, mask, args, generator=torch.Generator().manual_seed(0))
    expected = (policy(prompts[:1], mask[:1])[0, -1] / 0.7).softmax(-1)
    counts = torch.bincount(answers.tokens[:, 0], minlength=len(expected)) / 20000
    assert (counts - expected).abs().max() < 4 * math.sqrt(0.25 / 20000)
    log_probs, _ = rlvr.score(policy, answers, 0.7)
    torch.testing.assert_close(log_probs, answers.log_probs, atol=1e-5, rtol=1e-5)  # scoring has it too
    torch.testing.assert_close(log_probs[:, 0].exp(), expected[answers.tokens[:, 0]], atol=1e-5, rtol=1e-5)


def test_entropy_is_that_of_the_policy():
    policy = a_policy()
    answers = rlvr.generate(policy, *rlvr.encode(PROMPTS, 16, left=True), SMALL)
    _, entropy = rlvr.score(policy, answers, 1.0)
    logits = rlvr.outputs_after(policy, answers.prompts, answers.prompt_mask, answers.tokens)[:, :-1]
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy())


TOKEN_ROWS = st.lists(st.lists(st.sampled_from([EOS, EOS + 1, 40]), min_size=5, max_size=5), min_size=1, max_size=4)


@given(TOKEN_ROWS)
def test_llm_4_mask_goes_up_to_the_first_eos(rows):
    expected = [[EOS not in row[:t] for t in range(5)] for row in rows]
    assert rlvr.up_to_end(torch.tensor(rows), torch.tensor([EOS])).tolist() == expected


def test_llm_4_the_end_is_learned():
    """The EOS has a gradient, and what stands after it has none, though it is the same token."""
    policy = a_policy()
    tokens = torch.tensor([[40, EOS, EOS, EOS]])
    prompts, prompt_mask = rlvr.encode(["ab?"], 16, left=True)
    answers = rlvr.Answers(prompts, prompt_mask, tokens, rlvr.up_to_end(tokens, torch.tensor([EOS])), None, None)
    log_probs, entropy = rlvr.score(policy, answers, 1.0)
    log_probs.retain_grad()
    zeros = torch.zeros(1, 4)
    batch = rlvr.Batch(prompts, prompt_mask, tokens, answers.mask, log_probs.detach(), log_probs.detach(),
                       torch.ones(1, 4), zeros, zeros)  # fmt: skip
    rlvr.ppo_loss(log_probs, entropy, zeros, batch, SMALL)[0].backward()
    assert (log_probs.grad[0] != 0).tolist() == [True, True, False, False]


@given(st.lists(st.text("abz09:? ", min_size=1, max_size=12), min_size=1, max_size=4), st.booleans())
def test_texts_survive_as_tokens(texts, left):
    tokens, mask = rlvr.encode(texts, 12, left)
    assert mask.sum(1).tolist() == [len(text) for text in texts] and tokens.shape[1] == max(map(len, texts))
    assert (tokens[~mask] == EOS).all()
    if left:
        assert mask[:, -1].all()
    else:
        assert rlvr.decode(tokens) == texts


# ---- rewards


def answers_of(texts, cut=()):
    tokens, _ = rlvr.encode(texts, 50, left=False)
    tokens = torch.nn.functional.pad(tokens, (0, 1), value=EOS)
    truncated = torch.tensor([i in cut for i in range(len(texts))])
    return rlvr.Answers(None, None, tokens, rlvr.up_to_end(tokens, torch.tensor([EOS])), None, truncated)


def test_llm_5_truncated_answers_are_not_judged():
    task, problem = rlvr.Count(), ("a", "abcda")
    answers = answers_of(["=2", "=2", "=1"], cut=[1])
    assert rlvr.judge(task, [problem] * 3, answers, SMALL)[0].tolist() == [1, 0, 0]
    assert rlvr.judge(task, [problem] * 3, answers, replace(SMALL, truncation_penalty=1.0))[0].tolist() == [1, -1, 0]


def test_llm_5_no_end_is_forced():
    policy = a_policy()
    policy.head.weight.data[EOS] = 0
    policy.norm.bias.data += 1
    policy.head.weight.data[40] = 9  # says the same for ever
    answers = rlvr.generate(policy, *rlvr.encode(["ab?", "x"], 16, left=True), SMALL)
    assert (answers.tokens == 40).all() and answers.tokens.shape == (2, 6)
    assert answers.truncated.all() and answers.mask.all()


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.floats(0, 2), st.integers(0, 9))
def test_llm_3_reward_at_the_last_real_token_and_llm_8_k1_at_each(lengths, kl_coef, seed):
    mask = lengths_mask(lengths, 6)
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(len(lengths), generator=generator)
    log_ratio = torch.randn(mask.shape, generator=generator)
    args = replace(SMALL, kl_coef=kl_coef)
    result = rlvr.token_rewards(rewards, mask, log_ratio, args)
    for i, length in enumerate(lengths):
        for t in range(6):
            expected = -kl_coef * log_ratio[i, t].item() if t < length else 0
            expected += rewards[i].item() if t == length - 1 else 0
            assert result[i, t].item() == pytest.approx(expected, abs=1e-5)
    in_loss = rlvr.token_rewards(rewards, mask, log_ratio, replace(args, kl_in="loss"))
    torch.testing.assert_close(in_loss.sum(1), rewards)


def test_llm_8_estimators_have_the_divergence_as_their_mean():
    """Over all tokens, weighted by the policy: k1 and k3 are unbiased, and k3 is never negative."""
    torch.manual_seed(0)
    new, reference = torch.randn(2, 50).log_softmax(-1)
    divergence = torch.distributions.kl_divergence(
        *(torch.distributions.Categorical(logits=x) for x in (new, reference))
    )
    probabilities, mask = new.exp(), torch.ones(50, 1, dtype=torch.bool)
    k1 = -rlvr.token_rewards(torch.zeros(50), mask, (new - reference)[:, None], replace(SMALL, kl_coef=1.0))[:, 0]
    torch.testing.assert_close((probabilities * k1).sum(), divergence)
    k3 = []
    for i in range(50):
        one = torch.ones(1, 1)
        batch = rlvr.Batch(
            None, None, None, one.bool(), new[i].view(1, 1), reference[i].view(1, 1), 0 * one, 0 * one, 0 * one
        )
        k3.append(rlvr.ppo_loss(new[i].view(1, 1), 0 * one, 0 * one, batch, SMALL)[1][3])
    assert min(k3) >= 0 and (torch.stack(k3) - k1).abs().max() > 0.1
    torch.testing.assert_close((probabilities * torch.stack(k3)).sum(), divergence)


def test_llm_8_places_of_the_penalty():
    free, charged = loss_of(SMALL), loss_of(replace(SMALL, kl_coef=0.3, kl_in="loss"))
    torch.testing.assert_close(charged[0], free[0] + 0.3 * free[1][3])
    assert loss_of(replace(SMALL, kl_coef=0.3))[0] == free[0]  # then it is in the rewards


@given(st.lists(st.integers(1, 6), min_size=2, max_size=5), st.integers(0, 99))
def test_llm_12_and_13_whitening(lengths, seed):
    mask = lengths_mask(lengths, 6)
    x = torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed)) * 3 + 2
    moved, kept = rlvr.whiten(x, mask), rlvr.whiten(x, mask, shift_mean=False)
    assert (moved[~mask] == 0).all() and (kept[~mask] == 0).all()
    real = x[mask].double()
    assert moved[mask].mean().item() == pytest.approx(0, abs=1e-4)
    assert kept[mask].mean().item() == pytest.approx(real.mean().item(), abs=1e-4)
    assert np.var(kept[mask].numpy()) == pytest.approx(1, abs=1e-3)


def test_llm_12_rewards_keep_their_mean():
    mask, rewards = lengths_mask([2, 5, 3, 6], 6), torch.tensor([1.0, 0.0, 0.0, 1.0])
    plain = rlvr.token_rewards(rewards, mask, torch.zeros(4, 6), SMALL)
    white = rlvr.token_rewards(rewards, mask, torch.zeros(4, 6), replace(SMALL, whiten_rewards=True))
    assert white[mask].mean().item() == pytest.approx(plain[mask].mean().item(), abs=1e-6)
    assert np.std(white[mask].numpy()) == pytest.approx(1, abs=1e-3)


# ---- advantages


@settings(deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_llm_1_gae_and_llm_11_no_value_after_the_end(lengths, gamma, gae_lambda, seed):
    """Against the sum of discounted TD errors, answer by answer, without anything after the last token."""
    mask = lengths_mask(lengths, 6)
    rewards, values = torch.randn(
        2, *mask.shape, generator=torch.Generator().manual_seed(seed)
    )  # also where no token is
    args = replace(SMALL, gamma=gamma, gae_lambda=gae_lambda, norm_adv=False)
    advantages, returns = rlvr.compute_advantages(rewards * mask, values, mask, args)
    for i, length in enumerate(lengths):
        v = [*values[i, :length].tolist(), 0.0]
        deltas = [rewards[i, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * gae_lambda) ** (k - t) * deltas[k] for k in range(t, length))
            assert advantages[i, t].item() == pytest.approx(expected, abs=1e-4)
            assert returns[i, t].item() == pytest.approx(expected + v[t], abs=1e-4)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_llm_1_without_discount_and_with_lambda_1_the_return_is_the_reward():
    mask = lengths_mask([2, 6, 4], 6)
    rewards = torch.zeros(3, 6)
    rewards[[0, 1, 2], [1, 5, 3]] = torch.tensor([1.0, 0.5, 0.0])
    values = torch.randn(3, 6)
    _, returns = rlvr.compute_advantages(rewards, values, mask, replace(SMALL, gae_lambda=1.0))
    torch.testing.assert_close(returns, rewards.sum(1, keepdim=True) * mask)
    discounted = rlvr.compute_advantages(rewards, values, mask, replace(SMALL, gae_lambda=1.0, gamma=0.5))[1]
    assert discounted[1, 0].item() == pytest.approx(0.5 * 0.5**5, abs=1e-6)  # [llm-1] a long answer would be worth less


TOTALS = st.lists(st.lists(st.floats(-5, 5, width=32), min_size=4, max_size=4), min_size=1, max_size=3)


@given(TOTALS)
def test_llm_17_group_baselines(groups):
    flat = torch.tensor(groups).flatten()
    results = {
        kind: rlvr.answer_advantages(flat, replace(SMALL, advantage=kind)).tolist()
        for kind in ("group", "loo", "batch")
    }
    results["mean"] = rlvr.answer_advantages(flat, replace(SMALL, advantage="group", group_std=False)).tolist()
    everything = [x for group in groups for x in group]
    for i, x in enumerate(everything):
        group = groups[i // 4]
        others = [y for j, y in enumerate(group) if j != i % 4]
        mean = sum(group) / 4
        deviation = math.sqrt(sum((y - mean) ** 2 for y in group) / 3)
        assert results["mean"][i] == pytest.approx(x - mean, abs=1e-4)
        assert results["group"][i] == pytest.approx((x - mean) / (deviation + 1e-4), abs=2e-2)
        assert results["loo"][i] == pytest.approx(x - sum(others) / 3, abs=1e-4)
        assert results["batch"][i] == pytest.approx(x - sum(everything) / len(everything), abs=1e-4)


def test_all_tokens_of_an_answer_share_its_advantage():
    mask = lengths_mask([2, 6, 4, 1], 6)
    rewards = rlvr.token_rewards(torch.tensor([1.0, 0.0, 0.0, 1.0]), mask, torch.zeros(4, 6), SMALL)
    for kind in ("group", "loo"):
        advantages, _ = rlvr.compute_advantages(rewards, torch.zeros(4, 6), mask, replace(SMALL, advantage=kind))
        for row, real in zip(advantages, mask):
            assert len(set(row[real].tolist())) == 1 and (row[~real] == 0).all()
        assert advantages[0, 0] > 0 > advantages[1, 0]


def test_llm_13_switch():
    mask = lengths_mask([2, 6, 4, 1], 6)
    rewards = rlvr.token_rewards(torch.tensor([1.0, 0.0, 0.0, 1.0]), mask, torch.zeros(4, 6), SMALL)
    for kind, whitened in (("gae", True), ("batch", True), ("group", False), ("loo", False)):
        args = replace(SMALL, advantage=kind)
        on = rlvr.compute_advantages(rewards, torch.zeros(4, 6), mask, args)[0]
        off = rlvr.compute_advantages(rewards, torch.zeros(4, 6), mask, replace(args, norm_adv=False))[0]
        torch.testing.assert_close(on, rlvr.whiten(off, mask) if whitened else off)


@given(st.lists(st.sampled_from(["x=1", "=1", "=2", "2=2", "=3"]), min_size=8, max_size=8), st.sets(st.integers(0, 7)))
def test_agreement_is_with_the_most_frequent_answer(texts, cut):
    rewards = rlvr.agreement(rlvr.Count(), answers_of(texts, cut), SMALL).tolist()
    for first in (0, 4):
        words = [None if i in cut else texts[i][-1] for i in range(first, first + 4)]
        voters = [word for word in words if word]
        best = max(map(voters.count, voters), default=0)
        chosen = {word for word, reward in zip(words, rewards[first : first + 4]) if reward}
        assert len(chosen) <= 1 and all(voters.count(word) == best for word in chosen)
        assert sum(rewards[first : first + 4]) == best


# ---- the loss


MEANS = {
    "token": lambda x, lengths, longest: sum(sum(r[:n]) for r, n in zip(x, lengths)) / sum(lengths),
    "sequence": lambda x, lengths, longest: sum(sum(r[:n]) / n for r, n in zip(x, lengths)) / len(lengths),
    "constant": lambda x, lengths, longest: sum(sum(r[:n]) for r, n in zip(x, lengths)) / len(lengths) / longest,
}


@pytest.mark.parametrize("kind", MEANS)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_llm_14_means(kind, lengths, seed):
    x = torch.randn(len(lengths), 6, generator=torch.Generator().manual_seed(seed))
    result = rlvr.masked_mean(x, lengths_mask(lengths, 6), replace(SMALL, loss_mean=kind, num_steps=9)).item()
    assert result == pytest.approx(MEANS[kind](x.tolist(), lengths, 9), abs=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind, theirs", [("sequence", "grpo"), ("token", "dapo"), ("constant", "dr_grpo")])
def test_losses_and_gradients_of_trl(load_fixture, kind, theirs, level):
    """[llm-8] k3, [llm-14] the mean, [llm-15] clip-higher and [llm-16] the ratio together, as TRL 1.16.0 has them."""
    recorded = load_fixture("trl_grpo")
    new, old, reference, advantages, mask = (
        torch.from_numpy(recorded[name]) for name in ("new", "old", "reference", "advantages", "mask")
    )
    new.requires_grad_()
    args = replace(SMALL, loss_mean=kind, ratio=level, clip_coef=0.2, clip_coef_high=0.28, kl_in="loss",
                   kl_coef=recorded["beta"].item(), num_steps=int(recorded["longest"]), vf_coef=0.0)  # fmt: skip
    zeros = torch.zeros_like(old)
    batch = rlvr.Batch(None, None, None, mask, old, reference, advantages[:, None] * mask, zeros, zeros)
    loss, _, _ = rlvr.ppo_loss(new, zeros, zeros, batch, args)
    loss.backward()
    assert loss.item() == pytest.approx(recorded[f"{theirs}_{level}_loss"].item(), abs=1e-5)
    np.testing.assert_allclose(new.grad, recorded[f"{theirs}_{level}_gradient"], atol=1e-5)


def test_whitening_of_trl(load_fixture):
    """TRL 1.12.0 divides by the sample's deviation, this script by the population's, as lm-human-preferences does."""
    recorded = load_fixture("trl_ppo")
    x, mask = torch.from_numpy(recorded["x"]), torch.from_numpy(recorded["mask"])
    count = mask.sum().item()
    ours = rlvr.whiten(x, mask).numpy() * math.sqrt((count - 1) / count)
    np.testing.assert_allclose(ours, recorded["whitened_True"] * mask.numpy(), atol=1e-5)
    mean = x[mask].mean().item()
    kept = (rlvr.whiten(x, mask, shift_mean=False).numpy() - mean) * math.sqrt((count - 1) / count) + mean
    np.testing.assert_allclose(kept * mask.numpy(), recorded["whitened_False"] * mask.numpy(), atol=1e-5)


def test_llm_15_clip_higher_widens_the_range_above_1_only():
    batch = data()[3]
    for log_ratio, advantage, changed in ((0.25, 1, True), (-0.25, -1, False), (0.1, 1, False), (0.25, -1, False)):
        old = torch.zeros_like(batch.log_probs)
        new = batch._replace(log_probs=old, advantages=torch.full_like(old, advantage))
        losses = [
            rlvr.ppo_loss(old + log_ratio, old, old, new, replace(SMALL, vf_coef=0.0, clip_coef_high=high))[0].item()
            for high in (None, 0.4)
        ]
        assert (losses[0] != losses[1]) == changed
        if changed:
            assert losses == pytest.approx([-1.2, -math.exp(0.25)], abs=1e-5)


def test_llm_16_ratio_of_the_answer():
    log_probs, entropy, values, batch = data()
    args = replace(SMALL, ratio="sequence", clip_policy=False, vf_coef=0.0, loss_mean="sequence")
    expected = 0
    for i, real in enumerate(batch.mask):
        difference = (log_probs - batch.log_probs)[i][real].double()
        expected -= difference.mean().exp() * batch.advantages[i][real].double().mean() / len(batch.mask)
    assert rlvr.ppo_loss(log_probs, entropy, values, batch, args)[0].item() == pytest.approx(expected.item(), abs=1e-5)


def test_padding_changes_nothing():
    """Neither loss nor gradients depend on what stands after an answer's end."""
    results = []
    for junk in (0.0, 5.0):
        log_probs, entropy, values, batch = data()
        other = junk * ~batch.mask
        inputs = [(x + other).requires_grad_() for x in (log_probs, entropy, values)]
        batch = batch._replace(advantages=batch.advantages + other, returns=batch.returns - other)
        loss, terms, log_ratio = rlvr.ppo_loss(*inputs, batch, replace(SMALL, ent_coef=0.1, kl_in="loss", kl_coef=0.1))
        loss.backward()
        assert all((x.grad[~batch.mask] == 0).all() for x in inputs)
        results.append([loss, terms, log_ratio, *(x.grad for x in inputs)])
    torch.testing.assert_close(*results)


SWITCHES = {  # flag: (another value, the terms of the loss that change)
    "clip_policy": (False, {0}), "clip_coef_high": (0.01, {0}), "ratio": ("sequence", {0}), "clip_vloss": (False, {1}),
    "clip_coef": (0.05, {0, 1}), "loss_mean": ("sequence", {0, 1, 2, 3}),
    "ent_coef": (0.5, set()), "vf_coef": (0.1, set()),
}  # fmt: skip


@pytest.mark.parametrize("flag", SWITCHES)
def test_switches_change_their_terms_alone(flag):
    value, changed = SWITCHES[flag]
    before, after = loss_of(SMALL), loss_of(replace(SMALL, **{flag: value}))
    assert {i for i in range(4) if before[1][i] != after[1][i]} == changed
    assert before[0] != after[0]
    assert torch.equal(before[2], after[2])


# ---- start and training


def test_llm_9_value_network_starts_as_the_policy_and_says_0():
    weights = a_policy().state_dict()
    for copied in (True, False):
        args = replace(SMALL, value_from_policy=copied)
        agent = rlvr.Agent(args)
        agent.start_from(weights, args)
        body = agent.critic.blocks[0].hidden.weight
        assert torch.equal(body, weights["blocks.0.hidden.weight"]) == copied
        assert not agent.critic.head.weight.any()
        assert all(torch.equal(value, weights[name]) for name, value in agent.policy.state_dict().items())
        assert not any(parameter.requires_grad for parameter in agent.reference.parameters())
    assert rlvr.Agent(replace(SMALL, advantage="loo")).critic is None


def trained(tmp_path, **changes):
    """The agent after a short training, and the metrics of its updates."""
    args = replace(SMALL, runs_dir=str(tmp_path), **changes)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        end = rlvr.Run.end_update
        patch.setattr(
            rlvr.Run, "end_update", lambda run, values, *rest: (found.append(values), end(run, values, *rest))
        )
        path = rlvr.train(args)["run_dir"]
    agent = rlvr.Agent(args)
    rlvr.restore(rlvr.Path(path), agent)
    return agent, found


@pytest.fixture
def half_right(monkeypatch):
    """A task in which a random model gets different rewards, and often the same in a group."""

    class Task(rlvr.Count):
        def reward(self, problem, text):
            return float(len(text) % 2)

    def start(task, excluded, args):
        weights = a_policy(args, sharp=10.0).state_dict()
        weights["norm.bias"] += 1
        weights["head.weight"][EOS] += 0.3  # every third token or so is an EOS
        return weights

    monkeypatch.setitem(rlvr.TASKS, "count", Task)
    monkeypatch.setattr(rlvr, "pretrain", start)


def test_llm_10_warmup_trains_the_value_network_alone(tmp_path, half_right):
    agent, _ = trained(tmp_path, value_warmup=2)
    start = rlvr.pretrain(None, None, SMALL)
    assert all(torch.equal(value, start[name]) for name, value in agent.policy.state_dict().items())
    assert agent.critic.head.weight.any()
    agent, _ = trained(tmp_path, value_warmup=1)
    assert not torch.equal(agent.policy.head.weight, start["head.weight"])
    # Adam starts anew then: a step is at most the learning rate, here half of the first, as in every young Adam.
    assert (agent.policy.head.weight - start["head.weight"]).abs().max() < 4 * SMALL.learning_rate / 2 * 1.01


def test_llm_7_first_ratio_is_1(tmp_path, half_right):
    """With log-probabilities of the learner exactly, with those of the sampler but for rounding."""
    once = {"num_minibatches": 1, "update_epochs": 1, "learning_rate": 0.0}
    _, (learner, *_) = trained(tmp_path, **once)
    _, (sampler, *_) = trained(tmp_path, **once, learner_log_probs=False)
    assert learner["losses/old_approx_kl"] == 0
    assert 0 < abs(sampler["losses/old_approx_kl"]) < 1e-4
    assert 0 < learner["losses/sampler_gap"] < 1e-4  # [llm-20]


def test_llm_18_flat_groups_are_left_out(tmp_path, half_right, monkeypatch):
    """What is learned from are the answers of groups with different rewards, and all their tokens."""
    seen, step, judge, judged = [], rlvr.gradient_step, rlvr.judge, []
    monkeypatch.setattr(
        rlvr, "gradient_step", lambda a, b, batch, *rest: (seen.append(batch), step(a, b, batch, *rest))[1]
    )
    monkeypatch.setattr(rlvr, "judge", lambda *args: (judged.append(judge(*args)), judged[-1])[1])
    monkeypatch.setattr(rlvr, "test", lambda *args: ({"eval/greedy_accuracy": 0.0}, ""))
    once = {"num_minibatches": 1, "update_epochs": 1, "advantage": "group", "group_size": 2, "num_envs": 16}
    for skip in (True, False):
        seen.clear(), judged.clear()
        trained(tmp_path, **once, total_timesteps=96, skip_flat_groups=skip)
        spread = judged[-1][0].view(-1, 2).std(1) > 0
        assert 0 < spread.sum() < 8
        assert seen[0].mask.any(1).sum().item() == (2 * spread.sum().item() if skip else 16)
        if skip:
            assert (seen[0].mask.any(1) == (seen[0].advantages != 0).any(1)).all()


def test_llm_19_epsilon(tmp_path, half_right):
    weights = [
        trained(tmp_path, **change)[0].policy.head.weight for change in ({}, {"adam_eps": 1.0}, {"adam_eps_hat": False})
    ]
    start = rlvr.pretrain(None, None, SMALL)["head.weight"]
    moved = [(weight - start).abs().max() for weight in weights]
    assert moved[1] < moved[0] / 50 and moved[0] != moved[2]


def test_llm_20_lengths_and_truncation_are_logged(tmp_path, half_right):
    _, rows = trained(tmp_path)
    for row in rows:
        assert 1 <= row["charts/episodic_length"] <= 6 and 0 <= row["charts/truncated"] <= 1
        assert row["charts/reward"] == row["charts/episodic_return"]


SMALL_TASKS = ["count", "max", "add"]  # those of the small transformer


@pytest.mark.parametrize("name", SMALL_TASKS)
def test_llm_21_no_test_problem_is_trained_on(name):
    task, tests = rlvr.make_task(replace(SMALL, env_id=name, num_test=300))
    prompts = {task.prompt(problem) for problem in tests}
    assert len(prompts) == 300
    problems = rlvr.draw_problems(task, random.Random(1), 2000, prompts)
    assert not prompts & {task.prompt(problem) for problem in problems}
    assert rlvr.make_task(replace(SMALL, env_id=name, num_test=300, seed=9))[1] == tests  # the same for all seeds


class Few:
    """Ten problems."""

    def problem(self, rng):
        return rng.randrange(10)

    def prompt(self, problem):
        return str(problem)

    def reward(self, problem, text):
        return text == str(problem)


def test_too_few_problems():
    with pytest.raises(rlvr.InputError, match="too few problems"):
        rlvr.draw_problems(Few(), random.Random(0), 11)
    with pytest.raises(rlvr.InputError, match="too few problems"):
        rlvr.draw_problems(Few(), random.Random(0), 5, {str(i) for i in range(10)})


@pytest.mark.parametrize("name", SMALL_TASKS)
def test_tasks_judge_right_answers(name):
    """Right answers are among the demonstrations, and wrong ones too."""
    task, rng = rlvr.TASKS[name](), random.Random(0)
    rewards = []
    for _ in range(500):
        problem = task.problem(rng)
        rewards.append(task.reward(problem, task.demonstration(problem, rng, 0.9)))
        assert len(task.prompt(problem)) <= Args().max_prompt
    assert 0.05 < np.mean(rewards) < 0.8 and set(rewards) == {0.0, 1.0}


# ---- search


def test_guided_search_follows_values_and_without_them_the_policy():
    args = replace(SMALL, samples=97, guidance=1e9)
    agent = rlvr.Agent(args)
    agent.start_from(a_policy().state_dict(), args)
    torch.manual_seed(0)
    torch.nn.init.normal_(agent.critic.head.weight)
    prompts = rlvr.encode(PROMPTS, 16, left=True)
    greedy = rlvr.generate(agent.policy, *prompts, args, greedy=True)
    assert torch.equal(rlvr.guided_answers(agent, *prompts, args).tokens, greedy.tokens)
    one = replace(args, samples=1, guidance=1e-3)  # only the most probable token to choose from
    assert torch.equal(rlvr.guided_answers(agent, *prompts, one).tokens, greedy.tokens)
    # Values alone: the first token is the one with the highest value, by brute force.
    free = rlvr.guided_answers(agent, *prompts, replace(args, guidance=1e-6)).tokens[:, 0]
    for i in range(len(PROMPTS)):
        prompt, mask = (tensor[i : i + 1] for tensor in prompts)
        values = [rlvr.outputs_after(agent.critic, prompt, mask, torch.tensor([[token]]))[0, -1, 0].item()
                  for token in range(len(rlvr.CHARACTERS))]  # fmt: skip
        values[EOS] = rlvr.outputs_after(agent.critic, prompt, mask, torch.zeros(1, 0).long())[0, -1, 0].item()
        assert free[i].item() == int(np.argmax(values))


def test_best_of_takes_the_highest_value_and_never_a_truncated_answer():
    args = replace(SMALL, search="best-of")
    agent = rlvr.Agent(args)
    agent.start_from(a_policy().state_dict(), args)
    torch.nn.init.normal_(agent.critic.head.weight)
    prompts = rlvr.encode(PROMPTS, 16, left=True)
    torch.manual_seed(1)
    tries = [rlvr.generate(agent.policy, *prompts, args) for _ in range(4)]
    chosen = rlvr.choose(agent, None, tries, args)
    for i, index in enumerate(chosen):
        values = [
            -math.inf if a.truncated[i] else rlvr.predict(agent.critic, a)[i, a.mask[i].sum() - 1].item() for a in tries
        ]
        assert values[index] == max(values)


def test_majority_takes_what_most_say():
    tries = [answers_of(texts, cut) for texts, cut in ((["=1", "=2"], [0]), (["=2", "=3"], []), (["x=2", "=3"], []))]
    tries = [a._replace(tokens=torch.nn.functional.pad(a.tokens, (0, 5 - a.tokens.shape[1]))) for a in tries]
    assert rlvr.choose(None, rlvr.Count(), tries, replace(SMALL, search="majority")) == [1, 1]


def test_every_detail_has_a_tag_at_its_place():
    source = rlvr.Path(rlvr.__file__).read_text()
    for number in [*range(1, 22), 31, 32]:
        lines = [line for line in source.splitlines() if f"[llm-{number}]" in line]
        assert any(line.strip().startswith("#") for line in lines), number
    assert "[llm-22]" not in source
    assert {field.name for field in fields(Args)} >= {"kl_coef", "loss_mean"}


def test_documented_details_flags_and_tests_exist():
    page, tests = (rlvr.Path(rlvr.__file__).parent / "docs/llm.md").read_text(), rlvr.Path(__file__).read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| llm-")]
    rows = [row for row in rows if not 21 < int(row[0][6:]) < 31]  # those are of ppo_rlhf.py
    assert [row[0] for row in rows] == [f"| llm-{number}" for number in [*range(1, 22), 31, 32]]
    tests += rlvr.Path(__file__).with_name("test_rlvr_model.py").read_text()
    names = {field.name for field in fields(Args)}
    for *_, flags, test in rows:
        for flag in re.findall(r"`--([\w-]+)`", flags):
            name = flag.replace("-", "_")
            assert name in names or name.removeprefix("no_") in names, flag
        assert f"def {re.search('`(.+)`', test).group(1)}(" in tests
