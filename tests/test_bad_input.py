"""What cannot work is refused in one line, and a run that breaks down keeps its last good checkpoint."""

import json
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Tuple

import ppo

SMALL = ["--num-envs", "2", "--num-steps", "16", "--num-minibatches", "2", "--update-epochs", "1"]


class OddEnv(gym.Env):
    """An environment that is odd in the given ways; its episodes have ten steps."""

    def __init__(self, observations=None, actions=None, broken=False, bad_step=None, bad_value="nan", bad_obs=False):
        if broken:
            raise RuntimeError("the\nsimulator is broken")
        self.observation_space = observations or Box(-1, 1, (3,), np.float32)
        self.action_space = actions or Discrete(2)
        self.bad_step, self.bad_value, self.bad_obs, self.steps = bad_step, float(bad_value), bad_obs, 0

    def reset(self, *, seed=None, options=None):
        """Starts the next episode."""
        super().reset(seed=seed)
        self.length = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        """Gives a reward of 1, or what is not a number at the step bad_step."""
        self.steps += 1
        self.length += 1
        obs, reward = np.full(3, self.length / 10, np.float32), 1.0
        if self.steps == self.bad_step:
            obs, reward = (obs * self.bad_value, 1.0) if self.bad_obs else (obs, self.bad_value)
        return obs, reward, self.length == 10, False, {}


SPACE = Box(-1, 1, (3,), np.float32)
ODD_ENVS = {
    "test/Odd-v0": {},
    "test/DictObs-v0": {"observations": Dict(position=SPACE)},
    "test/TupleObs-v0": {"observations": Tuple([SPACE, SPACE])},
    "test/MultiDiscreteActions-v0": {"actions": MultiDiscrete([2, 3])},
    "test/Broken-v0": {"broken": True},
}
for env_id, kwargs in ODD_ENVS.items():
    gym.register(env_id, OddEnv, kwargs=kwargs, disable_env_checker=True)


def listing(folder: Path) -> dict[str, bytes | None]:
    """All files below a folder with their contents, and the folders with None."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def refusal(argv: list[str], capsys) -> str:
    """Runs the script with arguments that it must refuse; returns what it says."""
    before = listing(Path.cwd())
    capsys.readouterr()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        code = ppo.main(argv)
    output = capsys.readouterr()
    assert code == 2
    lines = output.err.splitlines()
    assert len(lines) == 1, output.err
    # Outside of pytest these would be more lines; Python does not show deprecations of other people's modules.
    assert [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)] == []
    assert lines[0].startswith("ppo.py: error: ")
    assert output.out == ""
    assert listing(Path.cwd()) == before
    return lines[0].removeprefix("ppo.py: error: ")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    """Every test works in a folder of its own."""
    monkeypatch.chdir(tmp_path)


BAD_FLAGS = {
    "close environment id": ("--env-id CartPol-v1", "CartPole"),
    "unknown environment id": ("--env-id Nothing-v3", "Nothing"),
    "unknown environment version": ("--env-id CartPole-v99", "v99"),
    "malformed environment id": ("--env-id Cart/Pole/v1", "Cart/Pole/v1"),
    "empty environment id": ("--env-id=", "cannot make"),
    "missing environment module": ("--env-id no_such_module:Env-v0", "no_such_module"),
    "module without the environment": ("--env-id json:Env-v0", "Env"),
    "Box actions": ("--env-id Pendulum-v1", "Discrete actions, not Box"),
    "MultiDiscrete actions": ("--env-id test/MultiDiscreteActions-v0", "Discrete actions, not MultiDiscrete"),
    "Dict observations": ("--env-id test/DictObs-v0", "Box or Discrete observations, not Dict"),
    "Tuple observations": ("--env-id test/TupleObs-v0", "Box or Discrete observations, not Tuple"),
    "constructor that raises": ("--env-id test/Broken-v0", "the simulator is broken"),
    "close flag": ("--learning-rat 1", "--learning-rate"),
    "unknown flag": ("--zzz 1", "--zzz"),
    "stray word": ("train", "train"),
    "text for an int": ("--seed one", "--seed"),
    "float for an int": ("--num-envs 2.5", "--num-envs"),
    "text for a float": ("--gamma high", "--gamma"),
    "value for a switch": ("--anneal-lr maybe", "maybe"),
    "missing value": ("--seed", "--seed"),
    "missing value before a flag": ("--seed --gamma 1", "--seed"),
    "unequal minibatches": ("--num-envs 3 --num-steps 5 --num-minibatches 4", "15 samples cannot be cut into 4"),
    "no whole rollout": ("--total-timesteps 511", "511 is below one rollout of 512 steps"),
    "no steps": ("--total-timesteps 0", "--total-timesteps"),
    "negative steps": ("--total-timesteps=-5", "--total-timesteps"),
    "negative seed": ("--seed=-1", "--seed"),
    "seed out of range": ("--seed 99999999999999999999", "--seed"),
    "gamma above 1": ("--gamma 1.01", "--gamma"),
    "gamma below 0": ("--gamma=-0.1", "--gamma"),
    "lambda above 1": ("--gae-lambda 1.01", "--gae-lambda"),
    "lambda below 0": ("--gae-lambda=-0.1", "--gae-lambda"),
    "negative learning rate": ("--learning-rate=-1e-4", "--learning-rate"),
    "negative norm": ("--max-grad-norm=-1", "--max-grad-norm"),
    "environment arguments that are no JSON": ("--env-kwargs {size:3}", "--env-kwargs {size:3}"),
    "environment arguments as a list": ("--env-kwargs [3]", "--env-kwargs [3]"),
    "environment arguments as a number": ("--env-kwargs 3", "--env-kwargs 3"),
    "unknown environment argument": ('--env-kwargs {"wind":3}', "wind"),
    "resume of nothing": ("--resume nowhere", "nowhere is not a run directory"),
    "evaluation of nothing": ("--evaluate nowhere", "nowhere is not a run directory"),
}
for count in ("num-envs", "num-steps", "num-minibatches", "update-epochs", "checkpoint-interval", "eval-episodes"):
    BAD_FLAGS |= {f"{value} {count}": (f"--{count}={value}", f"--{count} must be from 1") for value in (0, -3)}
for name in ("learning-rate", "clip-coef", "ent-coef", "vf-coef", "target-kl", "adam-eps", "gamma", "gae-lambda"):
    BAD_FLAGS |= {
        f"{value} {name}": (f"--{name}={value}", f"--{name} must be from 0") for value in ("nan", "inf", "-inf")
    }
BAD_FLAGS["nan max-grad-norm"] = ("--max-grad-norm nan", "--max-grad-norm must be from 0")


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags(case, capsys):
    flags, fragment = BAD_FLAGS[case]
    assert fragment in refusal(flags.split(" "), capsys)


def test_the_script_itself():
    """Also with all that Python prints of itself it is one line, and the exit code is the shell's."""
    words = [sys.executable, ppo.__file__, "--env-id", "CartPol-v1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"ppo\.py: error: .*CartPole.*\n", done.stderr)


def test_runs_is_a_file(capsys):
    Path("runs").write_text("not a directory")
    assert "runs" in refusal(["--total-timesteps", "512"], capsys)


def test_track_without_a_key(capsys, monkeypatch, tmp_path_factory):
    """Weights & Biases refuses at once, without the network, if there is no key and nobody to ask for one."""
    import wandb

    wandb.teardown()  # what other tests have set must not last
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    assert "--track: No API key configured" in refusal(["--total-timesteps", "512", "--track"], capsys)


def test_track_refused_in_many_lines(capsys, monkeypatch):
    """Whatever Weights & Biases complains about becomes one line; a run that was to be resumed stays as it was."""
    import wandb

    def refuse(**settings):
        raise wandb.errors.UsageError(f"entity {settings['entity']}\n\n  not found")

    monkeypatch.setattr(wandb, "init", refuse)
    flags = ["--track", "--wandb-entity", "nobody"]
    path = small_run()
    assert refusal([*SMALL, *flags], capsys) == "--track: entity nobody not found"
    assert refusal(["--resume", str(path), *flags], capsys) == "--track: entity nobody not found"


def small_run() -> Path:
    """A finished run of two updates."""
    return Path(ppo.train(ppo.Args(env_id="test/Odd-v0", num_envs=2, num_steps=16, total_timesteps=64))["run_dir"])


class Bomb:
    """A pickled object that would create a file where it is loaded."""

    def __reduce__(self):
        return open, ("exploded", "w")


def no_config(path):
    (path / "config.json").unlink()


def malformed_config(path):
    (path / "config.json").write_text('{"seed": 1')


def config_list(path):
    (path / "config.json").write_text("[1, 2]")


def config_of_another_program(path):
    (path / "config.json").write_text('{"learning_speed": 1}')


def config_in_another_encoding(path):
    (path / "config.json").write_bytes(b"\xff\xfe\x00")


def config_with_wrong_type(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_envs": "two"}))


def config_with_bad_value(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"gamma": 2.0}))


def no_checkpoint(path):
    (path / "checkpoint.pt").unlink()


def empty_checkpoint(path):
    (path / "checkpoint.pt").write_bytes(b"")


def truncated_checkpoint(path):
    contents = (path / "checkpoint.pt").read_bytes()
    (path / "checkpoint.pt").write_bytes(contents[: len(contents) // 2])


def text_checkpoint(path):
    (path / "checkpoint.pt").write_text("no checkpoint\n" * 20)


def other_checkpoint(path):
    torch.save([1, 2, 3], path / "checkpoint.pt")


def pickle_bomb(path):
    (path / "checkpoint.pt").write_bytes(pickle.dumps({"agent": Bomb()}, protocol=2))


def zipped_pickle_bomb(path):
    torch.save({"agent": Bomb()}, path / "checkpoint.pt")


def another_shape(path):
    state = torch.load(path / "checkpoint.pt", weights_only=True)
    state["agent"] = {name: torch.zeros(5, *tensor.shape) for name, tensor in state["agent"].items()}
    torch.save(state, path / "checkpoint.pt")


def another_network(path):
    state = torch.load(path / "checkpoint.pt", weights_only=True)
    torch.save(state | {"agent": torch.nn.Linear(3, 2).state_dict()}, path / "checkpoint.pt")


DAMAGES = {
    no_config: "config.json",
    malformed_config: "is not a run directory",
    config_list: "is not a run directory",
    config_of_another_program: "learning_speed",
    config_in_another_encoding: "is not a run directory",
    config_with_wrong_type: "is not a run directory",
    config_with_bad_value: "--gamma",
    no_checkpoint: "checkpoint.pt",
    empty_checkpoint: "checkpoint.pt",
    truncated_checkpoint: "checkpoint.pt",
    text_checkpoint: "checkpoint.pt",
    other_checkpoint: "checkpoint.pt",
    pickle_bomb: "checkpoint.pt",
    zipped_pickle_bomb: "checkpoint.pt",
    another_shape: "checkpoint.pt",
    another_network: "checkpoint.pt",
}


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_run_directories(damage, flag, capsys):
    path = small_run()
    damage(path)
    assert DAMAGES[damage] in refusal([flag, str(path)], capsys)
    assert not Path("exploded").exists()


def test_the_bomb_works():
    """Loaded without care the pickled object does create the file that test_damaged_run_directories looks for."""
    pickle.loads(pickle.dumps(Bomb())).close()
    assert Path("exploded").exists()


def test_moments_of_another_shape(capsys):
    path = small_run()
    state = torch.load(path / "checkpoint.pt", weights_only=True)
    torch.save(state | {"moment1": torch.zeros(7)}, path / "checkpoint.pt")
    assert "checkpoint.pt" in refusal(["--resume", str(path)], capsys)


BAD_NUMBERS = {
    "NaN reward": {"bad_value": "nan"},
    "infinite reward": {"bad_value": "inf"},
    "NaN observation": {"bad_value": "nan", "bad_obs": True},
}


@pytest.mark.parametrize("case", BAD_NUMBERS)
def test_numbers_that_break_the_training(case, capsys, recwarn):
    """The environments go wrong in their 85th step, in update 6: what was saved after update 4 stays."""
    env_kwargs = json.dumps(BAD_NUMBERS[case] | {"bad_step": 85})
    argv = ["--env-id", "test/Odd-v0", "--env-kwargs", env_kwargs, *SMALL, "--total-timesteps", "320"]
    assert ppo.main([*argv, "--checkpoint-interval", "2"]) == 1
    lines = [line.strip() for line in capsys.readouterr().err.splitlines() if line.strip()]
    errors = [line for line in lines if not line.startswith("test/Odd-v0: ")]  # the others show progress
    (path,) = Path("runs").iterdir()
    assert errors == [f"ppo.py: error: update 6 is not finite; {path} keeps the last checkpoint"]
    state = torch.load(path / "checkpoint.pt", weights_only=True)
    assert state["update"] == 4
    tensors = [*state["agent"].values(), state["moment1"], state["moment2"]]
    assert len(tensors) == 14
    assert all(tensor.isfinite().all() for tensor in tensors)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert max(row["global_step"] for row in rows) == 5 * 32
    # The checkpoint is not only readable but of use: other environments can go on from there.
    assert ppo.main(["--resume", str(path), "--env-kwargs", "{}"]) == 0


def test_resume_cannot_change_the_size_of_a_rollout(capsys):
    path = small_run()
    assert "cannot change with --resume" in refusal(["--resume", str(path), "--num-envs", "8"], capsys)
