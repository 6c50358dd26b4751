"""Rows of the table of methods in words, derived from them alone."""

from __future__ import annotations

from pymerge.blending import DEFAULTS
from pymerge.methods import Base, Method
from pymerge.rule import READ_ONCE, Blend, Blending, Rule, Trim, Vectors


def explain(method: Method) -> str:
    """The row in words: statistics, stages, passes over the inputs, bytes moved; derived from it alone."""
    lines = [f"{method.name}: {method.summary}", f"paper       {method.paper}"]
    lines += [f"{label:<12}{text}" for label, text in _explained(method)]
    return "\n".join(lines)


def numbers_of(method: Method, rule: Rule) -> str:
    """What a rule says beside weights and densities, for a plan."""
    thresholds, trims = method.trim.by_magnitude, method.trim is not Trim.NONE
    said = {
        "scope": rule.scope.value if thresholds else None,
        "threshold_ties": rule.threshold_ties.value if thresholds else None,
        "gamma": ", ".join(f"{gamma:g}" for gamma in dict.fromkeys(rule.gammas)) or None,
        "rescale": str(rule.rescale).lower() if trims else None,
        "normalize": None if method.own else str(rule.normalize).lower(),
        "lambda": f"{rule.lambda_:g}" if method.task_vector and method.blend is None else None,
        "seed": rule.seed if method.trim is Trim.RANDOM else None,
    }
    words = [f"{name} {value}" for name, value in said.items() if value is not None]
    return ", ".join([*words, *(_numbers_of_blend(rule.blend) if rule.blend else ())])


def _numbers_of_blend(blend: Blending) -> list[str]:
    words = {
        Blend.SLERP: [f"t {blend.t:g}"],
        Blend.MULTISLERP: [f"eps {blend.eps:g}"],
        Blend.KARCHER: [f"max_iter {blend.max_iter}", f"tol {blend.tol:g}"],
    }.get(blend.kind, [])
    return words if blend.vectors is Vectors.TENSOR else [*words, f"by {blend.vectors.value}"]


def _explained(method: Method) -> list[tuple[str, str]]:
    statistics = {
        Trim.NONE: "none",
        Trim.MAGNITUDE: "the k-th largest |d| of each expert, found exactly while merging",
        Trim.RANDOM: "none",
        Trim.OUTLIERS: "two ranks of the |d| of each expert, found exactly while merging",
    }[method.trim]
    if method.rescale:
        sums = "sum |d| before and after the trim, for each tensor and expert"
        statistics = sums if statistics == "none" else f"{statistics}; {sums}"
    if method.blend:
        statistics = "the inner products of all pairs of inputs; from them one coefficient for each"
    trim = {
        Trim.NONE: "none: every entry takes part",
        Trim.MAGNITUDE: "keep the int(density * n) largest |d|; among equals the lowest index first (or all)",
        Trim.RANDOM: "keep each entry with probability density, drawn from (seed, tensor, index, expert)",
        Trim.OUTLIERS: "drop the int(gamma * n) largest |d|, keep the int(density * n) largest of the others;"
        " fewer are dropped where both together are more than n",
    }[method.trim]
    elect = "the sign of the sum of the weighted entries; only entries of that sign go on"
    if method.name == "passthrough":
        combine = "entry * scale; with scale 1 the bytes themselves"
    else:
        total = f"sum of {'coefficient' if method.blend else 'weight'} * entry"
        combine = f"{total}, divided by the sum of the weights that took part" if method.normalize else total
    added = {
        Base.ORIGIN: "added to the base" if method.blend else "times lambda, added to the base",
        Base.OPTIONAL_ORIGIN: "added to the base where there is one",
    }.get(method.base)
    combine += f"; {added}" if added else ""
    count, streams = {
        Base.UNUSED: ("K", "K inputs"),
        Base.ORIGIN: ("K + 1", "K + 1 inputs (base and experts)"),
        Base.OPTIONAL_ORIGIN: ("K", "K inputs, and a base or none"),
        Base.FIRST: ("K", "K inputs, the base first"),
        Base.MEMBER: ("K", "K inputs"),
    }[method.base]
    if method.most == method.fewest:
        streams = streams.replace("K inputs", "1 input" if method.most == 1 else f"{method.most} inputs")
    twice = method.rescale or method.blend is not None
    number = "2 while density < 1 (1 with rescale: false)" if twice else "1"
    if method.blend:
        number = f"2 (1 for tensors, or rows, of up to {READ_ONCE:,} elements)"
    elif not twice and method.trim is not Trim.NONE:
        number = "1 (2 with rescale: true)"
    factor = f"{'2 * ' if twice else ''}({count}) * input size" if "+" in count else f"{count} * input size"
    if twice and "+" not in count:
        factor = f"2 * {factor}"
    defaults = [] if method.blend or method.own else [f"normalize {str(method.normalize).lower()}"]
    if method.trim is not Trim.NONE:
        defaults += [f"density {method.density:g}", f"rescale {str(method.rescale).lower()}"]
    if method.trim is Trim.OUTLIERS:
        defaults.append(f"gamma {method.gamma:g}")
    if method.task_vector and not method.blend:
        defaults.append("lambda 1")
    defaults += own_defaults(method)
    return [
        ("inputs", f"{streams}, one weight for each expert" if method.weighted else streams),
        ("defaults", ", ".join(defaults)),
        ("statistics", statistics),
        ("trim", trim),
        ("elect", elect if method.elect else "none: every kept entry goes on"),
        ("combine", combine),
        ("passes", number),
        ("bytes", f"for each output element: {factor} read, 1 * output size written"),
    ]


def own_defaults(method: Method) -> list[str]:
    """The parameters that only this method has, each with what it is where a recipe is silent."""
    words = []
    for name in method.own:
        value = DEFAULTS[name]
        text = str(value).lower() if isinstance(value, bool) else f"{value:g}" if value is not None else ""
        words.append(f"{name} {text or 'must be given'}")
    return words
