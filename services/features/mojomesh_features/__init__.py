"""Reads features online, as of a snapshot, and against a model's baseline."""
