"""[aux-2] Several processes (ranks) share the work of one: ppo_atari_multigpu.py under torchrun, on the CPU.

Most tests read what two ranks recorded in one launch: as a program this file plays CASES, functions that every rank
calls and whose answers it saves. Where the answer of one process is needed for comparison, the test calls the same
function itself. Signals, kills and bad input are tested with launches of their own, which are closer to a user's.
"""

import contextlib
import hashlib
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

import forking
import numpy as np
import pytest
import torch
import torch.distributed as dist
from gymnasium.spaces import Box, Discrete
from test_runs import checkpoint, flags, in_empty_folder  # noqa: F401 - the last is a fixture that every test uses

import ppo_atari_multigpu
from ppo_atari_multigpu import RANK, WORLD_SIZE, Args, Batch, EpisodeEnd, InputError

pytest.importorskip("envpool")  # exists for Linux only
pytestmark = pytest.mark.slow  # these start whole runs

RANKS = 2
SCRIPT = Path(ppo_atari_multigpu.__file__).resolve()


@pytest.fixture(autouse=True)
def say_all_again():
    """What was said in one test may be said in the next."""
    ppo_atari_multigpu.say.cache_clear()


# What one process and each of several ranks do alike
# ---------------------------------------------------


def small(updates: int, **settings) -> Args:
    """Settings of a short run, whose games take eight steps, the length of two rollouts."""
    sizes = {"num_envs": 4, "num_steps": 4, "num_minibatches": 2, "update_epochs": 2, "max_game_frames": 32}
    settings = sizes | {"env_id": "Pong", "cuda": False} | settings
    batch_size = settings["num_envs"] * settings["num_steps"]
    return Args(**({"total_timesteps": updates * batch_size} | settings))


def digest(*tensors: torch.Tensor) -> str:
    """Equal for tensors that are equal to the last bit."""
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def images(random: np.random.Generator, *shape: int) -> np.ndarray:
    """Random coarse images [*shape, 84, 84] of bytes, as different from one another as frames of games are."""
    return random.integers(0, 256, (*shape, 12, 12), np.uint8).repeat(7, -2).repeat(7, -1)


class ScriptedEnvs:
    """Environments whose frames, rewards and ends follow from their seed, the time and the action alone."""

    observation_space, action_space = Box(0, 255, (4, 84, 84), np.uint8), Discrete(4)

    def __init__(self, args: Args):
        self.num_envs = args.num_envs

    def reset(self, seed: int, first_step: int = 0) -> np.ndarray:
        """Environment i gets seed + i."""
        self.ids, self.time = [seed + first_step + i for i in range(self.num_envs)], 0
        return np.stack([images(np.random.default_rng(env), 4) for env in self.ids])

    def step(self, actions: np.ndarray):
        """Ends a third of the episodes in each step; an episode's return and length tell whose it was."""
        self.time += 1
        randoms = [
            np.random.default_rng([env, self.time, action]) for env, action in zip(self.ids, actions, strict=True)
        ]
        obs, last_obs = (np.stack([images(random, 4) for random in randoms]) for _ in range(2))
        rewards = np.array([random.normal() for random in randoms], np.float32)
        terminated, truncated = (np.array([random.random() < 1 / 6 for random in randoms]) for _ in range(2))
        dones = terminated | truncated
        ends = [
            EpisodeEnd(i, float(self.ids[i]), self.time, last_obs[i], not terminated[i])
            for i in np.flatnonzero(dones).tolist()
        ]
        return obs, rewards, dones, ends

    def close(self) -> None:
        """Nothing."""


class EndlessRewardEnvs(ScriptedEnvs):
    """The last of four environments, on the last rank, gives an infinite reward in the second update."""

    def step(self, actions):
        """In the sixth step, that is, the second of that update."""
        obs, rewards, *rest = super().step(actions)
        rewards[[env == small(1).seed + 3 and self.time == 6 for env in self.ids]] = np.inf
        return obs, rewards, *rest


def watch(patch: pytest.MonkeyPatch) -> dict[str, list]:
    """Records what a training does, from now on."""
    seen = defaultdict(list)
    run_class = ppo_atari_multigpu.OtherRanksRun if RANK else ppo_atari_multigpu.Run
    make_envs, collect_rollout = ppo_atari_multigpu.make_envs, ppo_atari_multigpu.collect_rollout
    init, end_update = run_class.__init__, run_class.end_update

    def watched_make_envs(args):
        envs = make_envs(args)
        original_reset = envs.reset

        def reset(seed, first_step=0):
            obs = original_reset(seed, first_step)
            seen["resets"].append((args.num_envs, args.seed, seed, first_step, obs.copy()))
            return obs

        envs.reset = reset
        return envs

    def watched_collect_rollout(*inputs):
        seen["random states"].append(digest(torch.get_rng_state()))
        rollout = collect_rollout(*inputs)
        seen["actions"].append(rollout.actions.clone())
        return rollout

    def watched_init(run, args, agent, adam):
        run.watched, run.start_parameters = adam, adam.parameters.clone()
        init(run, args, agent, adam)

    def watched_end_update(run, ends, values):
        seen["losses"].append({name: value for name, value in values.items() if name.startswith("losses/")})
        seen["ends"].append(ends)
        end_update(run, ends, values)
        adam = run.watched
        seen["digests"].append(digest(adam.parameters, adam.moment1, adam.moment2))
        seen["gradient steps"].append(adam.steps)
        seen["trained"][:] = [adam.parameters - run.start_parameters, adam.moment1, adam.moment2]

    patch.setattr(ppo_atari_multigpu, "make_envs", watched_make_envs)
    patch.setattr(ppo_atari_multigpu, "collect_rollout", watched_collect_rollout)
    patch.setattr(run_class, "__init__", watched_init)
    patch.setattr(run_class, "end_update", watched_end_update)
    return seen


def on_rollout(patch: pytest.MonkeyPatch, number: int, action) -> None:
    """Calls action() when the training is about to collect its rollout of that number."""
    collect_rollout, calls = ppo_atari_multigpu.collect_rollout, []

    def counting(*inputs):
        calls.append(1)
        if len(calls) == number:
            action()
        return collect_rollout(*inputs)

    patch.setattr(ppo_atari_multigpu, "collect_rollout", counting)


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
        patch.setattr(ppo_atari_multigpu, "make_envs", ScriptedEnvs)
        equal_noise(patch)
        seen = watch(patch)
        # A large learning rate, so that the second and the third update would notice differences of the first.
        settings |= {"num_minibatches": 1, "learning_rate": 1e-3, "clip_reward": False} | SCRIPTED[name]
        ppo_atari_multigpu.train(small(3, runs_dir=str(folder / f"{name}-{WORLD_SIZE}"), **settings))
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
    batch = Batch(obs, actions, old_log_probs, advantages, returns, values)
    batch = Batch(*(tensor[:, part] for tensor in batch))

    args = small(1, **HALVES[name])
    torch.manual_seed(1)
    agent = ppo_atari_multigpu.Agent(ScriptedEnvs.observation_space, ScriptedEnvs.action_space, args)
    adam = ppo_atari_multigpu.Adam(agent)
    start = adam.parameters.clone()
    # As one minibatch, as norm_adv_per_batch does it; and each of the three for itself.
    flat = ppo_atari_multigpu.normalize(batch.advantages.flatten(), args).view(count, -1)
    batch = batch._replace(advantages=ppo_atari_multigpu.normalize(batch.advantages, args))
    terms = []
    for minibatch in map(Batch._make, zip(*batch, strict=True)):
        step_size, epsilon = adam.coefficients(1e-3, args)
        terms.append(ppo_atari_multigpu.gradient_step(agent, adam, minibatch, 0.1, step_size, epsilon, args)[0])
    trained = {"movement": adam.parameters - start, "moment1": adam.moment1, "moment2": adam.moment2}
    normalized = {"advantages": batch.advantages, "flat": flat}
    same = digest(*trained.values())
    return {"terms": torch.stack(terms), "trained": trained, "digest": same, "normalized": normalized}


# What only several ranks do
# --------------------------


def real(updates: int, **settings) -> Args:
    """Settings of a short run of a game in which most no-ops at its start can be seen."""
    return small(updates, seed=7, env_id="Seaquest", max_game_frames=400_000, **settings)


def case_real(folder: Path) -> dict:
    """Two updates in real games, and a third one after resuming."""
    with pytest.MonkeyPatch.context() as patch:
        seen = watch(patch)
        ppo_atari_multigpu.train(real(2, runs_dir=str(folder / "real")))
        dist.init_process_group("gloo")
        dist.barrier()  # until then the checkpoint may be the one before
        dist.destroy_process_group()
        (path,) = (folder / "real").iterdir()
        ppo_atari_multigpu.train(real(3, resume=str(path)))
    return seen


def case_target_kl(folder: Path, divergence: float) -> list[int]:
    """The gradient steps after each of two updates; rank 0 says that its policy has not moved."""
    with pytest.MonkeyPatch.context() as patch:
        change, own = ppo_atari_multigpu.policy_change, [0.0, divergence][RANK]
        patch.setattr(ppo_atari_multigpu, "make_envs", ScriptedEnvs)
        patch.setattr(ppo_atari_multigpu, "policy_change", lambda *given: change(*given) | {"losses/approx_kl": own})
        seen = watch(patch)
        ppo_atari_multigpu.train(small(2, update_epochs=3, target_kl=0.01, runs_dir=str(folder / f"kl-{divergence}")))
    return seen["gradient steps"]


def case_signal(folder: Path, moment: str) -> int:
    """Only rank 1 gets a signal, while it acts in the second update or just after it; returns the last update."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_atari_multigpu, "make_envs", ScriptedEnvs)
        seen = watch(patch)

        def send(number: signal.Signals) -> None:
            if RANK == 1:
                os.kill(os.getpid(), number)

        if moment == "acting":
            on_rollout(patch, 2, lambda: send(signal.SIGINT))
        else:
            end_update = ppo_atari_multigpu.OtherRanksRun.end_update

            def then_terminate(run, *given):
                end_update(run, *given)
                if run.update == 2:
                    send(signal.SIGTERM)

            patch.setattr(ppo_atari_multigpu.OtherRanksRun, "end_update", then_terminate)
        code = ppo_atari_multigpu.main(flags(small(50, runs_dir=str(folder / f"signal-{moment}"))))
    assert code == 0
    return len(seen["digests"])


def case_not_finite(folder: Path, what: str) -> str:
    """In the second update something of rank 1 is not finite; returns the message of what train() raises."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_atari_multigpu, "make_envs", EndlessRewardEnvs if what == "reward" else ScriptedEnvs)
        if what == "loss" and RANK == 1:
            improve = ppo_atari_multigpu.gradient_step

            def gradient_step(*given):
                terms, log_ratio = improve(*given)
                return (terms * math.nan if given[1].steps > 4 else terms), log_ratio

            patch.setattr(ppo_atari_multigpu, "gradient_step", gradient_step)
        try:
            ppo_atari_multigpu.train(small(4, runs_dir=str(folder / f"not-finite-{what}")))
        except FloatingPointError as error:
            return str(error)
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
        code = ppo_atari_multigpu.main(flags(small(2, runs_dir=str(folder / f"bad-{name}"), **BAD_INPUT[name][0])))
    return code, errors.getvalue()


CASES = {
    **{f"halves, {name}": lambda folder, name=name: halves(name) for name in HALVES},
    **{f"scripted, {name}": lambda folder, name=name: scripted(folder, name) for name in SCRIPTED},
    **{f"target_kl, {kl}": lambda folder, kl=kl: case_target_kl(folder, kl) for kl in (0.015, 0.04)},
    **{f"signal, {name}": lambda folder, name=name: case_signal(folder, name) for name in ("acting", "ending")},
    **{f"not finite, {name}": lambda folder, name=name: case_not_finite(folder, name) for name in ("loss", "reward")},
    **{f"bad input, {name}": lambda folder, name=name: case_bad_input(folder, name) for name in BAD_INPUT},
    "real": case_real,
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
        ppo_atari_multigpu.SIGNALS.clear()  # a case that calls main() is over
        for handled in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(handled, signal.SIG_DFL)
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
            return ppo_atari_multigpu.main(words)
    return ppo_atari_multigpu.main(words)


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
    """torchrun with two ranks of a script, in a folder where it finds and leaves its files.

    These are processes that need not import anything, or such that Python itself starts, as a user's are.
    """

    def __init__(self, folder: Path, script: str | Path, *words: str, by_python: bool = False):
        self.folder = folder
        # A free port of its own; ranks that do not end when told to are killed 15 s later, not 30.
        options = ["--standalone", f"--nproc-per-node={RANKS}", "--shutdown-timeout=15"]
        options += [str(script), *map(str, words)]
        python_path = f"{SCRIPT.parent}{os.pathsep}{Path(__file__).parent}"
        environment = os.environ | {"PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}
        with open(folder / "stdout", "w") as stdout, open(folder / "stderr", "w") as stderr:
            where = {"stdout": stdout, "stderr": stderr, "env": environment, "cwd": folder}
            if by_python:
                command = [sys.executable, "-m", "torch.distributed.run", *options]
                self.process = subprocess.Popen(command, **where)
            else:
                self.process = forking.Forked(["-c", forking.TORCHRUN, *options], **where)

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


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Plays CASES with two ranks; returns the folder with their answers."""
    folder = tmp_path_factory.mktemp("cases")
    with Job(folder, __file__, "cases", folder, by_python=True) as job:
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


def test_all_ranks_keep_the_same_parameters(answers):
    """Parameters and Adam's moments are equal to the last bit after every update, also after resuming."""
    first, second = answers("real")
    assert first["digests"] == second["digests"]
    assert len(set(first["digests"])) == 3  # two updates, and one after resuming
    assert first["gradient steps"] == second["gradient steps"] == [4, 8, 12]
    assert first["losses"] == second["losses"]


def test_ranks_play_in_the_environments_of_one_process(answers):
    """Rank r of K has environments r * N / K to (r + 1) * N / K - 1 of one process with N, also after resuming."""
    ranks, args = answers("real"), real(2)
    resets_of_ranks = [rank["resets"] for rank in ranks]
    for first_step, *resets in zip((0, 2 * args.batch_size), *resets_of_ranks, strict=True):
        for rank, (*numbers, _) in enumerate(resets):
            assert numbers == [2, 7 + 2 * rank, 7 + 2 * rank, first_step]  # environments, seeds, steps before
        envs = ppo_atari_multigpu.make_envs(args)
        whole = envs.reset(7, first_step).copy()
        envs.close()
        assert len(np.unique(whole, axis=0)) > 1
        np.testing.assert_array_equal(np.concatenate([obs for *_, obs in resets]), whole)


def test_every_rank_has_noise_of_its_own(answers):
    """All noise and shuffles come from PyTorch's generator; no two states of it are equal, nor are the actions."""
    ranks = answers("real")
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
            assert rank["ends"][update] == one["ends"][update]  # of the environments of all ranks
    assert {end.env for update in one["ends"] for _, end in update} == {0, 1, 2, 3}
    for ours, expected in zip(ranks[0]["trained"], one["trained"], strict=True):
        assert_equal_but_for_rounding(ours, expected, factor)


@pytest.mark.parametrize("name", SCRIPTED)
def test_two_ranks_train_like_one_process(answers, name, tmp_path):
    """With the same environments and the same noise the whole training is the same, but for rounding."""
    assert_same_training(scripted(tmp_path, name), answers(f"scripted, {name}"))


def test_compiled_ranks(tmp_path):
    """With --compile two ranks compute the same, but for rounding: sums in another order."""
    with Job(tmp_path, __file__, "compiled", tmp_path) as job:
        assert job.wait(500) == 0, job.said("stderr")
        assert job.said("stderr").count("compiling takes a minute") == 1
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


NOT_FINITE = {
    "loss": "losses/policy_loss is not finite",
    # Of the environments of all ranks.
    "reward": "a reward [step, env] is not finite at [1, 3]",
}


@pytest.mark.parametrize("what", NOT_FINITE)
def test_not_finite_on_one_rank(answers, launched, what):
    """Every rank raises, and its message names the run that keeps the checkpoint."""
    (path,) = (launched / f"not-finite-{what}").iterdir()
    message = f"in update 2, {NOT_FINITE[what]}; the last checkpoint in {path.resolve()} is good"
    assert answers(f"not finite, {what}") == [message] * RANKS
    assert updates_of(path) == [1]
    assert checkpoint(path)["update"] == 0


def test_only_rank_0_writes(answers, launched):
    """Each of these runs has one directory, and in its metrics all is there once."""
    for name, last_update in (("default-2", 3), ("real", 3), ("kl-0.04", 2), ("signal-ending", 3)):
        (path,) = (launched / name).iterdir()
        assert {file.name for file in path.iterdir()} == {"config.json", "metrics.jsonl", "checkpoint.pt"}
        assert updates_of(path) == list(range(1, last_update + 1))
    rows = [row for row in rows_of(next((launched / "default-2").iterdir())) if "charts/episodic_return" in row]
    expected = [
        (16 * update + 4 * (step + 1), end.episodic_return, end.length)
        for update, ends in enumerate(answers("scripted, default")[0]["ends"])
        for step, end in ends
    ]
    keys = ("global_step", "charts/episodic_return", "charts/episodic_length")
    assert [tuple(row[key] for key in keys) for row in rows] == expected


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(answers, launched, name):
    """Every rank says what is wrong, for torchrun ends the others when one has ended, and nothing is created."""
    for code, message in answers(f"bad input, {name}"):
        assert code == 2
        assert re.fullmatch(r"ppo_atari_multigpu\.py: error: .*\n", message)
        assert BAD_INPUT[name][1] in message
    assert not (launched / f"bad-{name}").exists()


def test_each_process_needs_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for gpus, cuda, fits in ((1, True, False), (1, False, True), (2, True, True), (0, True, True)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        if fits:
            ppo_atari_multigpu.check_args(Args(cuda=cuda))
        else:
            with pytest.raises(InputError, match="^2 processes need as many GPUs, not 1; or --no-cuda$"):
                ppo_atari_multigpu.check_args(Args(cuda=cuda))


def test_evaluation_is_for_one_process(monkeypatch):
    ppo_atari_multigpu.check_args(Args(evaluate="a run"))
    monkeypatch.setattr(ppo_atari_multigpu, "WORLD_SIZE", 2)
    with pytest.raises(InputError, match="without torchrun"):
        ppo_atari_multigpu.check_args(Args(evaluate="a run"))


def test_bad_input_under_torchrun(tmp_path):
    with Job(tmp_path, SCRIPT, *flags(small(2, num_envs=3))) as job:
        assert job.wait() == 1
    problem = "3 envs x 4 steps in 2 minibatches cannot be shared equally by 2 processes"
    assert set(job.errors()) == {f"ppo_atari_multigpu.py: error: {problem}"}
    assert job.said("stdout") == ""
    assert {file.name for file in tmp_path.iterdir()} == {"stdout", "stderr"}


def test_run_directory_that_cannot_be_made(tmp_path):
    """Only rank 0 finds out; the others must not wait for it until torchrun kills them."""
    (tmp_path / "file").touch()
    with Job(tmp_path, SCRIPT, *flags(small(2, runs_dir="file"))) as job:
        assert job.wait() == 1
    assert "ppo_atari_multigpu.py: error: cannot write the run directory: " in job.said("stderr")
    assert "forcefully exiting" not in job.said("stderr")  # torchrun's words when it has waited in vain


def test_stop_and_resume(tmp_path):
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
    assert job.said("stderr").count("Pong: 16 of ") == 1  # one progress bar
    stopped_at = updates_of(path)[-1]
    name, pattern = str(path.resolve()), re.escape(str(path.resolve()))
    first, second = job.said("stdout").splitlines()
    assert re.fullmatch(rf"{pattern}: {16 * stopped_at} steps, mean return -?\d+\.\d", first)
    assert second == f"stopped by a signal; go on with: python ppo_atari_multigpu.py --resume {name}"
    assert list((tmp_path / "runs").iterdir()) == [path]
    assert {file.name for file in path.iterdir()} == {"config.json", "metrics.jsonl", "checkpoint.pt"}
    assert json.loads((path / "config.json").read_text()).items() >= asdict(args).items()
    assert updates_of(path) == list(range(1, stopped_at + 1))
    assert checkpoint(path)["update"] == stopped_at
    # Without no-ops all games end by the time limit, at once: those of both ranks are there.
    assert set(games_of(path).values()) == {args.num_envs}

    assert ppo_atari_multigpu.main(["--resume", name, "--total-timesteps", str(16 * (stopped_at + 2))]) == 0
    assert updates_of(path) == list(range(1, stopped_at + 3))
    with Job(tmp_path, SCRIPT, "--resume", name, "--total-timesteps", str(16 * (stopped_at + 4))) as job:
        assert job.wait() == 0
    assert job.errors() == []
    assert re.fullmatch(rf"{pattern}: {16 * (stopped_at + 4)} steps, mean return -?\d+\.\d\n", job.said("stdout"))
    assert updates_of(path) == list(range(1, stopped_at + 5))
    assert checkpoint(path)["gradient_steps"] == 4 * (stopped_at + 4)
    assert set(games_of(path).values()) == {args.num_envs}


def test_killed_rank(tmp_path):
    """The others end soon, and the last checkpoint can be used."""
    args = small(10**5, checkpoint_interval=2)
    with Job(tmp_path, __file__, "plain", tmp_path, *flags(args)) as job:
        path = job.wait_for_update(3)
        os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
        assert job.wait(45) == 1
    (error,) = job.errors()
    assert error.startswith("ppo_atari_multigpu.py: error: rank 0 lost another rank: ")
    assert job.said("stdout") == ""
    saved, reached = checkpoint(path)["update"], updates_of(path)[-1]
    assert saved % 2 == 0
    assert 2 <= saved <= reached <= saved + 2

    assert ppo_atari_multigpu.main(["--evaluate", str(path), "--eval-episodes", "1"]) == 0
    assert ppo_atari_multigpu.main(["--resume", str(path), "--total-timesteps", str(16 * (saved + 2))]) == 0
    assert updates_of(path) == list(range(1, saved + 3))


def test_exception_on_one_rank(tmp_path):
    """The others end soon. The rank with the mistake shows where it is, and does not blame another."""
    with Job(tmp_path, __file__, "breaking", tmp_path, *flags(small(10**5))) as job:
        assert job.wait() == 1
    assert "RuntimeError: the emulator is on fire" in job.said("stderr")
    assert "in break_down" in job.said("stderr")  # the traceback
    (error,) = job.errors()
    assert error.startswith("ppo_atari_multigpu.py: error: rank 1 lost another rank: ")
    assert job.said("stdout") == ""


if __name__ == "__main__":
    sys.exit(program(sys.argv[1], Path(sys.argv[2]).resolve(), sys.argv[3:]))
