"""Vocabularies that differ: embeddings and heads, put together row by row for the output's tokenizer."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pymerge.adapted import TokenizerRule, TokenRule
from pymerge.checkpoint.tokenizer import Tokenizer, read_tokenizer, with_tokens
from pymerge.errors import CheckpointError
from pymerge.job import MEAN_OF_ALL, Product, Region, Rows, RowTable
from pymerge.plan_checks import Input
from pymerge.plan_inputs import vocabulary_names, with_rows
from pymerge.plan_rule import identity
from pymerge.recipe import Recipe
from pymerge.text import printable, shown

# Rows of a token: (number of the input, row) of each term.
Terms = tuple[tuple[int, int], ...]


class Vocabulary(NamedTuple):
    """The tokenizer of the output, from the model `donor`. `rows`: of its embedding.

    `lines`: what a plan says; `digest`: of where all rows come from.
    """

    tokenizer: Tokenizer
    donor: Path
    rows: int
    lines: tuple[str, ...]
    digest: str


def remap(
    recipe: Recipe,
    opened: Mapping[str, Input],
    donor: Path,
    missing: Collection[Path],
    complete: bool,
    problems: list[str],
) -> tuple[dict[str, Input], Vocabulary | None]:
    """The inputs with every vocabulary tensor as the output's tokenizer wants it; problems are added.

    `donor`: the model whose tokenizer is taken for the base's. `complete`: all models could be opened; else
    only their tokenizers are looked at. `missing`: paths that do not exist, which was said already.
    """
    rule, inputs = recipe.tokenizer, list(opened.values())
    if rule is None or not inputs:
        return dict(opened), None
    chosen = recipe.home(rule.source) if rule.source else donor
    said: list[str] = []
    first = None if chosen in missing else _read(chosen, said)
    known = [found for source in inputs if (found := _read(source.home, said)) is not None]
    problems += dict.fromkeys(said)
    if first is None or len(known) < len(inputs) or not complete:
        return _levelled(opened), None
    before = len(problems)
    tokenizer = with_tokens(first, known if rule.union else [], list(rule.tokens))
    rows = -(-tokenizer.size // rule.pad_to_multiple_of) * rule.pad_to_multiple_of
    base = next((n for n, s in enumerate(inputs) if _is(s, recipe.base)), None)
    remapping = _Remapping(rule, tokenizer, rows, inputs, known, base, problems)
    changed = {key: remapping.changed(number) for number, key in enumerate(opened)}
    if len(problems) > before:
        return _levelled(opened), None
    lines = tuple(remapping.described(chosen))
    return changed, Vocabulary(tokenizer, chosen, rows, lines, remapping.digest())


def _read(folder: Path, problems: list[str]) -> Tokenizer | None:
    try:
        return read_tokenizer(folder)
    except CheckpointError as problem:
        problems.append(f"tokenizer: {problem}")
        return None


def _levelled(opened: Mapping[str, Input]) -> dict[str, Input]:
    """The inputs with as many rows of a vocabulary each: how they differ is no problem of the tensors."""
    names = {key: list(vocabulary_names(source)) for key, source in opened.items()}
    rows = max((_row_count(source, names[key]) for key, source in opened.items()), default=0)
    return {key: with_rows(source, names[key], rows, {}) for key, source in opened.items()}


def _is(source: Input, path: Path | None) -> bool:
    return path is not None and identity(source.checkpoint.path) == identity(path)


class _Remapping:
    """Where each token's row comes from, for every input."""

    def __init__(
        self,
        rule: TokenizerRule,
        tokenizer: Tokenizer,
        rows: int,
        inputs: Sequence[Input],
        tokenizers: Sequence[Tokenizer],
        base: int | None,
        problems: list[str],
    ) -> None:
        self._rule, self._rows, self._inputs, self._base = rule, rows, inputs, base
        self._problems = problems
        self._tokens: list[str | None] = [None] * tokenizer.size
        for token, number in tokenizer.ids.items():
            self._tokens[number] = token
        self._names = [list(vocabulary_names(source)) for source in inputs]
        self._counts = [_row_count(source, names) for source, names in zip(inputs, self._names, strict=True)]
        self._ids = [
            {token: row for token, row in known.ids.items() if row < count}
            for known, count in zip(tokenizers, self._counts, strict=True)
        ]
        given = {token: self._given(token, rule_) for token, rule_ in rule.tokens.items()}
        self._forced = {token: given[token] for token, rule_ in rule.tokens.items() if rule_.force}
        self._defaults = [self._default(token, given) for token in self._tokens]
        self._tables = [self._table(number) for number in range(len(inputs))]

    def changed(self, number: int) -> Input:
        """An input with its vocabulary tensors replaced."""
        source, table = self._inputs[number], self._tables[number]
        used = {table.terms[at] for at in range(0, len(table.terms), 2)}
        made = {}
        for name in self._names[number]:
            donors = [self._rows_of(donor, name) for donor in range(len(self._inputs))]
            lacking = [self._inputs[donor].label for donor in used if donors[donor] is None]
            if lacking:
                self._problems.append(
                    f"tokenizer: {source.label} takes rows of {shown(name)} from {lacking[0]}, which lacks it"
                )
                continue
            entry = source.checkpoint.tensors[name].entry
            width = entry.count // entry.shape[0]
            own = donors[number]
            # A source that no row names is never read; its own keeps the numbers of the others.
            sources = tuple(found for donor in donors if (found := donor or own))
            made[name] = Rows(entry.dtype, width, sources, table)
        return with_rows(source, list(made), self._rows, made)

    def _rows_of(self, number: int, name: str) -> Region | Product | None:
        source = self._inputs[number]
        found = source.source(name) if name in source.checkpoint.tensors else None
        return None if isinstance(found, Rows) else found

    def _given(self, token: str, rule: TokenRule) -> Terms:
        """What a recipe's rule says."""
        if rule.model is None:
            return ()
        where = f"tokenizer.tokens.{token}"
        number = next((n for n, source in enumerate(self._inputs) if _is(source, rule.model)), None)
        if number is None:
            self._problems.append(f"{where}: {rule.model} is not among the models that are merged")
            return ()
        if rule.token_id is not None:
            if rule.token_id >= self._counts[number]:
                self._problems.append(
                    f"{where}: {rule.model} has no row {rule.token_id}, it has {self._counts[number]:,}"
                )
            return ((number, rule.token_id),)
        if rule.token not in self._ids[number]:
            self._problems.append(f"{where}: {rule.model} has no token {shown(rule.token)}")
            return ()
        return ((number, self._ids[number][rule.token]),)

    def _default(self, token: str | None, given: Mapping[str, Terms]) -> Terms:
        """The row for those that lack a token: by its rule, the base's, or the mean of all that there are."""
        if token is None:
            return ()
        if token in given:
            return given[token]
        if self._base is not None and token in self._ids[self._base]:
            return ((self._base, self._ids[self._base][token]),)
        return tuple((number, ids[token]) for number, ids in enumerate(self._ids) if token in ids)

    def _table(self, number: int) -> RowTable:
        ids, forced = self._ids[number], self._forced
        terms = [
            forced[token] if token in forced else ((number, ids[token]),) if token in ids else default
            for token, default in zip(self._tokens, self._defaults, strict=True)
        ]
        runs, flat = array("q"), array("q")
        last: Terms | None = None
        for row, found in enumerate(terms):
            if last is None or found != tuple((source, at + 1) for source, at in last):
                runs.extend((row, len(found)))
                flat.extend(part for term in found for part in term)
            last = found
        if self._rows > len(terms):
            runs.extend((len(terms), MEAN_OF_ALL))
        return RowTable(runs, flat, len(terms))

    def described(self, chosen: Path) -> Iterator[str]:
        """The tokenizer, and how many tokens are missing where, one line each."""
        path = printable(str(chosen))
        what = f"{path} and the tokens that only others have" if self._rule.union else path
        gaps = self._tokens.count(None)
        yield f"tokenizer    {what}: {len(self._tokens) - gaps:,} tokens, {self._rows:,} rows"
        for source, ids in zip(self._inputs, self._ids, strict=True):
            lacking = sum(token not in ids for token in self._tokens) - gaps
            if lacking:
                yield f"             {lacking:,} of them are missing in {printable(source.label)}"
        nowhere = [token for token, terms in zip(self._tokens, self._defaults, strict=True) if not terms]
        zeros = [token for token in nowhere if token is not None and token not in self._rule.tokens]
        if zeros:
            yield f"             {len(zeros):,} are in no model and get zeros, {shown(zeros[0])} first"
        if gaps:
            yield f"             {gaps:,} rows are no token's and get zeros"

    def digest(self) -> str:
        """The sha256, in hex, of all tables."""
        total = hashlib.sha256()
        for table in self._tables:
            total.update(table.runs.tobytes() + b"|" + table.terms.tobytes() + b"|")
        return total.hexdigest()


def _row_count(source: Input, names: Sequence[str]) -> int:
    """Rows that every vocabulary tensor of an input has."""
    return min((source.checkpoint.tensors[name].entry.shape[0] for name in names), default=0)
