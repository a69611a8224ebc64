"""fio over NBD on data that is there, beside every peer, interleaved."""

import goals
from goals import BEST
from rows import Row, conditions, durability, interleaved, legend, matrix, median
from servers import NULL, in_place, size_of_full
from tools import KIB, MIB, table

READ_1 = "random read 4k, 1 in flight"
READ_16 = "random read 4k, 16 in flight"
READ_16X4 = "random read 4k, 16 × 4 connections"
WRITE_16 = "random write 4k in place, 16"
MIXED = "random 70 % read, 30 % write 4k, 16"
SEQ_READ = "sequential read 1 MiB, 8"
SEQ_WRITE = "sequential write 1 MiB, 8"
FSYNC = "fsync after each 4k write, 4 jobs"
FUA = "FUA write 4k, 1 in flight (light client: fio cannot)"

# What leaves much to write back is last.
ROWS = [
    Row(READ_1, "fio", "randread", 4 * KIB, 1),
    Row(READ_16, "fio", "randread", 4 * KIB, 16, cpu=True),
    Row(READ_16X4, "fio", "randread", 4 * KIB, 16, jobs=4),
    Row(SEQ_READ, "fio", "read", MIB, 8, unit="mb", cpu=True),
    Row(FSYNC, "fio", "randwrite", 4 * KIB, 1, jobs=4, more=("--fsync=1",), null=False),
    Row(FUA, "light", "fua", 4 * KIB, 1, null=False),
    Row(MIXED, "fio", "randrw", 4 * KIB, 16, more=("--rwmixread=70",)),
    Row(WRITE_16, "fio", "randwrite", 4 * KIB, 16),
    Row(SEQ_WRITE, "fio", "write", MIB, 8, unit="mb", cpu=True),
]


def section(work, quick):
    rounds, seconds = (2, 0.25) if quick else (3, 1)
    size = size_of_full(quick)
    servers = in_place(work.parent, size, work / "s", quick)
    results = interleaved(servers, ROWS, rounds, seconds, work)
    return report(results, servers, rounds, seconds, size), results


def report(results, servers, rounds, seconds, size):
    what = f"fio, {size // MIB} MiB of data, page cache warm, unix socket."
    if NULL in servers:
        what += f" {NULL} answers without any disk: it is the client's own limit, and no peer."
    out = matrix(results, ROWS[:5], servers) + [""] + matrix(results, ROWS[5:], servers)
    out += ["", legend(rounds, seconds, what), conditions(results), "", *cpu(results, servers), ""]
    out += durability(results, (FSYNC, FUA))
    out += ["", "The disk's cache flushes are those of the whole machine in that time."]
    kit = "nbdkit file"
    return out + goals.lines(
        goals.at_least(READ_1, 1.0, kit, results[READ_1]),
        goals.at_least(READ_16, 1.6, kit, results[READ_16]),
        goals.at_least(READ_16, 4.5, "qemu-nbd qcow2", results[READ_16]),
        goals.at_least(READ_16X4, 1.8, kit, results[READ_16X4]),
        goals.at_least(WRITE_16, 1.5, kit, results[WRITE_16]),
        goals.at_least(SEQ_READ, 1.2, BEST, results[SEQ_READ]),
        goals.at_least(SEQ_WRITE, 1.2, BEST, results[SEQ_WRITE]),
        cpu_goal(SEQ_READ, results[SEQ_READ]), cpu_goal(SEQ_WRITE, results[SEQ_WRITE]),
        goals.at_least(FSYNC, 1.0, kit, results[FSYNC]),
        goals.at_least(FUA, 1.0, kit, results[FUA]))


def cpu(results, servers):
    """The servers' processor time, which a row's figure hides where the client is the limit."""
    rows = []
    for name in servers:
        r = {title: results[title][name] for title in (READ_16, SEQ_READ, SEQ_WRITE)}
        rows.append([name, f"{median(r[READ_16], 'cpu_us_per_io'):.1f} µs",
                     *(f"{median(r[t], 'cpu_seconds_per_gib'):.2f} s"
                       for t in (SEQ_READ, SEQ_WRITE))])
    return table(["the server's processor time", "per I/O: " + READ_16, "per GiB: " + SEQ_READ,
                  "per GiB: " + SEQ_WRITE], *rows)


def cpu_goal(title, by_server):
    """Its processor time per GiB is below that of the best peer by speed."""
    peers = {n: f for n, f in by_server.items() if n not in ("ploop", NULL)}
    best = max(peers, key=lambda n: median(peers[n]), default=None)
    if best is None:
        return [title, "CPU per GiB below the best peer's", "no peer ran", "–"]
    mine, theirs = (median(by_server[n], "cpu_seconds_per_gib") for n in ("ploop", best))
    return [title, "CPU per GiB below the best peer's", f"{mine:.2f} s, {theirs:.2f} s ({best})",
            goals.yes(mine < theirs)]
