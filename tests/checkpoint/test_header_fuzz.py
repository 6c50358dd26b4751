"""Mutated headers read by both readers: ours is never looser than the library's, and means the same."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import safetensors
from handmade import entry, raw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pymerge.checkpoint.header import read_header
from pymerge.errors import CheckpointError

U8 = entry("U8", [2], 0, 2)
TOKENS = [
    *'{}[]":,-0123456789 \n\t\0\x7f\\eutrfalsn.é',
    *(
        "true",
        "null",
        "NaN",
        "-0",
        "1e0",
        "2.0",
        "18446744073709551616",
        "9223372036854775808",
        "[0,2]",
        "{}",
    ),
    *(
        '"shape"',
        '"dtype"',
        '"data_offsets"',
        '"__metadata__"',
        '"U8"',
        '"BF16"',
        '"F4"',
        '"a":',
        '"b":',
        "[]",
    ),
    *(r"\u0061", r"\ud800", r"\ud83d\ude00", "\ufeff", '{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'),
]
SEEDS = [
    json.dumps({"a": U8, "b": entry("BF16", [1, 2], 2, 6), "__metadata__": {"format": "pt", "k": "v"}}),
    json.dumps({"a": entry("F4", [2, 2], 0, 2), "e": entry("F32", [0], 2, 2), "s": entry("F32", [], 2, 6)}),
    json.dumps({"a": entry("U8", [6], 0, 6)}, separators=(",", ":")),
]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    text = draw(st.sampled_from(SEEDS))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(text)))
        cut = draw(st.sampled_from([0, 0, 1, 1, 2, 5, 20]))
        text = text[:at] + draw(st.sampled_from(["", *TOKENS])) + text[at + cut :]
    size = draw(st.sampled_from([6, 6, 6, 6, 6, 6, 0, 2, 5, 7]))
    return raw(text.encode("utf-8"), bytes(size))


@settings(max_examples=1200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=mutated())
def test_never_looser_than_the_library(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    agrees_with_the_library(tmp_path_factory.getbasetemp() / "fuzz.safetensors", data)


def test_never_looser_under_many_small_changes(tmp_path: Path) -> None:
    """Far more cases than hypothesis can make in the time, each one or two tokens off a good header."""
    rng = random.Random(1)
    accepted = 0
    for _ in range(6_000):
        text = rng.choice(SEEDS)
        for _ in range(rng.choice([1, 1, 2])):
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice(["", *TOKENS]) + text[at + rng.choice([0, 0, 1, 1, 2, 5, 20]) :]
        accepted += agrees_with_the_library(tmp_path / "x.safetensors", raw(text.encode("utf-8"), bytes(6)))
    assert accepted > 150  # else the comparison would mean little


def agrees_with_the_library(path: Path, data: bytes) -> bool:
    path.write_bytes(data)
    try:
        ours = read_header(path)
    except CheckpointError:
        return False
    with safetensors.safe_open(path, "np") as theirs:  # raises, and so fails, where we were looser
        assert set(theirs.keys()) == set(ours.tensors)
        assert (theirs.metadata() or {}) == ours.metadata
        for name, found in ours.tensors.items():
            assert theirs.get_slice(name).get_dtype() == found.dtype.header_name
            assert tuple(theirs.get_slice(name).get_shape()) == found.shape
    table = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
    for name, found in ours.tensors.items():
        assert bytes(table[name]["data"]) == data[found.begin : found.end]
    return True


def test_the_fuzz_accepts_its_seeds(tmp_path: Path) -> None:
    for seed in SEEDS:
        assert agrees_with_the_library(tmp_path / "x.safetensors", raw(seed, bytes(6)))
