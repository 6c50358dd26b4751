"""Many merges of the same tensors: what one has found out serves the next."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias

from pymerge.errors import RecipeError
from pymerge.methods import Base, Method, method_named
from pymerge.operands import Operands, expert_list, read_operands
from pymerge.options import as_name
from pymerge.rule import Rule
from pymerge.sweep_settings import settings_of
from pymerge.tensor_backends import Wanted, merge_operands
from pymerge.tensor_rule import known_options, members_of, rule_of

if TYPE_CHECKING:
    from pymerge.backends.native import Threshold

# Thresholds of one trim: for each tensor, or for the model as a whole.
Thresholds: TypeAlias = "Sequence[Sequence[Threshold]]"

# Trims whose thresholds are kept, the latest; of 300 tensors and 8 experts they take a megabyte each.
MOST_KEPT = 32


class Session:
    """A base and experts that are merged again and again; made once, so that no merge checks them anew.

    `base`, `experts`, `threads`, `backend`: as in `merge_tensors`. The tensors must stay as they are while
    the session is used. On the CPU a trim by magnitude searches its thresholds once: a merge with other
    weights or another lambda is a single pass. Raises RecipeError, BackendError.
    """

    def __init__(
        self,
        base: object | None,
        experts: Iterable[object],
        *,
        threads: SupportsIndex | None = None,
        backend: str | None = None,
    ) -> None:
        self._base = base
        self._experts = expert_list(experts)
        self._threads, self._backend = threads, backend
        Wanted.of(backend, threads, None)
        self._read: dict[tuple[bool, Base], Operands] = {}
        self._kept: OrderedDict[tuple[object, ...], Thresholds] = OrderedDict()
        self._keeping = Lock()
        if self._experts:
            self._operands(base is not None, Base.ORIGIN)

    def merge(
        self, *, method: str = "ties", out: object | None = None, out_dtype: object = None, **options: Any
    ) -> Any:
        """One merge: the result of `merge_tensors` with these options, bit for bit."""
        return self.sweep([options], method=method, outs=[out], out_dtype=out_dtype)[0]

    def sweep(
        self,
        settings: Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Any]],
        *,
        method: str = "ties",
        outs: Sequence[object | None] | None = None,
        out_dtype: object = None,
        **options: Any,
    ) -> list[Any]:
        """A merge for each setting, from one reading of the tensors where they differ in lambda alone.

        A setting: options of `merge_tensors` by name, which go before `options`; of a mapping of lists every
        combination is a setting. `outs`: where to write each result; None: new tensors. Each result is that
        of `merge_tensors`, bit for bit.
        """
        listed = settings_of(settings)
        options = {
            name: list(value) if isinstance(value, Iterator) else value for name, value in options.items()
        }
        row = method_named(as_name(method, "method"))
        members = members_of(row, self._base, self._experts)
        rules = [self._rule(row, len(members), {**options, **setting}) for setting in listed]
        if outs is not None and (isinstance(outs, Mapping) or not isinstance(outs, Sequence)):
            raise RecipeError(f"outs is a {type(outs).__name__}, expected a list with one for each setting")
        given = list(outs) if outs is not None else [None] * len(rules)
        if len(given) != len(rules):
            raise RecipeError(f"{len(given)} outs for {len(rules)} settings")
        wanted = Wanted.of(self._backend, self._threads, out_dtype)
        results: list[Any] = [None] * len(rules)
        for scope in dict.fromkeys(rule.scope for rule in rules):
            numbers = [number for number, rule in enumerate(rules) if rule.scope is scope]
            some = [rules[number] for number in numbers]
            merged = self._merge(row, some, [given[number] for number in numbers], wanted)
            for number, result in zip(numbers, merged, strict=True):
                results[number] = result
        return results

    def _rule(self, row: Method, count: int, options: Mapping[str, Any]) -> Rule:
        options = known_options(options)
        rule = rule_of(row, count, self._base is not None, **options)
        if rule.task_vector and self._base is None:
            raise RecipeError(f"{row.name} works on task vectors, so it needs a base")
        return rule

    def _merge(
        self, row: Method, rules: Sequence[Rule], outs: Sequence[object | None], wanted: Wanted
    ) -> list[object]:
        operands = self._operands(rules[0].task_vector, row.base)
        known = [self._kept.get(_trim_of(rule)) for rule in rules]
        groups = next((len(found) for found in known if found), 0)
        thresholds = [found[group] if found else () for group in range(groups) for found in known]
        results, report = merge_operands(operands, rules, outs, wanted, thresholds)
        if report is not None:
            for number, rule in enumerate(rules):
                self._keep(rule, report.thresholds[number :: len(rules)])
        return results

    def _operands(self, has_origin: bool, base: Base) -> Operands:
        """The tensors, checked, as a method with this kind of base takes them."""
        key = (has_origin, base if base in (Base.FIRST, Base.MEMBER) else Base.ORIGIN)
        if key not in self._read:
            members = self._experts
            if not has_origin and self._base is not None and key[1] is not Base.ORIGIN:
                members = [self._base, *members] if base is Base.FIRST else [*members, self._base]
            self._read[key] = read_operands(self._base if has_origin else None, members)
        return self._read[key]

    def _keep(self, rule: Rule, thresholds: Thresholds) -> None:
        """The latest used stay."""
        if not rule.trim.by_magnitude or not any(thresholds):
            return
        trim = _trim_of(rule)
        with self._keeping:
            self._kept[trim] = thresholds
            self._kept.move_to_end(trim)
            while len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)


def _trim_of(rule: Rule) -> tuple[object, ...]:
    """All that thresholds depend on. With `rescale` the place of a cut among zeros can matter, too."""
    return (
        rule.trim,
        rule.scope,
        rule.threshold_ties,
        rule.densities,
        rule.gammas,
        rule.one_more,
        rule.rescale,
    )
