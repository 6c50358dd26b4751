"""Chat templates: auto, literal, and by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from families import write_recipe
from vocabularies import write_model

import pymerge
from pymerge.checkpoint.chat import KNOWN
from pymerge.errors import PymergeError

TOKENS = ("a", "b", "<s>")
MESSAGES = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": "A"},
]


def files_of(folder: Path, template: str | None, *templates: str | None) -> dict[str, bytes]:
    """The side files of a merge of models with these templates."""
    paths = [
        write_model(folder / f"m{n}", TOKENS, n, template=given).path for n, given in enumerate(templates)
    ]
    more: dict[str, Any] = {} if template is None else {"chat_template": template}
    return dict(pymerge.plan(write_recipe(folder / "recipe.yml", "linear", paths, **more)).side_files)


def stated(files: dict[str, bytes]) -> str | None:
    """The template that the output has; two places must agree."""
    found = json.loads(files["tokenizer_config.json"]).get("chat_template")
    if "chat_template.jinja" in files:
        assert files["chat_template.jinja"].decode() == found
    return found if found is None else str(found)


@pytest.mark.parametrize(
    ("template", "templates", "expected"),
    [
        (None, ("one", "two", "two"), "one"),
        ("auto", ("one", "two", "two"), "two"),
        ("auto", ("one", "two", None), "one"),
        ("auto", (None, None), None),
        ("{{ messages }}", ("one", "two"), "{{ messages }}"),
        ("chatml", ("one",), KNOWN["chatml"]),
    ],
)
def test_which_template(
    tmp_path: Path, template: str | None, templates: tuple[str | None, ...], expected: str | None
) -> None:
    assert stated(files_of(tmp_path, template, *templates)) == expected


def test_a_file_of_its_own_counts(tmp_path: Path) -> None:
    paths = [write_model(tmp_path / name, TOKENS, 1, template="one").path for name in ("a", "b", "c")]
    for path in paths[1:]:
        (path / "chat_template.jinja").write_text("two")
    recipe = write_recipe(tmp_path / "recipe.yml", "linear", paths, chat_template="auto")
    assert stated(dict(pymerge.plan(recipe).side_files)) == "two"


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("mistral", "chat_template: the template mistral is not built in; give its literal jinja text"),
        ("chatlm", "chat_template: 'chatlm' is not known; known are auto, chatml, llama3, alpaca"),
    ],
)
def test_names_that_are_refused(tmp_path: Path, template: str, sentence: str) -> None:
    with pytest.raises(PymergeError) as caught:
        files_of(tmp_path, template, "one")
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "chatml",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>"
            "\n\nU<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("alpaca", "S\n\n### Instruction:\nU\n\n### Response:\nA</s>\n\n### Response:\n"),
    ],
)
def test_what_the_known_templates_give(name: str, expected: str) -> None:
    jinja = pytest.importorskip("jinja2")
    template = jinja.Environment(trim_blocks=True, lstrip_blocks=True).from_string(KNOWN[name])
    said = template.render(messages=MESSAGES, add_generation_prompt=True, bos_token="<s>", eos_token="</s>")
    assert said == expected
