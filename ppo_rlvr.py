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
"""Proximal Policy Optimization (PPO) for a language model with verifiable rewards, in one file.

An episode is an answer, a step is a token, and a function says whether the answer is right. A small transformer is
first trained on demonstrations, most of which are wrong, and then improves by PPO. With --advantage the same loss
becomes GRPO, RLOO or REINFORCE. A tag such as [llm-3] stands where a detail happens that makes PPO work for language
models; [core-N] and [extra-N] are those of ppo.py. docs/llm.md lists the former with their sources.

    python ppo_rlvr.py                          count letters: greedy accuracy above 0.95, from 0.2, in two minutes
    python ppo_rlvr.py --advantage group        the same without a value network: GRPO
    python ppo_rlvr.py --env-id my_tasks:Sort   a task of your own, a class like Count below
    python ppo_rlvr.py --env-id largest --model DIR_OR_GGUF   a Hugging Face model instead, with requirements-llm.txt

train() is the algorithm; what it calls stands above it, and what has nothing to do with learning below.
"""

import contextlib
import copy
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
from collections import Counter
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

    total_timesteps: float = 225_280  # places for tokens in all answers together, floored to whole rollouts [extra-11]
    learning_rate: float = 3e-4  # learning rate of the policy, at the start
    value_learning_rate: float = 1e-3  # learning rate of the value network, at the start
    num_envs: int = 256  # answers in one rollout
    num_steps: int = 22  # the most tokens of an answer, its end included [llm-5]
    anneal_lr: bool = True  # lower the learning rates linearly to 0 [core-4]
    advantage: Literal["gae", "group", "loo", "batch"] = "gae"  # PPO with a value network, GRPO, RLOO or REINFORCE
    group_size: int = 8  # answers to the same problem, with group, loo, and majority as the reward [llm-17]
    group_std: bool = True  # with group, divide by the deviation within the group; off: Dr. GRPO [llm-17]
    skip_flat_groups: bool = False  # leave groups out whose answers all have the same reward [llm-18]
    gamma: float = 1.0  # discount factor of gae, 0 to 1 [llm-1]
    gae_lambda: float = 0.95  # GAE: from 0 (one-step TD error) to 1 (the answer's reward) [llm-1]
    num_minibatches: int = 4  # equal parts that a rollout is cut into [core-6]
    update_epochs: int = 2  # passes over the rollout in one update [core-6]
    temperature: float = 1.0  # of the sampler, and of the probabilities that are learned [llm-6]
    learner_log_probs: bool = True  # old log-probabilities from the learner; off: the sampler's [llm-7]
    kl_coef: float = 0.0  # weight of the divergence from the supervised start [llm-8]
    kl_in: Literal["reward", "loss"] = "reward"  # where it counts: each token's reward (k1), or the loss (k3) [llm-8]
    truncation_penalty: float = 0.0  # an answer without an end gets minus this, whatever it says [llm-5]
    value_from_policy: bool = True  # the value network starts as a copy of the policy; off: at random [llm-9]
    value_warmup: int = 0  # updates at the start that train the value network alone [llm-10]
    whiten_rewards: bool = False  # divide the tokens' rewards by their deviation, and keep their mean [llm-12]
    norm_adv: bool = True  # normalize the advantages of all tokens, with gae and batch [llm-13]
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
    test_time: Literal["off", "verifier", "majority"] = "off"  # learn on the test problems, rewarded by one of these


@dataclass
class EnvironmentArgs:
    """What to learn, and with which model."""

    env_id: str = "count"  # the task: count (letters), max (of digits), add (two digits), or module:Class
    num_test: int = 500  # problems that are kept for tests and never trained on [llm-21]
    model: str | None = None  # a Hugging Face directory or a GGUF file; without it, a small transformer is made
    chat: bool = True  # with --model, put prompts into its chat template; off: leave them as they are [llm-32]
    amp: bool = False  # with --model, multiply matrices in bfloat16
    max_prompt: int = 16  # the most tokens of a prompt, of the small transformer as all that follows
    mask_positions: bool = True  # count positions from the first real token; off: from the padding [llm-2]
    width: int = 64  # features of each token in the transformer
    layers: int = 2  # blocks of the transformer
    heads: int = 4  # attention heads of each block
    pretrain_steps: int = 1000  # gradient steps on demonstrations
    pretrain_batch: int = 64  # demonstrations in each of them
    pretrain_lr: float = 3e-3  # their highest learning rate
    cache_dir: str = ".pretrained"  # where supervised starts are kept for the next run; empty: nowhere


@dataclass
class RunArgs:
    """Where to run and what to keep."""

    exp_name: str = SCRIPT  # name of the experiment, part of the run directory's name
    seed: int = 1  # seeds the network, the problems, the sampler and the shuffles
    torch_deterministic: bool = True  # use cuDNN's deterministic algorithms
    cuda: bool = False  # use the GPU if there is one; for networks this small the CPU is fast enough
    track: bool = False  # send the metrics to Weights & Biases as well (WANDB_MODE=offline needs no account)
    wandb_project_name: str = "ppo37"  # project at Weights & Biases
    wandb_entity: str | None = None  # user or team at Weights & Biases
    runs_dir: str = "runs"  # where run directories are created
    checkpoint_interval: int = 10  # updates between two checkpoints; a killed run loses at most this much
    eval_interval: int = 10  # updates between two tests
    resume: str | None = None  # go on with the run in this directory, with its settings (flags given beside it win)
    evaluate: str | None = None  # test the model in this run directory instead of training
    search: Literal["greedy", "majority", "best-of", "guided"] = "greedy"  # with --evaluate, how to find an answer
    samples: int = 8  # with --evaluate, answers to choose from; with guided, tokens
    guidance: float = 0.1  # with --search guided, how much higher a value is worth e times the probability


@dataclass
class Args(AlgorithmArgs, EnvironmentArgs, RunArgs):
    """PPO for a language model with verifiable rewards."""

    @property
    def batch_size(self) -> int:
        """Places for tokens in one rollout, few of which are filled at first."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """[extra-11] Only whole rollouts count: 225,280 places are 40 updates of 256 answers of 22 tokens."""
        return int(self.total_timesteps // self.batch_size)

    @property
    def answers_per_problem(self) -> int:
        """Answers to the same problem in one rollout."""
        return self.group_size if self.advantage in ("group", "loo") or self.test_time == "majority" else 1


class Count:
    """How often is this letter in this word? The model may answer at once, "=2", or spell: "b0a1n1a2=2".

    A task needs problem(rng), prompt(problem) and reward(problem, text), which is 1 for a right answer. To train a
    model from nothing it also needs demonstration(problem, rng, progress), and for a vote answer(text), if not the
    whole text counts.
    """

    def problem(self, rng: random.Random) -> tuple[str, str]:
        """A letter and a word of 6 to 9 letters, in which it is frequent, so that all counts occur."""
        letter, share = rng.choice("abcdefgh"), 0.7 * rng.random()
        word = (letter if rng.random() < share else rng.choice("abcdefgh") for _ in range(rng.randint(6, 9)))
        return letter, "".join(word)

    def prompt(self, problem: tuple[str, str]) -> str:
        """What the model reads."""
        return "{}:{}?".format(*problem)

    def demonstration(self, problem: tuple[str, str], rng: random.Random, progress: float) -> str:
        """An answer to imitate. The demonstrator knows both ways, but at the end, progress > 0.85, spells rarely.

        Spelling, it slips now and then; answering at once, it takes a double letter for one, as people do.
        """
        letter, word = problem
        if rng.random() < (0.8 if progress < 0.85 else 0.1):
            count, spelled = 0, ""
            for character in word:
                count += character == letter
                if rng.random() < 0.05:
                    count = max(0, count + rng.choice((-1, 1)))
                spelled += f"{character}{count % 10}"
            return f"{spelled}={count}"
        return f"={len(re.findall(f'{letter}+', word))}"

    def answer(self, text: str) -> str:
        """The part of the text that counts."""
        return text.rpartition("=")[2]

    def reward(self, problem: tuple[str, str], text: str) -> float:
        """1 for the right number after an equals sign."""
        return float("=" in text and self.answer(text) == str(problem[1].count(problem[0])))


class Maximum:
    """Which of these six digits is the largest? The demonstrator mostly names any of them."""

    def problem(self, rng: random.Random) -> str:
        return "".join(rng.choice("0123456789") for _ in range(6))

    def prompt(self, problem: str) -> str:
        return f"max {problem}?"

    def demonstration(self, problem: str, rng: random.Random, progress: float) -> str:
        return max(problem) if rng.random() < 0.2 else rng.choice(problem)

    def reward(self, problem: str, text: str) -> float:
        return float(text == max(problem))


class Addition:
    """The sum of two numbers of up to two digits. The demonstrator mostly forgets to carry."""

    def problem(self, rng: random.Random) -> tuple[int, int]:
        return rng.randrange(100), rng.randrange(100)

    def prompt(self, problem: tuple[int, int]) -> str:
        return "{}+{}=".format(*problem)

    def demonstration(self, problem: tuple[int, int], rng: random.Random, progress: float) -> str:
        a, b = problem
        return str(a + b if rng.random() < 0.3 else (a // 10 + b // 10) * 10 + (a + b) % 10)

    def reward(self, problem: tuple[int, int], text: str) -> float:
        return float(text == str(sum(problem)))


class Largest:
    """The largest of four digits, asked in words: for --model. Of several numbers in an answer the last one counts."""

    def problem(self, rng: random.Random) -> list[int]:
        return [rng.randint(1, 9) for _ in range(4)]

    def prompt(self, problem: list[int]) -> str:
        digits = ", ".join(map(str, problem))
        return f"What is the largest number in this list: {digits}? Answer with the number only."

    def answer(self, text: str) -> str:
        return "".join(re.findall(r"\d+", text)[-1:])

    def reward(self, problem: list[int], text: str) -> float:
        return float(self.answer(text) == str(max(problem)))


TASKS = {"count": Count, "max": Maximum, "add": Addition, "largest": Largest}
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
    prompts = [task.prompt(problem) for problem in problems]
    # [llm-2] Filled up on the left, all prompts end in the same column, where all answers begin.
    return encode_chats(prompts, args) if args.model else encode(prompts, args.max_prompt, left=True)


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


@functools.cache
def load_model(path: str) -> tuple:
    """A Hugging Face model, its tokenizer, and the tokens that end its answers, from a directory or a GGUF file."""
    file = {"gguf_file": Path(path).name} if Path(path).is_file() else {}
    try:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        place = {"pretrained_model_name_or_path": Path(path).parent if file else Path(path), "local_files_only": True}
        tokenizer = transformers.AutoTokenizer.from_pretrained(**place, **file)
        model = transformers.AutoModelForCausalLM.from_pretrained(**place, **file, dtype=torch.float32)
    except Exception as error:  # whatever is wrong with the files
        hint = "; pip install -r requirements-llm.txt" if isinstance(error, ImportError) else ""
        raise InputError(f"cannot load the model {path}: {one_line(error)}{hint}") from error
    # A chat model may have two: one ends an answer, the other one a text.
    ends = next((end for end in (model.generation_config.eos_token_id, tokenizer.eos_token_id) if end is not None), [])
    ends = [ends] if isinstance(ends, int) else ends
    if not ends:
        raise InputError(f"the model {path} has no EOS: none of its answers would have an end")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(ends[0])  # masked wherever it fills up a text
    return model, tokenizer, ends


def encode_chats(prompts: list[str], args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts -> tokens [B, P] of a Hugging Face model, filled up on the left, and a mask [B, P] of the real ones."""
    model, tokenizer, _ = load_model(args.model)
    if args.chat:
        # [llm-32] A chat model has learned to answer what stands between the marks of a user's turn.
        if not tokenizer.chat_template:
            raise InputError(f"the model {args.model} has no chat template: --no-chat leaves prompts as they are")
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        prompts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    # A template has the special tokens already.
    filled = tokenizer(prompts, padding=True, padding_side="left", add_special_tokens=not args.chat)
    tokens, mask = torch.tensor(filled["input_ids"]), torch.tensor(filled["attention_mask"]).bool()
    room = model.config.max_position_embeddings - args.num_steps
    if not mask.any(1).all() or tokens.shape[1] > room:
        raise InputError(f"the model has room for prompts of 1 to {room} tokens, and one has {mask.sum(1).max()}")
    return tokens, mask


class HuggingFace(nn.Module):
    """A Hugging Face model in place of a Transformer, of which it has the interface."""

    def __init__(self, outputs: int, args: Args):
        super().__init__()
        model, _, self.ends = load_model(args.model)
        self.amp, self.most = args.amp, args.num_steps + 1
        self.model = copy.deepcopy(model)
        if outputs == 1:  # [llm-9] as in Agent.start_from
            if not args.value_from_policy:
                self.model = type(model)(model.config)
            head = nn.Linear(model.get_output_embeddings().in_features, 1, bias=False)
            nn.init.zeros_(head.weight)
            self.model.set_output_embeddings(head)
        # [llm-31] No dropout, in learning neither: it would move the ratio away from 1, and its noise is no change of
        # the policy.
        self.eval()

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor, cache: dict | None = None) -> torch.Tensor:
        """As Transformer's, but of the last columns alone: with a cache one, without it an answer's and one more."""
        positions = mask.long().cumsum(1).sub(1).clamp(min=0)[:, -tokens.shape[1] :]  # [llm-2]
        past, keep = (None, self.most) if cache is None else (cache.get("past"), 1)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.amp):
            result = self.model(input_ids=tokens, attention_mask=mask.long(), position_ids=positions,
                                cache=past, use_cache=cache is not None, logits_to_keep=keep)  # fmt: skip
        if cache is not None:
            cache["past"] = result.cache
        return result.logits.float()


class Agent(nn.Module):
    """The policy, a frozen copy of its start, and with gae a value network: transformers of the same size."""

    def __init__(self, args: Args):
        super().__init__()
        network = HuggingFace if args.model else Transformer
        self.policy, self.reference = network(len(CHARACTERS), args), network(len(CHARACTERS), args)
        self.reference.requires_grad_(False)
        # A network of its own lets the policy alone, and can be trained before it. [core-13]
        self.critic = network(1, args) if args.advantage == "gae" else None

    def start_from(self, weights: dict[str, torch.Tensor], args: Args) -> None:
        """Starts from the weights of a supervised policy."""
        self.policy.load_state_dict(weights)
        self.reference.load_state_dict(weights)
        if self.critic:
            # [llm-9] The policy's features already tell what will be right. With a head of 0 all first values are 0.
            if args.value_from_policy:
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


def read(answers: Answers, args: Args) -> list[str]:
    """The answers' texts."""
    if not args.model:
        return decode(answers.tokens)
    _, tokenizer, ends = load_model(args.model)
    rows = zip(answers.tokens.tolist(), answers.mask.tolist())
    return tokenizer.batch_decode([[t for t, real in zip(*row) if real and t not in ends] for row in rows])


def judge(task, problems: list, answers: Answers, args: Args) -> tuple[torch.Tensor, list[str]]:
    """Rewards [B] of the answers to the problems, and the answers' texts."""
    texts, rewards = read(answers, args), []
    for problem, text, truncated in zip(problems, texts, answers.truncated.tolist(), strict=True):
        # [llm-5] Nobody knows what a text without an end would have said.
        rewards.append(0.0 - args.truncation_penalty if truncated else reward_of(task, problem, text))
    return torch.tensor(rewards), texts


def reward_of(task, problem, text: str) -> float:
    """The task's reward; raises InputError if it is none."""
    reward = task.reward(problem, text)
    if not isinstance(reward, bool | int | float | np.number | np.bool_) or not math.isfinite(reward):
        raise InputError(f"the task's reward for {text!r:.60} is {reward!r:.60}, which is no finite number")
    return float(reward)


def words_of(task, answers: Answers, args: Args) -> list[str | None]:
    """What the answers say: the part of their texts that counts, and nothing if they are cut off."""
    part = getattr(task, "answer", str)
    return [None if cut else part(text) for text, cut in zip(read(answers, args), answers.truncated)]


def vote(words: list[str | None]) -> str | None:
    """The most frequent one, the first of several; None, an answer without an end, has no vote."""
    counts = Counter(word for word in words if word is not None)
    return counts.most_common(1)[0][0] if counts else None


def agreement(task, answers: Answers, args: Args) -> torch.Tensor:
    """Rewards [B] without a verifier: 1 for what most answers to the same problem say (TTRL, arXiv:2504.16084)."""
    words = words_of(task, answers, args)
    groups = [words[first : first + args.group_size] for first in range(0, len(words), args.group_size)]
    return torch.tensor([float(word is not None and word == vote(group)) for group in groups for word in group])


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


def answer_advantages(totals: torch.Tensor, args: Args) -> torch.Tensor:
    """Total rewards [B] of answers -> advantages [B] over those of other answers; groups stand one after the other."""
    if args.advantage == "batch":
        return totals - totals.mean()
    # [llm-17] What other answers to the same problem got tells how hard it is: a baseline that nobody has to learn.
    groups = totals.view(-1, args.group_size)
    if args.advantage == "loo":
        # Without the answer itself the baseline does not depend on it, and the gradient keeps its expectation.
        advantages = groups - (groups.sum(1, keepdim=True) - groups) / (args.group_size - 1)
    else:
        advantages = groups - groups.mean(1, keepdim=True)
        if args.group_std:
            advantages = advantages / (groups.std(1, keepdim=True) + 1e-4)
    return advantages.flatten()


def compute_advantages(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, args: Args):
    """Rewards, values and mask [B, T] of tokens -> advantages and value targets [B, T], 0 where nothing is real."""
    if args.advantage == "gae":
        # [llm-1] [core-5] Nothing is won by answering early: no discount. Lambda spreads the reward over the tokens.
        # [llm-11] After the end nothing can be won, so that the value there is 0, not what the network says.
        values = torch.cat([values * mask, torch.zeros_like(values[:, :1])], 1)
        dones = mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
        advantages, returns = compute_gae(rewards.T, values.T, dones.T, args.gamma, args.gae_lambda)
        advantages, returns = advantages.T, returns.T
    else:
        advantages = answer_advantages(rewards.sum(1), args)[:, None] * mask
        returns = torch.zeros_like(rewards)
    if args.norm_adv and args.advantage in ("gae", "batch"):
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


def gradient_step(agent: Agent, adam: Adam, minibatch: Batch, step_size, epsilon, warmup: bool, args: Args):
    """Improves the agent on one minibatch; returns the loss's terms and the log-ratios, as ppo_loss does."""
    values = predict(agent.critic, minibatch) if agent.critic else minibatch.values
    # [llm-6] The same temperature as in the sampler: it is a part of the policy.
    log_probs, entropy = score(agent.policy, minibatch, args.temperature)
    if warmup:
        # [llm-10] Values that are worth nothing yet would teach the policy nonsense: the value network learns first.
        log_probs, entropy = 0 * log_probs + minibatch.log_probs, 0 * entropy
    loss, terms, log_ratio = ppo_loss(log_probs, entropy, values, minibatch, args)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, adam.tensors)])
    with torch.no_grad():
        # [core-11] One norm over all parameters together: clipping shortens the gradient but keeps its direction.
        # torch's clip_grad_norm_ adds 1e-6 to the norm, this does not. [extra-5] Tensor.norm() would add millions of
        # squares one after the other, and lose precision; sum() adds them in pairs.
        gradient *= (args.max_grad_norm / gradient.square().sum().sqrt()).clamp(max=1)
        adam.step(gradient, step_size, epsilon)
    return terms, log_ratio


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
    """Trains an agent; returns {"run_dir", "global_step", "greedy_accuracy": that of the last test}.

    Raises InputError for settings that cannot work, FloatingPointError when the training diverged.
    """
    task, tests = make_task(args)
    excluded = {task.prompt(problem) for problem in tests}
    keep_freed_memory()
    if not args.model:
        torch.set_num_threads(1)  # matrices this small are faster with one thread
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    weights = None if args.resume or args.model else supervised_start(task, excluded, args)
    torch.manual_seed(args.seed)
    agent = Agent(args)
    if weights:
        agent.start_from(weights, args)
    # [llm-19] [core-3] [extra-1] The work that PPO for language models goes back to used TensorFlow 1's Adam.
    adam = Adam(agent.to(device))
    base_rates = torch.full_like(adam.parameters, args.learning_rate)
    base_rates[sum(p.numel() for p in agent.policy.parameters()) :] = args.value_learning_rate

    run = Run(args, agent, adam)
    if run.update == 0:
        run.log_test(*test(agent.policy, task, tests, 0, args))
    for update in range(run.update, args.num_updates):
        # [core-4] The steps shrink linearly; the factor of the last update is 1/num_updates, not 0. [extra-10]
        remaining = 1 - update / args.num_updates if args.anneal_lr else 1

        if update == args.value_warmup > 0:  # counting the policy's idle steps would make its first real ones too long
            adam.steps, adam.moment1[:], adam.moment2[:] = 0, 0, 0
        # [llm-21] New problems, or at test time those of the test; which ones depends on nothing but seed and update.
        rng, number = random.Random(f"problems {args.seed} {update}"), args.num_envs // args.answers_per_problem
        if args.test_time == "off":
            problems = draw_problems(task, rng, number, excluded)
        else:
            problems = rng.choices(tests, k=number)
        problems = [problem for problem in problems for _ in range(args.answers_per_problem)]
        prompts, prompt_mask = (tensor.to(device) for tensor in make_prompts(task, problems, args))
        answers = generate(agent.policy, prompts, prompt_mask, args)
        rewards, texts = judge(task, problems, answers, args)
        if args.test_time == "majority":
            rewards = agreement(task, answers, args)
        if (rewards == rewards[0]).all():
            say(f"all answers of an update had the reward {rewards[0].item()}: there is nothing to learn from that")

        mask = answers.mask
        with torch.no_grad():
            # [llm-7] The sampler's numbers differ by rounding, or more if it is another program. The ratio must start
            # at 1, and therefore both of its sides come from the same computation.
            learner_log_probs, _ = score(agent.policy, answers, args.temperature)
            log_probs = learner_log_probs if args.learner_log_probs else answers.log_probs
            reference, _ = score(agent.reference, answers, args.temperature)
            values = predict(agent.critic, answers) if agent.critic else torch.zeros_like(log_probs)
            each = token_rewards(rewards, mask, log_probs - reference, args)
            advantages, returns = compute_advantages(each, values, mask, args)
            learned = mask
            if args.skip_flat_groups and args.answers_per_problem > 1:
                # [llm-18] Where all answers are right, or all wrong, advantages are 0: they only dilute the mean.
                groups = rewards.view(-1, args.group_size)
                flat = (groups == groups[:, :1]).all(1).repeat_interleave(args.group_size)
                learned = mask & ~flat.to(device)[:, None]
        batch = Batch(prompts, prompt_mask, answers.tokens, learned, log_probs, reference, advantages, returns, values)

        terms, log_ratios = [], []
        for epoch in range(args.update_epochs):
            # [core-6] Each epoch shuffles the answers anew and uses every one of them once. [extra-12]
            first = len(log_ratios)
            for order in torch.randperm(args.num_envs).view(args.num_minibatches, -1).to(device):
                step_size, epsilon = adam.coefficients(base_rates * remaining, args)
                minibatch = Batch(*(tensor[order] for tensor in batch))
                warmup = update < args.value_warmup
                minibatch_terms, log_ratio = gradient_step(agent, adam, minibatch, step_size, epsilon, warmup, args)
                terms.append(minibatch_terms)
                log_ratios.append(log_ratio)
            # [aux-3] The policy is then far enough from the one that collected the data.
            if args.target_kl is not None:
                change = policy_change(torch.cat(log_ratios[first:]), args.clip_coef)
                if change["losses/approx_kl"] > args.target_kl:
                    break

        # [core-12] Means over all minibatches of the update, each taken before its own gradient step. [extra-8]
        names = ("losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/reference_kl")
        losses = dict(zip(names, torch.stack(terms).mean(0).tolist(), strict=True))
        if (changes := torch.cat(log_ratios)).numel():  # not if all groups were skipped
            losses |= policy_change(changes, args.clip_coef)
        check_finite(losses | {"a parameter": adam.parameters}, run)
        if agent.critic:
            losses["losses/explained_variance"] = (1 - (returns - values)[mask].var() / returns[mask].var()).item()
        # [llm-20] How far the sampler is from the learner, and how long answers get: what goes wrong shows here first.
        losses["losses/sampler_gap"] = (answers.log_probs - learner_log_probs)[mask].abs().mean().item()
        reward = rewards.mean().item()
        metrics = {
            "charts/reward": reward,
            "charts/episodic_return": reward,  # CleanRL's name
            "charts/episodic_length": mask.sum(1).float().mean().item(),
            "charts/truncated": answers.truncated.float().mean().item(),
            "charts/learning_rate": args.learning_rate * remaining,
        } | losses
        tested = (update + 1) % args.eval_interval == 0 or update + 1 == args.num_updates
        result = test(agent.policy, task, tests, update + 1, args) if tested else None
        run.end_update(metrics, f"{task.prompt(problems[0])} {texts[0]}", result)
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
    limits |= {"value_warmup": (0, 2**31), "pretrain_steps": (0, 2**31)}
    for name, value in vars(args).items():
        low, high = limits.get(name, (1, 2**31 - 1) if type(value) is int else (0, 2**53))
        if type(value) in (int, float) and not low <= value <= high:  # also catches not-a-number
            raise InputError(f"--{name.replace('_', '-')} must be from {low} to {high}, not {value}")
    for name in ("temperature", "guidance"):
        if getattr(args, name) == 0:
            raise InputError(f"--{name} must be above 0")
    if args.total_timesteps < args.batch_size:
        raise InputError(f"--total-timesteps {args.total_timesteps:.0f} is below one rollout, {args.batch_size} tokens")
    if args.num_envs % args.num_minibatches:
        raise InputError(f"{args.num_envs} answers cannot be cut into {args.num_minibatches} equal minibatches")
    if args.num_envs % args.answers_per_problem:
        raise InputError(f"{args.num_envs} answers are no whole number of groups of {args.group_size}")
    if args.answers_per_problem == 1 and (args.advantage in ("group", "loo") or args.test_time == "majority"):
        raise InputError("a group of one answer has nothing to compare it with: --group-size must be at least 2")
    if args.advantage == "batch" and args.num_envs == 1:
        raise InputError("a batch of one answer has nothing to compare it with: raise --num-envs")
    if args.width % args.heads:
        raise InputError(f"--width {args.width} cannot be shared by {args.heads} heads")
    if args.value_warmup and args.advantage != "gae":
        raise InputError(f"--advantage {args.advantage} has no value network for --value-warmup")
    if args.evaluate and args.search in ("best-of", "guided") and args.advantage != "gae":
        raise InputError(f"--search {args.search} needs a value network, and that run has none (--advantage gae has)")
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
    needed = ["problem", "prompt", "reward"] + ["demonstration"] * (not args.model)
    if missing := [method for method in needed if not hasattr(task, method)]:
        more = ", which a task needs without --model" * (missing[-1] == "demonstration")
        raise InputError(f"{args.env_id} has no {' and no '.join(missing)}{more}")
    tests = draw_problems(task, random.Random("test problems"), args.num_test)
    make_prompts(task, tests, args)
    for problem in tests[:10]:  # whatever is wrong with a reward should show before the model is trained
        reward_of(task, problem, "0")
    return task, tests


def supervised_start(task, excluded: set[str], args: Args) -> dict[str, torch.Tensor]:
    """Weights of a pre-trained policy: those that an earlier run with the same settings and code left, or new ones."""
    names = ("env_id", "seed", "num_test", "max_prompt", "num_steps", "mask_positions", "width", "layers", "heads",
             "pretrain_steps", "pretrain_batch", "pretrain_lr")  # fmt: skip
    code = [Path(file).read_bytes().hex() for file in (__file__, sys.modules[type(task).__module__].__file__)]
    code += [torch.__version__, torch.backends.cpu.get_cpu_capability()]
    key = json.dumps([code, *(getattr(args, name) for name in names)])
    path = Path(args.cache_dir, f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.pt")
    if args.cache_dir and path.exists():
        with contextlib.suppress(Exception):  # whatever is wrong with the file, it can be made anew
            weights = torch.load(path, map_location="cpu", weights_only=True)
            Transformer(len(CHARACTERS), args).load_state_dict(weights)
            return weights
    weights = pretrain(task, excluded, args)
    if args.cache_dir:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(weights, path.with_suffix(f".{os.getpid()}"))
            os.replace(path.with_suffix(f".{os.getpid()}"), path)  # others never see half a file
        except (OSError, RuntimeError) as error:  # the second one is what torch makes of a full disk
            say(f"the supervised start is not kept: {error}")
    return weights


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
            self.returns = [*self.returns[-99:], result[0]["eval/greedy_accuracy"]]
            self.log_test(result[0] | values, result[1])
        else:
            self.log(self.global_step, values)
        with contextlib.suppress(Exception):  # as in say()
            if not self.bar:
                line, every = "{desc}: {n_fmt} of {total_fmt} updates{postfix}, {remaining} left\n", 10
                line, every = (None, 0.1) if sys.stderr.isatty() else (line, every)
                self.bar = tqdm(total=self.args.num_updates, initial=self.update, desc=self.args.env_id,
                                unit=" updates", bar_format=line, mininterval=every)  # fmt: skip
            accuracy = f", greedy accuracy {self.returns[-1]:.3f}" if self.returns else ""
            postfix = f"reward {values['charts/reward']:.2f}{accuracy}, {example!r:.60}"
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
        accuracy = self.returns[-1] if self.returns else math.nan
        return {"run_dir": str(self.path), "global_step": self.global_step, "greedy_accuracy": accuracy}


def test(policy: Transformer, task, tests: list, update: int, args: Args) -> tuple[dict[str, float], str]:
    """Metrics of the policy on the test problems, and some greedy answers. Leaves training's random numbers alone."""
    generator, device = torch.Generator().manual_seed(args.seed * 1000003 + update), next(policy.parameters()).device
    prompts = [tensor.to(device) for tensor in make_prompts(task, tests, args)]
    greedy, sampled = (generate(policy, *prompts, args, mode, generator) for mode in (True, False))
    (rewards, texts), (sampled_rewards, _) = judge(task, tests, greedy, args), judge(task, tests, sampled, args)
    values = {
        "eval/greedy_accuracy": (rewards >= 1).double().mean().item(),
        "eval/pass_at_1": (sampled_rewards >= 1).double().mean().item(),
        "eval/reward": rewards.mean().item(),
        "eval/length": greedy.mask.sum(1).float().mean().item(),
    }
    shown = zip(rewards[:20].tolist(), tests, texts)
    return values, "".join(f"{reward:g} {task.prompt(problem)} {text}\n" for reward, problem, text in shown)


@torch.no_grad()
def guided_answers(agent: Agent, prompts: torch.Tensor, prompt_mask: torch.Tensor, args: Args) -> Answers:
    """Answers whose tokens have the largest log-probability + value / guidance, among the policy's most probable.

    The value is that of the answer with the token; where the token ends it, that of the answer without.
    """
    ends, tokens = torch.tensor(agent.policy.ends), torch.zeros(len(prompts), 0).long()
    while tokens.shape[1] < args.num_steps and not torch.isin(tokens, ends).any(1).all():
        logits = outputs_after(agent.policy, prompts, prompt_mask, tokens)[:, -1] / args.temperature
        count = min(args.samples, logits.shape[-1])
        log_probs, candidates = logits.log_softmax(-1).topk(count)  # [B, count]
        repeated = [tensor.repeat_interleave(count, 0) for tensor in (prompts, prompt_mask, tokens)]
        longer = torch.cat([repeated[2], candidates.view(-1, 1)], 1)
        values = outputs_after(agent.critic, *repeated[:2], longer)[:, -2:, 0]  # without the token, and with it
        values = values.gather(1, (~torch.isin(candidates, ends)).long().view(-1, 1)).view(-1, count)
        best = candidates.gather(1, (log_probs + values / args.guidance).argmax(-1, keepdim=True))
        finished = torch.isin(tokens, ends).any(1, keepdim=True)
        tokens = torch.cat([tokens, best.masked_fill(finished, agent.policy.ends[0])], 1)
    return Answers(prompts, prompt_mask, tokens, up_to_end(tokens, ends), None, ~torch.isin(tokens, ends).any(1))


def choose(agent: Agent, task, tries: list[Answers], args: Args) -> list[int]:
    """Which of N tries to take for each of B problems: what most say, or what the value network likes best."""
    if args.search == "best-of":
        with torch.no_grad():
            values = [predict(agent.critic, answers) for answers in tries]
        last = [values.gather(1, a.mask.sum(1, keepdim=True) - 1).squeeze(1) for values, a in zip(values, tries)]
        last = [value.masked_fill(a.truncated, -math.inf) for value, a in zip(last, tries)]
        return torch.stack(last).argmax(0).tolist()
    return [words.index(vote(words)) for words in zip(*(words_of(task, answers, args) for answers in tries))]


def evaluate(args: Args) -> float:
    """Answers the test problems with a trained model and a search; prints and returns how many are right."""
    task, tests = make_task(args)
    agent = Agent(args)
    restore(Path(args.evaluate).resolve(), agent)
    torch.manual_seed(args.seed)
    greedy, count = args.search == "greedy", 1 if args.search == "greedy" else args.samples
    prompts = make_prompts(task, tests, args)
    if args.search == "guided":
        tries = [guided_answers(agent, *prompts, args)]
    else:
        tries = [generate(agent.policy, *prompts, args, greedy) for _ in range(count)]
    chosen = choose(agent, task, tries, args) if len(tries) > 1 else [0] * len(tests)
    rewards = torch.stack([judge(task, tests, answers, args)[0] for answers in tries])
    accuracy = (rewards[chosen, range(len(tests))] >= 1).double().mean().item()
    tokens = sum(answers.mask.sum().item() for answers in tries)
    print(f"{args.env_id}: accuracy {accuracy:.3f} on {len(tests)} test problems with --search {args.search} "
          f"--samples {count}, {tokens / len(tests):.1f} tokens for each")  # fmt: skip
    return accuracy


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
        print("{run_dir}: {global_step} steps, greedy accuracy {greedy_accuracy:.3f}".format(**result))
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
