"""Rows of work, by fio or by the light client, interleaved over servers; and their table.

A figure of a row has the server's processor time, and what it did for durability: its own counters
where it has such (ours, by its metrics) and the cache flushes of the disk below, which are
everybody's on the machine. Counting the syncs of the peers would need a tracer, which costs more
than they do.
"""

import concurrent.futures
import statistics
import sys
import time
from dataclasses import dataclass

from servers import NULL, PLOOP_NAME
from tools import cpu_seconds, fio, light, settle, table


@dataclass(frozen=True)
class Row:
    title: str
    tool: str
    op: str
    block: int
    depth: int
    jobs: int = 1
    unit: str = "iops"
    more: tuple = ()
    #: False: nbdkit's null plugin does nothing that this row is about.
    null: bool = True
    #: Look at the server's processor time, too.
    cpu: bool = False


def measure(server, child, row, seconds, work):
    """One run of one row."""
    before = server.counters(work)
    if row.tool == "fio":
        run = watched if row.cpu else by_fio
        got = run(server, child, row, seconds)
    else:
        cpu = cpu_seconds(child.pid)
        got = light(server.address, server.export, row.op, block=row.block, depth=row.depth,
                    connections=row.jobs, seconds=seconds)
        got["cpu_us_per_io"] = (cpu_seconds(child.pid) - cpu) * 1e6 / got["ops"]
        got["bytes"] = got["mb_per_second"] * 1e6
        got["flushes"] += got["writes"] if row.op == "fua" else 0
    got |= evidence(server, row.title, before, server.counters(work), got["flushes"])
    got["value"] = got["iops"] if row.unit == "iops" else got["bytes"] / 1e6
    return got


def by_fio(server, child, row, seconds):
    return fio(server.uri, row.op, row.block, row.depth, seconds, "--time_based", *row.more,
               jobs=row.jobs, ramp=0)


def watched(server, child, row, seconds):
    """With the server's processor time while fio is at work: it comes and goes without a word, and
    what that costs a server (nbd-server up to 0.3 s) is no cost of an I/O."""
    seconds = max(seconds, 0.8)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(by_fio, server, child, row, seconds)
        time.sleep(0.45)
        began, cpu = time.monotonic(), cpu_seconds(child.pid)
        time.sleep(seconds - 0.4)
        share = (cpu_seconds(child.pid) - cpu) / (time.monotonic() - began)
        got = running.result()
    return got | {"cpu_us_per_io": share * 1e6 / got["iops"],
                  "cpu_seconds_per_gib": share * (1 << 30) / got["bytes"]}


def evidence(server, title, before, after, answered):
    """How the figure came about: engine, cluster size, and what was done for durability. Flushes
    that were answered without any sync are no result."""
    def more(name):
        if before.get(name, 0) is None or after.get(name) is None:
            return None
        return after[name] - before.get(name, 0)

    counters = {name: more(name) for name in after}
    flushes = max(answered, counters.get("flushes") or 0)
    syncs = [n for name, n in counters.items() if "sync" in name]
    if flushes and syncs and not any(syncs):
        sys.exit(f"{title}: {server.name} answered {flushes} flushes without a sync: {counters}")
    return {"engine": server.engine, "cluster": server.cluster, "answered_flushes": flushes,
            "counters": counters}


def interleaved(servers, rows, rounds, seconds, work):
    """{row: {server: [figures]}}. Servers take turns within each row, started anew each time, so
    that those who are compared run within seconds of one another."""
    results = {row.title: {name: [] for name in servers if row.null or name != NULL}
               for row in rows}
    for _ in range(rounds):
        for row in rows:
            for name, figures in results[row.title].items():
                # What the one before it wrote does not go to the disk at its expense.
                settle()
                with servers[name].up() as child:
                    figures.append(measure(servers[name], child, row, seconds, work))
    return results


def median(figures, key="value"):
    return statistics.median(f[key] for f in figures)


def cell(figures, unit, mine=None):
    """Median, range, and how many times as much ours is."""
    values = [f["value"] for f in figures]
    scale, digits, sign = {"iops": (1000, 1, " k"), "mib": (1, 0, " MiB")}.get(
        unit, (1, 0, " MB/s"))
    mid, low, high = (f"{v / scale:.{digits}f}" for v in
                      (statistics.median(values), min(values), max(values)))
    ratio = "" if mine is None else f" ×{mine / statistics.median(values):.2f}"
    return f"{mid}{sign} ({low}–{high}){ratio}"


def matrix(results, rows, servers):
    """A line for each server, a column for each row: nothing but what ran."""
    lines = []
    for name in servers:
        cells = []
        for row in rows:
            figures = results[row.title].get(name)
            mine = None if name == PLOOP_NAME else median(results[row.title][PLOOP_NAME])
            cells.append(cell(figures, row.unit, mine) if figures else "–")
        lines.append([name, *cells])
    return table(["", *(row.title for row in rows)], *lines)


def legend(rounds, seconds, what):
    return (f"Median of {rounds} (min – max), {seconds} s each; after ×, ploop's figure divided by "
            f"that peer's. {what}")


def conditions(results):
    """Engine and cluster size of each server."""
    seen = {}
    for by_server in results.values():
        for name, figures in by_server.items():
            f = figures[-1]
            cluster = f", {f['cluster'] >> 10} KiB" if f["cluster"] else ""
            seen[name] = f"{name}: {f['engine']}{cluster}"
    return "Engines, and clusters: " + "; ".join(seen.values()) + "."


def durability(results, titles):
    """What was answered and synced in the rows that flush."""
    lines = {name: [name] for name in results[titles[0]]}
    for title in titles:
        for name, figures in results[title].items():
            sums = {}
            for f in figures:
                for counter, n in f["counters"].items():
                    sums[counter] = sums.get(counter, 0) + (n or 0)
            disk = sums.pop("device_flushes", 0)
            syncs = ", ".join(f"{n} {counter}" for counter, n in sums.items() if "sync" in counter)
            answered = sum(f["answered_flushes"] for f in figures)
            lines[name] += [answered, syncs or "not counted", disk]
    heads = ["its own syncs", "cache flushes of the disk"]
    heads = [head for title in titles for head in (f"answered: {title}", *heads)]
    return table(["flushes", *heads], *lines.values())
