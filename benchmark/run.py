"""Runs a suite: starts what is missing, resumes what was interrupted, and skips what is finished.

    python -m benchmark run classic                            # as many runs at a time as there are cores
    python -m benchmark run mujoco --workers 2 --seeds 1 2 3
    python -m benchmark run ablations_classic --preload        # import the script once, not for each run
    python -m benchmark run atari --launcher slurm --slurm partition=gpu gpus_per_node=1 cpus_per_task=8

Everything that must survive is in files: run directories say how far each run has got, and a lock for each job, which
the training itself holds, says whether it is running. So anything may be killed at any time, this program too (its runs
then go on), and the same command picks up what is left, also beside another one like it. Each script locks its run
directory too: a run that somebody has started by hand is shown as running elsewhere, and left alone.

A run whose files are broken is neither resumed nor started anew: what can be saved of it is for the user to say.
"""

import contextlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from benchmark.files import is_locked, is_running, open_to_append, take_lock
from benchmark.provenance import provenance
from benchmark.suite import (
    ROOT,
    STARTED,
    InputError,
    Job,
    RunState,
    job_runs,
    load_suite,
    run_state,
    scan_runs,
    script_settings,
    similar,
    suite_runs,
    writing,
)
from benchmark.text import plain, printable
from benchmark.worker import Forked, close_workers, preloaded, without_usr2

POLL = 1.0  # seconds between two looks at the runs
DRAWING = 0.005  # of one core's time that drawing the table may take: 13 ms for 15 runs, more for more
GRACE = 60  # seconds that a run has to write a checkpoint before it is killed
TAIL_LINES = 10  # of a failed run's log, shown at the end
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
STYLES = {"finished": "green", "failed": "bold red", "broken": "bold red", "running": "cyan", "elsewhere": "magenta"}
REFUSED = 2  # exit code of a script that cannot use what it was given
MAX_REFUSALS = 3  # of a script that sees a lock where none is seen from here


@dataclass
class Args:
    """Runs a suite: starts what is missing, resumes what was interrupted, skips what is finished."""

    suite: tyro.conf.Positional[str]
    """name of a suite in benchmark/suites, or a .toml file"""
    workers: int | None = None
    """runs at the same time; default: as many as there are cores"""
    seeds: list[int] | None = None
    """instead of the suite's seeds"""
    env_ids: list[str] | None = None
    """only these of the suite's environments"""
    launcher: Literal["local", "slurm"] = "local"
    """where the runs are started: on this machine, or as a job array on a Slurm cluster"""
    slurm: list[str] = field(default_factory=list)
    """NAME=VALUE for Slurm, with submitit's names: partition, time (minutes), cpus_per_task, gpus_per_node, mem, ..."""
    preload: bool = False
    """import the script once and fork a process for each run, which spares short runs much of their time"""
    dry_run: bool = False
    """only say what would be started"""
    runs_dir: Path | None = None
    """where the run directories are; default: runs/SUITE"""
    extra: str = ""
    """flags for the script beside the suite's, in one string: --extra='--total-timesteps 100000'. Give --runs-dir too:
    plot, report and upload refuse to mix runs of other settings with the suite's"""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Task:
    """A job and what becomes of it."""

    def __init__(self, job: Job, runs_dir: Path, preload: bool = False):
        self.job, self.runs_dir, self.preload = job, runs_dir, preload
        self.lock = runs_dir / ".locks" / job.key
        self.log = runs_dir / "logs" / f"{job.key}.log"
        self.log_start = 0  # where this attempt begins in the log
        self.status = "waiting"  # then running, and then finished, failed, broken, stopped or elsewhere (run by others)
        self.note = ""  # why it failed, or what was odd
        self.refusals = 0  # how often the script has said that another process trains in its directory
        self.interrupted = False  # the run stopped before its end, and not because of stop()
        self.known: set[Path] = set()  # run directories that were there before
        self.state: RunState | None = None  # of the run directory at hand
        self.process: subprocess.Popen | Forked | None = None
        self.stopping, self.guard, self.looking = False, threading.RLock(), threading.Lock()

    def __str__(self) -> str:
        return printable(self.job)

    def runs(self) -> list[RunState]:
        """The states of the job's runs, oldest first."""
        return job_runs(scan_runs(self.runs_dir), self.job)

    def is_elsewhere(self) -> bool:
        """Whether others train the job: another program like this one, or somebody by hand."""
        return is_locked(self.lock) or bool(self.state) and is_running(self.state.path)

    def judge(self) -> None:
        """Gives it the status that its run has by itself, if that leaves nothing to do."""
        if self.state and self.state.finished:
            self.status = "finished"
        elif self.state and self.state.status == "broken":
            self.status, self.note = "broken", self.state.advice

    def run(self, threads: int) -> None:
        """Trains the job to its end, unless others do. Whatever goes wrong becomes its status: it never raises."""
        try:
            descriptor = take_lock(self.lock)
            if descriptor is None:
                time.sleep(0.1)  # is_locked() of another program has it for a moment
                descriptor = take_lock(self.lock)
            if descriptor is None:
                self.status = "elsewhere"
                return
            try:
                self.train(threads, descriptor)
            finally:
                os.close(descriptor)
        except Exception as error:
            self.status, self.note = "failed", f"{type(error).__name__}: {error}"

    def train(self, threads: int, descriptor: int) -> None:
        """Resumes the run that got furthest, or starts a new one, and judges how it ended."""
        if self.stopping:
            self.status = "stopped"
            return
        states = self.runs()
        self.known = {state.path for state in states}
        worth = {"finished": 3, "running": 2, "interrupted": 1, "broken": 0}
        states = [state for state in reversed(states) if state.status in worth]  # of two that are equal the newer one
        self.state = max(states, key=lambda state: (worth[state.status], state.global_step), default=None)
        if self.state and self.state.running:
            self.status = "elsewhere"
            return
        self.judge()
        if self.status in ("finished", "broken"):
            return
        self.status = "running"
        code = self.start(threads, descriptor)
        self.look()
        if code == REFUSED and not self.stopping and self.judge_refusal():
            return
        if self.stopping:
            self.status = "finished" if self.state and self.state.finished else "stopped"
        elif code == 0 and self.state and self.state.finished:
            self.status = "finished"
        else:
            self.status, reason = "failed", f"exit code {code}"
            if code < 0:
                reason = f"killed by {signal.Signals(-code).name}"
            elif code == 0:
                self.interrupted = True
                reason = "stopped before its end by a signal that did not come from here"
            self.note = f"{self.note}; {reason}" if self.note else reason

    def command(self) -> list[str]:
        """The command line that trains it."""
        # An environment's name may begin with a dash. With --resume too it must be said which module may be imported.
        script, job = [sys.executable, str(ROOT / self.job.script), f"--env-id={self.job.env_id}"], self.job
        if self.state:
            return [*script, "--resume", str(self.state.path)]
        return [*script, "--seed", str(job.seed), "--runs-dir", str(self.runs_dir), *job.flags]

    def start(self, threads: int, descriptor: int) -> int:
        """Runs the command and returns its exit code."""
        environment = os.environ | dict.fromkeys(THREADS, str(threads))
        with open_to_append(self.log) as log:
            log.write(f"$ {shlex.join(self.command())}\n".encode(errors="surrogateescape"))
            self.log_start = log.seek(0, os.SEEK_END)
            with self.guard:
                if self.stopping:
                    return 0
                # In a session of its own a terminal's Ctrl-C does not reach the run: stop() does, and only once, for a
                # second signal kills. It inherits the lock, and keeps it if this process dies.
                if self.preload:
                    worker = preloaded(ROOT / self.job.script, environment, log.fileno())
                    self.process = worker.start(self.command()[2:], descriptor, log.fileno())
                else:
                    with without_usr2():
                        self.process = subprocess.Popen(
                            self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                            pass_fds=[descriptor], start_new_session=True,
                        )  # fmt: skip
        return self.process.wait()

    def stop(self, number: int) -> None:
        """Sends a signal to the run, or keeps it from being started."""
        with self.guard:
            self.stopping = True
            if self.process and self.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    (os.killpg if number == signal.SIGKILL else os.kill)(self.process.pid, number)

    def tail(self) -> list[str]:
        """The last lines of this attempt's log."""
        with contextlib.suppress(OSError), open(self.log, "rb") as log:
            log.seek(max(self.log_start, log.seek(0, os.SEEK_END) - 8192))
            return [plain(line) for line in log.read().decode(errors="replace").splitlines()[-TAIL_LINES:]]
        return []

    def judge_refusal(self) -> bool:
        """Gives it a status if the script has refused to write to a directory or to go on with what is in it."""
        last = next(iter(self.tail()[-1:]), "no message")
        if last.endswith("is still running: another process writes to it") and self.refusals < MAX_REFUSALS:
            self.refusals += 1
            self.status = "elsewhere"  # somebody has been faster
            return True
        if self.state and self.state.path in self.known:
            self.status = "broken"
            self.note = f"{self.state.path} cannot be resumed: {last}; repair it or move it away"
            return True
        return False

    def look(self) -> None:
        """Reads what the run has reached, once it says which job it is of."""
        known = script_settings(ROOT / self.job.script)
        with self.looking:  # the display looks too: what it read before the run ended must not replace what came after
            if self.state:
                self.state = run_state(self.state.path, known)
            else:
                new = [state for state in self.runs() if state.path not in self.known and not state.problem]
                self.state = max(new, key=lambda state: state.path, default=None)


class Display:
    """Shows tasks: a live table on a terminal, else a line for each change and now and then the progress."""

    def __init__(self, tasks: list[Task], title: str, every: float = 30):
        self.tasks, self.title, self.every, self.console = tasks, title, every, Console()
        self.shown, self.reported = {task: task.status for task in tasks}, time.monotonic()
        self.redraw = -math.inf  # when the table is due again, unless a status changes before
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None

    def __enter__(self):
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exception):
        self.redraw = -math.inf
        self.update()
        if self.live:
            self.live.stop()

    def update(self) -> None:
        """Reads the progress of what is running, and shows it."""
        statuses, start = {task: task.status for task in self.tasks}, time.thread_time()
        if self.live and statuses == self.shown and time.monotonic() < self.redraw:
            return
        for task in self.tasks:
            if task.status in ("running", "elsewhere"):
                task.look()
        if self.live:
            self.live.update(self.table(), refresh=True)
            self.shown, self.redraw = statuses, time.monotonic() + (time.thread_time() - start) / DRAWING
            return
        due = time.monotonic() - self.reported > self.every
        for task in self.tasks:
            if task.status != self.shown[task] or due and task.status in ("running", "elsewhere"):
                print(f"{task}: {', '.join(filter(None, progress(task)))}", flush=True)
                self.shown[task] = task.status
        if due:
            self.reported = time.monotonic()

    def table(self) -> Table:
        """All tasks, those first that something can be said about."""
        counts = Counter(task.status for task in self.tasks)
        caption = ", ".join(f"{number} {status}" for status, number in counts.items()) + f" of {len(self.tasks)}"
        left = [task for task in self.tasks if task.status in ("running", "waiting", "elsewhere")]
        states = [task.state for task in left if task.state and task.status != "waiting" and task.state.total_steps]
        if states and (speed := sum(state.sps for state in states if state.sps > 0)):
            steps = sum(state.total_steps - state.global_step for state in states)
            # Those that have not started yet are taken to be as long as the others.
            steps += (len(left) - len(states)) * sum(state.total_steps for state in states) / len(states)
            caption += f"; about {clock(steps / speed)} left"
        # As Text: in a string Rich takes "[red]" for a color and ":x:" for a picture.
        title = Text(printable(self.title), "table.title")
        variants = any(task.job.variant for task in self.tasks)
        heads = ["environment", *["variant"] * variants, "seed", "status", "steps", "steps/s", "return", "left"]
        table = Table(*heads, title=title)
        table.caption, table.caption_justify = caption, "left"
        order = ["running", "elsewhere", "failed", "broken", "stopped", "waiting", "finished"]
        for task in sorted(self.tasks, key=lambda task: order.index(task.status)):
            status, *cells = progress(task)
            names = [task.job.env_id, *[task.job.variant] * variants, task.job.seed]
            names = [Text(printable(name)) for name in names]
            table.add_row(*names, Text(status, STYLES.get(task.status, "")), *cells)
        return table


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


def progress(task: Task) -> tuple[str, str, str, str, str]:
    """Status, steps, speed, mean return and time left of a task, as text; empty where nothing is known."""
    state = task.state
    if not state or not state.total_steps:
        return task.status, "", "", "", ""
    steps = f"{state.global_step:,}/{state.total_steps:,}"
    speed = "" if math.isnan(state.sps) else f"{state.sps:,.0f} steps/s"
    mean_return = "" if math.isnan(state.mean_return) else f"return {state.mean_return:.1f}"
    left = ""
    if task.status in ("running", "elsewhere") and state.sps > 0:
        left = f"{clock((state.total_steps - state.global_step) / state.sps)} left"
    return task.status, steps, speed, mean_return, left


class Stop:
    """Ctrl-C, SIGTERM and the terminal's end, while it is entered: asked for once, and urgent the second time."""

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __enter__(self):
        self.count = 0
        self.handlers = {number: signal.signal(number, self.request) for number in self.numbers}
        return self

    def request(self, number: int, frame) -> None:
        """Handles a signal."""
        self.count += 1

    def __exit__(self, *exception):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stopping(tasks: list[Task]) -> Iterator[None]:
    """Stops all runs if what watches them fails: else it would wait for their end, and not listen to Ctrl-C."""
    try:
        yield
    except BaseException:
        for task in tasks:
            task.stop(signal.SIGTERM)
        raise


def run_local(tasks: list[Task], workers: int, display: Display) -> bool:
    """Runs tasks on this machine; returns whether it was told to stop before the end."""
    threads = max(1, cores() // workers)
    with Stop() as stop, display, futures.ThreadPoolExecutor(workers) as pool, stopping(tasks):
        pending = {pool.submit(task.run, threads) for task in tasks}
        deadline, others = math.inf, False
        # Jobs of another program like this one are waited for; those that somebody trains by hand are his.
        while pending or others and not stop.count:
            if pending:
                pending = futures.wait(pending, POLL).not_done
            else:
                time.sleep(POLL)
            if stop.count and deadline == math.inf:
                deadline = time.monotonic() + GRACE
                for task in tasks:
                    task.stop(signal.SIGTERM)
            if stop.count > 1 or time.monotonic() > deadline:
                for task in tasks:
                    task.stop(signal.SIGKILL)
            others = False
            for task in tasks:
                if task.status == "elsewhere" and not stop.count:
                    others |= is_locked(task.lock)  # asked first: if it ends between the two, the next round sees that
                    if not task.is_elsewhere():
                        task.status = "waiting"  # the others have ended; what they have left undone is done here
                        pending.add(pool.submit(task.run, threads))
            display.update()
    close_workers()
    return stop.count > 0


def prepare(runs_dir: Path) -> None:
    """Creates the directory with what the harness keeps there; raises InputError where nothing can be written."""
    with writing(runs_dir):
        for name in (".locks", "logs"):
            (runs_dir / name).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=runs_dir).close()


def plan(task: Task) -> str:
    """What is to be done for a task, in words."""
    if task.state and task.state.finished:
        return f"{task}: finished ({task.state.path})"
    if task.is_elsewhere():
        return f"{task}: running already"
    if task.status == "broken":
        return f"{task}: {task.note}"
    if task.state and task.state.has_checkpoint:
        return f"{task}: resume {task.state.path} at step {task.state.global_step:,} of {task.state.total_steps:,}"
    return f"{task}: start"


def summarize(tasks: list[Task], stopped: bool) -> int:
    """Says how it ended, with the end of each failed run's log; returns the exit code."""
    counts = Counter(task.status for task in tasks)
    for task in tasks:
        if task.status == "failed":
            print(f"\n{task} failed: {printable(task.note)} ({printable(task.log)})", *task.tail(), sep="\n    ")
        elif task.status == "elsewhere":
            where = f": another process trains it in {printable(task.state.path)}" if task.state else ""
            print(f"\n{task} is still running elsewhere{where}")
        elif task.note:
            print(f"\n{task}: {printable(task.note)}")
    rest = {status: number for status, number in counts.items() if status != "finished"}
    words = {"elsewhere": "running elsewhere"}
    others = "".join(f", {number} {words.get(status, status)}" for status, number in rest.items())
    print(f"{counts['finished']} of {len(tasks)} finished{others}")
    if stopped or rest:
        print("The same command goes on with what is not finished.")
    return 130 if stopped else 1 if rest else 0


def main(args: Args) -> int:
    """Runs a suite; returns the exit code: 0 if all of it is finished, 1 if anything failed, 130 if stopped."""
    if args.workers is not None and args.workers < 1:
        raise InputError(f"--workers must be at least 1, not {args.workers}")
    if args.seeds is not None and min(args.seeds, default=-1) < 0:
        raise InputError(f"--seeds takes whole numbers from 0, not {' '.join(map(str, args.seeds)) or 'nothing'}")
    if args.slurm and args.launcher != "slurm":
        raise InputError("--slurm needs --launcher slurm")
    if args.preload and (args.launcher == "slurm" or not hasattr(os, "fork")):
        raise InputError("--preload works with --launcher local only, on Linux and macOS")
    if args.launcher == "slurm":
        from benchmark.slurm import check_place, parse_options, run_slurm

        options = parse_options(args.slurm)
    try:
        extra = shlex.split(args.extra)
    except ValueError as error:
        raise InputError(f"--extra: {error}") from error
    suite = load_suite(args.suite, extra)
    for env_id in args.env_ids or ():
        if env_id not in suite.env_ids:
            raise InputError(f"suite {suite.name} has no environment {env_id}{similar(env_id, suite.env_ids)}")
    runs_dir = (args.runs_dir or suite.runs_dir).resolve()
    states = suite_runs(suite, runs_dir, args.seeds)
    tasks = [Task(job, runs_dir, args.preload) for job in suite.jobs(args.seeds)
             if job.env_id in (args.env_ids or suite.env_ids)]  # fmt: skip
    for task in tasks:
        task.state = states.get(task.job)
        task.judge()
    if args.dry_run:
        print("\n".join(printable(plan(task)) for task in tasks))
        return 0
    todo = [task for task in tasks if task.status not in ("finished", "broken")]
    if args.launcher == "slurm":
        check_place(runs_dir)
    prepare(runs_dir)
    if todo:
        with writing(runs_dir), open_to_append(runs_dir / STARTED) as file:
            file.write((json.dumps(provenance()) + "\n").encode())
    display = Display(tasks, suite.title)
    if args.launcher == "slurm" and todo:
        stopped = run_slurm(todo, suite, runs_dir, options, args.workers, display)
    else:
        stopped = run_local(todo, min(args.workers or cores(), max(1, len(todo))), display)
    return summarize(tasks, stopped)
