"""Event files for TensorBoard, read again by the definition of their format."""

import struct
from pathlib import Path

import numpy as np
import pytest
from synthetic import BATCH, make_run, make_suite, metrics

from benchmark import export
from benchmark.__main__ import main


def test_checksum():
    """The check value of CRC-32C, and its masking."""
    (masked,) = struct.unpack("<I", export.checksum(b"123456789"))
    rotated = (masked - 0xA282EAD8) & 0xFFFFFFFF
    assert (rotated >> 17 | rotated << 15) & 0xFFFFFFFF == 0xE3069283


@pytest.mark.parametrize("number", [0, 1, 127, 128, 300, 2**31, 2**53])
def test_varint(number):
    data = export.varint(number)
    assert sum((byte & 0x7F) << 7 * place for place, byte in enumerate(data)) == number
    assert all(byte & 0x80 for byte in data[:-1]) and not data[-1] & 0x80


def fields(data: bytes):
    """Number and contents of each field of a message."""

    def varint() -> int:
        nonlocal data
        number = place = 0
        while True:
            byte, data = data[0], data[1:]
            number |= (byte & 0x7F) << place
            place += 7
            if byte < 0x80:
                return number

    while data:
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(key & 7) or varint()
        yield key >> 3, data[:size]
        data = data[size:]


def read(path: Path) -> list[dict]:
    """The events in a file: time, step, and values by tag."""
    data, found = path.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        contents = data[12 : 12 + size]
        assert data[8:12] == export.checksum(data[:8])
        assert data[12 + size : 16 + size] == export.checksum(contents)
        data, event = data[16 + size :], dict(fields(contents))
        values = [dict(fields(value)) for number, value in fields(event.get(5, b"")) if number == 1]
        found.append({"version": event.get(3), "time": struct.unpack("<d", event[1])[0], "step": event.get(2)})
        found[-1] |= {value[1].decode(): struct.unpack("<f", value[2])[0] for value in values}
    return found


def test_export(tmp_path, capsys):
    """Every line is an event with the same numbers; null is left out, and so is a line that was torn."""
    suite = make_suite(tmp_path, ["A-v0"], [1, 2], updates=4)
    paths = [make_run(tmp_path / "runs", "A-v0", seed, [1.5, 2.5, -1e6, 4.5], 4) for seed in (1, 2)]
    with open(paths[0] / "metrics.jsonl", "a") as file:
        file.write('{"global_step": 9, "wall_ti')
    for _ in range(2):  # the second time changes nothing
        assert main(["export", str(suite), f"--runs-dir={tmp_path / 'runs'}"]) == 0
        out = capsys.readouterr().out
        assert out == f"2 runs; look at them with: tensorboard --logdir {tmp_path / 'runs/tensorboard'}\n"
        for path in paths:
            (file,) = (tmp_path / "runs/tensorboard" / path.name).iterdir()
            assert "tfevents" in file.name
            version, *events = read(file)
            assert version["version"] == b"brain.Event:2"
            rows = metrics(path) if path != paths[0] else metrics(paths[1])
            assert len(events) == len(rows) == 8
            created = int(path.name.rpartition("__")[2])
            for event, row in zip(events, rows):
                assert event.pop("time") == created + row.pop("wall_time")
                assert event.pop("step") == row.pop("global_step")
                del event["version"]
                row = {name: np.float32(value) for name, value in row.items() if value is not None}
                assert event == row
    assert events[-1]["losses/entropy"] == 0.5 and rows[-1].get("charts/SPS") == 1000 and 4 * BATCH == 2048


def test_bad_input(tmp_path, capsys):
    suite = make_suite(tmp_path, ["A-v0"], [1])
    words = ["export", str(suite), f"--runs-dir={tmp_path / 'runs'}"]
    assert main(words) == 2
    assert f"no runs of suite made in {tmp_path / 'runs'}" in capsys.readouterr().err
    path = make_run(tmp_path / "runs", "A-v0", 1, [1] * 20)
    (tmp_path / "file").touch()
    assert main([*words, f"--output={tmp_path / 'file'}"]) == 2
    assert "cannot write to " in capsys.readouterr().err
    (path / "config.json").write_text("{")
    assert main(words) == 1
    assert "is broken: config.json" in capsys.readouterr().err
