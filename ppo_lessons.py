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
"""Learning from reflection instead of from a scalar alone: lessons that a language model writes itself, in one file.

A model tries hidden tasks. Its attempts with their rewards go back into its context, and it writes down what worked: a
lesson, which is tried on fresh problems, kept in a data base if it helps, and put in front of later prompts. In the
end the lessons are distilled into the weights, and the context is empty again. The idea is A. Karpathy's (a post of
2025); GEPA (arXiv:2507.19457) evolves prompts by reflection, and context distillation (arXiv:2112.00861) is the end.

    python ppo_lessons.py                       lessons, and their distillation
    python ppo_lessons.py --baseline ppo --total-timesteps 81920     PPO on the same tasks, with rewards alone
    python ppo_lessons.py --no-reflection       an ablation: lessons at random, selected in the same way

Following a lesson and writing one are no gift here: the small transformer is first trained to do both, on synthetic
tasks with other secret words than those of the evaluation, which never occur in it. What is shown is what the loop
makes of that ability, not where a model has it from. docs/lessons.md has the results, failures included.

train() is the algorithm; what it calls stands above it, and what has nothing to do with learning below.
"""

import contextlib
import copy
import ctypes
import functools
import hashlib
import importlib
import io
import itertools
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
from dataclasses import asdict, dataclass, fields, make_dataclass
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

    total_timesteps: float = 3_200  # places for tokens in the answers of all rollouts, floored to whole ones
    num_envs: int = 64  # answers in one rollout, those to all tasks together
    num_steps: int = 5  # the most tokens of an answer or a lesson, its end included
    baseline: Literal["none", "ppo"] = "none"  # learn from lessons, or with PPO from the rewards alone
    num_lessons: int = 4  # lessons that are written in one reflection
    trials: int = 1  # fresh problems on which each lesson is tried first; then twice as many for the better half
    good_enough: float = 0.97  # a task whose lesson scores this is left alone
    reflection: bool = True  # write lessons from attempts; off: words at random, selected in the same way
    wrong_rewards: bool = False  # let the reflection see rewards of another task
    selection: bool = True  # try lessons on fresh problems; off: the first one that is written is taken
    plain_transcripts: bool = False  # write rewards before the attempts; off: add them to each of their tokens
    distillation: bool = True  # move the lessons into the weights at the end
    distill_steps: int = 150  # gradient steps of the distillation
    distill_batch: int = 64  # prompts in each of them; as many are about other things, which must stay as they are
    distill_learning_rate: float = 1e-3  # their highest learning rate
    learning_rate: float = 1e-3  # PPO's learning rate of the policy, at the start
    value_learning_rate: float = 1e-3  # PPO's learning rate of the value network, at the start
    anneal_lr: bool = True  # lower PPO's learning rates linearly to 0 [core-4]
    gamma: float = 1.0  # PPO's discount factor, 0 to 1
    gae_lambda: float = 0.95  # GAE: from 0 (one-step TD error) to 1 (the answer's reward)
    num_minibatches: int = 4  # equal parts that PPO cuts a rollout into [core-6]
    update_epochs: int = 4  # PPO's passes over a rollout in one update [core-6]
    temperature: float = 1.0  # of the sampler, and of the probabilities that are learned
    clip_coef: float = 0.2  # clip range of the probability ratio and of the value loss [core-8] [core-9]
    ent_coef: float = 0.0  # weight of the entropy bonus [core-10]
    vf_coef: float = 0.5  # weight of the value loss [core-10]
    max_grad_norm: float = 1.0  # limit of the gradient's global norm; inf: no limit [core-11]
    adam_eps: float = 1e-5  # epsilon of Adam [core-3]
    adam_eps_hat: bool = True  # add epsilon where TensorFlow 1 does; off: where PyTorch does [extra-1]


@dataclass
class EnvironmentArgs:
    """What to learn, and with which model."""

    env_id: str = "words"  # the tasks: words (secret ones), or module:Class
    num_tasks: int = 8  # tasks that are learned at the same time, 1 to 11
    num_test: int = 50  # problems of each task in a test; they do not count as attempts
    model: str = ""  # module:Class of another model, which answers and reflects in its own way
    max_prompt: int = 96  # the most tokens of a prompt
    mask_positions: bool = True  # count positions from the first real token; off: from the padding
    width: int = 64  # features of each token in the transformer
    layers: int = 2  # blocks of the transformer
    heads: int = 4  # attention heads of each block
    pretrain_steps: int = 600  # gradient steps in which following and writing lessons is learned
    pretrain_batch: int = 48  # examples of both in each of them
    pretrain_lr: float = 3e-3  # their highest learning rate
    cache_dir: str = ".pretrained"  # where pre-trained models are kept for the next run; empty: nowhere


@dataclass
class RunArgs:
    """Where to run and what to keep."""

    exp_name: str = SCRIPT  # name of the experiment, part of the run directory's name
    seed: int = 1  # seeds the network, the tasks, the sampler and the shuffles
    track: bool = False  # send the metrics to Weights & Biases as well (WANDB_MODE=offline needs no account)
    wandb_project_name: str = "ppo37"  # project at Weights & Biases
    wandb_entity: str | None = None  # user or team at Weights & Biases
    runs_dir: str = "runs"  # where run directories are created
    checkpoint_interval: int = 1  # updates between two checkpoints; a killed run loses at most this much
    eval_interval: int = 1  # updates between two tests
    start_from: str = ""  # run directory whose policy is the start, for example a distilled one
    resume: str | None = None  # go on with the run in this directory, with its settings (flags given beside it win)
    evaluate: str | None = None  # test the model in this run directory instead of training


@dataclass
class Args(AlgorithmArgs, EnvironmentArgs, RunArgs):
    """Learning from lessons that the model writes itself."""

    @property
    def batch_size(self) -> int:
        """Places for tokens in one rollout, few of which are filled at first."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """Rounds of lessons, or updates of PPO: only whole rollouts count [extra-11]."""
        return int(self.total_timesteps // self.batch_size)


LETTERS, SLOTS, NAMES = "abcdef", 4, "PQRSTUVWXYZ"
WORDS = ["".join(word) for word in itertools.product(LETTERS, repeat=SLOTS)]
random.Random("words").shuffle(WORDS)
# The words of the evaluation never occur in the pre-training: neither as a lesson nor as what attempts are graded by.
EVALUATION_WORDS, TRAINING_WORDS = WORDS[: len(WORDS) // 4], WORDS[len(WORDS) // 4 :]


class Problem(NamedTuple):
    """A question of a task, with a lesson or an empty text in front."""

    task: str
    question: str
    lesson: str = ""


class Attempt(NamedTuple):
    """A question, the answer to it, and its reward from 0 to 1."""

    question: str
    answer: str
    reward: float


class Lesson(NamedTuple):
    """A line of lessons.jsonl: the lesson that won a round of a task."""

    round: int
    task: str
    lesson: str  # empty at first
    parent: str | None  # the lesson of the attempts that it was written from
    score: float  # the mean reward of attempts at new problems, after it had won
    attempts: list  # those, as [question, answer, reward]
    graded: int  # attempts at all tasks that were graded so far


def say_word(word: str, question: str, rng: random.Random) -> str:
    """The answer to a question of digits by a word: a capital where the digit is odd, any letter for each "?"."""
    letters = (rng.choice(LETTERS) if letter == "?" else letter for letter in word)
    return "".join(letter.upper() if int(digit) % 2 else letter for letter, digit in zip(letters, question))


class SecretWords:
    """Tasks that each have a secret word, by which their questions are to be answered: "R:4170=" with "cAEb".

    An answer counts up to its first mistake. A lesson is the word, as far as it is known: "ca??". Tasks of your own,
    which need a --model, have names, question(task, rng) and reward(problem, text) from 0 to 1, and may have
    oracle(task), the best lesson there is.
    """

    def __init__(self, args: Args):
        self.names = list(NAMES[: args.num_tasks])
        words = random.Random(f"tasks {args.seed}").sample(EVALUATION_WORDS, 2 * args.num_tasks)
        self.words, self.other_words = dict(zip(self.names, words)), words[args.num_tasks :]

    def question(self, task: str, rng: random.Random) -> str:
        """Four digits."""
        return f"{rng.randrange(10**SLOTS):0{SLOTS}}"

    def prompt(self, problem: Problem) -> str:
        """What the model reads."""
        return f"{problem.lesson}{problem.task}:{problem.question}="

    def oracle(self, task: str) -> str:
        """The lesson that says all."""
        return self.words[task]

    def reward(self, problem: Problem, text: str) -> float:
        """The part of the answer before its first mistake; nothing if it does not end in time."""
        return up_to_mistake(self.words[problem.task], problem.question, text)


def up_to_mistake(word: str, question: str, text: str) -> float:
    """How much of a text, from 0 to 1, is the answer to a question by a word before the first mistake."""
    wanted = say_word(word, question, random)
    return len(os.path.commonprefix([wanted, text])) / SLOTS if len(text) <= SLOTS else 0.0


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


def make_transcripts(groups: list[list[Attempt]], args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups of attempts with their rewards as tokens [B, P] and mask [B, P], each with a "!" that asks for a lesson.

    A reward is a mark from 1 to SLOTS + 1. A marked token is the character's plus as many times the characters' number.
    """
    texts, marks = [], []
    for attempts in groups:
        levels = [round(attempt.reward * SLOTS) for attempt in attempts]
        # A reward that is written before its attempt reaches the attempt's tokens by attention alone; a mark is a part
        # of each of them.
        lines = [f"{level if args.plain_transcripts else ''}{attempt.question}{attempt.answer}\n"
                 for level, attempt in zip(levels, attempts)]  # fmt: skip
        texts.append("".join(lines) + "!")
        marks.append([level + 1 for level, line in zip(levels, lines) for _ in line] + [0])
    tokens, mask = encode(texts, args.max_prompt, left=True)
    if not args.plain_transcripts:
        for row, row_marks in zip(tokens, marks):
            row[len(row) - len(row_marks) :] += len(CHARACTERS) * torch.tensor(row_marks)
    return tokens, mask


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


class MarkedTokens(nn.Module):
    """The embedding of characters, plus that of the mark that a token may have: a segment embedding."""

    def __init__(self, width: int):
        super().__init__()
        self.characters, self.marks = nn.Embedding(len(CHARACTERS), width), nn.Embedding(SLOTS + 2, width)
        for embedding in (self.characters, self.marks):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [B, T] with marks -> [B, T, width]."""
        marks = tokens // len(CHARACTERS)
        return self.characters(tokens % len(CHARACTERS)) + self.marks(marks) * (marks > 0).unsqueeze(-1)


class Reader(Transformer):
    """A transformer whose tokens may have marks."""

    def __init__(self, outputs: int, args: Args):
        super().__init__(outputs, args)
        self.tokens = MarkedTokens(args.width)


class Agent(nn.Module):
    """The policy, and for PPO a value network that starts as its copy, with a head of 0."""

    def __init__(self, args: Args):
        super().__init__()
        self.policy = Reader(len(CHARACTERS), args)
        self.critic = Reader(1, args) if args.baseline == "ppo" else None

    def start_from(self, weights: dict[str, torch.Tensor]) -> None:
        """Starts from the weights of a policy."""
        self.policy.load_state_dict(weights)
        if self.critic:
            self.critic.load_state_dict({k: v for k, v in weights.items() if "head" not in k}, strict=False)
            nn.init.zeros_(self.critic.head.weight)


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


def draw_question(rng: random.Random) -> str:
    """A question of the secret words."""
    return SecretWords.question(None, "", rng)


def follow_examples(rng: random.Random, number: int) -> list[Problem]:
    """Problems with whole, partial and no lessons, all of them from words of the training."""
    words = [rng.choice(TRAINING_WORDS)[: rng.choice((1, 2, 3, 4, 4, 4))].ljust(SLOTS, "?") for _ in range(number)]
    return [Problem(rng.choice(NAMES), draw_question(rng), word if rng.random() < 0.75 else "") for word in words]


def reflection_example(rng: random.Random, args: Args) -> tuple[list[Attempt], str]:
    """Attempts at a word of which some letters are known, and the lesson: the word as far as one of them got."""
    word, known, most = rng.choice(TRAINING_WORDS), rng.randint(0, SLOTS), args.num_envs // args.num_tasks
    belief = word[:known] + (rng.choice(LETTERS) if rng.random() < 0.2 else "")  # which may be wrong
    attempts = []
    for _ in range(most if rng.random() < 0.5 else rng.randint(1, most)):
        question = draw_question(rng)
        answer = say_word(belief[:SLOTS].ljust(SLOTS, "?"), question, rng)
        attempts.append(Attempt(question, answer, up_to_mistake(word, question, answer)))
    return attempts, word[: round(max(a.reward for a in attempts) * SLOTS)].ljust(SLOTS, "?")


def imitation_loss(policy: Reader, prompts: torch.Tensor, prompt_mask: torch.Tensor, texts: list[str], args: Args):
    """The mean negative log-probability [] of texts, and of their ends, after prompts [B, P] with mask [B, P]."""
    tokens, mask = encode(texts, args.num_steps - 1, left=False)
    # One more column is real in each row: the EOS after the text.
    tokens, mask = F.pad(tokens, (0, 1), value=EOS), F.pad(mask, (1, 0), value=True)
    return -score(policy, Answers(prompts, prompt_mask, tokens, mask, None, None), 1.0)[0][mask].mean()


def pretrain(args: Args) -> dict[str, torch.Tensor]:
    """The weights of a policy that has learned to follow lessons, and to write one from attempts with rewards."""
    torch.manual_seed(args.seed)
    rng, policy = random.Random(f"demonstrations {args.seed}"), Reader(len(CHARACTERS), args)
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.01)
    for step in range(args.pretrain_steps):
        progress = step / args.pretrain_steps
        optimizer.param_groups[0]["lr"] = args.pretrain_lr * min(1, (step + 1) / 50, max(0.05, 1 - progress))
        problems = follow_examples(rng, args.pretrain_batch)
        answers = [say_word(problem.lesson or "?" * SLOTS, problem.question, rng) for problem in problems]
        groups, lessons = zip(*(reflection_example(rng, args) for _ in range(args.pretrain_batch)))
        loss = imitation_loss(policy, *make_prompts(SecretWords(args), problems, args), answers, args)
        loss = loss + imitation_loss(policy, *make_transcripts(groups, args), lessons, args)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            say(f"learning about lessons: step {step + 1} of {args.pretrain_steps}, loss {loss.item():.3f}")
    return policy.state_dict()


class Student:
    """The transformer as the loop sees it. A --model of your own is a class with these two methods, without arguments.

    That one may write its lessons in English, and is asked for them in its own way; nothing is distilled into it.
    """

    def __init__(self, policy: Reader, tasks, args: Args):
        self.policy, self.tasks, self.args = policy, tasks, args

    def answer(self, problems: list[Problem]) -> list[str]:
        """Answers to problems, whose lessons stand in front of their questions."""
        return decode(generate(self.policy, *make_prompts(self.tasks, problems, self.args), self.args).tokens)

    def reflect(self, attempts: list[Attempt], number: int) -> list[str]:
        """Lessons that say what worked in these attempts."""
        transcripts = make_transcripts([attempts] * number, self.args)
        return decode(generate(self.policy, *transcripts, self.args).tokens)


class Grader:
    """Lets a model try tasks, and counts every attempt that is graded."""

    def __init__(self, model, tasks, graded: int):
        self.model, self.tasks, self.graded = model, tasks, graded

    def attempt(self, task: str, lesson: str, number: int, rng: random.Random) -> list[Attempt]:
        """Attempts at fresh problems with a lesson in front."""
        problems = [Problem(task, self.tasks.question(task, rng), lesson) for _ in range(number)]
        texts = self.model.answer(problems) if problems else []
        self.graded += number
        return [Attempt(p.question, text, checked_reward(self.tasks, p, text)) for p, text in zip(problems, texts)]


def reflect(grader: Grader, current: Lesson, rng: random.Random, args: Args) -> list[str]:
    """New lessons for a task, written from the attempts with its current one."""
    attempts = [Attempt(*attempt) for attempt in current.attempts]
    if not args.reflection:
        return [rng.choice(WORDS) for _ in range(args.num_lessons)]
    if args.wrong_rewards:
        names = grader.tasks.names
        other = names[names.index(current.task) - 1]
        attempts = [a._replace(reward=grader.tasks.reward(Problem(other, a.question), a.answer)) for a in attempts]
    if len({attempt.reward for attempt in attempts}) == 1:
        say(f"task {current.task}: all attempts with the lesson {current.lesson!r} had the reward "
            f"{attempts[0].reward}: there is nothing to reflect on")  # fmt: skip
        return []
    return grader.model.reflect(attempts, args.num_lessons)


def select(grader: Grader, task: str, rewards: dict[str, list[float]], rng: random.Random, args: Args) -> str:
    """The lesson with the highest mean reward, by successive halving; rewards so far are known for some of them."""
    # Their own attempts have inspired the lessons: only fresh problems can tell whether they help. Few of them are
    # enough to drop the worse half, and more are spent on the others.
    lessons, number = list(rewards), args.trials
    while len(lessons) > 1:
        for lesson in lessons:
            missing = max(0, number - len(rewards[lesson]))
            rewards[lesson] += [attempt.reward for attempt in grader.attempt(task, lesson, missing, rng)]
        lessons.sort(key=lambda lesson: -sum(rewards[lesson]) / len(rewards[lesson]))  # a new one must be better
        lessons, number = lessons[: (len(lessons) + 1) // 2], 2 * number
    return lessons[0]


def improve(grader: Grader, earlier: list[Lesson], task: str, update: int, rng: random.Random, args: Args) -> Lesson:
    """One round of a task, given the winners of earlier ones: reflection, selection, attempts at new problems.

    In the first round there are only attempts, without a lesson.
    """
    winner, parent = "", None
    if earlier:
        winner = parent = earlier[-1].lesson
        new = reflect(grader, earlier[-1], rng, args)
        if args.selection:
            # What earlier rounds know of the current lesson and of the empty one, which both compete, is used again.
            rewards = {lesson: [] for lesson in (parent, "", *new)}
            for old in earlier:
                rewards.get(old.lesson, []).extend(reward for _, _, reward in old.attempts)
            winner = select(grader, task, rewards, rng, args)
        elif new:
            winner = new[0]
    # The winner was the best of several, and its score therefore too good: it is measured anew. The next round reflects
    # on these attempts.
    attempts = grader.attempt(task, winner, args.num_envs // args.num_tasks, rng)
    score = sum(attempt.reward for attempt in attempts) / len(attempts)
    return Lesson(update, task, winner, parent, score, [list(attempt) for attempt in attempts], grader.graded)


def distill(policy: Reader, lessons: dict[str, str], tasks, args: Args) -> dict[str, float]:
    """Trains the policy to answer without a lesson as it did with one. Nothing is graded."""
    teacher, rng = copy.deepcopy(policy), random.Random(f"distillation {args.seed}")
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0)
    for step in range(args.distill_steps if lessons else 0):
        optimizer.param_groups[0]["lr"] = args.distill_learning_rate * (1 - step / args.distill_steps)
        names = rng.choices(list(lessons), k=args.distill_batch)
        taught = [Problem(name, tasks.question(name, rng), lessons[name]) for name in names]
        # What the policy does with other lessons, and in other tasks, is to stay as it was.
        kept = [p for p in follow_examples(rng, args.distill_batch) if p.lesson or p.task not in lessons]
        answers = generate(teacher, *make_prompts(tasks, taught + kept, args), args)
        prompts = make_prompts(tasks, [problem._replace(lesson="") for problem in taught] + kept, args)
        with torch.no_grad():
            wanted = outputs_after(teacher, *answers[:2], answers.tokens)[:, :-1].log_softmax(-1)
        found = outputs_after(policy, *prompts, answers.tokens)[:, :-1].log_softmax(-1)
        divergence = (wanted.exp() * (wanted - found)).sum(-1)[answers.mask].mean()
        optimizer.zero_grad()
        divergence.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
        optimizer.step()
    return {"losses/distillation": divergence.item()} if lessons else {}


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


class Batch(NamedTuple):
    """B answers: those of a rollout, or of a minibatch."""

    prompts: torch.Tensor  # [B, P]
    prompt_mask: torch.Tensor  # [B, P]
    tokens: torch.Tensor  # [B, T]
    mask: torch.Tensor  # [B, T]: the tokens up to the end
    log_probs: torch.Tensor  # [B, T]: log-probabilities of the tokens when they were drawn
    advantages: torch.Tensor  # [B, T]
    returns: torch.Tensor  # [B, T]: what the value function should say
    values: torch.Tensor  # [B, T]: what it said


def ppo_loss(log_probs: torch.Tensor, entropy: torch.Tensor, values: torch.Tensor, batch: Batch, args: Args):
    """The loss of a minibatch of B answers of T tokens.

    log_probs, entropy and values [B, T] are what the agent now says of its tokens. Returns the loss [], its terms [3]
    (policy loss, value loss, entropy) and the log-ratios of new to old policy [tokens].
    """
    mask = batch.mask
    log_ratio = (log_probs - batch.log_probs)[mask]
    ratio, advantages = log_ratio.exp(), batch.advantages[mask]
    # [core-8] Taking the worse of both leaves nothing to gain from moving the ratio out of the clip range.
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean()
    # [core-9] The same for the value function: nothing to gain from moving further than clip_coef from the old value.
    clipped_values = values.clamp(batch.values - args.clip_coef, batch.values + args.clip_coef)
    errors = torch.maximum((values - batch.returns).square(), (clipped_values - batch.returns).square())
    value_loss, entropy = 0.5 * errors[mask].mean(), entropy[mask].mean()
    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss  # [core-10]
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


def gradient_step(agent: Agent, adam: Adam, minibatch: Batch, step_size, epsilon, args: Args):
    """Improves the agent on one minibatch; returns the loss's terms and the log-ratios, as ppo_loss does."""
    log_probs, entropy = score(agent.policy, minibatch, args.temperature)
    loss, terms, log_ratio = ppo_loss(log_probs, entropy, predict(agent.critic, minibatch), minibatch, args)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, adam.tensors)])
    with torch.no_grad():
        # [core-11] One norm over all parameters together: clipping shortens the gradient but keeps its direction.
        gradient *= (args.max_grad_norm / gradient.square().sum().sqrt()).clamp(max=1)
        adam.step(gradient, step_size, epsilon)
    return terms, log_ratio


def ppo_update(agent: Agent, adam: Adam, tasks, remaining: float, rng: random.Random, args: Args) -> dict[str, float]:
    """One rollout of answers without lessons, and PPO's update with their rewards; returns metrics."""
    problems = [Problem(name, tasks.question(name, rng)) for name in rng.choices(tasks.names, k=args.num_envs)]
    answers = generate(agent.policy, *make_prompts(tasks, problems, args), args)
    rewards = torch.tensor([tasks.reward(problem, text) for problem, text in zip(problems, decode(answers.tokens))])
    mask = answers.mask
    with torch.no_grad():
        log_probs, _ = score(agent.policy, answers, args.temperature)
        values = predict(agent.critic, answers) * mask  # after the end nothing can be won
        # The reward belongs to the last real token, and nothing is won by answering early: no discount.
        last = mask.sum(1) - 1
        dones = F.one_hot(last, mask.shape[1])
        each, bootstrapped = dones * rewards[:, None], F.pad(values, (0, 1))
        advantages, returns = compute_gae(each.T, bootstrapped.T, dones.T, args.gamma, args.gae_lambda)
    advantages, returns = whiten(advantages.T, mask), returns.T  # [core-7]
    batch = Batch(*answers[:4], log_probs, advantages, returns, values)
    terms, log_ratios = [], []
    for _ in range(args.update_epochs):
        # [core-6] Each epoch shuffles the answers anew and uses every one of them once. [extra-12]
        for order in torch.randperm(args.num_envs).view(args.num_minibatches, -1):
            step_size, epsilon = adam.coefficients(base_rates(agent, args) * remaining, args)
            minibatch = Batch(*(tensor[order] for tensor in batch))
            minibatch_terms, log_ratio = gradient_step(agent, adam, minibatch, step_size, epsilon, args)
            terms.append(minibatch_terms)
            log_ratios.append(log_ratio)
    names = ("losses/policy_loss", "losses/value_loss", "losses/entropy")
    losses = dict(zip(names, torch.stack(terms).mean(0).tolist(), strict=True))
    return {"charts/reward": rewards.mean().item()} | losses | policy_change(torch.cat(log_ratios), args.clip_coef)


def base_rates(agent: Agent, args: Args) -> torch.Tensor:
    """The learning rate of each parameter of the agent: those of the policy and of the value network."""
    sizes = [sum(p.numel() for p in part.parameters()) for part in (agent.policy, agent.critic)]
    return torch.cat([torch.full((n,), rate) for n, rate in zip(sizes, (args.learning_rate, args.value_learning_rate))])


def train(args: Args) -> dict:
    """Trains an agent; returns {"run_dir", "global_step", "reward": that of the last test, in the loop with lessons}.

    Raises InputError for settings that cannot work, FloatingPointError when the training diverged.
    """
    tasks, model = make_tasks(args)
    keep_freed_memory()
    torch.set_num_threads(1)  # matrices this small are faster with one thread
    weights = None if args.resume or model else starting_weights(args)
    torch.manual_seed(args.seed)
    agent = Agent(args)
    if weights:
        agent.start_from(weights)
    adam = Adam(agent)
    run = Run(args, agent, adam)
    base = LessonBase(run.path / "lessons.jsonl", tasks, run.update)
    student = model or Student(agent.policy, tasks, args)
    if run.update == 0:
        values = {"charts/attempts": 0, "eval/base": test(student, tasks, {}, args)}
        values["eval/reward"] = values["eval/base"]
        if hasattr(tasks, "oracle"):
            values["eval/oracle"] = test(student, tasks, {name: tasks.oracle(name) for name in tasks.names}, args)
        run.log(0, values | ({} if model else test_others(student, args)))
    for update in range(run.update, args.num_updates):
        rng = random.Random(f"problems {args.seed} {update}")
        if args.baseline == "ppo":
            remaining = 1 - update / args.num_updates if args.anneal_lr else 1  # [core-4]
            metrics = ppo_update(agent, adam, tasks, remaining, rng, args)
            metrics |= {"charts/attempts": (update + 1) * args.num_envs}
        else:
            grader, rows = Grader(student, tasks, base.graded), []
            for name in tasks.names:
                earlier = base.rows[name]
                if not earlier or earlier[-1].score < args.good_enough:
                    rows.append(improve(grader, earlier, name, update, rng, args))
            base.add(rows)
            scores = [earlier[-1].score for earlier in base.rows.values()]
            metrics = {"charts/reward": sum(scores) / len(scores), "charts/attempts": base.graded}
        metrics["charts/episodic_return"] = metrics["charts/reward"]  # CleanRL's name
        check_finite(metrics | {"a parameter": adam.parameters}, run)
        last = update + 1 == args.num_updates
        tested = (update + 1) % args.eval_interval == 0 or last
        if args.baseline == "ppo":
            metrics |= {"eval/reward": test(student, tasks, {}, args)} if tested else {}
        else:
            lessons = base.lessons()
            metrics |= {"eval/reward": test(student, tasks, lessons, args)} if tested else {}
            metrics |= {"eval/lessons": metrics["eval/reward"]} if tested else {}
            if last and args.distillation and not model:
                metrics |= distill(agent.policy, lessons, tasks, args)
                metrics |= {"eval/distilled": test(student, tasks, {}, args)}
        if last and not model:
            metrics |= test_others(student, args)
        run.end_update(metrics)
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
    limits |= {"num_tasks": (1, len(NAMES)), "pretrain_steps": (0, 2**31), "distill_steps": (1, 2**31)}
    for name, value in vars(args).items():
        low, high = limits.get(name, (1, 2**31 - 1) if type(value) is int else (0, 2**53))
        if type(value) in (int, float) and not low <= value <= high:  # also catches not-a-number
            raise InputError(f"--{name.replace('_', '-')} must be from {low} to {high}, not {value}")
    if args.temperature == 0:
        raise InputError("--temperature must be above 0")
    if args.total_timesteps < args.batch_size:
        raise InputError(f"--total-timesteps {args.total_timesteps:.0f} is below one rollout, {args.batch_size} tokens")
    if args.baseline == "ppo" and args.num_envs % args.num_minibatches:
        raise InputError(f"{args.num_envs} answers cannot be cut into {args.num_minibatches} equal minibatches")
    if args.num_envs % args.num_tasks:
        raise InputError(f"{args.num_envs} attempts cannot be shared by {args.num_tasks} tasks: see --num-envs")
    if args.num_steps <= SLOTS:
        raise InputError(f"--num-steps must be above {SLOTS}, the letters of a lesson")
    longest = (2 * SLOTS + 1 + args.plain_transcripts) * (args.num_envs // args.num_tasks) + 1
    if longest > args.max_prompt:
        raise InputError(f"attempts in one context have up to {longest} tokens, but --max-prompt is {args.max_prompt}")
    if args.width % args.heads:
        raise InputError(f"--width {args.width} cannot be shared by {args.heads} heads")
    if args.wrong_rewards and args.num_tasks == 1:
        raise InputError("--wrong-rewards needs another task, whose rewards they are")
    if args.env_id != "words" and not args.model:
        raise InputError("only the tasks words have a model that is trained for them here: others need --model")
    if args.model and (args.baseline == "ppo" or args.start_from):
        raise InputError("a --model of your own learns from lessons alone: no --baseline ppo and no --start-from")


def make_tasks(args: Args) -> tuple:
    """The tasks, and the model of --model or None; raises InputError for settings that cannot work."""
    check_args(args)
    made = []
    for flag, name, methods in (("env-id", args.env_id, ("names", "question", "reward")),
                                ("model", args.model, ("answer", "reflect"))):  # fmt: skip
        module, _, cls = name.rpartition(":")
        if not module and name not in ("words", ""):
            raise InputError(f"there is no {name}: --{flag} is {'words or ' if flag == 'env-id' else ''}module:Class")
        try:
            made.append(getattr(importlib.import_module(module), cls)() if module else None)
        except Exception as error:
            raise InputError(f"cannot make {name}: {one_line(error)}") from error
        if module and (missing := [method for method in methods if not hasattr(made[-1], method)]):
            raise InputError(f"{name} has no {' and no '.join(missing)}")
    tasks = made[0] or SecretWords(args)
    if len(tasks.names) != args.num_tasks:
        raise InputError(f"{args.env_id} has other than {args.num_tasks} tasks: --num-tasks {len(tasks.names)}")
    return tasks, made[1]


def checked_reward(tasks, problem: Problem, text: str) -> float:
    """The reward of a text; raises InputError if that is no number from 0 to 1."""
    reward = tasks.reward(problem, text)
    if not isinstance(reward, bool | int | float | np.number | np.bool_) or not 0 <= reward <= 1:
        raise InputError(f"the reward of task {problem.task} for {text!r:.60} is {reward!r:.60}, not from 0 to 1")
    return float(reward)


def starting_weights(args: Args) -> dict[str, torch.Tensor]:
    """Weights of a policy: those of the run to start from, of an earlier pre-training like this one, or new ones."""
    if args.start_from:
        agent = Agent(args)
        agent.critic = None
        try:
            state = torch.load(Path(args.start_from, "checkpoint.pt"), map_location="cpu", weights_only=True)["agent"]
            agent.load_state_dict({name: weight for name, weight in state.items() if not name.startswith("critic.")})
        except Exception as error:
            raise InputError(f"cannot use {Path(args.start_from, 'checkpoint.pt')}: {one_line(error)}") from error
        return agent.policy.state_dict()
    names = ("seed", "num_steps", "max_prompt", "mask_positions", "width", "layers", "heads", "pretrain_steps",
             "pretrain_batch", "pretrain_lr", "plain_transcripts", "num_envs", "num_tasks")  # fmt: skip
    code = [Path(__file__).read_bytes().hex(), torch.__version__, torch.backends.cpu.get_cpu_capability()]
    key = json.dumps([code, *(getattr(args, name) for name in names)])
    path = Path(args.cache_dir, f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.pt")
    if args.cache_dir and path.exists():
        with contextlib.suppress(Exception):  # whatever is wrong with the file, it can be made anew
            weights = torch.load(path, map_location="cpu", weights_only=True)
            Reader(len(CHARACTERS), args).load_state_dict(weights)
            return weights
    weights = pretrain(args)
    if args.cache_dir:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(weights, path.with_suffix(f".{os.getpid()}"))
            os.replace(path.with_suffix(f".{os.getpid()}"), path)  # others never see half a file
        except (OSError, RuntimeError) as error:  # the second one is what torch makes of a full disk
            say(f"the pre-trained model is not kept: {error}")
    return weights


class LessonBase:
    """The data base of lessons, lessons.jsonl: a line is appended for each task and round, and none is ever changed."""

    def __init__(self, path: Path, tasks, update: int | None):
        """Reads the lines of the rounds before this update, and cuts off the others: they are going to be done again.

        Without an update it reads all of them. Raises InputError if a line is no lesson.
        """
        self.path, self.rows, self.graded, kept = path, {name: [] for name in tasks.names}, 0, 0
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                row = Lesson(**json.loads(line))
                wrong = not all(isinstance(value, kind) for value, kind in zip(row, (int, str, str, str | None, float)))
                if wrong or type(row.graded) is not int or not all(Attempt(*attempt) for attempt in row.attempts):
                    raise ValueError("a field has the wrong type")
                if update is not None and row.round >= update:
                    break
                self.rows[row.task].append(row)
            except (ValueError, TypeError, KeyError) as error:
                if number == len(lines) and not line.endswith(b"\n"):
                    break  # a kill has torn it
                raise InputError(f"line {number} of {path} is no lesson: {one_line(error)}") from error
            self.graded, kept = row.graded, kept + len(line)
        if lines and update is not None:
            os.truncate(path, kept)

    def add(self, rows: list[Lesson]) -> None:
        """Appends the lessons of a round, in one go."""
        for row in rows:
            self.rows[row.task].append(row)
            self.graded = row.graded
        if rows:
            with open(self.path, "ab", buffering=0) as file:
                file.write("".join(json.dumps(row._asdict()) + "\n" for row in rows).encode())

    def lessons(self) -> dict[str, str]:
        """The present lesson of each task that has one."""
        return {name: rows[-1].lesson for name, rows in self.rows.items() if rows and rows[-1].lesson}


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

    def end_update(self, values: dict[str, float]) -> None:
        """Logs an update; shows progress, and saves a checkpoint when it is time."""
        self.update += 1
        step, now = self.measured_from
        values["charts/SPS"] = int((self.global_step - step) / (time.time() - now))
        self.returns = [*self.returns[-99:], *(values[name] for name in ("eval/reward",) if name in values)]
        self.log(self.global_step, values)
        with contextlib.suppress(Exception):  # as in say()
            if not self.bar:
                line, every = "{desc}: {n_fmt} of {total_fmt} updates{postfix}, {remaining} left\n", 10
                line, every = (None, 0.1) if sys.stderr.isatty() else (line, every)
                self.bar = tqdm(total=self.args.num_updates, initial=self.update, desc=self.args.env_id,
                                unit=" updates", bar_format=line, mininterval=every)  # fmt: skip
            postfix = f"reward {self.returns[-1]:.3f} after {values['charts/attempts']} attempts"
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
        reward = self.returns[-1] if self.returns else math.nan
        return {"run_dir": str(self.path), "global_step": self.global_step, "reward": reward}


def test(student, tasks, lessons: dict[str, str], args: Args) -> float:
    """The mean reward over all tasks, with the given lessons in front. It is no attempt: nothing is learned from it."""
    rng = random.Random("test questions")
    problems = [Problem(name, tasks.question(name, rng), lessons.get(name, ""))
                for name in tasks.names for _ in range(args.num_test)]  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # training's random numbers are left alone
        torch.manual_seed(args.seed)
        texts = student.answer(problems)
    return sum(checked_reward(tasks, problem, text) for problem, text in zip(problems, texts)) / len(problems)


def test_others(student: Student, args: Args) -> dict[str, float]:
    """How well other lessons than those of the tasks are followed: what distillation or PPO may have spoiled."""
    others = SecretWords(args)
    others.words = dict(zip(others.names, others.other_words))
    return {"eval/others": test(student, others, others.words, args)}


def evaluate(args: Args) -> float:
    """Tests the model of a run, with an empty context and with the lessons it has; prints and returns the former."""
    tasks, model = make_tasks(args)
    agent, path = Agent(args), Path(args.evaluate).resolve()
    restore(path, agent)
    student = model or Student(agent.policy, tasks, args)
    lessons = LessonBase(path / "lessons.jsonl", tasks, None).lessons()
    rewards = [test(student, tasks, lessons, args) for lessons in ({}, lessons)]
    print(f"{args.env_id}: mean reward {rewards[0]:.3f} with an empty context, {rewards[1]:.3f} with "
          f"{len(lessons)} lessons, on {args.num_test} problems of each of {len(tasks.names)} tasks")  # fmt: skip
    return rewards[0]


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
    for name in ("env_id", "model"):  # the directory may be somebody else's
        if ":" in getattr(resumed, name) and getattr(args, name) != getattr(resumed, name):
            flag = f"--{name.replace('_', '-')} {getattr(resumed, name)}"
            raise InputError(f"to let {run_dir} import a module, repeat its {flag}")
    if args.resume and resumed.batch_size != saved.batch_size:
        raise InputError("--num-envs x --num-steps cannot change with --resume: updates would not match steps")
    return resumed


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, also after a signal; 2 for bad input; 1 for other failures."""
    sys.path.append(os.getcwd())  # where --env-id my_module:MyTasks may find my_module.py
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
        print("{run_dir}: {global_step} steps, mean reward {reward:.3f}".format(**result))
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
