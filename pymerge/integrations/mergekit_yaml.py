"""The command pymerge-yaml: mergekit-yaml with its own arguments, merging through pymerge."""

from __future__ import annotations

import sys

from pymerge.errors import BackendError
from pymerge.integrations.mergekit import enable

EXIT_ERROR = 2


def main() -> None:
    """Runs mergekit's command and says at the end, on stderr, what pymerge merged and what it left."""
    try:
        patches = enable()
    except BackendError as error:
        print(f"pymerge-yaml: {error}", file=sys.stderr)
        sys.exit(EXIT_ERROR)
    from mergekit.scripts.run_yaml import main as run

    with patches:
        try:
            run()
        finally:
            if patches.tally.made or patches.tally.left:
                print(patches.summary(), file=sys.stderr)


if __name__ == "__main__":
    main()
