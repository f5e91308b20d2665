# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "envpool==1.2.5; sys_platform == 'linux'",
#     "gymnasium[classic-control]==1.4.0",
#     "moviepy==2.2.1",
#     "mujoco==4.0.0",
#     "numpy==2.4.6",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
#     "wandb==0.31.0",
# ]
# ///
"""Proximal Policy Optimization (PPO) for continuous actions, in one file.

Contains the 9 details for continuous actions and the 13 core details of "The 37 Implementation Details of PPO" (Huang
et al., ICLR Blog Track 2022) as the official code (openai/baselines ppo2, commit ea25b9e) has them. A tag such as
[continuous-6] or [core-7] stands where that detail happens; [aux-N] are auxiliary details, [extra-N] behaviours of the
official code that the article does not mention. docs/details.md lists them all. The algorithm is by Schulman et al.
2017, arXiv:1707.06347.

    python ppo_continuous.py          HalfCheetah-v4: a mean return of about 1,400 after 1,000,000 steps

train() is the algorithm; what it calls stands above it, and what has nothing to do with learning below.
"""

import contextlib
import difflib
import io
import json
import math
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
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.spaces import Box, Discrete, flatten_space
from tqdm import tqdm

SCRIPT = Path(__file__).stem


@dataclass
class Args:
    """PPO with the 13 core details and the 9 for continuous actions."""

    # The run
    exp_name: str = SCRIPT  # name of the experiment, part of the run directory's name
    seed: int = 1  # seeds the network, the action noise and the shuffles; environment i gets seed + i [extra-35]
    torch_deterministic: bool = True  # use cuDNN's deterministic algorithms
    cuda: bool = False  # use the GPU if there is one; for networks this small the CPU is faster
    compile: bool = False  # compile the gradient step: some seconds of start-up, then a much faster update
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
    env_id: str = "HalfCheetah-v4"  # a registered environment, or module:EnvId, which imports the module first
    env_kwargs: str = "{}"  # arguments for the environment's constructor, as a JSON object
    env_backend: str = "gymnasium"  # gymnasium, or envpool: many environments on several cores; Linux only

    # The algorithm
    total_timesteps: int = 1_000_000  # steps of all environments together, floored to whole rollouts [extra-11]
    learning_rate: float = 3e-4  # learning rate of Adam, at the start
    num_envs: int = 1  # environments stepped together [core-1]
    num_steps: int = 2048  # steps of each environment in one rollout [core-1]
    anneal_lr: bool = True  # lower the learning rate linearly to 0 [core-4]
    gamma: float = 0.99  # discount factor, 0 to 1
    gae: bool = True  # generalized advantage estimation; off: n-step returns to the rollout's end (lambda 1) [core-5]
    gae_lambda: float = 0.95  # from 0 (one-step TD error) to 1 (Monte Carlo) [core-5]
    bootstrap_truncated: bool = False  # a time limit is no end: add gamma * V(last observation) there [extra-14]
    num_minibatches: int = 32  # equal parts that a rollout is cut into [core-6]
    minibatch_replacement: bool = False  # draw minibatches with replacement, a common mistake [core-6]
    update_epochs: int = 10  # passes over the rollout in one update [core-6]
    norm_adv: bool = True  # normalize the advantages, for each minibatch [core-7]
    norm_adv_per_batch: bool = False  # normalize them once for the whole rollout instead [core-7]
    population_std: bool = True  # by the population's standard deviation; off: the sample's, as in PyTorch [extra-3]
    clip_policy: bool = True  # clip the surrogate objective [core-8]
    clip_coef: float = 0.2  # clip range of the probability ratio and of the value loss [core-8] [core-9]
    anneal_clip: bool = False  # lower the clip range linearly to 0, like the learning rate [aux-1]
    clip_vloss: bool = True  # clip the value loss [core-9]
    ent_coef: float = 0.0  # weight of the entropy bonus [core-10]
    vf_coef: float = 0.5  # weight of the value loss [core-10]
    max_grad_norm: float = 0.5  # limit of the gradient's global norm; inf: no limit [core-11]
    target_kl: float | None = None  # stop the update after an epoch with a mean KL divergence above this [aux-3]
    adam_eps: float = 1e-5  # epsilon of Adam [core-3]
    adam_eps_hat: bool = True  # add epsilon where TensorFlow 1 does; off: where PyTorch does [extra-1]
    orthogonal_init: bool = True  # orthogonal initialization, biases 0; off: PyTorch's default [core-2]
    shared_network: bool = False  # policy and value function share their hidden layers [continuous-4] [core-13]
    state_dependent_std: bool = False  # the network gives the standard deviations too [continuous-2]
    clip_action: bool = True  # clip actions to their bounds before the environment gets them [continuous-5]
    squash_action: bool = False  # map them into their bounds by tanh instead [continuous-5]
    norm_obs: bool = True  # normalize observations by their running mean and standard deviation [continuous-6]
    clip_obs: bool = True  # clip normalized observations to [-10, 10] [continuous-7]
    norm_reward: bool = True  # divide rewards by the running standard deviation of the discounted return [continuous-8]
    clip_reward: bool = True  # clip normalized rewards to [-10, 10] [continuous-9]

    @property
    def batch_size(self) -> int:
        """Samples in one rollout."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """[extra-11] Only whole rollouts count: 1,000,000 steps are 488 updates, 999,424 steps."""
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


class EnvpoolVectorEnv(gym.vector.VectorEnv):
    """EnvPool's environments, which C++ threads step in parallel, with the interface of SameStepVectorEnv."""

    def __init__(self, args: Args):
        import envpool

        if args.env_id not in envpool.list_all_envs():
            similar = " or ".join(difflib.get_close_matches(args.env_id, envpool.list_all_envs()))
            raise InputError(f"EnvPool has no {args.env_id}" + f"; did you mean {similar}?" * bool(similar))
        kwargs = json.loads(args.env_kwargs) | {"seed": args.seed}
        kwargs |= {"num_envs": args.num_envs, "batch_size": args.num_envs}
        self.make_pool = lambda **changed: envpool.make_gymnasium(args.env_id, **kwargs | changed)
        self.pool, self.num_envs = self.make_pool(), args.num_envs
        self.single_observation_space = flatten_space(self.pool.observation_space)
        self.single_action_space = self.pool.action_space
        check_spaces(self.pool.observation_space, self.single_action_space, args)
        self.returns, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, int)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Restarts all environments; EnvPool takes a seed only when environments are made."""
        self.pool = self.make_pool(seed=seed % 2**31) if seed is not None else self.pool
        self.returns[:], self.lengths[:] = 0, 0
        return self.pool.reset()[0].reshape(self.num_envs, -1), {}

    def step(self, actions: np.ndarray):
        """Steps all environments with actions [N, ...]; returns what gymnasium.vector.VectorEnv.step documents."""
        obs, rewards, terminations, truncations, _ = self.pool.step(actions)
        self.returns += rewards
        self.lengths += 1
        infos, ended = {}, np.flatnonzero(terminations | truncations)
        if len(ended):
            # [core-1] EnvPool restarts an environment in its next step, whose action it ignores. One more call for just
            # these environments does that within this step, so that no such transition gets into the rollout.
            infos["final_obs"] = obs.reshape(self.num_envs, -1).copy()
            infos["final_info"] = {"episode": {"r": self.returns.copy(), "l": self.lengths.copy()}}
            obs[ended] = self.pool.step(actions[ended], ended.astype(np.int32))[0]
            self.returns[ended], self.lengths[ended] = 0, 0
        return obs.reshape(self.num_envs, -1), rewards, terminations, truncations, infos


def check_spaces(observation_space: gym.Space, action_space: gym.Space, args: Args) -> None:
    """Raises InputError if the script cannot learn in such an environment."""
    if not isinstance(action_space, Box) or not np.issubdtype(action_space.dtype, np.floating):
        raise InputError(f"{SCRIPT}.py needs Box actions of floating-point numbers, not {action_space}")
    if not isinstance(observation_space, Box | Discrete):
        raise InputError(f"{SCRIPT}.py needs Box or Discrete observations, not {observation_space}")
    if args.squash_action and not action_space.is_bounded():
        raise InputError(f"--squash-action needs actions with bounds, not {action_space}")


def make_envs(args: Args, video_folder: Path | None = None, video_trigger=None) -> gym.vector.VectorEnv:
    """Creates num_envs environments that are stepped together; raises InputError if that is impossible.

    Their observations are vectors [size]: other Boxes are flattened, Discrete observations become one-hot.
    """

    def make_env(index: int) -> gym.Env:
        env, kwargs = None, json.loads(args.env_kwargs)
        if video_folder and index == 0:
            try:
                env = gym.make(args.env_id, render_mode="rgb_array", **kwargs)
                env = SafeRecordVideo(env, str(video_folder), video_trigger, name_prefix=f"{time.time():.0f}")
            except Exception as error:
                print(f"no videos, {args.env_id} cannot be recorded: {one_line(error)}", file=sys.stderr)
                env = None
        env = env or gym.make(args.env_id, **kwargs)
        check_spaces(env.observation_space, env.action_space, args)
        if len(env.observation_space.shape) != 1:
            env = gym.wrappers.FlattenObservation(env)
        return gym.wrappers.RecordEpisodeStatistics(env)

    warnings.filterwarnings("ignore", ".*is out of date")  # the official curves are of -v4 environments
    try:
        if args.env_backend == "envpool":
            try:
                return EnvpoolVectorEnv(args)
            except ImportError:
                print("EnvPool is not installed (it exists for Linux only); using gymnasium", file=sys.stderr)
        make = [lambda index=index: make_env(index) for index in range(args.num_envs)]
        return SameStepVectorEnv(make, copy=False, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    except InputError:
        raise
    except Exception as error:  # a constructor may raise anything
        given = "" if args.env_kwargs == "{}" else f" with --env-kwargs {args.env_kwargs}"
        raise InputError(f"cannot make {args.env_id}{given}: {one_line(error)}") from error


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


def layer_init(layer: nn.Linear, gain: float, args: Args) -> nn.Linear:
    """Initializes a layer like the official code (a2c/utils.py) and returns it."""
    if args.orthogonal_init:
        # [core-2] Orthogonal weights let signals and gradients pass through the layers with their scale unchanged.
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return layer


class MLP(nn.Module):
    """Linear layers with tanh between them: [..., inputs] -> [..., outputs] (common/models.py)."""

    def __init__(self, layers: list[nn.Linear]):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        # To look these up in the layers at every call would cost more than the arithmetic on a few observations.
        self.weights = [(layer.weight, layer.bias) for layer in layers]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Output of the last layer."""
        for weight, bias in self.weights[:-1]:
            x = torch.tanh(F.linear(x, weight, bias))
        return F.linear(x, *self.weights[-1])

    @torch.no_grad()
    def as_numpy(self) -> Callable[[np.ndarray], np.ndarray]:
        """The present network as a function of arrays: for a few observations several times faster than PyTorch."""
        *hidden, (last_weight, last_bias) = [[p.detach().cpu().numpy().T for p in pair] for pair in self.weights]

        def forward(x: np.ndarray) -> np.ndarray:
            for weight, bias in hidden:
                x = np.tanh(x @ weight + bias)
            return x @ last_weight + last_bias

        example = torch.ones(1, self.layers[0].in_features)
        difference = forward(example.numpy()) - self(example.to(self.weights[0][0].device)).cpu().numpy()
        assert not np.abs(difference).max() > 1e-4 * np.abs(last_weight).sum(), "as_numpy must compute forward"
        return forward


class GaussianActor(nn.Module):
    """A Gaussian policy: observations [..., size] -> its means [..., A] and the log of its standard deviations.

    The latter are [A], the same for all observations; with --state-dependent-std they are [..., A].
    """

    def __init__(self, hidden: list[nn.Linear], num_actions: int, args: Args):
        super().__init__()
        outputs = 2 * num_actions if args.state_dependent_std else num_actions
        # [core-2] The small gain makes the first policy nearly the same in all states.
        self.network = MLP([*hidden, layer_init(nn.Linear(64, outputs), 0.01, args)])
        # [continuous-2] One deviation for each action, the same in all states, keeps exploration from vanishing in some
        # states before it does in others. It starts at 1.
        self.log_std = None if args.state_dependent_std else nn.Parameter(torch.zeros(num_actions))

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Means and log standard deviations."""
        output = self.network(obs)
        return output.chunk(2, -1) if self.log_std is None else (output, self.log_std)

    def as_numpy(self) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """The same as a function of arrays."""
        network = self.network.as_numpy()
        if self.log_std is None:
            return lambda obs: np.split(network(obs), 2, -1)
        log_std = self.log_std.detach().cpu().numpy()
        return lambda obs: (network(obs), log_std)


class Agent(nn.Module):
    """A policy (actor) and a value function (critic), each with two hidden layers of 64 tanh units.

    actor: observations [..., size] -> means and log standard deviations of a Gaussian over the actions, see above.
    critic: observations [..., size] -> expected discounted returns [..., 1].
    """

    def __init__(self, observation_space: Box, action_space: Box, args: Args):
        super().__init__()

        def hidden_layers() -> list[nn.Linear]:
            sizes = (observation_space.shape[0], 64), (64, 64)
            return [layer_init(nn.Linear(*size), math.sqrt(2), args) for size in sizes]

        # [core-13] With hidden layers of their own, policy and value function do not disturb each other's features. The
        # layers of both are drawn independently. [continuous-4] [extra-16]
        actor_layers = hidden_layers()
        critic_layers = actor_layers if args.shared_network else hidden_layers()
        self.actor = GaussianActor(actor_layers, math.prod(action_space.shape), args)
        self.critic = MLP([*critic_layers, layer_init(nn.Linear(64, 1), 1.0, args)])
        self.obs_stats, self.return_stats = RunningMeanStd(observation_space.shape), RunningMeanStd(())

    def get_extra_state(self) -> dict:
        """The running statistics, which PyTorch saves and loads with the weights: without them these are worthless."""
        stats = {"obs": self.obs_stats, "returns": self.return_stats}
        return {name: {key: torch.as_tensor(value) for key, value in vars(s).items()} for name, s in stats.items()}

    def set_extra_state(self, state: dict) -> None:
        """Puts back what get_extra_state returned."""
        for stats, saved in ((self.obs_stats, state["obs"]), (self.return_stats, state["returns"])):
            for key, value in vars(stats).items():
                setattr(stats, key, saved[key].numpy().reshape(np.shape(value)))


def log_probabilities(policy: tuple[torch.Tensor, torch.Tensor], actions: torch.Tensor) -> torch.Tensor:
    """Log-densities [...] of actions [..., A] under a Gaussian policy (means, log standard deviations)."""
    mean, log_std = policy
    # [continuous-1] [continuous-3] Independent components: the density of an action is the product of theirs.
    standardized = (actions - mean) * (-log_std).exp()
    return -(0.5 * standardized.square() + log_std).sum(-1) - 0.5 * math.log(2 * math.pi) * actions.shape[-1]


def environment_actions(actions: np.ndarray, action_space: Box, args: Args) -> np.ndarray:
    """What the environments get for the policy's actions [N, A]; shaped [N, *shape of the action space]."""
    # [continuous-5] Samples of a Gaussian may leave the bounds. The rollout keeps them as they were drawn, since the
    # policy gradient needs their density. Not-a-number becomes 0. [extra-34]
    low, high = action_space.low, action_space.high
    actions = actions.reshape(-1, *action_space.shape)
    if args.squash_action:  # the density's factor for tanh is the same for new and old policy, and leaves their ratio
        actions = low + (high - low) * (np.tanh(actions) + 1) / 2
    if args.squash_action or args.clip_action:
        actions = np.minimum(np.maximum(np.where(np.isnan(actions), 0, actions), low), high)
    return actions.astype(action_space.dtype)


class Rollout(NamedTuple):
    """num_steps = T steps in each of num_envs = N environments."""

    obs: np.ndarray  # [T+1, N, size] float32, normalized; the last row is where the next rollout goes on
    actions: np.ndarray  # [T, N, A] float32, neither clipped nor squashed
    rewards: np.ndarray  # [T, N] float32
    dones: np.ndarray  # [T, N] bool: this step ended its episode
    truncated: list[tuple[int, int, np.ndarray]]  # step, environment and last observation of episodes cut by a limit
    episodes: list[tuple[int, float, int]]  # step, return and length of the episodes that ended


@torch.inference_mode()
def collect_rollout(agent: Agent, envs: gym.vector.VectorEnv, next_obs: np.ndarray, args: Args) -> Rollout:
    """Acts for num_steps steps, starting from the normalized observations next_obs [N, size] (ppo2/runner.py)."""
    obs = np.empty((args.num_steps + 1, *next_obs.shape), np.float32)
    actions = np.empty((args.num_steps, args.num_envs, math.prod(envs.single_action_space.shape)), np.float32)
    rewards = np.empty((args.num_steps, args.num_envs), np.float32)
    dones = np.empty((args.num_steps, args.num_envs), bool)
    truncated, episodes = [], []
    # One large draw for the whole rollout is much faster than one for each step.
    noise = torch.randn(actions.shape).numpy()
    policy = agent.actor.as_numpy()

    obs[0] = next_obs
    for step in range(args.num_steps):
        # Acting needs no values; train() computes them for the whole rollout at once.
        mean, log_std = policy(obs[step])
        actions[step] = mean + np.exp(log_std) * noise[step]
        env_actions = environment_actions(actions[step], envs.single_action_space, args)
        next_obs, rewards[step], terminations, truncations, infos = envs.step(env_actions)
        obs[step + 1] = normalize_obs(next_obs, agent.obs_stats, args)
        dones[step] = terminations | truncations
        if "final_info" in infos:
            for env in np.flatnonzero(dones[step]):
                episode = infos["final_info"]["episode"]
                episodes.append((step, float(episode["r"][env]), int(episode["l"][env])))
                if not terminations[env]:
                    last_obs = normalize_obs(np.asarray(infos["final_obs"][env]), agent.obs_stats, args, update=False)
                    truncated.append((step, int(env), last_obs.astype(np.float32)))
    return Rollout(obs, actions, rewards, dones, truncated, episodes)


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
    policy: tuple[torch.Tensor, torch.Tensor], values: torch.Tensor, actions: torch.Tensor, old_log_probs: torch.Tensor,
    advantages: torch.Tensor, returns: torch.Tensor, old_values: torch.Tensor, clip_coef: float, args: Args,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The loss of a minibatch of B samples (ppo2/model.py).

    policy (means [B, A], log standard deviations) and values [B] are the network's present output; actions [B, A] and
    all other tensors [B] come from the rollout.
    Returns the loss [], its terms [3] (policy loss, value loss, entropy) and the log-ratios [B] of new to old policy.
    """
    log_ratio = log_probabilities(policy, actions) - old_log_probs
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
    entropy = (policy[1] + 0.5 * math.log(2 * math.pi * math.e)).sum(-1).mean()  # [continuous-3]
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
    """Improves the agent on one minibatch (obs [B, size], then what ppo_loss takes); returns loss terms, log-ratios."""
    obs, *others = minibatch
    loss, terms, log_ratio = ppo_loss(agent.actor(obs), agent.critic(obs).squeeze(-1), *others, clip_coef, args)
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
    torch.set_num_threads(1)  # matrices this small are faster with one thread
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    envs = make_envs(args)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(device)
    adam = Adam(agent)
    run = Run(args, agent, adam)
    if args.capture_video:
        envs.close()
        envs = make_envs(args, run.path / "videos")
    improve = gradient_step
    if args.compile:
        # Forward pass, backward pass and Adam become one compiled function. All minibatches have the same shape, so
        # that the checks before each call can be left out; reset() forgets what another train() has compiled.
        torch._dynamo.reset()
        torch._dynamo.config.trace_autograd_ops = True
        options = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe, "cpp_wrapper": device.type == "cpu"}
        improve = torch.compile(gradient_step, fullgraph=True, dynamic=False, options=options)

    # [extra-35] Environment i is seeded with this + i. A resumed run does not repeat its first episodes.
    next_obs, _ = envs.reset(seed=args.seed + run.first_step)
    run.save()
    # A run that was over already must stay as it is.
    next_obs = normalize_obs(next_obs, agent.obs_stats, args, update=run.update < args.num_updates)
    discounted_returns = np.zeros(args.num_envs)
    while run.update < args.num_updates and not run.stopped_by:
        # [core-4] The steps shrink linearly; the factor of the last update is 1/num_updates, not 0. [extra-10]
        remaining = 1 - run.update / args.num_updates
        learning_rate = args.learning_rate * (remaining if args.anneal_lr else 1)
        # [aux-1] So may the clip range; in the official code it is constant. [extra-9]
        clip_coef = args.clip_coef * (remaining if args.anneal_clip else 1)

        # [core-1] Rollouts have a fixed length; the next one goes on where this one stops, in the middle of episodes.
        rollout = collect_rollout(agent, envs, next_obs, args)
        next_obs = rollout.obs[-1]
        rewards = normalize_rewards(rollout.rewards, rollout.dones, discounted_returns, agent.return_stats, args)
        rollout = rollout._replace(rewards=rewards)
        obs, actions, rewards, dones = (torch.from_numpy(array).to(device) for array in rollout[:4])
        with torch.no_grad():
            values = agent.critic(obs).squeeze(-1)
            log_probs = log_probabilities(agent.actor(obs[:-1]), actions)
            # [extra-14] The official code takes a time limit for an end; this adds the value of what was cut off.
            for step, env, last_obs in rollout.truncated if args.bootstrap_truncated else []:
                rewards[step, env] += args.gamma * agent.critic(torch.from_numpy(last_obs).to(device)).squeeze(-1)
            advantages, returns = compute_gae(rewards, values, dones, args.gamma, args.gae_lambda if args.gae else 1.0)
        advantages = returns - values[:-1]  # [extra-4]
        if args.norm_adv and args.norm_adv_per_batch:
            advantages = normalize(advantages.flatten(), args)
        batch = [obs[:-1], actions, log_probs, advantages, returns, values[:-1]]
        batch = [tensor.reshape(args.batch_size, *tensor.shape[2:]) for tensor in batch]

        terms, log_ratios = [], []
        for epoch in range(args.update_epochs):
            # [core-6] Each epoch shuffles the samples anew and uses every one of them once. [extra-12]
            order = torch.randperm(args.batch_size)
            if args.minibatch_replacement:
                order = torch.randint(args.batch_size, (args.batch_size,))
            minibatches = [tensor[order.view(args.num_minibatches, -1).to(device)] for tensor in batch]
            # [core-7] Advantages on one scale let one learning rate fit rewards of any scale.
            if args.norm_adv and not args.norm_adv_per_batch:
                minibatches[3] = normalize(minibatches[3], args)
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


def check_args(args: Args) -> None:
    """Raises InputError for the first setting that cannot work."""
    counts = ["num_envs", "num_steps", "num_minibatches", "update_epochs", "checkpoint_interval", "eval_episodes"]
    weights = ["seed", "learning_rate", "clip_coef", "ent_coef", "vf_coef", "target_kl", "adam_eps"]
    limits = dict.fromkeys(counts, (1, 2**31 - 1)) | dict.fromkeys(weights, (0, 2**31))
    limits |= {"gamma": (0, 1), "gae_lambda": (0, 1), "max_grad_norm": (0, math.inf)}
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
    if args.env_backend not in ("gymnasium", "envpool"):
        raise InputError(f"--env-backend must be gymnasium or envpool, not {args.env_backend}")
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
    check_args(args)
    path = Path(args.evaluate)
    videos = path / "videos" if args.capture_video else None
    envs = make_envs(replace(args, num_envs=1), videos, lambda episode: episode < args.eval_episodes)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args)
    restore(path, agent)
    torch.manual_seed(args.seed)
    obs, _ = envs.reset(seed=args.seed)
    policy, returns = agent.actor.as_numpy(), []
    while len(returns) < args.eval_episodes:
        obs = normalize_obs(obs, agent.obs_stats, args, update=False)
        mean, log_std = policy(obs.astype(np.float32))
        noise = 0 if args.eval_deterministic else torch.randn(mean.shape).numpy()
        actions = environment_actions(mean + np.exp(log_std) * noise, envs.single_action_space, args)
        obs, _, _, _, infos = envs.step(actions)
        if "final_info" in infos:
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
