"""The Triton backend: the reference's bits on a GPU, or in triton's interpreter.

The way of tensors that are trimmed by magnitude, a wave of groups at a time: sample -> bracket -> stream
(one pass over the inputs: results as if the undecided were trimmed, exact counts, marks) -> list, gather and
select among the undecided -> fix_up. The counts prove, for each group, that its bracket held; groups where it
did not go the exact way, which reads the inputs several times. So do those too small for a sample to
pay, and all where outliers are dropped.
Nothing waits for the device before that verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pymerge.backends.triton_memory import (
    BLOCK,
    MOST_SEARCHES,
    ONE_PASS_FROM,
    SIGMAS,
    SMALL,
    Extent,
    OnePass,
    cuts_of,
    reserve,
)
from pymerge.backends.triton_search import (
    ALL_INDICES,
    EXACT,
    Rows,
    Workspace,
    exact_cuts,
    fixed,
    sample_bracket,
    search,
    small_cuts,
)
from pymerge.backends.triton_sums import Masses
from pymerge.backends.triton_tables import (
    KINDS,
    THREADS,
    TYPES,
    Integers,
    Member,
    Wave,
    elements_per_thread,
    prepared,
)
from pymerge.errors import BackendError
from pymerge.kernels import map as kernels
from pymerge.kernels import stats
from pymerge.rule import Rule, Scope, ThresholdTies, Trim, check_rule

MOST_EXPERTS = 64


@dataclass(frozen=True)
class Settings:
    """How a merge is carried out; nothing here changes a bit of the result.

    `block`: elements of a program's step (None: what suits type and number of experts). `sigmas`: half width
    of the bracket in standard errors. `bracket_bias` shifts it by that share of the ranks, and `capacity`
    limits the undecided of each group, so that tests can force a miss and an overflow.
    `one_pass_from`: elements from which a group is sampled and streamed.
    """

    block: int | None = None
    sigmas: float = SIGMAS
    bracket_bias: float = 0.0
    capacity: int | None = None
    one_pass_from: int = ONE_PASS_FROM


@dataclass
class Report:
    """What a merge did, in groups: `streamed` in one pass; of these `missed` went the exact way as well."""

    streamed: int = 0
    missed: int = 0


def merge_group(
    names: Sequence[str],
    bases: Sequence[Tensor] | None,
    experts: Sequence[Sequence[Tensor]],
    outs: Sequence[Tensor],
    rule: Rule,
    settings: Settings | None = None,
) -> Report:
    """Merges contiguous tensors on one device into `outs`, as reference.merge_group does.

    `experts[i][k]` is tensor i of expert k. Inputs are not modified. BackendError for f64, for more than 64
    experts, and where the device's memory does not suffice; then `outs` are untouched.
    """
    settings = settings or Settings()
    check_rule(rule, "triton")
    if len(rule.weights) > MOST_EXPERTS:
        raise BackendError(
            f"{len(rule.weights)} experts are more than the {MOST_EXPERTS} of the triton backend"
        )
    members = []
    try:
        for i, name in enumerate(names):
            if not outs[i].numel():
                continue
            base = None if bases is None else bases[i]
            members.append(prepared(name, base, experts[i], outs[i]))
        if not members:
            return Report()
        device = members[0].out.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return Merge(members, rule, settings).run()
    except torch.OutOfMemoryError as error:
        found = str(error).split("\n")[0]
        raise BackendError(f"the device has not enough memory for the merge's work space: {found}") from None


def merge_tensors(
    names: Sequence[str], inputs: Sequence[Sequence[Tensor]], outs: Sequence[Tensor], rule: Rule
) -> Report:
    """`merge_group` for inputs that have the base first where the rule has one."""
    bases = [row[0] for row in inputs] if rule.task_vector else None
    experts = [row[1:] if rule.task_vector else row for row in inputs]
    return merge_group(names, bases, experts, outs, rule)


class Merge:
    """One merge: plans its waves, allocates for the largest, runs them, asks for the verdict."""

    def __init__(self, members: list[Member], rule: Rule, settings: Settings) -> None:
        self.rule, self.settings = rule, settings
        self.experts = len(rule.weights)
        self.report = Report()
        searched_for = rule.trim.by_magnitude and any(d < 1 for d in rule.densities)
        self.trim = Trim.NONE if rule.trim.by_magnitude and not searched_for else rule.trim
        if rule.scope is Scope.MODEL:
            members = sorted(members, key=lambda member: member.name)
        self.plain: list[Wave] = []
        self.small: list[Wave] = []
        self.exact: list[Wave] = []
        self.streamed: list[OnePass] = []
        self._plan(members, searched_for)
        searched = [*self.exact, *(one.wave for one in self.streamed)]
        self.workspace = Workspace(
            rows=max((one.rows for one in self.streamed), default=0),
            marks=max((one.wave.pieces.marks for one in self.streamed), default=0),
            searches=max((len(wave.group_sizes) * self.experts for wave in searched), default=0),
            experts=self.experts,
            device=members[0].out.device,
        )
        needs_sums = rule.rescale and rule.trim is not Trim.NONE and self.trim is not Trim.NONE
        every = [*self.plain, *self.small, *searched]
        self.masses = {id(wave): Masses(wave, self.trim) for wave in every} if needs_sums else {}
        self.unit = all(w == 1 for w in rule.weights) and not needs_sums and not rule.late_weights
        extents = [Extent.of(wave) for wave in (*self.plain, *self.small, *self.exact)]
        extents += [one.extent for one in self.streamed]
        # The verdicts and cuts of waves that missed live beside another wave's tables.
        reserve(
            max(extent.passing(cuts_of(rule)) for extent in extents)
            + sum(8 * extent.groups * (2 * cuts_of(rule) + 2) for extent in extents),
            members[0].out.device,
        )

    def _plan(self, members: list[Member], searched_for: bool) -> None:
        rule = self.rule
        if not searched_for:
            self.plain.append(self._wave(members, np.arange(len(members))))
            return
        if rule.scope is Scope.MODEL:
            wave = self._wave(members, np.zeros(len(members), np.int64))
            self._search(wave, int(wave.group_sizes[0]))
            return
        stream_from = self.settings.one_pass_from
        small = [member for member in members if member.size <= min(SMALL, stream_from - 1)]
        large = [member for member in members if SMALL < member.size < stream_from]
        if small:
            self.small.append(self._wave(small, np.arange(len(small))))
        for some in (large, [member for member in members if member.size >= stream_from]):
            count = max(1, MOST_SEARCHES // self.experts)
            for at in range(0, len(some), count):
                part = some[at : at + count]
                self._search(self._wave(part, np.arange(len(part))), part[0].size)

    def _wave(self, members: list[Member], groups: Integers) -> Wave:
        return Wave(members, groups, self.rule, self.settings.block or BLOCK)

    def _search(self, wave: Wave, size: int) -> None:
        if self.trim is Trim.MAGNITUDE and size >= self.settings.one_pass_from:
            self.streamed.append(OnePass(wave, self.settings.sigmas, self.settings.capacity))
        else:
            self.exact.append(wave)

    def run(self) -> Report:
        for wave in self.plain:
            self._finish(wave, wave.numbers_on)
        for one in self.streamed:
            self._stream(one)
        for wave in self.small:
            self._finish(wave, small_cuts(wave))
        for wave in self.exact:
            self._finish(wave, exact_cuts(wave, self.workspace))
        for one in self.streamed:
            assert one.bad is not None
            bad = np.flatnonzero(one.bad.cpu().numpy())
            self.report.streamed += len(one.wave.group_sizes)
            self.report.missed += len(bad)
            if len(bad):
                self._finish(one.wave, exact_cuts(one.wave, self.workspace, bad), bad)
        return self.report

    # -- the one pass ---------------------------------------------------------------------------------------

    def _stream(self, one: OnePass) -> None:
        wave, settings, ties = one.wave, self.settings, self.rule.threshold_ties
        ranks = wave.send(wave.ranks()[0])
        sample = Rows(wave, one.samples, self.workspace)
        low, high = sample_bracket(
            wave, sample, ranks, settings.sigmas, settings.bracket_bias, self.workspace
        )
        tallies = torch.zeros(len(wave.pieces), 2 * self.experts + 1, dtype=torch.int32, device=wave.device)
        for launch, numbers in zip(wave.pieces.launches, wave.launched, strict=True):
            block, per = self._block(launch.kind)
            kernels.stream[(len(launch.numbers),)](
                numbers,
                wave.pieces_on,
                wave.sizes_on,
                wave.addresses_on,
                wave.numbers_on,
                low,
                high,
                self.workspace.marks,
                tallies,
                IN=TYPES[launch.kind][1],
                OUT=TYPES[launch.out_kind][1],
                RAGGED=launch.ragged,
                ALL=ties is ThresholdTies.ALL,
                BLOCK=block,
                PER=per,
                **self._arithmetic(),
            )
        undecided, totals = self._list(one, tallies)
        cuts, bad = self._judge(undecided, ranks, totals, low, high)
        overflow = totals[:, 2 * self.experts] > wave.send(one.room)
        one.bad = bad | overflow
        cuts = fixed(ranks, cuts)
        if self.masses:
            self._finish(wave, cuts)
        else:
            self._fix_up(wave, undecided, cuts)

    def _list(self, one: OnePass, tallies: Tensor) -> tuple[Rows, Tensor]:
        """Lists and gathers what the stream has marked; the counts of each group, (G, 2K + 1)."""
        wave = one.wave
        rows = Rows(wave, one.room, self.workspace)
        before = torch.nn.functional.pad(tallies.long().cumsum(0), (0, 0, 1, 0))
        at_begin = before[wave.begins_on]
        totals = at_begin[1:] - at_begin[:-1]
        opened = before[:, 2 * self.experts]
        group = wave.pieces_on[:, 3]
        starts = rows.starts_on[group] + opened[:-1] - at_begin[group, 2 * self.experts]
        stats.list_undecided[(len(wave.pieces),)](
            wave.pieces_on,
            wave.sizes_on,
            self.workspace.marks,
            starts,
            rows.ends_on,
            rows.flats,
            rows.owners,
            BLOCK=wave.block,
            **EXACT,
        )
        rows.source.sizes.copy_(torch.minimum(rows.source.sizes, totals[:, 2 * self.experts]))
        rows.gather(wave)
        return rows, totals

    def _judge(
        self, undecided: Rows, ranks: Tensor, totals: Tensor, low: Tensor, high: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The exact cuts (G, K, 2), and in which groups (G) some expert's bracket did not hold its cut."""
        ties = self.rule.threshold_ties
        kept, above = totals[:, : self.experts], totals[:, self.experts : 2 * self.experts]
        rank = ranks - kept
        found = search(undecided.source, rank.clamp(min=1), ties, self.workspace, (low, high))
        to_the_bottom = (low[..., 0] == 1) & (low[..., 1] == ALL_INDICES)
        past_the_end = rank > found.totals
        cuts = torch.where((rank == 0)[..., None], high, found.cuts)
        cuts = torch.where((past_the_end & to_the_bottom)[..., None], low, cuts)
        missed = (rank < 0) | (past_the_end & ~to_the_bottom)
        if ties is ThresholdTies.ALL:  # the threshold is the top of the bracket, and nothing below is kept
            at_the_top = (above < ranks) & (ranks <= kept)
            cuts = torch.where(at_the_top[..., None], high, cuts)
            missed &= ~at_the_top
        return cuts, (missed & (ranks > 0)).any(1)

    def _fix_up(self, wave: Wave, undecided: Rows, cuts: Tensor) -> None:
        source = undecided.source
        for kind in wave.out_kinds_used:
            kernels.fix_up[(undecided.count,)](
                source.pieces,
                source.sizes,
                source.addresses,
                undecided.flats,
                undecided.owners,
                wave.kinds_on,
                wave.origins_on,
                wave.addresses_on,
                wave.numbers_on,
                cuts,
                OUT=TYPES[kind][1],
                KIND=kind,
                BLOCK=self._block(KINDS[torch.float32])[0],
                **self._arithmetic(),
            )

    # -- the last pass --------------------------------------------------------------------------------------

    def _finish(self, wave: Wave, cuts: Tensor, wanted: Integers | None = None) -> None:
        """The plain map over all pieces, or those of the `wanted` groups, by cuts that are final."""
        if self.masses:
            wave.scales_on().copy_(self.masses[id(wave)].scales(cuts))
        for launch, numbers in zip(wave.pieces.launches, wave.launched, strict=True):
            if wanted is not None:
                inside = np.isin(wave.pieces.rows[launch.numbers, 3], wanted)
                numbers = wave.send(launch.numbers[inside])
            if numbers.numel() == 0:
                continue
            kernels.map_pieces[(numbers.numel(),)](
                numbers,
                wave.pieces_on,
                wave.sizes_on,
                wave.addresses_on,
                wave.numbers_on,
                cuts,
                wave.keys_on,
                wave.limits_on,
                IN=TYPES[launch.kind][1],
                OUT=TYPES[launch.out_kind][1],
                RAGGED=launch.ragged,
                BASE=self.rule.task_vector,
                TRIM=list(Trim).index(self.trim),
                BLOCK=self._block(launch.kind)[0],
                **self._arithmetic(),
            )

    def _arithmetic(self) -> dict[str, object]:
        return {
            "K": self.experts,
            "ELECT": self.rule.elect,
            "NORMALIZE": self.rule.normalize,
            "UNIT": self.unit,
            "LATE": bool(self.rule.late_weights),
            "num_warps": THREADS // (64 if torch.version.hip else 32),
            **EXACT,
        }

    def _block(self, kind: int) -> tuple[int, int]:
        """Elements of a step, and of a thread."""
        per = elements_per_thread(TYPES[kind][0].itemsize, self.experts)
        return self.settings.block or per * THREADS, per
