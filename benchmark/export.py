"""Writes the metrics of a suite's runs as event files for TensorBoard.

    python -m benchmark export classic                # into runs/classic/tensorboard
    tensorboard --logdir runs/classic/tensorboard

It is done here and not while a script trains: all that TensorBoard can show is in metrics.jsonl, so that eleven scripts
are spared the same lines, old runs can be looked at as well, and a resumed run has no steps twice. Repeating it writes
the files anew. Nothing has to be installed: an event file is a sequence of records, each with its length and
checksums, and a record is a Protocol Buffers message of three fields.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmark.files import write_file
from benchmark.plot import note
from benchmark.suite import InputError, intact_runs, is_number, load_suite, parse_line, writing
from benchmark.text import printable


def crc_table() -> list[int]:
    """CRC-32C (Castagnoli) of each byte."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


CRC = crc_table()


@dataclass
class Args:
    """Writes the metrics of a suite's runs as event files for TensorBoard."""

    suite: tyro.conf.Positional[str]
    """name of a suite in benchmark/suites, or a .toml file"""
    runs_dir: Path | None = None
    """where the run directories are; default: runs/SUITE"""
    output: Path | None = None
    """where the event files are written, in a folder for each run; default: tensorboard beside the run directories"""


def checksum(data: bytes) -> bytes:
    """TFRecord's masked CRC-32C."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def record(data: bytes) -> bytes:
    """A TFRecord: length, its checksum, data, their checksum."""
    length = struct.pack("<Q", len(data))
    return length + checksum(length) + data + checksum(data)


def varint(number: int) -> bytes:
    """A whole number from 0 as Protocol Buffers have it: seven bits a byte, the lowest first."""
    data = bytearray()
    while number > 0x7F:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*data, number])


def block(field: int, data: bytes) -> bytes:
    """A field that is a string or a message."""
    return varint(field << 3 | 2) + varint(len(data)) + data


def event(wall_time: float, step: int, values: dict[str, float]) -> bytes:
    """tensorflow.Event: wall_time = 1, step = 2, summary = 5; each value in it has tag = 1 and simple_value = 2."""
    each = [block(1, block(1, tag.encode()) + b"\x15" + struct.pack("<f", value)) for tag, value in values.items()]
    return b"\x09" + struct.pack("<d", wall_time) + b"\x10" + varint(step) + block(5, b"".join(each))


def events(run_dir: Path) -> bytes:
    """The event file of a run; lines of its metrics that are torn, and values that are no numbers, are left out."""
    created = int(run_dir.resolve().name.rpartition("__")[2])
    version = b"\x09" + struct.pack("<d", created) + block(3, b"brain.Event:2")
    records = [record(version)]
    for row in map(parse_line, (run_dir / "metrics.jsonl").read_bytes().splitlines()):
        if row and row["global_step"] >= 0:
            step, seconds = int(row.pop("global_step")), row.pop("wall_time")
            # A float32 holds numbers up to 3.4e38.
            values = {name: float(x) for name, x in row.items() if is_number(x) and abs(x) < 3e38}
            records.append(record(event(created + seconds, step, values)))
    return b"".join(records)


def main(args: Args) -> int:
    """Writes a file for each run; returns 1 if a run could not be read."""
    suite = load_suite(args.suite)
    runs_dir = args.runs_dir or suite.runs_dir
    output = args.output or runs_dir / "tensorboard"
    runs, problems = intact_runs(suite, runs_dir)
    if not runs and not problems:
        raise InputError(f"no runs of suite {suite.name} in {runs_dir}")
    with writing(output):
        for state in runs.values():
            name = state.path.name
            (output / name).mkdir(parents=True, exist_ok=True)
            write_file(output / name / f"events.out.tfevents.{name.rpartition('__')[2]}.ppo37", events(state.path))
    for problem in problems:
        note(problem)
    print(f"{len(runs)} runs; look at them with: tensorboard --logdir {printable(output)}")
    return 1 if problems else 0
