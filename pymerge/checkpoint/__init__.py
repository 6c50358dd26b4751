"""Checkpoints on disk: strict headers, folders of shards, output layout, crash-safe writing, side files."""
