"""What integrations share, without the tools: replacing, counting, and which tensors are left to them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pymerge.integrations.calls import Call, attempt, run, why_left
from pymerge.integrations.mergekit_methods import arithmetic_name
from pymerge.integrations.patches import Left, Patches, Tally, patches_of


class Owner:
    """Stands for a class of another tool."""

    def work(self) -> str:
        return "theirs"


def ours(original: Callable[..., Any], tally: Tally) -> Callable[..., Any]:
    def work(self: Owner) -> str:
        tally.make("ours")
        return f"ours over {original(self)}"

    return work


def test_what_is_replaced_comes_back() -> None:
    before = Owner.work
    with Patches("tool") as patches:
        patches.replace(Owner, "work", ours)
        assert Owner().work() == "ours over theirs"
        assert patches_of(Owner, "work") is patches
        assert patches.summary() == "pymerge made 1 of 1 merges (ours 1)"
    assert Owner.work is before
    assert patches_of(Owner, "work") is None


def test_what_others_put_over_ours_stays() -> None:
    patches = Patches("tool")
    before = Owner.work
    patches.replace(Owner, "work", ours)
    other = lambda self: "other"  # noqa: E731
    Owner.work = other  # type: ignore[method-assign]
    patches.disable()
    try:
        assert Owner.work is other
    finally:
        Owner.work = before  # type: ignore[method-assign]


def test_what_is_left_is_counted_by_reason() -> None:
    patches = Patches("tool")

    def refuse() -> Call:
        raise Left("it is odd")

    def misread() -> Call:
        raise KeyError("weight")

    assert attempt(patches.tally, "ties", refuse) is None
    assert attempt(patches.tally, "ties", misread) is None
    assert attempt(patches.tally, "sce", lambda: Call("sce", None, [torch.ones(2)])) is None
    assert patches.summary().splitlines() == [
        "pymerge made 0 of 3 merges",
        "  left to tool: sce 1 (sce works on task vectors, so it needs a base)",
        "  left to tool: ties 1 (a call of unknown form: KeyError: 'weight')",
        "  left to tool: ties 1 (it is odd)",
    ]


class Odd(torch.Tensor):  # type: ignore[misc]
    """A class that may mean anything."""


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ([torch.ones(3), torch.ones(3)], None),
        ([torch.ones(3, 4).T, torch.ones(4, 3)], None),
        ([torch.nn.Parameter(torch.ones(3), requires_grad=False)], None),
        ([torch.ones(3), torch.ones(3, requires_grad=True)], "a gradient is wanted"),
        ([torch.ones(3).as_subclass(Odd)], "a tensor of another class"),
        ([torch.ones(3).to_sparse()], "a tensor that is not dense"),
        ([torch.ones(3), torch.ones(4)], "tensors of different shapes"),
        ([torch.ones(3), torch.ones(3).half()], "tensors of different element types"),
        ([torch.ones(3).double()], "element type float64"),
        ([torch.ones(3, device="meta")], "tensors on meta"),
        ([torch.ones(0)], "a tensor without elements"),
    ],
)
def test_which_tensors_are_left(tensors: list[torch.Tensor], reason: str | None) -> None:
    assert why_left(tensors) == reason


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of its first make_dual
def test_forward_gradients_are_left() -> None:
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        assert why_left([forward_ad.make_dual(torch.ones(2), torch.ones(2))]) == "a gradient is wanted"


def test_stacked_merges_are_merges_of_their_own() -> None:
    base, *experts = (torch.randn(3, 50, generator=torch.Generator().manual_seed(k)) for k in range(3))
    options = {"density": 0.3}
    whole = run(Call("ties", base, experts, options, stacked=True))
    for row in range(3):
        alone = run(Call("ties", base[row], [expert[row] for expert in experts], options))
        assert torch.equal(whole[row], alone)


def test_strided_stacks_are_merged_too() -> None:
    tensors = [torch.randn(4, 3, generator=torch.Generator().manual_seed(k)).T for k in range(2)]
    options = {"weight": [1, 2], "normalize": False}
    stacked = run(Call("linear", None, tensors, options, stacked=True))
    assert torch.equal(stacked, tensors[0] + 2 * tensors[1])


def test_drawn_seeds_follow_torch_s_generator() -> None:
    call = Call("dare_linear", torch.zeros(999), [torch.ones(999)], {"density": 0.5}, drawn=True)
    torch.manual_seed(7)
    first, second = run(call), run(call)
    torch.manual_seed(7)
    assert torch.equal(run(call), first)
    assert not torch.equal(first, second)


def test_methods_are_known_by_what_they_do() -> None:
    known = {
        ("sum", "magnitude"): "ties",
        (None, None): "task_arithmetic",
        ("sum", "random"): "dare_ties",
        (None, "random"): "dare_linear",
        (None, "magnitude_outliers"): "breadcrumbs",
        ("sum", "magnitude_outliers"): "breadcrumbs_ties",
        ("sum", "della_magprune"): "della",
        (None, "della_magprune"): "della_linear",
    }
    assert {given: arithmetic_name(*given) for given in known} == known
    for unknown in (("count", "magnitude"), (None, "magnitude"), ("sum", "rank")):
        with pytest.raises(Left, match="does not know"):
            arithmetic_name(*unknown)


@pytest.mark.parametrize(
    ("tool", "module", "call"),
    [
        ("mergekit", "mergekit", "enable()"),
        ("mergekit", "mergekit_yaml", "main()"),
        ("peft", "peft", "enable()"),
    ],
)
def test_a_missing_tool_is_one_sentence(tool: str, module: str, call: str) -> None:
    code = f"import sys; sys.modules[{tool!r}] = None; from pymerge.integrations.{module} import *; {call}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    last = done.stderr.splitlines()[-1]
    assert "cannot be imported here" in last
    assert f"pip install {tool}" in last
    if call == "main()":
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1


def test_importing_them_imports_no_tool() -> None:
    code = (
        "import sys, pymerge.integrations.mergekit, pymerge.integrations.peft\n"
        "import pymerge.integrations.mergekit_yaml\n"
        "assert not {'torch', 'numpy', 'mergekit', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
