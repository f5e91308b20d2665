"""Stable-Baselines3's PPO with the settings of ppo.py, for the speed comparison; needs stable-baselines3 alone.

    python benchmark/peers/sb3_ppo.py STEPS
"""

import sys

from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

if __name__ == "__main__":
    model = PPO(
        "MlpPolicy",
        make_vec_env("CartPole-v1", n_envs=4, seed=1),
        n_steps=128,
        batch_size=128,
        n_epochs=4,
        learning_rate=lambda remaining: 2.5e-4 * remaining,
        gamma=0.99,
        gae_lambda=0.95,
        clip_range=0.2,
        clip_range_vf=0.2,
        ent_coef=0.01,
        vf_coef=0.5,
        max_grad_norm=0.5,
        device="cpu",
        seed=1,
    )
    model.learn(int(sys.argv[1]))
