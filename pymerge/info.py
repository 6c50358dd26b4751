"""What this installation can do on this machine."""

from __future__ import annotations

import platform
from importlib.util import find_spec
from typing import Any

from pymerge.backends.native import cpu_features
from pymerge.run.settings import missing_for
from pymerge.version import NUMERICS_VERSION, VERSION


def gather() -> dict[str, Any]:
    """Versions, processor features, threads and backends, JSON-ready."""
    return {
        "pymerge": VERSION,
        "numerics": NUMERICS_VERSION,
        "python": platform.python_version(),
        "processor": platform.machine(),
        **cpu_features(),
        "backends": ["cpu", *_torch_backends()],
        "merge --backend": [
            "cpu",
            *(f"{name} ({missing_for(name) or 'ready'})" for name in ("cuda", "triton")),
        ],
    }


def _torch_backends() -> list[str]:
    if not find_spec("torch"):
        return []
    return [
        *(["cuda"] if find_spec("pymerge._cuda") else []),
        "reference",
        *(["triton"] if find_spec("triton") else []),
    ]
