"""What the tests share."""

import os
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


def pytest_sessionfinish():
    """The server of processes that need not import anything ends with the tests."""
    while forking.ending:
        forking.ending.pop()()


@pytest.fixture
def load_fixture():
    """Reads a recording of the official code by name."""
    return lambda name: np.load(ROOT / "tests" / "fixtures" / f"{name}.npz")
