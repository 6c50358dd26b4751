"""pymerge inside PEFT: its own bits, and what stays with it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from pymerge.integrations import peft as ours
from pymerge.integrations import peft_batch
from pymerge.integrations.patches import Patches, Tally
from pymerge.integrations.peft_batch import MOST_SUMMED, ONE_LAYER

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
    summed = {"task_arithmetic": 1} if count <= MOST_SUMMED else {}
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

    methods = ("add_weighted_adapter", ONE_LAYER)
    places = [(owner, name) for owner in (theirs, model) for name in ours.FUNCTIONS]
    places += [(model.LoraModel, name) for name in methods]
    before = [getattr(*place) for place in places]
    ours.enable()
    assert all(getattr(*place) is not old for place, old in zip(places, before, strict=True))
    ours.disable()
    assert [getattr(*place) for place in places] == before
    assert ours.summary() == "pymerge is not enabled in PEFT"


class Layers(torch.nn.Module):  # type: ignore[misc]
    """A linear layer, an embedding and a convolution, for LoRAs of every shape."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2000, 64)
        self.embed = torch.nn.Embedding(500, 24)
        self.conv = torch.nn.Conv2d(6, 8, 3)


def adapted(count: int, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model with `count` adapters, called by their numbers, all of them random."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(count)
    given = {"r": 8, "lora_alpha": 12, "target_modules": ["linear", "embed", "conv"], **options}
    model = get_peft_model(Layers(), LoraConfig(init_lora_weights=False, **given), adapter_name="0")
    for k in range(1, count):
        model.add_adapter(str(k), LoraConfig(init_lora_weights=False, **given))
    for name, tensor in loras(model).items():
        if "lora" in name:
            tensor.data = tensor.data.to(dtype)
    return model


def loras(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.named_parameters() if "lora" in name}


def make_different(model: Any) -> None:
    """Gives 16-bit tensors entries whose magnitudes all differ: of equals PEFT keeps any."""
    for x in loras(model).values():
        if x.dtype is not torch.float32:
            magnitudes = torch.randperm(x.numel()).reshape(x.shape).to(torch.int16) + 8000
            x.data = magnitudes.view(x.dtype) * (torch.randint(0, 2, x.shape) * 2 - 1).to(x.dtype)


def both(model: Any, combination: str, majority: str = "total", weights: Any = None) -> Patches:
    """Merges all adapters twice, by PEFT and by pymerge, and compares the bits of everything."""
    names = [name for name in model.peft_config if name.isdigit()]
    weights = weights or [0.7, -0.4, 0.9, 1.3, 0.2][: len(names)]

    def merge(to: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        given = {"combination_type": combination, "density": 0.3, "majority_sign_method": majority}
        model.add_weighted_adapter(names, weights, to, **given)
        found = {name: x.clone() for name, x in loras(model).items() if f".{to}" in f".{name}"}
        assert found
        model.delete_adapter(to)
        return found

    before = {name: x.clone() for name, x in loras(model).items()}
    expected = merge("merged")
    with ours.enable() as patches:
        found = merge("merged")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert all(torch.equal(x, before[name]) for name, x in loras(model).items())
    return patches


@pytest.mark.parametrize("combination", ["ties", "magnitude_prune", "linear", "dare_ties"])
def test_adapters_of_a_model_are_those_that_peft_makes(theirs: Any, combination: str) -> None:
    patches = both(adapted(2), combination)
    gathered = combination in ("ties", "magnitude_prune")
    assert patches.tally.made == ({combination: 6} if gathered else {})
    assert patches.tally.made.total() + patches.tally.left.total() == 6


def test_adapters_that_are_decomposed_again(theirs: Any) -> None:
    assert both(adapted(2, target_modules=["linear"]), "ties_svd").tally.made == {"ties": 1}


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_gathered_merges_have_peft_s_bits(theirs: Any, count: int, dtype: torch.dtype, majority: str) -> None:
    model = adapted(count, dtype)
    make_different(model)
    made = both(model, "ties", majority).tally.made
    assert made["ties"] == (6 if count <= MOST_SUMMED and majority == "total" else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", [1.0, -1.0, 0.3, 0.0])
@pytest.mark.parametrize("combination", ["ties", "magnitude_prune"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_merges_by_one_weight_have_peft_s_bits(
    theirs: Any, count: int, combination: str, weight: float, dtype: torch.dtype
) -> None:
    model = adapted(count, dtype, lora_alpha=8)
    make_different(model)
    assert both(model, combination, weights=[weight] * count).tally.made == {combination: 6}


@pytest.mark.parametrize("alpha", [8, 12])
def test_gathered_merges_that_are_not_finite_are_peft_s(theirs: Any, alpha: int) -> None:
    model = adapted(2, lora_alpha=alpha)
    model.base_model.model.linear.lora_A["1"].weight.data[0, 0] = torch.inf
    names = ["0", "1"]
    given = {"combination_type": "ties", "density": 0.3}
    model.add_weighted_adapter(names, [1.0, 1.0], "theirs", **given)
    with ours.enable() as patches:
        model.add_weighted_adapter(names, [1.0, 1.0], "ours", **given)
    found, expected = (model.base_model.model.linear.lora_A[name].weight for name in ("ours", "theirs"))
    assert expected.isinf().any()
    assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))
    assert patches.tally.left == {("ties", "an entry that is not finite"): 1}
    assert patches.tally.made == {"ties": 5}


def test_a_merge_that_fails_halfway_leaves_no_empty_tensors(theirs: Any) -> None:
    model = adapted(2)
    given = {"combination_type": "ties", "density": 0.3}
    model.add_weighted_adapter(["0", "1"], [1.0, 1.0], "theirs", **given)
    del model.base_model.model.conv.scaling["1"]
    with ours.enable() as patches, pytest.raises(KeyError):
        model.add_weighted_adapter(["0", "1"], [1.0, 1.0], "ours", **given)
    assert patches.tally.made == {"ties": 4}
    expected, found = (model.base_model.model.linear.lora_B[name].weight for name in ("theirs", "ours"))
    assert torch.equal(found, expected)


def test_calls_of_unknown_form_are_not_gathered() -> None:
    gathering = peft_batch.Gathering({}, Tally())
    tensors, weights = [torch.ones(99), torch.ones(99)], torch.ones(2)
    assert gathering.take("ties", (tensors, weights, 0.5), {}) is None  # outside of a layer
    with gathering.layer():
        for given, named in (((), {}), ((tensors, weights, 0.5), {"more": 1}), ((tensors, None, 0.5), {})):
            assert gathering.take("ties", given, named) is None
        assert gathering.take("dare_ties", (tensors, weights, 0.5), {}) is None
        assert gathering.take("ties", (tensors, weights, 0.5), {}) is not None


def test_merges_in_other_threads_are_apart(theirs: Any) -> None:
    with ours.enable() as patches, ThreadPoolExecutor(2) as pool:
        models = [adapted(2) for _ in range(2)]
        given = {"combination_type": "ties", "density": 0.3}
        jobs = [
            pool.submit(m.add_weighted_adapter, ["0", "1"], [1.0, 0.5], "merged", **given) for m in models
        ]
        for job in jobs:
            job.result()
    assert patches.tally.made == {"ties": 12}
    first, second = (loras(model) for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
