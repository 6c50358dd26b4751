"""The hash that follows a merge is the hash of the file."""

from __future__ import annotations

import hashlib
import random
import tempfile

from pymerge.dtypes import DType
from pymerge.job import Region, TensorJob
from pymerge.run.hasher import ShardHasher


def test_following_in_steps_gives_the_hash_of_the_file() -> None:
    draw = random.Random(1)
    data = bytearray(draw.randbytes(3_000_000))
    jobs, at = [], 128
    while at < len(data):
        count = min(draw.choice([0, 1, 777, 600_000]), (len(data) - at) // 2)
        jobs.append(TensorJob("", count, None, (), Region(DType.BF16, at, 0), None))
        at += max(count * 2, 2)
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(bytes(len(data)))
        hasher = ShardHasher(file.fileno(), jobs)
        hasher.follow(0)
        for finished in sorted(draw.choices(range(1, len(jobs) + 1), k=5)):
            # Only what the finished jobs cover is final; the rest of the file is not there yet.
            end = jobs[finished - 1].out.start + 2 * jobs[finished - 1].count
            file.seek(0)
            file.write(data[:end])
            hasher.follow(finished)
        file.seek(0)
        file.write(data)
        assert hasher.digest() == hashlib.sha256(data).hexdigest()
