"""pymerge inside PEFT: its own bits, and what stays with it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pymerge.integrations import peft as ours
from pymerge.integrations.patches import Patches

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own, such as for a density of 1

SHAPES = [(17_000,), (150, 120), (16, 16, 9, 8)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def theirs() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft.utils.merge_utils")


@pytest.fixture
def enabled(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Patches]:
    """Enabled for tensors of the tests' size; one thread, so that torch sums in one order."""
    monkeypatch.setattr(ours, "SMALLEST_SUM", ours.SMALLEST_TRIM)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ours.enable() as patches:
        yield patches
    torch.set_num_threads(threads)


def adapters(count: int, shape: tuple[int, ...], dtype: torch.dtype, strided: bool) -> list[torch.Tensor]:
    """Task vectors whose magnitudes are all different, with exact cancellations between the first two."""
    generator = torch.Generator().manual_seed(count)
    size = torch.Size(shape).numel()
    # 16 bits hold 31,744 finite magnitudes at most: enough for one tensor.
    magnitudes = torch.arange(1, size + 1, dtype=torch.int32)
    views = {torch.float32: torch.float32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
    bits = magnitudes + 0x3C000000 if dtype is torch.float32 else magnitudes.to(torch.int16)
    plain = bits.view(torch.float32) if dtype is torch.float32 else bits.to(views[dtype]).view(dtype)
    tensors = []
    for _ in range(count):
        signs = torch.randint(0, 2, (size,), generator=generator).to(dtype) * 2 - 1
        tensors.append((plain[torch.randperm(size, generator=generator)] * signs).reshape(shape))
    if count > 1:
        tensors[1] = -tensors[0]
    return [tensor.transpose(0, -1) for tensor in tensors] if strided else tensors


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", range(1, 9))
def test_results_have_peft_s_bits(
    theirs: Any, enabled: Patches, count: int, dtype: torch.dtype, shape: tuple[int, ...], strided: bool
) -> None:
    tensors = adapters(count, shape, dtype, strided)
    before = [tensor.clone() for tensor in tensors]
    weights = torch.randn(count, generator=torch.Generator().manual_seed(1))
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("task_arithmetic", ()),
        ("magnitude_prune", (0.3,)),
        ("ties", (0.3,)),
        ("ties", (0.6, "frequency")),
        ("dare_linear", (0.5,)),
        ("dare_ties", (0.5, "total")),
    ]
    for name, given in calls:
        merge = getattr(theirs, name)
        torch.manual_seed(0)
        expected = merge.__wrapped__(list(tensors), weights, *given)
        torch.manual_seed(0)
        found = merge(list(tensors), weights, *given)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert torch.equal(found, expected), (name, given)
    assert all(map(torch.equal, tensors, before))
    summed = {"task_arithmetic": 1} if count <= ours.MOST_SUMMED else {}
    assert enabled.tally.made == {"magnitude_prune": 1, "ties": 2, **summed}


def test_of_equal_magnitudes_the_first_are_kept(theirs: Any, enabled: Patches) -> None:
    tensor = torch.ones(20_000)
    merged = theirs.magnitude_prune([tensor], torch.ones(1), 0.25)
    assert torch.equal(merged, torch.cat([torch.ones(5_000), torch.zeros(15_000)]))
    assert enabled.tally.made == {"magnitude_prune": 1}


@pytest.mark.parametrize(
    ("tensor", "density", "reason"),
    [
        (torch.ones(20), 0.5, "a small tensor"),
        (torch.ones(20_000), 1.0, "all or nothing is kept"),
        (torch.ones(20_000), 0.0, "all or nothing is kept"),
        (torch.ones(20_000).double(), 0.5, "element type float64"),
        (torch.full((20_000,), torch.inf), 0.5, "an entry that is not finite"),
        (torch.ones(20_000, requires_grad=True), 0.5, "a gradient is wanted"),
    ],
)
def test_what_is_left_gives_peft_s_result(
    theirs: Any, enabled: Patches, tensor: torch.Tensor, density: float, reason: str
) -> None:
    expected = theirs.ties.__wrapped__([tensor], torch.ones(1), density)
    assert torch.equal(theirs.ties([tensor], torch.ones(1), density).nan_to_num(7), expected.nan_to_num(7))
    assert enabled.tally.left == {("ties", reason): 1}


def test_errors_are_peft_s(theirs: Any, enabled: Patches) -> None:
    with pytest.raises(ValueError, match="Density should be >= 0"):
        theirs.ties([torch.ones(20_000)], torch.ones(1), -0.5)
    with pytest.raises(TypeError):
        theirs.ties([torch.ones(20_000)])


def test_disable_gives_everything_back(theirs: Any) -> None:
    import peft.tuners.lora.model as model

    before = [getattr(owner, name) for owner in (theirs, model) for name in ours.FUNCTIONS]
    ours.enable()
    assert model.ties is not before[-1]
    ours.disable()
    assert [getattr(owner, name) for owner in (theirs, model) for name in ours.FUNCTIONS] == before
    assert ours.summary() == "pymerge is not enabled in PEFT"


@pytest.mark.parametrize("combination", ["ties", "magnitude_prune", "dare_ties", "ties_svd"])
def test_adapters_of_a_model_are_those_that_peft_makes(theirs: Any, combination: str) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=12, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4096, 64)), config, adapter_name="a")
    model.add_adapter("b", config)

    def merge(name: str) -> list[torch.Tensor]:
        torch.manual_seed(1)
        given = {"combination_type": combination, "density": 0.3}
        model.add_weighted_adapter(["a", "b"], [0.7, -0.4], name, **given)
        layer = model.base_model.model[0]
        return [layer.lora_A[name].weight, layer.lora_B[name].weight]

    expected = merge("theirs")
    with ours.enable() as patches:
        found = merge("ours")
    assert all(map(torch.equal, found, expected))
    assert patches.tally.made.total() + patches.tally.left.total() in (1, 2)
    assert bool(patches.tally.made) == (combination != "dare_ties")
