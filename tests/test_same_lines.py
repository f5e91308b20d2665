"""What the scripts share stands in all of them as the same text: each is one file, and yet there is one algorithm."""

import ast

import pytest
from conftest import ROOT

BASE = "ppo.py"
RULER = "\n# Here the algorithm ends."
# Definitions above the ruler that every script has in ppo.py's words.
SHARED = [
    "Args.batch_size", "EpisodeEnd", "Environments.step", "Environments.close", "layer_init", "compute_gae",
    "normalize", "ppo_loss", "policy_change", "Adam", "Adam.__init__", "Adam.coefficients", "Adam.step",
]  # fmt: skip
IMAGES = "observations are images"
ENVPOOL = {
    "EpisodeEnd": IMAGES,
    "Environments.step": "EnvPool alone",
    "Environments.close": "EnvPool alone",
    "layer_init": "convolutions too",
    "check_args": "one backend, several ways to compute",
    "compiled": "in accelerated(), with CUDA graphs",
    "reported": "EnvPool alone",
    "make_env": "EnvPool alone",
    "SafeRecordVideo": "EnvPool records no videos",
    "SafeRecordVideo._attempt": "EnvPool records no videos",
    "SafeRecordVideo._capture_frame": "EnvPool records no videos",
    "SafeRecordVideo.stop_recording": "EnvPool records no videos",
    "evaluate": IMAGES,
}
# script: {definition, of SHARED or below the ruler: why it is another one there}
DIFFERENCES = {
    "ppo_continuous.py": {"evaluate": "observations are normalized"},
    "ppo_atari.py": {
        "EpisodeEnd": IMAGES,
        "Environments.step": "a lost life ends an episode of learning, but not the game; frames are stacked",
        "layer_init": "convolutions too",
        "check_args": "one backend, and nothing is compiled",
        "compiled": "nothing is compiled",
        "reported": "one backend",
        "evaluate": IMAGES,
    },
    "ppo_atari_envpool.py": ENVPOOL,
    "ppo_atari_multigpu.py": ENVPOOL
    | {
        "normalize": "over all ranks",
        "main": "ranks other than 0 have no run to tell of, and one may lose another",
    },
    "ppo_procgen.py": {name: reason for name, reason in ENVPOOL.items() if name != "layer_init"},
    "ppo_lstm.py": {
        "check_args": "minibatches are whole environments, and nothing is compiled",
        "compiled": "nothing is compiled",
        "keep_freed_memory": "batches are small",
        "evaluate": "observations are normalized, and the LSTM has a state",
        "parse_args": "--hide is a list in config.json",
    },
    "ppo_multidiscrete.py": {},
    "ppo_atari_lstm.py": {
        "EpisodeEnd": "observations are images",
        "Environments.step": "a lost life ends an episode of learning, but not the game",
        "layer_init": "convolutions too",
        "check_args": "minibatches are whole environments, and nothing is compiled",
        "compiled": "nothing is compiled",
        "evaluate": "the LSTM has a state",
    },
}
# Scripts that differ in little: what they define under the same name has the same text, but for this.
SIBLINGS = {
    ("ppo_atari.py", "ppo_atari_lstm.py"): {
        "AlgorithmArgs", "EnvironmentArgs", "RunArgs", "Args", "EpisodeEnd", "Environments",
        "Environments.__init__", "Environments.reset", "Environments.step", "make_envs", "NatureCNN",
        "NatureCNN.__init__", "NatureCNN.forward", "Agent", "Agent.__init__", "Agent.forward", "Rollout",
        "collect_rollout", "Batch", "gradient_step", "train", "check_args", "reported", "evaluate",
    },
    ("ppo_atari.py", "ppo_atari_envpool.py"): {
        "EnvironmentArgs", "RunArgs", "find_game", "make_envs", "Agent.forward", "collect_rollout", "train",
        "check_args", "evaluate",
    },
    ("ppo_atari_envpool.py", "ppo_procgen.py"): {
        "AlgorithmArgs", "EnvironmentArgs", "RunArgs", "Args", "Args.num_updates", "EpisodeEnd", "EnvpoolEnvironments",
        "EnvpoolEnvironments.__init__", "EnvpoolEnvironments.reset", "EnvpoolEnvironments.step", "make_envs",
        "layer_init", "Agent.__init__", "Agent.forward", "Rollout", "Batch", "train", "check_args",
    },
    ("ppo_atari_envpool.py", "ppo_atari_multigpu.py"): {
        "AlgorithmArgs", "Args", "normalize", "gradient_step", "train", "check_args", "accelerated", "main",
    },
}  # fmt: skip


def text(lines: list[str], first: int, last: int) -> str:
    """Lines first to last, counted from 1, without the empty lines around them."""
    return "\n".join(lines[first - 1 : last]).strip("\n")


def definitions(source: str) -> dict[str, str]:
    """The text of all top-level statements but imports and the docstring, by name; with the comments before them.

    A class is cut into its methods, named Class.method, and all the rest of it, named Class.
    """
    lines, found, end = source.splitlines(), {}, 0
    for node in ast.parse(source).body:
        begin, end = end + 1, node.end_lineno
        if isinstance(node, ast.Import | ast.ImportFrom) or (begin == 1 and isinstance(node, ast.Expr)):
            continue
        name = getattr(node, "name", None) or text(lines, node.lineno, node.lineno).strip(":")
        if isinstance(node, ast.Assign):
            name = ast.unparse(node.targets)
        if not isinstance(node, ast.ClassDef):
            found[name] = text(lines, begin, end)
            continue
        rest, inner_end, methods = [], begin - 1, {}
        for part in node.body:
            inner_begin, inner_end = inner_end + 1, part.end_lineno
            if isinstance(part, ast.FunctionDef):
                methods[f"{name}.{part.name}"] = text(lines, inner_begin, inner_end)
            else:
                rest.append(text(lines, inner_begin, inner_end))
        found |= {name: "\n".join(rest)} | methods
    return found


def drift(base: str, other: str, shared: list[str], allowed: dict[str, str]) -> list[str]:
    """The definitions, of those shared and of those below the ruler of base, that are another text in other."""
    below = list(definitions(base[base.index(RULER) :])) if RULER in base else []
    old, new = definitions(base), definitions(other)
    found = [f"{name} differs" for name in [*shared, *below] if old[name] != new.get(name) and name not in allowed]
    order = [name for name in below if name in new]
    if order != [name for name in new if name in below]:
        found.append("the order differs")
    # An allowance that is not used would hide the next difference.
    found += [f"{name} does not differ" for name in allowed if name not in old or old[name] == new.get(name)]
    return found


@pytest.mark.parametrize("pair", SIBLINGS, ids="-".join)
def test_siblings_differ_where_they_must(pair):
    one, other = (definitions((ROOT / script).read_text()) for script in pair)
    assert {name for name in one.keys() & other.keys() if one[name] != other[name]} == SIBLINGS[pair]


# Of ppo_rlvr.py: it has no environments and plays nothing.
RLVR_SHARED = ["log_probabilities", "compute_gae", "policy_change", "Adam",
               "Adam.__init__", "Adam.coefficients", "Adam.step"]  # fmt: skip
RLVR_DIFFERENCES = {
    "check_args": "other settings",
    "compiled": "nothing is compiled",
    "reported": "no environments",
    "make_env": "no environments",
    "SafeRecordVideo": "no videos",
    "SafeRecordVideo._attempt": "no videos",
    "SafeRecordVideo._capture_frame": "no videos",
    "SafeRecordVideo.stop_recording": "no videos",
    "Run.end_update": "no episodes that end at different steps, but tests and answers to show",
    "Run.close": "no videos, and another result",
    "evaluate": "it searches for answers",
    "parse_args": "no videos",
    "main": "another result, and nothing is compiled",
}


def test_the_language_model_script_shares_what_it_can():
    base, other = (ROOT / BASE).read_text(), (ROOT / "ppo_rlvr.py").read_text()
    assert drift(base, other, RLVR_SHARED, RLVR_DIFFERENCES) == []


# What ppo_rlhf.py has of ppo_rlvr.py, above the ruler.
RLHF_SHARED = [
    "Args.batch_size", "(EOS, CHARACTERS)", "encode", "decode", "draw_problems", "Block",
    "Block.__init__", "Block.forward", "Transformer", "Transformer.__init__", "Transformer.forward", "Answers",
    "generate", "outputs_after", "log_probabilities", "score", "predict", "up_to_end", "token_rewards", "whiten",
    "compute_gae", "Batch", "masked_mean", "ppo_loss", "policy_change", "Adam", "Adam.__init__", "Adam.coefficients",
    "Adam.step", "pretrain",
]  # fmt: skip
RLHF_DIFFERENCES = {
    "check_args": "other settings",
    "make_task": "scores instead of rewards",
    "supervised_start": "reward models are kept too",
    "Run.end_update": "two scores to show",
    "Run.close": "another result",
    "test": "two scores, and samples instead of greedy answers",
    "guided_answers": "no search",
    "choose": "no search",
    "evaluate": "best-of-N by the proxy",
    "main": "another result",
}


def test_the_feedback_script_shares_what_it_can():
    base, other = (ROOT / "ppo_rlvr.py").read_text(), (ROOT / "ppo_rlhf.py").read_text()
    assert drift(base, other, RLHF_SHARED, RLHF_DIFFERENCES) == []


# What ppo_lessons.py has of ppo_rlvr.py, above the ruler: the model, the sampler and Adam. Its PPO has no variants.
LESSONS_SHARED = [
    "Args.batch_size", "(EOS, CHARACTERS)", "encode", "decode", "make_prompts", "Block", "Block.__init__",
    "Block.forward", "Transformer", "Transformer.__init__", "Transformer.forward", "Answers", "generate",
    "outputs_after", "log_probabilities", "score", "predict", "up_to_end", "whiten", "compute_gae", "policy_change",
    "Adam", "Adam.__init__", "Adam.coefficients", "Adam.step",
]  # fmt: skip
LESSONS_DIFFERENCES = {
    "make_prompts": "no Hugging Face models",
    "check_args": "other settings",
    "make_task": "several tasks, and models of a user's own",
    "supervised_start": "another training, and runs to start from",
    "Run.log_test": "no answers to keep: those are in the data base of lessons",
    "Run.end_update": "attempts to show, and no answers",
    "Run.close": "another result",
    "test": "a reward for each kind of context",
    "guided_answers": "no search",
    "choose": "no search",
    "evaluate": "with and without lessons",
    "parse_args": "a model may be a user's module too",
    "main": "another result",
}


def test_the_lessons_script_shares_what_it_can():
    base, other = (ROOT / "ppo_rlvr.py").read_text(), (ROOT / "ppo_lessons.py").read_text()
    assert drift(base, other, LESSONS_SHARED, LESSONS_DIFFERENCES) == []


@pytest.mark.parametrize("script", DIFFERENCES)
def test_shared_definitions_are_the_same(script):
    base, other = (ROOT / BASE).read_text(), (ROOT / script).read_text()
    assert drift(base, other, SHARED, DIFFERENCES[script]) == []


SAMPLE = f'''"""A docstring."""

import math


class Thing:
    """A thing."""

    def grow(self):
        self.size += 1


# The main part.
def work(thing):
    # Twice.
    return thing.half * 2

# ----{RULER}


def play(thing):
    return thing.size


def rest(thing):
    return 1
'''
CHANGES = {
    "code": ("thing.half * 2", "thing.half * 3", ["work differs"]),
    "comment": ("# Twice.", "# Doubled.", ["work differs"]),
    "comment before": ("# The main part.", "# The other part.", ["work differs"]),
    "below the ruler": ("thing.size\n", "thing.weight\n", ["play differs"]),
    "missing": ("def rest(", "def sleep(", ["rest differs"]),
    "not shared": ("self.size += 1", "self.size += 2", []),
    "nothing": ("thing.half", "thing.half", []),
}


@pytest.mark.parametrize("change", CHANGES)
def test_drift_is_found(change):
    old, new, problems = CHANGES[change]
    assert SAMPLE.count(old) == 1
    changed = SAMPLE.replace(old, new)
    assert drift(SAMPLE, changed, ["work"], {}) == problems
    allowed = {problem.split()[0]: "a reason" for problem in problems}
    assert drift(SAMPLE, changed, ["work"], allowed) == []


def test_allowances_are_used():
    assert drift(SAMPLE, SAMPLE, ["work"], {"work": ""}) == ["work does not differ"]


def test_drift_of_the_order_is_found():
    play = "def play(thing):\n    return thing.size\n\n\n"
    moved = SAMPLE.replace(play, "") + "\n\n" + play
    assert "the order differs" in drift(SAMPLE, moved, ["work"], {})
