"""Steps the environments of ppo.py with random actions and nothing else: the bound of what training can reach.

    python -m benchmark.env_only --steps 100000 --num-envs 4
"""

from dataclasses import dataclass

import numpy as np
import tyro

import ppo


@dataclass
class Args:
    """Random steps in CartPole-v1."""

    steps: int
    """steps of all environments together"""
    num_envs: int = 4
    """environments stepped together"""


if __name__ == "__main__":
    args = tyro.cli(Args)
    envs = ppo.make_envs(ppo.Args(num_envs=args.num_envs))
    envs.reset(seed=1)
    actions = np.random.default_rng(1).integers(2, size=(args.steps // args.num_envs, args.num_envs))
    for row in actions:
        envs.step(row)
