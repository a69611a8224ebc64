"""Reads that the page cache does not have, and what they do to reads that it has."""

import contextlib
import json
import os
import subprocess
import threading
from pathlib import Path

import goals
from rows import Row, cell, conditions, measure, median
from servers import PLOOP_NAME, full_images, in_place, size_of_full
from tools import KIB, LIGHT, MIB, PLOOP, fio_time, light, run, settle, spread, table

READ = Row("cold random read 4k, 16 in flight", "fio", "randread", 4 * KIB, 16, cpu=True)
NAMES = (PLOOP_NAME, "qemu-nbd qcow2 io_uring", "qsd qcow2", "nbdkit file")
FILE = "fio on the file itself, O_DIRECT"
#: What is read from the cache, and what is written and synced meanwhile; the rest is cold.
WARM, SYNCED = 32 * MIB, 64 * MIB
TENANTS = (PLOOP_NAME, "nbdkit file")


def drop():
    """Empties the page cache: of what is written back, so that first."""
    settle()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def on_the_file(image, seconds):
    out = run("fio", "--name=x", "--ioengine=libaio", "--direct=1", f"--filename={image}",
              "--rw=randread", "--bs=4k", "--iodepth=16", "--time_based", "--randrepeat=0",
              f"--runtime={fio_time(seconds)}", "--output-format=json")
    side = json.loads(out[out.index("{"):])["jobs"][0]["read"]
    return {"value": side["iops"], "engine": "libaio, O_DIRECT", "cluster": None}


def tenants(server, size, seconds):
    """Latencies of reads from the cache, 4 in flight: alone, and while a second client reads cold
    data and a third writes and flushes."""
    def cached():
        return light(server.address, server.export, "read", depth=4, seconds=seconds, range=WARM)

    with server.up():
        client = server.client()
        for offset in range(0, WARM, MIB):
            client.read(offset, MIB)
        client.close()
        alone = cached()
        with contextlib.ExitStack() as others:
            for op, depth, offset, length in (("read", 16, SYNCED, size - SYNCED),
                                              ("flush-writes", 1, WARM, SYNCED - WARM)):
                words = [LIGHT, server.address, server.export, op, "--depth", depth, "--offset",
                         offset, "--range", length, "--seconds", seconds + 0.4]
                child = subprocess.Popen([str(w) for w in words], stdout=subprocess.PIPE)
                others.callback(finish, child)
            threading.Event().wait(0.2)
            together = cached()
    return {"alone": alone, "beside": together}


def finish(child):
    out, _ = child.communicate()
    if child.returncode or not json.loads(out)["ops"]:
        raise SystemExit("cold: a client beside the measured one failed")


def section(work, quick):
    if os.geteuid():
        return ["Cold reads were not measured: only root may empty the page cache."], {}
    rounds, seconds = (2, 0.8) if quick else (3, 1)
    size = size_of_full(quick)
    _, root = full_images(work.parent, size)
    info = json.loads(run(PLOOP, "--root", root, "info", "disk", "--json"))
    image = max((Path(i["file"]) for i in info["images"]), key=lambda f: f.stat().st_size)
    servers = {n: s for n, s in in_place(work.parent, size, work / "s").items() if n in NAMES}
    cold = {name: [] for name in [*servers, FILE]}
    beside = {name: [] for name in servers if name in TENANTS}
    for _ in range(rounds):
        drop()
        cold[FILE].append(on_the_file(image, seconds))
        for name, server in servers.items():
            drop()
            with server.up() as child:
                cold[name].append(measure(server, child, READ, seconds, work))
            if name in beside:
                drop()
                beside[name].append(tenants(server, size, seconds))
    results = {"cold": cold, "tenants": beside}
    return report(results, rounds, seconds), results


def report(results, rounds, seconds):
    cold = results["cold"]
    mine = median(cold[PLOOP_NAME])
    out = table(["", READ.title, "the server's CPU per I/O"], *(
        [name, cell(f, "iops", None if name == PLOOP_NAME else mine),
         f"{median(f, 'cpu_us_per_io'):.1f} µs" if "cpu_us_per_io" in f[0] else ""]
        for name, f in cold.items()))
    out += ["", f"Median of {rounds} (min – max), {seconds} s each, the page cache emptied before. "
            f"{conditions({'cold': cold})}", ""]
    rows = []
    for name, figures in results["tenants"].items():
        for when, text in (("alone", "alone"), ("beside", "beside cold reads and fsyncs")):
            f = [x[when] for x in figures]
            rows.append([f"{name}, {text}", *(spread([x[k] / 1000 for x in f], 0, " µs") for k in
                                              ("p50_ns", "p99_ns", "max_ns")),
                         spread([x["iops"] / 1000 for x in f], 1, " k")])
    out += table(["reads from the cache, 4 in flight", "median", "99 %", "longest", "IOPS"], *rows)
    out += ["", "Beside it: one client with 16 cold reads in flight, and one that writes 4 KiB and "
            "flushes, again and again. All on the same disk."]
    return out + goals.lines(at_least_file(cold))


def at_least_file(cold):
    reached = median(cold[PLOOP_NAME]) / median(cold[FILE])
    return [READ.title, "≥ 0.95 × fio on the file itself", f"{reached:.2f}",
            goals.yes(reached >= 0.95)]
