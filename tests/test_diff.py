"""Comparing checkpoints: units in the last place, values, names, types."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from made import SHAPES, write_checkpoint, write_file

from pymerge import diff as module
from pymerge.cli import main
from pymerge.diff import Difference, TensorDifference, describe, diff
from pymerge.dtypes import DType

PACK = {DType.F64: "<d", DType.F32: "<f", DType.F16: "<e", DType.I32: "<i"}


def write(path: Path, dtype: DType, *values: float) -> Path:
    if dtype is DType.BF16:
        data = b"".join(struct.pack("<f", value)[2:] for value in values)
    else:
        data = b"".join(struct.pack(PACK[dtype], value) for value in values)
    write_file(path, {"x": (dtype, (len(values),), data)})
    return path


def one(found: Difference) -> TensorDifference:
    assert len(found.tensors) == 1
    return found.tensors[0]


def test_equal_checkpoints_with_different_shards(tmp_path: Path) -> None:
    a = write_checkpoint(tmp_path / "a", 1, shards=1)
    b = write_checkpoint(tmp_path / "b", 1, shards=3)
    found = diff(a, b)
    assert found.is_equal
    assert found.compared == len(SHAPES)
    assert describe(found) == (
        "5 tensors compared (2,079 elements): 5 equal bit for bit, 0 different; 0 only in A, 0 only in B"
    )


@pytest.mark.parametrize(
    ("dtype", "a", "b", "ulp", "absolute"),
    [
        (DType.F32, 1.0, float(np.nextafter(np.float32(1), np.float32(2))), 1, 2.0**-23),
        (DType.F64, 1.0, float(np.nextafter(1.0, 0)), 1, 2.0**-53),
        (DType.F16, 1.0, 1.0 + 2.0**-9, 2, 2.0**-9),
        (DType.BF16, 1.0, 1.0 + 2.0**-7, 1, 2.0**-7),
        (DType.BF16, 3.0, -3.0, 2 * 0x4040 + 1, 6.0),
        (DType.F32, 0.0, -0.0, 1, 0.0),
        (DType.F64, -1.0, 1.0, 2 * 0x3FF0000000000000 + 1, 2.0),
        (DType.F32, 1.0, float("inf"), 0x7F800000 - 0x3F800000, None),
        (DType.F16, float("nan"), 1.0, 0x7E00 - 0x3C00, None),
        (DType.I32, 5, -2, None, 7.0),
        (DType.F64, 1.7e308, -1.7e308, 2 * int(np.float64(1.7e308).view(np.int64)) + 1, None),
    ],
)
def test_distances(
    dtype: DType, a: float, b: float, ulp: int | None, absolute: float | None, tmp_path: Path
) -> None:
    found = diff(
        write(tmp_path / "a.safetensors", dtype, 4, a), write(tmp_path / "b.safetensors", dtype, 4, b)
    )
    assert one(found) == TensorDifference("x", 2, 1, ulp, absolute)
    assert not found.is_equal


def test_equal_nans_and_infinities_are_equal(tmp_path: Path) -> None:
    values = (float("nan"), float("inf"), -0.0)
    assert diff(
        write(tmp_path / "a.safetensors", DType.F32, *values),
        write(tmp_path / "b.safetensors", DType.F32, *values),
    ).is_equal


def test_the_largest_distance_of_all_tiles_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE", 2)
    a = write(tmp_path / "a.safetensors", DType.BF16, 1, 1, 2, 1, 1)
    b = write(tmp_path / "b.safetensors", DType.BF16, 1, 1.0078125, 4, 1, 1.0078125)
    assert one(diff(a, b)) == TensorDifference("x", 5, 3, 128, 2.0)


def test_other_types_and_shapes(tmp_path: Path) -> None:
    a = write(tmp_path / "a.safetensors", DType.F32, 1, 2, 3)
    b = write(tmp_path / "b.safetensors", DType.BF16, 1, 2, 3.5)
    assert one(diff(a, b)) == TensorDifference("x", 3, 1, None, 0.5, "F32 against BF16")
    c = write(tmp_path / "c.safetensors", DType.I32, 1, 2, 3)
    assert one(diff(a, c)) == TensorDifference("x", 3, 3, None, None, "F32 against I32")
    d = write(tmp_path / "d.safetensors", DType.F32, 1, 2)
    assert one(diff(a, d)) == TensorDifference("x", 3, 3, None, None, "shape [3] against [2]")


def test_the_command_exits_with_1_and_names_everything(tmp_path: Path) -> None:
    a = write_checkpoint(tmp_path / "a", 1)
    b = write_checkpoint(tmp_path / "b", 2, shapes={"norm": (8,), "new": (2,)})
    result = CliRunner().invoke(main, ["diff", str(a), str(b)])
    assert result.exit_code == 1
    assert "only in A: 'a.weight'" in result.stdout
    assert "only in B: 'new'" in result.stdout
    assert "'norm'" in result.stdout
    assert (
        "1 tensors compared (8 elements): 0 equal bit for bit, 1 different; 4 only in A, 1 only in B"
        in result.stdout
    )
    found = json.loads(CliRunner().invoke(main, ["diff", str(a), str(b), "--json"]).stdout)
    assert (found["equal"], found["only_b"], found["tensors"][0]["name"]) == (False, ["new"], "norm")
    same = CliRunner().invoke(main, ["diff", str(a), str(a)])
    assert same.exit_code == 0


def test_a_truncated_file_is_an_error(tmp_path: Path) -> None:
    a = write(tmp_path / "a.safetensors", DType.F32, 1, 2, 3)
    (tmp_path / "b.safetensors").write_bytes(a.read_bytes()[:-1])
    result = CliRunner().invoke(main, ["diff", str(a), str(tmp_path / "b.safetensors")])
    assert (result.exit_code, "b.safetensors" in result.stderr) == (2, True)


def test_the_worst_come_first_and_the_rest_are_counted(tmp_path: Path) -> None:
    names = [f"t{number:02}" for number in range(30)]
    for folder, step in (("a", 0.0), ("b", 1.0)):
        tensors = {
            name: (DType.F32, (1,), struct.pack("<f", 1 + step * number)) for number, name in enumerate(names)
        }
        extra = {f"{folder}{number:02}": (DType.F32, (0,), b"") for number in range(25)}
        write_file(tmp_path / f"{folder}.safetensors", {**tensors, **extra})
    command = ["diff", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    lines = CliRunner().invoke(main, command).stdout.splitlines()
    assert lines[19:22] == ["only in A: 'a19'", "... and 5 more (--all lists them)", "only in B: 'b00'"]
    rows = [line.split()[-1] for line in lines[43:63]]
    assert rows == [repr(name) for name in reversed(names)][:20]
    assert lines[63:] == [
        "... and 9 more (--all lists them)",
        "30 tensors compared (30 elements): 1 equal bit for bit, 29 different; 25 only in A, 25 only in B",
        "largest distance: 40,894,464 units in the last place, in 't29'",
        "largest difference: 29, in 't29'",
    ]
    assert len(CliRunner().invoke(main, [*command, "--all"]).stdout.splitlines()) == 50 + 1 + 29 + 3
    found = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
    assert (found["largest_ulp"], found["largest_absolute"], len(found["tensors"])) == ("t29", "t29", 29)
