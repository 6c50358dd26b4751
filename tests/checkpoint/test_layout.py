"""How the output is cut into files; huggingface_hub's names and safetensors' alignment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors
from huggingface_hub import split_state_dict_into_shards_factory
from hypothesis import given
from hypothesis import strategies as st

from pymerge.checkpoint.index import open_checkpoint
from pymerge.checkpoint.layout import OutputTensor, ShardLayout, index_json, lay_out, parse_size
from pymerge.dtypes import DType
from pymerge.errors import PymergeError


def tensors(*sizes: int) -> list[OutputTensor]:
    return [OutputTensor(f"t{i:02d}", DType.U8, (size,)) for i, size in enumerate(sizes)]


def names_of(layouts: tuple[ShardLayout, ...]) -> list[list[str]]:
    return [[tensor.name for tensor in layout.tensors] for layout in layouts]


def write_all(folder: Path, layouts: tuple[ShardLayout, ...]) -> None:
    for layout in layouts:
        (folder / layout.file_name).write_bytes(layout.header + bytes(layout.size - len(layout.header)))


def test_one_file_needs_no_index() -> None:
    layouts = lay_out(tensors(3, 4), 7)
    assert [layout.file_name for layout in layouts] == ["model.safetensors"]
    assert index_json(layouts) is None
    assert layouts[0].size == len(layouts[0].header) + 7


def test_files_are_filled_in_the_given_order() -> None:
    # 6+2 fits, the 12 is larger than a file may be and stands alone, at once; 3 does not fit any more.
    layouts = lay_out(tensors(6, 2, 12, 2, 3, 10), 10)
    assert names_of(layouts) == [["t02"], ["t00", "t01", "t03"], ["t04"], ["t05"]]
    assert [layout.file_name for layout in layouts] == [
        f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)
    ]


@given(st.lists(st.integers(0, 12), max_size=30), st.integers(1, 10))
def test_files_are_those_of_huggingface_hub(sizes: list[int], limit: int) -> None:
    wanted = tensors(*sizes)
    split = split_state_dict_into_shards_factory(
        {tensor.name: tensor for tensor in wanted},
        get_storage_size=lambda tensor: tensor.size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    layouts = lay_out(wanted, limit)
    files = [layout.file_name for layout in layouts]
    assert dict(zip(files, names_of(layouts), strict=True)) == split.filename_to_tensors


def test_index_lists_every_tensor_sorted() -> None:
    layouts = lay_out(list(reversed(tensors(6, 6, 6))), 10)
    text = index_json(layouts)
    assert text is not None
    assert json.loads(text) == {
        "metadata": {"total_size": 18},
        "weight_map": {f"t{i:02d}": f"model-{3 - i:05d}-of-00003.safetensors" for i in range(3)},
    }
    assert list(json.loads(text)["weight_map"]) == ["t00", "t01", "t02"]
    assert text.endswith(b"}\n")


def test_inside_a_file_wide_types_come_first_then_names() -> None:
    mixed = [
        OutputTensor("b", DType.BF16, (3,)),
        OutputTensor("z", DType.F32, (1,)),
        OutputTensor("a", DType.BF16, (5, 1)),
        OutputTensor("u", DType.U8, (7,)),
        OutputTensor("d", DType.F64, ()),
    ]
    (layout,) = lay_out(mixed, 1000)
    assert names_of((layout,)) == [["d", "z", "a", "b", "u"]]
    start = len(layout.header)
    assert layout.offsets == {"d": start, "z": start + 8, "a": start + 12, "b": start + 22, "u": start + 28}
    assert all(layout.offsets[tensor.name] % tensor.dtype.itemsize == 0 for tensor in layout.tensors)


def test_the_files_can_be_opened(tmp_path: Path) -> None:
    layouts = lay_out([OutputTensor(f"w{i}", DType.BF16, (i, 2)) for i in range(9)], 40)
    write_all(tmp_path, layouts)
    (tmp_path / "model.safetensors.index.json").write_bytes(index_json(layouts) or b"")
    found = open_checkpoint(tmp_path)
    for layout, shard in zip(layouts, found.shards, strict=True):
        assert {name: entry.begin for name, entry in shard.header.tensors.items()} == layout.offsets
        with safetensors.safe_open(shard.path, "np") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert set(opened.keys()) == set(layout.offsets)


def test_nothing_to_write_is_no_file() -> None:
    assert lay_out([], 10) == ()
    assert index_json(()) is None


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="must differ"):
        lay_out(tensors(1) * 2, 10)
    with pytest.raises(ValueError, match="at least one byte"):
        lay_out(tensors(1), 0)


def test_time_is_linear() -> None:
    many = [
        OutputTensor(f"model.layers.{i}.experts.down_proj.weight", DType.BF16, (128, 64))
        for i in range(36_000)
    ]
    layouts = lay_out(many, 5_000_000)
    assert sum(len(layout.tensors) for layout in layouts) == 36_000
    assert index_json(layouts)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000),
        ("500MB", 500_000_000),
        ("1.5GB", 1_500_000_000),
        (" 2 tb ", 2_000_000_000_000),
        ("10kb", 10_000),
        ("4GiB", 4 * 2**30),
        ("256MiB", 256 * 2**20),
        ("3G", 3_000_000_000),
        ("1234", 1234),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-5GB", "5XB", "5iB", "0GB", "0.1", "1e9", "nan", "٣GB", "9" * 40, "5 G B"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(PymergeError, match="is not a size"):
        parse_size(text)


def test_sizes_in_parameters_are_refused() -> None:
    with pytest.raises(PymergeError, match="'5B' would be single bytes, not billions; did you mean 5GB"):
        parse_size("5B")
