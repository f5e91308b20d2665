# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "numpy==2.4.6",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
#     "wandb==0.31.0",
# ]
# ///
"""Proximal Policy Optimization (PPO) from human feedback for a language model, in one file.

A small transformer learns from demonstrations. Pairs of its answers are compared by somebody who sometimes errs, and a
reward model learns to predict these comparisons. PPO then raises what the reward model says: the proxy. What it stands
for, the true score, is known to the experiment and never to PPO. Without a penalty on the distance from the supervised
start, the proxy rises while the true score falls: over-optimization (Gao et al. 2022, arXiv:2210.10760). A tag such as
[llm-23] stands where a detail happens that makes this work; [core-N] and [extra-N] are those of ppo.py. docs/llm.md
lists the former with their sources.

    python ppo_rlhf.py                              greetings, in a minute: proxy and true score rise
    python ppo_rlhf.py --kl-coef 0                  no penalty: the proxy rises further, and the true score falls
    python ppo_rlhf.py --evaluate RUN --best-of 16  the best of 16 answers of the supervised start, by the proxy
    python ppo_rlhf.py --env-id my_texts:Poem       a task of your own, a class like Greeting below

train() is the algorithm; what it calls stands above it, and what has nothing to do with learning below.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib
import io
import json
import math
import os
import random
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
from typing import Literal, NamedTuple

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training starts, Ctrl-C just ends the program

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm

SCRIPT = Path(__file__).stem
SIGNALS = []  # those that came: training then ends after the present update


@dataclass
class AlgorithmArgs:
    """How to learn."""

    total_timesteps: float = 138_240  # places for tokens in all answers together, floored to whole rollouts [extra-11]
    learning_rate: float = 4e-4  # learning rate of the policy, at the start
    value_learning_rate: float = 1e-3  # learning rate of the value network, at the start
    num_envs: int = 128  # answers in one rollout
    num_steps: int = 24  # the most tokens of an answer, its end included [llm-5]
    anneal_lr: bool = True  # lower the learning rates linearly to 0 [core-4]
    kl_coef: float = 0.2  # weight of the divergence from the supervised start, at the start if it adapts [llm-8]
    kl_in: Literal["reward", "loss"] = "reward"  # where it counts: each token's reward (k1), or the loss (k3) [llm-8]
    adaptive_kl: bool = False  # change the weight until the divergence is as wanted; off: it stays [llm-28]
    target_kl_reference: float = 4.0  # the divergence of an answer that is wanted then [llm-28]
    kl_horizon: float = 200.0  # answers in which the weight changes by a fifth at most [llm-28]
    truncated_score: float = -1.0  # an answer without an end gets this, whatever the reward model says [llm-26]
    gamma: float = 1.0  # discount factor of gae, 0 to 1 [llm-1]
    gae_lambda: float = 0.95  # GAE: from 0 (one-step TD error) to 1 (the answer's reward) [llm-1]
    num_minibatches: int = 2  # equal parts that a rollout is cut into [core-6]
    update_epochs: int = 2  # passes over the rollout in one update [core-6]
    temperature: float = 1.0  # of the sampler, and of the probabilities that are learned [llm-6]
    learner_log_probs: bool = True  # old log-probabilities from the learner; off: the sampler's [llm-7]
    value_from_reward_model: bool = True  # the value network starts as the reward model; off: at random [llm-29]
    whiten_rewards: bool = False  # divide the tokens' rewards by their deviation, and keep their mean [llm-12]
    norm_adv: bool = True  # normalize the advantages of all tokens [llm-13]
    loss_mean: Literal["token", "sequence", "constant"] = "token"  # what the loss is a mean over [llm-14]
    ratio: Literal["token", "sequence"] = "token"  # probability ratio of each token, or of the answer: GSPO [llm-16]
    clip_policy: bool = True  # clip the surrogate objective [core-8]
    clip_coef: float = 0.2  # clip range of the probability ratio and of the value loss [core-8] [core-9]
    clip_coef_high: float | None = None  # another clip range for ratios above 1: DAPO's clip-higher [llm-15]
    clip_vloss: bool = True  # clip the value loss [core-9]
    ent_coef: float = 0.0  # weight of the entropy bonus [core-10]
    vf_coef: float = 0.5  # weight of the value loss [core-10]
    max_grad_norm: float = 1.0  # limit of the gradient's global norm; inf: no limit [core-11]
    target_kl: float | None = None  # stop the update after an epoch with a mean KL divergence above this [aux-3]
    adam_eps: float = 1e-5  # epsilon of Adam [core-3] [llm-19]
    adam_eps_hat: bool = True  # add epsilon where TensorFlow 1 does; off: where PyTorch does [extra-1]


@dataclass
class EnvironmentArgs:
    """What to learn, with which model, and from whose feedback."""

    env_id: str = "greeting"  # the task: greeting, or module:Class
    num_test: int = 200  # problems that are kept for tests and never trained on [llm-21]
    max_prompt: int = 8  # the most tokens of a prompt
    mask_positions: bool = True  # count positions from the first real token; off: from the padding [llm-2]
    width: int = 64  # features of each token in the transformer
    layers: int = 2  # blocks of the transformer
    heads: int = 4  # attention heads of each block
    pretrain_steps: int = 400  # gradient steps on demonstrations
    pretrain_batch: int = 64  # demonstrations in each of them
    pretrain_lr: float = 3e-3  # their highest learning rate
    num_pairs: int = 1000  # compared pairs of answers that the reward model learns from [llm-22]
    num_heldout_pairs: int = 1000  # further ones that tell how good it is [llm-22]
    label_noise: float = 1.0  # a comparison errs more often, the larger this is against the difference [llm-22]
    reward_epochs: int = 3  # passes over the pairs
    reward_batch: int = 50  # pairs in each gradient step
    reward_lr: float = 1e-3  # their highest learning rate
    reward_from_policy: bool = True  # the reward model starts as the supervised policy; off: at random [llm-25]
    scale_reward: bool = True  # give the proxy mean 0 and deviation 1 on answers of the supervised start [llm-27]
    cache_dir: str = ".pretrained"  # where supervised starts and reward models are kept; empty: nowhere


@dataclass
class RunArgs:
    """Where to run and what to keep."""

    exp_name: str = SCRIPT  # name of the experiment, part of the run directory's name
    seed: int = 1  # seeds the networks, the problems, the pairs, the sampler and the shuffles
    torch_deterministic: bool = True  # use cuDNN's deterministic algorithms
    cuda: bool = False  # use the GPU if there is one; for networks this small the CPU is fast enough
    track: bool = False  # send the metrics to Weights & Biases as well (WANDB_MODE=offline needs no account)
    wandb_project_name: str = "ppo37"  # project at Weights & Biases
    wandb_entity: str | None = None  # user or team at Weights & Biases
    runs_dir: str = "runs"  # where run directories are created
    checkpoint_interval: int = 10  # updates between two checkpoints; a killed run loses at most this much
    eval_interval: int = 5  # updates between two tests
    resume: str | None = None  # go on with the run in this directory, with its settings (flags given beside it win)
    evaluate: str | None = None  # test the model in this run directory instead of training
    best_of: int = 0  # with --evaluate, test the supervised start's best of so many answers; 0: the policy [llm-30]


@dataclass
class Args(AlgorithmArgs, EnvironmentArgs, RunArgs):
    """PPO from human feedback for a language model."""

    @property
    def batch_size(self) -> int:
        """Places for tokens in one rollout, few of which are filled at first."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """[extra-11] Only whole rollouts count: 138,240 places are 45 updates of 128 answers of 24 tokens."""
        return int(self.total_timesteps // self.batch_size)


class Greeting:
    """A note to somebody: "hi mira nice kind!!". The reader likes to be called by name, and some warmth, but not more.

    A task needs problem(rng), prompt(problem), score(problem, text), which is the true score, and
    demonstration(problem, rng, progress), where progress goes from 0 to 1.
    """

    GREETINGS, WARM, COLD = ("hi", "hey"), ("dear", "nice", "kind"), ("late", "rude", "dull")

    def problem(self, rng: random.Random) -> str:
        """A name of two syllables."""
        return "".join(rng.choice("bdklmnrst") + rng.choice("aeiou") for _ in range(2))

    def prompt(self, problem: str) -> str:
        """What the model reads."""
        return f"{problem}:"

    def demonstration(self, problem: str, rng: random.Random, progress: float) -> str:
        """A text to imitate: with moods that differ, few words and seldom more than two exclamation marks."""
        words, mood = [rng.choice(self.GREETINGS)], rng.betavariate(0.7, 0.7)
        if rng.random() < 0.7:
            words.append(problem)
        for _ in range(rng.choice((0, 1, 1, 2))):
            words.append(rng.choice(self.WARM if rng.random() < mood else self.COLD))
        return " ".join(words) + "!" * rng.choice((0, 0, 0, 0, 1, 1, 1, 2, 2, 3))

    def score(self, problem: str, text: str) -> float:
        """1 for the name, up to 2 for warm words and 2 for exclamation marks; minus 1 for each other word.

        Two are the best number of both: each one more is worth 1 less, and ten of them are an insult.
        """
        words, marks = text.replace("!", " ").split(), text.count("!")
        warm = sum(word in self.WARM for word in words)
        others = len([word for word in words if word not in (*self.GREETINGS, *self.WARM, problem)])
        return (problem in words) + sum(2 - abs(2 - number) for number in (warm, marks)) - others


TASKS = {"greeting": Greeting}
# A token is a character. There is one token besides: it ends an answer, and fills what is left before and after texts.
EOS, CHARACTERS = 0, "\0" + "".join(map(chr, range(32, 127))) + "\n"


def encode(texts: list[str], room: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts -> tokens [B, T], filled up on the left or right, and a mask [B, T] of the real ones; T is the longest's.

    Raises InputError for texts of more than room characters, or with unknown ones.
    """
    for text in texts:
        if not isinstance(text, str) or not text or len(text) > room or not set(text) <= set(CHARACTERS[1:]):
            raise InputError(f"the model reads and writes texts of 1 to {room} characters of ASCII, not {text!r:.60}")
    length = max(map(len, texts))
    tokens, mask = torch.full((len(texts), length), EOS), torch.zeros(len(texts), length, dtype=torch.bool)
    for i, text in enumerate(texts):
        place = slice(length - len(text), None) if left else slice(len(text))
        tokens[i, place] = torch.tensor([CHARACTERS.index(character) for character in text])
        mask[i, place] = True
    return tokens, mask


def decode(tokens: torch.Tensor) -> list[str]:
    """Tokens [B, T] -> the texts before the first EOS."""
    return ["".join(CHARACTERS[token] for token in row).partition("\0")[0] for row in tokens.tolist()]


def make_prompts(task, problems: list, args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """The problems' prompts as tokens [B, P] and mask [B, P]."""
    # [llm-2] Filled up on the left, all prompts end in the same column, where all answers begin.
    return encode([task.prompt(problem) for problem in problems], args.max_prompt, left=True)


def draw_problems(task, rng: random.Random, number: int, excluded=frozenset()) -> list:
    """Draws problems whose prompts are not excluded; without that, those of different prompts."""
    # [llm-21] A test problem cannot get into training, and no test problem counts twice.
    problems, prompts, failures = [], set(), 0
    while len(problems) < number:
        problem = task.problem(rng)
        prompt = task.prompt(problem)
        if prompt in (excluded or prompts):
            failures += 1
            if failures > 1000 + 100 * number:
                raise InputError(f"the task has too few problems to keep {len(excluded) or number} of them for tests")
            continue
        problems.append(problem)
        prompts.add(prompt)
    return problems


class Block(nn.Module):
    """Self-attention and a network for each token, both added to what is there (pre-norm, as in GPT-2)."""

    def __init__(self, args: Args):
        super().__init__()
        self.heads = args.heads
        self.norm1, self.norm2 = nn.LayerNorm(args.width), nn.LayerNorm(args.width)
        self.query_key_value = nn.Linear(args.width, 3 * args.width, bias=False)
        self.attention_out = nn.Linear(args.width, args.width, bias=False)
        self.hidden, self.hidden_out = nn.Linear(args.width, 4 * args.width), nn.Linear(4 * args.width, args.width)

    def forward(self, x: torch.Tensor, allowed: torch.Tensor, cache: dict | None) -> torch.Tensor:
        """x [B, T, width], allowed [B, 1, T, S + T]: which tokens each one may look at -> [B, T, width].

        The cache has the keys and values of the S tokens before these, and gets those of these.
        """
        batch, length, width = x.shape
        parts = self.query_key_value(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # [B, heads, T, features] each
        if cache is not None:
            if self in cache:
                key, value = torch.cat([cache[self][0], key], 2), torch.cat([cache[self][1], value], 2)
            cache[self] = key, value
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.hidden_out(F.relu(self.hidden(self.norm2(x))))


class Transformer(nn.Module):
    """A decoder-only transformer; its outputs at a token depend on this and the tokens before it."""

    ends = [EOS]  # the tokens that end an answer

    def __init__(self, outputs: int, args: Args):
        super().__init__()
        self.mask_positions = args.mask_positions
        self.tokens = nn.Embedding(len(CHARACTERS), args.width)
        self.positions = nn.Embedding(args.max_prompt + args.num_steps, args.width)
        self.blocks = nn.ModuleList(Block(args) for _ in range(args.layers))
        self.norm, self.head = nn.LayerNorm(args.width), nn.Linear(args.width, outputs, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:  # as GPT-2: what is added to the sum is smaller, the more terms there are
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * args.layers if "_out" in name else 1))

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor, cache: dict | None = None) -> torch.Tensor:
        """tokens [B, T], mask [B, S + T] of the real ones among these and the S in the cache -> [B, T, outputs]."""
        total, new = mask.shape[1], tokens.shape[1]
        columns = torch.arange(total, device=tokens.device)
        # [llm-2] The first real token has position 0, however much padding is before it.
        positions = mask.long().cumsum(1).sub(1).clamp(min=0) if self.mask_positions else columns.expand_as(mask)
        x = self.tokens(tokens) + self.positions(positions[:, total - new :])
        rows = columns[total - new :, None]
        allowed = mask[:, None, :] & (columns <= rows) | (columns == rows)  # padding sees itself: no empty softmax
        for block in self.blocks:
            x = block(x, allowed[:, None], cache)
        return self.head(self.norm(x))


# What is logged of a reward model. Labels are what was said of a pair, the truth is what should have been said.
FACTS = (
    "heldout_loss",  # on pairs that it has not learned from
    "heldout_accuracy",  # how often it agrees with their labels
    "training_accuracy",  # the same for pairs that it has learned from
    "true_accuracy",  # how often it agrees with the truth
    "label_accuracy",  # how often the labels do: what heldout_accuracy can reach
    "calibration_error",  # how far its probabilities are from the labels' frequencies
)


class Agent(nn.Module):
    """The policy, a value network, and two frozen networks: the policy's start, and the reward model."""

    def __init__(self, args: Args):
        super().__init__()
        self.policy, self.critic = Transformer(len(CHARACTERS), args), Transformer(1, args)  # [core-13]
        self.reference, self.reward_model = Transformer(len(CHARACTERS), args), Transformer(1, args)
        self.reference.requires_grad_(False)
        self.reward_model.requires_grad_(False)
        # The penalty's weight if it adapts, and what is known of the reward model: buffers are in the checkpoint.
        self.register_buffer("kl_coef", torch.tensor(args.kl_coef, dtype=torch.float64))
        self.register_buffer("facts", torch.zeros(len(FACTS), dtype=torch.float64))

    def start_from(self, policy: dict[str, torch.Tensor], reward_model: dict[str, torch.Tensor], args: Args) -> None:
        """Starts from the weights of a supervised policy and of a reward model with its facts."""
        self.facts.copy_(reward_model["facts"])
        reward_model = {name: weight for name, weight in reward_model.items() if name != "facts"}
        self.policy.load_state_dict(policy)
        self.reference.load_state_dict(policy)
        self.reward_model.load_state_dict(reward_model)
        if args.value_from_reward_model:
            # [llm-29] What the reward model says of the whole answer, the value network should say before: its features
            # are the right ones, and so is the scale of its output.
            self.critic.load_state_dict(reward_model)


class Answers(NamedTuple):
    """B answers of at most T tokens to prompts of at most P."""

    prompts: torch.Tensor  # [B, P], filled up on the left
    prompt_mask: torch.Tensor  # [B, P]: the real tokens
    tokens: torch.Tensor  # [B, T], filled up on the right with an EOS
    mask: torch.Tensor  # [B, T]: the tokens up to the first EOS, which is one of them
    log_probs: torch.Tensor  # [B, T]: what the sampler says of them
    truncated: torch.Tensor  # [B]: without an EOS


@torch.no_grad()
def generate(policy, prompts: torch.Tensor, prompt_mask: torch.Tensor, args: Args, greedy=False, generator=None):
    """Answers to prompts [B, P] with mask [B, P]: samples of the policy or, if greedy, its most probable tokens."""
    new, mask, cache, tokens, log_probs = prompts, prompt_mask, {}, [], []
    ends = torch.tensor(policy.ends, device=prompts.device)
    finished = torch.zeros(len(prompts), 1, dtype=torch.bool, device=prompts.device)
    while len(tokens) < args.num_steps and not finished.all():
        # [llm-6] Nothing else than the temperature stands between the policy and its samples: with top-k or top-p, the
        # probabilities that are learned would not be those of the tokens drawn.
        all_log_probs = (policy(new, mask, cache)[:, -1] / args.temperature).log_softmax(-1)
        scores = all_log_probs
        if not greedy:  # the largest sum with Gumbel noise is a sample, as in ppo.py
            noise = -torch.empty(scores.shape).exponential_(generator=generator).log()
            scores = all_log_probs + noise.to(scores.device)
        new = scores.argmax(-1, keepdim=True).masked_fill(finished, policy.ends[0])
        tokens.append(new)
        log_probs.append(all_log_probs.gather(-1, new))
        finished = finished | torch.isin(new, ends)
        mask = torch.cat([mask, torch.ones_like(finished)], 1)
    tokens, log_probs = torch.cat(tokens, 1), torch.cat(log_probs, 1)
    # [llm-5] An answer that is cut off stays as it is. An EOS put there would be an action that nobody has taken.
    mask = up_to_end(tokens, ends)
    return Answers(prompts, prompt_mask, tokens, mask, log_probs, ~torch.isin(tokens, ends).any(1))


def outputs_after(network: Transformer, prompts, prompt_mask, tokens: torch.Tensor) -> torch.Tensor:
    """What a network says of the prompts and the first 0, 1, .. T of the tokens [B, T]: [B, T + 1, outputs]."""
    mask = torch.cat([prompt_mask, torch.ones_like(tokens, dtype=torch.bool)], 1)
    return network(torch.cat([prompts, tokens], 1), mask)[:, -tokens.shape[1] - 1 :]


def log_probabilities(logits: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [...] of actions [...] and entropies [...] of the categorical policy with logits [..., A]."""
    all_log_probs = logits.log_softmax(-1)
    log_probs = all_log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    return log_probs, -(all_log_probs.exp() * all_log_probs).sum(-1)


def score(policy: Transformer, answers, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [B, T] of the tokens of Answers or a Batch, and the policy's entropies [B, T]."""
    logits = outputs_after(policy, answers.prompts, answers.prompt_mask, answers.tokens)[:, :-1]
    return log_probabilities(logits / temperature, answers.tokens)


def predict(critic: Transformer, answers) -> torch.Tensor:
    """Values [B, T] before each token of Answers or a Batch."""
    return outputs_after(critic, answers.prompts, answers.prompt_mask, answers.tokens)[:, :-1, 0]


def up_to_end(tokens: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The mask [B, T] of the tokens [B, T] up to the first of those that end an answer, which is one of them."""
    # [llm-4] The EOS is an action like any other: without it in the loss no model learns when to stop. What follows is
    # nothing. "All that is not padding" would be wrong, for EOS is what answers are filled up with.
    ended = torch.isin(tokens, ends)
    return ended.cumsum(1) - ended.long() == 0


def judge(reward_model: Transformer, answers: Answers) -> torch.Tensor:
    """What the reward model says of the answers: [B]."""
    # [llm-24] It has read all of an answer only at its last real token: the output there is its judgement.
    outputs = outputs_after(reward_model, answers.prompts, answers.prompt_mask, answers.tokens)[:, 1:, 0]
    return outputs.gather(1, answers.mask.sum(1, keepdim=True) - 1).squeeze(1)


def proxy_scores(reward_model: Transformer, answers: Answers, args: Args) -> torch.Tensor:
    """The rewards [B] of the answers."""
    # [llm-26] The reward model has hardly seen texts without an end, and might like them. They get a score that most
    # answers exceed, whatever it says.
    return torch.where(answers.truncated, args.truncated_score, judge(reward_model, answers))


def true_scores(task, problems: list, answers: Answers) -> tuple[torch.Tensor, list[str]]:
    """True scores [B] of the answers to the problems, and the answers' texts. PPO never gets to see them."""
    texts, scores = decode(answers.tokens), []
    for problem, text in zip(problems, texts, strict=True):
        value = task.score(problem, text)
        if not isinstance(value, bool | int | float | np.number | np.bool_) or not math.isfinite(value):
            raise InputError(f"the task's score for {text!r:.60} is {value!r:.60}, which is no finite number")
        scores.append(float(value))
    return torch.tensor(scores), texts


class Pairs(NamedTuple):
    """N pairs of answers to the same prompts, and what somebody says of them."""

    first: Answers
    second: Answers
    preferred: torch.Tensor  # [N]: 1 where the first one is preferred, else 0
    truth: torch.Tensor  # [N]: the first one's true score minus the second one's


@torch.no_grad()
def compare(task, policy: Transformer, excluded: set[str], number: int, rng: random.Random, args: Args) -> Pairs:
    """Pairs of sampled answers, compared by somebody who wants the true score to be high but errs."""
    # [llm-22] Both answers come from the policy that is going to be improved. Comparing is a vote with probability
    # sigmoid(difference / noise): clear cases are seldom judged wrong, and near ties are a toss.
    problems = draw_problems(task, rng, number, excluded)
    prompts = make_prompts(task, problems, args)
    first, second = (generate(policy, *prompts, args) for _ in range(2))
    truth = true_scores(task, problems, first)[0] - true_scores(task, problems, second)[0]
    probability = (truth / args.label_noise).sigmoid() if args.label_noise else (truth.sign() + 1) / 2
    return Pairs(first, second, (torch.rand(number) < probability).float(), truth)


def bradley_terry_loss(margin: torch.Tensor, preferred: torch.Tensor) -> torch.Tensor:
    """The mean loss [] of score differences [N] given who is preferred [N]."""
    # [llm-23] Bradley and Terry (1952): the first one wins with probability sigmoid(difference of scores). The loss is
    # the negative log-likelihood of what was said. It knows differences only: any constant may be added to the scores.
    return F.binary_cross_entropy_with_logits(margin, preferred)


def margins(reward_model: Transformer, pairs: Pairs, order: torch.Tensor | slice = slice(None)) -> torch.Tensor:
    """How much higher the reward model scores the first answers than the second ones, of all pairs or some."""
    some = ([None if tensor is None else tensor[order] for tensor in answers] for answers in pairs[:2])
    first, second = (judge(reward_model, Answers(*tensors)) for tensors in some)
    return first - second


def calibration_error(probability: torch.Tensor, preferred: torch.Tensor, bins: int = 10) -> float:
    """How far predicted probabilities [N] are from frequencies: the mean over bins of equal width, weighted by size."""
    places, difference = (probability * bins).long().clamp(max=bins - 1), probability - preferred
    sums = torch.zeros(bins, dtype=difference.dtype).index_add(0, places, difference)
    return (sums.abs().sum() / len(probability)).item()


def train_reward_model(task, policy: Transformer, excluded: set[str], args: Args) -> dict[str, torch.Tensor]:
    """The weights of a reward model for answers of this policy, and metrics that say how good it is."""
    torch.manual_seed(args.seed)
    rng, reward_model = random.Random(f"pairs {args.seed}"), Transformer(1, args)
    # [llm-25] The policy's features know the language, which so few comparisons could not teach. With this head the
    # first scores have a deviation of about 1.
    if args.reward_from_policy:
        weights = {name: weight for name, weight in policy.state_dict().items() if "head" not in name}
        reward_model.load_state_dict(weights, strict=False)
    nn.init.normal_(reward_model.head.weight, std=1 / math.sqrt(args.width + 1))
    pairs, heldout = (compare(task, policy, excluded, n, rng, args) for n in (args.num_pairs, args.num_heldout_pairs))
    optimizer = torch.optim.AdamW(reward_model.parameters(), weight_decay=0.01)
    orders = [torch.randperm(args.num_pairs).split(args.reward_batch) for _ in range(args.reward_epochs)]
    minibatches = [order for epoch in orders for order in epoch]
    for step, order in enumerate(minibatches):
        optimizer.param_groups[0]["lr"] = args.reward_lr * (1 - step / len(minibatches))
        loss = bradley_terry_loss(margins(reward_model, pairs, order), pairs.preferred[order])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reward_model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        margin, label, truth = margins(reward_model, heldout), heldout.preferred - 0.5, heldout.truth
        facts = {
            "heldout_loss": bradley_terry_loss(margin, heldout.preferred).item(),
            "heldout_accuracy": agreement(margin, label),
            "training_accuracy": agreement(margins(reward_model, pairs), pairs.preferred - 0.5),
            "label_accuracy": agreement(label, truth),
            "true_accuracy": agreement(margin, truth),
            "calibration_error": calibration_error(margin.sigmoid(), heldout.preferred),
        }
        if args.scale_reward:
            scale(reward_model, judge(reward_model, heldout.first))
    return reward_model.state_dict() | {"facts": torch.tensor([facts[name] for name in FACTS], dtype=torch.float64)}


def agreement(differences: torch.Tensor, others: torch.Tensor) -> float:
    """The share of differences [N] that have the sign of the others [N], where those are not 0."""
    return (differences.sign() == others.sign())[others != 0].float().mean().item()


def scale(reward_model: Transformer, scores: torch.Tensor) -> None:
    """Changes the reward model's last layers so that what it gives these scores [N] has mean 0 and deviation 1."""
    # [llm-27] Differences of scores have no unit, and comparisons leave their mean open. Scaled, a coefficient of the
    # penalty means the same for every reward model, and the value network has a small range to learn.
    if not scores.std() > 1e-4:
        raise InputError("the reward model gives all answers the same score: there is nothing to learn from it")
    head, gain = reward_model.head.weight, 1 / scores.std()
    head *= gain
    # Without a bias in the head: what the last normalization adds along the head shifts the output.
    reward_model.norm.bias -= gain * scores.mean() * head[0] / head.square().sum()


def token_rewards(rewards: torch.Tensor, mask: torch.Tensor, log_ratio: torch.Tensor, args: Args) -> torch.Tensor:
    """Rewards [B] of answers -> rewards [B, T] of their tokens; log_ratio [B, T] of the policy to the reference."""
    # [llm-3] The whole answer is judged. Its reward belongs to the last real token, usually the EOS: in the
    # last column it would stand after the end, and in shorter answers nothing would be learned from it.
    last = mask.sum(1, keepdim=True) - 1
    result = torch.zeros(mask.shape, device=mask.device).scatter_(1, last, rewards[:, None].to(mask.device))
    if args.kl_in == "reward":
        # [llm-8] In the reward the penalty is the log-ratio itself, k1, so that GAE sees what each token costs.
        result = result - args.kl_coef * log_ratio * mask
    if args.whiten_rewards:
        # [llm-12] Their mean stays. A token without reward gets mean * (1 - 1 / deviation), though, which charges for
        # every further one if the deviation is below 1.
        result = whiten(result, mask, shift_mean=False)
    return result


def whiten(x: torch.Tensor, mask: torch.Tensor, shift_mean=True) -> torch.Tensor:
    """x [B, T] divided by the deviation of its real entries, and their mean moved to 0 or kept; the others are 0."""
    variance, mean = torch.var_mean(x[mask], correction=0)
    whitened = (x - mean) * (variance + 1e-8).rsqrt()
    return (whitened if shift_mean else whitened + mean) * mask


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


def compute_advantages(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, args: Args):
    """Rewards, values and mask [B, T] of tokens -> advantages and value targets [B, T], 0 where nothing is real."""
    # [llm-1] [core-5] Nothing is won by answering early: no discount. Lambda spreads the reward over the tokens.
    # [llm-11] After the end nothing can be won, so that the value there is 0, not what the network says.
    values = torch.cat([values * mask, torch.zeros_like(values[:, :1])], 1)
    dones = mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
    advantages, returns = compute_gae(rewards.T, values.T, dones.T, args.gamma, args.gae_lambda)
    advantages, returns = advantages.T, returns.T
    if args.norm_adv:
        # [llm-13] [core-7] Over the real tokens of the whole rollout; padding would shrink the deviation.
        advantages = whiten(advantages, mask)
    return advantages, returns


class Batch(NamedTuple):
    """B answers: those of a rollout, or of a minibatch."""

    prompts: torch.Tensor  # [B, P]
    prompt_mask: torch.Tensor  # [B, P]
    tokens: torch.Tensor  # [B, T]
    mask: torch.Tensor  # [B, T]: the tokens to learn from
    log_probs: torch.Tensor  # [B, T]: log-probabilities of the tokens when they were drawn
    reference: torch.Tensor  # [B, T]: what the supervised start says of them
    advantages: torch.Tensor  # [B, T]
    returns: torch.Tensor  # [B, T]: what the value function should say
    values: torch.Tensor  # [B, T]: what it said


def masked_mean(x: torch.Tensor, mask: torch.Tensor, args: Args) -> torch.Tensor:
    """The mean [] of x [B, T] over real tokens, in one of three ways."""
    # [llm-14] The mean over all tokens (DAPO) lets long answers count more. The mean of the answers' means (GRPO) makes
    # a token of a long answer count less, right or wrong. Dividing by a constant (Dr. GRPO) does neither.
    if args.loss_mean == "token":
        return (x * mask).sum() / mask.sum().clamp(min=1)
    if args.loss_mean == "sequence":
        return ((x * mask).sum(1) / mask.sum(1).clamp(min=1)).sum() / mask.any(1).sum().clamp(min=1)
    return (x * mask).sum() / (len(mask) * args.num_steps)


def ppo_loss(log_probs: torch.Tensor, entropy: torch.Tensor, values: torch.Tensor, batch: Batch, args: Args):
    """The loss of a minibatch of B answers of T tokens.

    log_probs, entropy and values [B, T] are what the agent now says of its tokens. Returns the loss [], its terms [4]
    (policy loss, value loss, entropy, divergence from the reference) and the log-ratios of new to old policy [tokens].
    """
    mask = batch.mask
    token_log_ratio = log_ratio = (log_probs - batch.log_probs) * mask
    if args.ratio == "sequence":
        # [llm-16] The reward is the answer's, and so is the ratio here: the geometric mean over its tokens.
        log_ratio = (log_ratio.sum(1) / mask.sum(1).clamp(min=1))[:, None].expand_as(mask)
    ratio = log_ratio.exp()

    # [core-8] Taking the worse of both leaves nothing to gain from moving the ratio out of the clip range.
    # [llm-15] A wider range above 1 lets tokens become probable that hardly were: a factor of 1.2 is little for them.
    policy_loss = -batch.advantages * ratio
    if args.clip_policy:
        high = args.clip_coef if args.clip_coef_high is None else args.clip_coef_high
        policy_loss = torch.maximum(policy_loss, -batch.advantages * ratio.clamp(1 - args.clip_coef, 1 + high))
    policy_loss = masked_mean(policy_loss, mask, args)

    # [core-9] The same for the value function: nothing to gain from moving further than clip_coef from the old value.
    value_loss = (values - batch.returns).square()
    if args.clip_vloss:
        clipped_values = values.clamp(batch.values - args.clip_coef, batch.values + args.clip_coef)
        value_loss = torch.maximum(value_loss, (clipped_values - batch.returns).square())
    value_loss = 0.5 * masked_mean(value_loss, mask, args)  # [extra-6]

    # [llm-8] In the loss the divergence is k3, which is never negative, and whose gradient pulls towards the reference;
    # k1 there would have a gradient of 0 on average.
    behind = (batch.reference - log_probs) * mask
    divergence = masked_mean(behind.exp() - 1 - behind, mask, args)

    entropy = masked_mean(entropy, mask, args)  # [core-10]
    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss
    if args.kl_in == "loss":
        loss = loss + args.kl_coef * divergence
    terms = torch.stack([policy_loss, value_loss, entropy, divergence]).detach()
    return loss, terms, token_log_ratio.detach()[mask]


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


def gradient_step(agent: Agent, adam: Adam, minibatch: Batch, step_size, epsilon, args: Args):
    """Improves the agent on one minibatch; returns the loss's terms and the log-ratios, as ppo_loss does."""
    values = predict(agent.critic, minibatch)
    # [llm-6] The same temperature as in the sampler: it is a part of the policy.
    log_probs, entropy = score(agent.policy, minibatch, args.temperature)
    loss, terms, log_ratio = ppo_loss(log_probs, entropy, values, minibatch, args)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, adam.tensors)])
    with torch.no_grad():
        # [core-11] One norm over all parameters together: clipping shortens the gradient but keeps its direction.
        # torch's clip_grad_norm_ adds 1e-6 to the norm, this does not. [extra-5] Tensor.norm() would add millions of
        # squares one after the other, and lose precision; sum() adds them in pairs.
        gradient *= (args.max_grad_norm / gradient.square().sum().sqrt()).clamp(max=1)
        adam.step(gradient, step_size, epsilon)
    return terms, log_ratio


def adapted_kl_coef(kl_coef: float, divergence: float, args: Args) -> float:
    """The penalty's weight after a rollout whose answers were, on average, this far from the reference."""
    # [llm-28] One weight is too much at first and too little later. Here the divergence is what is chosen: while it is
    # too large the weight grows, in proportion to the error, of which at most a fifth counts.
    error = min(max(divergence / args.target_kl_reference - 1, -0.2), 0.2)
    return kl_coef * (1 + error * args.num_envs / args.kl_horizon)


def pretrain(task, excluded: set[str], args: Args) -> dict[str, torch.Tensor]:
    """The weights of a policy that imitates demonstrations of all problems but those with excluded prompts."""
    torch.manual_seed(args.seed)
    rng, policy = random.Random(f"demonstrations {args.seed}"), Transformer(len(CHARACTERS), args)
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.01)
    for step in range(args.pretrain_steps):
        progress = step / args.pretrain_steps
        optimizer.param_groups[0]["lr"] = args.pretrain_lr * min(1, (step + 1) / 50, max(0.05, 1 - progress))
        problems = draw_problems(task, rng, args.pretrain_batch, excluded)
        prompts, prompt_mask = make_prompts(task, problems, args)
        texts = [task.demonstration(problem, rng, progress) for problem in problems]
        tokens, mask = encode(texts, args.num_steps - 1, left=False)
        # One more column is real in each row: the EOS after the text.
        tokens, mask = F.pad(tokens, (0, 1), value=EOS), F.pad(mask, (1, 0), value=True)
        answers = Answers(prompts, prompt_mask, tokens, mask, None, None)
        log_probs, _ = score(policy, answers, 1.0)
        loss = -log_probs[mask].mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            say(f"imitating demonstrations: step {step + 1} of {args.pretrain_steps}, loss {loss.item():.3f}")
    return policy.state_dict()


def train(args: Args) -> dict:
    """Trains an agent; returns {"run_dir", "global_step", "proxy_score", "true_score": those of the last test}.

    Raises InputError for settings that cannot work, FloatingPointError when the training diverged.
    """
    task, tests = make_task(args)
    excluded = {task.prompt(problem) for problem in tests}
    keep_freed_memory()
    torch.set_num_threads(1)  # matrices this small are faster with one thread
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    starts = None if args.resume else make_starts(task, excluded, args)
    torch.manual_seed(args.seed)
    agent = Agent(args)
    if starts:
        agent.start_from(*starts, args)
    # [llm-19] [core-3] [extra-1] The work that PPO for language models goes back to used TensorFlow 1's Adam.
    adam = Adam(agent.to(device))
    base_rates = torch.full_like(adam.parameters, args.learning_rate)
    base_rates[sum(p.numel() for p in agent.policy.parameters()) :] = args.value_learning_rate

    run = Run(args, agent, adam)
    if run.update == 0:
        values, examples = test(agent, task, tests, 0, args)
        facts = zip(FACTS, agent.facts.tolist())
        run.log_test(values | {f"reward_model/{name}": fact for name, fact in facts}, examples)
    for update in range(run.update, args.num_updates):
        # [core-4] The steps shrink linearly; the factor of the last update is 1/num_updates, not 0. [extra-10]
        remaining = 1 - update / args.num_updates if args.anneal_lr else 1
        kl_coef = agent.kl_coef.item() if args.adaptive_kl else args.kl_coef
        now = replace(args, kl_coef=kl_coef)

        # [llm-21] New problems; which ones depends on nothing but seed and update.
        problems = draw_problems(task, random.Random(f"problems {args.seed} {update}"), args.num_envs, excluded)
        prompts, prompt_mask = (tensor.to(device) for tensor in make_prompts(task, problems, args))
        answers = generate(agent.policy, prompts, prompt_mask, args)
        mask = answers.mask
        with torch.no_grad():
            rewards = proxy_scores(agent.reward_model, answers, args)
            # [llm-7] The sampler's numbers differ by rounding, or more if it is another program. The ratio must start
            # at 1, and therefore both of its sides come from the same computation.
            learner_log_probs, _ = score(agent.policy, answers, args.temperature)
            log_probs = learner_log_probs if args.learner_log_probs else answers.log_probs
            reference, _ = score(agent.reference, answers, args.temperature)
            values = predict(agent.critic, answers)
            each = token_rewards(rewards, mask, log_probs - reference, now)
            advantages, returns = compute_advantages(each, values, mask, args)
            divergence = ((log_probs - reference) * mask).sum(1).mean().item()
        batch = Batch(prompts, prompt_mask, answers.tokens, mask, log_probs, reference, advantages, returns, values)

        terms, log_ratios = [], []
        for epoch in range(args.update_epochs):
            # [core-6] Each epoch shuffles the answers anew and uses every one of them once. [extra-12]
            first = len(log_ratios)
            for order in torch.randperm(args.num_envs).view(args.num_minibatches, -1).to(device):
                step_size, epsilon = adam.coefficients(base_rates * remaining, args)
                minibatch = Batch(*(tensor[order] for tensor in batch))
                minibatch_terms, log_ratio = gradient_step(agent, adam, minibatch, step_size, epsilon, now)
                terms.append(minibatch_terms)
                log_ratios.append(log_ratio)
            # [aux-3] The policy is then far enough from the one that collected the data.
            if args.target_kl is not None:
                change = policy_change(torch.cat(log_ratios[first:]), args.clip_coef)
                if change["losses/approx_kl"] > args.target_kl:
                    break
        agent.kl_coef.fill_(adapted_kl_coef(kl_coef, divergence, args) if args.adaptive_kl else kl_coef)

        # [core-12] Means over all minibatches of the update, each taken before its own gradient step. [extra-8]
        names = ("losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/reference_kl")
        losses = dict(zip(names, torch.stack(terms).mean(0).tolist(), strict=True))
        losses |= policy_change(torch.cat(log_ratios), args.clip_coef)
        check_finite(losses | {"a parameter": adam.parameters}, run)
        losses["losses/explained_variance"] = (1 - (returns - values)[mask].var() / returns[mask].var()).item()
        # [llm-20] How far the sampler is from the learner, and how long answers get: what goes wrong shows here first.
        losses["losses/sampler_gap"] = (answers.log_probs - learner_log_probs)[mask].abs().mean().item()
        reward = rewards.mean().item()
        metrics = {
            "charts/reward": reward,
            "charts/episodic_return": reward,  # CleanRL's name
            "charts/reference_kl": divergence,
            "charts/kl_coef": kl_coef,
            "charts/episodic_length": mask.sum(1).float().mean().item(),
            "charts/truncated": answers.truncated.float().mean().item(),
            "charts/learning_rate": args.learning_rate * remaining,
        } | losses
        tested = (update + 1) % args.eval_interval == 0 or update + 1 == args.num_updates
        result = test(agent, task, tests, update + 1, args) if tested else None
        run.end_update(metrics, f"{task.prompt(problems[0])} {decode(answers.tokens[:1])[0]}", result)
        if SIGNALS:
            break

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
    limits |= {"pretrain_steps": (0, 2**31), "best_of": (0, 2**31), "truncated_score": (-(2**53), 2**53)}
    limits |= {"num_pairs": (2, 2**31), "num_heldout_pairs": (2, 2**31), "reward_epochs": (0, 2**31)}
    for name, value in vars(args).items():
        low, high = limits.get(name, (1, 2**31 - 1) if type(value) is int else (0, 2**53))
        if type(value) in (int, float) and not low <= value <= high:  # also catches not-a-number
            raise InputError(f"--{name.replace('_', '-')} must be from {low} to {high}, not {value}")
    for name in ("temperature", "target_kl_reference", "kl_horizon"):
        if getattr(args, name) == 0:
            raise InputError(f"--{name.replace('_', '-')} must be above 0")
    if args.total_timesteps < args.batch_size:
        raise InputError(f"--total-timesteps {args.total_timesteps:.0f} is below one rollout, {args.batch_size} tokens")
    if args.num_envs % args.num_minibatches:
        raise InputError(f"{args.num_envs} answers cannot be cut into {args.num_minibatches} equal minibatches")
    if args.width % args.heads:
        raise InputError(f"--width {args.width} cannot be shared by {args.heads} heads")
    if args.adaptive_kl and args.kl_horizon < args.num_envs:
        raise InputError(f"--kl-horizon must be at least the {args.num_envs} answers of a rollout, for small steps")
    if args.adaptive_kl and args.kl_coef == 0:
        raise InputError("--adaptive-kl multiplies --kl-coef, which must therefore be above 0")
    if args.best_of and not args.evaluate:
        raise InputError("--best-of needs --evaluate RUN: it tests a run's supervised start and reward model")
    if args.cuda and not torch.cuda.is_available():
        say("PyTorch finds no GPU: using the CPU")


def make_task(args: Args) -> tuple:
    """The task and its test problems, the same for all seeds; raises InputError for settings that cannot work."""
    check_args(args)
    module, _, name = args.env_id.rpartition(":")
    if not module and name not in TASKS:
        raise InputError(f"there is no task {name}: it is {', '.join(TASKS)} or module:Class")
    try:
        task = getattr(importlib.import_module(module), name)() if module else TASKS[name]()
    except Exception as error:
        raise InputError(f"cannot make {args.env_id}: {one_line(error)}") from error
    if missing := [method for method in ("problem", "prompt", "score", "demonstration") if not hasattr(task, method)]:
        raise InputError(f"{args.env_id} has no {' and no '.join(missing)}")
    tests = draw_problems(task, random.Random("test problems"), args.num_test)
    make_prompts(task, tests, args)
    answers = Answers(None, None, encode(["0"], 1, left=False)[0], None, None, torch.tensor([False]))
    for problem in tests[:10]:  # whatever is wrong with a score should show before the model is trained
        true_scores(task, [problem], answers)
    return task, tests


def cached(make: Callable, more: tuple[str, ...], task, args: Args) -> dict[str, torch.Tensor]:
    """Weights that take long to make: those that an earlier run with the same settings and code left, or new ones."""
    names = ("env_id", "seed", "num_test", "max_prompt", "num_steps", "mask_positions", "width", "layers", "heads",
             "pretrain_steps", "pretrain_batch", "pretrain_lr", *more)  # fmt: skip
    code = [Path(file).read_bytes().hex() for file in (__file__, sys.modules[type(task).__module__].__file__)]
    code += [torch.__version__, torch.backends.cpu.get_cpu_capability()]
    key = json.dumps([code, *((name, getattr(args, name)) for name in names)])
    path = Path(args.cache_dir, f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.pt")
    if args.cache_dir and path.exists():
        with contextlib.suppress(Exception):  # whatever is wrong with the file, it can be made anew
            return torch.load(path, map_location="cpu", weights_only=True)
    weights = make()
    if args.cache_dir:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(weights, path.with_suffix(f".{os.getpid()}"))
            os.replace(path.with_suffix(f".{os.getpid()}"), path)  # others never see half a file
        except (OSError, RuntimeError) as error:  # the second one is what torch makes of a full disk
            say(f"the supervised start is not kept: {error}")
    return weights


def make_starts(task, excluded: set[str], args: Args) -> tuple[dict, dict]:
    """Weights of a supervised policy, and of a reward model for its answers with its facts."""
    policy, names = Transformer(len(CHARACTERS), args), [field.name for field in fields(Args)]
    policy.load_state_dict(cached(lambda: pretrain(task, excluded, args), (), task, args))
    more = tuple(names[names.index("num_pairs") : names.index("cache_dir")]) + ("temperature",)
    reward_model = cached(lambda: train_reward_model(task, policy, excluded, args), more, task, args)
    return policy.state_dict(), reward_model


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

    def log_test(self, values: dict[str, float], examples: str) -> None:
        """Logs a test, and keeps some of its answers."""
        self.log(self.global_step, values)
        self.write(f"answers_{self.update}.txt", examples.encode())

    def end_update(self, values: dict[str, float], example: str, result: tuple[dict[str, float], str] | None) -> None:
        """Logs an update and its test, if there is one; shows progress, and saves a checkpoint when it is time."""
        self.update += 1
        step, now = self.measured_from
        values["charts/SPS"] = int((self.global_step - step) / (time.time() - now))
        if result:
            scores = (result[0]["eval/proxy_score"], result[0]["eval/true_score"])
            self.returns = [*self.returns[-198:], *scores]
            self.log_test(result[0] | values, result[1])
        else:
            self.log(self.global_step, values)
        with contextlib.suppress(Exception):  # as in say()
            if not self.bar:
                line, every = "{desc}: {n_fmt} of {total_fmt} updates{postfix}, {remaining} left\n", 10
                line, every = (None, 0.1) if sys.stderr.isatty() else (line, every)
                self.bar = tqdm(total=self.args.num_updates, initial=self.update, desc=self.args.env_id,
                                unit=" updates", bar_format=line, mininterval=every)  # fmt: skip
            scores = ", proxy {:.2f}, true score {:.2f}".format(*self.returns[-2:]) if self.returns else ""
            postfix = f"reward {values['charts/reward']:.2f}{scores}, {example!r:.60}"
            self.bar.set_postfix_str(postfix, refresh=False)
            self.bar.update(self.update - self.bar.n)
        if self.update % self.args.checkpoint_interval == 0:
            self.save()

    def close(self) -> dict:
        """Saves, ends progress bar and tracking; returns what train() does."""
        self.save()
        self.metrics.close()
        with contextlib.suppress(Exception):
            self.bar.close()
        if self.wandb:
            self.wandb.finish()
        proxy, true = self.returns[-2:] if self.returns else (math.nan, math.nan)
        return {"run_dir": str(self.path), "global_step": self.global_step, "proxy_score": proxy, "true_score": true}


@torch.no_grad()
def sample_tests(policy: Transformer, agent: Agent, task, tests: list, args: Args, generator=None):
    """Answers to the test problems, their proxy scores, true scores and divergences [3, B], and their texts."""
    device = next(policy.parameters()).device
    prompts = [tensor.to(device) for tensor in make_prompts(task, tests, args)]
    answers = generate(policy, *prompts, args, generator=generator)
    log_ratio = score(policy, answers, args.temperature)[0] - score(agent.reference, answers, args.temperature)[0]
    true, texts = true_scores(task, tests, answers)
    scores = [proxy_scores(agent.reward_model, answers, args).cpu(), true, (log_ratio * answers.mask).sum(1).cpu()]
    return answers, torch.stack(scores), texts


def test(agent: Agent, task, tests: list, update: int, args: Args) -> tuple[dict[str, float], str]:
    """Metrics of the policy on the test problems, and some answers. Leaves training's random numbers alone."""
    generator = torch.Generator().manual_seed(args.seed * 1000003 + update)
    answers, scores, texts = sample_tests(agent.policy, agent, task, tests, args, generator)
    means = dict(zip(("eval/proxy_score", "eval/true_score", "eval/reference_kl"), scores.mean(1).tolist()))
    means["eval/correlation"] = torch.corrcoef(scores[:2])[0, 1].item()
    means["eval/length"] = answers.mask.sum(1).float().mean().item()
    shown = zip(*scores[:2, :20].tolist(), tests, texts)
    return means, "".join(f"{proxy:.2f} {true:g} {task.prompt(of)} {text}\n" for proxy, true, of, text in shown)


def evaluate(args: Args) -> tuple[float, float]:
    """Tests a trained policy, or best-of-N of its supervised start; prints and returns proxy and true score."""
    task, tests = make_task(args)
    agent = Agent(args)
    restore(Path(args.evaluate).resolve(), agent)
    torch.manual_seed(args.seed)
    policy, count, name = agent.policy, 1, "the policy"
    if args.best_of:
        policy, count, name = agent.reference, args.best_of, f"the supervised start, --best-of {args.best_of},"
    tries = torch.stack([sample_tests(policy, agent, task, tests, args)[1] for _ in range(count)])  # [N, 3, B]
    chosen = tries[:, 0].argmax(0)
    proxy, true, divergence = tries[chosen, :, range(len(tests))].mean(0).tolist()
    if args.best_of:
        # [llm-30] Choosing among N samples moves their distribution by this much: the same axis as for PPO. It is an
        # upper bound where equal answers are drawn.
        divergence = math.log(count) - (count - 1) / count
    print(f"{args.env_id}: proxy score {proxy:.3f}, true score {true:.3f}, divergence {divergence:.2f} "
          f"of {name} on {len(tests)} test problems")  # fmt: skip
    return proxy, true


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
    resumed = parse(saved)
    if ":" in resumed.env_id and args.env_id != resumed.env_id:  # the directory may be somebody else's
        raise InputError(f"to let {run_dir} import a module, repeat its --env-id {resumed.env_id}")
    if args.resume and resumed.batch_size != saved.batch_size:
        raise InputError("--num-envs x --num-steps cannot change with --resume: updates would not match steps")
    return resumed


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, also after a signal; 2 for bad input; 1 for other failures."""
    sys.path.append(os.getcwd())  # where --env-id my_module:MyTask may find my_module.py
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
        scores = "proxy score {proxy_score:.3f}, true score {true_score:.3f}".format(**result)
        print(f"{result['run_dir']}: {result['global_step']} steps, {scores}")
        if result["global_step"] < args.num_updates * args.batch_size:
            print(f"stopped by a signal; go on with: python {SCRIPT}.py --resume {result['run_dir']}")
        return 0
    except (InputError, FloatingPointError, OSError) as error:
        # Those of the task's own lines keep their traceback.
        own = traceback.extract_tb(error.__traceback__)[-1].filename == __file__
        if not own and isinstance(error, FloatingPointError | OSError):
            raise
        say(f"{SCRIPT}.py: error: {error if own else one_line(error)}")
        return 2 if isinstance(error, InputError) else 1


def on_signal(number: int, frame) -> None:
    """Lets the training end after the present update. A second Ctrl-C kills it."""
    SIGNALS.append(number)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
