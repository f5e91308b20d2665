"""The speed benchmark, on commands whose speed is known."""

import json
import os
import re
import statistics
from pathlib import Path

import pytest
from conftest import ROOT

from benchmark import provenance, throughput
from benchmark.suite import InputError

MEASURE = throughput.measure
START_UP = 7.0
SPEEDS = {"peer": 1_000, "fake.py": 2_000, "fake.py --compile": 5_000, "fake.py --compile --amp": 8_000}


@pytest.fixture
def benchmark(tmp_path, monkeypatch, capsys):
    """Runs the benchmark for a script that does not exist but takes known times; returns exit code, stdout, stderr.

    The command is the name in SPEEDS. Times drift: each measurement finds the machine 1% slower than the last one.
    """
    (tmp_path / "fake.py").touch()
    monkeypatch.setattr(throughput, "ROOT", tmp_path)
    measured = []

    def pretend(command, steps, directory):
        name = "peer" if command.startswith("peer") else " ".join(["fake.py", *re.findall("--compile|--amp", command)])
        measured.append((name, steps))
        return (START_UP + steps / SPEEDS[name]) * 1.01 ** len(measured), 10.0 + len(measured)

    monkeypatch.setattr(throughput, "measure", pretend)

    def run(*peers, **settings):
        code = throughput.main(throughput.Args(peer=list(peers), **({"script": "fake"} | settings)))
        return code, *capsys.readouterr()

    run.measured = measured
    return run


def rows(table: str) -> dict[str, list[str]]:
    """The cells of a Markdown table by what stands in its first column."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {line[0]: line[1:] for line in lines}


def test_speed_without_start_up(benchmark, tmp_path):
    output = tmp_path / "results" / "speed.json"
    code, out, _ = benchmark("peer=peer {steps}", modes=["eager", "compile", "amp"], output=output)
    assert code == 0
    table = rows(out)
    assert table["command"] == ["steps/s, median", "min-max", "memory, MiB", "vs peer, median of the rounds' ratios"]
    assert list(table)[2:] == list(SPEEDS)
    saved = json.loads(output.read_text())
    for name, speed in SPEEDS.items():
        speeds = saved["steps_per_second"][name]
        assert len(speeds) == 5
        assert table[name][0] == f"{statistics.median(speeds):,.0f}"
        assert table[name][1] == f"{min(speeds):,.0f}-{max(speeds):,.0f}"
        # The machine gets 1.5 times slower during the rounds, but the ratios do not feel it.
        assert max(speeds) > 1.3 * min(speeds)
        assert float(table[name][3].removesuffix("x")) == pytest.approx(speed / SPEEDS["peer"], rel=0.1)
    assert output.with_suffix(".md").read_text() == out
    assert saved["failures"] == {}
    assert saved["commands"]["peer"] == "peer {steps}"
    assert saved["versions"]["python"] and saved["machine"] and saved["command"].startswith("python -m benchmark")
    assert saved["commit"]
    assert sorted(path.name for path in output.parent.iterdir()) == ["speed.json", "speed.md"]


def test_commands_take_turns(benchmark):
    """In every round each command is run once with the large and once with the small number of steps."""
    code, _, _ = benchmark("peer=peer {steps}", modes=["compile"], rounds=3, steps=500)
    assert code == 0
    rounds = benchmark.measured[-12:]
    assert rounds == rounds[:4] * 3
    (peer, large_peer), (peer_again, small_peer), (ours, large), (ours_again, small) = rounds[:4]
    assert peer == peer_again == "peer" and ours == ours_again == "fake.py --compile"
    assert small == small_peer == 500
    assert large_peer / 1_000 == pytest.approx(20, rel=0.2)
    assert large / 5_000 == pytest.approx(20, rel=0.2)


def test_a_real_command(tmp_path):
    """Time and peak memory are those of the process itself."""
    command = "bash -c 'sleep 0.$1; x=$(head -c 30000000 /dev/zero | tr \\\\0 x)' _ {steps}"
    seconds, peak = throughput.measure(command, 2, str(tmp_path))
    assert 0.2 <= seconds < 30
    assert peak > 28  # of the whole process, and of the one that started it until then


def test_what_fails_is_left_out(benchmark, monkeypatch, tmp_path):
    """Wrong peers and a mode that the script has not: one line each, exit code 1, and the table of the others."""
    pretend, real, runs = throughput.measure, MEASURE, []

    def measure(command, steps, directory):
        if command.startswith(("peer", "flaky")):
            runs.extend([command] * command.startswith("flaky"))
            return pretend("peer", steps, directory) if len(runs) < 6 else real("bash -c 'exit 9'", steps, directory)
        if "--amp" in command:
            raise throughput.Failed("exit code 2: fake.py: error: Unrecognized options: --amp")
        return real(command, steps, directory) if "fake" not in command else pretend(command, steps, directory)

    monkeypatch.setattr(throughput, "measure", measure)
    output = tmp_path / "speed.md"
    code, out, err = benchmark(
        "no such program=no-such-program {steps}",
        "crash=bash -c 'echo first; echo the disk is full >&2; exit 3' {steps}",
        "flaky=flaky {steps}",
        modes=["eager", "amp"], rounds=3, output=output,
    )  # fmt: skip
    assert code == 1
    assert list(rows(out))[2:] == ["flaky", "fake.py"]
    assert rows(out)["command"][3:] == ["vs flaky, median of the rounds' ratios"]
    lines = [line for line in err.splitlines() if " failed: " in line]
    assert "no such program failed: [Errno 2]" in lines[0] and "no-such-program" in lines[0]
    assert lines[1:] == [
        "crash failed: exit code 3: the disk is full",
        "fake.py --compile --amp failed: exit code 2: fake.py: error: Unrecognized options: --amp",
        "flaky failed: exit code 9: no message",
    ]
    saved = json.loads(output.with_suffix(".json").read_text())
    assert {name: len(values) for name, values in saved["steps_per_second"].items() if values} == {
        "flaky": 1,
        "fake.py": 3,
    }
    assert len(saved["failures"]) == 4
    assert output.read_text() == out


def test_names_and_files_as_they_are_given(benchmark, monkeypatch, tmp_path):
    """A bar in a name does not make a column, and a dot in a file's name is not where it ends."""
    target = tmp_path / "precious"
    target.write_text("as it was")
    (tmp_path / "v1.2.json").symlink_to(target)
    code, out, err = benchmark(
        "a|b\n=peer {steps}", script="fake.py", modes=["eager"], rounds=1, output=tmp_path / "v1.2"
    )
    assert code == 0 and "round 1: a|b\\n" in err
    assert [line.count(" | ") for line in out.splitlines()] == [4, 0, 4, 4]
    assert "| a\\|b\\\\n | " in out
    assert list(json.loads((tmp_path / "v1.2.json").read_text())["commands"]) == ["a|b\n", "fake.py"]
    assert target.read_text() == "as it was"
    assert {path.name for path in tmp_path.iterdir()} == {"fake.py", "precious", "v1.2.json", "v1.2.md"}


COMMITTED = sorted((ROOT / "benchmark" / "results").glob("*.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_numbers_say_where_they_come_from(path):
    facts = json.loads(path.read_text())
    assert facts["command"].startswith("python -m benchmark") and re.fullmatch(r"[0-9a-f]{7,}", facts["commit"])


def test_environments_alone(tmp_path):
    """python -m benchmark.env_only takes a script's flags."""
    command = f"{throughput.PYTHON} -m benchmark.env_only ppo --num-envs 3 --total-timesteps {{steps}}"
    assert throughput.measure(command, 3000, str(tmp_path))[0] > 0


def test_nothing_can_be_measured(benchmark, monkeypatch):
    monkeypatch.setattr(throughput, "measure", MEASURE)
    code, out, err = benchmark("a=false {steps}", modes=[])
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == "a failed: exit code 1: no message"


def test_a_command_that_does_not_heed_the_steps(benchmark, monkeypatch):
    monkeypatch.setattr(throughput, "measure", lambda command, steps, directory: (1.0, 10.0))
    code, _, err = benchmark(modes=["eager"])
    assert code == 1
    assert "take no longer; does the command use {steps}?" in err


def test_number_of_threads(benchmark, monkeypatch, tmp_path):
    """All commands get it, and the numbers say so."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # is put back after the test
    monkeypatch.setattr(throughput, "measure", MEASURE)
    command = "sh -c 'sleep $(expr {steps} / 1000)e-2; exit $(expr $OMP_NUM_THREADS - 1)'"
    settings = {"modes": [], "steps": 1000, "seconds": 0.1, "rounds": 1, "output": tmp_path / "speed.json"}
    code, _, err = benchmark(f"peer={command}", **settings)
    assert code == 1 and "exit code 6" in err
    assert benchmark(f"peer={command}", threads=1, **settings)[0] == 0
    assert json.loads((tmp_path / "speed.json").read_text())["threads"] == "1"
    with pytest.raises(InputError, match="--threads"):
        benchmark(f"peer={command}", threads=0, **settings)


def test_number_of_environments(benchmark, monkeypatch):
    """With a batch size, more environments make shorter rollouts; the environments alone are measured beside them."""
    commands = []
    monkeypatch.setattr(throughput, "measure", lambda command, steps, _: (commands.append(command), (steps, 1.0))[1])
    code, out, _ = benchmark(num_envs=[1, 4], batch_size=512)
    assert code == 0
    assert list(rows(out))[2:] == ["1 envs", "1 envs, environments alone", "4 envs", "4 envs, environments alone"]
    assert any("--num-envs 4 --num-steps 128" in command for command in commands)
    assert any("-m benchmark.env_only fake" in command and "--num-envs 4" in command for command in commands)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peer": ["CleanRL"]}, "--peer must be NAME=COMMAND with {steps} in the command, not 'CleanRL'"),
        ({"peer": ["a=train 100"]}, "--peer must be NAME=COMMAND with {steps}"),
        ({"peer": ["a=x {steps}", "a=y {steps}"]}, "two peers have the name a"),
        ({"peer": ["a=x '{steps}"]}, "--peer a: No closing quotation"),
        ({"peer": ["ppo.py=x {steps}"]}, "a peer cannot have the name ppo.py: that is our script's"),
        ({"script": "ppo_quantum"}, "there is no script .*ppo_quantum.py"),
        ({"rounds": 0}, "--steps, --rounds, --threads and --seconds must be above 0"),
        ({"num_envs": [4, 0]}, "--num-envs must be above 0"),
        ({"num_envs": [4, 16], "batch_size": 8}, "--num-envs must be above 0, and not above --batch-size"),
        ({"flags": "'"}, "--flags: No closing quotation"),
        ({"output": ROOT / "LICENSE" / "speed"}, "cannot write to .*LICENSE/speed"),
    ],
)
def test_bad_input(settings, message):
    with pytest.raises(InputError, match=re.escape(message) if "*" not in message else message):
        throughput.main(throughput.Args(**settings))


def test_ctrl_c_ends_the_training_under_way(monkeypatch, tmp_path):
    """A benchmark that is interrupted leaves no process behind."""
    started = []

    def interrupted(pid, options):
        started.append(pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "wait4", interrupted)
    with pytest.raises(KeyboardInterrupt):
        throughput.measure("sleep 60", 1, str(tmp_path))
    assert not Path(f"/proc/{started[0]}").exists()


def test_provenance_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance.provenance()["commit"] == "unknown"
