"""ppo_multidiscrete.py agrees with numbers recorded from the official MultiCategoricalPd (openai/baselines ppo2)."""

import numpy as np
import pytest
import torch
from gymnasium.spaces import Discrete, MultiDiscrete

import ppo_multidiscrete as ppo


class Case:
    """A recorded case: its arrays, and the policy's form of its actions."""

    def __init__(self, load_fixture, number: int):
        data = load_fixture("multidiscrete")
        self.data = {key.split("/")[1]: data[key] for key in data.files if key.startswith(f"case{number}/")}
        self.sizes = self.data["nvec"].tolist()
        self.choices = ppo.Choices(MultiDiscrete(self.sizes), None, ppo.Args())
        self.logits = torch.tensor(self.data["logits"], requires_grad=True)
        self.actions = torch.from_numpy(self.data["actions"]).long()

    def log_probabilities(self):
        """What the script says of the recorded logits and actions."""
        layout = self.choices.layout
        layout = layout if layout is None else torch.from_numpy(layout)
        masks = torch.tensor(self.choices.masks([None] * len(self.actions)))
        logits = ppo.arrange(self.logits, layout, self.choices.exist.shape)
        return ppo.log_probabilities(logits, self.actions, masks)


@pytest.fixture(params=[0, 1])
def case(load_fixture, request):
    assert int(load_fixture("multidiscrete")["n_cases"]) == 2
    return Case(load_fixture, request.param)


def test_multidiscrete_1_log_probabilities_and_entropies_are_summed(case):
    log_probs, entropy = case.log_probabilities()
    torch.testing.assert_close(-log_probs.detach(), torch.from_numpy(case.data["neglogp"]), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(entropy.detach(), torch.from_numpy(case.data["entropy"]), rtol=2e-6, atol=2e-6)


def test_components(case):
    """Each component alone, by the same functions."""
    parts = case.logits.detach().split(case.sizes, -1)
    for k, (size, logits) in enumerate(zip(case.sizes, parts)):
        masks = torch.tensor(ppo.Choices(Discrete(size), None, ppo.Args()).masks([None] * len(logits)))
        log_probs, _ = ppo.log_probabilities(logits.unsqueeze(-2), case.actions[:, k : k + 1], masks)
        official = torch.from_numpy(case.data["neglogp_components"][:, k])
        torch.testing.assert_close(-log_probs, official, rtol=2e-6, atol=2e-6)


def test_gradient(case):
    log_probs, entropy = case.log_probabilities()
    (gradient,) = torch.autograd.grad(-log_probs.mean() - 0.01 * entropy.mean(), case.logits)
    np.testing.assert_allclose(gradient.numpy(), case.data["grad_logits"], rtol=0, atol=1e-8)


def test_the_most_probable_action(case):
    layout, shape = case.choices.layout, case.choices.exist.shape
    logits = ppo.arrange(case.data["logits"], layout, shape)
    masks = case.choices.masks([None] * len(logits))
    np.testing.assert_array_equal(np.where(masks, logits, ppo.INVALID).argmax(-1), case.data["mode"])
