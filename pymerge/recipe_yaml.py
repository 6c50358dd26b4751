"""The recipe's YAML: its documents, no key twice, numbers as in YAML 1.2; imported only when one is read."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from typing import Any

import yaml

from pymerge.errors import RecipeError
from pymerge.text import is_unicode

_FLOAT = re.compile(r"[-+]?(\.\d+|\d+\.\d*|\d+(?=[eE]))([eE][-+]?\d+)?$")
_BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?$")


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads numbers as YAML 1.2 does.

    So 1e-3 and -.5 are numbers, and 1:30 (base 60 in YAML 1.1) and 2026-01-31 are text.
    """


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if key.value in seen:
                raise RecipeError(f"line {key.start_mark.line + 1}: key {key.value!r} is given twice")
            seen.add(key.value)
    loader.flatten_mapping(node)
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and not is_unicode(key.value):
            raise RecipeError(f"line {key.start_mark.line + 1}: key {key.value!r} is not valid Unicode")
    return loader.construct_mapping(node)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what is text in one version of YAML and a number in another."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.yaml_implicit_resolvers = {
    first: [*resolvers] for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
}
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
for _first in "-+0123456789":
    _resolvers = _Loader.yaml_implicit_resolvers[_first]
    _dated = [pair for pair in _resolvers if pair[0] != "tag:yaml.org,2002:timestamp"]
    _Loader.yaml_implicit_resolvers[_first] = [("tag:yaml.org,2002:str", _BASE_60), *_dated]


def read_yaml(text: str) -> list[tuple[str, object]]:
    """Text and value of every YAML document in `text` that is not empty; each text goes up to the next.

    Raises RecipeError when there is none, or what is there is no YAML or gives a key twice.
    """
    loader = None
    starts: list[int] = []
    values: list[object] = []
    try:
        loader = _Loader(text)
        while loader.check_node():
            start = loader.peek_event().start_mark.index  # type: ignore[no-untyped-call]
            value = loader.construct_document(loader.get_node())
            if value is not None:
                starts.append(start if starts else 0)
                values.append(value)
        if not values:
            raise RecipeError("the recipe is empty")
        ends = [*starts[1:], len(text)]
        return [(text[a:b], value) for a, b, value in zip(starts, ends, values, strict=True)]
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            f"line {line}: the character U+{ord(text[error.position]):04X} is not allowed in YAML"
        ) from error
    except yaml.YAMLError as error:
        raise RecipeError(_yaml_sentence(error)) from error
    except (RecursionError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise RecipeError(f"the recipe is not valid YAML: {type(error).__name__}: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()


def write_yaml(value: Any) -> str:
    """YAML that `read_yaml` reads as `value`, and YAML 1.1 too."""
    text = str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
    try:
        same = read_yaml(text)[0][1] == value
    except RecipeError:
        same = False
    return text if same else json.dumps(value, indent=2)  # of odd characters JSON escapes all


def _yaml_sentence(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    line = f"line {mark.line + 1}: " if mark is not None else ""
    return f"{line}the recipe is not valid YAML: {getattr(error, 'problem', None) or error}"
