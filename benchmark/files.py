"""Locks on files, and files that are written whole.

Nothing here follows a symbolic link when it writes: a link in a directory that somebody else has made could lead
anywhere.
"""

import contextlib
import os
import secrets
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def take_lock(path: Path) -> int | None:
    """Locks a file, which is created if need be; returns its descriptor, or None if it is locked already.

    The lock belongs to the open file: it lasts until every process that has inherited the descriptor has closed it or
    died, and needs no cleaning up. The file stays, for removing it would let two processes lock two files of one name.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666)
    try:
        if fcntl:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def is_locked(path: Path) -> bool:
    """Whether a process holds this lock.

    It is tried with a shared lock, held for a moment: so two that look at the same time do not see each other.
    """
    if not fcntl:
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # which a named pipe does not block
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


def is_running(run_dir: Path) -> bool:
    """Whether a process trains in this run directory: it locks metrics.jsonl for as long as it does."""
    return is_locked(run_dir / "metrics.jsonl")


def open_to_append(path: Path) -> BinaryIO:
    """Opens a file to write at its end, unbuffered; raises OSError if it is a symbolic link."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NO_LINK, 0o666), "ab", buffering=0)


def write_file(path: Path, contents: str | bytes) -> None:
    """Replaces a file at once: a kill or a full disk leaves the old one, or none, and nothing beside it.

    What is written has a name of its own until it is complete. A symbolic link is replaced, not followed.
    """
    data = contents.encode() if isinstance(contents, str) else contents
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")  # short: the file's own name may have no room for more
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINK, 0o666), "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
