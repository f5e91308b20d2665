"""Searches for good values of flags with Optuna, and gives up trials whose learning curve falls behind.

    python -m benchmark sweep mine.toml --env-id CartPole-v1 --trials 30 \\
        --space learning-rate=1e-4..1e-2:log ent-coef=0..0.05 num-minibatches=2,4,8

A trial trains the suite's script, with its flags and those that Optuna draws, in a process of its own for each seed,
and is worth the mean return of the last 100 episodes, mean over seeds. Ten times in each training its mean return is
compared with what the other trials had at that step; below their median, the trial ends. All trials are in a SQLite
file beside the run directories: the same command in a second terminal shares the work, and later it goes on.

Optuna is not needed for anything else: pip install optuna. A search picks what was lucky, too: compare its result with
your settings on other seeds (python -m benchmark compare).
"""

import math
import shlex
import signal
import warnings
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from benchmark.run import POLL, Task, prepare
from benchmark.suite import (
    ROOT,
    InputError,
    Job,
    Suite,
    convert,
    load_suite,
    parse_flags,
    script_settings,
    similar,
    writing,
)
from benchmark.text import markdown_table, printable

REPORTS = 10  # to the pruner in each training
STARTUP = 5  # trials before any is given up
HEARTBEAT = 60  # seconds after which a trial whose process has been killed counts as failed


@dataclass
class Args:
    """Searches for good values of a script's flags with Optuna."""

    suite: tyro.conf.Positional[str]
    """suite with the script and the flags that stay as they are"""
    space: list[str] = field(default_factory=list)
    """what is searched: NAME=LOW..HIGH, NAME=LOW..HIGH:log, or NAME=A,B,C for values to choose from"""
    env_id: str | None = None
    """environment; default: the suite's first"""
    seeds: list[int] = field(default_factory=lambda: [1])
    """seeds that each trial trains with, one after the other"""
    trials: int = 20
    """trials of all processes together, those that were given up included"""
    runs_dir: Path | None = None
    """where run directories and trials.db are; default: runs/sweep_SUITE"""


def suggestion(word: str, known: dict[str, tuple[str, object]], script: str):
    """A flag's name, and a function that draws its value for a trial; raises InputError for what makes no sense."""
    name, equals, values = word.partition("=")
    setting = name.removeprefix("--").replace("-", "_")
    flag = f"--{setting.replace('_', '-')}"
    if setting not in known:
        raise InputError(
            f"--space: {script} has no flag {flag}{similar(flag[2:], [k.replace('_', '-') for k in known])}"
        )
    kind, text = known[setting][0], values.removesuffix(":log")
    low, dots, high = text.partition("..")
    if not equals or not text:
        raise InputError(f"--space takes NAME=LOW..HIGH, NAME=LOW..HIGH:log or NAME=A,B,C, not {word}")
    if not dots:
        if kind == "bool":
            raise InputError(f"--space: {flag} is on or off, which is a variant (python -m benchmark compare)")
        choices = text.split(",")
        for choice in choices:
            parse_flags([flag, choice], known, script)
        return flag, lambda trial: trial.suggest_categorical(flag, choices)
    first = kind.split(" |")[0]
    if first not in ("int", "float"):
        raise InputError(f"--space: {flag} is no number: give values to choose from, NAME=A,B,C")
    low, high, log = convert(flag, first, low), convert(flag, first, high), text != values
    if not (low < high and math.isfinite(high - low)) or log and low <= 0:
        raise InputError(f"--space: {word} is no range" + ", for a logarithm needs values above 0" * (log and low <= 0))
    draw = "suggest_int" if first == "int" else "suggest_float"
    return flag, lambda trial: getattr(trial, draw)(flag, low, high, log=log)


def measure(trial, job: Job, runs_dir: Path, index: int) -> float:
    """Trains a job, returns its last mean return; raises TrialPruned if it falls behind, RuntimeError if it fails."""
    import optuna

    task, reported = Task(job, runs_dir), 0
    with futures.ThreadPoolExecutor(1) as pool:
        training = pool.submit(task.run, 1)
        try:
            while not training.done():
                futures.wait([training], POLL)
                if task.status == "running":
                    task.look()
                state = task.state
                if not state or not state.total_steps or math.isnan(value := state.mean_return):
                    continue
                tenth = REPORTS * state.global_step // state.total_steps
                if tenth > reported:
                    reported = tenth
                    trial.report(value, index * REPORTS + tenth)
                    if tenth < REPORTS and trial.should_prune():
                        raise optuna.TrialPruned()
        finally:
            task.stop(signal.SIGTERM)  # which does nothing once it has ended
    if task.status != "finished":
        raise RuntimeError(f"{task} {task.status}: {task.note} ({task.log})")
    return task.state.mean_return


def search(args: Args, suite: Suite, env_id: str, runs_dir: Path, space: list) -> None:
    """Does trials until there are as many as wanted."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # say() below says what is to be known
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of the heartbeat
    storage = optuna.storages.RDBStorage(f"sqlite:///{runs_dir / 'trials.db'}", heartbeat_interval=HEARTBEAT)
    study = optuna.create_study(
        study_name=f"{suite.name} {env_id} {' '.join(args.space)}", storage=storage, load_if_exists=True,
        direction="maximize", pruner=optuna.pruners.MedianPruner(STARTUP),
    )  # fmt: skip

    def objective(trial) -> float:
        drawn = [word for flag, draw in space for word in (flag, f"{draw(trial)}")]
        name = f"trial{trial.number}"
        flags = (*suite.flags[env_id], *drawn, f"--exp-name={name}")
        jobs = [Job(suite.script, env_id, seed, flags, name) for seed in dict.fromkeys(args.seeds)]
        try:
            return sum(measure(trial, job, runs_dir, index) for index, job in enumerate(jobs)) / len(jobs)
        except RuntimeError as error:
            print(printable(error), flush=True)
            raise

    def say(study, trial) -> None:
        value = f"return {trial.value:.1f}" if trial.value is not None else ""
        words = " ".join(f"{flag} {shown(value)}" for flag, value in trial.params.items())
        print(printable(f"trial {trial.number}: {trial.state.name.lower()} {value} {words}"), flush=True)

    counted = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED, optuna.trial.TrialState.FAIL)
    enough = optuna.study.MaxTrialsCallback(args.trials, states=counted)
    if len(study.get_trials(deepcopy=False, states=counted)) < args.trials:
        study.optimize(objective, catch=(RuntimeError,), callbacks=[say, enough])
    done = sorted(
        study.get_trials(deepcopy=False, states=counted[:1]), key=lambda trial: trial.value, reverse=True
    )[:5]  # fmt: skip
    if not done:
        raise InputError(f"no trial has been finished; what they printed is in {runs_dir / 'logs'}")
    flags = [flag for flag, _ in space]
    rows = [[trial.number, f"{trial.value:.1f}", *(shown(trial.params[flag]) for flag in flags)] for trial in done]
    print(markdown_table([["trial", "return", *flags], *rows]))
    chosen = [word for flag in flags for word in (flag, shown(done[0].params[flag]))]
    words = ["python", suite.script, f"--env-id={env_id}", *suite.flags[env_id], *chosen]
    print(f"\n{printable(shlex.join(words))}")


def shown(value: object) -> str:
    """A value as a word on the command line."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(args: Args) -> int:
    """Runs the search; prints the best trials and the command of the best one."""
    suite = load_suite(args.suite)
    env_id = args.env_id or suite.env_ids[0]
    if env_id not in suite.env_ids:
        raise InputError(f"suite {suite.name} has no environment {env_id}{similar(env_id, suite.env_ids)}")
    if args.trials < 1 or not args.seeds or min(args.seeds) < 0:
        raise InputError("--trials must be at least 1, and --seeds whole numbers from 0")
    if not args.space:
        raise InputError("--space: what is searched? For example --space learning-rate=1e-4..1e-2:log")
    known = script_settings(ROOT / suite.script)
    space = [suggestion(word, known, Path(suite.script).name) for word in args.space]
    if len(dict(space)) < len(space):
        raise InputError("--space has a flag twice")
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise InputError(f"a search needs Optuna: pip install optuna ({error})") from error
    runs_dir = (args.runs_dir or Path("runs") / f"sweep_{suite.name}").resolve()
    prepare(runs_dir)
    with writing(runs_dir):
        search(args, suite, env_id, runs_dir, space)
    return 0
