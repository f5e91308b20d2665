"""Suites, their jobs, and the run directories that belong to them.

A suite is a TOML file: one script with one group of settings, trained in several environments with several seeds, or
variants of that: each changes flags, or names another script, such as the user's copy. A job is one environment and one
seed of one variant. A run is a directory that a script has written for a job. Nothing here imports a script: its
settings are read from its source, and what a run has reached from the end of its metrics.jsonl.
"""

import ast
import contextlib
import difflib
import functools
import hashlib
import json
import math
import os
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmark.files import is_running

ROOT = Path(__file__).resolve().parent.parent
SUITES = ROOT / "benchmark" / "suites"
REFERENCE = ROOT / "benchmark" / "reference"
# Of lines that may be torn only a number that something follows is whole.
RETURNS = rb'"charts/episodic_return": (-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)[,}]'
SPEEDS = rb'"charts/SPS": (\d+)[,}]'
STARTED = (
    "started.jsonl"  # beside the run directories: command, commit, versions and machine of each start of the suite
)
TAIL = 16 * 1024  # bytes at the end of metrics.jsonl that tell what a run has reached
BY_HARNESS = {"env_id", "seed", "runs_dir", "resume", "evaluate"}  # settings that a suite's flags must leave alone
SIZES = ("num_envs", "num_steps", "total_timesteps")  # settings that say how many steps a run has
# Settings that do not change what a run learns: runs that differ in them belong together.
FREE = BY_HARNESS | {"track", "wandb_project_name", "wandb_entity", "capture_video", "checkpoint_interval"}
FREE |= {"eval_episodes", "eval_deterministic", "eval_max_steps"}


class InputError(Exception):
    """Something the user gave cannot work: reported in one line, with exit code 2."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes an InputError of what goes wrong with writing there."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error}") from error


@dataclass(frozen=True)
class Job:
    """One training: an environment, a seed and, in a suite that has some, a variant."""

    script: str  # relative to the repository, or absolute
    env_id: str
    seed: int
    flags: tuple[str, ...]
    exp_name: str
    variant: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.env_id, self.variant, f"seed {self.seed}")))

    @property
    def name(self) -> str:
        """What the names of its run directories start with; those of other jobs may start with the same."""
        return re.sub(r"[^\w.-]", "-", f"{self.env_id}__{self.exp_name}__{self.seed}")

    @property
    def key(self) -> str:
        """A name for files that no other job has: a hash follows where another environment could have the same name."""
        parts = (self.env_id, self.exp_name)
        if all(re.fullmatch(r"[A-Za-z0-9.-]+(_[A-Za-z0-9.-]+)*", part) for part in parts):
            return self.name
        return f"{self.name}-{hashlib.sha256(repr((*parts, self.seed)).encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Variant:
    """What is trained: a script and its flags."""

    name: str  # also that of the experiment; empty in a suite without variants
    script: str  # relative to the repository, or absolute
    flags: dict[str, tuple[str, ...]]  # by environment
    settings: dict[str, dict]  # by environment: what config.json of its runs must say, without what is FREE
    exp_name: str
    changes: tuple[str, ...] = ()  # what the suite's file says of it: a script, flags


@dataclass(frozen=True)
class Suite:
    """What one figure shows."""

    name: str
    title: str
    env_ids: tuple[str, ...]
    seeds: tuple[int, ...]
    variants: dict[str, Variant]  # one without a name, or several, of which the first is what others are compared with
    reference: str | None = None  # file in benchmark/reference with curves of the official code
    reference_label: str = "official code"
    compare: tuple[str, ...] = ()  # files of other suites whose curves are drawn beside
    published: dict[str, tuple[float, float]] = field(default_factory=dict)  # mean and deviation of the final return
    published_label: str = "article"
    margins: dict[str, float] = field(default_factory=dict)  # of final returns: differences that would not matter
    steps_label: str = "environment steps"

    @property
    def baseline(self) -> Variant:
        """The first variant, or the only one."""
        return next(iter(self.variants.values()))

    @property
    def script(self) -> str:
        """That of the first variant."""
        return self.baseline.script

    @property
    def flags(self) -> dict[str, tuple[str, ...]]:
        """Those of the first variant."""
        return self.baseline.flags

    @property
    def settings(self) -> dict[str, dict]:
        """Those of the first variant."""
        return self.baseline.settings

    @property
    def has_variants(self) -> bool:
        """Whether its file names variants."""
        return "" not in self.variants

    @property
    def runs_dir(self) -> Path:
        """Where its run directories are unless the user says otherwise."""
        return Path("runs") / self.name

    def jobs(self, seeds: Iterable[int] | None = None) -> list[Job]:
        """All jobs; every environment's and variant's first seed comes before any one's second."""
        return [
            Job(variant.script, env, seed, variant.flags[env], variant.exp_name, variant.name)
            for seed in dict.fromkeys(self.seeds if seeds is None else seeds)
            for env in self.env_ids
            for variant in self.variants.values()
        ]


def similar(word: str, words: Iterable[str], prefix: str = "") -> str:
    """A question whether one of the words was meant, or nothing."""
    close = difflib.get_close_matches(word, list(words), cutoff=0.5)
    return f"; did you mean {' or '.join(prefix + match for match in close)}?" if close else ""


@functools.cache
def script_settings(path: Path) -> dict[str, tuple[str, object]]:
    """Type and default of each setting of a script, read from its source; a default that is no literal is None.

    They stand in its class Args, or in classes of the same file that Args inherits from.
    """
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if "Args" not in classes:
        raise InputError(f"{path} has no class Args")

    def settings_of(node: ast.ClassDef) -> dict[str, tuple[str, object]]:
        bases = [classes[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id in classes]
        found = {}
        for base in bases:
            found = settings_of(base) | found  # of two bases the first one wins
        for item in node.body:
            if isinstance(item, ast.AnnAssign):
                found[item.target.id] = (ast.unparse(item.annotation), default_value(item.value, path))
        return found

    return settings_of(classes["Args"])


def default_value(node: ast.expr | None, path: Path) -> object:
    """What a default in a script's source is; None if it is no literal."""
    if isinstance(node, ast.Name) and node.id == "SCRIPT":
        return path.stem
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return None


def fits(kind: str, value: object) -> bool:
    """Whether a value from config.json is of a type that a script's source names, such as "float | None"."""
    plain = {"int": int, "float": (int, float), "str": str, "bool": bool, "None": type(None)}
    for part in kind.split(" | "):
        if part in plain:
            if isinstance(value, plain[part]) and (part == "bool" or not isinstance(value, bool)):
                return True
        elif part.startswith("Literal["):
            if value in choices(part):
                return True
        elif inner := item_type(part):
            if isinstance(value, list) and all(fits(inner, item) for item in value):
                return True
        else:  # a type that is not known here
            return True
    return False


def choices(kind: str) -> tuple:
    """The values of "Literal['a', 'b']"."""
    values = ast.literal_eval(kind.removeprefix("Literal[").removesuffix("]"))
    return values if isinstance(values, tuple) else (values,)


def item_type(kind: str) -> str | None:
    """int for "list[int]" and "tuple[int, ...]"; None for what is no sequence."""
    match = re.fullmatch(r"(?:list|tuple)\[(\w+)(?:, \.\.\.)?\]", kind)
    return match and match[1]


def parse_flags(flags: Iterable[str], known: dict[str, tuple[str, object]], script: str) -> dict:
    """The settings that flags give a script; raises InputError for flags that it does not have."""
    given, words = {}, list(flags)
    while words:
        word, equals, value = words.pop(0).partition("=")
        name = word.removeprefix("--").replace("-", "_")
        off = name.removeprefix("no_")
        kind = known.get(name, known.get(off, ("", None)))[0]
        if not word.startswith("--") or not kind or (name not in known and kind != "bool"):
            options = [setting.replace("_", "-") for setting in known]
            raise InputError(f"{script} has no flag {word}{similar(word.removeprefix('--'), options, '--')}")
        if off in BY_HARNESS:
            raise InputError(f"{word} cannot be one of the flags: the harness sets it")
        if kind == "bool":
            if equals:
                raise InputError(f"{word} takes no value")
            given[name if name in known else off] = name in known
            continue
        if inner := item_type(kind.split(" |")[0]):
            values = [value] if equals else []
            while words and not re.match("--[a-z]", words[0]):
                values.append(words.pop(0))
            none = values == ["None"] and "None" in kind
            given[name] = None if none else [convert(word, inner, item) for item in values]
            continue
        if not equals and not words:
            raise InputError(f"{word} needs a value")
        given[name] = convert(word, kind, value if equals else words.pop(0))
    return given


def convert(flag: str, kind: str, value: str) -> object:
    """The value that a word on the command line gives to a setting; raises InputError if it is none of its type."""
    if value == "None" and "None" in kind:
        return None
    first = kind.split(" |")[0]
    try:
        result = {"int": int, "float": float}.get(first, str)(value)
    except ValueError:
        raise InputError(f"{flag} needs a value of type {kind}, not {value!r}") from None
    if first.startswith("Literal[") and result not in choices(first):
        raise InputError(f"{flag} needs one of {', '.join(map(str, choices(first)))}, not {value!r}")
    return result


def list_of(kind, value: object) -> bool:
    """Whether this is a list of that type."""
    return isinstance(value, list) and all(isinstance(item, kind) and not isinstance(item, bool) for item in value)


def different(kind, value: object) -> bool:
    """Whether this is a list of that type that has something in it, but nothing twice and no empty string."""
    return list_of(kind, value) and 0 < len(value) == len(set(value)) and "" not in value


def text(value: object) -> bool:
    """Whether this is a string that says something."""
    return isinstance(value, str) and bool(value)


# What a suite's file may hold: for each key a check, and what it expects.
KEYS = {
    "title": (text, "a string"),
    "script": (text, "a string"),
    "env_ids": (lambda value: different(str, value), "a list of different strings"),
    "seeds": (lambda value: different(int, value) and min(value) >= 0, "a list of different whole numbers from 0"),
    "flags": (lambda value: list_of(str, value), "a list of strings"),
    "env_flags": (
        lambda value: isinstance(value, dict) and all(list_of(str, flags) for flags in value.values()),
        "a table of lists of strings",
    ),
    "variants": (
        lambda value: (
            isinstance(value, dict)
            and "" not in value
            and len(value) > 1
            and all(list_of(str, v) for v in value.values())
        ),
        "a table of two or more lists of strings: a script, flags, or both",
    ),
    "reference": (text, "a string"),
    "reference_label": (text, "a string"),
    "compare": (lambda value: different(str, value), "a list of names of suites"),
    "published": (
        lambda value: (
            isinstance(value, dict) and all(list_of(int | float, pair) and len(pair) == 2 for pair in value.values())
        ),
        "a table of [mean, standard deviation]",
    ),
    "published_label": (text, "a string"),
    "margins": (
        lambda value: (
            isinstance(value, dict) and list_of(int | float, [*value.values()]) and all(m > 0 for m in value.values())
        ),
        "a table of numbers above 0",
    ),
    "steps_label": (text, "a string"),
}


def load_suite(name_or_path: str, extra_flags: Iterable[str] = ()) -> Suite:
    """The suite of that name, or in that file, with flags added to its own; raises InputError if it is no good."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = SUITES / f"{name_or_path}.toml"
        names = sorted(file.stem for file in SUITES.glob("*.toml"))
        if name_or_path not in names:
            hint = similar(name_or_path, names) or f"; there are {', '.join(names)}, or give a .toml file"
            raise InputError(f"there is no suite {name_or_path}{hint}")
    try:
        table = tomllib.loads(path.read_bytes().decode())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the suite {path}: {' '.join(str(error).split())}") from error
    for key, value in table.items():
        if key not in KEYS:
            raise InputError(f"{path}: unknown key {key}{similar(key, KEYS)}")
        check, expected = KEYS[key]
        if not check(value):
            raise InputError(f"{path}: {key} must be {expected}, not {value!r}")
    if path.stem in (".", ".."):
        raise InputError(f"{path}: the file's name is that of the suite, and {path.stem} is no name")
    if missing := [key for key in ("title", "script", "env_ids", "seeds") if key not in table]:
        raise InputError(f"{path}: {' and '.join(missing)} missing")
    for key in ("published", "margins", "env_flags"):
        if unknown := [env_id for env_id in table.get(key, {}) if env_id not in table["env_ids"]]:
            raise InputError(f"{path}: {key} has {', '.join(unknown)}, which env_ids has not")
    if "reference" in table and not (REFERENCE / table["reference"]).is_file():
        raise InputError(f"{path}: there is no {REFERENCE / table['reference']}")

    for index, name in enumerate(table.get("compare", [])):
        found = [file for file in (path.parent / f"{name}.toml", SUITES / f"{name}.toml") if file.is_file()]
        if not found:
            raise InputError(f"{path}: there is no suite {name} to compare with")
        table["compare"][index] = str(found[0])

    special, words = table.pop("env_flags", {}), table.pop("variants", None)
    for env_id, flags in special.items():
        if any(re.match("--exp[-_]name(=|$)", flag) for flag in flags):
            raise InputError(f"{path}: --exp-name must be the same for all environments")
    common = {env: (*table.get("flags", ()), *special.get(env, ())) for env in table["env_ids"]}
    script = table.pop("script")
    table.pop("flags", None)
    variants = {
        name: load_variant(path, name, script, common, tuple(changes), tuple(extra_flags))
        for name, changes in (words or {"": ()}).items()
    }
    for key in ("env_ids", "seeds", "compare"):
        table[key] = tuple(table.get(key, ()))
    table["published"] = {env_id: tuple(pair) for env_id, pair in table.get("published", {}).items()}
    return Suite(name=path.stem, variants=variants, **table)


def load_variant(
    path: Path, name: str, script: str, common: dict[str, tuple[str, ...]], changes: tuple[str, ...],
    extra_flags: tuple[str, ...],
) -> Variant:  # fmt: skip
    """A suite's variant: what all have in common, with its changes, which may begin with another script.

    Raises InputError if a script or a flag does not exist.
    """
    own = changes[1:] if changes and changes[0].endswith(".py") else changes
    script = changes[0] if len(own) < len(changes) else script
    # A script beside the suite's file comes before one of this repository.
    beside = path.resolve().parent / script
    file = beside if beside.is_file() else ROOT / script
    if not file.is_file():
        raise InputError(f"{path}: its script {script} does not exist")
    known = script_settings(file)
    defaults = {setting: default for setting, (_, default) in known.items()}
    if "exp_name" in parse_flags(own, known, file.name):
        raise InputError(f"{path}: --exp-name cannot be one of a variant's flags: it is the variant's name")
    named = (f"--exp-name={name}",) if name else ()
    flags = {env: (*words, *own, *named, *extra_flags) for env, words in common.items()}
    given = {env: defaults | parse_flags(words, known, file.name) for env, words in flags.items()}
    exp_name = next(iter(given.values())).get("exp_name") or file.stem
    if name and exp_name != name:
        raise InputError(f"{path}: --exp-name is the variant's name, and cannot be {exp_name}")
    settings = {env: {key: value for key, value in all_.items() if key not in FREE} for env, all_ in given.items()}
    shown = str(file.relative_to(ROOT) if file.is_relative_to(ROOT) else file)
    return Variant(name, shown, flags, settings, exp_name, changes)


@dataclass(frozen=True)
class RunState:
    """What a run directory says about its run."""

    path: Path
    config: dict  # empty if config.json is missing or broken
    problem: str  # what is wrong with config.json; empty if nothing is
    global_step: int  # of the last line of metrics.jsonl
    total_steps: int  # that the run is meant to reach; 0 if config.json does not say
    wall_time: float  # seconds of training, also before it was resumed
    sps: float  # steps per second since it was started or resumed; nan before the first update
    updated: bool  # the last line is that of an update
    has_checkpoint: bool
    running: bool  # a process trains in this directory

    @property
    def finished(self) -> bool:
        """It has been trained to its end."""
        return not self.running and self.updated and self.global_step >= self.total_steps > 0

    @property
    def empty(self) -> bool:
        """It ended before it had written anything that could be lost."""
        return not self.has_checkpoint and not (self.path / "config.json").exists()

    @property
    def status(self) -> str:
        """running, broken, finished, interrupted (it can be resumed) or no checkpoint."""
        if self.running:
            return "running"
        if self.problem and not self.empty:
            return "broken"
        return "finished" if self.finished else "interrupted" if self.has_checkpoint else "no checkpoint"

    @property
    def advice(self) -> str:
        """For the user, if it is broken: why, and what to do."""
        return f"{self.path} is broken: {self.problem}; repair it or move it away"

    @property
    def mean_return(self) -> float:
        """Of the last 100 episodes; nan before the first one. It is read anew, from as much of the file as it takes."""
        returns, size = [], TAIL
        while len(returns) < 100:
            tail = read_end(self.path / "metrics.jsonl", size)
            returns = [float(x) for x in re.findall(RETURNS, tail)]
            if len(tail) < size:  # that was the whole file
                break
            size *= 4
        returns = returns[-100:]
        return sum(returns) / len(returns) if returns else math.nan


def scan_runs(runs_dir: Path) -> dict[str, list[Path]]:
    """All run directories, oldest first, by the names of their jobs."""
    found = []
    try:
        for entry in os.scandir(runs_dir):
            name, _, created = entry.name.rpartition("__")
            if created.isdecimal() and entry.is_dir():
                found.append((int(created), name, Path(entry.path)))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"cannot read {runs_dir}: {error}") from error
    runs = {}
    for _, name, path in sorted(found):
        runs.setdefault(name, []).append(path)
    return runs


def belongs(state: RunState, job: Job) -> bool:
    """Whether a run is one of the job's, so far as its config.json says: different jobs can give the same name."""
    wanted = {"env_id": job.env_id, "seed": job.seed, "exp_name": job.exp_name}
    return all(state.config.get(name, value) == value for name, value in wanted.items())


def job_runs(runs: dict[str, list[Path]], job: Job) -> list[RunState]:
    """The states of a job's runs, oldest first, among those that scan_runs has found."""
    known = script_settings(ROOT / job.script)
    states = [run_state(path, known) for path in runs.get(job.name, [])]
    return [state for state in states if belongs(state, job)]


def find_runs(runs_dir: Path, job: Job) -> list[Path]:
    """The run directories of a job, oldest first. For many jobs scan_runs is faster."""
    return [state.path for state in job_runs(scan_runs(runs_dir), job)]


def is_number(value: object) -> bool:
    """Whether this is a finite number."""
    return isinstance(value, int | float) and -1e300 < value < 1e300


def parse_line(line: bytes) -> dict | None:
    """A line of metrics.jsonl; None if it is being written, was torn, or does not say when it was written."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if is_row(row) else None


def is_row(row: object) -> bool:
    """Whether this is a line of metrics.jsonl."""
    return isinstance(row, dict) and is_number(row.get("global_step")) and is_number(row.get("wall_time"))


def read_end(path: Path, size: int) -> bytes:
    """The last bytes of a file, size at most; none if it cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read(size)
    except OSError:
        return b""


def read_config(run_dir: Path, known: dict[str, tuple[str, object]]) -> tuple[dict, str]:
    """The settings in config.json, and what is wrong with them: nothing, if they can be relied upon.

    What is of a wrong type is left out of the settings. One that a newer version of the script has may be missing, but
    not those without which nothing is known of the run.
    """
    try:
        config = json.loads((run_dir / "config.json").read_bytes())
    except FileNotFoundError:
        return {}, "there is no config.json"
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"config.json cannot be read: {error}"
    if not isinstance(config, dict):
        return {}, "config.json holds no settings"
    kinds = {"num_envs": "int", "num_steps": "int", "total_timesteps": "float"} | {k: v[0] for k, v in known.items()}
    needed = (*SIZES, *(name for name in ("env_id", "seed") if known))
    missing = [name for name in needed if name not in config]
    wrong = [name for name, value in config.items() if not fits(kinds.get(name, "Any"), value)]
    wrong += [name for name in SIZES if name in config and name not in wrong and not 1 <= config[name] < math.inf]
    problems = [f"{name} is missing" for name in missing] + [f"{name} is {config[name]!r}" for name in wrong]
    right = {name: value for name, value in config.items() if name not in wrong}
    return right, f"in config.json {', '.join(problems)}" if problems else ""


def run_state(run_dir: Path, known: dict[str, tuple[str, object]] | None = None) -> RunState:
    """Reads config.json and the end of metrics.jsonl; what is missing or broken there counts as not reached.

    If the settings of the run's script are given, those in config.json must have their types.
    """
    config, problem = read_config(run_dir, known or {})
    total = 0
    if not problem:
        batch = config["num_envs"] * config["num_steps"]
        total = int(config["total_timesteps"]) // batch * batch
    tail = read_end(run_dir / "metrics.jsonl", TAIL)
    row = next(filter(None, map(parse_line, reversed(tail.splitlines()))), {})
    updates = re.findall(SPEEDS, tail)
    return RunState(
        path=run_dir,
        config=config,
        problem=problem,
        global_step=int(row.get("global_step", 0)),
        total_steps=total,
        wall_time=row.get("wall_time", 0.0),
        sps=float(updates[-1]) if updates else math.nan,
        updated="charts/SPS" in row,
        has_checkpoint=(run_dir / "checkpoint.pt").exists(),
        running=is_running(run_dir),
    )


def differences(variant: Variant, env_id: str, config: dict) -> list[str]:
    """In what a run's settings differ from a variant's; one that its script did not have yet counts as the default."""
    defaults = script_settings(ROOT / variant.script)
    pairs = {name: (config.get(name, defaults[name][1]), value) for name, value in variant.settings[env_id].items()}
    return [f"{name} {theirs} instead of {ours}" for name, (theirs, ours) in pairs.items() if not same(theirs, ours)]


def same(a: object, b: object) -> bool:
    """Whether two settings are equal; JSON has lists in place of tuples."""
    return (list(a) if isinstance(a, tuple) else a) == (list(b) if isinstance(b, tuple) else b)


def suite_runs(suite: Suite, runs_dir: Path, seeds: Iterable[int] | None = None) -> dict[Job, RunState]:
    """The run of each job that has any: the newest finished one, else the one that is running or got furthest.

    A broken run counts only where there is no other. Raises InputError if a run has other settings than the suite: one
    figure must not mix them.
    """
    runs, chosen = scan_runs(runs_dir), {}
    for job in suite.jobs(seeds):
        states = job_runs(runs, job)[::-1]
        for state in states:
            if not state.problem and (different := differences(suite.variants[job.variant], job.env_id, state.config)):
                raise InputError(
                    f"mixed configurations: {state.path} has {', '.join(different)} (suite {suite.name}); "
                    "move it away, or give another --runs-dir"
                )
        if states:
            chosen[job] = max(states, key=rank)
    return chosen


def rank(state: RunState) -> tuple:
    """How much a run is worth beside others of the same job."""
    return (state.finished, state.running, not state.problem, 0 if state.finished else state.global_step)


def intact_runs(suite: Suite, runs_dir: Path) -> tuple[dict[Job, RunState], list[str]]:
    """The run of each job that has one that is not broken, and what is to be said about those that have not."""
    runs = suite_runs(suite, runs_dir)
    broken = [state.advice for state in runs.values() if state.status == "broken"]
    return {job: state for job, state in runs.items() if not state.problem}, broken


def read_metrics(run_dir: Path) -> dict[str, np.ndarray]:
    """metrics.jsonl by column: a float64 array for each name, as long as the file has lines that are whole.

    Lines of episodes and of updates have different names; what a line does not have, or has as null or as something
    else that is no number, is nan.
    """
    data = (run_dir / "metrics.jsonl").read_bytes()
    try:  # one call for the whole file takes a third of the time
        rows = json.loads(b"[" + data.strip().replace(b"\n", b",") + b"]")
    except (ValueError, RecursionError):
        rows = map(parse_line, data.splitlines())
    rows = [row for row in rows if is_row(row)]
    names = dict.fromkeys(name for shape in {tuple(row) for row in rows} for name in shape)
    return {name: column([row.get(name) for row in rows]) for name in names}


def column(values: list) -> np.ndarray:
    """The numbers among these; nan where there is none."""
    try:
        return np.array(values, np.float64)
    except (TypeError, ValueError, OverflowError):
        return np.array([value if is_number(value) else np.nan for value in values], np.float64)
