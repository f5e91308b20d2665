"""Stable-Baselines3's PPO on Breakout with the settings of ppo_atari.py, for the speed comparison.

    python benchmark/peers/sb3_ppo_atari.py STEPS
"""

import sys

import ale_py
import gymnasium as gym
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import SubprocVecEnv, VecFrameStack

if __name__ == "__main__":
    gym.register_envs(ale_py)
    envs = make_atari_env("BreakoutNoFrameskip-v4", n_envs=8, seed=1, vec_env_cls=SubprocVecEnv)
    model = PPO(
        "CnnPolicy", VecFrameStack(envs, 4), n_steps=128, batch_size=256, n_epochs=4, gamma=0.99, gae_lambda=0.95,
        learning_rate=LinearSchedule(2.5e-4, 0, 1), clip_range=0.1, clip_range_vf=0.1, ent_coef=0.01, vf_coef=0.5,
        max_grad_norm=0.5, seed=1, device="cpu",
    )  # fmt: skip
    model.learn(int(sys.argv[1]))
