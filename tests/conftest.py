"""What the tests share."""

import contextlib
import dataclasses
import gc
import inspect
import os
import signal
import sys
import time
from pathlib import Path

# Compilation in the process itself: for each of its workers another process would import PyTorch.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import forking
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def pytest_configure(config):
    """What all tests need is imported where tests run, which with -n is not here but in processes of xdist."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        if forking.Forked is not forking.ByPython:
            forking.start_server()  # one for all of them, which imports while they look for the tests
        return
    remember_what_has_no_source()
    import torch

    remember_orthogonal_weights(torch)
    torch.set_num_threads(1)
    if sys.platform == "linux":  # EnvPool looks for Qt when it is first imported, which many tests do
        import ppo_procgen

        ppo_procgen.load_qt()


def remember_what_has_no_source():
    """Reading a command line takes a third of its time: tyro asks, again and again, where a made-up class is written.

    Python parses the whole of types.py for that, each time in vain.
    """
    find = inspect.findsource

    def findsource(subject):
        if dataclasses.is_dataclass(subject) and getattr(subject, "__module__", "") == "types":
            raise OSError("could not find class definition")  # in Python's words
        return find(subject)

    inspect.findsource = findsource


def remember_orthogonal_weights(torch):
    """Most tests begin with the same random numbers, and so with the same weights, which take long to compute.

    What comes out is the same to the last bit, and so are the random numbers that come after it.
    """
    orthogonal, known = torch.nn.init.orthogonal_, {}

    def orthogonal_(tensor, gain=1, generator=None):
        if generator is not None or tensor.device.type != "cpu" or tensor.numel() < 100_000:
            return orthogonal(tensor, gain, generator)
        key = (tuple(tensor.shape), tensor.dtype, gain, torch.get_rng_state().numpy().tobytes())
        if key not in known:
            while len(known) >= 20:  # of up to 6 MB each
                del known[next(iter(known))]
            known[key] = orthogonal(tensor, gain).detach().clone(), torch.get_rng_state()
        else:
            torch.set_rng_state(known[key][1])
            with torch.no_grad():
                tensor.copy_(known[key][0])
        return tensor

    torch.nn.init.orthogonal_ = orthogonal_


def pytest_collection_finish():
    """What all tests share is not looked through again whenever a test has made much garbage."""
    gc.collect()
    gc.freeze()


def kill_all_in(folder: Path) -> None:
    """Kills the Python programs that work in a folder, but not this process."""
    place = str(folder.resolve())
    for name in os.listdir("/proc") if sys.platform == "linux" else []:
        # Some have just ended. Those of Weights & Biases and Slurm, which may serve other tests, are no such programs.
        with contextlib.suppress(OSError):
            if name.isdigit() and os.readlink(f"/proc/{name}/cwd") == place and int(name) != os.getpid():
                words, deadline = [b""], time.monotonic() + 1
                while words == [b""] and time.monotonic() < deadline:  # what has just been started has none yet
                    words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
                if b"benchmark" in words or any(word.endswith(b".py") for word in words):
                    os.kill(int(name), signal.SIGKILL)


@pytest.fixture(autouse=True)
def nothing_goes_on(request):
    """What a test that failed or ran out of time has started does not train in the background of the others."""
    yield
    if folder := request.node.funcargs.get("tmp_path"):
        kill_all_in(folder)


def pytest_sessionfinish():
    """The server of processes that need not import anything ends with the tests."""
    while forking.ending:
        forking.ending.pop()()


@pytest.fixture
def load_fixture():
    """Reads a recording of the official code by name."""
    import numpy as np

    return lambda name: np.load(ROOT / "tests" / "fixtures" / f"{name}.npz")
