"""Free ports on the loopback address."""

import http.client
import random
import socket
import urllib.error
import urllib.request
from collections.abc import Sequence

import psutil

from .errors import PortTaken

# Below Linux's range for outgoing connections: a port kept from one `up` to the next must not be lent to a client meanwhile.
LOWEST, HIGHEST = 20_000, 32_000
LOOPBACK = "127.0.0.1"


def is_free(port: int) -> bool:
    """Whether a server could listen on it now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


def answers(port: int, host: str = LOOPBACK) -> bool:
    """Whether somebody accepts connections on it."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0


def says_ok(url: str) -> bool:
    """Whether a GET of it is answered by 200."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy knows nothing of the loopback address
    try:
        with opener.open(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError):  # ValueError: no URL
        return False


def choose(count: int = 1, beside: Sequence[tuple[int, int]] = ()) -> int:
    """The first of `count` neighbouring ports, all free now, none within the rows `beside` (first port and count).

    Raises:
        PortTaken: There is no such row.
    """
    promised = {first + step for first, length in beside for step in range(length)}
    firsts = list(range(LOWEST, HIGHEST, count))
    random.shuffle(firsts)
    for first in firsts:
        row = range(first, first + count)
        if promised.isdisjoint(row) and all(is_free(port) for port in row):
            return first
    raise PortTaken(f"No {count} free ports in a row between {LOWEST} and {HIGHEST} on {LOOPBACK}.")


def holder(port: int) -> str:
    """Who listens on a port, for an error message; only the port's own user, or root, may know."""
    for connection in psutil.net_connections("inet"):
        if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN and connection.pid:
            process = psutil.Process(connection.pid)
            return f"{process.name()} (pid {process.pid}, user {process.username()})"
    return f"another program (try `ss -ltnp | grep {port}`)"
