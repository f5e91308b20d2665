"""Small environments with masks of the valid actions, for the tests of ppo_multidiscrete.py."""

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete

FORMS = ("row", "rows", "table", "tuple")
SOURCES = ("observation", "info", "method")


def given(masks: list[np.ndarray], form: str):
    """The masks of all components in one of the forms that an environment may give them in."""
    if form == "tuple":
        return tuple(mask.astype(np.int8) for mask in masks)
    if form == "row":
        return np.concatenate(masks)
    if form == "rows":
        rows = np.ones((len(masks), max(map(len, masks))), np.int8)  # what is beyond a component's size is ignored
        for row, mask in zip(rows, masks):
            row[: len(mask)] = mask
        return rows
    table = np.ones((), bool)
    for mask in masks:
        table = table[..., None] & mask
    return table


class Valves(gym.Env):
    """Each component has a wanted value, which is shown, and a few valid ones.

    The reward is the number of components with the wanted value, and 0 with an invalid one. Episodes have eight steps.
    With two components and two valid values in each, a random choice of valid values gets 8 in an episode, the best 16.
    """

    invalid, steps = 0, 0  # of all environments together

    def __init__(self, sizes=(3, 2, 4), source="info", form="row", valid=2, empty=0.0, strict=False):
        self.sizes, self.source, self.form, self.number = sizes, source, form, valid
        self.empty, self.strict = empty, strict
        self.action_space, wanted = MultiDiscrete(sizes), MultiDiscrete(sizes)
        self.observation_space = wanted
        if source == "observation":
            mask = Box(0, 1, np.shape(given([np.ones(size, bool) for size in sizes], form)), np.int8)
            self.observation_space = Dict(wanted=wanted, action_mask=mask)

    def draw(self):
        """New wanted and valid values."""
        self.wanted = self.np_random.integers(self.sizes)
        self.masks = []
        for size, wanted in zip(self.sizes, self.wanted):
            mask = np.zeros(size, bool)
            mask[self.np_random.permutation(size)[: self.number - 1]] = mask[wanted] = True
            self.masks.append(mask & (self.np_random.random() >= self.empty))

    def show(self):
        """Observation and info."""
        mask = given(self.masks, self.form)
        if self.source == "observation":
            return {"wanted": self.wanted, "action_mask": np.asarray(mask, np.int8)}, {}
        return self.wanted, {"action_mask": mask} if self.source == "info" else {}

    def __getattr__(self, name):
        if name == "action_masks" and self.__dict__.get("source") == "method":
            return lambda: given(self.masks, self.form)
        raise AttributeError(name)

    def reset(self, *, seed=None, options=None):
        """Starts the next episode."""
        super().reset(seed=seed)
        self.length = 0
        self.draw()
        return self.show()

    def step(self, action):
        """Counts the wanted values."""
        assert self.action_space.contains(action), action
        allowed = all(mask[value] or not mask.any() for mask, value in zip(self.masks, action))
        Valves.steps += 1
        Valves.invalid += not allowed
        assert allowed or not self.strict, (self.masks, action)
        reward = float((action == self.wanted).sum()) if allowed else 0.0
        self.length += 1
        self.draw()
        return *self.show()[:1], reward, self.length == 8, False, self.show()[1]


class Stamps(gym.Env):
    """The one valid action follows from the episode and the step; at an episode's end the mask says something else."""

    def __init__(self, source="info"):
        self.source, self.action_space, self.episode = source, Discrete(60, start=3), -1
        self.observation_space = Box(0, 1000, (2,), np.float32)
        if source == "observation":
            self.observation_space = Dict(time=self.observation_space, action_mask=MultiBinary(60))

    def stamp(self):
        """The valid action, counted from 0."""
        return (7 * self.episode + self.length) % 60

    def show(self, end=False):
        """Observation and info."""
        self.mask = np.arange(60) == (self.stamp() + 30 * end) % 60
        obs = np.float32([self.episode, self.length])
        if self.source == "observation":
            return {"time": obs, "action_mask": self.mask.astype(np.int8)}, {}
        return obs, {} if end or self.source == "method" else {"action_mask": self.mask}

    def __getattr__(self, name):
        if name == "action_masks" and self.__dict__.get("source") == "method":
            return lambda: self.mask
        raise AttributeError(name)

    def reset(self, *, seed=None, options=None):
        """Starts the next episode."""
        super().reset(seed=seed)
        self.episode, self.length = self.episode + 1, 0
        return self.show()

    def step(self, action):
        """Must be the valid action; every third episode is cut off."""
        assert action - 3 == self.stamp(), (action, self.episode, self.length)
        self.length += 1
        end = self.length == 5
        obs, info = self.show(end)
        cut = self.episode % 3 == 2
        return obs, 1.0, end and not cut, end and cut, info


gym.register("masked/Valves-v0", Valves, disable_env_checker=True)
gym.register("masked/Stamps-v0", Stamps, disable_env_checker=True)
