"""Runs mergekit-yaml on many recipes in one process, because importing it takes longer than merging.

Arguments: a JSON file holding a list of [working folder, recipe, output folder, seed].
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main(tasks: Path) -> None:
    """Merges every task's recipe; the first failure ends the process."""
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    for folder, recipe, out, seed in json.loads(tasks.read_text()):
        os.chdir(folder)  # where mergekit looks for models with relative names
        options = ["--no-copy-tokenizer", "--no-write-model-card", "--quiet", "--random-seed", str(seed)]
        print(recipe, flush=True)
        mergekit_yaml([recipe, out, *options], standalone_mode=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
