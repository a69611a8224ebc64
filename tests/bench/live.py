"""Snapshots of a disk under load: how long its writers wait."""

import array
import bisect
import contextlib
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import goals
from tools import (CLUSTER, GIB, MIB, PLOOP, Client, daemon, empty_template, fill, run, settle,
                   spread, table)

GAP = 0.15  # seconds from one snapshot to the next, or as long as it takes


class Writer:
    """`writer.py` at work; afterwards, what it saw."""

    def __init__(self, work, sock, export, offset, length, every=0):
        self.file = work / "writer.log"
        script = Path(__file__).with_name("writer.py")
        command = [sys.executable, "-B", script, sock, export, offset, length, every, self.file]
        self.child = subprocess.Popen([str(c) for c in command], stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE)
        if self.child.stdout.readline() != b"writing\n":
            sys.exit("the writer did not start")

    def stop(self):
        self.child.stdin.close()
        if self.child.wait():
            sys.exit(f"the writer ended with {self.child.returncode}")
        log = array.array("q")
        log.frombytes(self.file.read_bytes())
        self.at, took = log[::2], log[1::2]
        self.gaps = array.array("q", (abs(t) for t in took))
        self.is_flush = [t < 0 for t in took]

    def between(self, start, end):
        """Indexes of what was answered from `start` on, and the first answer after `end`: a gap
        that reaches into the window counts in full."""
        first = bisect.bisect_left(self.at, start)
        return range(first, min(bisect.bisect_right(self.at, end) + 1, len(self.at)))

    def worst(self, start, end):
        """The longest gap between two answers that touches a window of time, in ms."""
        return max((self.gaps[i] for i in self.between(start, end)), default=0) / 1e6

    def longest_at(self, start, end):
        """When the longest gap of a window ended, in ms after its start."""
        longest = max(self.between(start, end), key=lambda i: self.gaps[i], default=None)
        return None if longest is None else (self.at[longest] - start) / 1e6

    def rate(self, start, end):
        return len(self.between(start, end)) / ((end - start) / 1e9)

    def flushes(self, start, end):
        """Milliseconds of each flush."""
        return [self.gaps[i] / 1e6 for i in self.between(start, end) if self.is_flush[i]]


@contextlib.contextmanager
def load(uri, region, seconds):
    """fio on 4 connections, 4 random 4 KiB writes in flight on each, for as long as the block runs
    (and `seconds` at most)."""
    command = ["fio", "--name=x", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=4k",
               "--iodepth=4", "--numjobs=4", f"--size={region}", "--time_based", "--thread=0",
               f"--runtime={seconds}", "--randrepeat=0", "--output=/dev/null"]
    child = subprocess.Popen(command)
    try:
        time.sleep(1)
        yield
        if child.poll() is not None:
            sys.exit(f"fio ended early, with {child.returncode}: an error, or too short a run")
    finally:
        child.terminate()
        child.wait()


def moments(count, work):
    """Calls `work` as often, at a steady pace: when each began, when it returned, what, and when
    the next may begin."""
    out = []
    for i in range(count):
        start = time.monotonic_ns()
        got = work(i)
        done = time.monotonic_ns()
        time.sleep(max(0.0, GAP - (done - start) / 1e9))
        out.append((start, done, got, time.monotonic_ns()))
    return out


def measure(work, root, every, count, region):
    """One disk: moments with a snapshot, and half as many without before them, and after."""
    name = f"ct{every}"
    run(PLOOP, "--root", root, "create", name, "--template", "t")
    with daemon(root) as (_, sock, api):
        client = Client(sock, name)
        client.write_all(fill(range(region // CLUSTER)))
        client.flush()
        settle()
        # The writer of the gaps has a part of the region that fio does not write.
        whole, part = region, region // 8
        seconds = 2 * count * (GAP + 0.3) + 60
        uri = f"nbd+unix:///{name}?socket={sock}"
        phases = {}
        with load(uri, whole - part, seconds):
            writer = Writer(work, sock, name, whole - part, part, every)
            time.sleep(1)
            for phase, n, action in (("before", count // 2, lambda i: None),
                                     ("snapshots", count, lambda i: api.snapshot(name, f"s{i}")),
                                     ("after", count // 2, lambda i: None)):
                began, writes = time.monotonic_ns(), api.writes(name)
                done = moments(n, action)
                phases[phase] = done, began, time.monotonic_ns(), api.writes(name) - writes
            writer.stop()
        client.close()
    return figures(writer, phases)


def figures(writer, phases):
    out = {}
    for phase, (all, began, ended, writes) in phases.items():
        taken = [(s, e, t) for s, e, t, _ in all if t]
        out[phase] = {
            "gap_ms": [writer.worst(s, e) for s, _, _, e in all],
            "gap_after_ms": [writer.longest_at(s, e) for s, _, _, e in all],
            "call_ms": [(e - s) / 1e6 for s, e, _ in taken],
            "worst_gap_ms": writer.worst(began, ended),
            "seconds": (ended - began) / 1e9,
            "iops": writes / ((ended - began) / 1e9),
            "writer_iops": writer.rate(began, ended),
            "flush_ms": writer.flushes(began, ended),
            "pause_ms": [t["pause"] * 1000 for _, _, t in taken],
            "buckets_ms": buckets(writer, began, ended),
        }
    return out


def buckets(writer, began, ended):
    """The longest gap that ended in each 10 ms."""
    out = [0.0] * ((ended - began) // 10_000_000 + 1)
    for i in writer.between(began, ended):
        bucket = (writer.at[i] - began) // 10_000_000
        if 0 <= bucket < len(out):
            out[bucket] = max(out[bucket], writer.gaps[i] / 1e6)
    return out


def section(work, quick):
    count, region = (16, 32 * MIB) if quick else (200, 32 * MIB)
    root = work / "live"
    # Each snapshot lets every cluster of the region be written anew.
    if shutil.disk_usage(work).free < (needs := 2 * count * region + GIB):
        sys.exit(f"live: {needs // GIB} GiB of free space are required in {work}: see --dir")
    empty_template(root, "t", GIB)
    results = {"no flush": measure(work, root, 0, count, region),
               "a flush every 32 writes": measure(work, root, 32, count, region)}
    return report(results, count, region), results


def report(results, count, region):
    lines = [f"A disk under random 4 KiB writes to {region // MIB} MiB: fio on 4 connections with "
             "4 in flight each, and one more client that writes one block after another. Its "
             f"longest time without an answer in each of the {GAP * 1000:.0f} ms (or more: the "
             f"whole call) from one of {count} snapshots to the next, and in such pieces of time "
             "before and after them.", ""]
    rows = []
    for client, phases in results.items():
        for phase, p in phases.items():
            pause = spread(p["pause_ms"], 3) if p["pause_ms"] else "–"
            flush = spread(p["flush_ms"]) if p["flush_ms"] else "–"
            call = spread(p["call_ms"]) if p["call_ms"] else "–"
            base = statistics.mean(phases[x]["iops"] for x in ("before", "after"))
            rows.append([f"{client}, {phase}", pause, spread(p["gap_ms"], 2),
                         f"{p['worst_gap_ms']:.1f}", flush, call,
                         f"{p['iops'] / 1000:.1f} k (×{p['iops'] / base:.2f})"])
    lines += table(["client, phase", "pause by the API, ms", "longest gap in each, ms",
                    "worst gap of all, ms", "its flushes, ms", "the call, ms", "IOPS of all"],
                   *rows)
    lines += ["", "Median (min – max)."]
    met = []
    for client, phases in results.items():
        pauses = phases["snapshots"]["pause_ms"]
        met += [goals.at_most(f"pause, {client}", 1, " ms", statistics.median(pauses), 3),
                goals.at_most(f"worst pause, {client}", 20, " ms", max(pauses))]
    return lines + goals.lines(*met)
