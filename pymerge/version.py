"""The two versions that decide what a merge means."""

from __future__ import annotations

VERSION = "0.1.0"
# Raised whenever the same recipe on the same inputs may give other bits; a resume across it is refused.
NUMERICS_VERSION = 2
