"""First writes: to an empty disk (thin), and over a template (copy on write).

Every figure starts on a new image, and each write goes to a block that was not written before.
Burst is what a client sees. Sustained has all of the bill: the writes, a FLUSH that is answered,
and the end of the server in order, so whatever it does later than it answers is in it.

Where the filesystem is mounted with `discard`, giving back the scattered images takes longer than
the measurements.
"""

import time

import goals
from goals import BEST
from rows import Row, cell, evidence, measure, median
from servers import FEW, PLOOP_NAME, nbd_server, nbdkit, ploop, qemu_nbd, qsd, there
from tools import (CLUSTER, GIB, KIB, PLOOP, empty_template, fio, light, pieces,
                   run, settle, table)

DEPTH = 16
WAYS = ("burst", "light burst", "sustained")


class Thin:
    """Disks without any data; raw files are sparse."""

    title = "first write 4k to an empty disk, 16"
    remarks = ()

    def __init__(self, work, size):
        self.work, self.size, self.root = work, size, work / "thin"
        empty_template(self.root, "t", size)

    def servers(self, sock):
        """Each server with a function that makes its new image."""
        w = self.work
        raw, qcow2, parallels = w / "thin.raw", w / "thin.qcow2", w / "thin.hdd"

        def sparse():
            with open(raw, "wb") as f:
                f.truncate(self.size)

        def image(kind, path):
            return lambda: run("qemu-img", "create", "-q", "-f", kind, path, str(self.size))

        def container():
            run(PLOOP, "--root", self.root, "create", "ct", "--template", "t")

        for make in (sparse, image("qcow2", qcow2), image("parallels", parallels), container):
            make()
        return [
            (ploop(self.root, "ct", sock), container),
            (qemu_nbd(raw, "raw", sock), sparse),
            (qemu_nbd(qcow2, "qcow2", sock), image("qcow2", qcow2)),
            (qemu_nbd(qcow2, "qcow2", sock, "io_uring"), image("qcow2", qcow2)),
            (qemu_nbd(parallels, "parallels", sock), image("parallels", parallels)),
            (qsd(qcow2, "qcow2", sock), image("qcow2", qcow2)),
            (nbdkit(raw, sock), sparse),
            (nbd_server(raw, sock), sparse),
        ]

    def clear(self):
        run(PLOOP, "--root", self.root, "rm", "ct")
        for name in ("thin.raw", "thin.qcow2", "thin.hdd"):
            (self.work / name).unlink()


class Cow:
    """Disks over one that is all data: a clone of a template; for the others a raw file, which is
    the fastest base that they have."""

    title = "first write 4k over a template (COW), 16"
    remarks = ("nbdkit's and nbd-server's overlays are temporary files that end with the client "
               "or the server: nothing in them outlives a crash.",)

    def __init__(self, work, size):
        self.work, self.size, self.root, self.base = work, size, work / "cow", work / "base.raw"
        with open(self.base, "wb", buffering=0) as f:
            for _, data in pieces(size):
                f.write(data)
        run(PLOOP, "--root", self.root, "template", "import", "t", self.base, "--from", "raw")

    def servers(self, sock):
        top = self.work / "top.qcow2"

        def overlay():
            run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", self.base, top)

        def clone():
            run(PLOOP, "--root", self.root, "create", "ct", "--template", "t")

        def nothing():
            """Its overlay is its own, and goes with it."""

        overlay()
        clone()
        return [
            (ploop(self.root, "ct", sock), clone),
            (qemu_nbd(top, "qcow2", sock), overlay),
            (qemu_nbd(top, "qcow2", sock, "io_uring"), overlay),
            (qsd(top, "qcow2", sock), overlay),
            (nbdkit(self.base, sock, "cow", name="cow"), nothing),
            (nbd_server(self.base, sock, cow=True), nothing),
        ]

    def clear(self):
        run(PLOOP, "--root", self.root, "rm", "ct")
        (self.work / "top.qcow2").unlink()


def new(kind, server, make):
    """A new image for this server, and nothing left to write from the one before."""
    if server.name == PLOOP_NAME:
        run(PLOOP, "--root", kind.root, "rm", "ct")
    make()
    settle()


def burst(kind, server, writes, seconds):
    """fio, until so many writes are done, or so long."""
    with server.up():
        before = server.counters(kind.work)
        got = fio(server.uri, "randwrite", "4k", DEPTH, seconds, f"--number_ios={writes}",
                  ramp=0)
        after = server.counters(kind.work)
    got |= evidence(server, kind.title, before, after, got["flushes"])
    return got | {"value": got["iops"]}


def sustained(kind, server, writes, seconds):
    """The light client, and everything until the server has ended."""
    with server.up() as child:
        before = server.counters(kind.work)
        got = light(server.address, server.export, "write", depth=DEPTH, ops=writes,
                    seconds=seconds, flush=True)
        began, after = time.perf_counter(), server.counters(kind.work)
        if server.api:
            server.api.http.close()
        between = time.perf_counter() - began
    got |= evidence(server, kind.title, before, after, got["flushes"])
    end = child.stop_seconds + between
    took = got["seconds"] + got["flush_seconds"] + end
    return got | {"value": got["ops"] / took, "end_seconds": end}


def measured(kind, sock, quick, rounds, writes, seconds):
    both = kind.servers(sock)
    servers = {name: s for name, s in there([s for s, _ in both]).items()
               if not quick or name in FEW or "qemu" not in name}
    makers = {s.name: make for s, make in both}
    results = {what: {name: [] for name in servers} for what in WAYS}
    for _ in range(rounds):
        for name, server in servers.items():
            new(kind, server, makers[name])
            results["burst"][name].append(burst(kind, server, writes, seconds))
            new(kind, server, makers[name])
            got = sustained(kind, server, writes, seconds)
            results["sustained"][name].append(got)
            results["light burst"][name].append(got | {"value": got["iops"]})
    return results, servers, makers


def synced(kind, servers, makers, row, rounds, seconds):
    """fsync after each write, each to a place that is not allocated yet."""
    out = {name: [] for name in servers}
    for _ in range(rounds):
        for name, server in servers.items():
            new(kind, server, makers[name])
            with server.up() as child:
                out[name].append(measure(server, child, row, seconds, kind.work))
    return out


FSYNC = Row("fsync after each 4k write to an empty disk, 4 jobs", "fio", "randwrite", 4 * KIB, 1,
            jobs=4, more=("--fsync=1",))


def thin(work, quick):
    size = GIB if quick else 8 * GIB
    rounds, seconds = (2, 0.6) if quick else (3, 3)
    kind = Thin(work, size)
    # A quarter of the clusters: most writes are the first in theirs.
    writes = size // CLUSTER // 4
    results, servers, makers = measured(kind, work / "s", quick, rounds, writes, seconds)
    results["fsync"] = synced(kind, servers, makers, FSYNC, rounds, min(seconds, 1))
    kind.clear()
    out = report(kind, results, servers, rounds, writes, seconds)
    out += ["", *table(["", FSYNC.title], *([name, cell(f, "iops", None if name == PLOOP_NAME else
                                             median(results["fsync"][PLOOP_NAME]))]
                                            for name, f in results["fsync"].items()))]
    return out + goals.lines(
        goals.at_least(kind.title, 1.1, "nbdkit file", results["burst"]),
        goals.at_least(kind.title, 6, "qemu-nbd qcow2", results["burst"]),
        goals.at_least(FSYNC.title, 1.5, "qemu-nbd qcow2", results["fsync"])), results


def cow(work, quick):
    size = GIB if quick else 4 * GIB
    rounds, seconds = (2, 0.6) if quick else (3, 3)
    kind = Cow(work, size)
    writes = size // CLUSTER
    results, servers, _ = measured(kind, work / "s", quick, rounds, writes, seconds)
    kind.clear()
    out = report(kind, results, servers, rounds, writes, seconds)
    return out + goals.lines(
        goals.at_least(f"{kind.title}, burst", 4, BEST, results["burst"]),
        goals.at_least(f"{kind.title}, sustained", 4, BEST, results["sustained"])), results


def report(kind, results, servers, rounds, writes, seconds):
    rows = []
    for name in servers:
        cells = [cell(results[what][name], "iops",
                      None if name == PLOOP_NAME else median(results[what][PLOOP_NAME]))
                 for what in WAYS]
        f = results["sustained"][name]
        rest = median(f, "flush_seconds"), median(f, "end_seconds"), median(f, "ops")
        engine = f"{f[-1]['engine']}, {f[-1]['cluster'] >> 10} KiB" if f[-1]["cluster"] else (
            f[-1]["engine"])
        rows.append([name, *cells, f"{rest[2]:.0f}", f"{rest[0]:.2f} s + {rest[1]:.2f} s", engine])
    out = table([kind.title, "burst, fio", "burst, light client", "sustained, light client",
                 "writes", "its flush + its end", "engine, cluster"], *rows)
    return out + ["", f"Median of {rounds} (min – max), each on a new image of "
                  f"{kind.size // GIB} GiB: {writes} writes, each to another 4 KiB, or as many as "
                  f"{seconds} s allow. Sustained: until a flush is answered and the server has "
                  "ended in order. After ×, ploop's figure divided by that peer's.", *kind.remarks]
