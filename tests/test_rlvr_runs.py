"""Whole runs of ppo_rlvr.py: resuming, searching, learning at test time, bad input, and tasks of a user's own."""

import json
import os
import re
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path

import forking
import pytest
import torch
from conftest import ROOT

import ppo_rlvr as rlvr

SMALL = rlvr.Args(width=16, layers=1, heads=2, num_envs=16, num_minibatches=2, num_test=30, pretrain_steps=4,
                  pretrain_batch=8, group_size=4, total_timesteps=4 * 16 * 22, eval_interval=2, checkpoint_interval=1,
                  cache_dir="")  # fmt: skip
FLAGS = ["--width", "16", "--layers", "1", "--heads", "2", "--num-envs", "16", "--num-test", "30", "--pretrain-steps",
         "4", "--pretrain-batch", "8", "--group-size", "4", "--total-timesteps", "1408", "--eval-interval", "2",
         "--cache-dir", ""]  # fmt: skip


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    """Every test works in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    rlvr.say.cache_clear()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    rlvr.SIGNALS.clear()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def rows_of(path) -> list[dict]:
    """The metrics without the times."""
    rows = map(json.loads, (Path(path) / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in ("wall_time", "charts/SPS")} for row in rows]


def weights_of(path) -> dict:
    return torch.load(Path(path) / "checkpoint.pt", weights_only=True)["agent"]


def assert_same_run(one, other):
    assert rows_of(one) == rows_of(other)
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Kill(BaseException):
    """Stands for a kill: nothing catches it."""


def killed_after(updates: int, args) -> Path:
    """The directory of a run that is killed in the middle of the update after these."""

    def kill(agent, adam, *rest):
        killer["steps"] += 1
        if killer["steps"] > updates * args.update_epochs * args.num_minibatches + 1:
            raise Kill
        return step(agent, adam, *rest)

    killer, step, runs, start = {"steps": 0}, rlvr.gradient_step, [], rlvr.Run.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlvr, "gradient_step", kill)
        patch.setattr(rlvr.Run, "__init__", lambda run, *given: (runs.append(run), start(run, *given))[1])
        with pytest.raises(Kill):
            rlvr.train(args)
    runs[0].metrics.close()  # as the end of a process does
    return runs[0].path


VARIANTS = {
    "gae": {}, "group": {"advantage": "group"}, "loo": {"advantage": "loo"}, "batch": {"advantage": "batch"},
    "warmup": {"value_warmup": 2}, "verifier": {"test_time": "verifier"}, "majority": {"test_time": "majority"},
    "rare checkpoints": {"checkpoint_interval": 2, "kl_coef": 0.1},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("updates", "variant"), [(0, "gae"), (0, "rare checkpoints"), *((3, variant) for variant in VARIANTS)]
)
def test_kill_and_resume_gives_the_same_numbers(variant, updates):
    args = replace(SMALL, **VARIANTS[variant])
    whole = rlvr.train(args)["run_dir"]
    path = killed_after(updates, args)
    assert rlvr.main(["--resume", str(path)]) == 0
    assert_same_run(whole, path)
    assert [row["global_step"] for row in rows_of(path)] == [0, 352, 704, 1056, 1408]


def test_seeds_give_identical_runs_and_different_ones():
    one, same = (rlvr.train(SMALL)["run_dir"] for _ in range(2))
    assert_same_run(one, same)
    other = rlvr.train(replace(SMALL, seed=2))["run_dir"]
    assert rows_of(one) != rows_of(other)


def test_tests_change_nothing_of_the_training():
    one = rlvr.train(SMALL)["run_dir"]
    other = rlvr.train(replace(SMALL, eval_interval=1))["run_dir"]
    tested = [sum("eval/pass_at_1" in row for row in rows_of(path)) for path in (one, other)]
    assert tested == [3, 5]  # one of them before the training
    first, second = weights_of(one), weights_of(other)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_directory_has_what_it_should():
    result = rlvr.train(SMALL)
    path, rows = Path(result["run_dir"]), rows_of(result["run_dir"])
    names = {entry.name for entry in path.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "checkpoint.pt", "answers_0.txt", "answers_2.txt", "answers_4.txt"}
    assert re.match(r"[\d.]+ \w:\w+\? ", (path / "answers_4.txt").read_text())
    assert json.loads((path / "config.json").read_text()).items() >= asdict(replace(SMALL)).items()
    assert rows[-1]["eval/greedy_accuracy"] == result["greedy_accuracy"]
    expected = {"charts/reward", "charts/episodic_return", "charts/episodic_length", "charts/truncated",
                "charts/learning_rate", "losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/approx_kl",
                "losses/old_approx_kl", "losses/clipfrac", "losses/explained_variance", "losses/reference_kl",
                "losses/sampler_gap"}  # fmt: skip
    assert all(expected <= row.keys() for row in rows[1:])


def test_signal_and_resume():
    args, end = replace(SMALL), rlvr.Run.end_update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlvr.Run, "end_update", lambda run, *rest: (end(run, *rest), rlvr.SIGNALS.append(15)))
        path = rlvr.train(args)["run_dir"]
    assert rows_of(path)[-1]["global_step"] == 352
    assert rlvr.main(["--resume", path]) == 0
    assert_same_run(rlvr.train(args)["run_dir"], path)


@pytest.mark.parametrize("search", ["greedy", "majority", "best-of", "guided"])
def test_evaluate(search, capfd):
    path = rlvr.train(SMALL)["run_dir"]
    before = {entry.name: entry.read_bytes() for entry in Path(path).iterdir()}
    capfd.readouterr()
    assert rlvr.main(["--evaluate", path, "--search", search, "--samples", "3"]) == 0
    printed = capfd.readouterr().out
    assert re.fullmatch(rf"count: accuracy [\d.]+ on 30 test problems with --search {search} --samples \d, "
                        r"[\d.]+ tokens for each\n", printed)  # fmt: skip
    assert {entry.name: entry.read_bytes() for entry in Path(path).iterdir()} == before
    if search == "greedy":
        assert f"accuracy {rows_of(path)[-1]['eval/greedy_accuracy']:.3f}" in printed


@pytest.mark.parametrize("mode", ["verifier", "majority"])
def test_test_time_trains_on_the_test_problems(mode, monkeypatch):
    """On no others; and a majority needs no verifier."""
    seen, judge, tests = [], rlvr.judge, rlvr.make_task(SMALL)[1]

    def spy(task, problems, answers, args):
        seen.append(problems)
        return judge(task, problems, answers, args)

    monkeypatch.setattr(rlvr, "judge", spy)
    monkeypatch.setattr(rlvr, "test", lambda *args: ({"eval/greedy_accuracy": 0.0}, ""))
    monkeypatch.setattr(rlvr, "make_task", lambda args: (rlvr.Count(), tests))
    rlvr.train(replace(SMALL, test_time=mode))
    assert len(seen) == 4 and all(set(problems) <= set(tests) for problems in seen)
    if mode == "majority":
        assert all(problems[i] == problems[i + 1] for problems in seen for i in (0, 1, 2, 4, 5, 6))


# ---- the supervised start


@pytest.mark.slow
def test_cache_is_used_and_depends_on_the_settings(monkeypatch):
    counts, pretrain = [], rlvr.pretrain
    monkeypatch.setattr(rlvr, "pretrain", lambda *args: (counts.append(1), pretrain(*args))[1])
    args = replace(SMALL, cache_dir="cache")
    one = rlvr.train(args)["run_dir"]
    other = rlvr.train(args)["run_dir"]
    assert len(counts) == 1
    assert_same_run(one, other)
    assert_same_run(one, rlvr.train(replace(args, cache_dir=""))["run_dir"])  # and it changes no number
    for change in ({"seed": 2}, {"pretrain_steps": 5}, {"width": 32}, {"env_id": "max"}, {"num_test": 31}):
        before = len(counts)
        rlvr.train(replace(args, **change))
        assert len(counts) == before + 1, change
    before = len(counts)
    rlvr.train(replace(args, advantage="loo", learning_rate=1e-3))
    assert len(counts) == before  # these come later
    for file in Path("cache").iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    assert_same_run(one, rlvr.train(args)["run_dir"])
    assert len(counts) == before + 1
    assert not [file for file in Path("cache").iterdir() if file.suffix != ".pt"]


def test_a_cache_that_cannot_be_written_is_no_error(capfd):
    Path("cache").write_text("a file")
    rlvr.train(replace(SMALL, cache_dir="cache"))
    assert "the supervised start is not kept" in capfd.readouterr().err


# ---- bad input


TASK = """
class Echo:
    def problem(self, rng):
        return rng.randrange(1000)
    def prompt(self, problem):
        return f"{problem}>"
    def demonstration(self, problem, rng, progress):
        return str(problem)
    def reward(self, problem, text):
        return float(text == str(problem))

class NoReward:
    problem = prompt = None

class Mute(Echo):
    demonstration = property()

class Nan(Echo):
    def reward(self, problem, text):
        return float("nan")

class Text(Echo):
    def reward(self, problem, text):
        return "yes"

class Long(Echo):
    def prompt(self, problem):
        return f"{problem}" * 20

class Foreign(Echo):
    def prompt(self, problem):
        return f"\\u00fc{problem}"

class Few(Echo):
    def problem(self, rng):
        return rng.randrange(9)

class Wordy(Echo):
    def demonstration(self, problem, rng, progress):
        return "word " * 20

class Broken(Echo):
    def __init__(self):
        raise RuntimeError("the data\\nis missing")

class Keyless(Echo):
    def __init__(self):
        {}["words"]

class LaterNan(Echo):
    calls = 0
    def reward(self, problem, text):
        LaterNan.calls += 1
        return float("nan") if LaterNan.calls > 10 else 1.0

class Zero(Echo):
    def reward(self, problem, text):
        return 0
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A module of tasks in the working directory."""
    (tmp_path / "odd_tasks.py").write_text(TASK)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("odd_tasks", None)


BAD = {
    "unknown task": ("--env-id counting", "no task counting"),
    "unknown module": ("--env-id no_such_module:Task", "no_such_module"),
    "unknown class": ("--env-id odd_tasks:Nothing", "Nothing"),
    "broken task": ("--env-id odd_tasks:Broken", "the data is missing"),
    "task that lacks a key": ("--env-id odd_tasks:Keyless", "KeyError: 'words'"),
    "no reward": ("--env-id odd_tasks:NoReward", "no reward"),
    "no demonstrations": ("--env-id odd_tasks:Mute", "no demonstration, which a task needs without --model"),
    "reward is nan": ("--env-id odd_tasks:Nan", "nan, which is no finite number"),
    "reward is text": ("--env-id odd_tasks:Text", "'yes', which is no finite number"),
    "prompt too long": ("--env-id odd_tasks:Long", "1 to 16 characters"),
    "prompt too long for the flag": ("--max-prompt 5", "1 to 5 characters"),
    "unknown characters": ("--env-id odd_tasks:Foreign", "ASCII"),
    "demonstration too long": ("--env-id odd_tasks:Wordy", "1 to 21 characters"),
    "answers too short": ("--num-steps 3 --total-timesteps 5000", "1 to 2 characters"),
    "few problems": ("--env-id odd_tasks:Few", "too few problems"),
    "few problems for training": ("--env-id odd_tasks:Few --num-test 9", "too few problems"),
    "group of 1": ("--advantage group --group-size 1", "--group-size must be at least 2"),
    "loo of 1": ("--advantage loo --group-size 1", "--group-size must be at least 2"),
    "majority of 1": ("--test-time majority --group-size 1", "--group-size must be at least 2"),
    "groups that do not fit": ("--advantage group --group-size 5", "groups of 5"),
    "minibatches": ("--num-minibatches 3", "3 equal minibatches"),
    "batch of 1": ("--advantage batch --num-envs 1 --num-minibatches 1", "--num-envs"),
    "heads": ("--width 16 --heads 3", "3 heads"),
    "temperature": ("--temperature 0", "--temperature must be above 0"),
    "gamma": ("--gamma 1.1", "--gamma must be from 0 to 1"),
    "nan": ("--learning-rate nan", "--learning-rate must be"),
    "steps": ("--total-timesteps 10", "below one rollout"),
    "warmup without values": ("--advantage loo --value-warmup 1", "no value network"),
    "bool": ("--norm-adv False", "takes no value"),
    "nothing to resume": ("--resume nowhere", "not a run directory"),
    "nothing to evaluate": ("--evaluate=", "needs a run directory"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line(case, tasks, capfd):
    argv, part = BAD[case]
    before = sorted(Path.cwd().iterdir())
    assert rlvr.main([*FLAGS, *argv.split()]) == 2
    output = capfd.readouterr()
    lines = output.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("ppo_rlvr.py: error: ") and part in lines[0], output.err
    assert output.out == ""
    assert [path for path in sorted(Path.cwd().iterdir()) if path.name != "__pycache__"] == before


def test_search_with_values_needs_values(capfd):
    path = rlvr.train(replace(SMALL, advantage="loo"))["run_dir"]
    for search in ("best-of", "guided"):
        assert rlvr.main(["--evaluate", path, "--search", search]) == 2
    assert "needs a value network" in capfd.readouterr().err


def test_foreign_directory_cannot_import_a_module(tasks, capfd):
    path = rlvr.train(replace(SMALL, env_id="odd_tasks:Echo"))["run_dir"]
    assert rlvr.main(["--evaluate", path]) == 2
    assert "repeat its --env-id odd_tasks:Echo" in capfd.readouterr().err
    assert rlvr.main(["--evaluate", path, "--env-id", "odd_tasks:Echo"]) == 0


def test_reward_that_becomes_nan_stops_the_run(tasks, capfd):
    assert rlvr.main([*FLAGS, "--env-id", "odd_tasks:LaterNan"]) == 2
    assert "is nan, which is no finite number" in capfd.readouterr().err


def test_reward_that_never_varies_is_a_warning(tasks, capfd):
    assert rlvr.main([*FLAGS, "--env-id", "odd_tasks:Zero"]) == 0
    flat = capfd.readouterr().err
    assert flat.count("there is nothing to learn from that") == 1


def test_checkpoint_that_is_none(capfd):
    path = Path(rlvr.train(SMALL)["run_dir"])
    (path / "checkpoint.pt").write_bytes(b"nothing")
    for flag in ("--resume", "--evaluate"):
        assert rlvr.main([flag, str(path)]) == 2
    assert "cannot use" in capfd.readouterr().err


# ---- users


def run(command, cwd):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return forking.run(command, cwd=cwd, env=environment)


@pytest.mark.slow
def test_own_task_in_a_module(tasks, tmp_path):
    """As the docstring says; the module is found in the working directory."""
    result = run([ROOT / "ppo_rlvr.py", *FLAGS, "--env-id", "odd_tasks:Echo"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"\S+odd_tasks-Echo__ppo_rlvr__1__\d+: 1408 steps, greedy accuracy [\d.]+\n", result.stdout)


@pytest.mark.slow
def test_an_edited_copy_runs(tmp_path):
    """A task of its own, another activation function, and one more block."""
    source = (ROOT / "ppo_rlvr.py").read_text()
    edits = [("class Maximum:", "class Sorted(Count):\n    def reward(self, problem, text):\n"
              "        return text == ''.join(sorted(problem[1]))\n\n\nclass Maximum:"),
             ('"max": Maximum,', '"max": Maximum, "sort": Sorted,'),
             ('env_id: str = "count"', 'env_id: str = "sort"'), ("F.relu(", "F.silu(")]  # fmt: skip
    for old, new in edits:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    (tmp_path / "my_ppo.py").write_text(source)
    result = run(["my_ppo.py", *FLAGS], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "sort__my_ppo__1" in result.stdout


class ShortCount(rlvr.Count):
    """Words of three or four letters."""

    def problem(self, rng):
        letter, share = rng.choice("abcd"), 0.7 * rng.random()
        word = (letter if rng.random() < share else rng.choice("abcd") for _ in range(rng.randint(3, 4)))
        return letter, "".join(word)


@pytest.mark.slow
def test_learns_to_count(monkeypatch):
    """Greedy accuracy of 0.8 or more on problems that were never trained on; the supervised start has 0.4 to 0.58.

    Of the seeds 1 to 6 all got there: to 0.875 to 0.98 on kernels for AVX-512, to 0.885 to 0.98 on those for AVX2.
    """
    monkeypatch.setitem(rlvr.TASKS, "count", ShortCount)
    args = rlvr.Args(num_steps=11, max_prompt=8, width=32, num_test=200, pretrain_steps=400, pretrain_batch=64,
                     num_envs=128, total_timesteps=25 * 128 * 11, cache_dir="")  # fmt: skip
    result = rlvr.train(args)
    start = rows_of(result["run_dir"])[0]["eval/greedy_accuracy"]
    assert start < 0.6 and result["greedy_accuracy"] >= 0.8
