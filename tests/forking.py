"""Processes that need not import anything: what the scripts import takes longer than a short run of them.

A server, one for all tests, has imported it once and forks itself for every start. What is forked is a process of its
own, with its own command line, environment, folder, files and signals; only the imports are not its own. What those
could change, and the moments before they are over, is tested with processes that Python starts.

As a program, this file is the server.
"""

import atexit
import contextlib
import gc
import importlib.util
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

IMPORTS = ("numpy", "torch", "gymnasium", "tqdm", "tyro")  # those of all scripts
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
REQUEST = 1 << 20  # bytes that a command and its environment may take
ADDRESS = "FORKING_SERVER"  # the variable that tells processes where the server of these tests is


# A program for -c: torchrun, whose ranks are forked. It needs this folder in PYTHONPATH.
TORCHRUN = """
import forking
import torch.distributed.run
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
subprocess_handler.Popen = lambda args, **options: forking.Forked(args[1:], **options)
torch.distributed.run.main()
"""
ending = []  # what ends the server


def start_server() -> None:
    """Starts a server, which is going to listen when it has imported all."""
    address = str(Path(tempfile.mkdtemp()) / "socket")
    command, environment = (
        [sys.executable, "-P", str(Path(__file__).resolve()), address],
        os.environ | {"OMP_NUM_THREADS": "1"},
    )
    environment.pop("PYTHONPATH", None)
    # It ends when the other end of its stdin does, whatever ends that.
    process = subprocess.Popen(command, env=environment, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    os.environ[ADDRESS] = address

    def end():
        process.stdin.close()
        process.wait(60)
        shutil.rmtree(Path(address).parent, ignore_errors=True)
        os.environ.pop(ADDRESS, None)

    ending.append(end)


def connect(patience: float = 120) -> socket.socket:
    """A connection to the server; starts one if there is none."""
    if ADDRESS not in os.environ:
        start_server()
    connection, deadline = socket.socket(socket.AF_UNIX), time.monotonic() + patience
    while True:
        try:
            connection.connect(os.environ[ADDRESS])
            return connection
        except (FileNotFoundError, ConnectionRefusedError):  # it is still importing
            assert time.monotonic() < deadline, "the server of processes does not listen"
            time.sleep(0.05)


class Forked:
    """A process like subprocess.Popen([sys.executable, *words], text=True, ...) with what the tests need of that.

    The words are those after python: a script, -c and a program, or -m and a module. What it writes goes to files, or
    if PIPE is said for them to a file that communicate() reads. If this process ends, however that may be, so does it.
    """

    def __init__(self, words, stdout=None, stderr=None, env=None, cwd=None, start_new_session=False):
        self.args, self.returncode, self.outputs = [str(word) for word in words], None, []
        self.connection = connect()
        # What it starts may be forked too.
        env = (os.environ if env is None else env) | {ADDRESS: os.environ[ADDRESS]}
        request = {"words": self.args, "env": env, "cwd": str(cwd or os.getcwd())}
        descriptors = []
        for number, target in ((1, stdout), (2, stderr)):
            self.outputs.append(tempfile.TemporaryFile("w+") if target == subprocess.PIPE else None)
            file = self.outputs[-1] or target
            descriptors.append(number if file is None else file if isinstance(file, int) else file.fileno())
        message = json.dumps(request | {"session": start_new_session}).encode()
        socket.send_fds(self.connection, [len(message).to_bytes(4)], descriptors)
        self.connection.sendall(message)
        self.answers = self.connection.makefile("r")
        self.pid = int(self.answers.readline())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()
        self.wait()

    def poll(self) -> int | None:
        """The exit code, or a signal's number as a negative one; None while it runs."""
        if self.returncode is None and select.select([self.connection], [], [], 0)[0]:
            self.returncode = int(self.answers.readline())
            self.answers.close()
            self.connection.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end; returns the exit code."""
        if self.returncode is None and not select.select([self.connection], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.poll()

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        """Waits for the end; returns what it wrote to stdout and stderr."""
        self.wait(timeout)
        said = []
        for file in self.outputs:
            if file:
                file.seek(0)
            said.append(file and file.read())
        return tuple(said)

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Sends SIGKILL."""
        self.send_signal(signal.SIGKILL)


class ByPython(subprocess.Popen):
    """The same, started by Python: for systems other than Linux."""

    def __init__(self, words, **options):
        super().__init__([sys.executable, *words], text=True, **options)


if not hasattr(os, "pidfd_open"):
    Forked = ByPython


def run(words, timeout: float = 300, **options) -> subprocess.CompletedProcess:
    """What subprocess.run([sys.executable, *words], capture_output=True, text=True, ...) does."""
    with Forked(words, **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options)) as process:
        said = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, *said)


def start(connection: socket.socket) -> list[str] | None:
    """Forks twice: a process that watches over the one asked for, and that one, in which alone this returns."""
    size, descriptors, *_ = socket.recv_fds(connection, 4, 2)
    message = b""
    while len(message) < int.from_bytes(size):
        if not (part := connection.recv(REQUEST)):  # it has ended in the middle
            break
        message += part
    request = json.loads(message)
    if os.fork():
        for descriptor in descriptors:
            os.close(descriptor)
        connection.close()
        return None
    pid = os.fork()
    if pid:
        watch(connection, pid)
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if request["session"]:
        os.setsid()
    for number, descriptor in enumerate([os.open(os.devnull, os.O_RDONLY), *descriptors]):
        os.dup2(descriptor, number)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    connection.sendall(f"{os.getpid()}\n".encode())  # from now on it takes signals
    connection.detach()
    os.closerange(3, 256)
    return request["words"]


def watch(connection: socket.socket, pid: int) -> None:
    """Tells of the process's end, and ends it when nobody is there to be told."""
    for number in SIGNALS[:-1]:
        signal.signal(number, signal.SIG_IGN)  # these are for those who started it
    os.closerange(0, 3)
    end, poll = os.pidfd_open(pid), select.poll()
    poll.register(connection, select.POLLRDHUP)
    poll.register(end, select.POLLIN)
    if end not in [descriptor for descriptor, _ in poll.poll()]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(f"{code}\n".encode())
    os._exit(0)


def serve(address: str) -> list[str]:
    """Forks for each request; returns its words in the forked process."""
    for number in SIGNALS[:-1]:
        signal.signal(number, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(100)
    while True:
        if listener not in select.select([listener, 0], [], [])[0]:
            listener.close()
            with contextlib.suppress(ChildProcessError):  # their time counts as this process's
                while os.wait():
                    pass
            os._exit(0)
        connection, _ = listener.accept()
        if words := start(connection):
            listener.detach()
            return words
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def play(words: list[str]) -> None:
    """What python does with these words."""
    if words[0] == "-u":
        sys.stdout.reconfigure(write_through=True)
        del words[0]
    places = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    if words[0] == "-c":
        sys.argv, sys.path[:0] = ["-c", *words[2:]], ["", *places]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv, sys.path[:0] = words[1:], [os.getcwd(), *places]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:0] = words, [str(Path(words[0]).resolve().parent), *places]
        runpy.run_path(words[0], run_name="__main__")


def main() -> None:
    """The server, and in the forked processes the program that is asked for."""
    for name in IMPORTS:
        importlib.import_module(name)
    if sys.platform == "linux":  # elsewhere there is no EnvPool
        spec = importlib.util.spec_from_file_location("ppo_procgen", Path(__file__).parent.parent / "ppo_procgen.py")
        sys.modules["ppo_procgen"] = script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        script.load_qt()  # EnvPool looks for it when it is imported
        importlib.import_module("envpool")
        del sys.modules["ppo_procgen"]
    gc.freeze()  # what all share is not looked through, and so not copied, in each
    words, code = serve(sys.argv[1]), 0
    try:
        play(words)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        if code == 1 and stop.code != 1:
            print(stop.code, file=sys.stderr)
    except KeyboardInterrupt:
        raise
    except BaseException:
        traceback.print_exc()
        code = 1
    # Python's own end, but for the destruction of all that has been imported, which takes as long as a short run.
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
