# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "envpool==1.2.5; sys_platform == 'linux'",
#     "gymnasium==1.4.0",
#     "numpy==2.4.6",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
#     "wandb==0.31.0",
# ]
# ///
"""Proximal Policy Optimization (PPO) for Atari games, on several GPUs, in one file.

Contains the 9 details for Atari and the 13 core details of "The 37 Implementation Details of PPO" (Huang et al., ICLR
Blog Track 2022) as the official code (openai/baselines ppo2, commit ea25b9e) has them. A tag such as [atari-3] or
[core-7] stands where that detail happens; [aux-N] are auxiliary details, [extra-N] behaviours of the official code that
the article does not mention. docs/details.md lists them all. The algorithm is by Schulman et al. 2017,
arXiv:1707.06347.

    torchrun --nproc-per-node=2 ppo_atari_multigpu.py --env-id Pong

torchrun starts several processes, which share the work of ppo_atari_envpool.py: each plays in a part of the
environments and learns from what it has seen there, and the gradients are averaged [aux-2]. Without torchrun it is
ppo_atari_envpool.py, and `diff` shows what is new. train() is the algorithm; what it calls stands above it, and what
has nothing to do with learning below.
"""

import contextlib
import ctypes
import difflib
import functools
import importlib.util
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import typing
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, make_dataclass, replace
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training starts, Ctrl-C just ends the program

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
SIGNALS = []  # those that came: training then ends after the present update


@dataclass
class AlgorithmArgs:
    """How to learn."""

    total_timesteps: float = 10_000_000  # steps of all environments together, floored to whole rollouts [extra-11]
    learning_rate: float = 2.5e-4  # learning rate of Adam, at the start
    num_envs: int = 8  # environments of all processes together [core-1]
    num_steps: int = 128  # steps of each environment in one rollout [core-1]
    anneal_lr: bool = True  # lower the learning rate linearly to 0 [core-4]
    gamma: float = 0.99  # discount factor, 0 to 1
    gae_lambda: float = 0.95  # GAE: from 0 (one-step TD error) to 1 (returns to the rollout's end) [core-5]
    bootstrap_truncated: bool = False  # at a time limit, add gamma * V(last observation) to the reward [extra-14]
    num_minibatches: int = 4  # equal parts that a rollout is cut into [core-6]
    minibatch_replacement: bool = False  # draw minibatches with replacement, a common mistake [core-6]
    update_epochs: int = 4  # passes over the rollout in one update [core-6]
    norm_adv: bool = True  # normalize the advantages, for each minibatch [core-7]
    norm_adv_per_batch: bool = False  # normalize the advantages once for the whole rollout instead [core-7]
    population_std: bool = True  # normalize by the population's deviation; off: the sample's, as PyTorch does [extra-3]
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
    orthogonal_init: bool = True  # initialize weights orthogonally, biases with 0; off: PyTorch's default [core-2]
    shared_network: bool = True  # let policy and value function share their hidden layers [atari-8] [core-13]


@dataclass
class EnvironmentArgs:
    """What to learn."""

    env_id: str = "Breakout"  # a game; Breakout-v5, ALE/Breakout-v5 and BreakoutNoFrameskip-v4 all mean Breakout
    env_kwargs: str = "{}"  # arguments for EnvPool, as a JSON object
    noop_max: int = 30  # no-ops at the start of a game, 1 to this many [atari-1]
    frame_skip: int = 4  # frames that an action is repeated for [atari-2]
    episodic_life: bool = True  # a lost life ends the episode, though not the game [atari-3]
    fire_reset: bool = True  # press FIRE at the start of an episode in games that have it [atari-4]
    area_resize: bool = True  # shrink images by averaging areas; off: by bilinear interpolation [atari-5] [extra-25]
    clip_reward: bool = True  # learn from the sign of the reward [atari-6]
    frame_stack: int = 4  # frames in one observation [atari-7]
    zero_stack: bool = True  # stack an episode's first frames on black ones; off: on copies [extra-24]
    scale_images: bool = True  # divide pixels by 255 [atari-9]
    max_game_frames: int = 400_000  # a game is cut off after this many frames [extra-28]


@dataclass
class RunArgs:
    """Where to run and what to keep."""

    exp_name: str = SCRIPT  # name of the experiment, part of the run directory's name
    seed: int = 1  # seeds the network, the action noise and the shuffles; environment i gets seed + i [extra-35]
    torch_deterministic: bool = True  # use cuDNN's deterministic algorithms
    cuda: bool = True  # use the GPU if there is one
    compile: bool = False  # compile the gradient step: a minute of start-up, then a faster update
    cudagraphs: bool = False  # on a GPU, replay recorded kernels instead of launching them one by one
    amp: bool = False  # compute the network in bfloat16: faster on processors and GPUs that have it
    track: bool = False  # send the metrics to Weights & Biases as well (WANDB_MODE=offline needs no account)
    wandb_project_name: str = "ppo37"  # project at Weights & Biases
    wandb_entity: str | None = None  # user or team at Weights & Biases
    capture_video: bool = False  # not here: ppo_atari.py --evaluate RUN --capture-video records these runs
    runs_dir: str = "runs"  # where run directories are created
    checkpoint_interval: int = 50  # updates between two checkpoints; a killed run loses at most this much
    resume: str | None = None  # go on with the run in this directory, with its settings (flags given beside it win)
    evaluate: str | None = None  # play episodes with the agent in this run directory instead of training
    eval_episodes: int = 10  # episodes to play with --evaluate
    eval_deterministic: bool = False  # with --evaluate, take the most probable action instead of sampling one
    eval_max_steps: int = 10_000  # with --evaluate, cut an episode off after this many steps


@dataclass
class Args(AlgorithmArgs, EnvironmentArgs, RunArgs):
    """PPO with the 13 core details, the 9 for Atari and several processes."""

    @property
    def batch_size(self) -> int:
        """Samples in one rollout."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """[extra-11] Only whole rollouts count: 10,000,000 steps are 9,765 updates, 9,999,360 steps."""
        return int(self.total_timesteps // self.batch_size)


class EpisodeEnd(NamedTuple):
    """What is known of a game when it ends: with all its lives and with unclipped rewards. [extra-27]"""

    env: int  # index of the environment
    episodic_return: float
    length: int
    last_obs: np.ndarray  # [frame_stack, 84, 84]: what the last step led to, before the next episode's first
    truncated: bool  # cut off by a time limit, and not ended by the game


class EnvpoolEnvironments:
    """N games of EnvPool, whose C++ threads step them in parallel, and which restart by themselves.

    EnvPool has the wrappers of ppo_atari.py built in. docs/backends.md says where it differs: mainly, after a lost life
    it does 0 to 29 no-ops and FIRE, a frame each, where the official code does a no-op, FIRE and action 2 for four
    frames each.
    """

    def __init__(self, args: Args, game: str):
        import envpool

        kwargs = {
            "noop_max": max(args.noop_max, 1),  # [atari-1] Otherwise all games would begin alike.
            "frame_skip": args.frame_skip,  # [atari-2] One decision for four frames; what is seen are the last two.
            "episodic_life": args.episodic_life,  # [atari-3] A lost life ends an episode, though not the game.
            "use_fire_reset": args.fire_reset,  # [atari-4] Some games wait for FIRE.
            "use_inter_area_resize": args.area_resize,  # [atari-5] Gray images of 84 x 84 pixels are enough.
            "reward_clip": False,  # returns are of unclipped rewards
            "max_episode_steps": args.max_game_frames // args.frame_skip,  # [extra-28] Some games might never end.
        } | json.loads(args.env_kwargs)
        if args.evaluate:
            kwargs["max_episode_steps"] = min(kwargs["max_episode_steps"], args.eval_max_steps)
        kwargs |= {"stack_num": 1, "num_envs": args.num_envs, "batch_size": args.num_envs}
        self.make = lambda seed: envpool.make_gymnasium(f"{game}-v5", **kwargs, seed=seed % 2**31)
        self.pool, self.unplayed, self.zero_stack = self.make(args.seed), args.seed, args.zero_stack
        if self.pool.observation_space.shape != (1, 84, 84):
            raise InputError(f"the game must show 84 x 84 gray pixels, not {self.pool.observation_space}")
        self.observation_space = Box(0, 255, (args.frame_stack, 84, 84), np.uint8)
        self.action_space = self.pool.action_space
        self.obs = np.zeros((args.num_envs, *self.observation_space.shape), np.uint8)

    def stack(self, envs, frames: np.ndarray, first: bool) -> None:
        """Adds frames [84, 84] or [n, 84, 84] to the stacks of one or n environments, and drops the oldest.

        first: they begin an episode (vec_frame_stack.py).
        """
        # [atari-7] One image shows where things are; several show how they move as well.
        self.obs[envs, :-1] = self.obs[envs, 1:]
        self.obs[envs, -1] = frames
        if first:
            # [extra-24] Nothing of the last episode remains, black frames stand for what was before the first one.
            # EnvPool and gymnasium's FrameStackObservation would repeat it.
            self.obs[envs, :-1] = 0 if self.zero_stack else np.expand_dims(frames, -3)

    def reset(self, seed: int, first_step: int = 0) -> np.ndarray:
        """Starts a game in each and returns the first observations [N, frame_stack, 84, 84].

        A run that is resumed at first_step does not play its first games again. EnvPool takes a seed only when
        environments are made, and gives environment i seed + i. [extra-35]
        """
        if seed + first_step != self.unplayed:  # what has just been made need not be made again
            self.pool = self.make(seed + first_step)
        self.unplayed = None
        self.stack(slice(None), self.pool.reset()[0][:, 0], first=True)
        self.returns, self.lengths = np.zeros(len(self.obs)), np.zeros(len(self.obs), int)
        return self.obs

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[EpisodeEnd]]:
        """Takes actions [N]; returns the next observations [N, ...], rewards [N], dones [N] and what games ended.

        A lost life is a done, but no game's end. The next step overwrites what this one returned.
        """
        frames, rewards, terminated, truncated, info = self.pool.step(actions)
        self.stack(slice(None), frames[:, 0], first=False)
        dones = terminated | truncated
        # Here an episode is a game, with all its lives and with unclipped rewards. [extra-27]
        self.returns += rewards
        self.lengths += 1
        ends, ended = [], np.flatnonzero(dones)
        for i in np.flatnonzero(info["terminated"].astype(bool) | truncated).tolist():  # others have only lost a life
            ends.append(EpisodeEnd(i, self.returns[i], self.lengths[i], self.obs[i].copy(), not terminated[i]))
            self.returns[i], self.lengths[i] = 0, 0
        if len(ended):
            # [core-1] EnvPool restarts an environment in its next step, whose action it ignores. One more call for just
            # these environments does that within this step, so that no such transition gets into the rollout.
            self.stack(ended, self.pool.step(actions[ended], ended.astype(np.int32))[0][:, 0], first=True)
        return self.obs, rewards, dones, ends

    def close(self) -> None:
        """Nothing: EnvPool ends its threads by itself."""


def find_game(env_id: str) -> str:
    """Breakout, given Breakout, Breakout-v5, ALE/Breakout-v5 or BreakoutNoFrameskip-v4; InputError for other ids."""
    import envpool

    specs = envpool.registration.registry.specs.items()
    games = [name[:-3] for name, (_, kind, _) in specs if kind == "AtariEnvSpec" and name.endswith("-v5")]
    name = re.sub(r"^ALE/|(-v5|NoFrameskip-v4)$", "", env_id)
    if name in games:
        return name
    if (plain := re.sub(r"(Deterministic|NoFrameskip)?-v\d+$", "", name)) in games:
        raise InputError(f"{env_id} skips frames or repeats actions by itself, which this script does: use {plain}")
    similar = " or ".join(difflib.get_close_matches(name.capitalize(), games))
    raise InputError(f"there is no Atari game {env_id}" + f"; did you mean {similar}?" * bool(similar))


def make_envs(args: Args) -> EnvpoolEnvironments:
    """Creates num_envs games with stacks of frames as observations; raises InputError if that is impossible."""
    try:
        return EnvpoolEnvironments(args, find_game(args.env_id))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"cannot make {args.env_id} with --env-kwargs {args.env_kwargs}: {one_line(error)}") from error


def layer_init(layer: nn.Linear | nn.Conv2d, gain: float, args: Args) -> nn.Linear | nn.Conv2d:
    """Initializes a layer like the official code (a2c/utils.py) and returns it."""
    if args.orthogonal_init:
        # [core-2] Orthogonal weights let signals and gradients pass through the layers with their scale unchanged.
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return layer


class NatureCNN(nn.Module):
    """Images [B, frame_stack, 84, 84] of bytes -> features [B, 512] (common/models.py; Mnih et al. 2015)."""

    def __init__(self, args: Args):
        super().__init__()
        self.args = args
        shapes = (args.frame_stack, 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1)
        self.convolutions = nn.ModuleList(layer_init(nn.Conv2d(*shape), math.sqrt(2), args) for shape in shapes)
        self.linear = layer_init(nn.Linear(64 * 7 * 7, 512), math.sqrt(2), args)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Three convolutions and a linear layer, a ReLU after each."""
        # Observations are kept as bytes; only what is computed with becomes four times as large.
        x = images.to(memory_format=torch.channels_last).float()
        x = x / 255 if self.args.scale_images else x  # [atari-9] The initialization expects inputs of about that size.
        for convolution in self.convolutions:
            x = F.relu(convolution(x))
        return F.relu(self.linear(x.permute(0, 2, 3, 1).flatten(1)))  # channels last [extra-18]


class Agent(nn.Module):
    """A policy (actor) and a value function (critic) on the features of one convolutional network."""

    def __init__(self, observation_space: Box, action_space: Discrete, args: Args):
        super().__init__()
        # [core-13] [atari-8] What is worth seeing is the same for both, and the images are most of the work.
        self.network = NatureCNN(args)
        self.critic_network = None if args.shared_network else NatureCNN(args)
        # [core-2] The small gain makes the first policy nearly uniform, so that every action gets tried.
        self.actor = layer_init(nn.Linear(512, int(action_space.n)), 0.01, args)
        self.critic = layer_init(nn.Linear(512, 1), 1.0, args)

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Observations [B, frame_stack, 84, 84] -> logits [B, actions] and values [B]."""
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.network.args.amp):
            features = self.network(obs)
            critic_features = self.critic_network(obs) if self.critic_network else features
            logits, values = self.actor(features), self.critic(critic_features)
        return logits.float(), values.float().squeeze(-1)


def log_probabilities(logits: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [...] of actions [...] and entropies [...] of the categorical policy with logits [..., A]."""
    all_log_probs = logits.log_softmax(-1)
    log_probs = all_log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    return log_probs, -(all_log_probs.exp() * all_log_probs).sum(-1)


class Rollout(NamedTuple):
    """num_steps = T steps in each of num_envs = N environments."""

    obs: torch.Tensor  # [T+1, N, frame_stack, 84, 84] uint8; the last row is where the next rollout goes on
    actions: torch.Tensor  # [T, N] int64
    rewards: np.ndarray  # [T, N] float32, not clipped
    dones: np.ndarray  # [T, N] bool: this step ended its episode
    ends: list[tuple[int, EpisodeEnd]]  # the games that ended, and the steps in which they did
    log_probs: torch.Tensor  # [T, N]: log-probabilities of the actions
    values: torch.Tensor  # [T+1, N]: what the value function said


@torch.no_grad()
def collect_rollout(
    agent: Callable, envs: EnvpoolEnvironments, next_obs: torch.Tensor, args: Args, greedy=False
) -> Rollout:
    """Acts for num_steps steps, starting from the observations next_obs [N, ...] (ppo2/runner.py).

    Actions are samples of the policy or, if greedy, its most probable ones.
    """
    obs = torch.empty((args.num_steps + 1, *next_obs.shape), dtype=torch.uint8, device=next_obs.device)
    rewards = np.empty((args.num_steps, args.num_envs), np.float32)
    dones = np.empty((args.num_steps, args.num_envs), bool)
    ends, actions, logits, values = [], [], [], []
    # Gumbel noise is -log(-log(u)) of uniform u. The action with the largest logit + noise is a sample of the policy;
    # the official code draws it so too. One large draw for the whole rollout is much faster than one for each step.
    gumbel = -torch.empty(*rewards.shape, int(envs.action_space.n)).exponential_().log().to(obs.device)
    if greedy:
        gumbel.zero_()

    obs[0] = next_obs
    # Around the whole rollout, autocast turns the weights to bfloat16 once, and not in every call.
    with torch.autocast(obs.device.type, torch.bfloat16, enabled=args.amp):
        for step in range(args.num_steps):
            step_logits, value = agent(obs[step])
            actions.append((step_logits + gumbel[step]).argmax(-1))
            logits.append(step_logits)
            values.append(value)
            seen, rewards[step], dones[step], step_ends = envs.step(actions[step].cpu().numpy())
            obs[step + 1] = torch.from_numpy(seen)
            ends += [(step, end) for end in step_ends]
        values.append(agent(obs[-1])[1])
    actions, logits, values = map(torch.stack, (actions, logits, values))
    log_probs, _ = log_probabilities(logits, actions)
    return Rollout(obs, actions, rewards, dones, ends, log_probs, values)


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
    deltas = rewards + gamma * values[1:] * unfinished - values[:-1]
    # In NumPy, which takes a third of PyTorch's time for so few numbers in a step.
    advantages, decays = deltas.cpu().numpy(), (gamma * gae_lambda * unfinished).cpu().numpy()
    for t in reversed(range(len(advantages) - 1)):
        advantages[t] += decays[t] * advantages[t + 1]
    returns = torch.from_numpy(advantages).to(values) + values[:-1]
    return returns - values[:-1], returns  # [extra-4] The official code learns from this rounded difference.


def average(tensor: torch.Tensor) -> torch.Tensor:
    """Replaces a tensor by its mean over all ranks, and returns it."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
        tensor /= WORLD_SIZE
    return tensor


def gathered(value) -> list:
    """What each rank has given, in the order of the ranks; any values that can be pickled."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(values, value)
    return values


def normalize(advantages: torch.Tensor, args: Args) -> torch.Tensor:
    """Advantages with mean 0 and standard deviation 1 along the last dimension (ppo2/model.py), over all ranks."""
    mean = average(advantages.mean(-1, keepdim=True))
    variance = average((advantages - mean).square().mean(-1, keepdim=True))
    # [extra-3] The population's deviation, which divides by n; PyTorch's default divides by n - 1.
    samples = advantages.shape[-1] * WORLD_SIZE
    std = (variance if args.population_std else variance * samples / (samples - 1)).sqrt()
    return (advantages - mean) / (std + 1e-8)


class Batch(NamedTuple):
    """B samples: those of a rollout, or of a minibatch."""

    obs: torch.Tensor  # [B, frame_stack, 84, 84]
    actions: torch.Tensor  # [B]
    log_probs: torch.Tensor  # [B]: log-probabilities of the actions when they were taken
    advantages: torch.Tensor  # [B]
    returns: torch.Tensor  # [B]: what the value function should say
    values: torch.Tensor  # [B]: what it said


def ppo_loss(
    log_probs: torch.Tensor, entropy: torch.Tensor, values: torch.Tensor, batch: Batch, clip_coef: float, args: Args
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of a minibatch of B samples (ppo2/model.py).

    log_probs, entropy and values [B] are what the agent now says of the observations and actions of the minibatch.
    Returns the loss [], its terms [3] (policy loss, value loss, entropy) and the log-ratios [B] of new to old policy.
    """
    log_ratio = log_probs - batch.log_probs
    ratio = log_ratio.exp()

    # [core-8] Taking the worse of both leaves nothing to gain from moving the ratio further than clip_coef from 1.
    policy_loss = -batch.advantages * ratio
    if args.clip_policy:
        policy_loss = torch.maximum(policy_loss, -batch.advantages * ratio.clamp(1 - clip_coef, 1 + clip_coef))
    policy_loss = policy_loss.mean()

    # [core-9] The same for the value function: nothing to gain from moving further than clip_coef from the old value.
    value_loss = (values - batch.returns).square()
    if args.clip_vloss:
        clipped_values = values.clamp(batch.values - clip_coef, batch.values + clip_coef)
        value_loss = torch.maximum(value_loss, (clipped_values - batch.returns).square())
    value_loss = 0.5 * value_loss.mean()  # [extra-6] This half comes on top of vf_coef.

    # [core-10] One loss for policy and value function; the entropy bonus keeps the policy from settling too early.
    entropy = entropy.mean()
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
        # TensorFlow 1 adds it to the root of the uncorrected second moment: in terms of PyTorch's Adam, its epsilon is
        # 1e-5 / sqrt(1 - 0.999**t), 32 times as much in the first step.
        epsilon = args.adam_eps if args.adam_eps_hat else args.adam_eps * correction2
        return learning_rate * correction2 / correction1, epsilon

    def step(self, gradient: torch.Tensor, step_size: float, epsilon: float) -> None:
        """Moves the parameters against their gradient [P]."""
        self.moment1.lerp_(gradient, 1 - 0.9)
        self.moment2.lerp_(gradient.square(), 1 - 0.999)
        # In place where it can be: with millions of parameters, new memory costs more time than the arithmetic.
        self.parameters -= (step_size * self.moment1).div_(self.moment2.sqrt().add_(epsilon))


def gradient_step(agent: Agent, adam: Adam, minibatch: Batch, clip_coef, step_size, epsilon, args: Args):
    """Improves the agent on one minibatch; returns the loss's terms and the log-ratios, as ppo_loss does."""
    logits, values = agent(minibatch.obs)
    log_probs, entropy = log_probabilities(logits, minibatch.actions)
    loss, terms, log_ratio = ppo_loss(log_probs, entropy, values, minibatch, clip_coef, args)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, adam.tensors)])
    with torch.no_grad():
        gradient = average(gradient)  # [aux-2] One message for all parameters.
        # [core-11] One norm over all parameters together: clipping shortens the gradient but keeps its direction.
        # torch's clip_grad_norm_ adds 1e-6 to the norm, this does not. [extra-5] Tensor.norm() would add millions of
        # squares one after the other, and lose precision; sum() adds them in pairs.
        gradient *= (args.max_grad_norm / gradient.square().sum().sqrt()).clamp(max=1)
        adam.step(gradient, step_size, epsilon)
    return terms, log_ratio


def train(args: Args) -> dict:
    """Trains an agent; returns {"run_dir", "global_step", "episodic_return": mean of the last 100 episodes}.

    Raises InputError for settings that cannot work, FloatingPointError when the training diverged.
    """
    check_args(args)
    keep_freed_memory()
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    # [aux-2] K ranks with num_envs / K environments each do what one rank with num_envs environments does.
    envs_of_rank = args.num_envs // WORLD_SIZE
    local = replace(args, num_envs=envs_of_rank, seed=args.seed + RANK * envs_of_rank)
    envs = make_envs(local)
    agent = Agent(envs.observation_space, envs.action_space, args).to(device)
    adam = Adam(agent)
    act, improve = accelerated(agent, args, device)

    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    run = Run(args, agent, adam) if RANK == 0 else OtherRanksRun(args, agent, adam)
    if WORLD_SIZE > 1:
        run.path = gathered(run.path)[0]
        dist.broadcast(adam.parameters, 0)
        if RANK > 0:  # noise and shuffles of its own
            torch.manual_seed((args.seed + run.global_step) * WORLD_SIZE + RANK)

    next_obs = torch.from_numpy(envs.reset(local.seed, run.global_step)).to(device)
    for update in range(run.update, args.num_updates):
        # [core-4] The steps shrink linearly; the factor of the last update is 1/num_updates, not 0. [extra-10]
        remaining = 1 - update / args.num_updates
        learning_rate = args.learning_rate * (remaining if args.anneal_lr else 1)
        # [aux-1] So may the clip range; in the official code it is constant. [extra-9]
        clip_coef = args.clip_coef * (remaining if args.anneal_clip else 1)

        # [core-1] Rollouts have a fixed length; the next one goes on where this one stops, in the middle of episodes.
        rollout = collect_rollout(act, envs, next_obs, local)
        next_obs = rollout.obs[-1]
        check_finite({"a reward [step, env]": np.concatenate(gathered(rollout.rewards), 1)}, run)  # all ranks, or none
        if args.clip_reward:  # [atari-6] One learning rate then fits all games, whatever their points are worth.
            rollout = rollout._replace(rewards=np.sign(rollout.rewards))
        obs, actions, log_probs, values = rollout.obs, rollout.actions, rollout.log_probs, rollout.values
        rewards, dones = (torch.from_numpy(array).to(device) for array in (rollout.rewards, rollout.dones))
        # [extra-14] The official code takes a time limit for an end; this adds the value of what was cut off.
        for step, end in rollout.ends if args.bootstrap_truncated else []:
            if end.truncated:
                with torch.no_grad():
                    _, last_value = agent(torch.from_numpy(end.last_obs[None]).to(device))
                rewards[step, end.env] += args.gamma * last_value[0]
        advantages, returns = compute_gae(rewards, values, dones, args.gamma, args.gae_lambda)
        if args.norm_adv and args.norm_adv_per_batch:
            advantages = normalize(advantages.flatten(), args)
        batch = Batch(obs[:-1], actions, log_probs, advantages, returns, values[:-1])
        batch = Batch(*(tensor.reshape(local.batch_size, *tensor.shape[2:]) for tensor in batch))
        # Convolutions work fastest with the channels last; compiled gradient steps would rearrange byte by byte.
        batch = batch._replace(obs=batch.obs.to(memory_format=torch.channels_last))

        terms, log_ratios = [], []
        for epoch in range(args.update_epochs):
            # [core-6] Each epoch shuffles the samples anew and uses every one of them once. [extra-12]
            order = torch.randperm(local.batch_size)
            if args.minibatch_replacement:
                order = torch.randint(local.batch_size, (local.batch_size,))
            order = order.view(args.num_minibatches, -1).to(device, non_blocking=True)
            shuffled = Batch(*(tensor[order] for tensor in batch))  # [minibatches, samples, ...]
            # [core-7] Advantages on one scale let one learning rate fit rewards of any scale.
            if args.norm_adv and not args.norm_adv_per_batch:
                shuffled = shuffled._replace(advantages=normalize(shuffled.advantages, args))
            for minibatch in map(Batch._make, zip(*shuffled)):
                step_size, epsilon = adam.coefficients(learning_rate, args)
                minibatch_terms, log_ratio = improve(agent, adam, minibatch, clip_coef, step_size, epsilon, args)
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
        check_finite(losses | {"a parameter": adam.parameters}, run)
        left, total = (average((x - average(x.mean())).square().mean()) for x in (returns - values[:-1], returns))
        losses["losses/explained_variance"] = (1 - left / total).item()
        # Rank 0 logs the games of all, and all stop after the same update.
        ends = [(step, end._replace(env=end.env + RANK * envs_of_rank, last_obs=None)) for step, end in rollout.ends]
        ends, signals = zip(*gathered((ends, len(SIGNALS))))
        run.end_update(sorted(sum(ends, []), key=lambda end: end[0]), {"charts/learning_rate": learning_rate} | losses)
        if any(signals):
            break

    envs.close()
    if WORLD_SIZE > 1:
        del act, improve  # a recorded graph holds on to the connection of the processes, which then could not end
        dist.destroy_process_group()
    return run.close()


# ---------------------------------------------------------------------------------------------------------------------
# Here the algorithm ends. What follows keeps files, reads the command line and plays, and changes nothing of it.
# ---------------------------------------------------------------------------------------------------------------------


class InputError(Exception):
    """Something the user gave cannot work: reported in one line, with exit code 2."""


@functools.cache
def say(text: str) -> None:
    """Prints a line on stderr, once. A closed terminal or a full disk is no reason to end a training."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def one_line(error: Exception) -> str:
    """An error's kind and message without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def origin() -> dict:
    """Where a run comes from, besides its settings: the script's commit, if git knows one, and the versions."""
    names, commit = ("numpy", "torch", "gymnasium", "envpool", "ale_py", "mujoco", "transformers"), ""
    with contextlib.suppress(OSError):  # there may be no git
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    versions = {name: getattr(sys.modules.get(name), "__version__", None) for name in names}
    return {"commit": commit, "versions": {name: version for name, version in versions.items() if version}}


def check_args(args: Args) -> None:
    """Raises InputError for the first setting that cannot work."""
    limits = {"seed": (0, 2**31), "gamma": (0, 1), "gae_lambda": (0, 1), "max_grad_norm": (0, math.inf)}
    limits["noop_max"] = (0, 2**31 - 1)
    for name, value in vars(args).items():
        low, high = limits.get(name, (1, 2**31 - 1) if type(value) is int else (0, 2**53))
        if type(value) in (int, float) and not low <= value <= high:  # also catches not-a-number
            raise InputError(f"--{name.replace('_', '-')} must be from {low} to {high}, not {value}")
    if args.total_timesteps < args.batch_size:
        raise InputError(f"--total-timesteps {args.total_timesteps:.0f} is below one rollout, {args.batch_size} steps")
    if args.num_envs % WORLD_SIZE or args.batch_size // WORLD_SIZE % args.num_minibatches:
        raise InputError(f"{args.num_envs} envs x {args.num_steps} steps in {args.num_minibatches} minibatches cannot "
                         f"be shared equally by {WORLD_SIZE} processes")  # fmt: skip
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if args.cuda and 0 < torch.cuda.device_count() < local_ranks:
        raise InputError(f"{local_ranks} processes need as many GPUs, not {torch.cuda.device_count()}; or --no-cuda")
    if args.evaluate and WORLD_SIZE > 1:
        raise InputError("--evaluate plays in one process: start it without torchrun")
    if args.batch_size % args.num_minibatches:
        raise InputError(f"a rollout of {args.num_envs} envs x {args.num_steps} steps = {args.batch_size} samples "
                         f"cannot be cut into {args.num_minibatches} equal minibatches")  # fmt: skip
    if args.norm_adv and not args.norm_adv_per_batch and args.batch_size == args.num_minibatches:
        raise InputError("minibatches of one sample cannot be normalized: lower --num-minibatches or use --no-norm-adv")
    if not importlib.util.find_spec("envpool"):
        raise InputError("EnvPool is not installed (it exists for Linux only): ppo_atari.py does without it")
    if args.capture_video:
        raise InputError("EnvPool cannot record videos; ppo_atari.py --evaluate RUN --capture-video can, of these runs")
    compiler = os.environ.get("CXX", "g++").split()[0]
    if args.compile and not args.evaluate and not shutil.which(compiler):
        raise InputError(f"--compile needs a C++ compiler, and {compiler} is not there; $CXX can name another one")
    if args.amp and not torch.cuda.is_available() and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        say("this processor has no instructions for bfloat16: --amp will be slower than without")


def keep_freed_memory() -> None:
    """Lets the C library, if it is glibc, keep freed memory for later instead of giving it back to the system.

    A gradient step on images, texts or many samples frees and needs again some 100 MB, which the system would hand out
    in 10,000 page faults.
    """
    with contextlib.suppress(OSError, AttributeError):  # elsewhere than on Linux, or another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks are part of the heap too


def check_finite(values: dict, run: "Run") -> None:
    """Raises FloatingPointError for the first of the arrays, tensors or numbers that is not finite, and says where."""
    for name, value in values.items():
        if (wrong := ~torch.as_tensor(value).isfinite()).any():
            where = f" at {wrong.nonzero()[0].tolist()}" if wrong.dim() else ""
            raise FloatingPointError(f"in update {run.update + 1}, {name} is not finite{where}; the last checkpoint in "
                                     f"{run.path} is good")  # fmt: skip


def accelerated(agent: Agent, args: Args, device: torch.device) -> tuple[Callable, Callable]:
    """The agent and gradient_step, compiled with --compile and replayed as CUDA graphs with --cudagraphs."""
    act, step = agent, gradient_step
    if args.compile:
        if RANK == 0:
            say("compiling takes a minute")
        torch._dynamo.reset()  # forgets what another train() has compiled
        torch._dynamo.config.trace_autograd_ops = True
        # All minibatches have the same shape, so that the checks before each call can be left out.
        options = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe, "cpp_wrapper": device.type == "cpu"}
        step = torch.compile(gradient_step, fullgraph=True, dynamic=False, options=options)
        if device.type == "cuda":  # on the CPU, acting is no faster when compiled
            act = torch.compile(agent, fullgraph=True, dynamic=False, options=options)
    if args.cudagraphs and device.type == "cuda":
        act, step = CudaGraph(act), CudaGraph(step)
    if step is gradient_step:
        return act, step

    def improve(agent, adam, minibatch, clip_coef, step_size, epsilon, args):
        # As tensors, for a number that changes would be compiled anew.
        numbers = torch.tensor((clip_coef, step_size, epsilon)).to(device, non_blocking=True)
        return step(agent, adam, minibatch, *numbers.unbind(), args)

    return act, improve


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


def restore(path: Path, agent: Agent, adam: Adam | None = None) -> dict:
    """Reads checkpoint.pt into the agent and Adam and returns all it holds; raises InputError if it is no good."""
    try:
        state = torch.load(path / "checkpoint.pt", map_location="cpu", weights_only=True)  # cannot run code
        agent.load_state_dict(state["agent"])
        if adam:
            for moment, saved in zip((adam.moment1, adam.moment2), state["moments"], strict=True):
                moment.copy_(saved.view_as(moment))
            state["update"], adam.steps, state["metrics_bytes"] = state["counts"].long().abs().tolist()
            state["returns"], state["seconds"] = state["returns"].double().tolist(), state["seconds"].item()
            torch.set_rng_state(state["rng"])
        return state
    except Exception as error:  # a broken file makes torch.load raise anything
        raise InputError(f"cannot use {path / 'checkpoint.pt'}: {one_line(error)}") from error


class Run:
    """What a run has besides the algorithm: its directory, metrics, checkpoints and progress bar."""

    def __init__(self, args: Args, agent: Agent, adam: Adam):
        """Creates the run directory or, with --resume, restores agent, Adam and metrics from its last checkpoint."""
        self.args, self.agent, self.adam, self.wandb, self.bar = args, agent, adam, None, None
        self.update, self.seconds, self.returns, metrics_bytes = 0, 0.0, [], 0
        try:
            name, now = re.sub(r"[^\w.-]", "-", f"{args.env_id}__{args.exp_name}__{args.seed}"), int(time.time())
            while not args.resume and Path(args.runs_dir, f"{name}__{now}").exists():  # two runs in one second
                now += 1
            self.path = Path(args.resume or Path(args.runs_dir, f"{name}__{now}")).resolve()
            self.path.mkdir(parents=True, exist_ok=bool(args.resume))
            if any(entry.is_symlink() for entry in self.path.iterdir()):
                raise InputError(f"{self.path} has symbolic links, which might lead out of it")
            self.metrics = open(self.path / "metrics.jsonl", "ab", buffering=0)  # unbuffered: no kill can tear a line
            if os.name == "posix":
                import fcntl

                fcntl.flock(self.metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.path} is still running: another process writes to it") from None
        except OSError as error:
            raise InputError(f"cannot write the run directory: {error}") from error
        if args.resume:
            state = restore(self.path, agent, adam)
            self.update, self.returns, self.seconds = state["update"], state["returns"], state["seconds"]
            metrics_bytes = state["metrics_bytes"]
        # What came after the checkpoint is going to be done again.
        self.metrics.seek(self.metrics.truncate(min(metrics_bytes, self.metrics.tell())))
        self.lines = (self.path / "metrics.jsonl").read_bytes().count(b"\n")
        if args.track:
            self.start_tracking()
        self.write("config.json", json.dumps(asdict(args) | {"resume": None} | origin(), indent=2).encode())
        self.start = time.time()
        self.measured_from = self.global_step, self.start
        self.save()

    def start_tracking(self) -> None:
        """Starts the run at Weights & Biases, or goes on with it; raises InputError if that is impossible."""
        try:
            import wandb

            name, args = self.path.name, self.args
            self.wandb = wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, dir=self.path, name=name,
                                    id=name, resume="allow", config=asdict(args))  # fmt: skip
            self.wandb.define_metric("*", step_metric="global_step")
            self.write(Path(__file__).name, Path(__file__).read_bytes())  # as it is now, whatever is edited later
            self.wandb.log_code(self.path, include_fn=lambda path: path.endswith(".py"))
        except Exception as error:
            if not self.args.resume:
                shutil.rmtree(self.path)
                with contextlib.suppress(OSError):
                    self.path.parent.rmdir()  # if it is empty
            raise InputError(f"--track: {one_line(error)}") from error

    @property
    def global_step(self) -> int:
        """Steps of all environments so far."""
        return self.update * self.args.batch_size

    def write(self, name: str, contents: bytes) -> None:
        """Replaces a file of the run at once: if a kill or a full disk cuts the writing short, the old file stays."""
        with open(self.path / f"{name}.tmp", "wb") as file:
            file.write(contents)
        os.replace(self.path / f"{name}.tmp", self.path / name)

    def save(self) -> None:
        """Writes checkpoint.pt: tensors only, so that loading it cannot run code."""
        contents, counts = io.BytesIO(), [self.update, self.adam.steps, self.metrics.tell()]
        torch.save({
            "agent": self.agent.state_dict(), "moments": torch.stack([self.adam.moment1, self.adam.moment2]),
            "counts": torch.tensor(counts), "returns": torch.tensor(self.returns, dtype=torch.float64),
            "seconds": torch.tensor(self.seconds + time.time() - self.start), "rng": torch.get_rng_state(),
        }, contents)  # fmt: skip
        self.write("checkpoint.pt", contents.getvalue())

    def log(self, global_step: int, values: dict[str, float]) -> None:
        """Appends a line to metrics.jsonl; not-a-number becomes null, for which JSON has a word."""
        row = {"global_step": global_step, "wall_time": round(self.seconds + time.time() - self.start, 3)}
        row |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = (json.dumps(row) + "\n").encode()
        if self.metrics.write(line) < len(line):
            raise OSError(f"no space left for {self.path / 'metrics.jsonl'}")
        if self.wandb:
            self.wandb.log(row, step=self.lines)  # which a resumed run counts on, also where it is offline
        self.lines += 1

    def end_update(self, ends: list[tuple[int, EpisodeEnd]], values: dict[str, float]) -> None:
        """Logs an update and the episodes that ended in it, shows progress, and saves a checkpoint when it is time."""
        for step, end in ends:
            self.returns = [*self.returns[-99:], float(end.episodic_return)]
            row = {"charts/episodic_return": self.returns[-1], "charts/episodic_length": int(end.length)}
            self.log(self.global_step + (step + 1) * self.args.num_envs, row)
        self.update += 1
        step, now = self.measured_from
        values["charts/SPS"] = int((self.global_step - step) / (time.time() - now))
        self.log(self.global_step, values)
        with contextlib.suppress(Exception):  # as in say()
            if not self.bar:  # speed is measured from the second update on, for the first one may have compiled
                self.measured_from = self.global_step, time.time()
                line, every = "{desc}: {n_fmt} of {total_fmt} steps, {rate_fmt}{postfix}, {remaining} left\n", 10
                line, every = (None, 0.1) if sys.stderr.isatty() else (line, every)
                self.bar = tqdm(total=self.args.num_updates * self.args.batch_size, initial=self.global_step,
                                desc=self.args.env_id, unit=" steps", bar_format=line, mininterval=every)  # fmt: skip
            self.bar.set_postfix_str(f"mean return {np.mean(self.returns or [math.nan]):.1f}", refresh=False)
            self.bar.update(self.global_step - self.bar.n)
        if self.update % self.args.checkpoint_interval == 0:
            self.save()

    def close(self) -> dict:
        """Saves, ends progress bar and tracking, which gets the videos too; returns what train() does."""
        self.save()
        self.metrics.close()
        with contextlib.suppress(Exception):
            self.bar.close()
        if self.wandb:
            for video in sorted((self.path / "videos").glob("*.mp4")):
                self.wandb.log({f"videos/{video.stem}": sys.modules["wandb"].Video(str(video))})
            self.wandb.finish()
        mean_return = float(np.mean(self.returns or [math.nan]))
        return {"run_dir": str(self.path), "global_step": self.global_step, "episodic_return": mean_return}


class OtherRanksRun(Run):
    """What the ranks other than 0 have of a run: they write nothing."""

    def __init__(self, args: Args, agent: Agent, adam: Adam):
        """With --resume, restores agent and Adam."""
        self.args, self.path, self.update = args, None, 0
        if args.resume:
            self.update = restore(Path(args.resume), agent, adam)["update"]

    def end_update(self, ends: list[tuple[int, EpisodeEnd]], values: dict[str, float]) -> None:
        """Counts."""
        self.update += 1

    def close(self) -> dict:
        """Returns what train() does."""
        return {"run_dir": str(self.path), "global_step": self.global_step, "episodic_return": math.nan}


def evaluate(args: Args) -> list[float]:
    """Plays eval_episodes episodes with a trained agent, prints and returns their returns."""
    check_args(args)
    args = replace(args, num_envs=1, num_steps=100)
    path, returns = Path(args.evaluate).resolve(), []
    envs = make_envs(args)
    agent = Agent(envs.observation_space, envs.action_space, args).eval()
    restore(path, agent)
    torch.manual_seed(args.seed)
    next_obs = torch.from_numpy(envs.reset(args.seed))
    while len(returns) < args.eval_episodes:
        rollout = collect_rollout(agent, envs, next_obs, args, greedy=args.eval_deterministic)
        next_obs = rollout.obs[-1]
        for _, end in rollout.ends[: args.eval_episodes - len(returns)]:
            returns.append(float(end.episodic_return))
            say(f"episode {len(returns)} of {args.eval_episodes}: return {returns[-1]:.1f} after {end.length} steps")
    envs.close()
    print(f"{args.env_id}: return {np.mean(returns):.1f} +- {np.std(returns):.1f} over {len(returns)} episodes")
    return returns


def parse_args(argv: list[str] | None = None) -> Args:
    """Reads the command line; with --resume or --evaluate the defaults are that run's settings."""
    argv = sys.argv[1:] if argv is None else argv
    for flag, value in zip(argv, argv[1:]):
        if value.lower() in ("true", "false") and isinstance(getattr(Args, flag[2:].replace("-", "_"), None), bool):
            raise InputError(f"{flag} takes no value: it is {flag} or --no-{flag[2:]}")
    # The parts of Args, as one object with a field for each, are what --help shows as groups.
    parts = zip(("algorithm", "environment", "run"), Args.__bases__)
    Groups = make_dataclass("Groups", parts, namespace={"__doc__": Args.__doc__})

    def parse(default: Args) -> Args:
        groups = Groups(*(part(**{f.name: getattr(default, f.name) for f in fields(part)}) for part in Args.__bases__))
        groups = tyro.cli(Groups, args=argv, default=groups, config=(tyro.conf.OmitArgPrefixes,))
        return Args(**{name: value for group in vars(groups).values() for name, value in vars(group).items()})

    args = parse(Args())
    if args.resume is None and args.evaluate is None:
        return args
    if not (run_dir := args.resume or args.evaluate) or (args.resume and args.evaluate):
        raise InputError("--resume or --evaluate, not both, needs a run directory")
    try:
        saved = json.loads((Path(run_dir) / "config.json").read_text())
        for name, kind in typing.get_type_hints(Args).items():
            value, kinds = saved[name], typing.get_args(kind) or (kind,)
            if value not in kinds and type(value) not in kinds and not (type(value) is int and float in kinds):
                raise ValueError(f"{name} is {value!r}")
        saved = Args(**{name: saved[name] for name in typing.get_type_hints(Args)})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{run_dir} is not a run directory of {SCRIPT}.py: {one_line(error)}") from error
    resumed = parse(replace(saved, capture_video=saved.capture_video and not args.evaluate))
    if ":" in resumed.env_id and args.env_id != resumed.env_id:  # the directory may be somebody else's
        raise InputError(f"to let {run_dir} import a module, repeat its --env-id {resumed.env_id}")
    if args.resume and resumed.batch_size != saved.batch_size:
        raise InputError("--num-envs x --num-steps cannot change with --resume: updates would not match steps")
    return resumed


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, also after a signal; 2 for bad input; 1 for other failures."""
    sys.path.append(os.getcwd())  # where --env-id my_module:MyEnv may find my_module.py
    SIGNALS.clear()
    try:
        args = parse_args(argv)
        if args.evaluate:
            evaluate(args)
            return 0
        for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
            if signal.getsignal(number) is not signal.SIG_IGN:  # which nohup sets
                signal.signal(number, on_signal)
        result = train(args)
        if RANK > 0:
            return 0
        print("{run_dir}: {global_step} steps, mean return {episodic_return:.1f}".format(**result))
        if result["global_step"] < args.num_updates * args.batch_size:
            print(f"stopped by a signal; go on with: python {SCRIPT}.py --resume {result['run_dir']}")
        return 0
    except RuntimeError as error:
        if WORLD_SIZE == 1 or not re.search("gloo|nccl", str(error), re.IGNORECASE):
            raise
        say(f"{SCRIPT}.py: error: rank {RANK} lost another rank: {one_line(error)}")
        return 1
    except Exception as error:
        # Those of the environment's own lines keep their traceback.
        own = traceback.extract_tb(error.__traceback__)[-1].filename == __file__
        own = own and isinstance(error, InputError | FloatingPointError | OSError)
        if not own and not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        say(f"{SCRIPT}.py: error: {error if own else one_line(error)}")
        return 2 if isinstance(error, InputError) else 1


def on_signal(number: int, frame) -> None:
    """Lets the training end after the present update. A second Ctrl-C kills it."""
    SIGNALS.append(number)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
