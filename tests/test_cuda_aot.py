"""The machine code of the CUDA kernels, compiled without a GPU: no spills, wide loads, few instructions."""

from __future__ import annotations

import shutil

import pytest

from bench.aot_cuda import AT_ONCE, TARGETS, compiled, disassembler

# Instructions of the loop for each element and expert; on sm_90 they are 22.7, 22.5, 24.7 and 17.5.
BUDGET = {("stream", "bf16"): 25.0, ("stream", "f16"): 25.0, ("stream", "f32"): 27.5, ("map", "bf16"): 19.5}
MOST_REGISTERS = 128  # two blocks of 256 threads share a processor's 65,536


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
@pytest.mark.skipif(
    disassembler() is None, reason="no cuobjdump: neither triton nor the toolkit's is installed"
)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("kernel", "type_"), BUDGET)
def test_machine_code_keeps_its_budget(kernel: str, type_: str, target: str) -> None:
    code = compiled(kernel, type_, target).loop
    assert code.stack == 0, "registers spill"
    assert code.registers <= MOST_REGISTERS
    assert code.wide_loads == code.loads == AT_ONCE, "some loads in the loop are not of 16 bytes"
    assert code.wide_stores >= 1
    assert code.instructions <= BUDGET[kernel, type_]
