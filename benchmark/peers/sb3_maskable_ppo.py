"""MaskablePPO of sb3-contrib on Jumanji/Cleaner-v0, for the speed comparison with ppo_multidiscrete.py.

    python benchmark/peers/sb3_maskable_ppo.py STEPS       # needs sb3-contrib and envpool, tyro and tqdm

Settings and environments are those of ppo_multidiscrete.py, so that both are given the same vectors and masks; this
repository must be on PYTHONPATH.
"""

import sys

import numpy as np
import torch
from gymnasium.spaces import Box, MultiDiscrete
from sb3_contrib import MaskablePPO
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv

import ppo_multidiscrete


class Cleaner(VecEnv):
    """The environments of ppo_multidiscrete.py, with the interface of Stable-Baselines3."""

    render_mode = None

    def __init__(self, args: ppo_multidiscrete.Args):
        self.envs = ppo_multidiscrete.make_envs(args)
        observation_space = Box(-np.inf, np.inf, self.envs.observation_space.shape, np.float32)
        super().__init__(args.num_envs, observation_space, MultiDiscrete(self.envs.action_space.sizes))

    def reset(self):
        return self.envs.reset(1)

    def step_async(self, actions):
        self.actions = actions

    def step_wait(self):
        obs, rewards, dones, ends = self.envs.step(self.actions)
        infos = [{} for _ in range(self.num_envs)]
        for end in ends:
            infos[end.env] = {"terminal_observation": end.last_obs, "TimeLimit.truncated": end.truncated}
            infos[end.env]["episode"] = {"r": end.episodic_return, "l": end.length}
        return obs, rewards, dones, infos

    def env_method(self, method_name, *args, indices=None, **kwargs):
        """All that is asked for are the masks, as one vector for each environment."""
        return list(self.envs.masks().reshape(self.num_envs, -1))

    def has_attr(self, attr_name):
        return attr_name == "action_masks"

    def get_attr(self, attr_name, indices=None):
        return [getattr(self, attr_name)] * self.num_envs

    def set_attr(self, attr_name, value, indices=None):
        """Nothing has to be set."""

    def env_is_wrapped(self, wrapper_class, indices=None):
        return [False] * self.num_envs

    def close(self):
        self.envs.close()


if __name__ == "__main__":
    torch.set_num_threads(1)  # faster than two
    model = MaskablePPO(
        "MlpPolicy", Cleaner(ppo_multidiscrete.Args()), n_steps=128, batch_size=512, n_epochs=4, gamma=0.99,
        gae_lambda=0.95, learning_rate=LinearSchedule(1e-3, 0, 1), clip_range=0.2, clip_range_vf=0.2, ent_coef=0.01,
        vf_coef=0.5, max_grad_norm=0.5, seed=1, device="cpu",
    )  # fmt: skip
    model.learn(int(sys.argv[1]))
    returns = [episode["r"] for episode in model.ep_info_buffer]
    print(f"mean return {np.mean(returns):.1f}")
