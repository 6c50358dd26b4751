"""One small merge in memory, for tests that vary how it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pymerge import merge_tensors

BASE = torch.linspace(-1, 1, 32).reshape(8, 4)
EXPERTS = [BASE + torch.sin(BASE * 7 * k) for k in (1, 2, 3)]
ARRAYS = [x.numpy().copy() for x in (BASE, *EXPERTS)]


def merged(base: Any = BASE, experts: Any = EXPERTS, **options: Any) -> Any:
    return merge_tensors(base, experts, **{"density": 0.5, **options})


def refused(kind: type[Exception], text: str, call: Callable[[], object]) -> None:
    """`call` raises `kind` in one sentence that matches `text`."""
    with pytest.raises(kind, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)
