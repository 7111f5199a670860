"""Turns a snapshot into a signed bundle."""
