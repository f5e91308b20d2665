"""The article's task for masks: a worker of a strategy game is told where to harvest and where to bring it.

    pip install jpype1 dacite && pip install --no-deps gym-microrts==0.2.0      # needs Java
    python ppo_multidiscrete.py --env-backend gymnasium --env-id microrts_mining:MicroRTSMining-v0 --num-envs 4

(with docs/examples as the current directory, or on PYTHONPATH). An action has eight components: one of the 100 cells,
what its unit shall do, six parameters of that, and which cell to attack. The mask says which cells have a unit of ours
that is idle, and which an enemy's; all that the unit could do is left open, so that many actions still do nothing.

The package was made for gym and for an old NumPy. It needs little of them, and that is put into place here.
"""

import importlib
import sys
import types

import gymnasium
import numpy as np
from gymnasium.spaces import Box

gym = types.ModuleType("gym")
gym.Env, gym.error, gym.spaces, gym.utils = gymnasium.Env, gymnasium.error, gymnasium.spaces, gymnasium.utils
gym.envs = types.ModuleType("gym.envs")
gym.envs.registry = types.SimpleNamespace(env_specs={"Microrts-v0"})  # then it registers nothing with gym
gym.envs.registration = importlib.import_module("gymnasium.envs.registration")
names = {"gym": gym, "gym.envs": gym.envs, "gym.envs.registration": gym.envs.registration, "gym.utils": gym.utils}
sys.modules |= names | {"gym.utils.seeding": gymnasium.utils.seeding}
np.int = int

from gym_microrts import microrts_ai  # noqa: E402
from gym_microrts.envs import GlobalAgentCombinedRewardEnv  # noqa: E402


class Mining(gymnasium.Env):
    """A reward of 1 for each resource that a worker picks up, and for each that it brings home."""

    def __init__(self):
        self.game = GlobalAgentCombinedRewardEnv(
            frame_skip=9, ai2=microrts_ai.passiveAI, map_path="maps/10x10/basesWorkers10x10.xml",
            reward_weight=np.array([0.0, 1, 0, 0, 0, 0, 0]),
        )  # fmt: skip
        self.action_space = self.game.action_space
        self.observation_space = Box(0, 1, (self.game.observation_space.shape[-1] * 100,), np.float32)

    def reset(self, seed=None, options=None):
        """Nothing here is random but the policy."""
        super().reset(seed=seed)
        obs = self.game.reset()
        return obs.ravel().astype(np.float32), {"action_mask": self.game.action_mask.astype(bool)}

    def step(self, action):
        """The game plays 10 of its frames."""
        obs, reward, done, _ = self.game.step(action)
        mask = self.game.action_mask.astype(bool)
        return obs.ravel().astype(np.float32), float(reward), bool(done), False, {"action_mask": mask}

    def close(self):
        """The game's own close() would stop Java for all environments, and for good."""
        self.game.client.close()


gymnasium.register("MicroRTSMining-v0", Mining, max_episode_steps=200)
