"""A container that is full: what its neighbour notices of writes that are refused all the time."""

import contextlib
import json
import random
import sys
import threading
import time

from limits import ON, ploopd, uri
from tools import MIB, NOISE, PLOOP, Api, Client, empty_template, fio, run, spread, table

#: What the neighbour works on, and what the full container has and would like to have.
NEIGHBOUR, HAS, WANTS = 256 * MIB, 64 * MIB, 512 * MIB
DEPTH = 8


def fill(root, container, size):
    with ploopd(root):
        fio(uri(root, container), "write", "1M", 4, 600, f"--size={size}", ramp=0)


def neighbour(root, seconds):
    """The neighbour's own figures: a mix of reads and writes, 4 KiB, and how long the slowest hundredth
    took, in µs."""
    out = run("fio", "--name=x", "--ioengine=nbd", f"--uri={uri(root, 'b')}", "--rw=randrw", "--bs=4k",
              f"--iodepth={DEPTH}", "--randrepeat=0", f"--size={NEIGHBOUR}", *ON,
              f"--runtime={seconds}", "--ramp_time=1", "--output-format=json")
    job = json.loads(out[out.index("{"):])["jobs"][0]
    got = {"iops": job["read"]["iops"] + job["write"]["iops"]}
    for side in ("read", "write"):
        got[side] = job[side]["clat_ns"]["percentile"]["99.000000"] / 1000
    return got


@contextlib.contextmanager
def beside(root, start, size):
    """Random 4 KiB writes of the other container, refused or not, for as long as the block runs. fio
    ends with the first one that is refused."""
    client, over, at = Client(root / "nbd.sock", "a"), threading.Event(), random.Random(5)

    def write():
        waiting = 0
        while waiting or not over.is_set():
            if not over.is_set() and waiting < DEPTH:
                client.send(1, 1, start + at.randrange(size // 4096) * 4096, 4096, NOISE[:4096])
                waiting += 1
            else:
                client.take(16)
                waiting -= 1

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
        if not thread.is_alive():
            sys.exit("the writer beside it ended")
    finally:
        over.set()
        thread.join()
        client.close()


def refused(api):
    """How many requests of the full container were refused since it was opened."""
    return sum(q["refused"] for q in api.ask("GET", "/v1/quotas") if q["container"] == "a")


def section(work, quick):
    rounds, seconds = (2, 3) if quick else (5, 10)
    root = work / "store"
    empty_template(root, "t", 1024 * MIB)
    run(PLOOP, "--root", root, "create", "a", "b", "--template", "t")
    fill(root, "a", HAS)
    fill(root, "b", NEIGHBOUR)
    charged = json.loads(run(PLOOP, "--root", root, "info", "a", "--json"))["quota"]["charged"]
    run(PLOOP, "--root", root, "set", "a", "--quota", str(charged))
    in_place, more = (0, HAS), (2 * HAS, WANTS)
    got = {"alone": [], "a writer beside it": [], "a writer beside it that is refused": []}
    rates = []
    for _ in range(rounds):
        with ploopd(root):
            api = Api(root / "control.sock")
            for (what, figures), where in zip(got.items(), (None, in_place, more)):
                if where is None:
                    figures.append(neighbour(root, seconds))
                    continue
                with beside(root, *where):
                    before, began = refused(api), time.monotonic()
                    figures.append(neighbour(root, seconds))
                    count = refused(api) - before
                    if (count > 0) != (where is more):
                        sys.exit(f"{what}: {count} writes were refused")
                    if where is more:
                        rates.append(count / (time.monotonic() - began))
    return report(got, rates, rounds, seconds), {"neighbour": got, "refused": rates}


def report(got, rates, rounds, seconds):
    rows = [[what, *(spread([f[key] for f in figures], 0) for key in ("iops", "read", "write"))]
            for what, figures in got.items()]
    return table(["the neighbour", "IOPS", "99 % of its reads, µs", "99 % of its writes, µs"], *rows) + [
        "", f"fio, 4 KiB, half of it reads, {DEPTH} in flight, on data that is there, {seconds} s after 1 s of ramp; "
        f"the other one writes 4 KiB, {DEPTH} in flight: what it has, or more than its quota "
        f"({spread(rates, 0)} refused a second). Median (min – max) of {rounds}."]
