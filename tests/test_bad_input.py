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
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Sequence, Tuple
from tqdm import tqdm

import ppo
import ppo_atari
import ppo_continuous
import ppo_lstm
import ppo_multidiscrete

SCRIPTS = [ppo, ppo_continuous]
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
    "test/SequenceObs-v0": {"observations": Sequence(SPACE)},
    "test/MultiDiscreteActions-v0": {"actions": MultiDiscrete([2, 3])},
    "test/Broken-v0": {"broken": True},
    "test/OddBox-v0": {"actions": SPACE},
    "test/DictObsBox-v0": {"actions": SPACE, "observations": Dict(position=SPACE)},
    "test/TupleObsBox-v0": {"actions": SPACE, "observations": Tuple([SPACE, SPACE])},
    "test/IntegerBox-v0": {"actions": Box(0, 5, (2,), np.int64)},
    "test/UnboundedBox-v0": {"actions": Box(-np.inf, np.inf, (2,), np.float32)},
    "test/HalfBoundedBox-v0": {"actions": Box(np.float32([-1, -1]), np.float32([1, np.inf]))},
    "test/TwoActions-v0": {"actions": Box(-1, 1, (2,), np.float32)},
    "test/WideBox-v0": {"actions": SPACE, "observations": Box(-1, 1, (4,), np.float32)},
}
for env_id, kwargs in ODD_ENVS.items():
    gym.register(env_id, OddEnv, kwargs=kwargs, disable_env_checker=True)
FITTING = {ppo: "test/Odd-v0", ppo_continuous: "test/OddBox-v0"}  # what each script can learn in


def listing(folder: Path) -> dict[str, bytes | None]:
    """All files below a folder with their contents, and the folders with None."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def refusal(argv: list[str], capfd, script=ppo) -> str:
    """Runs a script with arguments that it must refuse; returns what it says."""
    before = listing(Path.cwd())
    capfd.readouterr()
    getattr(script, "say", ppo.say).cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        code = script.main(argv)
    output = capfd.readouterr()
    assert code == 2
    lines = [line for line in output.err.splitlines() if not line.startswith(("images ", "entries [1, 3] "))]
    assert len(lines) == 1, output.err
    # Outside of pytest these would be more lines; Python does not show deprecations of other people's modules.
    assert [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)] == []
    assert lines[0].startswith(f"{script.SCRIPT}.py: error: ")
    assert output.out == ""
    assert listing(Path.cwd()) == before
    return lines[0].removeprefix(f"{script.SCRIPT}.py: error: ")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    """Every test works in a folder of its own, and leaves no progress bar to others, even when the script crashes."""
    monkeypatch.chdir(tmp_path)
    for script in SCRIPTS:
        script.say.cache_clear()
    yield
    for bar in list(getattr(tqdm, "_instances", [])):
        bar.close()


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
    "observations of any length": ("--env-id test/SequenceObs-v0", "can be flattened, not Sequence"),
    "unequal minibatches": ("--num-envs 3 --num-steps 5 --num-minibatches 4", "15 samples cannot be cut into 4"),
    "constructor that raises for its arguments": ('--env-id test/Odd-v0 --env-kwargs {"broken":true}', "simulator is"),
    "no whole rollout": ("--total-timesteps 511", "511 is below one rollout, 512 steps"),
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


# What tyro refuses itself: it draws a box, and exits.
BAD_WORDS = {
    "close flag": ("--learning-rat 1", "--learning-rate"),
    "unknown flag": ("--zzz 1", "--zzz"),
    "stray word": ("train", "train"),
    "text for an int": ("--seed one", "--seed"),
    "float for an int": ("--num-envs 2.5", "--num-envs"),
    "text for a float": ("--gamma high", "--gamma"),
    "value for a switch": ("--anneal-lr maybe", "maybe"),
    "missing value": ("--seed", "--seed"),
    "missing value before a flag": ("--seed --gamma 1", "--seed"),
    "unknown backend": ("--env-backend brax", "--env-backend"),
    "empty backend": ("--env-backend=", "--env-backend"),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("case", BAD_WORDS)
def test_bad_words(case, script, capfd):
    """Exit code 2, the word or flag is named, and nothing is created."""
    words, fragment = BAD_WORDS[case]
    with pytest.raises(SystemExit) as stop:
        script.main(words.split(" "))
    assert stop.value.code == 2
    output = capfd.readouterr()
    assert fragment in output.err and output.out == ""
    assert listing(Path.cwd()) == {}


@pytest.mark.parametrize("value", ["True", "false"])
def test_switches_take_no_value(value, capfd):
    assert refusal(["--anneal-lr", value], capfd) == "--anneal-lr takes no value: it is --anneal-lr or --no-anneal-lr"


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_empty_run_directory(flag, capfd):
    """What an unset variable in a shell becomes must not start a new training."""
    assert "needs a run directory" in refusal([flag, ""], capfd)
    assert "needs a run directory" in refusal([f"{flag}="], capfd)


def test_resume_and_evaluate_exclude_each_other(capfd):
    assert "not both" in refusal(["--resume", "a", "--evaluate", "b"], capfd)


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags(case, capfd):
    flags, fragment = BAD_FLAGS[case]
    assert fragment in refusal(flags.split(" "), capfd)


# What both scripts have in the same lines (test_same_lines.py) needs no second look; this is a sample of it.
SHARED_FLAGS = [
    "close environment id", "unknown environment version", "missing environment module",
    "environment arguments as a list", "unknown environment argument", "0 num-envs",
    "unequal minibatches", "nan gamma", "resume of nothing", "evaluation of nothing",
]  # fmt: skip
POOL = "--env-backend envpool --env-id"
BAD_CONTINUOUS_FLAGS = {name: BAD_FLAGS[name] for name in SHARED_FLAGS} | {
    "no whole rollout": ("--total-timesteps 2047", "2047 is below one rollout, 2048 steps"),
    "Discrete actions": ("--env-id CartPole-v1", "Box actions of floating-point numbers, not Discrete(2)"),
    "MultiDiscrete actions": ("--env-id test/MultiDiscreteActions-v0", "floating-point numbers, not MultiDiscrete"),
    "integer Box actions": ("--env-id test/IntegerBox-v0", "floating-point numbers, not Box(0, 5, (2,), int64)"),
    "squashed actions without bounds": ("--squash-action --env-id test/UnboundedBox-v0", "needs actions with bounds"),
    "squashed actions with a bound": ("--squash-action --env-id test/HalfBoundedBox-v0", "needs actions with bounds"),
    "close id of EnvPool": (f"{POOL} HalfCheeta-v4", "did you mean HalfCheetah-v4"),
    "unknown id of EnvPool": (f"{POOL} Zork-v0", "EnvPool has no Zork-v0"),
    "environment that EnvPool does not have": (f"{POOL} test/OddBox-v0", "EnvPool has no test/OddBox-v0"),
    "unknown argument of EnvPool": (f'{POOL} Pendulum-v1 --env-kwargs {{"wind":3}}', "wind"),
    "argument of the wrong type for EnvPool": (f'{POOL} Pendulum-v1 --env-kwargs {{"max_episode_steps":"a"}}', '"a"'),
    "arguments of EnvPool as a list": (f"{POOL} Pendulum-v1 --env-kwargs [3]", "--env-kwargs [3]"),
    "arguments of EnvPool that are no JSON": (f"{POOL} Pendulum-v1 --env-kwargs {{a", "--env-kwargs {a"),
    "Discrete actions of EnvPool": (f"{POOL} Catch-v0", "Box actions of floating-point numbers, not Discrete(3)"),
    "Dict observations of EnvPool": (f"{POOL} CartpoleSwingup-v1", "need --env-backend gymnasium"),
    "videos of EnvPool": (f"{POOL} Pendulum-v1 --capture-video", "EnvPool cannot record videos"),
}


@pytest.mark.parametrize("case", BAD_CONTINUOUS_FLAGS)
def test_bad_flags_of_ppo_continuous(case, capfd):
    if "EnvPool" in case:
        pytest.importorskip("envpool")  # exists for Linux only
    flags, fragment = BAD_CONTINUOUS_FLAGS[case]
    assert fragment in refusal(flags.split(" "), capfd, ppo_continuous)


@pytest.mark.parametrize(
    ("script", "flags", "fragment"),
    [(ppo, "--env-id CartPol-v1", "CartPole"), (ppo_continuous, f"{POOL} HalfCheeta-v4", "HalfCheetah-v4")],
)
def test_the_script_itself(script, flags, fragment):
    """Also with all that Python prints of itself it is one line, and the exit code is the shell's."""
    if "envpool" in flags:
        pytest.importorskip("envpool")  # exists for Linux only
    words = [sys.executable, script.__file__, *flags.split(" ")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"{script.SCRIPT}\.py: error: .*{fragment}.*\n", done.stderr)


@pytest.mark.filterwarnings("ignore:.*Box (low|high)'s precision lowered")  # gymnasium's, about EnvPool's spaces
def test_without_envpool(capfd, monkeypatch):
    """Where EnvPool is not installed the run goes on with gymnasium and says so, in one line."""
    monkeypatch.setitem(sys.modules, "envpool", None)  # makes its import fail
    flags = ["--env-backend", "envpool", "--env-id", "Pendulum-v1", "--total-timesteps", "64"]
    assert ppo_continuous.main([*flags, *SMALL]) == 0
    output = capfd.readouterr()
    lines = [line for line in map(str.strip, output.err.splitlines()) if line and not line.startswith("Pendulum-v1: ")]
    assert lines == ["EnvPool is not installed (it exists for Linux only): using gymnasium"]
    (path,) = Path("runs").iterdir()
    assert output.out.startswith(f"{path.resolve()}: 64 steps")
    assert ppo_continuous.main(["--evaluate", str(path), "--eval-episodes", "1"]) == 0
    output = capfd.readouterr()
    assert output.out.startswith("Pendulum-v1: return -")


def test_runs_is_a_file(capfd):
    Path("runs").write_text("not a directory")
    assert "runs" in refusal(["--total-timesteps", "512"], capfd)


def test_track_without_a_key(capfd, monkeypatch, tmp_path_factory):
    """Weights & Biases refuses at once, without the network, if there is no key and nobody to ask for one."""
    import wandb

    wandb.teardown()  # what other tests have set must not last
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    assert "--track: UsageError: No API key configured" in refusal(["--total-timesteps", "512", "--track"], capfd)


@pytest.mark.parametrize(
    ("script", "env_id"),
    [(ppo, "CartPole-v1"), (ppo_atari, "Pong"), (ppo_continuous, "Pendulum-v1"), (ppo_lstm, "CartPole-v1"),
     (ppo_multidiscrete, "CartPole-v1")],
)  # fmt: skip
def test_track_without_wandb(script, env_id, capfd, monkeypatch):
    """A copied script may run where wandb is not installed."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    sizes = ["--num-envs", "4", "--num-steps", "4", "--num-minibatches", "2", "--total-timesteps", "16"]
    said = refusal(["--env-id", env_id, *sizes, "--track"], capfd, script)
    assert "--track: " in said and "import of wandb halted" in said


def test_track_refused_in_many_lines(capfd, monkeypatch):
    """Whatever Weights & Biases complains about becomes one line; a run that was to be resumed stays as it was."""
    import wandb

    def refuse(**settings):
        raise wandb.errors.UsageError(f"entity {settings['entity']}\n\n  not found")

    monkeypatch.setattr(wandb, "init", refuse)
    flags = ["--track", "--wandb-entity", "nobody"]
    path = small_run()
    assert refusal([*SMALL, *flags], capfd) == "--track: UsageError: entity nobody not found"
    assert refusal(["--resume", str(path), *flags], capfd) == "--track: UsageError: entity nobody not found"


def small_run(script=ppo) -> Path:
    """A finished run of two updates."""
    sizes = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "update_epochs": 1, "total_timesteps": 64}
    return Path(script.train(script.Args(env_id=FITTING[script], **sizes))["run_dir"])


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
    weights = {name: tensor for name, tensor in state["agent"].items() if name != "_extra_state"}
    state["agent"] |= {name: torch.zeros(5, *tensor.shape) for name, tensor in weights.items()}
    torch.save(state, path / "checkpoint.pt")


def another_network(path):
    state = torch.load(path / "checkpoint.pt", weights_only=True)
    torch.save(state | {"agent": torch.nn.Linear(3, 2).state_dict()}, path / "checkpoint.pt")


def changed_statistics(change):
    """The damage that change does to the saved running statistics {"obs": ..., "returns": ...} of an agent."""

    def damage(path):
        state = torch.load(path / "checkpoint.pt", weights_only=True)
        change(state["agent"]["_extra_state"])
        torch.save(state, path / "checkpoint.pt")

    return damage


def no_statistics(path):
    state = torch.load(path / "checkpoint.pt", weights_only=True)
    del state["agent"]["_extra_state"]
    torch.save(state, path / "checkpoint.pt")


DAMAGES = {
    no_config: "config.json",
    malformed_config: "is not a run directory",
    config_list: "is not a run directory",
    config_of_another_program: "is not a run directory",
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
def test_damaged_run_directories(damage, flag, capfd):
    path = small_run()
    damage(path)
    assert DAMAGES[damage] in refusal([flag, str(path)], capfd)
    assert not Path("exploded").exists()


CONTINUOUS_DAMAGES = {
    "setting of the wrong type": config_with_wrong_type,
    "half a checkpoint": truncated_checkpoint,
    "weights of another shape": another_shape,
    "pickle bomb": zipped_pickle_bomb,
    "no statistics": no_statistics,
    "pickle bomb as statistics": changed_statistics(lambda stats: stats.update(obs=Bomb())),
    "no statistics of the observations": changed_statistics(lambda stats: stats.pop("obs")),
    "no statistics of the returns": changed_statistics(lambda stats: stats.pop("returns")),
    "no mean": changed_statistics(lambda stats: stats["obs"].pop("mean")),
    "no variance": changed_statistics(lambda stats: stats["returns"].pop("var")),
    "no count": changed_statistics(lambda stats: stats["obs"].pop("count")),
    "mean of another size": changed_statistics(lambda stats: stats["obs"].update(mean=torch.zeros(5))),
    "variance of one number": changed_statistics(lambda stats: stats["obs"].update(var=torch.ones(()))),
    "count for each component": changed_statistics(lambda stats: stats["obs"].update(count=torch.ones(3))),
    "returns with components": changed_statistics(lambda stats: stats["returns"].update(var=torch.ones(2))),
    "text as a mean": changed_statistics(lambda stats: stats["obs"].update(mean="0")),
}


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@pytest.mark.parametrize("damage", CONTINUOUS_DAMAGES)
def test_damaged_run_directories_of_ppo_continuous(damage, flag, capfd):
    path = small_run(ppo_continuous)
    CONTINUOUS_DAMAGES[damage](path)
    problem = "is not a run directory" if damage == "setting of the wrong type" else "cannot use "
    assert problem in refusal([flag, str(path)], capfd, ppo_continuous)
    assert not Path("exploded").exists()


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@pytest.mark.parametrize("env_id", ["test/TwoActions-v0", "test/WideBox-v0"])
def test_checkpoint_of_another_environment(env_id, flag, capfd):
    """Actions or observations of another size: the network does not fit."""
    path = small_run(ppo_continuous)
    assert "checkpoint.pt" in refusal([flag, str(path), "--env-id", env_id], capfd, ppo_continuous)


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_run_directory_of_the_other_script(script, flag, capfd):
    (other,) = set(SCRIPTS) - {script}
    path = small_run(other)
    assert refusal([flag, str(path)], capfd, script)


def test_the_bomb_works():
    """Loaded without care the pickled object does create the file that test_damaged_run_directories looks for."""
    pickle.loads(pickle.dumps(Bomb())).close()
    assert Path("exploded").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_moments_of_another_shape(script, capfd):
    path = small_run(script)
    state = torch.load(path / "checkpoint.pt", weights_only=True)
    torch.save(state | {"moments": torch.zeros(2, 7)}, path / "checkpoint.pt")
    assert "checkpoint.pt" in refusal(["--resume", str(path)], capfd, script)


BAD_NUMBERS = {
    "NaN reward": {"bad_value": "nan"},
    "infinite reward": {"bad_value": "inf"},
    "NaN obs": {"bad_value": "nan", "bad_obs": True},
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("case", BAD_NUMBERS)
def test_numbers_that_break_the_training(case, script, capfd, recwarn):
    """The environments go wrong in their 85th step, in update 6: what was saved after update 4 stays."""
    env_id, env_kwargs = FITTING[script], json.dumps(BAD_NUMBERS[case] | {"bad_step": 85})
    argv = ["--env-id", env_id, "--env-kwargs", env_kwargs, *SMALL, "--total-timesteps", "320"]
    assert script.main([*argv, "--checkpoint-interval", "2"]) == 1
    lines = [line.strip() for line in capfd.readouterr().err.splitlines() if line.strip()]
    errors = [line for line in lines if not line.startswith(f"{env_id}: ")]  # the others show progress
    (path,) = Path("runs").iterdir()
    what = "an observation [step, env, entry]" if "obs" in case else "a reward [step, env]"
    where = "[5, 0, 0]" if "obs" in case else "[4, 0]"  # the observation after that step
    assert errors == [f"{script.SCRIPT}.py: error: in update 6, {what} is not finite at {where}; the last checkpoint "
                      f"in {path.resolve()} is good"]  # fmt: skip
    state = torch.load(path / "checkpoint.pt", weights_only=True)
    assert state["counts"][0] == 4
    statistics = state["agent"].pop("_extra_state", {})
    tensors = [*state["agent"].values(), *state["moments"]]
    tensors += [tensor for stats in statistics.values() for tensor in stats.values()]
    assert len(tensors) == 14 + (1 + 6 if statistics else 0)  # log_std, and mean, variance and count of two statistics
    assert bool(statistics) == (script is ppo_continuous)
    assert all(tensor.isfinite().all() for tensor in tensors)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert max(row["global_step"] for row in rows) == 5 * 32
    # The checkpoint is not only readable but of use: other environments can go on from there.
    assert script.main(["--resume", str(path), "--env-kwargs", "{}"]) == 0


def test_resume_cannot_change_the_size_of_a_rollout(capfd):
    path = small_run()
    assert "cannot change with --resume" in refusal(["--resume", str(path), "--num-envs", "8"], capfd)
