"""Run by its path, as a child of a process that starts others: when that one vanishes, kill the process groups it named.

It learns of the groups on its standard input: `+group` when one starts, `-group` when it is gone. The death signal that every
child asks for reaches direct children only; Mage and scorer have children of their own. Imports the standard library only,
so that it weighs little.
"""

import contextlib
import os
import signal
import sys


def main() -> None:
    """Wait for the end of standard input, which comes when the parent ends, however it ends."""
    for stopping in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(stopping, signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin:
        (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
