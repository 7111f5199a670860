"""Takes facts in and writes feature rows."""
