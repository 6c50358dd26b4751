"""What pymerge changes inside mergekit and PEFT, off and on in turns within one run, in memory.

    python -m bench.dropin                    # where mergekit 0.1.5 and PEFT are installed beside pymerge
    python -m bench.dropin --tool peft --layers 8 --threads 1

mergekit: one merge of `--count` elements and `--experts` experts for each method.
PEFT: `add_weighted_adapter` of rank-16 LoRAs for `--layers` layers of a 7B llama. Its "set-up" has merges
that do nothing: what is left is making the new adapter. Rows go to results/dropin.csv.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from bench.kernel import make_inputs
from bench.machine import append_rows, describe, version_of
from bench.recipes import OURS_ALONE, SETUPS

RESULTS = Path(__file__).parent / "results" / "dropin.csv"
# What mergekit's copies of bytes are not.
METHODS = [name for name in SETUPS if name not in (*OURS_ALONE, "passthrough")]
# Inputs and outputs of the linear layers of a llama of 7 billion parameters.
SHAPES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (4096, 4096)),
    **dict.fromkeys(("gate_proj", "up_proj"), (4096, 11008)),
    "down_proj": (11008, 4096),
}
RANK = 16


@dataclass(frozen=True)
class Row:
    """One measurement. `side`: "off", "on" or "set-up". `elements`: of the result."""

    tool: str
    method: str
    side: str
    elements: int
    experts: int
    dtype: str
    run: int
    seconds: float


Side = Callable[[], AbstractContextManager[Any]]


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def turns(
    row: tuple[str, str, int, int, str], sides: Mapping[str, Side], runs: int, work: Callable[[], object]
) -> list[Row]:
    """`runs` measurements of each side after one to warm up, the sides in turns."""
    tool, method, elements, experts, dtype = row
    rows = []
    for number in range(-1, runs):
        for side, entered in sides.items():
            with entered():
                seconds = timed(work)
            if number >= 0:
                rows.append(Row(tool, method, side, elements, experts, dtype, number, round(seconds, 6)))
    return rows


# -- mergekit -----------------------------------------------------------------------------------------------


def in_mergekit(given: argparse.Namespace) -> Iterator[list[Row]]:
    """Every method on one tensor of rows of 1,024 elements."""
    from mergekit.merge_methods import merge_tensors

    from pymerge.integrations import mergekit

    tensors = [t.view(-1, 1024) for t in make_inputs(given.count, given.experts, getattr(torch, given.dtype))]
    sides: dict[str, Side] = {"off": nullcontext, "on": mergekit.enable}
    for method in given.methods.split(",") if given.methods else METHODS:
        setup = SETUPS[method]
        inputs = tensors[: len(tensors) if setup.experts is None else setup.experts + 1]
        inputs = inputs if setup.base else inputs[1:]
        parameters = {**({"weight": 1.0} if setup.weighted else {}), **setup.shared}
        parameters |= {"density": given.density} if setup.trims else {}

        def work(
            method: str = method,
            inputs: Sequence[torch.Tensor] = inputs,
            base: int | None = 0 if setup.base else None,
            parameters: Mapping[str, object] = parameters,
        ) -> None:
            merge_tensors(inputs, method, base_index=base, parameters=parameters)

        row = ("mergekit", method, given.count, len(inputs) - setup.base, given.dtype)
        yield turns(row, sides, given.runs, work)


# -- PEFT ---------------------------------------------------------------------------------------------------


def llama(layers: int) -> nn.Module:
    """Its linear layers, whose weights are one number each: only their shapes count."""

    def linear(inputs: int, outputs: int) -> nn.Linear:
        layer = nn.Linear(1, 1, bias=False)
        layer.in_features, layer.out_features = inputs, outputs
        layer.weight = nn.Parameter(torch.zeros(1).expand(outputs, inputs), requires_grad=False)
        return layer

    model = nn.Module()
    model.layers = nn.ModuleList(
        nn.ModuleDict({name: linear(*shape) for name, shape in SHAPES.items()}) for _ in range(layers)
    )
    return model


@contextmanager
def no_merges() -> Iterator[None]:
    """PEFT as it would be if merging took no time."""
    import peft.tuners.lora.model as lora

    names = ("ties", "magnitude_prune", "task_arithmetic", "dare_linear", "dare_ties")
    originals = {name: getattr(lora, name) for name in names}
    for name in names:
        setattr(lora, name, lambda tensors, *_: tensors[0])
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(lora, name, original)


def in_peft(given: argparse.Namespace) -> Iterator[list[Row]]:
    """`add_weighted_adapter` for 2 and 3 adapters; `--alphas` 16 is a weight of 1, 32 one of sqrt(2)."""
    from peft import LoraConfig, get_peft_model

    from pymerge.integrations import peft

    sides: dict[str, Side] = {"off": nullcontext, "on": peft.enable, "set-up": no_merges}
    for alpha in map(int, given.alphas.split(",")):
        config = LoraConfig(r=RANK, lora_alpha=alpha, target_modules=list(SHAPES), init_lora_weights=False)
        model = get_peft_model(llama(given.layers), config, adapter_name="0")
        elements = sum(x.numel() for name, x in model.named_parameters() if "lora_" in name)
        for adapters in (2, 3):
            model.add_adapter(str(adapters - 1), config)
            names = [str(k) for k in range(adapters)]
            for method in ("ties", "magnitude_prune", "linear", "dare_ties"):

                def work(names: list[str] = names, method: str = method, model: Any = model) -> None:
                    options = {"combination_type": method, "density": given.density}
                    model.add_weighted_adapter(names, [1.0] * len(names), "merged", **options)
                    model.delete_adapter("merged")

                row = ("PEFT", f"{method}, alpha {alpha}", elements, adapters, "float32")
                yield turns(row, sides, given.runs, work)


# -- results ------------------------------------------------------------------------------------------------


def save(rows: Sequence[Row], threads: int) -> None:
    """Appends rows to the CSV, each with the machine and the versions of both tools."""
    setting: dict[str, object] = {"threads": threads, **describe()}
    setting |= {tool: version_of(tool) for tool in ("mergekit", "peft")}
    append_rows(RESULTS, [asdict(row) for row in rows], setting)


def table(rows: Sequence[Row]) -> str:
    """Medians off and on, and how many times faster; for PEFT also without its set-up."""
    lines = [f"{'tool':10}{'method':28}{'k':>3}{'off s':>10}{'on s':>10}{'x':>8}{'merges x':>10}"]
    for tool, method, experts in dict.fromkeys((row.tool, row.method, row.experts) for row in rows):
        took = {
            side: median(
                row.seconds
                for row in rows
                if (row.tool, row.method, row.experts, row.side) == (tool, method, experts, side)
            )
            for side in ("off", "on", *(["set-up"] if tool == "PEFT" else []))
        }
        rest = took.get("set-up", 0.0)
        left = took["on"] - rest
        merges = f"{(took['off'] - rest) / left:.1f}" if left > 0 else "-"
        lines.append(
            f"{tool:10}{method:28}{experts:>3}{took['off']:>10.4f}{took['on']:>10.4f}"
            f"{took['off'] / took['on']:>8.1f}{merges:>10}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="pymerge inside mergekit and PEFT, off and on.")
    parser.add_argument("--tool", choices=["mergekit", "peft", "both"], default="both")
    parser.add_argument("--count", type=lambda text: int(float(text)), default=1 << 22, help="for mergekit")
    parser.add_argument("--experts", type=int, default=8, help="for mergekit")
    parser.add_argument("--dtype", default="bfloat16", help="for mergekit")
    parser.add_argument("--methods", help="for mergekit; default: all")
    parser.add_argument("--layers", type=int, default=32, help="for PEFT")
    parser.add_argument("--alphas", default="16,32", help="lora_alpha, for PEFT")
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    measuring = {"mergekit": in_mergekit, "peft": in_peft}
    rows: list[Row] = []
    for tool in measuring if given.tool == "both" else [given.tool]:
        for measured in measuring[tool](given):  # saved method by method: all of them take long
            save(measured, given.threads)
            rows += measured
    print(table(rows))
    print(", ".join(f"{name} {value}" for name, value in describe().items() if value))


if __name__ == "__main__":
    main()
