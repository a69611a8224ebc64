"""The same work over TCP, on loopback."""

from rows import Row, conditions, interleaved, legend, matrix
from servers import in_place, port, size_of_full
from tools import KIB, MIB

ROWS = [
    Row("random read 4k, 1 in flight", "fio", "randread", 4 * KIB, 1),
    Row("random read 4k, 16 in flight", "fio", "randread", 4 * KIB, 16),
    Row("light: random read 4k, 16 × 4 connections", "light", "read", 4 * KIB, 16, jobs=4),
    Row("sequential read 1 MiB, 8", "fio", "read", MIB, 8, unit="mb"),
    Row("sequential write 1 MiB, 8", "fio", "write", MIB, 8, unit="mb"),
]

def section(work, quick):
    rounds, seconds = (2, 0.3) if quick else (3, 1)
    servers = in_place(work.parent, size_of_full(quick), port(), few=True)
    results = interleaved(servers, ROWS, rounds, seconds, work)
    return [*matrix(results, ROWS, servers), "",
            legend(rounds, seconds, "127.0.0.1, page cache warm."), conditions(results)], results
