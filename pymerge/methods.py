"""THE TABLE of merge methods.

A method is data: what it is relative to, how it trims, elects and combines. Semantics: mergekit 0.1.5.
A new method is a new row here and a golden test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from pymerge.errors import RecipeError
from pymerge.rule import Blend, Fuse, Trim


class Base(Enum):
    """What a method does with the base: nothing; subtracts it, always or if there is one; or it is an expert.

    FIRST: the first of the experts, and required. MEMBER: listed or not, one of them like any other.
    """

    UNUSED = "unused"
    ORIGIN = "origin"
    OPTIONAL_ORIGIN = "optional origin"
    FIRST = "first"
    MEMBER = "member"


@dataclass(frozen=True, slots=True)
class Method:
    """One row. `normalize`, `rescale`, `density`, `gamma`, `epsilon`: the defaults where a recipe is silent.

    `fewest`, `most`: how many experts it takes, the base among them where it is one. `weighted`: every expert
    needs a weight. `own`: parameters that only this method has.
    """

    name: str
    summary: str
    paper: str
    base: Base = Base.ORIGIN
    blend: Blend | None = None
    fuse: Fuse | None = None
    weighted: bool = True
    fewest: int = 1
    most: int | None = None
    own: tuple[str, ...] = ()
    trim: Trim = Trim.NONE
    elect: bool = False
    normalize: bool = False
    rescale: bool = False
    density: float = 1.0
    gamma: float = 0.01
    epsilon: float = 0.15

    @property
    def dense(self) -> bool:
        """Whether each expert has a density."""
        return self.trim is not Trim.NONE and not self.trim.scored

    @property
    def scales(self) -> bool:
        """Whether lambda multiplies the merged task vector."""
        plain = self.fuse not in (Fuse.SWAP, Fuse.OVERLAP, Fuse.ENERGY)
        return self.task_vector and self.blend is None and plain

    @property
    def task_vector(self) -> bool:
        """Whether experts are taken relative to a base, which must be given."""
        return self.base is Base.ORIGIN


_ROWS = (
    Method(
        name="linear",
        summary="weighted average of the models",
        paper="https://arxiv.org/abs/2203.05482",
        base=Base.UNUSED,
        normalize=True,
    ),
    Method(
        name="task_arithmetic",
        summary="base plus the weighted sum of the task vectors",
        paper="https://arxiv.org/abs/2212.04089",
    ),
    Method(
        name="ties",
        summary="keep each task vector's largest entries, elect a sign, average those that agree",
        paper="https://arxiv.org/abs/2306.01708",
        trim=Trim.MAGNITUDE,
        elect=True,
        normalize=True,
    ),
    Method(
        name="dare_linear",
        summary="drop random entries of each task vector, rescale the rest, sum",
        paper="https://arxiv.org/abs/2311.03099",
        trim=Trim.RANDOM,
        rescale=True,
    ),
    Method(
        name="dare_ties",
        summary="drop random entries of each task vector, rescale the rest, elect a sign, sum what agrees",
        paper="https://arxiv.org/abs/2311.03099",
        trim=Trim.RANDOM,
        elect=True,
        rescale=True,
    ),
    Method(
        name="breadcrumbs",
        summary="drop each task vector's outliers and its small entries, sum",
        paper="https://arxiv.org/abs/2312.06795",
        trim=Trim.OUTLIERS,
    ),
    Method(
        name="breadcrumbs_ties",
        summary="drop each task vector's outliers and its small entries, elect a sign, sum what agrees",
        paper="https://arxiv.org/abs/2312.06795",
        trim=Trim.OUTLIERS,
        elect=True,
    ),
    Method(
        name="della",
        summary="drop random entries of each task vector, sooner the smaller in its row, elect, average",
        paper="https://arxiv.org/abs/2406.11617",
        trim=Trim.RANKED,
        elect=True,
        normalize=True,
        rescale=True,
    ),
    Method(
        name="della_linear",
        summary="drop random entries of each task vector, sooner the smaller in its row, rescale, sum",
        paper="https://arxiv.org/abs/2406.11617",
        trim=Trim.RANKED,
        rescale=True,
    ),
    Method(
        name="sce",
        summary="keep entries where the experts differ most, weigh experts by energy, average what agrees",
        paper="https://arxiv.org/abs/2408.07990",
        trim=Trim.VARIANCE,
        fuse=Fuse.ENERGY,
        weighted=False,
        own=("select_topk",),
    ),
    Method(
        name="ram",
        summary="average the entries that experts changed, leave alone what only one did",
        paper="https://arxiv.org/abs/2601.13572",
        fuse=Fuse.OVERLAP,
        weighted=False,
        own=("epsilon",),
    ),
    Method(
        name="ramplus_tl",
        summary="as ram, and raise what only one expert changed the more, the less of it stands alone",
        paper="https://arxiv.org/abs/2601.13572",
        fuse=Fuse.OVERLAP,
        weighted=False,
        own=("epsilon", "r", "alpha"),
    ),
    Method(
        name="nearswap",
        summary="take the other model where it is near the base, and the less the further it is",
        paper="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
        fuse=Fuse.SWAP,
        weighted=False,
        most=1,
        own=("t",),
    ),
    Method(
        name="arcee_fusion",
        summary="take from the other model the entries whose importance is an outlier",
        paper="https://arxiv.org/abs/2403.13257",
        trim=Trim.IMPORTANCE,
        weighted=False,
        most=1,
    ),
    Method(
        name="magmax",
        summary="of each parameter's entries keep the largest",
        paper="https://arxiv.org/abs/2407.06322",
        fuse=Fuse.LARGEST,
    ),
    Method(
        name="emr",
        summary="elect a sign, keep the largest of the entries that agree (EMR's unified task vector)",
        paper="https://arxiv.org/abs/2405.17461",
        fuse=Fuse.ELECTED,
    ),
    Method(
        name="consensus",
        summary="sum the task vectors, keep what enough experts claim for their own",
        paper="https://arxiv.org/abs/2405.07813",
        fuse=Fuse.CONSENSUS,
        own=("claim", "votes"),
    ),
    Method(
        name="slerp",
        summary="the point at share t of the arc from the base to one other model",
        paper="https://doi.org/10.1145/325165.325242",
        base=Base.FIRST,
        blend=Blend.SLERP,
        weighted=False,
        fewest=2,
        most=2,
        own=("t",),
    ),
    Method(
        name="nuslerp",
        summary="the point on the arc between two models (or task vectors) that their weights give",
        paper="https://doi.org/10.1145/325165.325242",
        base=Base.OPTIONAL_ORIGIN,
        blend=Blend.NUSLERP,
        fewest=2,
        most=2,
        own=("nuslerp_flatten", "nuslerp_row_wise"),
    ),
    Method(
        name="multislerp",
        summary="the weighted mean direction of models (or task vectors) at their mean length",
        paper="https://arxiv.org/abs/2403.13257",
        base=Base.OPTIONAL_ORIGIN,
        blend=Blend.MULTISLERP,
        own=("normalize_weights", "eps"),
    ),
    Method(
        name="karcher",
        summary="the Riemannian (Karcher) mean of the models' directions at their mean length",
        paper="https://doi.org/10.1002/cpa.3160300502",
        base=Base.MEMBER,
        blend=Blend.KARCHER,
        weighted=False,
        own=("max_iter", "tol"),
    ),
    Method(
        name="model_stock",
        summary="from the base toward the experts' mean, as far as the angle between their task vectors says",
        paper="https://arxiv.org/abs/2403.19522",
        blend=Blend.MODEL_STOCK,
        weighted=False,
        fewest=2,
        own=("filter_wise",),
    ),
    Method(
        name="passthrough",
        summary="one model as it is, or times a number",
        paper="https://arxiv.org/abs/2403.13257",
        base=Base.MEMBER,
        weighted=False,
        most=1,
        own=("scale",),
    ),
)

METHODS: Mapping[str, Method] = MappingProxyType({row.name: row for row in _ROWS})


def method_named(name: str) -> Method:
    """The row called `name`; RecipeError lists the known names."""
    if name in METHODS:
        return METHODS[name]
    from difflib import get_close_matches  # late: only for what is wrong

    near = get_close_matches(name.lower().replace("-", "_"), METHODS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise RecipeError(f"unknown merge method {name!r}; {hint}known are {', '.join(METHODS)}")
