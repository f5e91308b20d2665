"""What the documents say about the code is true."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from dataclasses import fields

import pytest
from conftest import ROOT

import ppo
import ppo_atari
import ppo_continuous
import ppo_lstm

ARGS = (ppo.Args, ppo_atari.Args, ppo_continuous.Args, ppo_lstm.Args)
spec = importlib.util.spec_from_file_location("index_details", ROOT / "docs/index_details.py")
index_details = importlib.util.module_from_spec(spec)
spec.loader.exec_module(index_details)

TAG = re.compile(r"\[((?:core|atari|continuous|lstm|multidiscrete|aux|procgen|extra)-\d+)\]")


def test_details_page_is_up_to_date():
    assert (ROOT / "docs/details.md").read_text() == index_details.page()


def test_every_tag_is_indexed_and_every_indexed_detail_is_in_the_code():
    in_code = {tag for script in index_details.SCRIPTS for tag in TAG.findall((ROOT / script).read_text())}
    assert in_code == set(index_details.DETAILS)
    for tag in index_details.DETAILS:
        assert index_details.where(tag), f"{tag} is only in a flag's help"


SCRIPT_TAGS = (
    ("ppo.py", ["core"]),
    ("ppo_atari.py", ["core", "atari"]),
    ("ppo_continuous.py", ["core", "continuous"]),
    ("ppo_lstm.py", ["core", "lstm"]),
)
COUNTS = {"core": 13, "atari": 9, "continuous": 9, "lstm": 5}


def test_all_details_are_there():
    for script, tags in SCRIPT_TAGS:
        expected = {f"{tag}-{n + 1}" for tag in tags for n in range(COUNTS[tag])}
        assert expected <= set(TAG.findall((ROOT / script).read_text()))


def test_indexed_flags_and_tests_exist():
    names = {field.name for args in ARGS for field in fields(args)}
    for title, flags, test in index_details.DETAILS.values():
        for flag in flags.split():
            name = flag.removeprefix("--").replace("-", "_")
            assert name in names or name.removeprefix("no_") in names, flag
        file, function = test.split("::")
        assert f"def {function}(" in (ROOT / "tests" / file).read_text(), title


def requirements():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("script", index_details.SCRIPTS)
def test_inline_dependencies_are_those_of_requirements(script):
    """The PEP 723 block of a script pins what requirements.txt pins, and names all that the script imports."""
    block = re.search(r"(?m)^# /// script\n((?:# ?.*\n)+?)# ///$", (ROOT / script).read_text()).group(1)
    metadata = tomllib.loads(re.sub(r"(?m)^# ?", "", block))
    both = metadata["dependencies"], requirements()
    inline, pinned = ({re.sub(r"\[.*?\]", "", line) for line in lines} for lines in both)
    assert inline and inline <= pinned  # extras aside: not every script needs pygame
    named = {line.split("=")[0] for line in inline}
    libraries = "ale_py|cv2|envpool|gymnasium|numpy|torch|tqdm|tyro|wandb|scipy|matplotlib"
    imported = set(re.findall(rf"(?m)^\s*(?:import|from) ({libraries})", (ROOT / script).read_text()))
    packages = {"ale_py": "ale-py", "cv2": "opencv-python-headless"}
    assert {packages.get(name, name) for name in imported} <= named


def test_requirements_are_pinned():
    assert all(re.fullmatch(r"[\w.\[\]-]+==[\w.]+(; sys_platform == 'linux')?", line) for line in requirements())


def test_flags_have_help_and_readme_commands_exist():
    known = {"peer", "seconds", "rounds", "output", "workers", "help", "script", "batch_size", "nproc_per_node", "add"}
    for script, args in zip(index_details.SCRIPTS, ARGS, strict=True):
        source = (ROOT / script).read_text()
        for field in fields(args):
            assert re.search(rf"(?m)^    {field.name}: .+ = .+  # \w.+$", source), field.name
            known.add(field.name)
    for flag in set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", (ROOT / "README.md").read_text())):
        assert flag.replace("-", "_").removeprefix("no_") in known, flag


def test_scripts_stay_within_120_columns():
    for script in index_details.SCRIPTS:
        assert max(map(len, (ROOT / script).read_text().splitlines())) <= 120


def test_the_readmes_environment_can_be_trained(tmp_path):
    """As the README says: a module in the working directory, the script anywhere."""
    module = textwrap.dedent(re.search(r"(?s) *```python\n(.*?)```", (ROOT / "README.md").read_text()).group(1))
    (tmp_path / "reach.py").write_text(module)
    command = [sys.executable, ROOT / "ppo_continuous.py", "--env-id", "reach:Reach-v0", "--total-timesteps", "2048"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "2048 steps, mean return -" in result.stdout


def test_the_readmes_suite_can_be_run(tmp_path):
    """With the README's environment, and a copy of a script beside the suite's file."""
    readme = (ROOT / "README.md").read_text()
    for language, name in (("toml", "reach.toml"), ("python", "reach.py")):
        block = re.search(rf"(?s) *```{language}\n(.*?)```", readme).group(1)
        (tmp_path / name).write_text(textwrap.dedent(block))
    shutil.copy(ROOT / "ppo_continuous.py", tmp_path / "my_ppo.py")
    command = [sys.executable, "-m", "benchmark", "run", "reach.toml", "--seeds", "2", "--extra=--total-timesteps 2048"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (run,) = (tmp_path / "runs/reach").glob("reach-Reach-v0__my_ppo__2__*")
    assert json.loads((run / "config.json").read_text())["total_timesteps"] == 2048
