"""A process that has imported a script, and forks itself for each run: the import is a good part of a short run's time.

Each run is a process of its own, as if it had been started by its command: it begins with nothing but the imports, has
its own signals, and whatever kills it kills nothing else. Only that it need not import anything again.

The worker and the harness talk through a socket: a request is a line of JSON with the run's flags, sent along with the
descriptors of its lock and its log; the answers are the run's process number and, at its end, its exit code.
"""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

workers: dict[tuple[int, Path], "Worker"] = {}  # by the thread that waits for its runs, and by script
REQUEST = 1 << 16  # bytes that the flags of a run may take


@contextlib.contextmanager
def without_usr2() -> Iterator[None]:
    """Processes that are started here have SIGUSR2 blocked: Slurm sends it to all, but only submitit's knows it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})


class Forked:
    """A run that a worker forks, with what is needed of subprocess.Popen."""

    def __init__(self, worker: "Worker"):
        # While the worker still imports, a signal for the run ends the worker.
        self.worker, self.pid, self.code = worker, worker.process.pid, None

    def poll(self) -> int | None:
        """The exit code, if the end is known."""
        return self.code

    def wait(self) -> int:
        """Waits for the end; returns the exit code, or a signal's number as a negative one.

        If the worker dies the run is killed, for nobody would learn of its end.
        """
        if (pid := self.worker.answer()) is None:  # the script cannot be imported
            self.code = self.worker.process.wait()
            return self.code
        self.pid = pid
        self.code = self.worker.answer()
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.code = -signal.SIGKILL
            self.worker.process.wait()
        return self.code


class Worker:
    """The harness's side of a worker."""

    def __init__(self, script: Path, environment: dict[str, str], log: int):
        self.socket, other = socket.socketpair()
        # -P keeps this folder, which has a statistics.py, out of the places where modules are looked for.
        command = [sys.executable, "-P", __file__, str(script), str(other.fileno())]
        with other, without_usr2():
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, pass_fds=[other.fileno()],
                start_new_session=True,
            )  # fmt: skip
        self.answers = self.socket.makefile("r")

    def answer(self) -> int | None:
        """The next number that the worker says; None if it has died."""
        with contextlib.suppress(OSError, ValueError):
            return int(self.answers.readline())
        return None

    def start(self, words: list[str], lock: int, log: int) -> Forked:
        """Asks for a run with these flags."""
        with contextlib.suppress(OSError):  # of a worker that has died, which wait() sees
            socket.send_fds(self.socket, [json.dumps(words).encode()], [lock, log])
        return Forked(self)

    def close(self) -> None:
        """Ends the worker."""
        self.answers.close()
        self.socket.close()
        self.process.wait()


def preloaded(script: Path, environment: dict[str, str], log: int) -> Worker:
    """This thread's worker for a script; a new one if there is none or it has died, whose complaints go to the log."""
    key = threading.get_ident(), script
    if key not in workers or workers[key].process.poll() is not None:
        workers[key] = Worker(script, environment, log)
    return workers[key]


def close_workers() -> None:
    """Ends all workers, once no run is left."""
    while workers:
        workers.popitem()[1].close()


def serve(connection: socket.socket) -> list[str]:
    """Forks for each request; returns its flags in the forked process. In the worker it ends with the harness."""
    ended = None
    while True:
        request, (*descriptors,) = socket.recv_fds(connection, REQUEST, 2)[:2]
        if ended:  # only now may another process have its number, for the harness knows of its end
            os.waitpid(ended, 0)
        if not request:
            os._exit(0)
        pid = os.fork()
        if not pid:
            connection.close()
            os.setsid()
            _lock, log = descriptors  # the lock is held as long as this process has it
            for number in (1, 2):
                os.dup2(log, number)
            os.close(log)
            return json.loads(request)
        for descriptor in descriptors:
            os.close(descriptor)
        connection.sendall(f"{pid}\n".encode())
        end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        code, ended = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status, pid
        connection.sendall(f"{code}\n".encode())


def main() -> int:
    """The worker: imports the script, forks for each request, and in the forked process runs the script."""
    script, connection = Path(sys.argv[1]), socket.socket(fileno=int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as the scripts have it
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(script.parent))  # as for a script that is started
    sys.modules[script.stem] = module
    spec.loader.exec_module(module)
    sys.argv = [str(script), *serve(connection)]
    return module.main()


if __name__ == "__main__":
    sys.exit(main())
