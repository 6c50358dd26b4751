"""Sessions: every merge is that of merge_tensors, bit for bit, and searches only what it does not know."""

from __future__ import annotations

import itertools
import re
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pymerge import Session, merge_tensors
from pymerge.backends import native
from pymerge.errors import BackendError, RecipeError
from pymerge.session import MOST_KEPT

EXPERTS = 3


def model(seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"b": (300, 200), "a": (70,), "empty": (0, 3), "scalar": ()}
    # Of one common part, so that the experts are near the base.
    common = torch.Generator().manual_seed(9)
    found = {
        name: (
            torch.randn(shape, generator=common) * 0.02 + seed * torch.randn(shape, generator=draw) * 1e-3
        ).to(dtype)
        for name, shape in shapes.items()
    }
    return {**found, "steps": torch.tensor([7])}


BASE, MODELS = model(0), [model(seed) for seed in range(1, EXPERTS + 1)]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    x, y = (tensor.reshape(-1).view(torch.uint8) for tensor in (a, b))
    return a.dtype is b.dtype and bool(torch.equal(x, y))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[native.Report]:
    """The reports of all runs of the compiled core."""
    reports: list[native.Report] = []
    execute = native.NativeRun.execute

    def counted(run: native.NativeRun) -> native.Report:
        reports.append(execute(run))
        return reports[-1]

    monkeypatch.setattr(native.NativeRun, "execute", counted)
    return reports


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_every_merge_is_that_of_merge_tensors(backend: str) -> None:
    session = Session(BASE, MODELS, backend=backend)
    for density, scope, weight, lambda_ in itertools.product(
        (0.2, 0.5), ("tensor", "model"), (1.0, [0.5, 1.0, -0.3]), (1.0, 0.4)
    ):
        options: dict[str, Any] = {"density": density, "scope": scope, "weight": weight, "lambda_": lambda_}
        assert same(session.merge(**options), merge_tensors(BASE, MODELS, backend=backend, **options))
    for method in ("dare_ties", "breadcrumbs", "multislerp", "karcher", "model_stock", "magmax", "linear"):
        base = None if method == "linear" else BASE
        density = 1.0 if method in ("multislerp", "karcher", "model_stock", "magmax", "linear") else 0.5
        assert same(
            session.merge(method=method, density=density),
            merge_tensors(base if base else None, MODELS, method=method, density=density, backend=backend)
            if method != "linear"
            else Session(None, MODELS, backend=backend).merge(method="linear"),
        ), method


def test_a_sweep_gives_a_result_for_each_setting_in_order() -> None:
    session = Session(BASE, MODELS)
    settings = [
        {"density": density, "lambda_": lambda_, "scope": scope}
        for density in (0.3, 0.1)
        for lambda_ in (1, 0.5, -1)
        for scope in ("model", "tensor")
    ]
    results = session.sweep(settings, weight=0.7)
    for setting, result in zip(settings, results, strict=True):
        assert same(result, merge_tensors(BASE, MODELS, weight=0.7, **setting))  # type: ignore[arg-type]
    assert len({result["b"].data_ptr() for result in results}) == len(results)


def test_lambda_has_two_names_and_lists_make_a_grid() -> None:
    session = Session(BASE, MODELS)
    results = session.sweep({"density": [0.2, 0.4], "lambda": [0.5]})
    for density, result in zip((0.2, 0.4), results, strict=True):
        assert same(result, merge_tensors(BASE, MODELS, density=density, lambda_=0.5))


def test_a_copy_and_a_multiple_in_one_sweep() -> None:
    for backend in ("cpu", "reference"):
        session = Session(None, MODELS[:1], backend=backend)
        results = session.sweep({"scale": [1, 2, 0.5]}, method="passthrough")
        for scale, result in zip((1, 2, 0.5), results, strict=True):
            assert same(result, merge_tensors(None, MODELS[:1], method="passthrough", scale=scale))


def large() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base and experts that no cache holds, so that what is undecided tells of a search."""
    base, *experts = torch.randn(1 + EXPERTS, 300_000, generator=torch.Generator().manual_seed(2))
    assert (1 + EXPERTS) * base.nbytes > native.Settings.cached
    return base, experts


def test_thresholds_are_searched_once(runs: list[native.Report]) -> None:
    base, experts = large()
    session = Session(base, experts)
    once = (1 + EXPERTS) * base.nbytes
    session.merge(density=0.2)
    assert runs[-1].undecided
    session.merge(density=0.2, weight=0.5, lambda_=3, normalize=False)
    assert (runs[-1].undecided, runs[-1].bytes_read) == (0, once)
    session.sweep([{"lambda_": lambda_} for lambda_ in range(5)], density=0.2)
    assert runs[-1].bytes_read == once
    session.sweep([{"density": density} for density in (0.2, 0.4)])
    session.merge(density=0.4)
    assert (runs[-1].undecided, runs[-1].bytes_read) == (0, once)
    session.merge(density=0.2, threshold_ties="all")
    assert runs[-1].bytes_read > once


def test_few_thresholds_are_kept(runs: list[native.Report]) -> None:
    session = Session(*large())
    for number in range(MOST_KEPT + 1):
        session.merge(density=0.1 + number / 1000)
    session.merge(density=0.1 + MOST_KEPT / 1000)
    assert runs[-1].undecided == 0
    session.merge(density=0.1)
    assert runs[-1].undecided, "the oldest was kept"


def test_a_thousand_merges_take_no_more_memory() -> None:
    base, experts = BASE["b"], [expert["b"] for expert in MODELS]
    session, out = Session(base, experts, threads=1), torch.empty_like(BASE["b"])
    peaks = []
    for number in range(1000):
        session.merge(out=out, density=0.1 + (number % 100) / 200, lambda_=number)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert peaks[-1] - peaks[200] < 2048, "kilobytes more after 200 merges"


def test_outs_and_types() -> None:
    session = Session(BASE, MODELS)
    outs = [{name: torch.empty_like(x) for name, x in BASE.items()} for _ in range(2)]
    results = session.sweep([{"lambda_": 1}, {"lambda_": 2}], density=0.3, outs=[outs[0], None])
    assert results[0]["b"] is outs[0]["b"]
    assert same(results[1], merge_tensors(BASE, MODELS, density=0.3, lambda_=2))
    wide = session.merge(density=0.3, out_dtype=torch.float32)
    assert same(wide, merge_tensors(BASE, MODELS, density=0.3, out_dtype=torch.float32))
    array = Session(np.zeros(5, np.float32), [np.ones(5, np.float32)]).merge(method="task_arithmetic")
    assert array.tolist() == [1.0] * 5
    assert session.sweep([]) == []
    with pytest.raises(BackendError, match="shares memory with another out"):
        session.sweep([{"lambda_": 1}, {"lambda_": 2}], outs=[outs[0], outs[0]])
    with pytest.raises(RecipeError, match="1 outs for 2 settings"):
        session.sweep([{"lambda_": 1}, {"lambda_": 2}], outs=[None])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda s: s.merge(densty=0.2), "'densty' is not an option of a merge; did you mean density"),
        (lambda s: s.merge(method="tie"), "did you mean ties"),
        (lambda s: s.merge(density=2), "density of expert 0 is 2.0, which is outside 0 to 1"),
        (lambda s: s.sweep([{"density": 0.1}, {"out": 1}]), "'out' is not an option of a merge"),
        (lambda s: s.sweep(None), "the settings of the sweep are None"),
        (lambda s: s.sweep(["density"]), "a setting of the sweep is 'density'"),
        (lambda s: s.sweep([{}], outs=3), "outs is a int, expected a list"),
    ],
)
def test_wrong_options(call: Any, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        call(Session(BASE, MODELS))


def test_wrong_tensors_are_told_at_once() -> None:
    with pytest.raises(BackendError, match="expert 1 does not have the names of base"):
        Session(BASE, [MODELS[0], {"b": MODELS[1]["b"]}])
    with pytest.raises(RecipeError, match="threads is 0"):
        Session(BASE, MODELS, threads=0)
    with pytest.raises(RecipeError, match="works on task vectors, so it needs a base"):
        Session(None, MODELS).merge(method="ties")


def resident() -> int:
    """Bytes of memory that no file holds."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def test_models_that_stay_in_their_files_take_no_memory(tmp_path: Path) -> None:
    size = 4_000_000
    for number in range(4):
        model = {"x": torch.randn(size, generator=torch.Generator().manual_seed(number))}
        save_file(model, tmp_path / f"{number}.safetensors")
    out = {"x": torch.ones(size)}
    before = resident()
    base, *experts = (load_file(tmp_path / f"{number}.safetensors") for number in range(4))
    session = Session(base, experts)
    for density in (0.2, 0.4, 0.2):
        session.merge(out=out, density=density)
    assert resident() - before < size * 4
    assert same(out, merge_tensors(base, experts, density=0.2))
