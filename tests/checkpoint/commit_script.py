"""A whole run of the commit protocol with two tiny shards; `python commit_script.py OUT`.

Driven by the fault tests, so it imports as little as it can.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pymerge.checkpoint.header import encode_header
from pymerge.checkpoint.layout import OutputTensor, ShardLayout
from pymerge.checkpoint.staging import Staging
from pymerge.dtypes import DType
from pymerge.errors import OutputError, PymergeError

PLAN = {"recipe": "ties", "inputs": [{"path": "a", "size": 3}, {"path": "b", "size": 4}]}
SIDE_FILES = {"config.json": b"{}\n", "README.md": b"# merged\n"}
MANIFEST = {"version": 1}
NAMES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def layout(file_name: str, *, count: int = 5000) -> ShardLayout:
    """A shard of two U8 tensors."""
    tensors = tuple(OutputTensor(f"{file_name}.{i}", DType.U8, (count + i,)) for i in range(2))
    header, offsets = encode_header([(t.name, t.dtype, t.shape) for t in tensors], {"format": "pt"})
    return ShardLayout(file_name, header, offsets, len(header) + 2 * count + 1, tensors)


def data_of(tensor: OutputTensor) -> bytes:
    """Bytes that depend on the name alone."""
    return (tensor.name.encode() * tensor.size)[: tensor.size]


def write_shard(staging: Staging, shard: ShardLayout) -> None:
    fd = staging.create(shard)
    for tensor in shard.tensors:
        try:
            os.pwrite(fd, data_of(tensor), shard.offsets[tensor.name])
        except OSError as error:
            raise OutputError(f"tensor {tensor.name}: {error}") from error
    staging.finish(shard, fd, {"tensors": len(shard.tensors)})


def run(out: Path) -> None:
    if out.exists():
        return
    with Staging.open(out, PLAN) as staging:
        for shard in map(layout, NAMES):
            if not staging.done(shard):
                write_shard(staging, shard)
        staging.publish(SIDE_FILES, MANIFEST)


if __name__ == "__main__":
    try:
        run(Path(sys.argv[1]))
    except PymergeError as error:
        sys.exit(f"error: {error}")
