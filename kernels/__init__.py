"""Triton kernels, imported as pymerge.kernels: the formulas of csrc/core on blocks, and what launches them.

stages (formulas) -> pieces (what a program is given) -> map, stats, select (kernels). Only
pymerge.backends.triton imports these modules, because importing them imports triton.
"""
