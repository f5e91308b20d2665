"""Slow tests: the script learns, and its compiled form computes the same."""

import numpy as np
import pytest
import torch

import ppo

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_solves_cartpole_within_100k_steps(tmp_path, seed):
    """Mean return of the last 100 episodes of 475 or more, the definition of solved, at 100,000 steps or before.

    Hyper-parameters for a short run: a constant, larger learning rate; lambda and epochs as in common tuned settings.
    """
    args = ppo.Args(seed=seed, total_timesteps=100_000, learning_rate=1e-3, num_envs=8, num_steps=64, gamma=0.98,
                    gae_lambda=0.9, ent_coef=0.0, update_epochs=10, runs_dir=str(tmp_path))  # fmt: skip
    best = 0.0
    end_update = ppo.Run.end_update

    def spy(run, rollout, values):
        nonlocal best
        end_update(run, rollout, values)
        if len(run.returns) == 100:
            best = max(best, float(np.mean(run.returns)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo.Run, "end_update", spy)
        ppo.train(args)
    assert best >= 475


def test_compiled_training_is_the_same_training(tmp_path):
    """Three updates with --compile end at the parameters of eager mode, but for rounding: sums in another order."""
    states = []
    for compiled in (False, True):
        args = ppo.Args(total_timesteps=3 * 512, compile=compiled, anneal_clip=True, runs_dir=str(tmp_path))
        result = ppo.train(args)
        states.append(torch.load(result["run_dir"] + "/checkpoint.pt", weights_only=True))
    for eager, compiled in zip(states[0]["agent"].values(), states[1]["agent"].values()):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-4)
    # The bound means something: the parameters moved 50 times as far.
    assert (states[0]["moment1"] - states[1]["moment1"]).norm() < 1e-2 * states[0]["moment1"].norm()
    torch.manual_seed(1)
    start = ppo.Agent(ppo.Box(-1, 1, (4,)), ppo.Discrete(2), ppo.Args())
    moved = [(a - b).abs().max() for a, b in zip(states[0]["agent"].values(), start.state_dict().values())]
    assert max(moved) > 5e-3
