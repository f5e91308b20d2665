"""Whole runs of ppo_rlhf.py: resuming, best-of-N, bad input, a user's own scores, and over-optimization."""

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

import ppo_rlhf as rlhf

SMALL = rlhf.Args(width=16, layers=1, heads=2, num_envs=16, num_test=30, pretrain_steps=4, pretrain_batch=8,
                  num_pairs=20, num_heldout_pairs=20, reward_batch=8, total_timesteps=4 * 16 * 24, eval_interval=2,
                  checkpoint_interval=1, cache_dir="")  # fmt: skip
FLAGS = ["--width", "16", "--layers", "1", "--heads", "2", "--num-envs", "16", "--num-test", "30", "--pretrain-steps",
         "4", "--pretrain-batch", "8", "--num-pairs", "20", "--num-heldout-pairs", "20", "--reward-batch", "8",
         "--total-timesteps", "1536", "--eval-interval", "2", "--cache-dir", ""]  # fmt: skip


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    """Every test works in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    rlhf.say.cache_clear()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    rlhf.SIGNALS.clear()
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

    killer, step, runs, start = {"steps": 0}, rlhf.gradient_step, [], rlhf.Run.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlhf, "gradient_step", kill)
        patch.setattr(rlhf.Run, "__init__", lambda run, *given: (runs.append(run), start(run, *given))[1])
        with pytest.raises(Kill):
            rlhf.train(args)
    runs[0].metrics.close()  # as the end of a process does
    return runs[0].path


VARIANTS = {
    "fixed": {}, "adaptive": {"adaptive_kl": True, "kl_horizon": 50.0},
    "rare checkpoints": {"checkpoint_interval": 2, "kl_in": "loss", "adaptive_kl": True},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("updates", "variant"), [(0, "fixed"), (0, "rare checkpoints"), *((3, variant) for variant in VARIANTS)]
)
def test_kill_and_resume_gives_the_same_numbers(variant, updates):
    args = replace(SMALL, **VARIANTS[variant])
    whole = rlhf.train(args)["run_dir"]
    path = killed_after(updates, args)
    assert rlhf.main(["--resume", str(path)]) == 0
    assert_same_run(whole, path)
    assert [row["global_step"] for row in rows_of(path)] == [0, 384, 768, 1152, 1536]


def test_seeds_give_identical_runs_and_different_ones():
    one, same = (rlhf.train(SMALL)["run_dir"] for _ in range(2))
    assert_same_run(one, same)
    assert rows_of(one) != rows_of(rlhf.train(replace(SMALL, seed=2))["run_dir"])


def test_ppo_never_sees_the_true_score(monkeypatch):
    """Other true scores after the comparisons change what is reported, and nothing else."""
    one, make = rlhf.train(SMALL)["run_dir"], rlhf.make_starts

    def then_forget(task, excluded, args):
        starts = make(task, excluded, args)
        task.score = lambda problem, text: 1000.0
        return starts

    monkeypatch.setattr(rlhf, "make_starts", then_forget)
    other = rlhf.train(SMALL)["run_dir"]
    first, second = weights_of(one), weights_of(other)
    assert all(torch.equal(first[name], second[name]) for name in first)
    hidden = ("eval/true_score", "eval/correlation")
    without = [[{k: v for k, v in row.items() if k not in hidden} for row in rows_of(path)] for path in (one, other)]
    assert without[0] == without[1]
    assert rows_of(other)[-1]["eval/true_score"] == 1000


def test_llm_28_the_coefficient_adapts_and_is_used():
    args = replace(SMALL, adaptive_kl=True, kl_horizon=50.0, target_kl_reference=0.01, learning_rate=1e-2)
    rows = rows_of(rlhf.train(args)["run_dir"])[1:]
    expected = args.kl_coef
    for row in rows:
        assert row["charts/kl_coef"] == pytest.approx(expected)
        expected = rlhf.adapted_kl_coef(expected, row["charts/reference_kl"], args)
    assert rows[-1]["charts/kl_coef"] != args.kl_coef
    fixed = rows_of(rlhf.train(replace(args, adaptive_kl=False))["run_dir"])[1:]
    assert all(row["charts/kl_coef"] == args.kl_coef for row in fixed)
    assert fixed[1] == rows[1] | {name: fixed[1][name] for name in rows[1] if fixed[1][name] != rows[1][name]}
    assert fixed[-1]["losses/value_loss"] != rows[-1]["losses/value_loss"]


def test_a_run_directory_has_what_it_should():
    result = rlhf.train(SMALL)
    path, rows = Path(result["run_dir"]), rows_of(result["run_dir"])
    names = {entry.name for entry in path.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "checkpoint.pt", "answers_0.txt", "answers_2.txt", "answers_4.txt"}
    assert re.match(r"-?[\d.]+ -?\d+ [a-z]{4}: ", (path / "answers_4.txt").read_text())
    assert json.loads((path / "config.json").read_text()).items() >= asdict(SMALL).items()
    assert rows[-1]["eval/proxy_score"] == result["proxy_score"]
    assert rows[-1]["eval/true_score"] == result["true_score"]
    assert {f"reward_model/{name}" for name in rlhf.FACTS} < rows[0].keys()
    assert abs(rows[0]["eval/reference_kl"]) < 1e-5
    expected = {"charts/reward", "charts/episodic_return", "charts/episodic_length", "charts/truncated",
                "charts/learning_rate", "charts/kl_coef", "charts/reference_kl", "losses/policy_loss",
                "losses/value_loss", "losses/entropy", "losses/approx_kl", "losses/old_approx_kl", "losses/clipfrac",
                "losses/explained_variance", "losses/reference_kl", "losses/sampler_gap"}  # fmt: skip
    assert all(expected <= row.keys() for row in rows[1:])


def test_signal_and_resume():
    end = rlhf.Run.end_update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlhf.Run, "end_update", lambda run, *rest: (end(run, *rest), rlhf.SIGNALS.append(15)))
        path = rlhf.train(SMALL)["run_dir"]
    assert rows_of(path)[-1]["global_step"] == 384
    assert rlhf.main(["--resume", path]) == 0
    assert_same_run(rlhf.train(SMALL)["run_dir"], path)


def test_evaluate(capfd):
    path = rlhf.train(SMALL)["run_dir"]
    before = {entry.name: entry.read_bytes() for entry in Path(path).iterdir()}
    scores = {}
    for flags, divergence in (([], r"-?[\d.]+"), (["--best-of", "1"], "0.00"), (["--best-of", "16"], "1.84")):
        capfd.readouterr()
        assert rlhf.main(["--evaluate", path, *flags]) == 0
        printed = capfd.readouterr().out
        name = f"the supervised start, --best-of {flags[1]}," if flags else "the policy"
        found = re.fullmatch(rf"greeting: proxy score (-?[\d.]+), true score -?[\d.]+, divergence {divergence} of "
                             rf"{name} on 30 test problems\n", printed)  # fmt: skip
        scores[name] = float(found.group(1))
    assert [*scores.values()][2] > [*scores.values()][1]  # the best of 16 by proxy has a higher proxy
    assert {entry.name: entry.read_bytes() for entry in Path(path).iterdir()} == before


# ---- the supervised start and the reward model


@pytest.mark.slow
def test_cache_is_used_and_depends_on_the_settings(monkeypatch):
    counts, pretrain, compare = [], rlhf.pretrain, rlhf.train_reward_model
    monkeypatch.setattr(rlhf, "pretrain", lambda *given: (counts.append("policy"), pretrain(*given))[1])
    monkeypatch.setattr(rlhf, "train_reward_model", lambda *given: (counts.append("reward"), compare(*given))[1])
    args = replace(SMALL, cache_dir="cache")
    one, other = (rlhf.train(args)["run_dir"] for _ in range(2))
    assert counts == ["policy", "reward"]
    assert_same_run(one, other)
    assert_same_run(one, rlhf.train(replace(args, cache_dir=""))["run_dir"])  # and it changes no number
    both = ["policy", "reward"]
    for change, made in (({"seed": 2}, both), ({"width": 32}, both), ({"num_pairs": 21}, ["reward"]),
                         ({"temperature": 0.9}, ["reward"]), ({"kl_coef": 0.3, "gamma": 0.9}, [])):  # fmt: skip
        counts.clear()
        rlhf.train(replace(args, **change))
        assert counts == made, change
    more = replace(args, num_pairs=21)  # only its policy comes from the first run
    assert_same_run(rlhf.train(more)["run_dir"], rlhf.train(replace(more, cache_dir=""))["run_dir"])
    for file in Path("cache").iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    counts.clear()
    assert_same_run(one, rlhf.train(args)["run_dir"])
    assert counts == both
    assert not [file for file in Path("cache").iterdir() if file.suffix != ".pt"]


def test_a_cache_that_cannot_be_written_is_no_error(capfd):
    Path("cache").write_text("a file")
    rlhf.train(replace(SMALL, cache_dir="cache"))
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
    def score(self, problem, text):
        return len(text)

class NoScore:
    problem = prompt = None

class Mute(Echo):
    demonstration = property()

class Nan(Echo):
    def score(self, problem, text):
        return float("nan")

class Text(Echo):
    def score(self, problem, text):
        return "good"

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
    def score(self, problem, text):
        LaterNan.calls += 1
        return float("nan") if LaterNan.calls > 60 else 1.0
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A module of tasks in the working directory."""
    (tmp_path / "odd_tasks.py").write_text(TASK)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("odd_tasks", None)


BAD = {
    "unknown task": ("--env-id greetings", "no task greetings"),
    "unknown module": ("--env-id no_such_module:Task", "no_such_module"),
    "unknown class": ("--env-id odd_tasks:Nothing", "Nothing"),
    "broken task": ("--env-id odd_tasks:Broken", "the data is missing"),
    "task that lacks a key": ("--env-id odd_tasks:Keyless", "KeyError: 'words'"),
    "no score": ("--env-id odd_tasks:NoScore", "no score"),
    "no demonstrations": ("--env-id odd_tasks:Mute", "demonstration"),
    "score is nan": ("--env-id odd_tasks:Nan", "nan, which is no finite number"),
    "score is nan later": ("--env-id odd_tasks:LaterNan", "nan, which is no finite number"),
    "score is text": ("--env-id odd_tasks:Text", "'good', which is no finite number"),
    "prompt too long": ("--env-id odd_tasks:Long", "1 to 8 characters"),
    "prompt too long for the flag": ("--max-prompt 4", "1 to 4 characters"),
    "unknown characters": ("--env-id odd_tasks:Foreign", "ASCII"),
    "demonstration too long": ("--env-id odd_tasks:Wordy", "1 to 23 characters"),
    "answers too short": ("--num-steps 3 --total-timesteps 5000", "1 to 2 characters"),
    "few problems": ("--env-id odd_tasks:Few", "too few problems"),
    "few problems for training": ("--env-id odd_tasks:Few --num-test 9", "too few problems"),
    "one pair": ("--num-pairs 1", "--num-pairs must be from 2"),
    "no held-out pairs": ("--num-heldout-pairs 0", "--num-heldout-pairs must be from 2"),
    "negative noise": ("--label-noise -1", "--label-noise must be from 0"),
    "minibatches": ("--num-minibatches 3", "3 equal minibatches"),
    "heads": ("--width 16 --heads 3", "3 heads"),
    "temperature": ("--temperature 0", "--temperature must be above 0"),
    "gamma": ("--gamma 1.1", "--gamma must be from 0 to 1"),
    "nan": ("--kl-coef nan", "--kl-coef must be"),
    "target": ("--adaptive-kl --target-kl-reference 0", "--target-kl-reference must be above 0"),
    "horizon": ("--kl-horizon 0", "--kl-horizon must be above 0"),
    "small horizon": ("--adaptive-kl --kl-horizon 3", "--kl-horizon must be at least"),
    "nothing to adapt": ("--adaptive-kl --kl-coef 0", "must therefore be above 0"),
    "steps": ("--total-timesteps 10", "below one rollout"),
    "bool": ("--adaptive-kl False", "takes no value"),
    "best of what": ("--best-of 4", "--best-of needs --evaluate"),
    "nothing to resume": ("--resume nowhere", "not a run directory"),
    "nothing to evaluate": ("--evaluate=", "needs a run directory"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line(case, tasks, capfd):
    argv, part = BAD[case]
    before = sorted(Path.cwd().iterdir())
    assert rlhf.main([*FLAGS, *argv.split()]) == 2
    output = capfd.readouterr()
    lines = output.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("ppo_rlhf.py: error: ") and part in lines[0], output.err
    assert output.out == ""
    assert [path for path in sorted(Path.cwd().iterdir()) if path.name != "__pycache__"] == before


def test_foreign_directory_cannot_import_a_module(tasks, capfd):
    path = rlhf.train(replace(SMALL, env_id="odd_tasks:Echo"))["run_dir"]
    assert rlhf.main(["--evaluate", path]) == 2
    assert "repeat its --env-id odd_tasks:Echo" in capfd.readouterr().err
    assert rlhf.main(["--evaluate", path, "--env-id", "odd_tasks:Echo"]) == 0


def test_checkpoint_that_is_none(capfd):
    path = Path(rlhf.train(SMALL)["run_dir"])
    (path / "checkpoint.pt").write_bytes(b"nothing")
    for flag in ("--resume", "--evaluate"):
        assert rlhf.main([flag, str(path)]) == 2
    assert "cannot use" in capfd.readouterr().err


def test_divergence_stops_the_run(monkeypatch, capfd):
    monkeypatch.setattr(rlhf, "token_rewards", lambda rewards, mask, *rest: mask * float("nan"))
    assert rlhf.main(FLAGS) == 1
    assert "is not finite" in capfd.readouterr().err


# ---- users


def run(command, cwd):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return forking.run(command, cwd=cwd, env=environment)


@pytest.mark.slow
def test_own_score_in_a_module(tmp_path):
    """A reader who likes short notes; as the docstring says, the module is found in the working directory."""
    text = """
from ppo_rlhf import Greeting

class Brief(Greeting):
    def score(self, problem, text):
        return -len(text)
"""
    (tmp_path / "my_texts.py").write_text(text)
    (tmp_path / "ppo_rlhf.py").write_text((ROOT / "ppo_rlhf.py").read_text())
    result = run(["ppo_rlhf.py", *FLAGS, "--env-id", "my_texts:Brief"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"\S+my_texts-Brief__ppo_rlhf__1__\d+: 1536 steps, proxy score -?[\d.]+, "
                        r"true score -[\d.]+\n", result.stdout)  # fmt: skip


@pytest.mark.slow
def test_an_edited_copy_runs(tmp_path):
    """Other scores, another activation function, and another loss of the reward model."""
    source = (ROOT / "ppo_rlhf.py").read_text()
    edits = [('TASKS = {', "class Loud(Greeting):\n    def score(self, problem, text):\n"
              "        return text.count('!')\n\n\nTASKS = {\"loud\": Loud, "),
             ('env_id: str = "greeting"', 'env_id: str = "loud"'), ("F.relu(", "F.silu("),
             ("F.binary_cross_entropy_with_logits(margin, preferred)",
              "F.relu(1 - margin * (2 * preferred - 1)).mean()")]  # fmt: skip
    for old, new in edits:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    (tmp_path / "my_ppo.py").write_text(source)
    result = run(["my_ppo.py", *FLAGS], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "loud__my_ppo__1" in result.stdout


class Brief(rlhf.Greeting):
    """Names of one syllable, and at most one further word."""

    def problem(self, rng):
        return rng.choice("bdklmnrst") + rng.choice("aeiou")

    def demonstration(self, problem, rng, progress):
        words = ["hi"] + [problem] * (rng.random() < 0.7)
        if rng.random() < 0.7:
            words.append(rng.choice((*self.WARM, *self.COLD)))
        return " ".join(words) + "!" * rng.choice((0, 0, 1, 1, 2))


@pytest.mark.slow
def test_without_a_penalty_the_proxy_rises_and_the_true_score_falls(monkeypatch):
    """The proxy by 1 or more; the true score ends 0.5 below its highest one, and below that of the supervised start.

    Of the seeds 1 to 6 all got there, on kernels for AVX-512 and on those for AVX2: the proxy rose by 1.7 to 3.9, and
    the true score ended 0.9 to 7.4 below its highest one.
    """
    monkeypatch.setitem(rlhf.TASKS, "greeting", Brief)
    args = rlhf.Args(width=32, num_test=15, num_steps=16, max_prompt=4, pretrain_steps=300, pretrain_batch=32,
                     num_pairs=300, num_heldout_pairs=300, reward_batch=30, num_envs=64, num_minibatches=1,
                     learning_rate=2e-3, value_learning_rate=2e-3, kl_coef=0.0, eval_interval=2, cache_dir="",
                     total_timesteps=30 * 64 * 16)  # fmt: skip
    rows = [row for row in rows_of(rlhf.train(args)["run_dir"]) if "eval/true_score" in row]
    proxy, true = ([row[f"eval/{name}_score"] for row in rows] for name in ("proxy", "true"))
    assert proxy[-1] >= proxy[0] + 1
    assert true[-1] <= max(true) - 0.5 and true[-1] < true[0]
