"""Measurements; run from the repository's root, for example python -m bench.checkpoint."""
