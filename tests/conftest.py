"""Settings shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import pytest

# Loading by transformers must never reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


# Triton decides when it is imported whether its kernels are compiled or interpreted.
if not _has_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Hypothesis runs the same examples on every machine, and never fails for being on a slow one."""
    try:
        from hypothesis import HealthCheck, settings
    except ImportError:
        return
    settings.register_profile(
        "house",
        deadline=None,
        derandomize=True,
        max_examples=40,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    settings.load_profile("house")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default="1/1", help="2/8: the second of eight parts")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Several processes can share the tests, so that they compile kernels at the same time."""
    part, parts = map(int, config.getoption("--part").split("/"))
    items[:] = items[part - 1 :: parts]


@pytest.fixture(scope="session")
def fibers(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The CUDA kernels for the processor; half a minute of compiling."""
    from fibers import build, load

    return load(build(tmp_path_factory.mktemp("shim")))


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pymerge and mergekit made of every recipe of tests/parity; half a minute of merging."""
    from parity_run import merged_once

    base = tmp_path_factory.getbasetemp()
    # Processes of one run share the folder above their own.
    return merged_once(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)
