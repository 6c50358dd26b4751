"""python -m pymerge"""

from __future__ import annotations

from pymerge.cli import main

if __name__ == "__main__":
    main()
