"""Philox4x32-10, the counter-based generator behind random trims, mirrored by csrc/core/philox.h.

A word depends on (seed, tensor name, element index, expert) and on nothing else, so a mask is the same for
any thread count, tile size, device, order or resume. Source: Salmon, Moraes, Dror, Shaw, "Parallel random
numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:  # a merge of checkpoints needs the keys alone, and no numpy
    import numpy as np
    from numpy.typing import NDArray

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
MASK32 = 0xFFFFFFFF

Words: TypeAlias = "NDArray[np.uint32]"


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Ten rounds over counters of shape (4, n) with one key; returns 4 words per counter, shape (4, n)."""
    import numpy as np

    c0, c1, c2, c3 = (word.astype(np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(ROUNDS):
        p0 = c0 * np.uint64(MULTIPLIERS[0])
        p1 = c2 * np.uint64(MULTIPLIERS[1])
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & np.uint64(MASK32),
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & np.uint64(MASK32),
        )
        k0 = (k0 + KEY_STEPS[0]) & MASK32
        k1 = (k1 + KEY_STEPS[1]) & MASK32
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def tensor_key(seed: int, name: str) -> tuple[int, int]:
    """The key of one tensor: 8 bytes of blake2b over the seed (8 bytes, little endian) and the UTF-8 name."""
    message = (seed & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little") + name.encode("utf-8")
    digest = blake2b(message, digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def element_words(key: tuple[int, int], expert: int, count: int) -> Words:
    """One word for each element 0..count-1 of a tensor, for one expert; shape (count,).

    Element i takes word i % 4 of counter (low 32 bits of i // 4, high 32 bits, expert, 0).
    """
    import numpy as np

    block = np.arange((count + 3) // 4, dtype=np.uint64)
    counter = np.zeros((4, block.size), dtype=np.uint32)
    counter[0] = block & np.uint64(MASK32)
    counter[1] = block >> np.uint64(32)
    counter[2] = expert
    return philox4x32(counter, key).T.reshape(-1)[:count]


def keep_below(density: float) -> int:
    """An element is kept when its word is below this: floor(density * 2^32)."""
    return int(density * 4294967296.0)
