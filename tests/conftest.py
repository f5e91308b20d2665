"""What the tests share."""

import contextlib
import os
import signal
import sys
from pathlib import Path

# Compilation in the process itself: for each of its workers another process would import PyTorch.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import forking
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
torch.set_num_threads(1)

if sys.platform == "linux":  # EnvPool looks for Qt when it is first imported, which many tests do
    import ppo_procgen

    ppo_procgen.load_qt()


def kill_all_in(folder: Path) -> None:
    """Kills the Python programs that work in a folder, but not this process."""
    for path in Path("/proc").glob("[0-9]*"):
        # Some have just ended. Those of Weights & Biases and Slurm, which may serve other tests, are no such programs.
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            if int(path.name) != os.getpid() and (path / "cwd").resolve() == folder.resolve():
                if b"benchmark" in words or any(word.endswith(b".py") for word in words):
                    os.kill(int(path.name), signal.SIGKILL)


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
    return lambda name: np.load(ROOT / "tests" / "fixtures" / f"{name}.npz")
