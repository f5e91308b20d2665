# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "ale-py==0.12.1",
#     "envpool==1.2.5; sys_platform == 'linux'",
#     "gymnasium[classic-control]==1.4.0",
#     "moviepy==2.2.1",
#     "mujoco==4.0.0",
#     "numpy==2.4.6",
#     "opencv-python-headless==5.0.0.93",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
#     "wandb==0.31.0",
# ]
# ///
"""Proximal Policy Optimization (PPO) with a recurrent network (LSTM) for tasks that need memory, in one file.

Contains the 5 LSTM details and the 13 core details of "The 37 Implementation Details of PPO" (Huang et al., ICLR Blog
Track 2022) as the official code (openai/baselines ppo2, commit ea25b9e) has them, and those for Atari and continuous
actions where a task is of that kind. A tag such as [lstm-3] or [core-7] stands where that detail happens; [aux-N] are
auxiliary details, [extra-N] behaviours of the official code that the article does not mention. docs/details.md lists
them all. The algorithm is by Schulman et al. 2017, arXiv:1707.06347.

    python ppo_lstm.py --bootstrap-truncated    CartPole-v1 with its velocities hidden; its time limit is no end
    python ppo_lstm.py --env-id Pong            a game, one frame at a time
    python ppo_lstm.py --env-id Pendulum-v1     continuous actions

train() is the algorithm; what it calls stands above it, and what has nothing to do with learning below.
"""

import contextlib
import ctypes
import difflib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import time
import warnings
from collections import deque
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.spaces import Box, Dict, Discrete, flatten_space
from tqdm import tqdm

SCRIPT = Path(__file__).stem
# Which entries of an observation are velocities, for --mask-velocity.
VELOCITIES = {
    "CartPole": [1, 3], "Acrobot": [4, 5], "MountainCar": [1], "MountainCarContinuous": [1], "Pendulum": [2],
    "LunarLander": [2, 3, 5], "LunarLanderContinuous": [2, 3, 5], "InvertedPendulum": [2, 3],
    "InvertedDoublePendulum": [5, 6, 7],
    "Hopper": range(-6, 0), "HalfCheetah": range(-9, 0), "Walker2d": range(-9, 0), "Swimmer": range(-5, 0),
}  # fmt: skip

gym.register_envs(ale_py)


@dataclass
class Args:
    """PPO with the 13 core details and the 5 for LSTMs, and those for Atari and continuous actions."""

    # The run
    exp_name: str = SCRIPT  # name of the experiment, part of the run directory's name
    seed: int = 1  # seeds the network, the action noise and the shuffles; environment i gets seed + i [extra-35]
    torch_deterministic: bool = True  # use cuDNN's deterministic algorithms
    cuda: bool = True  # use the GPU if there is one; without images the CPU may be faster
    compile: bool = False  # compile the gradient step but for the LSTM: hardly faster on a CPU
    amp: bool = False  # encode images in bfloat16: faster on processors that have it
    track: bool = False  # send the metrics to Weights & Biases as well (WANDB_MODE=offline needs no account)
    wandb_project_name: str = "ppo37"  # project at Weights & Biases
    wandb_entity: str | None = None  # user or team at Weights & Biases
    capture_video: bool = False  # record episodes of the first environment in the run directory's videos/
    runs_dir: str = "runs"  # where run directories are created
    checkpoint_interval: int = 50  # updates between two checkpoints; a killed run loses at most this much
    resume: str | None = None  # go on with the run in this directory, with its settings (flags given beside it win)
    evaluate: str | None = None  # play episodes with the agent in this run directory instead of training
    eval_episodes: int = 10  # episodes to play with --evaluate
    eval_deterministic: bool = False  # with --evaluate, take the most probable action instead of sampling one

    # The environment
    env_id: str = "CartPole-v1"  # a registered environment, module:EnvId, or an Atari game in any spelling (Pong)
    env_kwargs: str = "{}"  # arguments for the environment's constructor, as a JSON object
    env_backend: str = "auto"  # gymnasium; envpool: several cores, Linux only; auto: envpool for Atari games alone
    async_envs: bool = False  # with gymnasium, a process for each environment
    mask_velocity: bool = True  # hide velocities in the tasks that VELOCITIES lists: they then need memory

    # Atari games
    noop_max: int = 30  # no-ops at the start of a game, 1 to this many [atari-1]
    frame_skip: int = 4  # frames that an action is repeated for [atari-2]
    episodic_life: bool = True  # a lost life ends the episode, though not the game [atari-3]
    fire_reset: bool = True  # press FIRE at the start of an episode in games that have it [atari-4]
    area_resize: bool = True  # shrink images by averaging areas; off: by bilinear interpolation [atari-5] [extra-25]
    scale_images: bool = True  # divide pixels by 255 [atari-9]
    max_game_frames: int = 400_000  # a game is cut off after this many frames [extra-28]

    # The algorithm
    total_timesteps: int = 500_000  # steps of all environments together, floored to whole rollouts [extra-11]
    learning_rate: float = 2.5e-4  # learning rate of Adam, at the start
    num_envs: int = 8  # environments stepped together [core-1]
    num_steps: int = 128  # steps of each environment in one rollout [core-1]
    anneal_lr: bool = True  # lower the learning rate linearly to 0 [core-4]
    gamma: float = 0.99  # discount factor, 0 to 1
    gae: bool = True  # generalized advantage estimation; off: n-step returns to the rollout's end (lambda 1) [core-5]
    gae_lambda: float = 0.95  # from 0 (one-step TD error) to 1 (Monte Carlo) [core-5]
    bootstrap_truncated: bool = False  # a time limit is no end: add gamma * V(last observation) there [extra-14]
    num_minibatches: int = 4  # parts that a rollout is cut into, equal numbers of environments [core-6] [lstm-4]
    minibatch_replacement: bool = False  # draw minibatches with replacement, a common mistake [core-6]
    update_epochs: int = 4  # passes over the rollout in one update [core-6]
    norm_adv: bool = True  # normalize the advantages, for each minibatch [core-7]
    norm_adv_per_batch: bool = False  # normalize them once for the whole rollout instead [core-7]
    population_std: bool = True  # by the population's standard deviation; off: the sample's, as in PyTorch [extra-3]
    clip_policy: bool = True  # clip the surrogate objective [core-8]
    clip_coef: float = 0.1  # clip range of the probability ratio and of the value loss [core-8] [core-9]
    anneal_clip: bool = False  # lower the clip range linearly to 0, like the learning rate [aux-1]
    clip_vloss: bool = True  # clip the value loss [core-9]
    ent_coef: float = 0.01  # weight of the entropy bonus [core-10]
    vf_coef: float = 0.5  # weight of the value loss [core-10]
    max_grad_norm: float = 0.5  # limit of the gradient's global norm; inf: no limit [core-11]
    target_kl: float | None = None  # stop the update after an epoch with a mean KL divergence above this [aux-3]
    adam_eps: float = 1e-5  # epsilon of Adam [core-3]
    adam_eps_hat: bool = True  # add epsilon where TensorFlow 1 does; off: where PyTorch does [extra-1]
    orthogonal_init: bool = True  # orthogonal initialization, biases 0; off: PyTorch's default [core-2]
    clip_action: bool = True  # clip actions to their bounds before the environment gets them [continuous-5]
    norm_obs: bool = True  # normalize observations that are vectors by running mean and std [continuous-6]
    clip_obs: bool = True  # clip normalized observations to [-10, 10] [continuous-7]
    norm_reward: bool = True  # scale rewards by the std of the return, but not in games [continuous-8]
    clip_reward: bool = True  # to its sign in games [atari-6], to [-10, 10] if it is scaled [continuous-9]

    # The memory
    lstm_size: int = 128  # cells of the LSTM
    encoder: bool = True  # two layers in front of the LSTM if observations are vectors; off: none [extra-22]
    lstm_orthogonal_init: bool = True  # orthogonal initialization of the LSTM; off: PyTorch's default [lstm-1]
    reset_lstm_state: bool = True  # forget everything when an episode ends [lstm-3]
    shuffle_lstm_steps: bool = False  # fill minibatches with single steps in random order, a mistake [lstm-4]
    reconstruct_lstm_state: bool = True  # train from the state that the rollout began with; off: from 0 [lstm-5]

    @property
    def batch_size(self) -> int:
        """Samples in one rollout."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """[extra-11] Only whole rollouts count: 500,000 steps are 488 updates, 499,712 steps."""
        return self.total_timesteps // self.batch_size


class SameStepVectorEnv(gym.vector.SyncVectorEnv):
    """SyncVectorEnv in same-step autoreset mode, with a step that costs about half as much.

    What it returns is overwritten by the next step, as with copy=False. Its infos are those of episodes' ends alone.
    """

    def step(self, actions: np.ndarray):
        """Steps all environments with actions [N]; returns what gymnasium.vector.VectorEnv.step documents."""
        infos = {}
        for i, env in enumerate(self.envs):
            obs, self._rewards[i], self._terminations[i], self._truncations[i], info = env.step(actions[i])
            # [core-1] Where an episode ends, the environment restarts within the same step, which then returns the next
            # episode's first observation. Gymnasium's default spends an extra step on the restart: a transition that
            # never happened, and must not be learned from.
            if self._terminations[i] or self._truncations[i]:
                infos = self._add_info(infos, {"final_obs": obs, "final_info": info}, i)
                obs, _ = env.reset()
            self._observations[i] = obs
        return self._observations, self._rewards, self._terminations, self._truncations, infos


class NoopReset(gym.Wrapper):
    """Starts games with 1 to noop_max frames of doing nothing."""

    def __init__(self, env: gym.Env, noop_max: int):
        super().__init__(env)
        self.noop_max = noop_max

    def reset(self, **kwargs):
        """Resets, then waits."""
        obs, info = self.env.reset(**kwargs)
        # [atari-1] The emulator is deterministic; without this all games would begin alike.
        for _ in range(self.unwrapped.np_random.integers(1, self.noop_max + 1) if self.noop_max else 0):
            obs, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                obs, info = self.env.reset()
        return obs, info


class MaxAndSkip(gym.Wrapper):
    """Repeats each action for frame_skip frames; shows the maximum of the last two, and the sum of the rewards."""

    def __init__(self, env: gym.Env, frame_skip: int):
        super().__init__(env)
        self.frame_skip = frame_skip
        self.last_two = np.zeros((2, *env.observation_space.shape), np.uint8)

    def step(self, action):
        """Steps frame_skip times, or until the game is over."""
        total = 0.0
        for frame in range(self.frame_skip):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            # [atari-2] Consecutive frames differ little: one decision for four makes games four times shorter. The
            # maximum is needed because the console draws some objects in every other frame only.
            if frame >= self.frame_skip - 2:
                self.last_two[frame - self.frame_skip] = obs
            if terminated or truncated:
                break
        obs = self.last_two.max(0) if self.frame_skip > 1 else obs
        return obs, total, terminated, truncated, info


class EpisodicLife(gym.Wrapper):
    """Ends an episode where a life is lost; the game goes on in the next one."""

    game_over, lives = True, 0

    def step(self, action):
        """Steps; the lives that the game has left decide about the end."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.game_over = terminated or truncated
        # [atari-3] The loss of a life earns no negative reward; as an end it lowers the values of what leads to it.
        terminated = terminated or 0 < info["lives"] < self.lives
        self.lives = info["lives"]
        return obs, reward, terminated, truncated, info

    def reset(self, **kwargs):
        """Starts a new game if there is none; otherwise does one no-op. [extra-26]"""
        if self.game_over or kwargs.get("seed") is not None:
            obs, info = self.env.reset(**kwargs)
        else:
            obs, _, _, _, info = self.env.step(0)
        self.game_over, self.lives = False, info["lives"]
        return obs, info


class FireReset(gym.Wrapper):
    """Does at the start of an episode what some games wait for."""

    def reset(self, **kwargs):
        """Resets, then takes actions 1 (FIRE) and 2. The agent sees neither of them. [extra-26]"""
        obs, info = self.env.reset(**kwargs)
        for action in (1, 2):  # [atari-4] Breakout shows an empty field until FIRE is pressed: nothing to learn from.
            obs, _, terminated, truncated, info = self.env.step(action)
            if terminated or truncated:
                obs, info = self.env.reset()
        return obs, info


class WarpFrame(gym.ObservationWrapper):
    """Turns images [210, 160, 3] into gray ones of 84 x 84 pixels."""

    def __init__(self, env: gym.Env, interpolation: int):
        super().__init__(env)
        if len(env.observation_space.shape) != 3:
            raise InputError(f"the game must show color images, not {env.observation_space}")
        self.interpolation, self.observation_space = interpolation, Box(0, 255, (84, 84), np.uint8)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        """Gray first, then smaller. [extra-25]"""
        # [atari-5] Colors and details matter little, and 7,056 bytes instead of 100,800 are faster to learn from.
        return cv2.resize(cv2.cvtColor(observation, cv2.COLOR_RGB2GRAY), (84, 84), interpolation=self.interpolation)


class ClipReward(gym.RewardWrapper):
    """Keeps only the sign of rewards."""

    def reward(self, reward: float) -> float:
        """-1, 0 or 1."""
        return np.sign(reward)  # [atari-6] One learning rate then fits all games, whatever their points are worth.


class MaskVelocity(gym.ObservationWrapper):
    """Shows velocities as 0. Where things go can then only be known by comparing with what was seen before."""

    def __init__(self, env: gym.Env, velocities: list[int] | range):
        super().__init__(env)
        self.velocities = list(velocities)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        """The observation without them."""
        observation = observation.copy()
        observation[self.velocities] = 0
        return observation


class EnvpoolVectorEnv(gym.vector.VectorEnv):
    """EnvPool's environments, which C++ threads step in parallel, with the interface of SameStepVectorEnv.

    EnvPool has the wrappers above built in. docs/backends.md says where it differs: mainly, after a lost life it does 0
    to 29 no-ops and FIRE, a frame each, where the official code does a no-op, FIRE and action 2 for four frames each.
    """

    def __init__(self, args: Args, game: str | None):
        import envpool

        self.game, self.velocities, self.num_envs = game, list(velocities(args)), args.num_envs
        kwargs, env_id = {"seed": args.seed % 2**31}, f"{game}-v5" if game else args.env_id
        if env_id not in envpool.list_all_envs():
            similar = " or ".join(difflib.get_close_matches(env_id, envpool.list_all_envs()))
            raise InputError(f"EnvPool has no {env_id}" + f"; did you mean {similar}?" * bool(similar))
        if game:
            kwargs |= {
                "noop_max": max(args.noop_max, 1), "frame_skip": args.frame_skip, "episodic_life": args.episodic_life,
                "use_fire_reset": args.fire_reset, "reward_clip": args.clip_reward,
                "use_inter_area_resize": args.area_resize, "max_episode_steps": args.max_game_frames // args.frame_skip,
            }  # fmt: skip
        kwargs |= json.loads(args.env_kwargs) | ({"stack_num": 1} if game else {})
        kwargs |= {"num_envs": args.num_envs, "batch_size": args.num_envs}
        self.make_pool = lambda **changed: envpool.make_gymnasium(env_id, **kwargs | changed)
        self.pool = self.make_pool()
        space, self.single_action_space = self.pool.observation_space, self.pool.action_space
        space = space["image"] if isinstance(space, Dict) and "image" in space.keys() else space  # MiniGrid
        if game and space.shape != (1, 84, 84):
            raise InputError(f"the game must show 84 x 84 gray pixels, not {space}")
        space = Box(0, 255, (84, 84), np.uint8) if game else space
        if isinstance(space, Discrete):
            raise InputError(f"Discrete observations need --env-backend gymnasium, not envpool: {env_id} has {space}")
        check_spaces(space, self.single_action_space)
        self.single_observation_space = space if is_image(space) else flatten_space(space)
        self.returns, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, int)

    def visible(self, obs: np.ndarray | dict) -> np.ndarray:
        """What the agent shall see of observations [N, ...]."""
        obs = obs["image"] if isinstance(obs, dict) else obs
        obs = obs.reshape(-1, *self.single_observation_space.shape)
        if self.velocities:
            obs[:, self.velocities] = 0
        return obs

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Restarts all environments; EnvPool takes a seed only when environments are made."""
        self.pool = self.make_pool(seed=seed % 2**31) if seed is not None else self.pool
        self.returns[:], self.lengths[:] = 0, 0
        return self.visible(self.pool.reset()[0]), {}

    def step(self, actions: np.ndarray):
        """Steps all environments with actions [N, ...]; returns what gymnasium.vector.VectorEnv.step documents."""
        obs, rewards, terminations, truncations, info = self.pool.step(actions)
        obs = self.visible(obs)
        self.returns += info["reward"] if self.game else rewards  # before clipping
        self.lengths += 1
        infos, ended = {}, np.flatnonzero(terminations | truncations)
        if len(ended):
            infos["final_obs"] = obs.copy()
            # The others have only lost a life.
            over = (info["terminated"].astype(bool) if self.game else terminations) | truncations
            episode = {"r": self.returns.copy(), "l": self.lengths.copy()}
            infos["final_info"] = {"episode": episode, "_episode": over}
            self.returns[over], self.lengths[over] = 0, 0
            # [core-1] EnvPool restarts an environment in its next step, whose action it ignores. One more call for just
            # these environments does that within this step, so that no such transition gets into the rollout.
            obs[ended] = self.visible(self.pool.step(actions[ended], ended.astype(np.int32))[0])
        return obs, rewards, terminations, truncations, infos


def is_image(space: gym.Space) -> bool:
    """Whether observations [height, width] or [height, width, channels] are for a convolutional network.

    That needs at least 36 pixels in each direction, of which its last layer leaves one.
    """
    return isinstance(space, Box) and space.dtype == np.uint8 and len(space.shape) > 1 and min(space.shape[:2]) >= 36


def velocities(args: Args) -> list[int] | range:
    """The entries of the task's observations that --mask-velocity hides."""
    task = re.sub(r"^.*:|-v\d+$", "", args.env_id)
    return VELOCITIES.get(task, []) if args.mask_velocity else []


def check_spaces(observation_space: gym.Space, action_space: gym.Space) -> None:
    """Raises InputError if the script cannot learn in such an environment."""
    floats = isinstance(action_space, Box) and np.issubdtype(action_space.dtype, np.floating)
    if not floats and not isinstance(action_space, Discrete):
        raise InputError(f"{SCRIPT}.py needs Discrete actions or Box actions of floating-point numbers, "
                         f"not {action_space}")  # fmt: skip
    if not isinstance(observation_space, Box | Discrete):
        raise InputError(f"{SCRIPT}.py needs Box or Discrete observations, not {observation_space}")


def find_game(env_id: str) -> str | None:
    """Breakout, given Breakout, Breakout-v5, ALE/Breakout-v5 or BreakoutNoFrameskip-v4; None if it is no Atari game."""
    registered = gym.registry.get(env_id)
    if ":" in env_id or (registered and registered.entry_point != "ale_py.env:AtariEnv"):
        return None
    games = [env_id[4:-3] for env_id in gym.registry if re.fullmatch(r"ALE/\w+-v5", env_id)]
    name = re.sub(r"^ALE/|(-v5|NoFrameskip-v4)$", "", env_id)
    if name in games:
        return name
    plain = re.sub(r"(Deterministic|NoFrameskip)?-v\d+$", "", name)
    if plain in games and (registered or "Deterministic" in name):
        raise InputError(f"{env_id} skips frames or repeats actions by itself, which this script does: use {plain}")
    similar = " or ".join(difflib.get_close_matches(name.capitalize(), games))
    if similar and not re.search(r"-v[^5]", env_id):  # other versions may be EnvPool's tasks
        raise InputError(f"there is no environment {env_id}; did you mean the Atari game {similar}?")
    return None


def make_envs(args: Args, video_folder: Path | None = None, video_trigger=None) -> gym.vector.VectorEnv:
    """Creates num_envs environments that are stepped together; raises InputError if that is impossible.

    Their observations are images, of games single frames [84, 84]; or vectors [size], to which other Boxes are
    flattened, while Discrete observations become one-hot.
    """
    game = find_game(args.env_id)

    def make_game(record: bool) -> gym.Env:
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner
        # The official code's games are cut off at 400,000 frames, those registered in gymnasium at 108,000. [extra-28]
        kwargs = {"frameskip": 1, "repeat_action_probability": 0.0, "max_num_frames_per_episode": args.max_game_frames}
        kwargs |= json.loads(args.env_kwargs)
        env = gym.make(f"ALE/{game}-v5", render_mode="rgb_array" if record else None, **kwargs)
        env = MaxAndSkip(NoopReset(env, args.noop_max), args.frame_skip)
        if record:
            env = SafeRecordVideo(env, str(video_folder), video_trigger, name_prefix=f"{time.time():.0f}", fps=15)
        # Here an episode is a game, with all its lives and with unclipped rewards. [extra-27]
        env = gym.wrappers.RecordEpisodeStatistics(env)
        if args.episodic_life:
            env = EpisodicLife(env)
        if args.fire_reset and env.unwrapped.get_action_meanings()[1:2] == ["FIRE"]:
            env = FireReset(env)
        # [atari-7] Where other scripts show four frames at once, this one shows one: the LSTM has to remember.
        env = WarpFrame(env, cv2.INTER_AREA if args.area_resize else cv2.INTER_LINEAR)
        return ClipReward(env) if args.clip_reward else env

    def make_task(record: bool) -> gym.Env:
        env, kwargs = None, json.loads(args.env_kwargs)
        if record:
            try:
                env = gym.make(args.env_id, render_mode="rgb_array", **kwargs)
                env = SafeRecordVideo(env, str(video_folder), video_trigger, name_prefix=f"{time.time():.0f}")
            except Exception as error:
                print(f"no videos, {args.env_id} cannot be recorded: {one_line(error)}", file=sys.stderr)
                env = None
        env = env or gym.make(args.env_id, **kwargs)
        check_spaces(env.observation_space, env.action_space)
        if first := int(getattr(env.action_space, "start", 0)):  # the network counts actions from 0
            env = gym.wrappers.TransformAction(env, lambda action: action + first, Discrete(int(env.action_space.n)))
        if velocities(args):
            env = MaskVelocity(env, velocities(args))
        if len(env.observation_space.shape) != 1 and not is_image(env.observation_space):
            env = gym.wrappers.FlattenObservation(env)
        return gym.wrappers.RecordEpisodeStatistics(env)

    def make_env(index: int) -> gym.Env:
        if args.async_envs and multiprocessing.parent_process() and os.name == "posix":
            os.setpgid(0, 0)  # signals to the whole group, such as Ctrl-C, are for the main process to act on
        record = video_folder is not None and index == 0
        return make_game(record) if game else make_task(record)

    warnings.filterwarnings("ignore", ".*is out of date")  # the official curves are of -v4 environments
    try:
        python_envs = args.capture_video or args.async_envs
        if args.env_backend == "envpool" or (args.env_backend == "auto" and game and not python_envs):
            try:
                return EnvpoolVectorEnv(args, game)
            except ImportError:
                print("EnvPool is not installed (it exists for Linux only); using gymnasium", file=sys.stderr)
        make = [lambda index=index: make_env(index) for index in range(args.num_envs)]
        vector = gym.vector.AsyncVectorEnv if args.async_envs else SameStepVectorEnv
        return vector(make, copy=False, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    except InputError:
        raise
    except Exception as error:  # a constructor may raise anything
        given = "" if args.env_kwargs == "{}" else f" with --env-kwargs {args.env_kwargs}"
        raise InputError(f"cannot make {args.env_id}{given}: {one_line(error)}") from error


def effective_args(args: Args, envs: gym.vector.VectorEnv) -> Args:
    """The settings without normalization for images, of which just rewards for continuous actions are scaled.

    The official code normalizes in MuJoCo alone. For other vectors it matters as much: where a reward of 1 a step makes
    values of 100, the clipped value loss would take hundreds of updates to get there.
    """
    continuous, images = isinstance(envs.single_action_space, Box), is_image(envs.single_observation_space)
    norm_obs, norm_reward = args.norm_obs and not images, args.norm_reward and (continuous or not images)
    return replace(args, norm_obs=norm_obs, norm_reward=norm_reward)


class RunningMeanStd:
    """Mean and variance of all values seen so far, for each component (common/running_mean_std.py)."""

    def __init__(self, shape: tuple[int, ...]):
        # [extra-31] A count of almost 0: the first values replace this mean and variance.
        self.mean, self.var, self.count = np.zeros(shape), np.ones(shape), np.float64(1e-4)

    def update(self, batch: np.ndarray) -> None:
        """Takes in values [N, *shape], all at once (Chan et al. 1979)."""
        difference = batch - self.mean
        count = self.count + len(batch)
        shift = difference.sum(0) / count
        self.var = (self.var * self.count + np.square(difference).sum(0)) / count - np.square(shift)
        self.mean, self.count = self.mean + shift, count


def normalize_obs(obs: np.ndarray, stats: RunningMeanStd, args: Args, update: bool = True) -> np.ndarray:
    """Observations [N, size] as the network gets them; a new one counts in the statistics (vec_normalize.py)."""
    if not args.norm_obs:
        return obs
    if update:  # [extra-31] before they are used
        stats.update(obs)
    # [continuous-6] Positions and velocities differ in scale by orders of magnitude, which one learning rate for all
    # weights cannot serve. They are divided by the standard deviation [extra-30], in float64 [extra-33].
    obs = (obs - stats.mean) / np.sqrt(stats.var + 1e-8)
    # [continuous-7] A rare, extreme value would saturate the network.
    return np.minimum(np.maximum(obs, -10), 10) if args.clip_obs else obs


def normalize_rewards(
    rewards: np.ndarray, dones: np.ndarray, returns: np.ndarray, stats: RunningMeanStd, args: Args
) -> np.ndarray:
    """Rewards [T, N] as the algorithm learns from them (vec_normalize.py).

    returns [N] are the discounted returns since the episodes' starts, which this function brings forward in place.
    """
    if not args.norm_reward:
        return rewards
    rewards = rewards.copy()
    for reward, done in zip(rewards, dones):
        # [continuous-8] Dividing by the spread of the discounted return brings the value targets to the order of 1,
        # whatever the task's unit of reward. Subtracting a mean would change what is rewarded. [extra-32]
        returns *= args.gamma
        returns += reward
        stats.update(returns)
        reward /= np.sqrt(stats.var + 1e-8)
        returns[done] = 0
    # [continuous-9] Early on the statistics rest on a few steps: the very first reward would be about 100 [extra-31].
    return np.clip(rewards, -10, 10) if args.clip_reward else rewards


def layer_init(layer: nn.Linear | nn.Conv2d, gain: float, args: Args) -> nn.Linear | nn.Conv2d:
    """Initializes a layer like the official code (a2c/utils.py) and returns it."""
    if args.orthogonal_init:
        # [core-2] Orthogonal weights let signals and gradients pass through the layers with their scale unchanged.
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return layer


class NatureCNN(nn.Module):
    """Images [B, height, width(, channels)] of bytes -> features [B, 512] (common/models.py; Mnih et al. 2015)."""

    def __init__(self, shape: tuple[int, ...], args: Args):
        super().__init__()
        self.args = args
        shapes = (math.prod(shape[2:]), 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1)
        self.convolutions = nn.ModuleList(layer_init(nn.Conv2d(*shape), math.sqrt(2), args) for shape in shapes)
        height, width = [((size // 4 - 1) // 2 - 1) - 2 for size in shape[:2]]  # 7 for 84
        self.linear = layer_init(nn.Linear(64 * height * width, 512), math.sqrt(2), args)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Three convolutions and a linear layer, a ReLU after each."""
        # Observations are kept as bytes; only what is computed with becomes four times as large.
        x = images.view(*images.shape[:3], -1).permute(0, 3, 1, 2).float()  # in memory the channels stay last
        x = x / 255 if self.args.scale_images else x  # [atari-9] The initialization expects inputs of about that size.
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.args.amp):
            for convolution in self.convolutions:
                x = F.relu(convolution(x))
            x = F.relu(self.linear(x.permute(0, 2, 3, 1).flatten(1)))  # channels last [extra-18]
        return x.float()


class MLP(nn.Module):
    """Vectors [B, inputs] -> features [B, 64]: two linear layers, a tanh after each (common/models.py)."""

    def __init__(self, inputs: int, args: Args):
        super().__init__()
        sizes = (inputs, 64), (64, 64)
        self.layers = nn.ModuleList(layer_init(nn.Linear(*size), math.sqrt(2), args) for size in sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Output of the last layer."""
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class CategoricalActor(nn.Module):
    """A policy over Discrete actions: features [..., size] -> the logits [..., A] of a categorical distribution."""

    def __init__(self, size: int, action_space: Discrete, args: Args):
        super().__init__()
        # [core-2] The small gain makes the first policy nearly uniform, so that every action gets tried.
        self.linear = layer_init(nn.Linear(size, int(action_space.n)), 0.01, args)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The logits."""
        return self.linear(features)

    def noise(self, *shape: int) -> torch.Tensor:
        """What sample() needs for actions of this shape: Gumbel noise [*shape, A]."""
        return -torch.empty(*shape, self.linear.out_features).exponential_().log()

    def sample(self, logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Actions [...]. The argmax of logits + Gumbel noise is distributed as the logits say; without it the mode."""
        return (logits + noise).argmax(-1)

    def log_probabilities(self, logits: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [...] of actions [...]."""
        return logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    def entropy(self, logits: torch.Tensor) -> torch.Tensor:
        """Entropies [...]."""
        all_log_probs = logits.log_softmax(-1)
        return -(all_log_probs.exp() * all_log_probs).sum(-1)


class GaussianActor(nn.Module):
    """A policy over Box actions: features [..., size] -> the means [..., A] of a Gaussian with one deviation for each.

    A is the number of components of an action, whatever the space's shape.
    """

    def __init__(self, size: int, action_space: Box, args: Args):
        super().__init__()
        # [core-2] The small gain makes the first policy nearly the same in all states.
        self.linear = layer_init(nn.Linear(size, math.prod(action_space.shape)), 0.01, args)
        # [continuous-2] One deviation for each action, the same in all states, keeps exploration from vanishing in some
        # states before it does in others. It starts at 1.
        self.log_std = nn.Parameter(torch.zeros(self.linear.out_features))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The means."""
        return self.linear(features)

    def noise(self, *shape: int) -> torch.Tensor:
        """What sample() needs for actions of this shape: Gaussian noise [*shape, A]."""
        return torch.randn(*shape, self.linear.out_features)

    def sample(self, means: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Actions [..., A]; without noise the mode."""
        return means + self.log_std.exp() * noise

    def log_probabilities(self, means: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Log-densities [...] of actions [..., A]."""
        # [continuous-1] [continuous-3] Independent components: the density of an action is the product of theirs.
        standardized = (actions - means) * (-self.log_std).exp()
        return -(0.5 * standardized.square() + self.log_std).sum(-1) - 0.5 * math.log(2 * math.pi) * actions.shape[-1]

    def entropy(self, means: torch.Tensor) -> torch.Tensor:
        """Entropy [], the same in all states."""
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()  # [continuous-3]


class Agent(nn.Module):
    """A policy (actor) and a value function (critic) on the output of one LSTM, which sees features of observations."""

    def __init__(self, observation_space: Box, action_space: Discrete | Box, args: Args):
        super().__init__()
        shape, features = observation_space.shape, 64
        if is_image(observation_space):
            self.network, features = NatureCNN(shape, args), 512
        elif args.encoder:
            self.network = MLP(shape[0], args)
        else:  # [extra-22] the official network for vectors has no other layer in front
            self.network, features = nn.Identity(), shape[0]
        # [core-13] [atari-8] Policy and value function share all but their last layers: in the official code they must.
        self.lstm = nn.LSTM(features, args.lstm_size)
        if args.lstm_orthogonal_init:
            # [lstm-1] As in other layers. All biases are 0, that of the forget gate too. [extra-21]
            nn.init.orthogonal_(self.lstm.weight_ih_l0)
            nn.init.orthogonal_(self.lstm.weight_hh_l0)
            nn.init.zeros_(self.lstm.bias_ih_l0)
        # [extra-20] PyTorch adds two biases, which would move twice as fast as the official code's one.
        nn.init.zeros_(self.lstm.bias_hh_l0).requires_grad_(False)
        actor = CategoricalActor if isinstance(action_space, Discrete) else GaussianActor
        self.actor = actor(args.lstm_size, action_space, args)
        self.critic = layer_init(nn.Linear(args.lstm_size, 1), 1.0, args)
        self.obs_stats = RunningMeanStd(shape if args.norm_obs else ())
        self.return_stats = RunningMeanStd(())

    def step(self, obs: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One step: obs [N, ...] and the LSTM's state [2, N, size] -> policy [N, A], values [N] and the next state.

        A state is the LSTM's outputs h and its cells c. What the policy is, its actor says.
        """
        features = self.network(obs).unsqueeze(0)
        output, state = self.lstm(features, tuple(state.unsqueeze(1)))
        return self.actor(output[0]), self.critic(output[0]).squeeze(-1), torch.cat(state)

    def forward(self, obs: torch.Tensor, state: torch.Tensor, dones: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """T steps, in training: obs [T, N, ...] -> policy [T, N, A], values [T, N].

        Equal to T calls of step(), the first with this state [2, N, size], and the state set to 0 after dones [T, N].
        """
        features = self.network(obs.flatten(0, 1)).view(*dones.shape, -1)
        output = unroll(self.lstm, features, state, dones)
        return self.actor(output), self.critic(output).squeeze(-1)

    def get_extra_state(self) -> dict:
        """The running statistics, which PyTorch saves and loads with the weights: without them these are worthless."""
        stats = {"obs": self.obs_stats, "returns": self.return_stats}
        return {name: {key: torch.as_tensor(value) for key, value in vars(s).items()} for name, s in stats.items()}

    def set_extra_state(self, state: dict) -> None:
        """Puts back what get_extra_state returned."""
        for stats, saved in ((self.obs_stats, state["obs"]), (self.return_stats, state["returns"])):
            for key, value in vars(stats).items():
                setattr(stats, key, saved[key].numpy().reshape(np.shape(value)))


@torch.compiler.disable
def unroll(lstm: nn.LSTM, x: torch.Tensor, state: torch.Tensor, dones: torch.Tensor) -> torch.Tensor:
    """Outputs [T, N, size] of the LSTM on sequences x [T, N, features], with the state set to 0 after each done [T, N].

    state [2, N, size] is the one before the first step. What comes after a done does not depend on what was before it:
    the sequences can be cut there, and all pieces run side by side. One call is many times faster than T of them,
    unless a long piece among many short ones makes all of them long.
    """
    num_steps, num_envs = dones.shape
    last = dones.cpu().numpy().copy()
    last[-1] = True
    envs, ends = np.nonzero(last.T)  # of the pieces, environment by environment
    # Each begins after the one before it. An environment's last piece ends at num_steps - 1, so that the next one's
    # first begins at 0.
    starts = (np.roll(ends, 1) + 1) % num_steps
    lengths = ends - starts + 1
    # [lstm-3] Only the pieces that begin with the rollout have a past.
    state = state[:, envs] * torch.from_numpy(starts == 0).to(x.device).unsqueeze(-1)
    # All are made as long as the longest; what the others get at their end is not used.
    steps = np.minimum(starts + np.arange(lengths.max())[:, None], num_steps - 1)
    output, _ = lstm(x[steps, envs], tuple(state.unsqueeze(1)))
    pieces, offsets = np.repeat(np.arange(len(envs)), lengths), np.concatenate([np.arange(n) for n in lengths])
    return output[offsets, pieces].view(num_envs, num_steps, -1).transpose(0, 1)


def environment_actions(actions: np.ndarray, action_space: Discrete | Box, args: Args) -> np.ndarray:
    """What the environments get for the policy's actions [N] or [N, A]; shaped [N, *shape of the action space]."""
    if isinstance(action_space, Discrete):
        return actions
    # [continuous-5] Samples of a Gaussian may leave the bounds. The rollout keeps them as they were drawn, since the
    # policy gradient needs their density. Not-a-number becomes 0. [extra-34]
    low, high = action_space.low, action_space.high
    actions = actions.reshape(-1, *action_space.shape)
    if args.clip_action:
        actions = np.minimum(np.maximum(np.where(np.isnan(actions), 0, actions), low), high)
    return actions.astype(action_space.dtype)


class Rollout(NamedTuple):
    """num_steps = T steps in each of num_envs = N environments."""

    obs: torch.Tensor  # [T+1, N, ...] uint8 images or float32 vectors; the last row is where the next rollout goes on
    actions: torch.Tensor  # [T, N] int64 or [T, N, A] float32, not clipped
    policy: torch.Tensor  # [T, N, A] float32: what the policy said
    values: torch.Tensor  # [T+1, N] float32: what the value function said
    rewards: np.ndarray  # [T, N] float32
    dones: np.ndarray  # [T, N] bool: this step ended its episode
    state: torch.Tensor  # [2, N, size]: the LSTM's state with which the next rollout goes on
    truncated: list[tuple[int, int, float]]  # step, environment, last observation's value if cut by a limit
    episodes: list[tuple[int, float, int]]  # step, return and length of the episodes (whole games) that ended


@torch.no_grad()
def collect_rollout(
    agent: Agent, envs: gym.vector.VectorEnv, next_obs: torch.Tensor, state: torch.Tensor, args: Args
) -> Rollout:
    """Acts for num_steps steps, from observations next_obs [N, ...] and state [2, N, size] on (ppo2/runner.py)."""
    shape, device = (args.num_steps, args.num_envs), next_obs.device
    obs = torch.empty((args.num_steps + 1, *next_obs.shape), dtype=next_obs.dtype, device=device)
    rewards, dones = np.empty(shape, np.float32), np.empty(shape, bool)
    actions, policies, values, truncated, episodes = [], [], [], [], []
    # One large draw for the whole rollout is much faster than one for each step.
    noise = agent.actor.noise(*shape).to(device)

    obs[0] = next_obs
    for step in range(args.num_steps):
        policy, value, state = agent.step(obs[step], state)
        actions.append(agent.actor.sample(policy, noise[step]))
        policies.append(policy)
        values.append(value)
        env_actions = environment_actions(actions[step].cpu().numpy(), envs.single_action_space, args)
        next_obs, rewards[step], terminations, truncations, infos = envs.step(env_actions)
        obs[step + 1] = torch.from_numpy(normalize_obs(next_obs, agent.obs_stats, args))
        dones[step] = terminations | truncations
        if "final_info" in infos:
            # In Atari, a lost life ends an episode of learning; what is logged are whole games.
            for env in np.flatnonzero(infos["final_info"].get("_episode", [])):
                episode = infos["final_info"]["episode"]
                episodes.append((step, float(episode["r"][env]), int(episode["l"][env])))
            for env in np.flatnonzero(truncations & ~terminations) if args.bootstrap_truncated else []:
                last_obs = normalize_obs(np.asarray(infos["final_obs"][env])[None], agent.obs_stats, args, update=False)
                last_obs = torch.from_numpy(last_obs).to(obs)
                truncated.append((step, int(env), agent.step(last_obs, state[:, env : env + 1])[1].item()))
        # [lstm-3] A new episode has nothing to do with the last one.
        if args.reset_lstm_state and dones[step].any():
            state = state * torch.from_numpy(~dones[step]).to(device).unsqueeze(-1)
    values.append(agent.step(obs[-1], state)[1])
    return Rollout(obs, *map(torch.stack, (actions, policies, values)), rewards, dones, state, truncated, episodes)


def compute_gae(
    rewards: torch.Tensor, values: torch.Tensor, dones: torch.Tensor, gamma: float, gae_lambda: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalized advantage estimation (Schulman et al. 2015, arXiv:1506.02438; ppo2/runner.py).

    rewards [T, N], dones [T, N] (this step ended its episode) and values [T+1, N], the last row for the observations
    after the last step. Returns advantages A and value targets R, [T, N] each:

        delta_t = r_t + gamma * V(s_t+1) * (1 - done_t) - V(s_t)
        A_t = delta_t + gamma * lambda * (1 - done_t) * A_t+1        R_t = A_t + V(s_t)
    """
    # [core-5] Where the rollout stops within an episode, V(s_T) stands for the rest of it; where an episode ends,
    # nothing follows. Lambda trades the bias of V against the variance of long sums. [extra-13] In float64.
    unfinished = 1.0 - dones.double()
    advantages = rewards + gamma * values[1:] * unfinished - values[:-1]  # delta_t, to which the sum is now added
    steps, decays = advantages.unbind(), (gamma * gae_lambda * unfinished).unbind()
    for t in reversed(range(len(steps) - 1)):
        steps[t].addcmul_(decays[t], steps[t + 1])
    advantages = advantages.to(values.dtype)
    return advantages, advantages + values[:-1]


def normalize(advantages: torch.Tensor, args: Args) -> torch.Tensor:
    """Advantages with mean 0 and standard deviation 1 along the last dimension (ppo2/model.py)."""
    # [extra-3] The population's deviation, which divides by n; PyTorch's default divides by n - 1.
    std, mean = torch.std_mean(advantages, -1, correction=0 if args.population_std else 1, keepdim=True)
    return (advantages - mean) / (std + 1e-8)


def ppo_loss(
    actor: CategoricalActor | GaussianActor, policy: torch.Tensor, values: torch.Tensor, actions: torch.Tensor,
    old_log_probs: torch.Tensor, advantages: torch.Tensor, returns: torch.Tensor, old_values: torch.Tensor,
    clip_coef: float, args: Args,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The loss of a minibatch of T steps in n environments (ppo2/model.py).

    policy [T, n, A] and values [T, n] are the network's present output; actions [T, n] or [T, n, A] and all other
    tensors [T, n] come from the rollout.
    Returns the loss [], its terms [3] (policy loss, value loss, entropy) and the log-ratios [T, n] of new to old.
    """
    log_ratio = actor.log_probabilities(policy, actions) - old_log_probs
    ratio = log_ratio.exp()

    # [core-8] Taking the worse of both leaves nothing to gain from moving the ratio further than clip_coef from 1.
    policy_loss = -advantages * ratio
    if args.clip_policy:
        policy_loss = torch.maximum(policy_loss, -advantages * ratio.clamp(1 - clip_coef, 1 + clip_coef))
    policy_loss = policy_loss.mean()

    # [core-9] The same for the value function: nothing to gain from moving further than clip_coef from the old value.
    value_loss = (values - returns).square()
    if args.clip_vloss:
        clipped_values = values.clamp(old_values - clip_coef, old_values + clip_coef)
        value_loss = torch.maximum(value_loss, (clipped_values - returns).square())
    value_loss = 0.5 * value_loss.mean()  # [extra-6] this half comes on top of vf_coef

    # [core-10] One loss for policy and value function; the entropy bonus keeps the policy from settling too early.
    entropy = actor.entropy(policy).mean()
    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss
    return loss, torch.stack([policy_loss, value_loss, entropy]).detach(), log_ratio.detach()


def policy_change(log_ratio: torch.Tensor, clip_coef: float) -> dict[str, float]:
    """How far the policy has moved, given log-ratios of new to old policy of any shape (ppo2/model.py)."""
    # [core-12] Three estimates of the KL divergence between them (http://joschu.net/blog/kl-approx.html): k1, the
    # article's; k3, which varies less; and k2, the one that the official code logs [extra-7].
    ratio = log_ratio.exp()
    return {
        "losses/old_approx_kl": -log_ratio.mean().item(),
        "losses/approx_kl": (ratio - 1 - log_ratio).mean().item(),
        "losses/official_approx_kl": 0.5 * log_ratio.square().mean().item(),
        "losses/clipfrac": ((ratio - 1).abs() > clip_coef).float().mean().item(),
    }


class Adam:
    """Adam (Kingma & Ba 2015, arXiv:1412.6980) on one vector [P] of all parameters, as TensorFlow 1 computes it.

    The agent's parameters become views of that vector: a step then takes a few operations, not a few for each layer.
    """

    def __init__(self, agent: Agent):
        self.tensors = [parameter for parameter in agent.parameters() if parameter.requires_grad]
        self.parameters = torch.cat([p.detach().flatten() for p in self.tensors])
        for parameter, view in zip(self.tensors, self.parameters.split([p.numel() for p in self.tensors])):
            parameter.data = view.view_as(parameter)
        self.moment1, self.moment2 = torch.zeros_like(self.parameters), torch.zeros_like(self.parameters)
        self.steps = 0

    def coefficients(self, learning_rate: float, args: Args) -> tuple[float, float]:
        """Counts one more step and returns its step size, with Adam's bias corrections, and its epsilon."""
        self.steps += 1
        correction1, correction2 = 1 - 0.9**self.steps, math.sqrt(1 - 0.999**self.steps)
        # [core-3] A larger epsilon than the usual 1e-8 shortens the steps of parameters with tiny gradients. [extra-1]
        # TensorFlow 1 adds it to the root of the uncorrected second moment, where it weighs up to 32 times as much.
        epsilon = args.adam_eps if args.adam_eps_hat else args.adam_eps * correction2
        return learning_rate * correction2 / correction1, epsilon

    def step(self, gradient: torch.Tensor, step_size: float, epsilon: float) -> None:
        """Moves the parameters against their gradient [P]."""
        self.moment1.lerp_(gradient, 1 - 0.9)
        self.moment2.lerp_(gradient.square(), 1 - 0.999)
        # In place where it can be: with millions of parameters, new memory costs more time than the arithmetic.
        self.parameters -= (step_size * self.moment1).div_(self.moment2.sqrt().add_(epsilon))


def gradient_step(agent: Agent, adam: Adam, minibatch, clip_coef, step_size, epsilon, args: Args):
    """Improves the agent on one minibatch (what Agent.forward takes, then ppo_loss); returns loss terms, log-ratios."""
    obs, state, dones, *others = minibatch
    loss, terms, log_ratio = ppo_loss(agent.actor, *agent(obs, state, dones), *others, clip_coef, args)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, adam.tensors)])
    with torch.no_grad():
        # [core-11] One norm over all parameters together: clipping shortens the gradient but keeps its direction.
        # torch's clip_grad_norm_ adds 1e-6 to the norm, this does not. [extra-5]
        gradient *= (args.max_grad_norm / gradient.norm()).clamp(max=1)
        adam.step(gradient, step_size, epsilon)
    return terms, log_ratio


def train(args: Args) -> dict:
    """Trains an agent; returns {"run_dir", "global_step", "episodic_return": mean of the last 100 episodes}.

    Raises InputError for settings that cannot work, FloatingPointError when the training diverged.
    """
    check_args(args)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    envs = make_envs(args)
    given, args, images = args, effective_args(args, envs), is_image(envs.single_observation_space)
    if images:
        keep_freed_memory()
    else:
        torch.set_num_threads(1)  # matrices this small are faster with one thread
    agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(device)
    adam = Adam(agent)
    run = Run(given, agent, adam)
    if velocities(args):
        print(f"the velocities of {args.env_id} are hidden; --no-mask-velocity shows them", file=sys.stderr)
    if args.amp and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        print("this processor has no instructions for bfloat16: --amp will be slower than without", file=sys.stderr)
    if args.capture_video:
        envs.close()
        envs = make_envs(args, run.path / "videos")
    improve = gradient_step
    if args.compile:
        improve = torch.compile(gradient_step, dynamic=False)

    # [extra-35] Environment i is seeded with this + i. A resumed run does not repeat its first episodes.
    next_obs, _ = envs.reset(seed=args.seed + run.first_step)
    run.save()
    # A run that was over already must stay as it is.
    next_obs = normalize_obs(next_obs, agent.obs_stats, args, update=run.update < args.num_updates)
    next_obs = torch.as_tensor(next_obs, dtype=torch.uint8 if images else torch.float32, device=device)
    # [lstm-2] Nothing is remembered at the start; nor when a run is resumed, which begins new episodes.
    state, discounted_returns = torch.zeros(2, args.num_envs, args.lstm_size, device=device), np.zeros(args.num_envs)
    while run.update < args.num_updates and not run.stopped_by:
        # [core-4] The steps shrink linearly; the factor of the last update is 1/num_updates, not 0. [extra-10]
        remaining = 1 - run.update / args.num_updates
        learning_rate = args.learning_rate * (remaining if args.anneal_lr else 1)
        # [aux-1] So may the clip range; in the official code it is constant. [extra-9]
        clip_coef = args.clip_coef * (remaining if args.anneal_clip else 1)

        # [core-1] Rollouts have a fixed length; the next one goes on where this one stops, in the middle of episodes.
        rollout = collect_rollout(agent, envs, next_obs, state, args)
        # [lstm-5] Training runs the LSTM again from the state in which the rollout began. Only then does the first
        # minibatch reproduce the rollout's probabilities: the ratio is 1.
        first_state = state if args.reconstruct_lstm_state else torch.zeros_like(state)
        next_obs, state = rollout.obs[-1], rollout.state
        rewards = normalize_rewards(rollout.rewards, rollout.dones, discounted_returns, agent.return_stats, args)
        obs, actions, policy, values = rollout[:4]
        rewards, dones = (torch.from_numpy(array).to(device) for array in (rewards, rollout.dones))
        with torch.no_grad():
            log_probs = agent.actor.log_probabilities(policy, actions)
            # [extra-14] The official code takes a time limit for an end; this adds the value of what was cut off.
            for step, env, last_value in rollout.truncated:
                rewards[step, env] += args.gamma * last_value
            advantages, returns = compute_gae(rewards, values, dones, args.gamma, args.gae_lambda if args.gae else 1.0)
        advantages = returns - values[:-1]  # [extra-4]
        if args.norm_adv and args.norm_adv_per_batch:
            advantages = normalize(advantages.flatten(), args).view_as(advantages)
        resets = torch.from_numpy(rollout.dones & args.reset_lstm_state)
        batch = [obs[:-1], resets, actions, log_probs, advantages, returns, values[:-1]]
        batch = [tensor.flatten(0, 1) for tensor in batch]

        terms, log_ratios = [], []
        for epoch in range(args.update_epochs):
            # [lstm-4] Each epoch shuffles the environments anew; all steps of one stay together and in order, for the
            # LSTM to run over them. Every sample is used once. [core-6] [extra-23]
            env_order = torch.randperm(args.num_envs)
            if args.minibatch_replacement:
                env_order = torch.randint(args.num_envs, (args.num_envs,))
            env_order = env_order.view(args.num_minibatches, 1, -1)
            order = torch.arange(args.num_steps).unsqueeze(-1) * args.num_envs + env_order  # [minibatches, T, n]
            if args.shuffle_lstm_steps:
                order = torch.randperm(args.batch_size).view_as(order)
            minibatches = [tensor[order.to(tensor.device)] for tensor in batch]
            minibatches.insert(1, first_state[:, env_order.squeeze(1)].transpose(0, 1))
            # [core-7] Advantages on one scale let one learning rate fit rewards of any scale.
            if args.norm_adv and not args.norm_adv_per_batch:
                minibatches[5] = normalize(minibatches[5].flatten(1), args).view_as(minibatches[5])
            for minibatch in zip(*minibatches):
                coefficients = (clip_coef, *adam.coefficients(learning_rate, args))
                if args.compile:  # as tensors, for a number that changes would be compiled anew
                    coefficients = torch.tensor(coefficients, device=device).unbind()
                minibatch_terms, log_ratio = improve(agent, adam, minibatch, *coefficients, args)
                terms.append(minibatch_terms)
                log_ratios.append(log_ratio)
            # [aux-3] The policy is then far enough from the one that collected the data.
            if args.target_kl is not None:
                change = policy_change(torch.stack(log_ratios[-args.num_minibatches :]), clip_coef)
                if change["losses/approx_kl"] > args.target_kl:
                    break

        # [core-12] Means over all minibatches of the update, each taken before its own gradient step. [extra-8]
        names = ("losses/policy_loss", "losses/value_loss", "losses/entropy")
        losses = dict(zip(names, torch.stack(terms).mean(0).tolist(), strict=True))
        losses |= policy_change(torch.stack(log_ratios), clip_coef)
        if not all(map(math.isfinite, losses.values())) or not adam.parameters.isfinite().all():
            run.close()
            raise FloatingPointError(f"update {run.update + 1} is not finite; {run.path} keeps the last checkpoint")
        losses["losses/explained_variance"] = (1 - (returns - values[:-1]).var() / returns.var()).item()
        run.end_update(rollout, {"charts/learning_rate": learning_rate} | losses)

    run.save()
    envs.close()
    run.close()
    mean_return = float(np.mean(run.returns or [math.nan]))
    return {"run_dir": str(run.path), "global_step": run.update * args.batch_size, "episodic_return": mean_return}


# ---------------------------------------------------------------------------------------------------------------------
# Here the algorithm ends. What follows keeps files, reads the command line and plays, and changes nothing of it.
# ---------------------------------------------------------------------------------------------------------------------


class InputError(Exception):
    """Something the user gave cannot work: reported in one line, with exit code 2."""


def one_line(error: Exception) -> str:
    """An error's message without line breaks, and without the advice that some libraries append."""
    return textwrap.shorten(str(error) or type(error).__name__, 300)


def keep_freed_memory() -> None:
    """Lets the C library, if it is glibc, keep freed memory for later instead of giving it back to the system.

    A gradient step on images frees and needs again some 100 MB, which the system would hand out in 10,000 page faults.
    """
    with contextlib.suppress(OSError, AttributeError):  # elsewhere than on Linux, or another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks are part of the heap too


def check_args(args: Args) -> None:
    """Raises InputError for the first setting that cannot work."""
    counts = ["num_envs", "num_steps", "num_minibatches", "update_epochs", "checkpoint_interval", "eval_episodes"]
    counts += ["frame_skip", "max_game_frames", "lstm_size"]
    weights = ["seed", "learning_rate", "clip_coef", "ent_coef", "vf_coef", "target_kl", "adam_eps"]
    limits = dict.fromkeys(counts, (1, 2**31 - 1)) | dict.fromkeys(weights, (0, 2**31))
    limits |= {"noop_max": (0, 2**31 - 1), "gamma": (0, 1), "gae_lambda": (0, 1), "max_grad_norm": (0, math.inf)}
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:  # also catches not-a-number
            raise InputError(f"--{name.replace('_', '-')} must be from {low} to {high}, not {value}")
    if args.total_timesteps < args.batch_size:
        raise InputError(f"--total-timesteps {args.total_timesteps} is below one rollout of {args.batch_size} steps")
    if args.num_envs % args.num_minibatches:
        raise InputError(f"{args.num_envs} envs cannot be shared equally by {args.num_minibatches} minibatches, which "
                         "need all steps of an environment together")  # fmt: skip
    if args.norm_adv and not args.norm_adv_per_batch and args.batch_size == args.num_minibatches:
        raise InputError("minibatches of one sample cannot be normalized: lower --num-minibatches or use --no-norm-adv")
    if args.env_backend not in ("auto", "gymnasium", "envpool"):
        raise InputError(f"--env-backend must be auto, gymnasium or envpool, not {args.env_backend}")
    if args.env_backend == "envpool" and args.async_envs:
        raise InputError("--async-envs is for --env-backend gymnasium; EnvPool's environments always run in parallel")
    if args.env_backend == "envpool" and args.capture_video:
        raise InputError("EnvPool cannot record videos: add --env-backend gymnasium")
    if args.compile and not args.evaluate and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise InputError("--compile needs a C++ compiler, for example g++")


class SafeRecordVideo(gym.wrappers.RecordVideo):
    """RecordVideo that gives up recording, not training, when the renderer or the encoder fails."""

    def _attempt(self, method) -> None:
        try:
            method()
        except Exception as error:
            print(f"no more videos, recording failed: {one_line(error)}", file=sys.stderr)
            self.recording, self.recorded_frames, self.episode_trigger = False, [], lambda episode: False

    def _capture_frame(self) -> None:
        self._attempt(super()._capture_frame)

    def stop_recording(self) -> None:
        """Writes the video file, if that is possible."""
        self._attempt(super().stop_recording)


def restore(path: Path, agent: Agent, adam: Adam | None = None) -> dict:
    """Reads checkpoint.pt into the agent and Adam and returns all it holds; raises InputError if it is no good."""
    try:
        state = torch.load(path / "checkpoint.pt", map_location="cpu", weights_only=True)  # cannot run code
        agent.load_state_dict(state["agent"])
        if adam:
            adam.moment1.copy_(state["moment1"])
            adam.moment2.copy_(state["moment2"])
            adam.steps = state["gradient_steps"]
        return state
    except Exception as error:  # a broken file makes torch.load raise anything
        raise InputError(f"cannot use {path / 'checkpoint.pt'}: {type(error).__name__}, {one_line(error)}") from error


class Run:
    """What a run has besides the algorithm: its directory, metrics, checkpoints, progress bar and signals."""

    def __init__(self, args: Args, agent: Agent, adam: Adam):
        """Creates the run directory or, with --resume, restores agent, adam and metrics from its last checkpoint."""
        self.args, self.agent, self.adam, self.wandb, self.stopped_by = args, agent, adam, None, None
        self.update, self.seconds, self.returns, metrics_bytes = 0, 0.0, deque(maxlen=100), 0
        name, now = re.sub(r"[^\w.-]", "-", f"{args.env_id}__{args.exp_name}__{args.seed}"), int(time.time())
        while (Path(args.runs_dir) / f"{name}__{now}").exists():  # two runs in one second
            now += 1
        self.path = Path(args.resume or Path(args.runs_dir) / f"{name}__{now}")
        if args.resume:
            state = restore(self.path, agent, adam)
            self.update, self.seconds, metrics_bytes = state["update"], state["seconds"], state["metrics_bytes"]
            self.returns.extend(state["returns"])
            torch.set_rng_state(state["rng"])
        try:
            self.path.mkdir(parents=True, exist_ok=bool(args.resume))
            self.metrics = open(self.path / "metrics.jsonl", "ab", buffering=0)  # unbuffered: no kill can tear a line
            # What came after the checkpoint is going to be done again.
            self.metrics.seek(self.metrics.truncate(min(metrics_bytes, self.metrics.tell())))
            if args.track:
                self.start_tracking()
            self.write("config.json", json.dumps(asdict(args) | {"resume": None}, indent=2).encode())
        except OSError as error:
            raise InputError(f"cannot write the run directory: {error}") from error
        self.first_step, self.start, terminal = self.update * args.batch_size, time.time(), sys.stderr.isatty()
        line = None if terminal else "{desc}: {n_fmt} of {total_fmt} steps, {rate_fmt}{postfix}, {remaining} left\n"
        self.bar = tqdm(total=args.num_updates * args.batch_size, initial=self.first_step, desc=args.env_id,
                        unit=" steps", bar_format=line, mininterval=0.1 if terminal else 10)  # fmt: skip
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}

    def start_tracking(self) -> None:
        """Starts the run at Weights & Biases, or goes on with it; raises InputError if that is impossible."""
        try:
            import wandb

            name = self.path.resolve().name
            self.wandb = wandb.init(project=self.args.wandb_project_name, entity=self.args.wandb_entity, dir=self.path,
                                    name=name, id=name, resume="allow", config=asdict(self.args))  # fmt: skip
        except Exception as error:
            if not self.args.resume:
                shutil.rmtree(self.path)
                with contextlib.suppress(OSError):
                    self.path.parent.rmdir()  # if it is empty
            raise InputError(f"--track: {one_line(error)}") from error
        self.wandb.define_metric("*", step_metric="global_step")

    def write(self, name: str, contents: bytes) -> None:
        """Replaces a file of the run at once: if a kill or a full disk cuts the writing short, the old file stays."""
        (self.path / f"{name}.tmp").write_bytes(contents)
        os.replace(self.path / f"{name}.tmp", self.path / name)

    def stop(self, number: int, frame) -> None:
        """Handles a signal: training ends after this update. Ctrl-C after that kills."""
        self.stopped_by = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def log(self, global_step: int, values: dict[str, float]) -> None:
        """Appends a line to metrics.jsonl; not-a-number becomes null, for which JSON has a word."""
        row = {"global_step": global_step, "wall_time": round(self.seconds + time.time() - self.start, 3)}
        row |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.metrics.write((json.dumps(row) + "\n").encode())
        if self.wandb:
            self.wandb.log(row)

    def end_update(self, rollout: Rollout, values: dict[str, float]) -> None:
        """Logs an update and the episodes that ended in it, shows progress, and saves a checkpoint when it is time."""
        for step, episodic_return, length in rollout.episodes:
            self.returns.append(episodic_return)
            global_step = self.update * self.args.batch_size + (step + 1) * self.args.num_envs
            self.log(global_step, {"charts/episodic_return": episodic_return, "charts/episodic_length": length})
        self.update += 1
        global_step = self.update * self.args.batch_size
        values["charts/SPS"] = int((global_step - self.first_step) / (time.time() - self.start))
        self.log(global_step, values)
        self.bar.set_postfix_str(f"mean return {np.mean(self.returns or [math.nan]):.1f}", refresh=False)
        self.bar.update(self.args.batch_size)
        if self.update % self.args.checkpoint_interval == 0:
            self.save()

    def save(self) -> None:
        """Writes checkpoint.pt: tensors and numbers only, so that loading it cannot run code."""
        contents = io.BytesIO()
        torch.save({
            "agent": self.agent.state_dict(), "moment1": self.adam.moment1, "moment2": self.adam.moment2,
            "gradient_steps": self.adam.steps, "update": self.update, "rng": torch.get_rng_state(),
            "returns": list(self.returns), "metrics_bytes": self.metrics.tell(),
            "seconds": self.seconds + time.time() - self.start,
        }, contents)  # fmt: skip
        self.write("checkpoint.pt", contents.getvalue())

    def close(self) -> None:
        """Ends the progress bar, the handling of signals and the tracking, which then gets the videos too."""
        self.bar.close()
        self.metrics.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.wandb:
            self.wandb.save(str(self.path / "videos/*.mp4"), base_path=self.path)
            self.wandb.finish()


def evaluate(args: Args) -> list[float]:
    """Plays eval_episodes episodes with a trained agent, prints and returns their returns."""
    args = replace(args, env_backend="gymnasium" if args.capture_video else args.env_backend)
    check_args(args)
    path = Path(args.evaluate)
    videos = path / "videos" if args.capture_video else None
    envs = make_envs(replace(args, num_envs=1), videos, lambda episode: episode < args.eval_episodes)
    args = effective_args(args, envs)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args)
    restore(path, agent)
    torch.manual_seed(args.seed)
    obs, _ = envs.reset(seed=args.seed)
    state, returns = torch.zeros(2, 1, args.lstm_size), []
    dtype = torch.uint8 if is_image(envs.single_observation_space) else torch.float32
    while len(returns) < args.eval_episodes:
        obs = torch.as_tensor(normalize_obs(obs, agent.obs_stats, args, update=False), dtype=dtype)
        with torch.inference_mode():
            policy, _, state = agent.step(obs, state)
            noise = agent.actor.noise(1) * (not args.eval_deterministic)
            actions = agent.actor.sample(policy, noise).numpy()
        actions = environment_actions(actions, envs.single_action_space, args)
        obs, _, terminations, truncations, infos = envs.step(actions)
        if args.reset_lstm_state and (terminations | truncations).any():
            state = torch.zeros_like(state)
        if "final_info" in infos and infos["final_info"].get("_episode", [False])[0]:
            returns.append(float(infos["final_info"]["episode"]["r"][0]))
    envs.close()
    print(f"{args.env_id}: return {np.mean(returns):.1f} +- {np.std(returns):.1f} over {len(returns)} episodes")
    return returns


def parse_args(argv: list[str] | None = None) -> Args:
    """Reads the command line; with --resume or --evaluate the defaults are that run's settings."""

    def parse(default: Args) -> Args:
        box = io.StringIO()
        try:
            with contextlib.redirect_stderr(box):
                return tyro.cli(Args, args=argv, default=default)
        except SystemExit as stop:
            if not stop.code:  # --help
                raise
            # tyro draws a box: what is wrong, a ruler, and then the flags that may have been meant.
            lines = "\n".join(line.strip("│ ") for line in box.getvalue().splitlines()[1:])
            problem, _, rest = lines.partition("───")
            similar = " or ".join(line.split()[0] for line in rest.splitlines() if line.startswith("--"))
            raise InputError(" ".join(problem.split()) + (f" (see {similar})" if similar else "")) from None

    args = parse(Args())
    if args.resume and args.evaluate:
        raise InputError("--resume and --evaluate exclude each other")
    if run_dir := args.resume or args.evaluate:
        try:
            saved = Args(**json.loads((Path(run_dir) / "config.json").read_text()))
            for field in fields(Args):
                value, kind = getattr(saved, field.name), field.type
                if not isinstance(value, kind | int if "float" in str(kind) else kind):
                    raise TypeError(f"{field.name} is {value!r}")
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{run_dir} is not a run directory of {SCRIPT}.py: {error}") from error
        args = parse(replace(saved, capture_video=saved.capture_video and not args.evaluate))
        if args.resume and args.batch_size != saved.batch_size:
            raise InputError("--num-envs x --num-steps cannot change with --resume: updates would not match steps")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, also after a signal; 2 for bad input; 1 for other failures."""
    sys.path.append(os.getcwd())  # where --env-id my_module:MyEnv may find my_module.py
    try:
        args = parse_args(argv)
        if args.evaluate:
            evaluate(args)
        else:
            result = train(args)
            print("{run_dir}: {global_step} steps, mean return {episodic_return:.1f}".format(**result))
            if result["global_step"] < args.num_updates * args.batch_size:
                print(f"stopped by a signal; go on with: python {SCRIPT}.py --resume {result['run_dir']}")
        return 0
    except KeyboardInterrupt:
        return 130
    except (InputError, FloatingPointError, OSError) as error:
        print(f"{SCRIPT}.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1


if __name__ == "__main__":
    sys.exit(main())
