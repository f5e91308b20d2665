"""Tasks that need memory, registered for scripts that have none, so that they can be compared with ppo_lstm.py.

    python ppo.py --env-id benchmark.tasks:MaskedCartPole-v1
    python ppo_continuous.py --env-id benchmark.tasks:MaskedPendulum-v1
    python ppo.py --env-id benchmark.tasks:MaskedAcrobot-v1
    python ppo.py --env-id benchmark.tasks:MemoryS7-v0

Masked tasks show the velocities as 0, which is what ppo_lstm.py's --hide does with the components that it names.
LunarLander is EnvPool's, and so are MiniGrid's rooms, in which the agent must remember an object that it has seen at
the start.
"""

import gymnasium as gym
import numpy as np

VELOCITIES = {  # components of the observations
    "CartPole-v1": [1, 3],
    "Acrobot-v1": [4, 5],
    "LunarLander-v3": [2, 3, 5],
    "Pendulum-v1": [2],
    "InvertedDoublePendulum-v4": [5, 6, 7],
    "HalfCheetah-v4": range(8, 17),
    "Hopper-v4": range(5, 11),
    "Walker2d-v4": range(8, 17),
}


class Single(gym.Env):
    """One of EnvPool's environments; of MiniGrid's observations the images [7, 7, 3] of what lies ahead."""

    def __init__(self, env_id: str):
        import envpool

        self.make = lambda seed: envpool.make_gymnasium(env_id, num_envs=1, seed=seed)
        self.pool = self.make(0)
        space, self.action_space = self.pool.observation_space, self.pool.action_space
        self.observation_space = space["image"] if isinstance(space, gym.spaces.Dict) else space

    def visible(self, obs: np.ndarray | dict) -> np.ndarray:
        """What the agent sees of the pool's observations."""
        return (obs["image"] if isinstance(obs, dict) else obs)[0]

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """A new episode."""
        super().reset(seed=seed)
        self.pool = self.make(seed % 2**31) if seed is not None else self.pool
        return self.visible(self.pool.reset()[0]), {}

    def step(self, action):
        """One step; EnvPool cuts episodes off by itself."""
        obs, reward, terminated, truncated, _ = self.pool.step(np.array([action]))
        return self.visible(obs), float(reward[0]), bool(terminated[0]), bool(truncated[0]), {}


class Masked(gym.ObservationWrapper):
    """A task whose velocities are hidden: where things go can only be known by comparing with what was seen before."""

    def __init__(self, env_id: str):
        super().__init__(Single(env_id) if env_id.startswith("LunarLander") else gym.make(env_id))
        self.hidden = list(VELOCITIES[env_id])

    def observation(self, observation: np.ndarray) -> np.ndarray:
        """The observation with 0 in place of the velocities."""
        observation = observation.copy()
        observation[self.hidden] = 0
        return observation


for env_id in VELOCITIES:
    gym.register(f"Masked{env_id}", Masked, kwargs={"env_id": env_id}, disable_env_checker=True)
for size in (7, 9, 11, 13):
    gym.register(f"MemoryS{size}-v0", Single, kwargs={"env_id": f"MiniGrid-MemoryS{size}-v0"}, disable_env_checker=True)
