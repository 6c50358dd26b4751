"""The jobs of a plan: for each tensor of the output its type, where its inputs lie and where it goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pymerge.checkpoint.layout import OutputTensor, ShardLayout
from pymerge.dtypes import DType, promote
from pymerge.job import Region, Source, TensorJob, row_of
from pymerge.methods import Method
from pymerge.plan_checks import Input
from pymerge.plan_rule import Part
from pymerge.plan_stack import Outline
from pymerge.plan_vocabulary import Vocabulary
from pymerge.rule import Rule


class Found(NamedTuple):
    """What a sound recipe names, and what lies there.

    `main`: the parts without those for tensors that some inputs lack. `members`: the inputs of each part;
    `rules`: one for each origin of the outline.
    """

    method: Method
    parts: Sequence[Part]
    main: Sequence[Part]
    inputs: list[Input]
    members: Sequence[Sequence[Input]]
    outline: Outline
    rules: Sequence[Rule]
    side_files: dict[str, bytes]
    notes: list[str]
    vocabulary: Vocabulary | None


def outputs_of(found: Found, out_dtype: DType | None) -> list[OutputTensor]:
    """The tensors of the output; `out_dtype`: their float type, None: what their inputs' promote to."""
    tables = [[source.checkpoint.tensors for source in sources] for sources in found.members]
    promoted: dict[tuple[DType, ...], DType] = {}
    outputs = []
    for origin in found.outline.origins:
        inputs = tables[origin.part]
        entry = inputs[0][origin.inputs[0]].entry
        if not origin.merges:
            dtype = entry.dtype
        elif out_dtype is not None:
            dtype = out_dtype
        else:
            pairs = zip(inputs, origin.inputs, strict=True)
            types = tuple([table[name].entry.dtype for table, name in pairs])
            if types not in promoted:
                promoted[types] = promote(set(types))
            dtype = promoted[types]
        outputs.append(OutputTensor(origin.name, dtype, entry.shape))
    return outputs


def jobs_of(
    found: Found, layouts: Sequence[ShardLayout], files: int, cast: DType | None
) -> tuple[tuple[TensorJob, ...], ...]:
    """The jobs of each output shard, in the order of its bytes."""
    known = {
        origin.name: (origin, rule) for origin, rule in zip(found.outline.origins, found.rules, strict=True)
    }
    has_base = [part.base is not None for part in found.parts]

    def job(layout: ShardLayout, number: int, output: OutputTensor) -> TensorJob:
        origin, rule = known[output.name]
        sources = found.members[origin.part]
        given = _given(sources, origin.inputs)
        with_base = has_base[origin.part]
        entry = sources[0].checkpoint.tensors[origin.inputs[0]].entry
        return TensorJob(
            name=output.name,
            count=entry.count,
            base=given[0] if with_base else None,
            experts=given[1:] if with_base else given,
            out=Region(output.dtype, layout.offsets[output.name], files + number),
            rule=rule if origin.merges else None,
            cast=cast if origin.merges else None,
            row=row_of(entry.shape, rule),
        )

    return tuple(
        tuple(job(layout, number, output) for output in layout.tensors)
        for number, layout in enumerate(layouts)
    )


def _given(inputs: Sequence[Input], names: Sequence[str]) -> tuple[Source, ...]:
    """Where the elements of one tensor come from; inputs that share a table are looked up once."""
    given: list[Source] = []
    last, last_name = None, ""
    for source, name in zip(inputs, names, strict=True):
        if source.made:
            given.append(source.source(name))
            continue
        table = source.checkpoint.tensors
        if table is not last or name != last_name:
            last, last_name = table, name
            shard, entry = table[name]
            dtype, begin = entry.dtype, entry.begin
        given.append(Region(dtype, begin, source.first_file + shard))
    return tuple(given)
