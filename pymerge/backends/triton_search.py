"""Exact cuts by counting digits, over whole inputs or over rows gathered from them; brackets from samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pymerge.backends.triton_tables import KINDS, TYPES, Integers, Wave, cut_pieces
from pymerge.kernels import select, stats
from pymerge.rule import ThresholdTies

# Cuts are pairs (magnitude, index): kept is what lies above, or equals the magnitude at a lower flat index.
ALL_INDICES = (1 << 63) - 1
KEEP_ALL = (0, ALL_INDICES)
KEEP_NONE = ((1 << 32) - 1, 0)
SHIFTS = (22, 11, 0)
BINS = 2048
CLUSTER = 16
MOST_SAMPLES = 1 << 21
# A standard error estimated from a few clusters is widened: Student's t.
FEW_CLUSTERS = 8.0
EXACT = {"enable_fp_fusion": False}


def cuts_like(cut: tuple[int, int], ranks: Tensor) -> Tensor:
    """The same cut for every group and expert: (G, K, 2)."""
    return torch.tensor(cut, dtype=torch.int64, device=ranks.device).repeat(*ranks.shape, 1)


@dataclass(frozen=True)
class Source:
    """Where keys come from: the inputs of a wave, or rows (`flats` given; f32, without a base)."""

    addresses: Tensor
    sizes: Tensor
    pieces: Tensor
    begins: Tensor
    launches: list[tuple[int, Tensor]]
    kinds: Tensor
    flats: Tensor | None
    block: int

    @classmethod
    def inputs(cls, wave: Wave, wanted: Integers | None = None) -> Source:
        """`wanted`: the groups whose pieces are read; None for all."""
        launches = []
        for kind in wave.kinds_used:
            numbers = np.concatenate([each.numbers for each in wave.pieces.launches if each.kind == kind])
            if wanted is not None:
                numbers = numbers[np.isin(wave.pieces.rows[numbers, 3], wanted)]
            launches.append((kind, wave.send(numbers)))
        return cls(
            wave.addresses_on,
            wave.sizes_on,
            wave.pieces_on,
            wave.begins_on,
            launches,
            wave.kinds_on,
            None,
            wave.block,
        )


class Rows:
    """Room for listed places of every group, and what was gathered from them, as tensors of f32."""

    def __init__(self, wave: Wave, room: Integers, workspace: Workspace) -> None:
        self.starts = np.cumsum(room) - room
        self.room = room
        self.flats, self.owners = workspace.flats, workspace.owners
        length, experts, groups = workspace.flats.numel(), wave.experts, len(room)
        column = np.array([experts, *range(experts), 0], np.int64) * length
        addresses = workspace.values.data_ptr() + 4 * (column[None, :] + self.starts[:, None])
        steps = int(np.clip(room.sum() // (1024 * wave.block), 1, 16))
        kinds = np.full((groups, 2), KINDS[torch.float32], np.int64)
        pieces = cut_pieces(
            room, np.arange(groups), self.starts, np.zeros(groups, bool), kinds, wave.block, steps
        )
        self.count = len(pieces)
        self.ends_on = wave.send(self.starts + room)
        self.starts_on = wave.send(self.starts)
        self.source = Source(
            wave.send(addresses),
            wave.send(room),
            wave.send(pieces.rows),
            wave.send(pieces.begins),
            [(KINDS[torch.float32], wave.send(np.arange(len(pieces))))],
            wave.send(kinds),
            self.flats,
            wave.block,
        )

    def gather(self, wave: Wave) -> None:
        """Reads the inputs at the listed places."""
        source = self.source
        for kind in wave.kinds_used:
            stats.gather[(self.count,)](
                source.pieces,
                source.sizes,
                source.addresses,
                self.flats,
                self.owners,
                wave.kinds_on,
                wave.origins_on,
                wave.addresses_on,
                K=wave.experts,
                IN=TYPES[kind][1],
                KIND=kind,
                BLOCK=wave.block,
                **EXACT,
            )


class Workspace:
    """The memory of a merge, allocated before anything is written: rows, marks, tables of digits."""

    def __init__(self, rows: int, marks: int, searches: int, experts: int, device: torch.device) -> None:
        self.values = torch.empty(rows * (experts + 1), dtype=torch.float32, device=device)
        self.flats = torch.empty(rows, dtype=torch.int64, device=device)
        self.owners = torch.empty(rows, dtype=torch.int32, device=device)
        self.marks = torch.empty(marks, dtype=torch.uint8, device=device)
        self.tables = torch.zeros(searches * BINS, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class Found:
    """`cuts` (G, K, 2); `totals` (G, K): how many keys the bracket holds, so that a rank can be judged."""

    cuts: Tensor
    totals: Tensor


def search(
    source: Source,
    ranks: Tensor,
    ties: ThresholdTies,
    workspace: Workspace,
    bracket: tuple[Tensor, Tensor] | None = None,
) -> Found:
    """The cut that keeps the `ranks` (G, K) largest keys of those in the bracket; void if there is none."""
    groups, experts = ranks.shape
    ranks = ranks.contiguous().clone()
    prefixes, totals = torch.zeros_like(ranks), torch.zeros_like(ranks)
    listed = source.flats is not None
    flats = ranks if source.flats is None else source.flats
    low, high = bracket or (ranks, ranks)

    def options(kind: int) -> dict[str, object]:
        shape = {"K": experts, "IN": TYPES[kind][1], "BASE": not listed, "WITHIN": bracket is not None}
        return {**shape, "BLOCK": source.block, **EXACT}

    read = (source.pieces, source.sizes, source.addresses, flats, low, high, prefixes)
    for shift in SHIFTS:
        for kind, numbers in source.launches:
            if numbers.numel():
                grid = (numbers.numel() * experts,)
                select.count_digits[grid](numbers, *read, workspace.tables, SHIFT=shift, **options(kind))
        select.settle_digit[(groups * experts,)](
            workspace.tables, prefixes, ranks, totals, FIRST=shift == SHIFTS[0], **EXACT
        )
    if ties is ThresholdTies.ALL:
        indices = torch.full_like(ranks, ALL_INDICES)
        return Found(torch.stack([prefixes, indices], -1), totals)
    pieces = source.pieces.shape[0]
    equal = torch.zeros(pieces + 1, experts, dtype=torch.int64, device=ranks.device)
    for kind, numbers in source.launches:
        if numbers.numel():
            grid = (numbers.numel() * experts,)
            select.count_equal[grid](numbers, *read, equal[1:], **options(kind))
    before = equal.cumsum(0)
    target = before[source.begins[:-1]] + ranks
    holders = torch.searchsorted(before[1:].T.contiguous(), target.T.contiguous()).T.clamp(max=pieces - 1)
    holders = holders.contiguous()
    rest = (target - before.gather(0, holders)).contiguous()
    indices = torch.zeros_like(ranks)
    for kind, _ in source.launches:
        select.place_ties[(groups * experts,)](
            holders,
            rest,
            source.pieces,
            source.sizes,
            source.addresses,
            source.kinds,
            flats,
            low,
            high,
            prefixes,
            indices,
            KIND=kind,
            LISTED=listed,
            **options(kind),
        )
    return Found(torch.stack([prefixes, indices], -1), totals)


# -- the cuts of whole waves --------------------------------------------------------------------------------


def fixed(ranks: Tensor, cuts: Tensor) -> Tensor:
    """The cuts, with those of experts that keep everything or nothing put in."""
    cuts = torch.where((ranks < 0)[..., None], cuts_like(KEEP_ALL, ranks), cuts)
    return torch.where((ranks == 0)[..., None], cuts_like(KEEP_NONE, ranks), cuts).contiguous()


def exact_cuts(wave: Wave, workspace: Workspace, wanted: Integers | None = None) -> Tensor:
    """The cuts of every group, (G, K, 2), or of the `wanted`; with outliers (G, 2K, 2), theirs last."""
    source, ties = Source.inputs(wave, wanted), wave.rule.threshold_ties
    found = []
    for table in wave.ranks():
        ranks = wave.send(table)
        found.append(fixed(ranks, search(source, ranks.clamp(min=1), ties, workspace).cuts))
    return torch.cat(found, 1)


def small_cuts(wave: Wave) -> Tensor:
    """The same where each group is a tensor that one program holds in its registers."""
    found = [fixed(ranks, _select_small(wave, ranks)) for ranks in map(wave.send, wave.ranks())]
    return torch.cat(found, 1)


def _select_small(wave: Wave, ranks: Tensor) -> Tensor:
    cuts = torch.zeros(*ranks.shape, 2, dtype=torch.int64, device=wave.device)
    block = 1 << max(int(wave.sizes.max()) - 1, 255).bit_length()
    for kind in wave.kinds_used:
        numbers = np.array([i for i, m in enumerate(wave.members) if KINDS[m.experts[0].dtype] == kind])
        select.select_small[(len(numbers) * wave.experts,)](
            wave.send(numbers),
            wave.addresses_on,
            wave.sizes_on,
            ranks,
            cuts,
            K=wave.experts,
            IN=TYPES[kind][1],
            BLOCK=block,
            num_warps=16 if block > 4096 else 4,
            **EXACT,
        )
    if wave.rule.threshold_ties is ThresholdTies.ALL:
        cuts[..., 1] = ALL_INDICES
    return cuts


# -- the bracket --------------------------------------------------------------------------------------------


def sample_sizes(group_sizes: Integers) -> Integers:
    """How many entries of each group are sampled: as n^(2/3), where cost and gain balance."""
    wanted = np.minimum(MOST_SAMPLES, (8 * group_sizes.astype(np.float64) ** (2 / 3)).astype(np.int64))
    pairs = np.maximum(1, np.minimum(wanted, group_sizes) // (2 * CLUSTER))
    return np.asarray(pairs * 2 * CLUSTER, np.int64)


def list_samples(wave: Wave, rows: Rows) -> None:
    """Lists clusters at scattered places, one in each of equally long strata of every group."""
    clusters = rows.room // CLUSTER
    stratum = wave.send(wave.group_sizes // clusters)
    total = int(clusters.sum())
    group = torch.repeat_interleave(wave.send(clusters), output_size=total)
    ordinal = torch.arange(total, device=wave.device) - wave.send(np.cumsum(clusters) - clusters)[group]
    scattered = ((ordinal * 0x9E3779B1) & 0xFFFFFFFF) >> 7
    room = stratum[group] - CLUSTER + 1
    start = ordinal * stratum[group] + scattered % room // CLUSTER * CLUSTER
    flat = (start[:, None] + torch.arange(CLUSTER, device=wave.device)).view(-1)
    rows.flats[: flat.numel()] = flat
    everywhere = flat + wave.send(wave.group_begins)[group].repeat_interleave(CLUSTER)
    begins = wave.send(np.cumsum(wave.sizes) - wave.sizes)
    rows.owners[: flat.numel()] = torch.searchsorted(begins, everywhere, right=True) - 1


def sample_bracket(
    wave: Wave, rows: Rows, ranks: Tensor, sigmas: float, bias: float, workspace: Workspace
) -> tuple[Tensor, Tensor]:
    """Cuts (low, high) between which the one that keeps `ranks` (G, K) lies but for bad luck."""
    list_samples(wave, rows)
    rows.gather(wave)
    ties = wave.rule.threshold_ties
    everything, nothing = cuts_like(KEEP_ALL, ranks), cuts_like(KEEP_NONE, ranks)
    sampled = wave.send(rows.room)[:, None]
    n = wave.send(wave.group_sizes)[:, None]
    share = ranks.double() / n.double() + bias
    centre = (share * sampled).clamp(min=1).minimum(sampled.double())
    middle = search(rows.source, centre.long(), ties, workspace).cuts
    variances = torch.zeros_like(ranks)
    source = rows.source
    stats.spread[(rows.count * wave.experts,)](
        source.pieces,
        source.sizes,
        source.addresses,
        rows.flats,
        middle,
        variances,
        K=wave.experts,
        BLOCK=wave.block,
        **EXACT,
    )
    error = variances.clamp(min=1).double().sqrt() * (1 + FEW_CLUSTERS * CLUSTER / sampled)
    half = sigmas * error + 1
    high_rank, low_rank = (centre - half).floor().long(), (centre + half).ceil().long()
    high = search(source, high_rank.clamp(min=1), ties, workspace).cuts
    low = search(source, low_rank.minimum(sampled), ties, workspace).cuts
    high = torch.where((high_rank < 1)[..., None], nothing, high)
    low = torch.where((low_rank > sampled)[..., None], everything, low)
    if not wave.rule.rescale:  # zero entries never count, unless an infinite scale makes them NaN
        above_zero = cuts_like((1, ALL_INDICES), ranks)
        low = torch.where(low[..., :1] == 0, above_zero, low)
        high = torch.where(high[..., :1] == 0, above_zero, high)
    searched = (ranks > 0)[..., None]
    fixed = torch.where((ranks < 0)[..., None], everything, nothing)
    low = torch.where(searched, between_pieces(wave, low, up=True), fixed)
    high = torch.where(searched, between_pieces(wave, high, up=False), fixed)
    return low.contiguous(), high.contiguous()


def between_pieces(wave: Wave, cuts: Tensor, up: bool) -> Tensor:
    """The cuts with their indices moved to where a piece begins, so that a piece has one threshold."""
    offset = wave.send(wave.group_begins)[:, None]
    size = wave.send(wave.group_sizes)[:, None]
    rows = wave.pieces.rows
    edges = wave.send(np.append(wave.group_begins[rows[:, 3]] + rows[:, 4], wave.sizes.sum()))
    at = torch.minimum(cuts[..., 1], size) + offset
    place = torch.searchsorted(edges, at.contiguous(), right=not up)
    moved = edges[place if up else place - 1] - offset
    index = torch.where(cuts[..., 1] >= size, cuts[..., 1], moved)
    return torch.stack([cuts[..., 0], index], -1)
