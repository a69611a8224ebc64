"""The light client: rows in which fio is not most of the work."""

import goals
from rows import Row, conditions, interleaved, legend, matrix
from servers import in_place, size_of_full
from tools import KIB, MIB

READ_16 = "light: random read 4k, 16"
READ_16X4 = "light: random read 4k, 16 × 4 connections"
WRITE_16 = "light: random write 4k in place, 16"

ROWS = [
    Row(READ_16, "light", "read", 4 * KIB, 16),
    Row(READ_16X4, "light", "read", 4 * KIB, 16, jobs=4),
    Row(WRITE_16, "light", "write", 4 * KIB, 16),
]


def section(work, quick):
    rounds, seconds = (2, 0.3) if quick else (3, 1)
    size = size_of_full(quick)
    servers = in_place(work.parent, size, work / "s", quick)
    results = interleaved(servers, ROWS, rounds, seconds, work)
    out = matrix(results, ROWS, servers)
    out += ["", legend(rounds, seconds, f"`light` of tests/src/bin, {size // MIB} MiB of data, "
                       "page cache warm: it sends all its free slots at once, looks at no data."),
            conditions(results)]
    out += goals.lines(
        goals.at_least(READ_16X4, 2, "nbdkit file", results[READ_16X4]),
        goals.at_least(READ_16X4, 12, "qemu-nbd qcow2", results[READ_16X4]))
    return out, results
