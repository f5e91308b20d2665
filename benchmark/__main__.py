"""The benchmark's command line: python -m benchmark COMMAND ... (--help after a command shows its options).

Each command is a module of this package with a dataclass Args and a function main(args) that returns the exit code.
Only the module of the command at hand is imported: drawing a figure needs no launcher, and running a suite no plots.
"""

import contextlib
import importlib
import io
import sys

import tyro

from benchmark.suite import InputError, similar

COMMANDS = {
    "run": "start what is missing of a suite, resume what was interrupted, skip what is finished",
    "plot": "draw a suite's learning curves, and write its table",
    "report": "make one interactive page of all runs of suites",
    "upload": "send a suite's runs to Weights & Biases",
    "throughput": "measure the speed of training, side by side with other programs",
    "ablations": "measure what switching a detail off does to learning",
}


def parse(kind: type, words: list[str], prog: str):
    """Reads a command's options; raises InputError for those that it does not have."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(kind, args=words, prog=prog)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        # tyro draws a box around what is wrong; below a ruler in it follows what may have been meant.
        lines = " ".join(line.strip("│ ") for line in box.getvalue().splitlines()[1:-1])
        raise InputError(" ".join(lines.split("───")[0].split())) from None


def main(words: list[str]) -> int:
    """Runs a command; returns the exit code: 2 for bad input, else what the command says."""
    command = words[0] if words else "--help"
    if command in ("-h", "--help"):
        print("usage: python -m benchmark COMMAND ...\n")
        print("\n".join(f"  {name:12}{what}" for name, what in COMMANDS.items()))
        return 0 if words else 2
    try:
        if command not in COMMANDS:
            raise InputError(f"there is no command {command}{similar(command, COMMANDS)}")
        module = importlib.import_module(f"benchmark.{command}")
        return module.main(parse(module.Args, words[1:], f"python -m benchmark {command}"))
    except InputError as error:
        print(f"benchmark {command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
