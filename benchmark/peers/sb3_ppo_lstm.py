"""RecurrentPPO of sb3-contrib on CartPole with hidden velocities, for the speed comparison with ppo_lstm.py.

    python benchmark/peers/sb3_ppo_lstm.py STEPS       # needs sb3-contrib, and this repository on PYTHONPATH

The settings are those of ppo_lstm.py: one LSTM of 128 cells for policy and value function, and normalization.
"""

import sys

import torch
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize

if __name__ == "__main__":
    torch.set_num_threads(1)  # faster than two
    model = RecurrentPPO(
        "MlpLstmPolicy", VecNormalize(make_vec_env("benchmark.tasks:MaskedCartPole-v1", n_envs=8, seed=1)),
        n_steps=128, batch_size=256, n_epochs=4, gamma=0.99, gae_lambda=0.95,
        learning_rate=LinearSchedule(2.5e-4, 0, 1), clip_range=0.1, clip_range_vf=0.1, ent_coef=0.01, vf_coef=0.5,
        max_grad_norm=0.5, seed=1, device="cpu",
        policy_kwargs={"lstm_hidden_size": 128, "shared_lstm": True, "enable_critic_lstm": False},
    )  # fmt: skip
    model.learn(int(sys.argv[1]))
