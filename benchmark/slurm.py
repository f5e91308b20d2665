"""Runs a suite's jobs as a Slurm job array, through submitit.

On a node the same Task trains as on one's own machine, with the same command, lock and run directory. When Slurm takes
the node away (preemption, or the time limit), the run writes a checkpoint and the array's task is queued again; it then
resumes like any interrupted run. The state of a job is read from its run directory and from the queue, so that the
watching program may end, and be started again, while the jobs go on. Run directories must be on a shared file system.
"""

import contextlib
import fcntl
import math
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import submitit
from submitit.core.utils import DelayedSubmission, FailedJobError

from benchmark.files import is_locked, is_running, open_to_append, write_file
from benchmark.run import POLL, Display, Stop, Task, cores
from benchmark.suite import InputError, Job, Suite, suite_runs

QUEUE_POLL = 5  # seconds between two questions to Slurm
MAX_TIMEOUTS = 10_000  # a job is queued again until it is finished, however often its time is up
DEFAULTS = {"time": 24 * 60, "cpus_per_task": 1}
LISTS = ("setup", "teardown", "srun_args")  # parameters of which submitit wants lists


class Training:
    """What submitit calls on a node."""

    def __init__(self, job: Job, runs_dir: Path):
        self.task = None
        self.job, self.runs_dir = job, runs_dir

    def __call__(self) -> str:
        """Trains the job; returns its status, or raises RuntimeError so that Slurm too says that it failed."""
        self.task = Task(self.job, self.runs_dir)
        self.task.run(threads=int(os.environ.get("SLURM_CPUS_PER_TASK", cores())))
        if self.task.interrupted and queue().get(os.environ["SLURM_JOB_ID"]) == "RUNNING":
            # Slurm announces preemption by a SIGTERM to all processes: the run has ended, but the job must be queued
            # again. After scancel the state is another one.
            signal.raise_signal(signal.SIGUSR2)
        if self.task.status in ("failed", "broken"):
            raise RuntimeError(f"{self.task}: {self.task.note}")
        return self.task.status

    def checkpoint(self) -> DelayedSubmission:
        """submitit calls this on SIGUSR2: ends the run, and says what to do when the job's turn comes again."""
        if self.task:
            self.task.stop(signal.SIGTERM)
            with contextlib.suppress(ChildProcessError):  # it has ended already
                if self.task.process:
                    # WNOWAIT leaves the exit code to the wait() that this signal handler has interrupted.
                    os.waitid(os.P_PID, self.task.process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Training(self.job, self.runs_dir))


def queue() -> dict[str, str]:
    """State of each job in the queue, by its number and, in an array, by that of the array with its own index.

    Raises OSError if Slurm does not answer.
    """
    command = ["squeue", "--noheader", "--array", "--me", "--format", "%A %i %T"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise OSError(done.stderr.strip())
    states = {}
    for line in done.stdout.splitlines():
        *names, state = line.split()
        states |= dict.fromkeys(names, state)
    return states


def parse_options(words: list[str]) -> dict[str, object]:
    """What NAME=VALUE words say, for submitit; raises InputError."""
    options = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise InputError(f"--slurm takes NAME=VALUE, not {word}")
        if not value.isprintable():
            raise InputError(f"--slurm {name}: a line break in it would be a line of Slurm's script")
        options[name] = int(value) if value.isdecimal() else [value] if name in LISTS else value
    return options


def check_place(runs_dir: Path) -> None:
    """Raises InputError for a directory whose name means something else to Slurm, which has % for its job's number."""
    if "%" in str(runs_dir) or "\\" in str(runs_dir) or not str(runs_dir).isprintable():
        raise InputError(f"Slurm cannot write to {runs_dir}: the path has %, a backslash or a control character")


def submit(
    tasks: list[Task], suite: Suite, runs_dir: Path, options: dict[str, object], workers: int | None
) -> dict[Task, str]:
    """Submits the tasks that are not in the queue yet; returns the number of each one's Slurm job."""
    settings = DEFAULTS | {"job_name": re.sub(r"[^\w.-]", "-", suite.name)}
    settings |= ({"array_parallelism": workers} if workers else {}) | options
    try:
        executor = submitit.SlurmExecutor(runs_dir / "slurm", max_num_timeout=MAX_TIMEOUTS)
        executor.update_parameters(**settings)
        queued, numbers = queue(), {}
        for task in tasks:
            with contextlib.suppress(FileNotFoundError):
                number = number_file(task).read_text()
                if number in queued:
                    numbers[task] = number
        missing = [task for task in tasks if task not in numbers]
        with executor.batch() if missing else contextlib.nullcontext():
            jobs = [executor.submit(Training(task.job, runs_dir)) for task in missing]
    except (OSError, RuntimeError, ValueError, TypeError, subprocess.SubprocessError, FailedJobError) as error:
        raise InputError(f"Slurm: {' '.join(str(error).split())[:400]}") from error
    for task, job in zip(missing, jobs):
        write_file(number_file(task), job.job_id)
        numbers[task] = job.job_id
    return numbers


def number_file(task: Task) -> Path:
    """Where the number of a task's Slurm job is noted."""
    return task.lock.with_name(f"{task.job.key}.slurm")


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Waits until no other process is in here."""
    with open_to_append(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run_slurm(
    tasks: list[Task],
    suite: Suite,
    runs_dir: Path,
    options: dict[str, object],
    workers: int | None,
    display: Display,
) -> bool:
    """Submits the tasks and watches them; returns whether it was told to stop watching before the end."""
    for task in tasks:
        if by_hand(task):
            task.status = "elsewhere"
    tasks = [task for task in tasks if task.status != "elsewhere"]
    for task in tasks:
        task.log_start = task.log.stat().st_size if task.log.exists() else 0
    with one_at_a_time(runs_dir / ".locks" / "slurm"):
        numbers = submit(tasks, suite, runs_dir, options, workers)
    seeds = {task.job.seed for task in tasks}
    asked = -math.inf
    with Stop() as stop, display:
        while numbers and not stop.count:
            if time.monotonic() - asked > QUEUE_POLL:
                with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # a controller that restarts
                    queued = queue()
                    asked = time.monotonic()
                    states = suite_runs(suite, runs_dir, seeds)
                    for task, number in list(numbers.items()):
                        task.state = states.get(task.job)
                        settle(task, number, queued.get(number), runs_dir)
                        if task.status in ("finished", "failed") or task.status == "elsewhere" and by_hand(task):
                            del numbers[task]
            display.update()
            time.sleep(POLL)
    if numbers:
        print(f"Slurm goes on with {', '.join(numbers.values())}: scancel stops them.")
    return bool(numbers)


def settle(task: Task, number: str, state: str | None, runs_dir: Path) -> None:
    """Gives a task its status, by the state of its Slurm job and by what its run directory has reached."""
    if state in ("RUNNING", "COMPLETING"):
        task.status = "running"
    elif state:
        task.status = "waiting"
    elif task.state and task.state.finished:
        task.status = "finished"
    elif is_locked(task.lock) or by_hand(task):
        task.status = "elsewhere"
    else:
        task.status, task.note = "failed", f"Slurm job {number} ended before its run did"
        if not task.tail():  # it has not come so far
            task.log, task.log_start = runs_dir / "slurm" / f"{number}_0_log.err", 0


def by_hand(task: Task) -> bool:
    """Whether somebody trains the job without this program: it must not, and need not be waited for."""
    return bool(task.state) and is_running(task.state.path) and not is_locked(task.lock)
