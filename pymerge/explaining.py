"""Rows of the table of methods in words, derived from them alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pymerge.blending import DEFAULTS
from pymerge.methods import Base, Method
from pymerge.parameters import Preset
from pymerge.presets import KEEPS_ONE, Defaults, defaults_of
from pymerge.rule import READ_ONCE, Blend, Blending, Fuse, Fusing, Rule, Trim, Vectors


def explain(method: Method, preset: Preset = Preset.MERGEKIT) -> str:
    """The row in words: statistics, stages, passes over the inputs, bytes moved; derived from it alone.

    `preset`: whose defaults are shown. Raises RecipeError where it has no such method.
    """
    assumed = defaults_of(preset, method.name)
    method = replace(
        method,
        normalize=method.normalize if assumed.normalize is None else assumed.normalize,
        density=method.density if assumed.density is None else assumed.density,
        rescale=method.rescale and not assumed.by_density,
    )
    lines = [f"{method.name}: {method.summary}", f"paper       {method.paper}"]
    if preset is not Preset.MERGEKIT:
        lines.append(f"preset      {'; '.join([preset.value, *_meant(assumed)])}")
    lines += [f"{label:<12}{text}" for label, text in _explained(method, assumed)]
    return "\n".join(lines)


def _meant(assumed: Defaults) -> Iterator[str]:
    """What a preset means beside numbers."""
    if assumed.normalize is not None:
        yield f"what agrees is {'averaged' if assumed.normalize else 'summed'}"
    if assumed.by_density:
        yield "what is kept is divided by the density, unless rescale is given"
    if assumed.plain_vote:
        yield "weights neither vote nor divide the mean"
    if assumed.differs:
        yield assumed.differs
    if assumed.keeps_one:
        yield KEEPS_ONE


def numbers_of(method: Method, rule: Rule) -> list[str]:
    """What a rule says beside weights and densities, for a plan: a name and its value each."""
    thresholds = method.trim.by_magnitude
    said = {
        "scope": rule.scope.value if thresholds else None,
        "threshold_ties": rule.threshold_ties.value if thresholds else None,
        "gamma": " and ".join(f"{gamma:g}" for gamma in dict.fromkeys(rule.gammas)) or None,
        "epsilon": " and ".join(f"{epsilon:g}" for epsilon in dict.fromkeys(rule.epsilons)) or None,
        "rescale": str(rule.rescale).lower() if method.dense else None,
        "normalize": str(rule.normalize).lower() if normalizes(method) else None,
        "lambda": f"{rule.lambda_:g}" if method.scales else None,
        "seed": rule.seed if method.trim.drawn else None,
        "select_topk": f"{rule.densities[0]:g}" if method.trim is Trim.VARIANCE else None,
    }
    words = [f"{name} {value}" for name, value in said.items() if value is not None]
    words += _numbers_of_blend(rule.blend) if rule.blend else ()
    return [*words, *(_numbers_of_fuse(rule.fuse) if rule.fuse else ())]


def normalizes(method: Method) -> bool:
    """Whether normalize says anything."""
    return not method.own and method.fuse is None and method.trim is not Trim.IMPORTANCE


def _numbers_of_fuse(fuse: Fusing) -> list[str]:
    return {
        Fuse.SWAP: [f"t {fuse.t:g}"],
        Fuse.OVERLAP: [
            f"epsilon {fuse.t:g}",
            *([f"r {fuse.boost:g}, alpha {fuse.most_boost:g}"] if fuse.boost else ()),
        ],
        Fuse.CONSENSUS: [f"claim {fuse.t:g}", f"votes {fuse.votes}"],
    }.get(fuse.kind, [])


def _numbers_of_blend(blend: Blending) -> list[str]:
    words = {
        Blend.SLERP: [f"t {blend.t:g}"],
        Blend.MULTISLERP: [f"eps {blend.eps:g}"],
        Blend.KARCHER: [f"max_iter {blend.max_iter}", f"tol {blend.tol:g}"],
    }.get(blend.kind, [])
    return words if blend.vectors is Vectors.TENSOR else [*words, f"by {blend.vectors.value}"]


_STATISTICS = {
    Trim.NONE: "none",
    Trim.MAGNITUDE: "the k-th largest |d| of each expert, found exactly while merging",
    Trim.RANDOM: "none",
    Trim.OUTLIERS: "two ranks of the |d| of each expert, found exactly while merging",
    Trim.RANKED: "ranks of |d| within each row",
    Trim.VARIANCE: "the k-th largest variance over the experts; each expert's mean square of what is kept",
    Trim.IMPORTANCE: "each row's divergence of softmax(x) from softmax(base); quartiles of |d| times it",
}
_TRIMS = {
    Trim.NONE: "none: every entry takes part",
    Trim.MAGNITUDE: "keep the int(density * n) largest |d|; among equals the lowest index first (or all)",
    Trim.RANDOM: "keep each entry with probability density, drawn from (seed, tensor, index, expert)",
    Trim.OUTLIERS: "drop the int(gamma * n) largest |d|, keep the int(density * n) largest of the others;"
    " fewer are dropped where both together are more than n",
    Trim.RANKED: "keep each entry with a probability from density - epsilon (the smallest of its row) to"
    " density + epsilon (the largest), drawn from (seed, tensor, index, expert)",
    Trim.VARIANCE: "keep the share select_topk of the entries that are not all equal, where they vary most",
    Trim.IMPORTANCE: "keep what is at least the median plus 1.5 interquartile ranges",
}
ONE_MORE = "keep the int(density * n) + 1 largest |d|, and all that equal the smallest of them"
_FUSES = {
    Fuse.SWAP: "share * x + (1 - share) * base, share = t / |x - base| between 0 and 1",
    Fuse.OVERLAP: "the mean of the entries past epsilon; one alone goes whole",
    Fuse.ENERGY: "sum of energy * entry over what agrees, divided by the energies that took part",
    Fuse.LARGEST: "the largest weight * entry",
    Fuse.ELECTED: "the largest weight * entry of the elected sign",
    Fuse.CONSENSUS: "sum of weight * entry, kept where `votes` experts have |entry| >= claim * |sum - entry|",
}
_INPUTS = {
    Base.UNUSED: ("K", "K inputs"),
    Base.ORIGIN: ("K + 1", "K + 1 inputs (base and experts)"),
    Base.OPTIONAL_ORIGIN: ("K", "K inputs, and a base or none"),
    Base.FIRST: ("K", "K inputs, the base first"),
    Base.MEMBER: ("K", "K inputs"),
}


def _explained(method: Method, assumed: Defaults) -> list[tuple[str, str]]:
    count, streams = _INPUTS[method.base]
    if method.most == method.fewest:
        streams = streams.replace("K inputs", "1 input" if method.most == 1 else f"{method.most} inputs")
        if method.task_vector:
            count, streams = "2", "2 inputs (base and one other)"
    number, times = _passes(method)
    each = f"({count})" if "+" in count else count
    factor = f"{times} * {each} * input size" if times > 1 else f"{each} * input size"
    return [
        ("inputs", f"{streams}{_weights(method, assumed)}"),
        ("defaults", ", ".join(defaults_in_words(method, assumed)) or "none"),
        ("statistics", _statistics(method)),
        ("trim", ONE_MORE if assumed.one_more else _TRIMS[method.trim]),
        ("elect", _elect(method, assumed)),
        ("combine", _combine(method, assumed)),
        ("passes", number),
        ("bytes", f"for each output element: {factor} read, 1 * output size written"),
    ]


def _statistics(method: Method) -> str:
    if method.blend:
        return "the inner products of all pairs of inputs; from them one coefficient for each"
    said = _STATISTICS[method.trim]
    if method.rescale:
        sums = "sum |d| before and after the trim, for each tensor and expert"
        return sums if said == "none" else f"{said}; {sums}"
    if "alpha" in method.own:
        return "how many entries of each expert stand alone, and how many do not"
    return said


def _weights(method: Method, assumed: Defaults) -> str:
    if not method.weighted:
        return ""
    return ", one weight for each expert" + (", which must be given" if assumed.weight is None else "")


def _elect(method: Method, assumed: Defaults) -> str:
    if method.fuse is Fuse.ENERGY or assumed.plain_vote:
        return "the sign of the sum of the entries; only entries of that sign go on"
    if method.elect or method.fuse is Fuse.ELECTED:
        return "the sign of the sum of the weighted entries; only entries of that sign go on"
    return "none: every kept entry goes on"


def _combine(method: Method, assumed: Defaults) -> str:
    if method.name == "passthrough":
        return "entry * scale; with scale 1 the bytes themselves"
    if method.fuse:
        combine = _FUSES[method.fuse]
        if method.fuse is Fuse.SWAP:
            return combine
        if "alpha" in method.own:
            combine += ", times its expert's factor"
    else:
        factor = "coefficient * " if method.blend else "weight * " if method.weighted else ""
        combine = f"sum of {factor}entry" if factor else "the kept entry"
        if method.normalize:
            by = "how many took part" if assumed.plain_vote else "the sum of the weights that took part"
            combine += f", divided by {by}"
    added = {
        Base.ORIGIN: "times lambda, added to the base" if method.scales else "added to the base",
        Base.OPTIONAL_ORIGIN: "added to the base where there is one",
    }.get(method.base)
    return f"{combine}; {added}" if added else combine


def _passes(method: Method) -> tuple[str, int]:
    """In words, and how often the inputs are read by default."""
    if method.blend:
        return f"2 (1 for tensors, or rows, of up to {READ_ONCE:,} elements)", 2
    if method.trim is Trim.VARIANCE:
        return "2 (3 while select_topk < 1; more for tensors whose scores are not held in memory)", 2
    if method.trim is Trim.IMPORTANCE:
        return "3 (more for tensors whose scores are not held in memory)", 3
    if method.rescale:
        long = ", one more where rows are longer than 65,536" if method.trim is Trim.RANKED else ""
        return f"2 while density < 1 (1 with rescale: false){long}", 2
    if "alpha" in method.own:
        return "2 (1 while r or alpha is 0)", 2
    return ("1 (2 with rescale: true)" if method.dense else "1"), 1


def defaults_in_words(method: Method, assumed: Defaults) -> list[str]:
    """Every parameter that the method has, and its value where a recipe is silent.

    `assumed`: of a preset, what the row itself does not hold.
    """
    words = [] if assumed.weight is None else [f"weight {assumed.weight:g}"]
    if normalizes(method) and not method.blend:
        words.append(f"normalize {str(method.normalize).lower()}")
    if method.dense:
        words += [f"density {method.density:g}", f"rescale {str(method.rescale).lower()}"]
    if method.trim.by_magnitude:
        words += [f"scope {assumed.scope.value}", f"threshold_ties {assumed.threshold_ties.value}"]
    if method.trim is Trim.OUTLIERS:
        words.append(f"gamma {method.gamma:g}")
    if method.trim is Trim.RANKED:
        words.append(f"epsilon {method.epsilon:g}")
    if method.scales:
        words.append(f"lambda {assumed.lambda_:g}")
    for name in method.own:
        value = DEFAULTS[name]
        text = str(value).lower() if isinstance(value, bool) else f"{value:g}" if value is not None else ""
        words.append(f"{name} {text or 'must be given'}")
    return words
