"""Plans of a recipe's documents; of a merge that is still to come the headers are known, which is enough."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pymerge.checkpoint.staging import PARTIAL
from pymerge.errors import OutputError, ProblemList, PymergeError
from pymerge.files import is_file_name
from pymerge.plan_checks import device_of, free_bytes, lies_in
from pymerge.planner import Plan, make_plan, plan_or_find
from pymerge.recipe import Document, Recipe
from pymerge.text import printable, shown


@dataclass(frozen=True)
class Stage:
    """The merge of one document into the folder `out`.

    `name`: what later documents call it; None: the output. `planned`: its plan; where it takes merges that
    are not done, `pending`, it was made with stand-ins that have their headers, and `ready` makes the one to
    carry out. `done`: the merge lies in `out` already. `stand_ins`: where the stand-ins were; `folder`: where
    the merges will be.
    """

    name: str | None
    out: Path | None
    planned: Plan
    ready: Callable[[], Plan]
    pending: tuple[str, ...]
    done: bool
    stand_ins: Path
    folder: Path

    @classmethod
    def alone(cls, plan: Plan) -> Stage:
        """The one merge of a recipe that has no others."""
        return cls(None, plan.out, plan, lambda: plan, (), False, Path("-"), Path("-"))

    @property
    def notes(self) -> tuple[str, ...]:
        """The plan's."""
        return tuple(map(self._real, self.planned.notes))

    def describe(self) -> str:
        """The plan in words, and what it waits for."""
        lines = [self._real(self.planned.describe())]
        if self.pending:
            listed = ", ".join(printable(str(self.folder / name)) for name in self.pending)
            lines.append(f"not merged   {listed}: planned from the headers that are to come")
        if self.done:
            lines.append(f"merged       {printable(str(self.out))} is there and will be kept")
        return "\n".join(lines)

    def summary(self) -> dict[str, Any]:
        """The plan in numbers, JSON-ready."""
        numbers = json.loads(self._real(json.dumps(self.planned.summary())))
        return {"name": self.name, **numbers, "pending": list(self.pending), "done": self.done}

    def _real(self, text: str) -> str:
        return text.replace(str(self.stand_ins), str(self.folder)) if self.pending else text


def plan_documents(
    documents: Sequence[Document], out: Path | None, folder: Path, **options: Any
) -> tuple[Stage, ...]:
    """Plan the merges of all documents: those with names into `folder`, the other and last into `out`.

    `options`: as `make_plan` takes them, for all. Raises ProblemList with the problems of all documents,
    apart from what only the headers of a merge could show that cannot be planned itself.
    """
    if len(documents) == 1:
        return (Stage.alone(make_plan(documents[0].draft(), out, **options)),)
    # Nothing takes the merge without a name, and once it is there the command is done.
    ordered = sorted(documents, key=lambda document: document.name is None)
    named = {document.name: folder / document.name for document in documents if document.name}
    problems = [*_wrong_names(documents), *_wrong_places(named, out, folder)]
    taken: dict[int, list[str]] = {}
    for document in ordered:
        try:
            recipe = document.draft(named).recipe
            taken[document.number] = _taken(recipe, named) if recipe else []
        except PymergeError as error:
            problems.append(f"{document.label}: {error}")
    problems += _wrong_order(documents, taken)
    if problems:
        raise ProblemList(problems)
    with TemporaryDirectory(prefix="pymerge-") as place:
        chain = _Chain(named, out, folder, Path(os.path.realpath(place)), options)
        for document in ordered:
            chain.add(document, taken[document.number], problems)
    problems += _lacking_space(chain.stages)
    if problems:
        raise ProblemList(problems)
    return tuple(chain.stages)


class _Chain:
    """The stages so far, and the stand-ins of their outputs in the folder `place`."""

    def __init__(
        self, named: Mapping[str, Path], out: Path | None, folder: Path, place: Path, options: dict[str, Any]
    ) -> None:
        self.stages: list[Stage] = []
        self._named, self._out, self._folder, self._place = named, out, folder, place
        self._options = options
        self._pending: dict[str, bool] = {}

    def add(self, document: Document, takes: Sequence[str], problems: list[str]) -> None:
        """Plan one more document; problems are added."""
        try:
            self.stages.append(self._stage(document, takes))
        except PymergeError as error:
            said = error.problems if isinstance(error, ProblemList) else (str(error),)
            real = (text.replace(str(self._place), str(self._folder)) for text in said)
            problems += [f"{document.label}: {text}" for text in real]

    def _stage(self, document: Document, takes: Sequence[str]) -> Stage:
        if any(name not in self._pending for name in takes):  # so much can be said without their headers
            document.draft(self._named).checked()
            raise ProblemList([])
        pending = tuple(name for name in takes if self._pending[name])
        stand_ins = {name: self._place / name for name in pending}
        draft = document.draft({**self._named, **stand_ins})
        out = self._named[document.name] if document.name else self._out
        if pending and document.name and out is not None and os.path.lexists(out):
            raise OutputError(
                f"{out} exists already, but {' and '.join(map(shown, pending))}, of which it is made, is"
                " yet to be merged; remove it to have it merged anew"
            )
        if document.name:
            plan, done = plan_or_find(draft, out, **self._options)
        else:
            plan, done = make_plan(draft, out, **self._options), False
        if document.name:
            self._pending[document.name] = not done
            if not done:
                _write_stand_in(self._place / document.name, plan)

        def ready() -> Plan:
            return make_plan(document.draft(self._named), out, **self._options)

        return Stage(document.name, out, plan, ready, pending, done, self._place, self._folder)


def _write_stand_in(folder: Path, plan: Plan) -> None:
    """Files with the headers, sizes and contents beside the weights that the plan's output will have."""
    folder.mkdir()
    for layout in plan.layouts:
        with open(folder / layout.file_name, "wb") as file:
            file.write(layout.header)
            file.truncate(layout.size)  # a hole: the elements take no room
    for name, data in plan.side_files.items():
        (folder / name).write_bytes(data)


def _wrong_names(documents: Sequence[Document]) -> Iterator[str]:
    nameless = [str(document.number) for document in documents if document.name is None]
    if len(nameless) > 1:
        yield (
            f"documents {' and '.join(nameless)} have no name; give every document but the one for the output"
            " a name, under which later ones can take its merge"
        )
    first: dict[str, Document] = {}
    for document in documents:
        name = document.name
        if name is None:
            continue
        if not is_file_name(name) or name.endswith(PARTIAL):
            yield f"document {document.number}: name: {shown(name)} cannot be the name of its folder"
        if first.setdefault(name, document) is not document:
            yield (
                f"document {document.number}: name: {shown(name)} is the name of document"
                f" {first[name].number} already"
            )


def _wrong_places(named: Mapping[str, Path], out: Path | None, folder: Path) -> Iterator[str]:
    """The output must lie apart from the merges that it is made of."""
    if out is not None and named and lies_in(folder, out):
        yield f"the folder of the intermediate merges, {folder}, lies inside the output {out}"
    for path in named.values() if out is not None else ():
        if out is not None and lies_in(out, path):
            yield f"output {out} lies inside the intermediate merge {path}"


def _taken(recipe: Recipe, named: Mapping[str, Path]) -> list[str]:
    """The names of the merges that a recipe takes."""
    return [name for name, path in named.items() if path in recipe.paths]


def _wrong_order(documents: Sequence[Document], taken: Mapping[int, Sequence[str]]) -> Iterator[str]:
    """A document can take what stands before it only."""
    by_name = {document.name: document for document in reversed(documents) if document.name}
    for document in documents:
        for name in taken.get(document.number, ()):
            other = by_name[name]
            if other.number < document.number:
                continue
            if other is document:
                yield f"{document.label} takes its own merge as a model"
            elif document.name in _needs(other, by_name, taken):
                yield f"{document.label} and {other.label} need each other's merges"
            else:
                yield f"{document.label} takes the merge of {other.label}, which must stand before it"


def _needs(
    document: Document, by_name: Mapping[str, Document], taken: Mapping[int, Sequence[str]]
) -> set[str]:
    """All merges that a document is made of, directly or not."""
    found: set[str] = set()
    waiting = list(taken.get(document.number, ()))
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += taken.get(by_name[name].number, ())
    return found


def _lacking_space(stages: Sequence[Stage]) -> Iterator[str]:
    """Merges on one file system must fit on it together; that each fits alone its plan has checked."""
    together: dict[int, list[Stage]] = {}
    for stage in stages:
        if stage.out is not None and not stage.done:
            together.setdefault(device_of(stage.out), []).append(stage)
    for some in together.values():
        needed = sum(stage.planned.disk_bytes for stage in some)
        free = max(free_bytes(stage.out) for stage in some if stage.out)
        if len(some) > 1 and needed > free:
            yield f"all merges together need {needed:,} bytes of disk space, {free:,} are free"
