"""The benchmark's command line: python -m benchmark COMMAND ... (--help after a command shows its options).

Each command is a module of this package with a dataclass Args and a function main(args) that returns the exit code.
Only the module of the command at hand is imported: drawing a figure needs no launcher, and running a suite no plots.
"""

import contextlib
import importlib
import io
import itertools
import os
import re
import sys

import tyro

from benchmark.suite import InputError, similar
from benchmark.text import printable

COMMANDS = {
    "run": "start what is missing of a suite, resume what was interrupted, skip what is finished",
    "plot": "draw a suite's learning curves, and write its table",
    "compare": "say whether variants or suites differ: differences with intervals, figure and tables",
    "sweep": "search for good values of flags with Optuna",
    "report": "make one interactive page of all runs of suites",
    "export": "write a suite's metrics as event files for TensorBoard",
    "upload": "send a suite's runs to Weights & Biases",
    "throughput": "measure the speed of training, side by side with other programs",
}


def is_ruler(line: str) -> bool:
    """Whether a line separates parts of a message."""
    return not line.strip("─-╰╯")


def parse(kind: type, words: list[str], prog: str):
    """Reads a command's options; raises InputError for those that it does not have."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(kind, args=words, prog=prog)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        # tyro draws a box, in ASCII where there is nothing else. Below its title stands what is wrong, and below the
        # next ruler or empty line what was tried and what may have been meant.
        lines = [line.strip("│ ") for line in box.getvalue().splitlines()[1:]]
        lines = itertools.dropwhile(is_ruler, lines)
        message = " ".join(" ".join(itertools.takewhile(lambda line: not is_ruler(line), lines)).split())
        if match := re.match(r"Error parsing (\S+): no type matching \{None\}\|(.+) could .* from \[(.+)\]", message):
            option, kind, given = match.groups()
            message = f"{option} takes {kind.strip('{}')}, not {given}"
        raise InputError(message) from None


def main(words: list[str]) -> int:
    """Runs a command; returns the exit code: 2 for bad input, else what the command says."""
    if hasattr(sys.stdout, "reconfigure"):  # a name that the terminal cannot show is no reason to stop
        sys.stdout.reconfigure(errors="backslashreplace")
    command = words[0] if words else "--help"
    if command in ("-h", "--help"):
        print("usage: python -m benchmark COMMAND ...\n")
        print("\n".join(f"  {name:12}{what}" for name, what in COMMANDS.items()))
        return 0 if words else 2
    try:
        if command not in COMMANDS:
            raise InputError(f"there is no command {command}{similar(command, COMMANDS)}")
        module = importlib.import_module(f"benchmark.{command}")
        code = module.main(parse(module.Args, words[1:], f"python -m benchmark {command}"))
        sys.stdout.flush()  # here, where it can be said what happens if that fails
        return code
    except InputError as error:
        print(f"benchmark {printable(command)}: error: {printable(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # who read the output has gone, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes stdout
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
