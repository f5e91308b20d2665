"""The processes that need not import anything are processes like others."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forking
import pytest
from conftest import ROOT, kill_all_in


def test_what_python_does_with_words(tmp_path):
    """A script, a program and a module, in a folder, with an environment, output and an exit code."""
    (tmp_path / "words.py").write_text("import sys, beside; print(__name__, sys.argv); sys.exit(beside.CODE)")
    (tmp_path / "beside.py").write_text("CODE = 3")
    program = f"import runpy; runpy.run_path({str(tmp_path / 'words.py')!r}, run_name='__main__')"
    for words, code in (
        (["words.py", "a b"], 3),
        (["-m", "words", "c"], 3),
        (["-c", program], 3),
        (["-c", "import os, sys; print(os.environ); sys.exit('no')"], 1),
        (["-c", "1 / 0"], 1),
    ):
        options = {"cwd": tmp_path, "env": {"PYTHONPATH": str(tmp_path), "ONLY": "this"}}
        ours = forking.run(words, **options)
        expected = subprocess.run([sys.executable, *words], capture_output=True, text=True, **options)
        assert ours.returncode == expected.returncode == code
        if "os.environ" in words[1]:
            assert "'ONLY': 'this'" in ours.stdout and "PATH'" not in ours.stdout.replace("PYTHONPATH", "")
        else:
            assert ours.stdout == expected.stdout
        assert ours.stderr.splitlines()[-1:] == expected.stderr.splitlines()[-1:]


def test_signals_and_time_limits():
    with forking.Forked(["-c", "import time; time.sleep(60)"]) as process:
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        process.terminate()
        assert process.wait(20) == process.poll() == -signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
    program = "import signal; print(all(signal.getsignal(n) == signal.SIG_DFL for n in (1, 15, 17)), flush=True);" \
              "print(signal.getsignal(2) == signal.default_int_handler)"  # fmt: skip
    assert forking.run(["-c", program]).stdout == "True\nTrue\n"


def wait_until_gone(pid: int) -> None:
    """Waits for the end of a process that is not this one's child."""
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_outlives_the_tests(tmp_path):
    """A process that is forgotten, or whose test is killed, does not go on in the background."""
    process = forking.Forked(["-c", "import time; time.sleep(60)"])
    pid = process.pid
    del process
    wait_until_gone(pid)

    (tmp_path / "sleep.py").write_text("import time; time.sleep(60)")
    process = subprocess.Popen([sys.executable, "sleep.py"], cwd=tmp_path)
    kill_all_in(tmp_path)
    assert process.wait(20) == -signal.SIGKILL

    program = "import forking, os; print(forking.Forked(['-c', 'import time; time.sleep(60)']).pid, flush=True);" \
              "os.kill(os.getpid(), 9)"  # fmt: skip
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = forking.run(["-c", program], env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == -signal.SIGKILL
    wait_until_gone(int(done.stdout))
