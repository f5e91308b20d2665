"""What the tests share."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
torch.set_num_threads(1)

if sys.platform == "linux":  # EnvPool looks for Qt when it is first imported, which many tests do
    import ppo_procgen

    ppo_procgen.load_qt()


@pytest.fixture
def load_fixture():
    """Reads a recording of the official code by name."""
    return lambda name: np.load(ROOT / "tests" / "fixtures" / f"{name}.npz")
