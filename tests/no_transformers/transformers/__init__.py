"""Stands for Hugging Face transformers, which is not installed with the tests: as much as ppo_rlvr.py asks of it.

A model is a directory with a config.json. It looks at its tokens' mean, so that padding, positions and the cache matter
as they do in a transformer, and has dropout. A token is a character; those called 1 and 2 both end an answer.
"""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import torch.nn as nn

LETTERS = "\0\1\2 =?<>0123456789abcdefghijklmnopqrstuvwxyz"
logging = ModuleType("transformers.logging")
logging.set_verbosity_error = logging.disable_progress_bar = lambda: None
sys.modules["transformers.logging"] = logging


def read(path, gguf_file, local_files_only):
    """What config.json says."""
    assert local_files_only
    if gguf_file:
        raise ImportError("please install gguf")
    return SimpleNamespace(**json.loads((Path(path) / "config.json").read_text()))


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.generation_config = config, SimpleNamespace(eos_token_id=config.ends)
        self.tokens, self.positions = nn.Embedding(len(LETTERS), 32), nn.Embedding(config.max_position_embeddings, 32)
        self.hidden, self.dropout = nn.Linear(64, 32), nn.Dropout(config.dropout)
        self.lm_head = nn.Linear(32, len(LETTERS), bias=False)
        self.lm_head.weight = self.tokens.weight  # tied, as in many small models

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, head):
        self.lm_head = head

    def forward(self, input_ids, attention_mask, position_ids, cache=None, use_cache=False, logits_to_keep=0):
        x = self.dropout(self.tokens(input_ids) + self.positions(position_ids))
        real = attention_mask[:, -input_ids.shape[1] :, None].float()
        sums, counts = cache or (0, 0)
        sums, counts = sums + (x * real).cumsum(1), counts + real.cumsum(1)
        hidden = self.hidden(torch.cat([x, sums / counts.clamp(min=1)], -1)).tanh()
        kept = (sums[:, -1:], counts[:, -1:]) if use_cache else None
        return SimpleNamespace(logits=self.lm_head(hidden[:, -logits_to_keep:]), cache=kept)


class AutoModelForCausalLM:
    @staticmethod
    def from_pretrained(pretrained_model_name_or_path, gguf_file=None, local_files_only=False, dtype=None):
        torch.manual_seed(0)
        return Model(read(pretrained_model_name_or_path, gguf_file, local_files_only)).to(dtype)


class Tokenizer:
    eos_token_id, pad_token = None, None

    def __init__(self, chat_template):
        self.chat_template = chat_template

    def convert_ids_to_tokens(self, token):
        return LETTERS[token]

    def apply_chat_template(self, chats, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return [self.chat_template.format(chat[0]["content"]) for chat in chats]

    def __call__(self, texts, padding, padding_side, add_special_tokens):
        assert padding and padding_side == "left"
        longest = max(map(len, texts))
        return {"input_ids": [[LETTERS.index(c) for c in text.rjust(longest, self.pad_token)] for text in texts],
                "attention_mask": [[0] * (longest - len(text)) + [1] * len(text) for text in texts]}  # fmt: skip

    def batch_decode(self, rows):
        return ["".join(LETTERS[token] for token in row) for row in rows]


class AutoTokenizer:
    @staticmethod
    def from_pretrained(pretrained_model_name_or_path, gguf_file=None, local_files_only=False):
        return Tokenizer(read(pretrained_model_name_or_path, gguf_file, local_files_only).chat_template)
