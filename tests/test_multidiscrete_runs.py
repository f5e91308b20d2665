"""Runs of ppo_multidiscrete.py as its users see them: learning, playing, resuming, what is refused, edited copies.

What stands in the same lines in ppo.py is proven there.
"""

import json
import re
import signal
import sys
import types
from dataclasses import fields
from pathlib import Path

import gymnasium as gym
import masked
import numpy as np
import pytest
import torch
from conftest import ROOT
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Sequence
from test_bad_input import refusal
from test_runs import (
    BATCH,
    EPISODE,
    UPDATE,
    Background,
    Killed,
    assert_same_agent,
    checkpoint,
    files,
    flags,
    in_empty_folder,  # noqa: F401 - a fixture that every test uses
    metrics,
    problems,
    small,
    train,
    update_steps,
    without_clock,
)

import ppo
import ppo_multidiscrete

pytestmark = pytest.mark.slow  # these start whole runs

NO_CHOICE = "where an action mask leaves a component no valid value, it gets the first"
CLEANER = {"env_backend": "envpool", "env_id": "Jumanji/Cleaner-v0"}
VALVES = {"env_backend": "gymnasium", "env_id": "masked/Valves-v0"}
TASKS = pytest.mark.parametrize("task", [CLEANER, VALVES], ids=["EnvPool", "gymnasium"])


@pytest.fixture(autouse=True)
def forget(in_empty_folder):  # noqa: F811 - pytest's way to ask for another fixture
    """What one test has counted or said does not count in the next."""
    masked.Valves.invalid = masked.Valves.steps = 0
    ppo_multidiscrete.say.cache_clear()


def run_of(updates: int, task: dict = VALVES, **settings):
    """Settings of a short run."""
    if task is CLEANER:
        pytest.importorskip("envpool")  # exists for Linux only
    return small(updates, ppo_multidiscrete, **task | settings)


# Learning -------------------------------------------------------------------------------------------------------------
# Two components of 16 and 12 values, two of each valid: at most 16 in an episode, and 8 with valid actions at random.
LEARNING = VALVES | {"env_kwargs": '{"sizes": [16, 12]}', "num_envs": 8, "num_steps": 64, "num_minibatches": 4,
                     "update_epochs": 4, "learning_rate": 5e-3, "gamma": 0.5, "total_timesteps": 8192}  # fmt: skip


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    ("switches", "low", "high"),
    [({}, 14.5, 16), ({"mask_actions": False}, 0, 6), ({"joint_actions": "flat"}, 12.5, 16),
     ({"joint_actions": "factored"}, 14.5, 16)],
    ids=["masks", "no masks", "flat", "factored"],
)  # fmt: skip
def test_learns_which_valid_values_are_wanted(switches, low, high, seed):
    """Within 8,192 steps, 1,024 episodes; without masks hardly any action is valid by chance.

    Of the seeds 1 to 12, on kernels for AVX2 and on those without vector instructions: 15.57 to 15.76 with masks, 1.63
    to 3.86 without any, and 14.17 to 14.56 with a logit for each combination, of which each is seen less often.
    """
    result = ppo_multidiscrete.train(ppo_multidiscrete.Args(seed=seed, **LEARNING, **switches))
    assert low <= result["episodic_return"] <= high


@TASKS
def test_compiled_training_is_the_same_training(task):
    """Up to rounding: masks and layout within the compiled step are those outside of it."""
    states, sizes = [], {} if task is CLEANER else {"env_kwargs": '{"sizes": [5, 3]}'}
    for compiled in (False, True):
        args = run_of(6, task, anneal_clip=True, compile=compiled, learning_rate=1e-3, **sizes)
        states.append(checkpoint(train(args)))
    for eager, compiled in zip(*(state["agent"].values() for state in states), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-4)
    assert (states[0]["moments"] - states[1]["moments"])[0].norm() < 1e-2 * states[0]["moments"][0].norm()


# Files, kills and playing ---------------------------------------------------------------------------------------------
@TASKS
def test_files_and_metrics(task, capsys):
    args = run_of(16, task)
    assert ppo_multidiscrete.main(flags(args)) == 0
    (path,) = Path("runs").iterdir()
    assert files(path).keys() == {"config.json", "metrics.jsonl", "checkpoint.pt"}
    assert problems(capsys.readouterr().err) in ([], [NO_CHOICE] if task is CLEANER else [])
    assert {frozenset(row) for row in metrics(path)} == {frozenset(EPISODE), frozenset(UPDATE)}
    assert update_steps(path) == list(range(1, 17))
    first = next(row for row in metrics(path) if row.keys() == UPDATE)
    # Three components of four values, of which some are valid; in the other task one or two valid values in each.
    assert 0.5 < first["losses/entropy"] < 3 * np.log(3.5 if task is CLEANER else 2)


@TASKS
def test_seeds(task):
    """The same seed gives the same run to the last bit, another seed another run."""
    seeds = ((1, "a"), (1, "b"), (2, "c"))
    first, again, other = (train(run_of(8, task, seed=seed, runs_dir=name)) for seed, name in seeds)
    assert without_clock(first) == without_clock(again) != without_clock(other)
    assert_same_agent(checkpoint(first)["agent"], checkpoint(again)["agent"])


def test_kill_and_resume():
    """A run killed at any moment goes on from its last checkpoint and ends as long as it was meant to be."""
    background = Background(run_of(200, CLEANER, checkpoint_interval=5))
    path = background.wait_for_update(13)
    code, _, _ = background.end(signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert checkpoint(path)["update"] % 5 == 0 and update_steps(path)[-1] < 200
    before = (path / "metrics.jsonl").read_bytes()[: checkpoint(path)["metrics_bytes"]]
    assert ppo_multidiscrete.main(["--resume", str(path)]) == 0
    assert (path / "metrics.jsonl").read_bytes().startswith(before)
    assert update_steps(path) == list(range(1, 201))
    assert checkpoint(path)["update"] == 200 and checkpoint(path)["gradient_steps"] == 200 * 4


@TASKS
def test_killed_before_the_first_checkpoint(task, monkeypatch):
    """Then all is done again, and to the last bit as if nothing had happened."""
    whole = train(run_of(8, task, runs_dir="whole"))
    original = ppo_multidiscrete.Run.end_update

    def end_update(run, ends, values):
        original(run, ends, values)
        if run.update == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ppo_multidiscrete.Run, "end_update", end_update)
        with pytest.raises(Killed):
            train(run_of(8, task, runs_dir="killed"))
    (path,) = Path("killed").iterdir()
    assert checkpoint(path)["update"] == 0 and update_steps(path) == [1, 2, 3]
    assert ppo_multidiscrete.main(["--resume", str(path)]) == 0
    assert without_clock(path) == without_clock(whole)
    assert_same_agent(checkpoint(path)["agent"], checkpoint(whole)["agent"])


@pytest.mark.parametrize("form", ["row", "table"])
@pytest.mark.parametrize("source", masked.SOURCES)
@pytest.mark.parametrize("extra", [[], ["--eval-deterministic"]], ids=["sampled", "greedy"])
def test_evaluation_takes_valid_actions_only(source, form, extra, capsys):
    """Whatever the source of the masks; nothing of the run is changed."""
    path = train(run_of(2, env_kwargs=json.dumps({"source": source, "form": form})))
    before = files(path)
    masked.Valves.invalid = masked.Valves.steps = 0
    capsys.readouterr()
    assert ppo_multidiscrete.main(["--evaluate", str(path), "--eval-episodes", "20", *extra]) == 0
    assert masked.Valves.steps >= 160 and masked.Valves.invalid == 0
    output = capsys.readouterr()
    assert re.fullmatch(r"masked/Valves-v0: return \d+\.\d \+- \d+\.\d over 20 episodes\n", output.out)
    assert problems(output.err) == [] and files(path) == before


def test_evaluation_without_masks():
    """As in training; with the flag they are used, for it is the same network."""
    path = train(run_of(2, mask_actions=False))
    for extra, invalid in (["--no-mask-actions"], True), ([], True), (["--mask-actions"], False):
        masked.Valves.invalid = 0
        assert ppo_multidiscrete.main(["--evaluate", str(path), *extra]) == 0
        assert (masked.Valves.invalid > 0) == invalid


def test_evaluation_with_masks_at_the_ends():
    """An environment with one valid action at a time, also in an episode's first step."""
    for source in masked.SOURCES:
        path = train(run_of(2, {"env_backend": "gymnasium", "env_id": "masked/Stamps-v0"},
                            env_kwargs=json.dumps({"source": source})))  # fmt: skip
        returns = ppo_multidiscrete.evaluate(run_of(2, env_id="masked/Stamps-v0", evaluate=str(path),
                                                    env_kwargs=json.dumps({"source": source})))  # fmt: skip
        assert returns == [5] * 10


def test_evaluation_in_envpool(capsys):
    path = train(run_of(8, CLEANER))
    capsys.readouterr()
    assert ppo_multidiscrete.main(["--evaluate", str(path), "--eval-episodes", "3"]) == 0
    output = capsys.readouterr()
    assert re.fullmatch(r"Jumanji/Cleaner-v0: return -?\d+\.\d \+- \d+\.\d over 3 episodes\n", output.out)
    assert problems(output.err) in ([], [NO_CHOICE])


@pytest.mark.filterwarnings("ignore:.*Overwriting existing videos")
def test_taxi_with_videos(capsys):
    """A task of gymnasium with masks in its infos: no move into a wall, no passenger where there is none."""
    path = train(run_of(2, env_id="Taxi-v4"))
    assert checkpoint(path)["agent"]["actor.0.weight"].shape == (64, 500)
    words = ["--evaluate", str(path), "--eval-episodes", "2", "--eval-max-steps", "50", "--capture-video"]
    assert ppo_multidiscrete.main(words) == 0
    assert len(list((path / "videos").glob("*.mp4"))) == 2
    (penalty,) = re.findall(r"return (-?\d+\.\d) ", capsys.readouterr().out)
    assert float(penalty) >= -50  # a step costs 1, an illegal passenger 10


def test_cartpole_with_envpool():
    """Neither components nor masks."""
    pytest.importorskip("envpool")  # exists for Linux only
    path = train(run_of(4, env_id="CartPole-v1", env_backend="envpool"))
    assert checkpoint(path)["agent"]["actor.4.weight"].shape == (2, 64)


# What is refused ------------------------------------------------------------------------------------------------------
class Odd(gym.Env):
    """An environment that is odd in the given ways."""

    def __init__(self, actions=None, observations=None, mask=None, later=None, fading=0):
        self.action_space = actions or MultiDiscrete([3, 2, 4])
        self.observation_space = observations or Box(-1, 1, (2,), np.float32)
        self.fading = fading  # steps after which there is no mask any more; 0: never
        self.infos = [{} if value is None else {"action_mask": np.ones(value)} for value in (mask, later)]

    def reset(self, *, seed=None, options=None):
        """Starts the next episode."""
        super().reset(seed=seed)
        return np.zeros(2, np.float32), self.infos[0]

    def step(self, action):
        """One step on."""
        self.fading -= 1
        if self.fading == 0:
            self.infos[1] = {}
        return np.zeros(2, np.float32), 0.0, False, False, self.infos[1]


ODD = {
    "BoxActions": {"actions": Box(-1, 1, (2,), np.float32)},
    "DictActions": {"actions": Dict(a=Discrete(2))},
    "ManyActions": {"actions": MultiDiscrete([100, 100, 100])},
    "HugeActions": {"actions": Discrete(10**6)},
    "SequenceObs": {"observations": Sequence(Discrete(2))},
    "OnlyMask": {"observations": Dict(action_mask=Box(0, 1, (9,), np.int8))},
    "ShortMask": {"mask": 8, "later": 8},
    "ShorterMask": {"mask": 9, "later": 8},
    "LateMask": {"later": 9},
    "LostMask": {"mask": 9},
    "FadingMask": {"mask": 9, "later": 9, "fading": 40},
    "TwoRows": {"actions": MultiDiscrete([2, 5]), "mask": (2, 5), "later": (2, 5)},
}
for name, kwargs in ODD.items():
    gym.register(f"odd/{name}-v0", Odd, kwargs=kwargs, disable_env_checker=True)
GYM, FORMS = (
    "--env-backend gymnasium --env-id",
    "must be an array of 0 and 1 of shape [9] for all values in a row, [3, 4]",
)
BAD_FLAGS = {
    "close environment id": (f"{GYM} Taxi-v44", "Taxi-v4"),
    "missing environment module": (f"{GYM} no_such_module:Env-v0", "no_such_module"),
    "unequal minibatches": ("--num-envs 3 --num-steps 5 --num-minibatches 4", "15 samples cannot be cut into 4"),
    "no whole rollout": ("--total-timesteps 2047", "2047 is below one rollout, 2048 steps"),
    "nan gamma": ("--gamma nan", "--gamma must be from 0"),
    "evaluation of nothing": ("--evaluate nowhere", "nowhere is not a run directory"),
    "continuous actions": (f"{GYM} odd/BoxActions-v0", "; ppo_continuous.py is for Box actions"),
    "Dict actions": (f"{GYM} odd/DictActions-v0", "whole-numbered Box actions, not Dict"),
    "many combinations": (f"{GYM} odd/ManyActions-v0 --joint-actions flat", "more than 16384 alternatives"),
    "many values": (f"{GYM} odd/HugeActions-v0", "more than 16384 alternatives with --joint-actions off"),
    "observations of any length": (f"{GYM} odd/SequenceObs-v0", "needs observations of numbers"),
    "nothing but a mask": (f"{GYM} odd/OnlyMask-v0", "needs observations of numbers"),
    "mask of another shape": (f"{GYM} odd/ShortMask-v0", FORMS),
    "mask that changes its shape": (f"{GYM} odd/ShorterMask-v0", FORMS),
    "mask that reset does not give": (f"{GYM} odd/LateMask-v0", "must come with each observation or with none"),
    "mask that step does not give": (f"{GYM} odd/LostMask-v0", "must come with each observation or with none"),
    "ambiguous mask": (f"{GYM} odd/TwoRows-v0", "not [2, 5], which can be the second or the third"),
    "close id of EnvPool": ("--env-id Jumanji/Cleaner-v1", "did you mean Jumanji/Cleaner-v0"),
    "task of gymnasium with EnvPool": ("--env-id Taxi-v4", "EnvPool has no Taxi-v4; add --env-backend gymnasium"),
    "continuous actions of EnvPool": ("--env-id Pendulum-v1", "; ppo_continuous.py is for Box actions"),
    "unknown argument of EnvPool": ('--env-kwargs {"wind":3}', "wind"),
    "videos of EnvPool": ("--capture-video", "EnvPool cannot record videos: add --env-backend gymnasium"),
}


@pytest.mark.filterwarnings("ignore:.*Box (low|high)'s precision lowered")  # gymnasium's, about EnvPool's spaces
@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags(case, capfd):
    """One line, exit code 2, nothing created."""
    words, fragment = BAD_FLAGS[case]
    if GYM not in words:
        pytest.importorskip("envpool")  # exists for Linux only
    assert fragment in refusal(words.split(" "), capfd, ppo_multidiscrete)


@pytest.mark.parametrize("words", [["--joint-actions", "both"], ["--mask-actions", "maybe"], ["--masks"]])
def test_bad_words(words, capfd):
    """What tyro refuses itself."""
    with pytest.raises(SystemExit) as stop:
        ppo_multidiscrete.main(words)
    assert stop.value.code == 2 and words[-1] in capfd.readouterr().err and not list(Path.cwd().iterdir())


def test_a_mask_that_is_lost_in_the_training(capsys):
    """One line says so. The run directory stays, for there was a good checkpoint."""
    words = flags(run_of(4, env_id="odd/FadingMask-v0"))
    assert ppo_multidiscrete.main(words) == 2
    (line,) = problems(capsys.readouterr().err)
    assert line.startswith("ppo_multidiscrete.py: error: an action mask must come with each observation")
    (path,) = Path("runs").iterdir()
    assert checkpoint(path)["update"] == 0


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_run_directories_of_others(flag, capfd):
    """Of another script, and of a network for other actions."""
    other = train(small(2, ppo))
    assert "is not a run directory of ppo_multidiscrete.py" in refusal([flag, str(other)], capfd, ppo_multidiscrete)
    own = train(run_of(2))
    words = [flag, str(own), "--env-kwargs", '{"sizes": [3, 3, 4]}']
    assert "checkpoint.pt" in refusal(words, capfd, ppo_multidiscrete)
    assert "checkpoint.pt" in refusal([flag, str(own), "--joint-actions", "flat"], capfd, ppo_multidiscrete)


def test_without_envpool(capfd, monkeypatch):
    """Where EnvPool is not installed its tasks are refused, and those of gymnasium trained."""
    monkeypatch.setitem(sys.modules, "envpool", None)  # makes its import fail
    assert ppo_multidiscrete.main([]) == 2
    said = capfd.readouterr().err.splitlines()
    assert said[0] == "EnvPool is not installed (it exists for Linux only): using gymnasium"
    assert len(said) == 2 and "cannot make Jumanji/Cleaner-v0" in said[1]
    assert ppo_multidiscrete.main(flags(run_of(1, env_backend="envpool"))) == 0


# The script as a file -------------------------------------------------------------------------------------------------
def test_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        ppo_multidiscrete.main(["--help"])
    assert not stop.value.code
    output = capsys.readouterr()
    assert output.err == ""
    for field in fields(ppo_multidiscrete.Args):
        assert re.search(rf"--{field.name.replace('_', '-')}\b", output.out), field.name


EDITS = {
    "another width": [("nn.Linear(64, 64)", "nn.Linear(64, 96)"), ("nn.Linear(64, action", "nn.Linear(96, action"),
                      ("nn.Linear(64, 1)", "nn.Linear(96, 1)")],  # fmt: skip
    "ReLU": [("nn.Tanh()", "nn.ReLU()")],
    "a fourth term": [
        ("torch.stack([policy_loss, value_loss, entropy])", "torch.stack([policy_loss, value_loss, entropy, loss])"),
        ('"losses/value_loss", "losses/entropy")', '"losses/value_loss", "losses/entropy", "losses/loss")'),
    ],
    "masks as features": [
        ("return self.observation_space.encode(obs), info",
         "return np.append(self.observation_space.encode(obs), self.valid), info"),
        ("return self.observation_space.encode(obs), reward",
         "return np.append(self.observation_space.encode(obs), self.valid), reward"),
        ("super().__init__(-np.inf, np.inf, (size,))", "super().__init__(-np.inf, np.inf, (size + 12,))"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_edited_copies_train(edit, capsys):
    """What a user changes first works without other changes."""
    source = (ROOT / "ppo_multidiscrete.py").read_text()
    for old, new in EDITS[edit]:
        assert old in source, old
        source = source.replace(old, new)
    module = types.ModuleType("edited")
    module.__file__ = str(Path("edited.py").resolve())
    sys.modules["edited"] = module  # where dataclasses and annotations look names up
    exec(compile(source, module.__file__, "exec"), vars(module))
    sizes = {"num_envs": 2, "num_steps": 32, "num_minibatches": 2, "total_timesteps": 4 * BATCH}
    path = Path(module.train(module.Args(**VALVES, **sizes))["run_dir"])
    rows = [row for row in metrics(path) if "losses/policy_loss" in row]
    assert len(rows) == 4 and ("losses/loss" in rows[0]) == (edit == "a fourth term")
    assert capsys.readouterr().err.count("it acts in PyTorch") == (edit == "ReLU")
    assert masked.Valves.invalid == 0
    del sys.modules["edited"]
