# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "ale-py==0.12.1",
#     "envpool==1.2.5; sys_platform == 'linux'",
#     "gymnasium==1.4.0",
#     "moviepy==2.2.1",
#     "numpy==2.4.6",
#     "opencv-python-headless==5.0.0.93",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
#     "wandb==0.31.0",
# ]
# ///
"""Proximal Policy Optimization (PPO) for Atari games, in one file.

Contains the 9 details for Atari and the 13 core details of "The 37 Implementation Details of PPO" (Huang et al., ICLR
Blog Track 2022) as the official code (openai/baselines ppo2, commit ea25b9e) has them. A tag such as [atari-3] or
[core-7] stands where that detail happens; [aux-N] are auxiliary details, [extra-N] behaviours of the official code that
the article does not mention. docs/details.md lists them all. The algorithm is by Schulman et al. 2017,
arXiv:1707.06347.

    python ppo_atari.py --compile                               Breakout, 10,000,000 steps
    torchrun --nproc-per-node=2 ppo_atari.py --env-id Pong      the same with the work shared by two processes

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
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.spaces import Box, Discrete
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

SCRIPT = Path(__file__).stem
# [aux-2] torchrun starts WORLD_SIZE processes (ranks) of this script, each with RANK from 0 to WORLD_SIZE - 1. All play
# in environments of their own; the gradient is the mean of all, so that every rank keeps the same parameters.
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

gym.register_envs(ale_py)


@dataclass
class Args:
    """PPO with the 13 core details and the 9 for Atari."""

    # The run
    exp_name: str = SCRIPT  # name of the experiment, part of the run directory's name
    seed: int = 1  # seeds the network, the action noise and the shuffles; environment i gets seed + i [extra-35]
    torch_deterministic: bool = True  # use cuDNN's deterministic algorithms
    cuda: bool = True  # use the GPU if there is one
    compile: bool = False  # compile the gradient step: some seconds of start-up, then a faster update
    cudagraphs: bool = False  # on a GPU, replay recorded kernels instead of launching them one by one
    amp: bool = False  # compute in bfloat16 where that is safe: faster on processors that have it
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
    env_id: str = "Breakout"  # a game; Breakout-v5, ALE/Breakout-v5 and BreakoutNoFrameskip-v4 all mean Breakout
    env_kwargs: str = "{}"  # arguments for the environment's constructor, as a JSON object
    env_backend: str = "envpool"  # envpool: many environments on several cores, Linux only; or gymnasium
    async_envs: bool = False  # with gymnasium, a process for each environment
    noop_max: int = 30  # no-ops at the start of a game, 1 to this many [atari-1]
    frame_skip: int = 4  # frames that an action is repeated for [atari-2]
    episodic_life: bool = True  # a lost life ends the episode, though not the game [atari-3]
    fire_reset: bool = True  # press FIRE at the start of an episode in games that have it [atari-4]
    area_resize: bool = True  # shrink images by averaging areas; off: by bilinear interpolation [atari-5] [extra-25]
    clip_reward: bool = True  # learn from the sign of the reward [atari-6]
    frame_stack: int = 4  # frames in one observation [atari-7]
    zero_stack: bool = True  # an episode's first frames are stacked on black ones; off: on copies [extra-24]
    scale_images: bool = True  # divide pixels by 255 [atari-9]
    max_game_frames: int = 400_000  # a game is cut off after this many frames [extra-28]

    # The algorithm
    total_timesteps: int = 10_000_000  # steps of all environments together, floored to whole rollouts [extra-11]
    learning_rate: float = 2.5e-4  # learning rate of Adam, at the start
    num_envs: int = 8  # environments stepped together [core-1]
    num_steps: int = 128  # steps of each environment in one rollout [core-1]
    anneal_lr: bool = True  # lower the learning rate linearly to 0 [core-4]
    gamma: float = 0.99  # discount factor, 0 to 1
    gae: bool = True  # generalized advantage estimation; off: n-step returns to the rollout's end (lambda 1) [core-5]
    gae_lambda: float = 0.95  # from 0 (one-step TD error) to 1 (Monte Carlo) [core-5]
    bootstrap_truncated: bool = False  # a time limit is no end: add gamma * V(last observation) there [extra-14]
    num_minibatches: int = 4  # equal parts that a rollout is cut into [core-6]
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
    shared_network: bool = True  # policy and value function share their hidden layers [atari-8] [core-13]

    @property
    def batch_size(self) -> int:
        """Samples in one rollout."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """[extra-11] Only whole rollouts count: 10,000,000 steps are 9,765 updates, 9,999,360 steps."""
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


class EnvpoolVectorEnv(gym.vector.VectorEnv):
    """EnvPool's environments, which C++ threads step in parallel, with the interface of SameStepVectorEnv.

    EnvPool has the wrappers above built in. docs/backends.md says where it differs: mainly, after a lost life it does 0
    to 29 no-ops and FIRE, a frame each, where the official code does a no-op, FIRE and action 2 for four frames each.
    """

    def __init__(self, args: Args, game: str):
        import envpool

        kwargs = {
            "seed": args.seed % 2**31, "noop_max": max(args.noop_max, 1), "frame_skip": args.frame_skip,
            "episodic_life": args.episodic_life, "use_fire_reset": args.fire_reset, "reward_clip": args.clip_reward,
            "use_inter_area_resize": args.area_resize, "max_episode_steps": args.max_game_frames // args.frame_skip,
        } | json.loads(args.env_kwargs)  # fmt: skip
        kwargs |= {"stack_num": 1, "num_envs": args.num_envs, "batch_size": args.num_envs}
        self.make_pool = lambda **changed: envpool.make_gymnasium(f"{game}-v5", **kwargs | changed)
        self.pool, self.num_envs = self.make_pool(), args.num_envs
        if self.pool.observation_space.shape != (1, 84, 84):
            raise InputError(f"the game must show 84 x 84 gray pixels, not {self.pool.observation_space}")
        self.single_observation_space = Box(0, 255, (84, 84), np.uint8)
        self.single_action_space = self.pool.action_space
        self.returns, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, int)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Restarts all environments; EnvPool takes a seed only when environments are made."""
        self.pool = self.make_pool(seed=seed % 2**31) if seed is not None else self.pool
        self.returns[:], self.lengths[:] = 0, 0
        return self.pool.reset()[0][:, 0], {}

    def step(self, actions: np.ndarray):
        """Steps all environments with actions [N]; returns what gymnasium.vector.VectorEnv.step documents."""
        obs, rewards, terminations, truncations, info = self.pool.step(actions)
        self.returns += info["reward"]  # before clipping
        self.lengths += 1
        infos, ended = {}, np.flatnonzero(terminations | truncations)
        if len(ended):
            infos["final_obs"] = obs[:, 0].copy()
            games = info["terminated"].astype(bool) | truncations  # the others have only lost a life
            episode = {"r": self.returns.copy(), "l": self.lengths.copy()}
            infos["final_info"] = {"episode": episode, "_episode": games}
            self.returns[games], self.lengths[games] = 0, 0
            # [core-1] EnvPool restarts an environment in its next step, whose action it ignores. One more call for just
            # these environments does that within this step, so that no such transition gets into the rollout.
            obs[ended] = self.pool.step(actions[ended], ended.astype(np.int32))[0]
        return obs[:, 0], rewards, terminations, truncations, infos


def find_game(env_id: str) -> str:
    """Breakout, given Breakout, Breakout-v5, ALE/Breakout-v5 or BreakoutNoFrameskip-v4; InputError for other ids."""
    games = [env_id[4:-3] for env_id in gym.registry if re.fullmatch(r"ALE/\w+-v5", env_id)]
    name = re.sub(r"^ALE/|(-v5|NoFrameskip-v4)$", "", env_id)
    if name in games:
        return name
    if (plain := re.sub(r"(Deterministic|NoFrameskip)?-v\d+$", "", name)) in games:
        raise InputError(f"{env_id} skips frames or repeats actions by itself, which this script does: use {plain}")
    similar = " or ".join(difflib.get_close_matches(name.capitalize(), games))
    raise InputError(f"there is no Atari game {env_id}" + f"; did you mean {similar}?" * bool(similar))


def make_envs(args: Args, video_folder: Path | None = None, video_trigger=None) -> gym.vector.VectorEnv:
    """Creates num_envs environments that are stepped together; raises InputError if that is impossible.

    Their observations are single frames [84, 84]; collect_rollout() stacks them.
    """
    game = find_game(args.env_id)

    def make_env(index: int) -> gym.Env:
        if args.async_envs and multiprocessing.parent_process() and os.name == "posix":
            os.setpgid(0, 0)  # signals to the whole group, such as Ctrl-C, are for the main process to act on
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner
        # The official code's games are cut off at 400,000 frames, those registered in gymnasium at 108,000. [extra-28]
        kwargs = {"frameskip": 1, "repeat_action_probability": 0.0, "max_num_frames_per_episode": args.max_game_frames}
        kwargs |= json.loads(args.env_kwargs)
        record = video_folder and index == 0
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
        env = WarpFrame(env, cv2.INTER_AREA if args.area_resize else cv2.INTER_LINEAR)
        return ClipReward(env) if args.clip_reward else env

    try:
        if args.env_backend == "envpool":
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


def stack_frames(stacks: torch.Tensor, frames: np.ndarray, first: np.ndarray, args: Args) -> torch.Tensor:
    """Stacks [N, frame_stack, 84, 84] of bytes with one more frame each, and the oldest left out (vec_frame_stack.py).

    frames [N, 84, 84] are the new ones; first [N] says which of them begin an episode.
    """
    # [atari-7] One image shows where things are; several show how they move as well.
    stacks = torch.cat([stacks[:, 1:], torch.from_numpy(frames).to(stacks.device).unsqueeze(1)], 1)
    # [extra-24] Nothing of the last episode remains, black frames stand for what was before the first one. EnvPool and
    # gymnasium's FrameStackObservation would repeat it.
    for env in np.flatnonzero(first):
        stacks[env, :-1] = 0 if args.zero_stack else stacks[env, -1]
    return stacks


def layer_init(layer: nn.Linear | nn.Conv2d, gain: float, args: Args) -> nn.Linear | nn.Conv2d:
    """Initializes a layer like the official code (a2c/utils.py) and returns it."""
    if args.orthogonal_init:
        # [core-2] Orthogonal weights let signals and gradients pass through the layers with their scale unchanged.
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return layer


class NatureCNN(nn.Module):
    """Images [B, frame_stack, 84, 84] -> features [B, 512] (common/models.py; Mnih et al. 2015)."""

    def __init__(self, args: Args):
        super().__init__()
        shapes = (args.frame_stack, 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1)
        self.convolutions = nn.ModuleList(layer_init(nn.Conv2d(*shape), math.sqrt(2), args) for shape in shapes)
        self.linear = layer_init(nn.Linear(64 * 7 * 7, 512), math.sqrt(2), args)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Three convolutions and a linear layer, a ReLU after each."""
        for convolution in self.convolutions:
            x = F.relu(convolution(x))
        return F.relu(self.linear(x.permute(0, 2, 3, 1).flatten(1)))  # channels last [extra-18]


class Agent(nn.Module):
    """A policy (actor) and a value function (critic) on the features of one convolutional network."""

    def __init__(self, observation_space: Box, action_space: Discrete, args: Args):
        super().__init__()
        self.args = args
        # [atari-8] What is worth seeing is the same for both, and the images are most of the work.
        self.network = NatureCNN(args)
        self.critic_network = None if args.shared_network else NatureCNN(args)
        # [core-2] The small gain makes the first policy nearly uniform, so that every action gets tried.
        self.actor = layer_init(nn.Linear(512, int(action_space.n)), 0.01, args)
        self.critic = layer_init(nn.Linear(512, 1), 1.0, args)

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Bytes [B, frame_stack, 84, 84] -> logits [B, actions] of a categorical distribution, values [B]."""
        # Observations are kept as bytes; only what is computed with becomes four times as large.
        x = obs.to(memory_format=torch.channels_last).float()
        x = x / 255 if self.args.scale_images else x  # [atari-9] The initialization expects inputs of about that size.
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.args.amp):
            features = self.network(x)
            critic_features = self.critic_network(x) if self.critic_network else features
            logits, values = self.actor(features), self.critic(critic_features)
        return logits.float(), values.float().squeeze(-1)


def log_probabilities(logits: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of all actions, shaped like the logits [..., actions], and of the given ones, shaped [...]."""
    all_log_probs = logits.log_softmax(-1)
    return all_log_probs, all_log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)


class Rollout(NamedTuple):
    """num_steps = T steps in each of num_envs = N environments."""

    obs: torch.Tensor  # [T+1, N, frame_stack, 84, 84] uint8; the last row is where the next rollout goes on
    actions: torch.Tensor  # [T, N] int64
    logits: torch.Tensor  # [T, N, actions] float32: what the policy said
    values: torch.Tensor  # [T+1, N] float32: what the value function said
    rewards: np.ndarray  # [T, N] float32
    dones: np.ndarray  # [T, N] bool: this step ended its episode
    truncated: list[tuple[int, int, torch.Tensor]]  # step, environment and last observation of games cut by a limit
    episodes: list[tuple[int, float, int]]  # step, return and length of the games that ended


@torch.no_grad()
def collect_rollout(policy: Callable, envs: gym.vector.VectorEnv, next_obs: torch.Tensor, args: Args) -> Rollout:
    """Acts for num_steps steps, starting from the observations next_obs [N, ...] (ppo2/runner.py)."""
    logits_shape, device = (args.num_steps, args.num_envs, int(envs.single_action_space.n)), next_obs.device
    obs = torch.empty((args.num_steps + 1, *next_obs.shape), dtype=torch.uint8, device=device)
    actions = torch.empty((args.num_steps, args.num_envs), dtype=torch.int64, device=device)
    logits, values = torch.empty(logits_shape, device=device), torch.empty(len(obs), args.num_envs, device=device)
    rewards = np.empty((args.num_steps, args.num_envs), np.float32)
    dones = np.empty((args.num_steps, args.num_envs), bool)
    truncated, episodes = [], []
    # The argmax of logits + Gumbel noise is a sample of their categorical distribution (the official code draws it so
    # too). One large draw for the whole rollout is much faster than one for each step.
    gumbel = -torch.empty(logits_shape).exponential_().log().to(device)

    obs[0] = next_obs
    for step in range(args.num_steps):
        logits[step], values[step] = policy(obs[step])
        actions[step] = (logits[step] + gumbel[step]).argmax(-1)
        frames, rewards[step], terminations, truncations, infos = envs.step(actions[step].cpu().numpy())
        dones[step] = terminations | truncations
        obs[step + 1] = stack_frames(obs[step], frames, dones[step], args)
        if "final_info" in infos:
            # A lost life ends an episode of learning; what is logged are whole games.
            for env in np.flatnonzero(infos["final_info"].get("_episode", [])):
                episode = infos["final_info"]["episode"]
                episodes.append((step, float(episode["r"][env]), int(episode["l"][env])))
            for env in np.flatnonzero(truncations & ~terminations):
                last_frame = np.asarray(infos["final_obs"][env])[None]
                last_obs = stack_frames(obs[step, env : env + 1], last_frame, np.zeros(1, bool), args)
                truncated.append((step, int(env), last_obs))
    values[-1] = policy(obs[-1])[1]
    return Rollout(obs, actions, logits, values, rewards, dones, truncated, episodes)


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


def average(tensor: torch.Tensor) -> torch.Tensor:
    """Replaces a tensor by its mean over all ranks, and returns it."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
        tensor /= WORLD_SIZE
    return tensor


def normalize(advantages: torch.Tensor, args: Args) -> torch.Tensor:
    """Advantages with mean 0 and standard deviation 1 along the last dimension (ppo2/model.py), over all ranks."""
    mean = average(advantages.mean(-1, keepdim=True))
    variance = average((advantages - mean).square().mean(-1, keepdim=True))
    # [extra-3] The population's deviation, which divides by n; PyTorch's default divides by n - 1.
    samples = advantages.shape[-1] * WORLD_SIZE
    std = (variance if args.population_std else variance * samples / (samples - 1)).sqrt()
    return (advantages - mean) / (std + 1e-8)


def ppo_loss(
    logits: torch.Tensor, values: torch.Tensor, actions: torch.Tensor, old_log_probs: torch.Tensor,
    advantages: torch.Tensor, returns: torch.Tensor, old_values: torch.Tensor, clip_coef: float, args: Args,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The loss of a minibatch of B samples (ppo2/model.py).

    logits [B, actions] and values [B] are the network's present output, all other tensors [B] come from the rollout.
    Returns the loss [], its terms [3] (policy loss, value loss, entropy) and the log-ratios [B] of new to old policy.
    """
    all_log_probs, log_probs = log_probabilities(logits, actions)
    log_ratio = log_probs - old_log_probs
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
    entropy = -(all_log_probs.exp() * all_log_probs).sum(-1).mean()
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
        self.tensors = list(agent.parameters())
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
    """Improves the agent on one minibatch (obs [B, ...], then what ppo_loss takes); returns loss terms, log-ratios."""
    obs, *others = minibatch
    loss, terms, log_ratio = ppo_loss(*agent(obs), *others, clip_coef, args)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, adam.tensors)])
    with torch.no_grad():
        gradient = average(gradient)  # [aux-2] one message for all parameters
        # [core-11] One norm over all parameters together: clipping shortens the gradient but keeps its direction.
        # torch's clip_grad_norm_ adds 1e-6 to the norm, this does not. [extra-5]
        gradient *= (args.max_grad_norm / gradient.norm()).clamp(max=1)
        adam.step(gradient, step_size, epsilon)
    return terms, log_ratio


class CudaGraph:
    """A function of tensors, recorded once as a CUDA graph and then replayed without launching its kernels singly."""

    def __init__(self, function: Callable):
        self.function, self.calls = function, 0

    def __call__(self, *inputs):
        """Calls function; the first calls are ordinary ones, in which libraries choose and compile their kernels."""
        self.calls += 1
        if self.calls < 4:
            return self.function(*inputs)
        tensors = [x for x in tree_leaves(inputs) if isinstance(x, torch.Tensor)]
        if self.calls == 4:
            # The graph always reads the same memory, to which inputs are copied, and writes the same.
            inputs = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, inputs)
            self.inputs = [x for x in tree_leaves(inputs) if isinstance(x, torch.Tensor)]
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = self.function(*inputs)
        for own, given in zip(self.inputs, tensors):
            own.copy_(given, non_blocking=True)
        self.graph.replay()
        return tuple(output.clone() for output in self.outputs)


def train(args: Args) -> dict:
    """Trains an agent; returns {"run_dir", "global_step", "episodic_return": mean of the last 100 episodes}.

    Raises InputError for settings that cannot work, FloatingPointError when the training diverged.
    """
    check_args(args)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cpu")
    if args.cuda and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    # [aux-2] K ranks with num_envs / K environments each do what one rank with num_envs environments does.
    local_envs = args.num_envs // WORLD_SIZE
    local = replace(args, num_envs=local_envs, seed=args.seed + RANK * local_envs)
    envs = make_envs(local)
    keep_freed_memory()
    agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(device)
    adam = Adam(agent)
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    run = Run(args, agent, adam)
    if args.amp and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        print("this processor has no instructions for bfloat16: --amp will be slower than without", file=sys.stderr)
    if WORLD_SIZE > 1:
        paths = [run.path]
        dist.broadcast_object_list(paths)
        run.path = paths[0]
        dist.broadcast(adam.parameters, 0)
        if RANK > 0:  # noise and shuffles of its own
            torch.manual_seed((args.seed + run.first_step) * WORLD_SIZE + RANK)
    if args.capture_video and RANK == 0:
        envs.close()
        envs = make_envs(local, run.path / "videos")
    improve, policy = gradient_step, agent
    if args.compile:
        # Forward pass, backward pass and Adam become one compiled function. All minibatches have the same shape, so
        # that the checks before each call can be left out; reset() forgets what another train() has compiled.
        torch._dynamo.reset()
        torch._dynamo.config.trace_autograd_ops = True
        options = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe, "cpp_wrapper": device.type == "cpu"}
        improve = torch.compile(gradient_step, fullgraph=True, dynamic=False, options=options)
        if device.type == "cuda":  # on the CPU, acting is no faster when compiled
            policy = torch.compile(agent, fullgraph=True, dynamic=False, options=options)
    if args.cudagraphs and device.type == "cuda":
        improve, policy = CudaGraph(improve), CudaGraph(policy)

    # [extra-35] Environment i is seeded with this + i. A resumed run does not repeat its first episodes.
    frames, _ = envs.reset(seed=local.seed + run.first_step)
    no_frames = torch.zeros((local_envs, args.frame_stack, *frames.shape[1:]), dtype=torch.uint8, device=device)
    next_obs, stopped = stack_frames(no_frames, frames, np.ones(local_envs, bool), args), False
    run.save()
    while run.update < args.num_updates and not stopped:
        # [core-4] The steps shrink linearly; the factor of the last update is 1/num_updates, not 0. [extra-10]
        remaining = 1 - run.update / args.num_updates
        learning_rate = args.learning_rate * (remaining if args.anneal_lr else 1)
        # [aux-1] So may the clip range; in the official code it is constant. [extra-9]
        clip_coef = args.clip_coef * (remaining if args.anneal_clip else 1)

        # [core-1] Rollouts have a fixed length; the next one goes on where this one stops, in the middle of episodes.
        rollout = collect_rollout(policy, envs, next_obs, local)
        obs, actions, logits, values = rollout[:4]
        next_obs = obs[-1]
        rewards, dones = (torch.from_numpy(array).to(device) for array in rollout[4:6])
        with torch.no_grad():
            _, log_probs = log_probabilities(logits, actions)
            # [extra-14] The official code takes a time limit for an end; this adds the value of what was cut off.
            for step, env, last_obs in rollout.truncated if args.bootstrap_truncated else []:
                rewards[step, env] += args.gamma * agent(last_obs)[1].squeeze(0)
            advantages, returns = compute_gae(rewards, values, dones, args.gamma, args.gae_lambda if args.gae else 1.0)
        advantages = returns - values[:-1]  # [extra-4]
        if args.norm_adv and args.norm_adv_per_batch:
            advantages = normalize(advantages.flatten(), args)
        batch = [obs[:-1], actions, log_probs, advantages, returns, values[:-1]]
        batch = [tensor.reshape(local.batch_size, *tensor.shape[2:]) for tensor in batch]

        terms, log_ratios = [], []
        for epoch in range(args.update_epochs):
            # [core-6] Each epoch shuffles the samples anew and uses every one of them once. [extra-12]
            order = torch.randperm(local.batch_size)
            if args.minibatch_replacement:
                order = torch.randint(local.batch_size, (local.batch_size,))
            order = order.view(args.num_minibatches, -1).to(device, non_blocking=True)
            minibatches = [tensor[order] for tensor in batch]
            # [core-7] Advantages on one scale let one learning rate fit rewards of any scale.
            if args.norm_adv and not args.norm_adv_per_batch:
                minibatches[3] = normalize(minibatches[3], args)
            for minibatch in zip(*minibatches):
                coefficients = (clip_coef, *adam.coefficients(learning_rate, args))
                if args.compile or args.cudagraphs:  # as tensors, for a number that changes would be compiled anew
                    coefficients = torch.tensor(coefficients).to(device, non_blocking=True).unbind()
                minibatch_terms, log_ratio = improve(agent, adam, minibatch, *coefficients, args)
                terms.append(minibatch_terms)
                log_ratios.append(log_ratio)
            # [aux-3] The policy is then far enough from the one that collected the data.
            if args.target_kl is not None:
                change = policy_change(torch.stack(log_ratios[-args.num_minibatches :]), clip_coef)
                if average(torch.tensor(change["losses/approx_kl"], device=device)) > args.target_kl:
                    break

        # [core-12] Means over all minibatches of the update, each taken before its own gradient step. [extra-8]
        names = ("losses/policy_loss", "losses/value_loss", "losses/entropy")
        losses = dict(zip(names, torch.stack(terms).mean(0).tolist(), strict=True))
        losses |= policy_change(torch.stack(log_ratios), clip_coef)
        losses = dict(zip(losses, average(torch.tensor(list(losses.values()), device=device)).tolist()))
        if not all(map(math.isfinite, losses.values())) or not adam.parameters.isfinite().all():
            run.close()
            raise FloatingPointError(f"update {run.update + 1} is not finite; {run.path} keeps the last checkpoint")
        left, total = (average((x - average(x.mean())).square().mean()) for x in (returns - values[:-1], returns))
        losses["losses/explained_variance"] = (1 - left / total).item()
        episodes, stopped = rollout.episodes, run.stopped_by is not None
        if WORLD_SIZE > 1:  # rank 0 logs the games of all; all stop after the same update
            ranks = [None] * WORLD_SIZE
            dist.all_gather_object(ranks, (episodes, stopped))
            episodes, stopped = sorted(sum((rank[0] for rank in ranks), [])), any(rank[1] for rank in ranks)
        run.end_update(rollout._replace(episodes=episodes), {"charts/learning_rate": learning_rate} | losses)

    run.save()
    envs.close()
    run.close()
    if WORLD_SIZE > 1:
        del improve, policy  # a recorded graph holds on to the connection of the processes, which then could not end
        dist.destroy_process_group()
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
    counts += ["frame_skip", "frame_stack", "max_game_frames"]
    weights = ["seed", "learning_rate", "clip_coef", "ent_coef", "vf_coef", "target_kl", "adam_eps"]
    limits = dict.fromkeys(counts, (1, 2**31 - 1)) | dict.fromkeys(weights, (0, 2**31))
    limits |= {"noop_max": (0, 2**31 - 1), "gamma": (0, 1), "gae_lambda": (0, 1), "max_grad_norm": (0, math.inf)}
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:  # also catches not-a-number
            raise InputError(f"--{name.replace('_', '-')} must be from {low} to {high}, not {value}")
    if args.total_timesteps < args.batch_size:
        raise InputError(f"--total-timesteps {args.total_timesteps} is below one rollout of {args.batch_size} steps")
    if args.batch_size % args.num_minibatches:
        raise InputError(f"a rollout of {args.num_envs} envs x {args.num_steps} steps = {args.batch_size} samples "
                         f"cannot be cut into {args.num_minibatches} equal minibatches")  # fmt: skip
    if args.norm_adv and not args.norm_adv_per_batch and args.batch_size == args.num_minibatches:
        raise InputError("minibatches of one sample cannot be normalized: lower --num-minibatches or use --no-norm-adv")
    if args.num_envs % WORLD_SIZE or args.batch_size // WORLD_SIZE % args.num_minibatches:
        raise InputError(f"{args.num_envs} envs x {args.num_steps} steps in {args.num_minibatches} minibatches cannot "
                         f"be shared equally by {WORLD_SIZE} processes")  # fmt: skip
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if args.cuda and 0 < torch.cuda.device_count() < local_ranks:
        raise InputError(f"{local_ranks} processes need as many GPUs, not {torch.cuda.device_count()}; or --no-cuda")
    if args.evaluate and WORLD_SIZE > 1:
        raise InputError("--evaluate plays in one process: start it without torchrun")
    if args.env_backend not in ("gymnasium", "envpool"):
        raise InputError(f"--env-backend must be gymnasium or envpool, not {args.env_backend}")
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
            if RANK == 0:  # the other ranks write nothing
                self.path.mkdir(parents=True, exist_ok=bool(args.resume))
            metrics = self.path / "metrics.jsonl" if RANK == 0 else os.devnull
            self.metrics = open(metrics, "ab", buffering=0)  # unbuffered: no kill can tear a line
            # What came after the checkpoint is going to be done again.
            if RANK == 0:
                self.metrics.seek(self.metrics.truncate(min(metrics_bytes, self.metrics.tell())))
            if args.track and RANK == 0:
                self.start_tracking()
            self.write("config.json", json.dumps(asdict(args) | {"resume": None}, indent=2).encode())
        except OSError as error:
            raise InputError(f"cannot write the run directory: {error}") from error
        self.first_step, self.start, terminal = self.update * args.batch_size, time.time(), sys.stderr.isatty()
        line = None if terminal else "{desc}: {n_fmt} of {total_fmt} steps, {rate_fmt}{postfix}, {remaining} left\n"
        self.bar = tqdm(total=args.num_updates * args.batch_size, initial=self.first_step, desc=args.env_id,
                        unit=" steps", bar_format=line, mininterval=0.1 if terminal else 10,
                        disable=RANK > 0)  # fmt: skip
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
        if RANK > 0:
            return
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
    """Plays eval_episodes games with a trained agent, prints and returns their returns."""
    args = replace(args, env_backend="gymnasium" if args.capture_video else args.env_backend)
    check_args(args)
    path = Path(args.evaluate)
    videos = path / "videos" if args.capture_video else None
    envs = make_envs(replace(args, num_envs=1), videos, lambda episode: episode < args.eval_episodes)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args)
    restore(path, agent)
    torch.manual_seed(args.seed)
    frames, _ = envs.reset(seed=args.seed)
    obs = stack_frames(torch.zeros((1, args.frame_stack, 84, 84), dtype=torch.uint8), frames, np.ones(1, bool), args)
    returns = []
    while len(returns) < args.eval_episodes:
        with torch.inference_mode():
            policy = torch.distributions.Categorical(logits=agent(obs)[0])
            action = policy.mode if args.eval_deterministic else policy.sample()
        frames, _, terminations, truncations, infos = envs.step(action.numpy())
        obs = stack_frames(obs, frames, terminations | truncations, args)
        if "final_info" in infos and infos["final_info"].get("_episode", [False])[0]:
            returns.append(float(infos["final_info"]["episode"]["r"][0]))
    envs.close()
    print(f"{args.env_id}: return {np.mean(returns):.1f} +- {np.std(returns):.1f} over {len(returns)} games")
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
            if RANK == 0:
                print("{run_dir}: {global_step} steps, mean return {episodic_return:.1f}".format(**result))
            if RANK == 0 and result["global_step"] < args.num_updates * args.batch_size:
                print(f"stopped by a signal; go on with: python {SCRIPT}.py --resume {result['run_dir']}")
        return 0
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        if WORLD_SIZE == 1 or not re.search("gloo|nccl", str(error), re.IGNORECASE):
            raise
        print(f"{SCRIPT}.py: error: rank {RANK} lost another rank: {one_line(error)}", file=sys.stderr)
        return 1
    except (InputError, FloatingPointError, OSError) as error:
        print(f"{SCRIPT}.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1


if __name__ == "__main__":
    sys.exit(main())
