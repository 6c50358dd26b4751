"""Chat templates: the one that most inputs have, a literal one, or one of a few known formats."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from pymerge.checkpoint.sidefiles import MAX_SIDE_FILE_BYTES, folder_of
from pymerge.checkpoint.tokenizer import CONFIG_NAME
from pymerge.errors import CheckpointError, RecipeError
from pymerge.files import Malformed, json_object, object_in, read_file
from pymerge.text import shown

AUTO = "auto"
TEMPLATE_NAME = "chat_template.jinja"
# Written from the public description of each format.
KNOWN = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ message['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "alpaca": (
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}"
        "{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
}
# Names that mergekit knows too, of formats that differ from version to version of their models.
OTHERS = ("exaone", "mistral")


def check_template(given: str | None) -> None:
    """RecipeError for a name that no template is known by; what has braces is a template."""
    if given is None or given == AUTO or given in KNOWN or "{" in given:
        return
    if given in OTHERS:
        raise RecipeError(f"chat_template: the template {given} is not built in; give its literal jinja text")
    known = ", ".join((AUTO, *KNOWN))
    raise RecipeError(
        f"chat_template: {shown(given)} is not known; known are {known}, or a literal jinja text in braces"
    )


def template_of(checkpoint: Path) -> str | None:
    """The chat template of a model, if it has exactly one; raises CheckpointError."""
    folder = folder_of(checkpoint)
    if os.path.lexists(folder / TEMPLATE_NAME):
        try:
            return read_file(folder / TEMPLATE_NAME, MAX_SIDE_FILE_BYTES).decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{folder / TEMPLATE_NAME}: the file is not UTF-8 text") from None
    if not os.path.lexists(folder / CONFIG_NAME):
        return None
    data = read_file(folder / CONFIG_NAME, MAX_SIDE_FILE_BYTES)
    try:
        found = json_object(data).get("chat_template")
    except Malformed as problem:
        raise CheckpointError(f"{folder / CONFIG_NAME}: {problem}") from None
    if isinstance(found, str) and not found.isascii():
        try:
            found.encode("utf-8")
        except UnicodeEncodeError:
            raise CheckpointError(f"{folder / CONFIG_NAME}: its chat_template is no whole text") from None
    return found if isinstance(found, str) else None


def chosen_template(given: str, models: Sequence[Path]) -> str | None:
    """The template that `chat_template: given` asks for; with "auto" the one that most models have.

    Of equally frequent ones the first; None where no model has one.
    """
    if given != AUTO:
        return KNOWN.get(given, given)
    found = Counter(template for model in models if (template := template_of(model)))
    return found.most_common(1)[0][0] if found else None


def with_template(files: Mapping[str, bytes], template: str) -> dict[str, bytes]:
    """`files` of a tokenizer with this template and no other."""
    changed = {name: data for name, data in files.items() if name != "chat_template.json"}
    changed[TEMPLATE_NAME] = template.encode("utf-8")
    config = object_in(Path(CONFIG_NAME), changed.get(CONFIG_NAME, b"{}"))
    # Older versions of transformers look only here.
    config["chat_template"] = template
    changed[CONFIG_NAME] = (json.dumps(config, indent=2) + "\n").encode("ascii")
    return changed
