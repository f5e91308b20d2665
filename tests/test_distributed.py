"""[aux-2] Several processes (ranks) share the work of one: ppo_atari.py under torchrun, on the CPU.

Most tests read what two ranks recorded in one launch: as a program this file plays CASES, functions that every rank
calls and whose answers it saves. Where the answer of one process is needed for comparison, the test calls the same
function itself. Signals, kills and bad input are tested with launches of their own, which are closer to a user's.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import defaultdict
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import VectorEnv

import ppo_atari
from ppo_atari import RANK, WORLD_SIZE

pytestmark = pytest.mark.slow  # these start whole runs

RANKS = 2
BACKENDS = ["gymnasium", "envpool"] if importlib.util.find_spec("envpool") else ["gymnasium"]  # EnvPool: Linux only
SCRIPT = Path(ppo_atari.__file__).resolve()
LOSSES = ["policy_loss", "value_loss", "entropy", "approx_kl", "old_approx_kl", "official_approx_kl", "clipfrac"]
LOSSES += ["explained_variance"]


# What one process and each of several ranks do alike
# ---------------------------------------------------


def small(updates: int, **settings) -> ppo_atari.Args:
    """Settings of a short run, whose games take eight steps, the length of two rollouts."""
    sizes = {"num_envs": 4, "num_steps": 4, "num_minibatches": 2, "update_epochs": 2, "max_game_frames": 32}
    settings = sizes | {"env_id": "Pong", "env_backend": BACKENDS[-1], "cuda": False} | settings
    args = ppo_atari.Args(**settings)
    args.total_timesteps = settings.get("total_timesteps", updates * args.batch_size)
    return args


def flags(args: ppo_atari.Args) -> list[str]:
    """The command line that gives these settings."""
    words = []
    for name, value in asdict(args).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words.append(f"--{flag}={value}")
    return words


def digest(*tensors: torch.Tensor) -> str:
    """Equal for tensors that are equal to the last bit."""
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def images(random: np.random.Generator, *shape: int) -> np.ndarray:
    """Random coarse images [*shape, 84, 84] of bytes, as different from one another as frames of games are."""
    return random.integers(0, 256, (*shape, 12, 12), np.uint8).repeat(7, -2).repeat(7, -1)


class ScriptedEnvs(VectorEnv):
    """Environments whose frames, rewards and ends follow from their seed, the time and the action alone."""

    single_observation_space, single_action_space = Box(0, 255, (84, 84), np.uint8), Discrete(4)

    def __init__(self, args: ppo_atari.Args, video_folder=None, video_trigger=None):
        self.num_envs = args.num_envs

    def reset(self, *, seed=None, options=None):
        """Environment i gets seed + i."""
        self.ids, self.time = [seed + i for i in range(self.num_envs)], 0
        return np.stack([images(np.random.default_rng(env)) for env in self.ids]), {}

    def step(self, actions):
        """Ends a third of the episodes in each step; an episode's return and length tell whose it was."""
        self.time += 1
        randoms = [
            np.random.default_rng([env, self.time, action]) for env, action in zip(self.ids, actions, strict=True)
        ]
        frames, final = (np.stack([images(random) for random in randoms]) for _ in range(2))
        rewards = np.array([random.normal() for random in randoms], np.float32)
        terminations, truncations = (np.array([random.random() < 1 / 6 for random in randoms]) for _ in range(2))
        ended = terminations | truncations
        episode = {"r": np.array(self.ids, float), "l": np.full(self.num_envs, self.time)}
        infos = {"final_obs": final, "final_info": {"episode": episode, "_episode": ended}} if ended.any() else {}
        return frames, rewards, terminations, truncations, infos


class EndlessRewardEnvs(ScriptedEnvs):
    """The last of four environments, on the last rank, gives an infinite reward in the second update."""

    def step(self, actions):
        """In the sixth step, that is."""
        obs, rewards, *rest = super().step(actions)
        rewards[[env == small(1).seed + 3 and self.time == 6 for env in self.ids]] = np.inf
        return obs, rewards, *rest


def watch(patch: pytest.MonkeyPatch) -> dict[str, list]:
    """Records what a training does, from now on."""
    seen = defaultdict(list)
    make_envs, collect_rollout = ppo_atari.make_envs, ppo_atari.collect_rollout
    init, end_update = ppo_atari.Run.__init__, ppo_atari.Run.end_update

    def watched_make_envs(args, *rest):
        envs = make_envs(args, *rest)
        original_reset = envs.reset

        def reset(*, seed=None, options=None):
            frames, infos = original_reset(seed=seed)
            seen["resets"].append((args.num_envs, args.seed, seed, np.array(frames)))
            return frames, infos

        envs.reset = reset
        return envs

    def watched_collect_rollout(*inputs):
        seen["random states"].append(digest(torch.get_rng_state()))
        rollout = collect_rollout(*inputs)
        seen["actions"].append(rollout.actions.clone())
        return rollout

    def watched_init(run, args, agent, adam):
        run.start_parameters = adam.parameters.clone()
        init(run, args, agent, adam)

    def watched_end_update(run, rollout, values):
        seen["losses"].append({name: value for name, value in values.items() if name[7:] in LOSSES})
        end_update(run, rollout, values)
        seen["episodes"].append(rollout.episodes)
        seen["digests"].append(digest(run.adam.parameters, run.adam.moment1, run.adam.moment2))
        seen["gradient steps"].append(run.adam.steps)
        seen["trained"][:] = [run.adam.parameters - run.start_parameters, run.adam.moment1, run.adam.moment2]

    patch.setattr(ppo_atari, "make_envs", watched_make_envs)
    patch.setattr(ppo_atari, "collect_rollout", watched_collect_rollout)
    patch.setattr(ppo_atari.Run, "__init__", watched_init)
    patch.setattr(ppo_atari.Run, "end_update", watched_end_update)
    return seen


def on_rollout(patch: pytest.MonkeyPatch, number: int, action) -> None:
    """Calls action() when the training is about to collect its rollout of that number."""
    collect_rollout, calls = ppo_atari.collect_rollout, []

    def counting(*inputs):
        calls.append(1)
        if len(calls) == number:
            action()
        return collect_rollout(*inputs)

    patch.setattr(ppo_atari, "collect_rollout", counting)


def equal_noise(patch: pytest.MonkeyPatch) -> None:
    """Gives each environment the action noise that it gets in a run of one process."""
    draw, generator = torch.Tensor.exponential_, torch.Generator().manual_seed(5)

    def exponential_(tensor):
        steps, envs, actions = tensor.shape
        whole = draw(torch.empty(steps, envs * WORLD_SIZE, actions), generator=generator)
        return tensor.copy_(whole[:, RANK * envs : (RANK + 1) * envs])

    patch.setattr(torch.Tensor, "exponential_", exponential_)


# One minibatch for each rollout, for a rank shuffles its own samples: two ranks can have the minibatches of one process
# only if these are everything.
SCRIPTED = {
    "default": {},
    "sample's deviation": {"population_std": False},
    "normalized per batch": {"norm_adv_per_batch": True},
    "not normalized": {"norm_adv": False},
    "gradient not clipped": {"max_grad_norm": math.inf},
    "time limits": {"bootstrap_truncated": True, "anneal_clip": True},
}


def scripted(folder: Path, name: str, **settings) -> dict[str, list]:
    """Trains for three updates in ScriptedEnvs, with the noise that one process would have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_atari, "make_envs", ScriptedEnvs)
        equal_noise(patch)
        seen = watch(patch)
        # A large learning rate, so that the second and the third update would notice differences of the first.
        sizes = {"num_minibatches": 1, "learning_rate": 1e-3, "runs_dir": str(folder / f"{name}-{WORLD_SIZE}")}
        ppo_atari.train(small(3, **sizes, **SCRIPTED[name], **settings))
    if RANK > 0:  # the digests say enough
        del seen["trained"]
    return seen


HALVES = {"default": {}, "sample's deviation": {"population_std": False}, "no limit": {"max_grad_norm": math.inf}}


def halves(name: str) -> dict:
    """Improves an agent on this rank's part of three random minibatches."""
    random, count, size = np.random.default_rng(3), 3, 12
    part = slice(RANK * size // WORLD_SIZE, (RANK + 1) * size // WORLD_SIZE)
    obs = torch.from_numpy(images(random, count, size, 4))
    actions = torch.from_numpy(random.integers(0, 4, (count, size)))
    old_log_probs, advantages, returns, values = torch.from_numpy(random.normal(size=(4, count, size))).float()
    advantages[:, size // 2 :] = 5 + 3 * advantages[:, size // 2 :]  # the halves have little in common
    old_log_probs = 0.3 * old_log_probs - math.log(4)
    batch = [tensor[:, part] for tensor in (obs, actions, old_log_probs, advantages, returns, values)]

    args = small(1, **HALVES[name])
    torch.manual_seed(1)
    agent = ppo_atari.Agent(ScriptedEnvs.single_observation_space, ScriptedEnvs.single_action_space, args)
    adam = ppo_atari.Adam(agent)
    start = adam.parameters.clone()
    flat = ppo_atari.normalize(batch[3].flatten(), args)  # as one minibatch, and as norm_adv_per_batch does it
    batch[3] = ppo_atari.normalize(batch[3], args)
    terms = []
    for minibatch in zip(*batch, strict=True):
        coefficients = 0.1, *adam.coefficients(1e-3, args)
        terms.append(ppo_atari.gradient_step(agent, adam, minibatch, *coefficients, args)[0])
    trained = {"movement": adam.parameters - start, "moment1": adam.moment1, "moment2": adam.moment2}
    normalized = {"advantages": batch[3], "flat": flat.view(count, -1)}
    same = digest(*trained.values())
    return {"terms": torch.stack(terms), "trained": trained, "digest": same, "normalized": normalized}


# What only several ranks do
# --------------------------


def real(updates: int, backend: str, **settings) -> ppo_atari.Args:
    """Settings of a short run of a game in which most no-ops at its start can be seen."""
    return small(updates, seed=7, env_id="Seaquest", env_backend=backend, max_game_frames=400_000, **settings)


def case_real(folder: Path, backend: str) -> dict:
    """Two updates in real games, and a third one after resuming."""
    with pytest.MonkeyPatch.context() as patch:
        seen = watch(patch)
        args = real(2, backend, runs_dir=str(folder / f"real-{backend}"))
        ppo_atari.train(args)
        dist.init_process_group("gloo")
        dist.barrier()  # until then the checkpoint may be the one before
        dist.destroy_process_group()
        (path,) = Path(args.runs_dir).iterdir()
        ppo_atari.train(real(3, backend, resume=str(path)))
    return seen


def case_target_kl(folder: Path, divergence_of_rank_1: float) -> list[int]:
    """The gradient steps after each of two updates; rank 0 says that its policy has not moved, rank 1 that it has."""
    with pytest.MonkeyPatch.context() as patch:
        change, own = ppo_atari.policy_change, [0.0, divergence_of_rank_1][RANK]
        patch.setattr(ppo_atari, "make_envs", ScriptedEnvs)
        patch.setattr(ppo_atari, "policy_change", lambda *given: change(*given) | {"losses/approx_kl": own})
        seen = watch(patch)
        ppo_atari.train(small(2, update_epochs=3, target_kl=0.01, runs_dir=str(folder / f"kl-{divergence_of_rank_1}")))
    return seen["gradient steps"]


def case_signal(folder: Path, moment: str) -> int:
    """Only rank 1 gets a signal, while it acts in the second update or just after it; returns the last update."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_atari, "make_envs", ScriptedEnvs)
        seen = watch(patch)

        def send(number: signal.Signals) -> None:
            if RANK == 1:
                os.kill(os.getpid(), number)

        if moment == "acting":
            on_rollout(patch, 2, lambda: send(signal.SIGINT))
        else:
            end_update = ppo_atari.Run.end_update

            def then_terminate(run, *given):
                end_update(run, *given)
                if run.update == 2:
                    send(signal.SIGTERM)

            patch.setattr(ppo_atari.Run, "end_update", then_terminate)
        result = ppo_atari.train(small(50, runs_dir=str(folder / f"signal-{moment}")))
    assert len(seen["digests"]) == result["global_step"] // small(1).batch_size
    return len(seen["digests"])


def case_not_finite(folder: Path, what: str) -> tuple[str, bool]:
    """In the second update something of rank 1 is not finite; returns what train() raises, and if it names the run."""
    runs_dir = folder / f"not-finite-{what}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_atari, "make_envs", EndlessRewardEnvs if what == "reward" else ScriptedEnvs)
        if RANK == 1:  # the later rank sees the directory that the earlier one has made
            start = ppo_atari.Run.__init__

            def later(run, *given):
                with contextlib.suppress(AssertionError):
                    wait_for(lambda: list(runs_dir.glob("*/config.json")), 5)
                start(run, *given)

            patch.setattr(ppo_atari.Run, "__init__", later)
        if what == "loss" and RANK == 1:
            improve = ppo_atari.gradient_step

            def gradient_step(*given):
                terms, log_ratio = improve(*given)
                return (terms * math.nan if given[1].steps > 4 else terms), log_ratio

            patch.setattr(ppo_atari, "gradient_step", gradient_step)
        try:
            ppo_atari.train(small(4, norm_adv=False, runs_dir=str(runs_dir)))
        except FloatingPointError as error:
            (path,) = runs_dir.iterdir()
            return str(error), str(path) in str(error).split()
    raise AssertionError("nothing was raised")


BAD_INPUT = {
    "environments": ({"num_envs": 3}, "cannot be shared equally by 2 processes"),
    # Six samples make two minibatches, but the three of one rank do not.
    "minibatches": ({"num_envs": 2, "num_steps": 3}, "cannot be shared equally by 2 processes"),
    "game": ({"env_id": "Pongg"}, "did you mean Pong"),
    "resume": ({"resume": "nowhere"}, "nowhere is not a run directory"),
}


def case_bad_input(folder: Path, name: str) -> tuple[int, str]:
    """The exit code and what stands on stderr."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = ppo_atari.main(flags(small(2, runs_dir=str(folder / f"bad-{name}"), **BAD_INPUT[name][0])))
    return code, errors.getvalue()


CASES = {
    **{f"halves, {name}": lambda folder, name=name: halves(name) for name in HALVES},
    **{f"scripted, {name}": lambda folder, name=name: scripted(folder, name) for name in SCRIPTED},
    **{f"target_kl, {kl}": lambda folder, kl=kl: case_target_kl(folder, kl) for kl in (0.015, 0.04)},
    **{f"signal, {name}": lambda folder, name=name: case_signal(folder, name) for name in ("acting", "ending")},
    **{f"not finite, {name}": lambda folder, name=name: case_not_finite(folder, name) for name in ("loss", "reward")},
    **{f"bad input, {name}": lambda folder, name=name: case_bad_input(folder, name) for name in BAD_INPUT},
    **{f"real, {name}": lambda folder, name=name: case_real(folder, name) for name in BACKENDS},
}
COMPILED = {"compiled": lambda folder: scripted(folder, "default", compile=True)}


def play(cases: dict, folder: Path) -> None:
    """Calls each case on this rank and saves what it returns, or why it failed."""
    initialize, stores = dist.init_process_group, []

    def init_process_group(*given, **options):
        # torchrun's own store serves one process group; here each training needs another. One that waits for a rank in
        # vain must fail, not wait for half an hour.
        where = {"init_method": f"file://{folder}/{stores.pop()}", "rank": RANK, "world_size": WORLD_SIZE}
        initialize(*given, timeout=timedelta(seconds=60), **where, **options)

    dist.init_process_group = init_process_group
    for number, (name, case) in enumerate(cases.items()):
        print(f"rank {RANK}: {name}", file=sys.stderr, flush=True)
        stores[:] = [f"store-{number}-{part}" for part in range(3)]  # also if a rank failed before it took one
        try:
            if name.startswith("halves"):  # what train() does elsewhere
                dist.init_process_group("gloo")
            answer = {"answer": case(folder)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        if dist.is_initialized():
            dist.destroy_process_group()
        torch.save(answer, folder / f"{name}.{RANK}.pt")


def program(kind: str, folder: Path, words: list[str]) -> int:
    """What torchrun starts: this file with one of these kinds."""
    if kind in ("cases", "compiled"):
        play({"cases": CASES, "compiled": COMPILED}[kind], folder)
        return 0
    (folder / f"pid-{RANK}").write_text(str(os.getpid()))
    if kind == "breaking" and RANK == 0:

        def break_down():
            raise RuntimeError("the emulator is on fire")

        with pytest.MonkeyPatch.context() as patch:
            on_rollout(patch, 3, break_down)
            return ppo_atari.main(words)
    return ppo_atari.main(words)


# The tests
# ---------


def wait_for(condition, limit: float = 200):
    """Waits until condition() is true and returns what it returned."""
    deadline = time.monotonic() + limit
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited for {limit} s in vain"
        time.sleep(0.02)
    return found


class Job:
    """torchrun with two ranks of a script, in a folder where it finds and leaves its files."""

    def __init__(self, folder: Path, script: str | Path, *words: str):
        self.folder = folder
        # A free port of its own; ranks that do not end when told to are killed 15 s later, not 30.
        options = ["--standalone", f"--nproc-per-node={RANKS}", "--shutdown-timeout=15"]
        command = [sys.executable, "-m", "torch.distributed.run", *options, str(script), *map(str, words)]
        environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent), "OMP_NUM_THREADS": "1"}
        with open(folder / "stdout", "w") as stdout, open(folder / "stderr", "w") as stderr:
            self.process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment, cwd=folder)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:  # torchrun passes this on
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(40)
            self.process.kill()

    def said(self, stream: str) -> str:
        """What all ranks and torchrun wrote to stdout or stderr."""
        return (self.folder / stream).read_text()

    def wait(self, limit: float = 120) -> int:
        """Waits for the end and returns torchrun's exit code: 0 if all ranks end with 0, otherwise 1."""
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {limit} s: {self.said('stderr')}") from None

    def wait_for_update(self, number: int) -> Path:
        """Waits until metrics.jsonl holds that update; returns the run directory."""

        def reached():
            assert self.process.poll() is None, self.said("stderr")
            return [path for path in self.folder.glob("runs/*/metrics.jsonl") if number in updates_of(path.parent)]

        return wait_for(reached)[0].parent

    def errors(self) -> list[str]:
        """The error messages of the script."""
        return [line for line in self.said("stderr").splitlines() if re.match(r"\w+\.py: error: ", line)]


def rows_of(path: Path) -> list[dict]:
    """The whole lines of a run's metrics.jsonl; the last may be under way."""
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def updates_of(path: Path, batch_size: int = 16) -> list[int]:
    """The numbers of the updates in metrics.jsonl."""
    return [row["global_step"] // batch_size for row in rows_of(path) if "losses/policy_loss" in row]


def games_of(path: Path) -> dict[int, int]:
    """How many games ended, by global step."""
    steps = [row["global_step"] for row in rows_of(path) if "charts/episodic_return" in row]
    return {step: steps.count(step) for step in steps}


def checkpoint(path: Path) -> dict:
    """What checkpoint.pt holds."""
    return torch.load(path / "checkpoint.pt", weights_only=True)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Plays CASES with two ranks; returns the folder with their answers."""
    folder = tmp_path_factory.mktemp("cases")
    with Job(folder, __file__, "cases", folder) as job:
        with contextlib.suppress(AssertionError):  # the tests of what has been answered may still pass
            job.wait(300)
    yield folder
    shutil.rmtree(folder)  # checkpoints of 20 MB each


def read(folder: Path, name: str) -> list:
    """What each rank answered in that case."""
    answers = []
    for rank in range(RANKS):
        file = folder / f"{name}.{rank}.pt"
        answer = torch.load(file, weights_only=False) if file.exists() else {"error": "the case was not reached"}
        assert "error" not in answer, f"rank {rank}: {answer['error']}\n{(folder / 'stderr').read_text()[-5000:]}"
        answers.append(answer["answer"])
    return answers


@pytest.fixture
def answers(launched):
    """What each rank answered in a case, by the case's name."""
    return lambda name: read(launched, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_ranks_keep_the_same_parameters(answers, backend):
    """Parameters and Adam's moments are equal to the last bit after every update, also after resuming."""
    first, second = answers(f"real, {backend}")
    assert first["digests"] == second["digests"]
    assert len(set(first["digests"])) == 3  # two updates, and one after resuming
    assert first["gradient steps"] == second["gradient steps"] == [4, 8, 12]
    assert first["losses"] == second["losses"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_play_in_the_environments_of_one_process(answers, backend):
    """Rank r of K has environments r * N / K to (r + 1) * N / K - 1 of one process with N, also after resuming."""
    ranks, args = answers(f"real, {backend}"), real(2, backend)
    resets_of_ranks = [rank["resets"] for rank in ranks]
    for first_step, *resets in zip((0, 2 * args.batch_size), *resets_of_ranks, strict=True):
        for rank, (num_envs, env_seed, reset_seed, _) in enumerate(resets):
            assert (num_envs, env_seed, reset_seed) == (2, 7 + 2 * rank, 7 + 2 * rank + first_step)
        envs = ppo_atari.make_envs(args)
        whole = np.array(envs.reset(seed=7 + first_step)[0])
        envs.close()
        assert len(np.unique(whole, axis=0)) > 1
        np.testing.assert_array_equal(np.concatenate([frames for *_, frames in resets]), whole)


def test_every_rank_has_noise_of_its_own(answers):
    """All noise and shuffles come from PyTorch's generator; no two states of it are equal, nor are the actions."""
    for backend in BACKENDS:
        ranks = answers(f"real, {backend}")
        states = [state for rank in ranks for state in rank["random states"]]
        assert len(states) == len(set(states)) == 3 * RANKS
        for first, second in zip(ranks[0]["actions"], ranks[1]["actions"], strict=True):
            assert (first != second).float().mean() > 0.3  # with equal noise nearly none would differ


def assert_equal_but_for_rounding(ours: torch.Tensor, expected: torch.Tensor, factor: float = 1) -> None:
    """Entries differ by no more than a small part of the largest.

    Gradients are sums of float32 numbers, here in another order: at most 2e-5 of the largest moment or of the largest
    movement of a parameter was seen. The bound leaves room for processors on which convolutions round otherwise.
    """
    torch.testing.assert_close(ours, expected, rtol=0, atol=3e-4 * factor * expected.abs().max().item())


@pytest.mark.parametrize("name", HALVES)
def test_halves_of_minibatches(answers, name):
    """Two ranks with one half of each minibatch do what one process does with the whole, but for rounding."""
    one, ranks = halves(name), answers(f"halves, {name}")
    for kind, expected in one["normalized"].items():
        ours = torch.cat([rank["normalized"][kind] for rank in ranks], 1)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    deviations = one["normalized"]["advantages"].std(1, unbiased=name == "sample's deviation")
    torch.testing.assert_close(deviations, torch.ones(3), rtol=1e-5, atol=0)
    # What train() reports is the mean over the ranks.
    torch.testing.assert_close((ranks[0]["terms"] + ranks[1]["terms"]) / 2, one["terms"], rtol=1e-5, atol=1e-6)
    assert (ranks[0]["terms"] - ranks[1]["terms"]).abs().max() > 0.1
    assert ranks[0]["digest"] == ranks[1]["digest"]
    for kind, expected in one["trained"].items():
        assert expected.abs().max() > 0
        assert_equal_but_for_rounding(ranks[0]["trained"][kind], expected)


def assert_same_training(one: dict[str, list], ranks: list[dict[str, list]], factor: float = 1) -> None:
    """The ranks did what one process did, but for rounding, or for a multiple of what that is elsewhere."""
    assert ranks[0]["digests"] == ranks[1]["digests"]
    assert one["gradient steps"] == ranks[0]["gradient steps"] == [2, 4, 6]
    for update, whole in enumerate(one["actions"]):
        assert torch.equal(torch.cat([rank["actions"][update] for rank in ranks], 1), whole)
        assert len(whole.unique()) > 1
        for rank in ranks:
            assert rank["losses"][update] == pytest.approx(one["losses"][update], rel=1e-5 * factor, abs=1e-6 * factor)
        assert ranks[0]["episodes"][update] == sorted(one["episodes"][update])  # rank 0 logs the games of all
    assert {game for update in one["episodes"] for _, game, _ in update} == {1, 2, 3, 4}
    for ours, expected in zip(ranks[0]["trained"], one["trained"], strict=True):
        assert_equal_but_for_rounding(ours, expected, factor)


@pytest.mark.parametrize("name", SCRIPTED)
def test_two_ranks_train_like_one_process(answers, name, tmp_path):
    """With the same environments and the same noise the whole training is the same, but for rounding."""
    assert_same_training(scripted(tmp_path, name), answers(f"scripted, {name}"))


@pytest.mark.slow
def test_compiled_ranks(tmp_path):
    """With --compile two ranks compute the same, but for rounding: sums in another order."""
    with Job(tmp_path, __file__, "compiled", tmp_path) as job:
        assert job.wait(500) == 0, job.said("stderr")
    assert_same_training(scripted(tmp_path, "default"), read(tmp_path, "compiled"), 10)


def test_the_ranks_decide_together_to_stop_early(answers):
    """The mean divergence counts: 0.0075 is below the target of 0.01, though 0.015 is above, and 0.02 is above."""
    assert answers("target_kl, 0.015") == [[6, 12]] * RANKS  # all three epochs
    assert answers("target_kl, 0.04") == [[2, 4]] * RANKS


@pytest.mark.parametrize(("moment", "last_update"), [("acting", 2), ("ending", 3)])
def test_signal_to_one_rank(answers, launched, moment, last_update):
    """All ranks end after the same update. What comes when the update's end has been agreed on waits for the next."""
    assert answers(f"signal, {moment}") == [last_update] * RANKS
    (path,) = (launched / f"signal-{moment}").iterdir()
    assert checkpoint(path)["update"] == last_update


@pytest.mark.parametrize("what", ["loss", "reward"])
def test_not_finite_on_one_rank(answers, launched, what):
    """Every rank raises, and its message names the run that keeps the checkpoint."""
    (path,) = (launched / f"not-finite-{what}").iterdir()
    for message, names_run in answers(f"not finite, {what}"):
        assert message.startswith("update 2 is not finite; ")
        assert names_run, message
    assert updates_of(path) == [1]
    assert checkpoint(path)["update"] == 0


def test_only_rank_0_writes(answers, launched):
    """Each of these runs has one directory, and in its metrics all is there once."""
    for name, last_update in (("default-2", 3), ("real-gymnasium", 3), ("kl-0.04", 2), ("signal-ending", 3)):
        (path,) = (launched / name).iterdir()
        assert {file.name for file in path.iterdir()} == {"config.json", "metrics.jsonl", "checkpoint.pt"}
        assert updates_of(path) == list(range(1, last_update + 1))
    rows = [row for row in rows_of(next((launched / "default-2").iterdir())) if "charts/episodic_return" in row]
    expected = [
        (16 * update + 4 * (step + 1), game, length)
        for update, episodes in enumerate(answers("scripted, default")[0]["episodes"])
        for step, game, length in episodes
    ]
    keys = ("global_step", "charts/episodic_return", "charts/episodic_length")
    assert [tuple(row[key] for key in keys) for row in rows] == expected


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(answers, launched, name):
    """Every rank says what is wrong, for torchrun ends the others when one has ended, and nothing is created."""
    for code, message in answers(f"bad input, {name}"):
        assert code == 2
        assert re.fullmatch(r"ppo_atari\.py: error: .*\n", message)
        assert BAD_INPUT[name][1] in message
    assert not (launched / f"bad-{name}").exists()


def test_each_process_needs_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for gpus, cuda, fits in ((1, True, False), (1, False, True), (2, True, True), (0, True, True)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        if fits:
            ppo_atari.check_args(ppo_atari.Args(cuda=cuda))
        else:
            with pytest.raises(ppo_atari.InputError, match="^2 processes need as many GPUs, not 1; or --no-cuda$"):
                ppo_atari.check_args(ppo_atari.Args(cuda=cuda))


def test_evaluation_is_for_one_process(monkeypatch):
    ppo_atari.check_args(ppo_atari.Args(evaluate="a run"))
    monkeypatch.setattr(ppo_atari, "WORLD_SIZE", 2)
    with pytest.raises(ppo_atari.InputError, match="without torchrun"):
        ppo_atari.check_args(ppo_atari.Args(evaluate="a run"))


def test_bad_input_under_torchrun(tmp_path):
    with Job(tmp_path, SCRIPT, *flags(small(2, num_envs=3))) as job:
        assert job.wait() == 1
    problem = "3 envs x 4 steps in 2 minibatches cannot be shared equally by 2 processes"
    assert set(job.errors()) == {f"ppo_atari.py: error: {problem}"}
    assert job.said("stdout") == ""
    assert {file.name for file in tmp_path.iterdir()} == {"stdout", "stderr"}


def test_run_directory_that_cannot_be_made(tmp_path):
    """Only rank 0 finds out; the others must not wait for it until torchrun kills them."""
    (tmp_path / "file").touch()
    with Job(tmp_path, SCRIPT, *flags(small(2, runs_dir="file"))) as job:
        assert job.wait() == 1
    assert "ppo_atari.py: error: cannot write the run directory: " in job.said("stderr")
    assert "forcefully exiting" not in job.said("stderr")  # torchrun's words when it has waited in vain


def test_stop_and_resume(tmp_path, monkeypatch):
    """SIGTERM to torchrun stops all ranks after the same update; then one process goes on, and then two again."""
    args = small(10**5, exp_name="shared", checkpoint_interval=10**4, noop_max=0)
    with Job(tmp_path, SCRIPT, *flags(args)) as job:
        path = job.wait_for_update(3)
        job.process.terminate()
        # It passes the signal on, waits for the ranks and then, though they end with 0, raises: exit code 1.
        assert job.wait() == 1
    assert job.errors() == []
    assert "SignalException" in job.said("stderr")
    assert "forcefully exiting" not in job.said("stderr")
    assert job.said("stderr").count("Pong: 0 of ") == 1  # one progress bar
    stopped_at = updates_of(path)[-1]
    name = f"runs/{path.name}"
    first, second = job.said("stdout").splitlines()
    assert re.fullmatch(rf"{name}: {16 * stopped_at} steps, mean return -?\d+\.\d", first)
    assert second == f"stopped by a signal; go on with: python ppo_atari.py --resume {name}"
    assert list((tmp_path / "runs").iterdir()) == [path]
    assert {file.name for file in path.iterdir()} == {"config.json", "metrics.jsonl", "checkpoint.pt"}
    assert json.loads((path / "config.json").read_text()) == asdict(args)
    assert updates_of(path) == list(range(1, stopped_at + 1))
    assert checkpoint(path)["update"] == stopped_at
    # Without no-ops all games end by the time limit, at once: those of both ranks are there.
    assert set(games_of(path).values()) == {args.num_envs}

    monkeypatch.chdir(tmp_path)
    assert ppo_atari.main(["--resume", name, "--total-timesteps", str(16 * (stopped_at + 2))]) == 0
    assert updates_of(path) == list(range(1, stopped_at + 3))
    with Job(tmp_path, SCRIPT, "--resume", name, "--total-timesteps", str(16 * (stopped_at + 4))) as job:
        assert job.wait() == 0
    assert job.errors() == []
    assert re.fullmatch(rf"{name}: {16 * (stopped_at + 4)} steps, mean return -?\d+\.\d\n", job.said("stdout"))
    assert updates_of(path) == list(range(1, stopped_at + 5))
    assert checkpoint(path)["gradient_steps"] == 4 * (stopped_at + 4)
    assert set(games_of(path).values()) == {args.num_envs}


def test_killed_rank(tmp_path, monkeypatch):
    """The others end soon, and the last checkpoint can be used."""
    args = small(10**5, checkpoint_interval=2)
    with Job(tmp_path, __file__, "plain", tmp_path, *flags(args)) as job:
        path = job.wait_for_update(3)
        os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
        assert job.wait(45) == 1
    (error,) = job.errors()
    assert error.startswith("ppo_atari.py: error: rank 0 lost another rank: ")
    assert job.said("stdout") == ""
    saved, reached = checkpoint(path)["update"], updates_of(path)[-1]
    assert saved % 2 == 0
    assert 2 <= saved <= reached <= saved + 2

    monkeypatch.chdir(tmp_path)
    assert ppo_atari.main(["--evaluate", str(path), "--eval-episodes", "1"]) == 0
    assert ppo_atari.main(["--resume", str(path), "--total-timesteps", str(16 * (saved + 2))]) == 0
    assert updates_of(path) == list(range(1, saved + 3))


def test_exception_on_one_rank(tmp_path):
    """The others end soon. The rank with the mistake shows where it is, and does not blame another."""
    with Job(tmp_path, __file__, "breaking", tmp_path, *flags(small(10**5))) as job:
        assert job.wait() == 1
    assert "RuntimeError: the emulator is on fire" in job.said("stderr")
    assert "in break_down" in job.said("stderr")  # the traceback
    (error,) = job.errors()
    assert error.startswith("ppo_atari.py: error: rank 1 lost another rank: ")
    assert job.said("stdout") == ""


if __name__ == "__main__":
    sys.exit(program(sys.argv[1], Path(sys.argv[2]).resolve(), sys.argv[3:]))
