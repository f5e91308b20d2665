"""Where numbers come from: the command, commit, versions and machine that are written beside every result."""

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "numpy", "gymnasium", "mujoco", "envpool", "ale-py", "scipy")


def git(*words: str) -> str:
    """What git says about this repository; nothing where there is no git or no repository."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The short name of the commit that is checked out, with "+changes" if files differ from it."""
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.toml")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+changes" if changed else "")


def processor() -> str:
    """The processor's name; Python's platform.processor() has none on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that results depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found


def provenance() -> dict:
    """Command, commit, machine and versions, as the results have them."""
    command = shlex.join(["python", "-m", "benchmark", *sys.argv[1:]])
    machine = f"{processor()}, {os.cpu_count()} cores, {platform.system()}"
    return {"command": command, "commit": commit(), "machine": machine, "versions": versions()}
