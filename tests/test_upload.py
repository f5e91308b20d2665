"""Uploading runs: offline, what is written is read back; online, by a service that is made up."""

import fcntl
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from synthetic import make_run, make_suite, metrics, offline_records

from benchmark import upload
from benchmark.__main__ import main as benchmark


@pytest.fixture
def suite(tmp_path):
    """A suite of three jobs: one run with a video, one without, and one that is unfinished."""
    return make_finished(tmp_path)


def make_finished(tmp_path: Path) -> Path:
    """Writes the suite and the runs; returns the suite's file."""
    made = make_suite(tmp_path, env_ids=["A-v0"], seeds=[1, 2, 3])
    for seed, updates in ((1, 20), (2, 20), (3, 6)):
        make_run(tmp_path / "runs", "A-v0", seed, range(updates))
    (tmp_path / "runs/A-v0__ppo__1__1700000001/videos").mkdir()
    (tmp_path / "runs/A-v0__ppo__1__1700000001/videos/episode-0.mp4").write_bytes(b"a video")
    return made


@pytest.fixture
def send(suite, tmp_path, capsys):
    """Runs the command; returns exit code, stdout and stderr."""

    def run(*words):
        code = benchmark(["upload", str(suite), f"--runs-dir={tmp_path / 'runs'}", "--project=trials", *words])
        return code, *capsys.readouterr()

    return run


def local_files(tmp_path) -> dict:
    """What the runs consist of, without what uploading adds."""
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files if "wandb" not in path.parts and path.name != upload.RECORD}


class Sent(NamedTuple):
    """What Weights & Biases has been sent of a run."""

    runs: list  # what each message about the run itself says
    config: dict
    history: list[dict]
    steps: list[int]  # of the history's rows
    files: list[str]
    artifacts: list[tuple[str, list[str]]]  # type and files


def read_offline(file: Path) -> Sent:
    """What is in a file that wandb has written offline."""
    sent = Sent([], {}, [], [], [], [])
    for record in offline_records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            sent.runs.append(record.run)
            sent.config.update({item.key: json.loads(item.value_json) for item in record.run.config.update})
        elif kind == "history":
            keys = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            sent.steps.append(record.history.step.num)
            sent.history.append({key: value for key, value in keys.items() if not key.startswith("_")})
        elif kind == "files":
            sent.files.extend(item.path for item in record.files.files)
        elif kind == "artifact" or kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            artifact = record.artifact if kind == "artifact" else record.request.log_artifact.artifact
            sent.artifacts.append((artifact.type, [entry.path for entry in artifact.manifest.contents]))
    return sent


def test_offline(tmp_path, monkeypatch, capsys):
    """The written files hold all that the runs hold; a second upload writes nothing."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))
    wandb.teardown()  # what other tests have set must not last
    tmp_path /= "[1] *?"  # in which glob patterns must not be seen
    tmp_path.mkdir()
    made = make_finished(tmp_path)

    def send(*words):
        code = benchmark(["upload", str(made), f"--runs-dir={tmp_path / 'runs'}", "--project=trials", *words])
        return code, *capsys.readouterr()

    before = local_files(tmp_path)
    code, out, err = send("--tags", "first", "second")
    assert (code, err) == (0, "A-v0__ppo__3__1700000003 is not sent: it is unfinished\n")
    assert "default/trials (offline): 2 sent, 1 unfinished" in out
    wandb.teardown()  # until then it may still be writing
    assert local_files(tmp_path) == before
    for seed, videos in ((1, ["videos/episode-0.mp4"]), (2, [])):
        path = tmp_path / f"runs/A-v0__ppo__{seed}__{1_700_000_000 + seed}"
        (file,) = path.glob("wandb/offline-run-*/run-*.wandb")
        sent = read_offline(file)
        assert {(run.run_id, run.display_name, run.project, run.run_group, tuple(run.tags)) for run in sent.runs} == {
            (path.name, path.name, "trials", "made", ("first", "second"))
        }
        assert sent.config["seed"] == seed and sent.config["total_timesteps"] == 10240
        assert sent.history == metrics(path)
        assert sent.steps == list(range(40))
        assert [name for name in sent.files if name.startswith("videos")] == videos
        assert sent.artifacts == [("code", ["ppo.py"])]
    code, out, _ = send("--tags", "first", "second")
    assert code == 0
    assert "default/trials (offline): 2 there already, 1 unfinished" in out
    assert len(list(tmp_path.glob("runs/*/wandb/offline-run-*"))) == 2
    wandb.teardown()


class Service:
    """Stands for Weights & Biases: keeps what it is sent, by run, and can break off."""

    def __init__(self):
        self.rows, self.files, self.breaks_after, self.asked = {}, {}, None, 0

    def init(self, **given):
        """Starts or continues a run."""
        self.asked += 1
        if self.breaks_after == 0:
            raise ConnectionError("no route\nto host")
        assert given["resume"] == "allow" and given["id"] == given["name"]
        return ServiceRun(self, given["id"])

    def run(self, path):
        """The run as the service's API has it."""
        return type("ApiRun", (), {"lastHistoryStep": len(self.rows[path]) - 1})


class ServiceRun:
    """A run that is being sent."""

    offline = False

    def __init__(self, service, path):
        self.service, self.path = service, path
        self.rows = service.rows.setdefault(path, [])
        self.starting_step = len(self.rows)

    def log(self, row, step):
        """Takes a row, unless the connection breaks."""
        if self.service.breaks_after is not None:
            if self.service.breaks_after == 0:
                raise ConnectionError("the connection is lost")
            self.service.breaks_after -= 1
        assert step == len(self.rows)
        self.rows.append(row)

    def define_metric(self, *_, **__):
        """Is not looked at."""

    log_code = save = finish = define_metric


@pytest.fixture
def service(monkeypatch):
    """Takes the place of wandb's connection."""
    import wandb

    service = Service()
    monkeypatch.setenv("WANDB_MODE", "online")
    wandb.teardown()
    monkeypatch.setattr(wandb, "init", service.init)
    monkeypatch.setattr(wandb, "Api", lambda: service)
    yield service
    wandb.teardown()


def test_goes_on_after_a_broken_connection(send, service, tmp_path):
    """What has arrived is not sent again, and in the end each line is there once."""
    service.breaks_after = 55  # in the middle of the second run
    code, out, err = send()
    assert code == 1
    assert "A-v0__ppo__2__1700000002 is not sent: the connection is lost" in err
    assert "the same command goes on where this one stopped" in err
    assert "default/trials: 1 sent, 1 unfinished, 1 failed" in out
    assert [len(rows) for rows in service.rows.values()] == [40, 15]
    code, out, err = send()  # the network is still down
    assert code == 1
    assert "is not sent: no route to host" in err
    service.breaks_after = None
    code, out, _ = send()
    assert code == 0
    assert "default/trials: 1 sent, 1 there already, 1 unfinished" in out
    for name, rows in service.rows.items():
        assert rows == metrics(tmp_path / "runs" / name)
    asked = service.asked
    assert send()[0] == 0
    assert service.asked == asked


def test_a_lost_or_broken_record_changes_nothing(send, service, tmp_path):
    """The service knows what it has."""
    assert send()[0] == 0
    (tmp_path / "runs/A-v0__ppo__1__1700000001/uploaded.json").unlink()
    record = tmp_path / "runs/A-v0__ppo__2__1700000002/uploaded.json"
    for broken in ("{", "[]", '{"default/trials": 3}', '{"default/trials": {"lines": "x", "videos": []}}'):
        record.write_text(broken)
        code, out, _ = send()
        assert code == 0 and "1 sent" in out or "2 sent" in out
        assert [len(rows) for rows in service.rows.values()] == [40, 40]


def test_broken_and_running_runs(send, service, tmp_path):
    """They are not sent, in one line each, and the others are."""
    runs = tmp_path / "runs"
    config = json.loads((runs / "A-v0__ppo__1__1700000001/config.json").read_text())
    (runs / "A-v0__ppo__1__1700000001/config.json").write_text(json.dumps(config | {"num_steps": "128"}))
    with open(runs / "A-v0__ppo__2__1700000002/metrics.jsonl", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, out, err = send()
    assert code == 1
    assert err.splitlines() == [
        "A-v0__ppo__1__1700000001 is not sent: in config.json num_steps is '128'",
        "A-v0__ppo__2__1700000002 is not sent: it is still running",
        "A-v0__ppo__3__1700000003 is not sent: it is unfinished",
    ]
    assert out == "default/trials: 2 unfinished, 1 broken\n"
    assert send()[1].endswith("default/trials: 1 sent, 1 unfinished, 1 broken\n")


def test_torn_line(send, service, tmp_path):
    """It is said which one it is; the other run is sent."""
    path = tmp_path / "runs/A-v0__ppo__1__1700000001/metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], lines[3][:20], *lines[4:], ""]))
    code, out, err = send()
    assert code == 1 and "1 sent, 1 unfinished, 1 failed" in out
    assert "A-v0__ppo__1__1700000001 is not sent: line 4 of its metrics.jsonl is broken\n" in err


def test_links_are_not_followed(send, service, tmp_path, monkeypatch):
    """A run directory of somebody else's cannot have files sent, or written over, that are not its own."""
    saved, run = [], tmp_path / "runs/A-v0__ppo__1__1700000001"
    monkeypatch.setattr(ServiceRun, "save", lambda self, path, **_: saved.append(path))
    (tmp_path / "precious").write_text("{}")
    (run / "videos/secret.mp4").symlink_to(tmp_path / "precious")
    for name in ("uploaded.json", "uploaded.json.tmp"):
        (run / name).symlink_to(tmp_path / "precious")
    assert send()[0] == 0
    assert saved == [run / "videos/episode-0.mp4"]
    assert (tmp_path / "precious").read_text() == "{}" and not (run / "uploaded.json").is_symlink()
    shutil.rmtree(run / "videos")
    (run / "videos").symlink_to(tmp_path)
    (tmp_path / "other.mp4").touch()
    assert send()[0] == 0 and len(saved) == 1
    other = tmp_path / "runs/A-v0__ppo__2__1700000002"
    (other / "wandb").symlink_to(tmp_path)
    (other / "uploaded.json").unlink()
    code, _, err = send()
    assert code == 1 and f"{other.name} is not sent: its folder wandb is a symbolic link" in err


def test_lines_that_do_not_arrive(send, service, monkeypatch):
    """A run counts as sent only if the service says so; without a network it gives up soon."""
    monkeypatch.setattr(ServiceRun, "log", lambda run, row, step: None)
    code, out, err = send()
    assert code == 1
    assert err.count("only 0 of 40 lines have arrived") == 2
    assert "stopped after 2 failures in a row" in err


def test_another_destination_gets_everything(send, service, tmp_path):
    assert send()[0] == 0
    service.rows.clear()
    code, out, _ = send("--entity", "team")
    assert code == 0 and "team/trials: 2 sent" in out
    record = json.loads((tmp_path / "runs/A-v0__ppo__1__1700000001/uploaded.json").read_text())
    assert record == dict.fromkeys(["default/trials", "team/trials"], {"lines": 40, "videos": ["episode-0.mp4"]})


@pytest.mark.parametrize(("mode", "message"), [("ofline", "Input should be 'online'"), ("disabled", "nothing")])
def test_mode_in_which_nothing_can_be_sent(send, tmp_path, monkeypatch, mode, message):
    import wandb

    monkeypatch.setenv("WANDB_MODE", mode)
    wandb.teardown()
    code, out, err = send()
    wandb.teardown()
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("benchmark upload: error: ") and message in err
    assert not list((tmp_path / "runs").rglob(upload.RECORD))


def test_no_runs(suite, tmp_path, capsys):
    assert benchmark(["upload", str(suite), f"--runs-dir={tmp_path / 'nothing'}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "no runs of suite made in" in err
