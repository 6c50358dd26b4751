"""Tensors that some models may lack: each is merged from those that have it, as far as the method can."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import compress
from typing import NamedTuple, TypeAlias

from pymerge.methods import Base, Method
from pymerge.plan_checks import Input, check_pairs, distinct_tables, named
from pymerge.plan_rule import Part
from pymerge.rule import Blend, Fuse

# What architectures call optional: biases, heads, poolers, and buffers that newer versions do not save.
_OPTIONAL = re.compile(r"\.bias$|(^|\.)(lm_head|embed_out)\.weight$|(^|\.)pooler\.|(^|\.)position_ids$")


# One output tensor's inputs: their names, one for each model.
Row: TypeAlias = tuple[str, ...]


class Reduced(NamedTuple):
    """A part for the tensors that only `holders` have; `rows`: of the whole row of each, what they have."""

    part: Part
    holders: list[Input]
    rows: dict[Row, Row]


def is_optional(name: str) -> bool:
    """Whether models may lack the tensor called `name`."""
    return _OPTIONAL.search(name) is not None


def lacked(inputs: Sequence[Input]) -> dict[Row, tuple[bool, ...]]:
    """The optional tensors that not every input has, and which have them; each has one name in all."""
    tables = [source.checkpoint.tensors for source in inputs]
    distinct = distinct_tables(inputs)
    if len(distinct) < 2:
        return {}
    names = dict.fromkeys(name for table in distinct for name in table)
    count = len(tables)
    held = {
        (name,) * count: tuple([name in table for table in tables]) for name in names if is_optional(name)
    }
    return {row: has for row, has in held.items() if not all(has)}


def reduced(
    method: Method,
    part: Part,
    inputs: Sequence[Input],
    held: Mapping[Row, tuple[bool, ...]],
    problems: list[str],
    notes: list[str],
) -> list[Reduced]:
    """Per group of tensors that the same inputs have, the part that merges them; `held`: which those are.

    As in mergekit 0.1.5, most methods take those that there are; a blend of one model is that model, and
    without experts the base stays; model_stock leaves out what too few have; what else is relative to a base
    needs it. Problems and notes are added.
    """
    groups: dict[tuple[bool, ...], dict[Row, Row]] = {}
    for row, has in held.items():
        groups.setdefault(has, {})[row] = tuple(compress(row, has))
    found = []
    for has, rows in groups.items():
        members = [entry for entry, there in zip(part.members, has, strict=True) if there]
        holders = [source for source, there in zip(inputs, has, strict=True) if there]
        without = [source.label for source, there in zip(inputs, has, strict=True) if not there]
        names = [row[0] for row in rows.values()]
        single = method.base is Base.OPTIONAL_ORIGIN and method.fewest == 1
        if single and has[0] and part.base is not None and len(members) == 2:
            members, holders = members[1:], holders[1:]  # one model is the result, relative to nothing
            rows = {row: own[1:] for row, own in rows.items()}
        what = f"{named(names)}, which {' and '.join(without)} {'lack' if without[1:] else 'lacks'}"
        has_base = members[0] is part.base
        experts = len(members) - has_base
        alone = has_base and not experts
        if not has_base and (part.base is None or single):
            alone = experts == 1 and method.blend is not None
        if not alone and ((part.base is not None and not has_base and not single) or experts < method.fewest):
            if method.blend is Blend.MODEL_STOCK:
                notes.append(f"left out: {what}")
            else:
                problems.append(f"{method.name} cannot merge {what}")
            continue
        whose = f"is {holders[0].label}'s" if alone else f"is merged from the {len(holders)} that have it"
        claims = f", of which at most {experts} can vote" if method.fuse is Fuse.CONSENSUS and experts else ""
        notes.append(f"{what}: each {whose}{claims}")
        base = part.base if has_base and not alone else None
        smaller = replace(
            part, base=base, experts=tuple(members[has_base and not alone :]), copies=alone, fewer=True
        )
        check_pairs(holders, list(rows.values()), problems)
        found.append(Reduced(smaller, holders, rows))
    return found
