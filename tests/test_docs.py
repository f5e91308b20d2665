"""What the documents say about the code is true, and their examples work.

After a change of the scripts, python docs/index_details.py writes the line numbers into docs/details.md anew.
"""

import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from dataclasses import fields

import forking
import pytest
from conftest import ROOT

from benchmark.throughput import table

spec = importlib.util.spec_from_file_location("index_details", ROOT / "docs/index_details.py")
index_details = importlib.util.module_from_spec(spec)
spec.loader.exec_module(index_details)

SCRIPTS = index_details.SCRIPTS
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs/results.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "tests/fixtures/README.md"]
PLACEHOLDER = "runs/CartPole-v1__ppo__1__1700000000"
TAG = re.compile(r"\[((?:core|atari|continuous|lstm|multidiscrete|aux|procgen|extra)-\d+)\]")


def module(script):
    return importlib.import_module(script.removesuffix(".py"))


def blocks(language):
    """The README's code blocks in a language."""
    return [textwrap.dedent(text) for text in re.findall(rf"(?ms)^ *```{language}\n(.*?)^ *```$", README)]


def block(language, contained):
    """The one of them that contains a text."""
    (found,) = [text for text in blocks(language) if contained in text]
    return found


def execute(words, cwd, by_python=False):
    """Runs python with these words in a directory with the repository importable; returns what it printed.

    In a process that need not import anything, or in one that Python itself starts, as it does for a user.
    """
    variables = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    options = {"cwd": cwd, "env": os.environ | variables}
    if by_python:
        result = subprocess.run([sys.executable, *words], capture_output=True, text=True, **options)
    else:
        result = forking.run(words, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_details_page_is_up_to_date():
    """If this fails: python docs/index_details.py."""
    assert (ROOT / "docs/details.md").read_text() == index_details.page()


def test_every_tag_is_indexed_and_every_indexed_detail_is_in_the_code():
    in_code = {tag for script in SCRIPTS for tag in TAG.findall((ROOT / script).read_text())}
    assert in_code == set(index_details.DETAILS)
    for tag in index_details.DETAILS:
        assert any(index_details.where(tag, script) for script in SCRIPTS), f"{tag} is only in a flag's help"


def test_no_number_of_the_details_is_left_out():
    page = index_details.page()
    numbers = {
        "core": 13,
        "atari": 9,
        "continuous": 9,
        "lstm": 5,
        "aux": 4,
        "multidiscrete": 1,
        "procgen": 2,
        "extra": 40,
    }
    for kind, count in numbers.items():
        for number in range(1, count + 1):
            assert re.search(rf"\b{kind}-{number}\b", page), f"{kind}-{number}"


COUNTS = {"core": 13, "atari": 9, "continuous": 9, "lstm": 5, "multidiscrete": 1, "procgen": 2}
SCRIPT_TAGS = [
    ("ppo.py", ["core"]),
    ("ppo_continuous.py", ["core", "continuous"]),
    ("ppo_atari.py", ["core", "atari"]),
    ("ppo_atari_envpool.py", ["core", "atari"]),
    ("ppo_atari_multigpu.py", ["core", "atari"]),
    ("ppo_lstm.py", ["core", "lstm"]),
    ("ppo_atari_lstm.py", ["core", "lstm"]),
    ("ppo_procgen.py", ["core", "procgen"]),
    ("ppo_multidiscrete.py", ["core", "multidiscrete"]),
]


@pytest.mark.parametrize("script, kinds", SCRIPT_TAGS)
def test_all_details_are_there(script, kinds):
    expected = {f"{kind}-{n + 1}" for kind in kinds for n in range(COUNTS[kind])}
    if "ppo.py" not in script and "continuous" not in script:
        expected.discard("core-13")  # images and memory have a shared network
    assert expected <= set(TAG.findall((ROOT / script).read_text()))


def test_indexed_flags_exist():
    names = {field.name for script in SCRIPTS for field in fields(module(script).Args)}
    for _, flags, _ in index_details.DETAILS.values():
        for flag in flags.split():
            name = flag.removeprefix("--").replace("-", "_")
            assert name in names or name.removeprefix("no_") in names, flag


def requirements(name="requirements.txt"):
    lines = (ROOT / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_inline_dependencies_are_those_of_requirements(script):
    """The PEP 723 block of a script pins what requirements.txt pins, and names all that the script imports."""
    inline_block = re.search(r"(?m)^# /// script\n((?:# ?.*\n)+?)# ///$", (ROOT / script).read_text()).group(1)
    metadata = tomllib.loads(re.sub(r"(?m)^# ?", "", inline_block))
    both = metadata["dependencies"], requirements()
    inline, pinned = ({re.sub(r"\[.*?\]", "", line) for line in lines} for lines in both)
    assert inline and inline <= pinned  # extras aside: not every script needs pygame
    named = {line.split("=")[0] for line in inline}
    libraries = "ale_py|cv2|envpool|gymnasium|numpy|torch|tqdm|tyro|wandb|scipy|matplotlib"
    imported = set(re.findall(rf"(?m)^\s*(?:import|from) ({libraries})", (ROOT / script).read_text()))
    packages = {"ale_py": "ale-py", "cv2": "opencv-python-headless"}
    assert {packages.get(name, name) for name in imported} <= named


def test_requirements_are_pinned():
    lines = requirements() + requirements("requirements-llm.txt")
    assert all(re.fullmatch(r"[\w.\[\]-]+==[\w.]+(; sys_platform == 'linux')?", line) for line in lines)


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_have_help_and_lines_have_at_most_120_columns(script):
    source = (ROOT / script).read_text()
    for field in fields(module(script).Args):
        assert re.search(rf"(?m)^    {field.name}: .+ = .+  # \w.+$", source), field.name
    assert max(map(len, source.splitlines())) <= 120


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def commands():
    """The README's commands that start one of the scripts."""
    lines = [line for text in blocks("bash") for line in text.splitlines()]
    return [line for line in lines if re.match(r"(python|torchrun --\S+) ppo", line)]


def words_of(command):
    """Script and flags of such a command."""
    words = shlex.split(command.removeprefix("python "))
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[place], words[place + 1 :]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The run directory of a short training of ppo.py."""
    folder = tmp_path_factory.mktemp("readme")
    flags = ["--total-timesteps", "1024", "--runs-dir", str(folder)]
    execute([ROOT / "ppo.py", *flags], folder)
    (path,) = folder.glob("CartPole*")
    return path


# One update or more, with all defaults, or, of the scripts with convolutions, with few steps of each environment.
STEPS = {
    "ppo.py": ["1024"],
    "ppo_continuous.py": ["2048"],
    "ppo_lstm.py": ["1024"],
    "ppo_multidiscrete.py": ["2048"],
    "ppo_procgen.py": ["256", "--num-steps", "4"],
}
# No other test starts ppo_procgen.py as a user does.
BY_PYTHON = ("python ppo_procgen.py", "python ppo.py --env-id Acrobot-v1")


@pytest.mark.slow
@pytest.mark.parametrize("command", [line for line in commands() if "--amp" not in line])
def test_the_readmes_commands_work(command, finished_run, tmp_path):
    """All but those that need a GPU, with fewer steps, and of torchrun's with two processes."""
    script, flags = words_of(command)
    if PLACEHOLDER in flags:
        shutil.copytree(finished_run, tmp_path / PLACEHOLDER)
    start = []
    if command.startswith("torchrun"):
        assert re.fullmatch(r"--nproc-per-node=\d+", shlex.split(command)[1])
        start += ["-c", forking.TORCHRUN, "--standalone", "--nproc-per-node=2"]
    shorter = ["--total-timesteps", *STEPS.get(script, ["256", "--num-steps", "16"])]
    expected = r"\d+ steps, mean return "
    if "--help" in flags or "--evaluate" in flags:
        shorter, expected = [], "--total-timesteps" if "--help" in flags else r"return .* over 10 episodes"
    by_python = command.startswith(BY_PYTHON)
    assert re.search(expected, execute([*start, ROOT / script, *flags, *shorter], tmp_path, by_python))


def test_the_readmes_other_flags_exist():
    """Those of the commands that need a GPU, and those named in sentences."""
    known = {field.name for script in SCRIPTS for field in fields(module(script).Args)}
    known |= {"help", "nproc_per_node", "index_url", "preload", "forest", "space"}  # the last three are the harness's
    for flag in set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", README)):
        name = flag.replace("-", "_")
        assert name in known or name.removeprefix("no_") in known, flag


@pytest.mark.slow
def test_the_readmes_network_can_be_trained(tmp_path):
    source = (ROOT / "ppo.py").read_text()
    new = textwrap.indent(block("python", "nn.ReLU()"), "        ") + "\n"
    source, count = re.subn(r"(?s)(?<=super\(\).__init__\(\)\n)\n        def hidden_layers.*?(?=    def forward)",
                            lambda _: new, source)  # fmt: skip
    assert count == 1
    (tmp_path / "my_ppo.py").write_text(source)
    flags = ["--total-timesteps", "30000", "--learning-rate", "1e-3"]
    printed = execute(["my_ppo.py", *flags], tmp_path)
    assert float(re.search(r"mean return ([\d.]+)", printed).group(1)) > 60  # at random: 22


@pytest.mark.slow
def test_the_readmes_environment_can_be_trained(tmp_path):
    """As the README says: a module in the working directory, the script anywhere."""
    (tmp_path / "reach.py").write_text(block("python", "class Reach"))
    words = [ROOT / "ppo_continuous.py", "--env-id", "reach:Reach-v0", "--total-timesteps", "2048"]
    assert "2048 steps, mean return -" in execute(words, tmp_path)


@pytest.mark.slow
def test_the_readmes_suite_can_be_run(tmp_path):
    """With the README's environment, and a copy of a script beside the suite's file."""
    (tmp_path / "reach.py").write_text(block("python", "class Reach"))
    (tmp_path / "reach.toml").write_text(block("toml", "reach:Reach"))
    shutil.copy(ROOT / "ppo_continuous.py", tmp_path / "my_ppo.py")
    words = ["-m", "benchmark", "run", "reach.toml", "--seeds", "2", "--extra=--total-timesteps 2048"]
    execute(words, tmp_path, by_python=True)
    (run,) = (tmp_path / "runs/reach").glob("reach*Reach-v0__my_ppo__2__*")
    assert json.loads((run / "config.json").read_text())["total_timesteps"] == 2048


@pytest.mark.slow
def test_the_readmes_comparison_works(tmp_path):
    """With fewer steps, in one environment, with two seeds."""
    shutil.copy(ROOT / "ppo.py", tmp_path / "my_ppo.py")
    (tmp_path / "mine.toml").write_text(block("toml", 'my_ppo.py"]').replace("100000", "1024"))
    run, compare = (shlex.split(line)[1:] for line in block("bash", "benchmark compare").splitlines())
    # One worker, for each imports the script.
    execute([*run, "--seeds", "1", "2", "--env-ids", "CartPole-v1", "--workers", "1"], tmp_path, by_python=True)
    printed = execute(compare, tmp_path, by_python=True)
    (row,) = [line for line in printed.splitlines() if line.startswith("| CartPole-v1 | mine |")]
    assert "| +0.0 | " in row and "Welch's t, 2 seeds" in row  # the copy is the same
    assert {path.name for path in (tmp_path / "compare").glob("*.png")} == {"mine.png", "mine_forest.png"}


def test_the_readmes_agent_can_be_loaded(finished_run, tmp_path):
    source = block("python", "load_state_dict")
    assert PLACEHOLDER in source
    printed = execute(["-c", source.replace(PLACEHOLDER, str(finished_run))], tmp_path)
    assert re.fullmatch(r"action [01] value -?[\d.]+(e-\d+)?\n", printed)


@pytest.mark.slow
def test_the_readmes_search_runs(tmp_path):
    source = block("python", "import optuna")
    shorter = source.replace("100_000", "1024").replace("n_trials=20", "n_trials=2")
    assert shorter.count("1024") == shorter.count("n_trials=2") == 1
    printed = execute(["-c", shorter], tmp_path)
    assert "learning_rate" in printed and len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.parametrize("name", ["classic", "classic_shared", "mujoco", "lstm", "pong", "lstm_pong", "multidiscrete"])
def test_curves_tables_are_those_of_the_committed_results(name):
    rows = (ROOT / f"benchmark/results/{name}.md").read_text().splitlines()[2:]
    assert rows and all(row in RESULTS for row in rows)


SPEEDS = [
    ("throughput", ["CleanRL", "Stable-Baselines3", "PureJaxRL"]),
    ("throughput_epyc_avx512", ["CleanRL", "Stable-Baselines3", "PureJaxRL", "ppo.py --compile at dadd27d"]),
    ("throughput_continuous_epyc_avx512", ["CleanRL", "Stable-Baselines3"]),
    ("throughput_atari_epyc_avx512", ["CleanRL"]),
    ("throughput_64_envs_epyc_avx512", ["PureJaxRL", "ppo.py --compile at 8901970"]),
    ("throughput_1024_envs_epyc_avx512", ["PureJaxRL", "ppo.py --compile at 8901970"]),
    ("throughput_continuous_avx512", ["CleanRL", "Stable-Baselines3"]),
    ("throughput_atari_avx512", ["CleanRL"]),
    ("throughput_lstm_avx512", ["CleanRL"]),
    ("throughput_multidiscrete", ["MaskablePPO"]),
    ("throughput_continuous", ["CleanRL", "Stable-Baselines3", "SBX"]),
    ("throughput_atari", ["CleanRL"]),
    ("throughput_lstm", ["CleanRL"]),
]


@pytest.mark.parametrize("name, peers", SPEEDS)
def test_speeds_are_those_of_the_committed_results(name, peers):
    measured = json.loads((ROOT / f"benchmark/results/{name}.json").read_text())
    expected = table(measured["steps_per_second"], measured["peak_mib"], peers).strip()
    assert expected.splitlines()[0] in RESULTS and "median of the rounds' ratios" in expected
    assert all(row in RESULTS for row in expected.splitlines()[2:])


def test_the_readmes_numbers_are_those_of_the_results():
    """Every number with a deviation or a number of seeds or times CleanRL's is in a row of docs/results.md."""
    cells = [cell.strip() for row in README.splitlines() if row.startswith("|") for cell in row.strip("|").split("|")]
    numbers = [cell for cell in cells if re.search(r"\d seeds?\)|^[\d,.]+x?$", cell)]
    assert len(numbers) == 20
    for number in numbers:
        assert re.search(rf"\| {re.escape(number)} \|", RESULTS), number
