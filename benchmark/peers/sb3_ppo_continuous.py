"""PPO of Stable-Baselines3 or SBX with the settings of ppo_continuous.py, for the speed comparison.

    python benchmark/peers/sb3_ppo_continuous.py sb3 STEPS       # needs stable-baselines3 and gymnasium[mujoco]
    python benchmark/peers/sb3_ppo_continuous.py sbx STEPS       # needs sbx-rl too
"""

import sys

import torch
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

if __name__ == "__main__":
    library, steps = sys.argv[1], int(sys.argv[2])
    if library == "sb3":
        from stable_baselines3 import PPO

        torch.set_num_threads(1)  # faster than two
        options = {"device": "cpu", "clip_range_vf": 0.2}
    else:
        from sbx import PPO

        options = {}  # has no value clipping
    model = PPO(
        "MlpPolicy",
        VecNormalize(make_vec_env("HalfCheetah-v4", n_envs=1, seed=1)),
        n_steps=2048,
        batch_size=64,
        n_epochs=10,
        learning_rate=lambda remaining: 3e-4 * remaining,
        gamma=0.99,
        gae_lambda=0.95,
        clip_range=0.2,
        ent_coef=0.0,
        vf_coef=0.5,
        max_grad_norm=0.5,
        seed=1,
        **options,
    )
    model.learn(steps)
