"""Draws the figures of docs/llm.md from their CSV files in benchmark/results, or measures these anew.

    python -m benchmark.llm_figures                            # docs/img/llm_search.png, llm_overoptimization.png
    python -m benchmark.llm_figures --search NAME=RUN_DIR ..   # accuracy of the searches with these models
    python -m benchmark.llm_figures --feedback RUN_DIR ..      # proxy and true score in these runs of ppo_rlhf.py

What is not measured anew is drawn from the CSV file that is there.
"""

import csv
import io
import json
import math
import shlex
from collections import defaultdict
from dataclasses import dataclass, fields, replace
from pathlib import Path

import tyro

from benchmark.files import write_file
from benchmark.provenance import provenance
from benchmark.suite import ROOT, InputError

RESULTS, IMAGES = ROOT / "benchmark" / "results", ROOT / "docs" / "img"
SEARCH, FEEDBACK = RESULTS / "llm_search.csv", RESULTS / "llm_overoptimization.csv"
COLORS = {"greedy": "#202020", "majority": "#e07b00", "best-of": "#2f8f4e", "guided": "#1763b8"}
COEFFICIENTS = {0.2: "#1763b8", 0.05: "#2f8f4e", 0.01: "#e07b00", 0.0: "#b3261e"}


@dataclass
class Args:
    """Draws the figures of docs/llm.md."""

    search: tuple[str, ...] = ()
    """runs of ppo_rlvr.py with a value network, as NAME=RUN_DIR, whose models are searched with anew"""
    feedback: tuple[Path, ...] = ()
    """runs of ppo_rlhf.py whose tests are read, and whose supervised starts are tried with best-of-N"""
    samples: tuple[int, ...] = (1, 4, 16, 64)
    """how many answers, or with guided tokens, there are to choose from"""
    num_test: int = 200
    """test problems that are searched"""


def settings(script, run_dir: Path, **changes):
    """A run's settings; those that its script did not have yet have their defaults."""
    saved = json.loads((run_dir / "config.json").read_text())
    known = {field.name for field in fields(script.Args)}
    return replace(script.Args(**{name: value for name, value in saved.items() if name in known}), **changes)


def write(path: Path, rows: list[dict], words: list[str], args: Args) -> None:
    """Writes rows as CSV, and beside it as JSON where they come from; words are those of the flag."""
    with io.StringIO() as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_file(path, file.getvalue())
    samples, flag = " ".join(map(str, args.samples)), "--search" if path == SEARCH else "--feedback"
    command = (
        f"python -m benchmark.llm_figures --samples {samples} --num-test {args.num_test} {flag} {shlex.join(words)}"
    )
    write_file(path.with_suffix(".json"), json.dumps(provenance() | {"command": command}, indent=1) + "\n")


def read(path: Path) -> list[dict]:
    """Rows of a CSV, numbers as such."""
    with open(path, newline="", encoding="utf-8") as file:
        return [
            {name: value if name in ("model", "search", "kind") else float(value) for name, value in row.items()}
            for row in csv.DictReader(file)
        ]


def measure_search(name: str, run_dir: Path, args: Args) -> list[dict]:
    """Accuracy and compute of all searches with the model of a run.

    Compute is the number of tokens that a network reads or writes for a problem, the prompt left aside: those of all
    answers, with best-of twice, for the value network reads them too, and with guided each token and its candidates.
    """
    import torch

    import ppo_rlvr as rlvr

    settings_now = settings(rlvr, run_dir, num_test=args.num_test, evaluate=str(run_dir))
    task, tests = rlvr.make_task(settings_now)
    agent, prompts = rlvr.Agent(settings_now), rlvr.make_prompts(task, tests, settings_now)
    rlvr.restore(run_dir.resolve(), agent)
    torch.manual_seed(settings_now.seed)
    greedy = rlvr.generate(agent.policy, *prompts, settings_now, greedy=True)
    tries = [rlvr.generate(agent.policy, *prompts, settings_now) for _ in range(max(args.samples))]
    rows = []
    for search, samples in [("greedy", 1)] + [(s, n) for s in ("majority", "best-of", "guided") for n in args.samples]:
        now = replace(settings_now, search=search, samples=samples)
        some = {"greedy": [greedy], "guided": []}.get(search, tries[:samples])
        some = some or [rlvr.guided_answers(agent, *prompts, now)]
        chosen = rlvr.choose(agent, task, some, now) if len(some) > 1 else [0] * len(tests)
        rewards = torch.stack([rlvr.judge(task, tests, answers, now)[0] for answers in some])
        tokens = sum(answers.mask.sum().item() for answers in some) / len(tests)
        rows.append({
            "model": name, "seed": now.seed, "search": search, "samples": samples,
            "compute": round(tokens * {"best-of": 2, "guided": 1 + samples}.get(search, 1), 2),
            "accuracy": round((rewards[chosen, range(len(tests))] >= 1).double().mean().item(), 4),
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def measure_feedback(run_dir: Path, best_of: bool, args: Args) -> list[dict]:
    """The tests in a run of ppo_rlhf.py and, if asked for, best-of-N with its supervised start."""
    import torch

    import ppo_rlhf as rlhf

    now = settings(rlhf, run_dir)
    names = ("eval/reference_kl", "eval/proxy_score", "eval/true_score")
    tests = [row for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()) if names[0] in row]
    found = [("ppo", now.kl_coef, row["global_step"], *(row[name] for name in names)) for row in tests]
    if best_of:
        task, problems = rlhf.make_task(now)
        agent = rlhf.Agent(now)
        rlhf.restore(run_dir.resolve(), agent)
        torch.manual_seed(now.seed)
        tries = [rlhf.sample_tests(agent.reference, agent, task, problems, now)[1] for _ in range(max(args.samples))]
        for count in args.samples:
            scores = torch.stack(tries[:count])
            proxy, true, _ = scores[scores[:, 0].argmax(0), :, range(len(problems))].mean(0).tolist()
            found.append(("best-of", 0, count, math.log(count) - (count - 1) / count, proxy, true))
    columns = ("kind", "kl_coef", "step_or_samples", "divergence", "proxy", "true")
    rounded = [[round(value, 4) if isinstance(value, float) else value for value in row] for row in found]
    return [{"seed": now.seed} | dict(zip(columns, row)) for row in rounded]


def draw_search(plt, rows: list[dict]):
    """One panel for each model, one line for each search and seed."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(1, len(models), figsize=(5.2 * len(models), 4.2), layout="constrained", sharey=True)
    for axis, model in zip(axes, models):
        lines = defaultdict(list)
        for row in rows:
            if row["model"] == model:
                lines[row["search"], row["seed"]].append((row["compute"], row["accuracy"], int(row["samples"])))
        for (search, seed), points in lines.items():
            x, y, samples = zip(*sorted(points))
            style = "-" if seed == max(row["seed"] for row in rows) else "--"
            axis.plot(x, y, style, color=COLORS[search], marker="o" if len(x) > 1 else "D", ms=5, linewidth=1.6)
        axis.set(xscale="log", title=model, xlabel="tokens for a problem, of all networks", ylim=(0, 1.03))
    axes[0].set_ylabel("accuracy on test problems")
    handles = [plt.Line2D([], [], color=color, marker="o") for color in COLORS.values()]
    seeds = sorted({int(row["seed"]) for row in rows})
    labels = [*COLORS]
    if len(seeds) > 1:
        handles += [plt.Line2D([], [], color="0.4", linestyle=style) for style in ("--", "-")]
        labels += [f"seed {seed}" for seed in seeds]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    samples = ", ".join(str(n) for n in sorted({int(row["samples"]) for row in rows}))
    figure.suptitle(f"Counting letters: searches with {samples} samples", fontsize=12, color="0.25")
    return figure


def draw_feedback(plt, rows: list[dict]):
    """Proxy and true score over the root of the divergence: PPO with each coefficient, and best-of-N."""
    figure, axes = plt.subplots(1, 2, figsize=(10.4, 4.4), layout="constrained", sharey=True)
    titles = {"proxy": "proxy: the reward model", "true": "true score, which PPO never sees"}
    for axis, (score, title) in zip(axes, titles.items()):
        lines = defaultdict(list)
        for row in rows:
            lines[row["kind"], row["kl_coef"], row["seed"]].append((max(row["divergence"], 0) ** 0.5, row[score]))
        for (kind, coefficient, _), points in lines.items():
            color, style = (COEFFICIENTS[coefficient], "-") if kind == "ppo" else ("#202020", "--")
            axis.plot(*zip(*points), style, color=color, marker="o", ms=3.5, linewidth=1.2, alpha=0.85)
        axis.set(title=title, xlabel="square root of the divergence from the supervised start", xlim=(0, None))
    axes[0].set_ylabel("mean score on test problems")
    handles = [plt.Line2D([], [], color=color, marker="o", ms=4) for color in COEFFICIENTS.values()]
    handles.append(plt.Line2D([], [], color="#202020", linestyle="--", marker="o", ms=4))
    labels = [f"PPO, --kl-coef {coefficient:g}" for coefficient in COEFFICIENTS] + ["best of 1, 4, 16, 64"]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    seeds = len({row["seed"] for row in rows})
    figure.suptitle(f"Over-optimization: {seeds} seeds, one line each", fontsize=12, color="0.25")
    return figure


def main(args: Args) -> None:
    """Measures what is asked for, and draws both figures."""
    if args.search:
        pairs = [name_and_run.rpartition("=")[::2] for name_and_run in args.search]
        rows = [row for name, run in pairs for row in measure_search(name, Path(run), args)]
        write(SEARCH, rows, [f"{name}={Path(run).name}" for name, run in pairs], args)
    if args.feedback:
        rows, tried = [], set()
        for run in args.feedback:
            seed = json.loads((run / "config.json").read_text())["seed"]
            rows += measure_feedback(run, seed not in tried, args)
            tried.add(seed)
        write(FEEDBACK, rows, [run.name for run in args.feedback], args)

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "0.9",
        "axes.axisbelow": True, "axes.edgecolor": "0.4", "font.size": 11, "axes.titlesize": 12,
    })  # fmt: skip
    for path, draw in ((SEARCH, draw_search), (FEEDBACK, draw_feedback)):
        if not path.exists():
            raise InputError(f"there is no {path}")
        contents = io.BytesIO()
        draw(plt, read(path)).savefig(contents, format="png", dpi=110, metadata={"Software": None})
        write_file(IMAGES / f"{path.stem}.png", contents.getvalue())


if __name__ == "__main__":
    main(tyro.cli(Args))
