"""Checking an image of 1 TiB with a million clusters, beside `qemu-img check`: time and memory.

The image is what both read alike: v2, 1 MiB clusters, every entry but a few set, the data itself
holes of the file. In order is how a disk that was written front to back looks; shuffled, one that
was written here and there for years.
"""

import random
import statistics
import struct
import subprocess
import sys
import time

import goals
from servers import left_out
from tools import MIB, PLOOP, run, spread, table

CLUSTER = MIB
CLUSTERS = 1_000_000
PEER = "qemu-img check"


def image(path, shuffled):
    """A disk of 1 TiB with `CLUSTERS` clusters allocated."""
    run(PLOOP, "init", "-s", "1T", "-b", str(CLUSTER // 512), path)
    with open(path, "r+b") as f:
        first = struct.unpack_from("<I", f.read(64), 48)[0] * 512 // CLUSTER
        entries = list(range(first, first + CLUSTERS))
        if shuffled:
            random.Random(1).shuffle(entries)
        f.seek(64)
        f.write(struct.pack(f"<{CLUSTERS}I", *entries))
        f.truncate((first + CLUSTERS) * CLUSTER)


def measure(*command):
    """Seconds, and the most memory that it had, in bytes. By a small program between: what a process
    is forked from counts as its own memory, and Python is larger than what is measured."""
    began = time.perf_counter()
    done = subprocess.run(["/usr/bin/time", "-f", "%M", *[str(c) for c in command]],
                          capture_output=True, text=True, check=False)
    took = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return took, int(done.stderr.split()[-1]) * 1024


def section(work, quick):
    rounds = 3 if quick else 7
    results, rows, met = {}, [], []
    for order in ("in order", "shuffled"):
        # A directory of its own: `init` writes a descriptor beside the image.
        path = work / order.replace(" ", "-") / "big.hds"
        path.parent.mkdir()
        image(path, order == "shuffled")
        programs = {"ploop check": [PLOOP, "check", path],
                    PEER: ["qemu-img", "check", "-q", "-f", "parallels", path]}
        got = {name: [] for name in programs if name != PEER or "qemu-nbd raw" not in left_out}
        for _ in range(rounds):
            for name in got:
                got[name].append(measure(*programs[name]))
        path.unlink()
        results[order] = got
        for name, runs in got.items():
            rows.append([order, name, spread([t * 1000 for t, _ in runs], 1, " ms"),
                         f"{statistics.median(m for _, m in runs) / MIB:.1f} MiB"])
        speeds = {name: [1 / t for t, _ in runs] for name, runs in got.items()}
        met.append(goals.at_least(f"check of a million clusters, {order}", 1, PEER,
                                  speeds | {"ploop": speeds["ploop check"]}))
    out = table([f"check of 1 TiB, {CLUSTERS} clusters", "program", "time", "memory at most"], *rows)
    out += ["", f"Median of {rounds} (min – max), the table in the page cache, both started anew."]
    return out + goals.lines(*met), results
