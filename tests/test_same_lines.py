"""What the scripts share stands in all of them in the same lines: each is one file, and yet there is one algorithm.

Every function, class and method of ppo.py is in the other scripts too, in the same order and with the same text,
comments included, but for those that a table here names, with the reason and with the number of lines that differ.
"""

import ast
import difflib

import pytest
from conftest import ROOT

BASE = "ppo.py"

# script: {definition: (lines that differ from ppo.py's, removed and added ones together, and why)}; None: it has none
DIFFERENCES = {
    "ppo_atari.py": {
        "MLP": (None, "a convolutional network instead"),
        "MLP.__init__": (None, "a convolutional network instead"),
        "MLP.forward": (None, "a convolutional network instead"),
        "MLP.as_numpy": (None, "a convolutional network instead"),
        "Args.num_updates": (2, "the example's numbers"),
        "make_envs": (48, "the games' wrappers, and EnvPool"),
        "layer_init": (2, "convolutions too"),
        "Agent": (6, "one call gives logits and values"),
        "Agent.__init__": (17, "one convolutional network for both"),
        "Rollout": (10, "images on the device, and the network's outputs"),
        "collect_rollout": (35, "images are stacked; one call gives logits and values; lives are no games"),
        "normalize": (7, "mean and deviation over all ranks"),
        "gradient_step": (5, "one call gives logits and values; the mean over all ranks"),
        "train": (80, "as above; ranks; CUDA graphs"),
        "check_args": (17, "the games' settings; ranks; --env-backend"),
        "Run.__init__": (14, "rank 0 alone has files"),
        "Run.write": (2, "rank 0 alone has files"),
        "evaluate": (16, "as in collect_rollout"),
        "main": (10, "ranks"),
    },
    "ppo_continuous.py": {
        "Args.num_updates": (2, "the example's numbers"),
        "make_envs": (13, "other spaces, and EnvPool"),
        "Agent": (2, "the actor's output in the docstring"),
        "Agent.__init__": (8, "a Gaussian policy, and the running statistics"),
        "log_probabilities": (10, "densities of a Gaussian"),
        "Rollout": (4, "the shapes of observations and actions"),
        "collect_rollout": (20, "Gaussian noise; observations are normalized and actions clipped"),
        "ppo_loss": (10, "a Gaussian's log-probabilities and entropy"),
        "train": (7, "rewards are normalized too; log-probabilities come alone"),
        "check_args": (4, "--env-backend"),
        "evaluate": (12, "as in collect_rollout"),
    },
    "ppo_lstm.py": {
        "collections.abc Callable None": (None, "acting takes no function"),
        "MLP.as_numpy": (None, "the LSTM acts in PyTorch"),
        "log_probabilities": (None, "a method of the actors"),
        "Args.num_updates": (2, "the example's numbers"),
        "make_envs": (54, "games, images, continuous actions, hidden velocities, EnvPool"),
        "layer_init": (2, "convolutions too"),
        "MLP": (2, "features instead of outputs"),
        "MLP.__init__": (7, "features instead of outputs"),
        "MLP.forward": (6, "features instead of outputs"),
        "Agent": (6, "one LSTM for both"),
        "Agent.__init__": (35, "one LSTM for both, behind the encoder that the observations need"),
        "Rollout": (11, "images on the device, the network's outputs, the LSTM's state"),
        "collect_rollout": (49, "the LSTM's state; games; continuous actions"),
        "ppo_loss": (17, "an actor's log-probabilities and entropy; steps of environments"),
        "Adam.__init__": (2, "the LSTM's second bias stays 0"),
        "gradient_step": (6, "sequences and states"),
        "train": (65, "the LSTM's state; minibatches of whole environments; normalization"),
        "check_args": (15, "environments are shared by minibatches; the games' settings; --env-backend"),
        "evaluate": (19, "as in collect_rollout"),
    },
}

# What ppo.py lacks and two others have: {(script, script): {definition: (lines that differ, why)}}
RELATIVES = {
    ("ppo_atari.py", "ppo_lstm.py"): {
        "EnvpoolVectorEnv.__init__": (38, "games alone, or all but games"),
        "EnvpoolVectorEnv.reset": (2, "what the agent sees"),
        "EnvpoolVectorEnv.step": (18, "what the agent sees; games and lives"),
        "find_game": (14, "not all environments are games"),
        "NatureCNN": (2, "images of any size"),
        "NatureCNN.__init__": (8, "images of any size"),
        "NatureCNN.forward": (13, "bytes are converted here"),
        "Agent.forward": (18, "sequences"),
    },
    ("ppo_atari.py", "ppo_continuous.py"): {
        "EnvpoolVectorEnv": (6, "games alone, or all but games"),
        "EnvpoolVectorEnv.__init__": (20, "games alone, or all but games"),
        "EnvpoolVectorEnv.reset": (2, "what the agent sees"),
        "EnvpoolVectorEnv.step": (16, "what the agent sees; games and lives"),
    },
    ("ppo_continuous.py", "ppo_lstm.py"): {
        "EnvpoolVectorEnv": (6, "games alone, or all but games"),
        "EnvpoolVectorEnv.__init__": (34, "games alone, or all but games"),
        "EnvpoolVectorEnv.reset": (2, "what the agent sees"),
        "EnvpoolVectorEnv.step": (18, "what the agent sees; games and lives"),
        "check_spaces": (10, "both kinds of actions"),
        "GaussianActor": (4, "behind the LSTM"),
        "GaussianActor.__init__": (7, "behind the LSTM"),
        "GaussianActor.forward": (7, "behind the LSTM"),
        "environment_actions": (10, "both kinds of actions; no squashing"),
    },
}

# script: {setting: why its default is another one}
DEFAULTS = {
    "ppo_atari.py": {
        "cuda": "images are worth it",
        "env_id": "a game",
        "total_timesteps": "the article's for Atari",
        "num_envs": "the article's for Atari",
        "clip_coef": "the article's for Atari",
        "shared_network": "the article's for Atari",
    },
    "ppo_continuous.py": {
        "env_id": "a continuous task",
        "total_timesteps": "the article's for MuJoCo",
        "learning_rate": "the article's for MuJoCo",
        "num_envs": "the article's for MuJoCo",
        "num_steps": "the article's for MuJoCo",
        "num_minibatches": "the article's for MuJoCo",
        "update_epochs": "the article's for MuJoCo",
        "ent_coef": "the article's for MuJoCo",
    },
    "ppo_lstm.py": {
        "clip_coef": "the article's for Atari",
        "cuda": "images are worth it",
        "num_envs": "the article's for Atari",
    },
}

# script: {setting: why its help is another one}
HELP = {
    "ppo_atari.py": {
        "cuda": "images are worth it",
        "compile": "images gain less by it",
        "env_id": "names of games",
        "shared_network": "one more tag",
    },
    "ppo_continuous.py": {"shared_network": "one more tag"},
    "ppo_lstm.py": {
        "compile": "the LSTM is not compiled",
        "cuda": "images are worth it",
        "env_id": "games too",
        "num_minibatches": "one more tag",
    },
}
# script: {setting that it does not have: why}
MISSING_SETTINGS = {
    "ppo_lstm.py": {"shared_network": "policy and value function share the LSTM, as in the official code"}
}


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


def changed_lines(old: str, new: str) -> int:
    """Removed and added lines in the difference of two texts."""
    diff = list(difflib.unified_diff(old.splitlines(), new.splitlines(), n=0, lineterm=""))[2:]
    return sum(not line.startswith("@@") for line in diff)


def imported(source: str) -> set[str]:
    """All names that a script imports at its top."""
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {f"{getattr(node, 'module', '')} {alias.name} {alias.asname}" for node in nodes for alias in node.names}


def drift(base: str, other: str, allowed: dict[str, tuple[int | None, str]]) -> list[str]:
    """Where the script other differs from the script base in another way than allowed."""
    dropped = sorted(name.strip() for name in imported(base) - imported(other))
    problems = [f"{name} is not imported" for name in dropped if name not in allowed]
    old, new = definitions(base), definitions(other)
    old.pop("Args", None)  # see settings_drift
    limits = {name: limit for name, (limit, _) in allowed.items()}
    problems += [f"{name} is missing" for name in old if name not in new and limits.get(name, 0) is not None]
    order = [name for name in old if name in new]
    if order != (found := [name for name in new if name in old]):
        first = next(name for name, other_name in zip(order, found) if name != other_name)
        problems.append(f"{first} stands elsewhere")
    # An allowance that is larger than what is used would hide the next difference.
    for name in order:
        changed, limit = changed_lines(old[name], new[name]), limits.get(name, 0)
        if changed != limit:
            problems.append(f"{name} differs in {changed} lines, not {limit}")
    problems += [f"there is no {name} to compare" for name in limits if name not in old and name not in dropped]
    return problems


def settings(source: str) -> dict[str, tuple[str, str, str]]:
    """Type, default and help of the fields of Args; a comment that stands alone counts as a field without these."""
    (node,) = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    rows = {part.lineno: part for part in node.body if isinstance(part, ast.AnnAssign)}
    lines, found = source.splitlines(), {}
    for number in range(node.lineno, max(rows) + 1):
        line = lines[number - 1].strip()
        if number in rows:
            part = rows[number]
            comment = lines[part.end_lineno - 1].partition("  # ")[2]
            found[part.target.id] = ast.unparse(part.annotation), ast.unparse(part.value), comment
        elif line.startswith("#"):
            found[line] = "", "", ""
    return found


def relatives_drift(base: str, one: str, other: str, allowed: dict[str, tuple[int, str]]) -> list[str]:
    """Where definitions that two scripts share, but not with the script base, differ in another way than allowed."""
    known, old, new = definitions(base), definitions(one), definitions(other)
    problems, limits = [], {name: limit for name, (limit, _) in allowed.items()}
    common = [name for name in old if name in new and name not in known]
    for name in common:
        changed, limit = changed_lines(old[name], new[name]), limits.pop(name, 0)
        if changed != limit:
            problems.append(f"{name} differs in {changed} lines, not {limit}")
    return problems + [f"there is no {name} to compare" for name in limits]


def settings_drift(
    base: str, other: str, defaults: dict[str, str], comments: dict[str, str], missing: dict[str, str] = {}
) -> list[str]:
    """Where the Args of other are not those of base, but for new and missing ones, given defaults and given help."""
    old, new = settings(base), settings(other)
    problems = [f"{name} is missing" for name in old if name not in new and name not in missing]
    problems += [f"{name} is not missing" for name in missing if name in new or name not in old]
    order = [name for name in old if name in new]
    if order != [name for name in new if name in old]:
        problems.append("the order is another one")
    for part, title, allowed in ((0, "type", {}), (1, "default", defaults), (2, "help", comments)):
        different = {name for name in order if old[name][part] != new[name][part]}
        problems += [f"the {title} of {name} is another one" for name in sorted(different - allowed.keys())]
        problems += [f"the {title} of {name} is the same" for name in sorted(allowed.keys() - different)]
    return problems


@pytest.mark.parametrize("script", DIFFERENCES)
def test_shared_definitions_are_the_same(script):
    assert drift((ROOT / BASE).read_text(), (ROOT / script).read_text(), DIFFERENCES[script]) == []


@pytest.mark.parametrize("script", DIFFERENCES)
def test_shared_settings_are_the_same(script):
    base, other = (ROOT / BASE).read_text(), (ROOT / script).read_text()
    assert settings_drift(base, other, DEFAULTS[script], HELP[script], MISSING_SETTINGS.get(script, {})) == []


@pytest.mark.parametrize("pair", RELATIVES)
def test_what_only_some_scripts_share_is_the_same(pair):
    one, other = ((ROOT / script).read_text() for script in pair)
    assert relatives_drift((ROOT / BASE).read_text(), one, other, RELATIVES[pair]) == []


def test_drift_of_relatives_is_found():
    more = SAMPLE + "\n\ndef rest(thing):\n    return 1\n"
    other = more.replace("return 1", "return 2").replace("thing.half * 2", "thing.half * 3")
    assert relatives_drift(SAMPLE, more, more, {}) == []
    assert relatives_drift(SAMPLE, more, other, {}) == ["rest differs in 2 lines, not 0"]
    assert relatives_drift(SAMPLE, more, other, {"rest": (2, "")}) == []
    assert relatives_drift(SAMPLE, more, more, {"rest": (2, "")}) == ["rest differs in 0 lines, not 2"]
    assert relatives_drift(SAMPLE, more, other, {"rest": (2, ""), "work": (2, "")}) == ["there is no work to compare"]


def test_the_whole_script_is_compared():
    """All lines of ppo.py but its head, with imports, are in some definition."""
    source = (ROOT / BASE).read_text()
    found = definitions(source)
    assert {"SCRIPT", "Args.batch_size", "train", "Run", "Run.save", "main"} < found.keys()
    assert 'if __name__ == "__main__"' in found
    head = source[: source.index("\nSCRIPT = ")]
    compared = [line for part in found.values() for line in part.splitlines() if line.strip()]
    assert sorted(compared) == sorted(line for line in source.removeprefix(head).splitlines() if line.strip())


SAMPLE = '''"""A docstring."""

import math
from pathlib import Path

LIMIT = 3  # of something


class Thing:
    """A thing."""

    size: int = 1  # its size

    def grow(self):
        """Grows."""
        self.size += 1

    # It may shrink too.
    @property
    def half(self):
        return self.size / 2


# The main part.


@cached
def work(thing):
    """Works."""
    # Twice.
    return thing.half * 2


def play(thing):
    return thing.size


if __name__ == "__main__":
    work(Thing())
'''


def test_definitions():
    found = definitions(SAMPLE)
    names = ["LIMIT", "Thing", "Thing.grow", "Thing.half", "work", "play", 'if __name__ == "__main__"']
    assert list(found) == names
    assert found["LIMIT"] == "LIMIT = 3  # of something"
    assert found["Thing"] == 'class Thing:\n    """A thing."""\n\n    size: int = 1  # its size'.replace("\n\n", "\n")
    assert found["Thing.grow"] == '    def grow(self):\n        """Grows."""\n        self.size += 1'
    assert found["Thing.half"].startswith("    # It may shrink too.\n    @property\n    def half(self):")
    assert found["work"].startswith("# The main part.\n\n\n@cached\ndef work(thing):")
    assert found["work"].endswith("    # Twice.\n    return thing.half * 2")


def test_changed_lines():
    assert changed_lines("a\nb\nc", "a\nb\nc") == 0
    assert changed_lines("a\nb\nc", "a\nB\nc") == 2
    assert changed_lines("a\nb\nc", "a\nc") == 1
    assert changed_lines("a\nb\nc", "a\nb\n\nc\nd") == 2
    assert changed_lines("-- a", "++ a") == 2  # what looks like a diff's head counts too
    assert changed_lines("@@ a", "") == 1


CHANGES = {
    "code": ("thing.half * 2", "thing.half * 3", "work differs in 2 lines, not 0"),
    "comment": ("# Twice.", "# Doubled.", "work differs in 2 lines, not 0"),
    "comment before": ("# The main part.", "# The other part.", "work differs in 2 lines, not 0"),
    "decorator": ("@cached", "@cached(1)", "work differs in 2 lines, not 0"),
    "docstring": ("Works.", "Plays.", "work differs in 2 lines, not 0"),
    "line more": ("    # Twice.", "    thing.grow()\n    # Twice.", "work differs in 1 lines, not 0"),
    "constant": ("LIMIT = 3", "LIMIT = 4", "LIMIT differs in 2 lines, not 0"),
    "method": ("self.size += 1", "self.size += 2", "Thing.grow differs in 2 lines, not 0"),
    "method's decorator": ("    @property\n", "", "Thing.half differs in 1 lines, not 0"),
    "class": ('"""A thing."""', '"""Things."""', "Thing differs in 2 lines, not 0"),
    "base class": ("class Thing:", "class Thing(list):", "Thing differs in 2 lines, not 0"),
    "field": ("size: int = 1", "size: int = 2", "Thing differs in 2 lines, not 0"),
    "end": ("    work(Thing())", "    play(Thing())", 'if __name__ == "__main__" differs in 2 lines, not 0'),
    "missing function": ("def play(", "def plays(", "play is missing"),
    "missing method": ("def grow(", "def grows(", "Thing.grow is missing"),
    "missing import": ("import math\n", "", "math None is not imported"),
    "other import": ("import math\n", "import math as m\n", "math None is not imported"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_drift_is_found(change):
    old, new, problem = CHANGES[change]
    assert SAMPLE.count(old) == 1
    assert drift(SAMPLE, SAMPLE.replace(old, new), {}) == [problem]


def test_drift_of_the_order_is_found():
    play = "def play(thing):\n    return thing.size\n\n\n"
    assert play in SAMPLE
    moved = SAMPLE.replace(play, "").replace("class Thing:", play + "class Thing:")
    assert drift(SAMPLE, moved, {}) == ["Thing stands elsewhere"]


def test_what_a_script_has_alone_is_no_drift():
    more = SAMPLE.replace("import math", "import io, math")
    more = more.replace("def play(", "def other():\n    pass\n\n\ndef play(")
    more = more.replace("    # It may shrink too.", "    def other(self):\n        pass\n\n    # It may shrink too.")
    assert more.count("other") == 2
    assert drift(SAMPLE, more, {}) == []


def test_allowed_differences_are_counted():
    other = SAMPLE.replace("thing.half * 2", "thing.half * 3")
    assert drift(SAMPLE, other, {"work": (2, "")}) == []
    assert drift(SAMPLE, other, {"work": (1, "")}) == ["work differs in 2 lines, not 1"]
    assert drift(SAMPLE, other, {"work": (3, "")}) == ["work differs in 2 lines, not 3"]
    assert drift(SAMPLE, SAMPLE, {"work": (2, "")}) == ["work differs in 0 lines, not 2"]
    assert drift(SAMPLE, SAMPLE, {"sleep": (2, "")}) == ["there is no sleep to compare"]


def test_allowed_to_be_missing():
    without = SAMPLE.replace("def play(", "def plays(")
    assert drift(SAMPLE, without, {"play": (None, "")}) == []
    assert drift(SAMPLE, SAMPLE, {"play": (None, "")}) == ["play differs in 0 lines, not None"]
    assert drift(SAMPLE, SAMPLE.replace("import math\n", ""), {"math None": (None, "")}) == []
    assert drift(SAMPLE, SAMPLE, {"math None": (None, "")}) == ["there is no math None to compare"]


ARGS = '''class Args:
    """Settings."""

    # The run
    seed: int = 1  # the seed
    name: str | None = None  # the name

    # The rest
    rate: float = 0.1  # how fast

    def twice(self):
        return 2  # not a setting
'''


def test_settings():
    assert settings(ARGS) == {
        "# The run": ("", "", ""),
        "seed": ("int", "1", "the seed"),
        "name": ("str | None", "None", "the name"),
        "# The rest": ("", "", ""),
        "rate": ("float", "0.1", "how fast"),
    }


SETTINGS_CHANGES = {
    "type": ("rate: float", "rate: int", "the type of rate is another one"),
    "default": ("seed: int = 1", "seed: int = 2", "the default of seed is another one"),
    "help": ("# the seed", "# a seed", "the help of seed is another one"),
    "heading": ("    # The run\n", "", "# The run is missing"),
    "missing": ("    seed: int = 1  # the seed\n", "", "seed is missing"),
    "order": ("    seed: int = 1  # the seed\n    name: str | None = None  # the name\n",
              "    name: str | None = None  # the name\n    seed: int = 1  # the seed\n", "the order is another one"),
}  # fmt: skip


@pytest.mark.parametrize("change", SETTINGS_CHANGES)
def test_drift_of_settings_is_found(change):
    old, new, problem = SETTINGS_CHANGES[change]
    assert ARGS.count(old) == 1
    assert settings_drift(ARGS, ARGS.replace(old, new), {}, {}) == [problem]


def test_allowed_differences_of_settings():
    more = ARGS.replace("    # The rest", "    new: int = 1  # one more\n\n    # The rest")
    assert settings_drift(ARGS, more, {}, {}) == []
    other = more.replace("int = 1  # the", "int = 2  # a")
    assert settings_drift(ARGS, other, {"seed": ""}, {"seed": ""}) == []
    expected = ["the default of seed is the same", "the help of seed is the same"]
    assert settings_drift(ARGS, more, {"seed": ""}, {"seed": ""}) == expected
    without = ARGS.replace("    seed: int = 1  # the seed\n", "")
    assert settings_drift(ARGS, without, {}, {}, {"seed": ""}) == []
    assert settings_drift(ARGS, ARGS, {}, {}, {"seed": ""}) == ["seed is not missing"]
