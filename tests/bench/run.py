#!/usr/bin/env python3
"""Measures ploop beside its peers, in one run on one machine, and prints Markdown (and JSON).

    tests/bench/run.py [--quick] [--json FILE] [--only SECTION,...] [--without PEER,...] [--dir DIR]

Sections: io (fio on data that is there), light (the same by a client that costs almost nothing),
thin and cow (first writes, as a burst and with all of the bill), cold (reads that the cache does
not have, and reads beside them), tcp, copy (nbdcopy), depth (deep chains), clones (a thousand in
one call), open (start to first read), idle (exports and clients at rest), live (snapshots of a disk
that is written to), limits (rates that are set, and how two share a budget), quota (what the
neighbour of a full container notices), hold (what the holder costs), merge, stream (send into
receive, beside what copies files), tracker (what a tracked write costs),
migrate (a disk moves under its client, beside QEMU's mirror); and when asked for clusters (ploop
alone, with clusters of each size).
Peers: qemu-nbd (raw, qcow2, parallels; by threads and by io_uring), qemu-storage-daemon, nbdkit (file, cow, null), nbd-server (with copyonwrite).
Needs: fio, qemu-utils, nbdkit, nbd-server, libnbd-bin; builds the release binaries itself. A tool
that is missing, or a peer that does not run, is an error; a peer that is left out by --without has
no ratio and no goal.

Only ratios within one run mean something: the machine may be shared. Every server runs with the
defaults a user gets, on the same file system, from a warm page cache, over a unix socket, taking
turns with the others. Figures are medians with their range.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path

sys.dont_write_bytecode = True  # not into the checkout

import checking
import clones
import clusters
import cold
import copying
import depth
import fresh
import hold
import idle
import lightly
import limits
import live
import merge
import migrate
import opening
import quota
import servers
import streams
import tcp
import tools
import trackers
import traffic

SECTIONS = {
    "io": traffic.section, "light": lightly.section, "thin": fresh.thin, "cow": fresh.cow,
    "cold": cold.section, "tcp": tcp.section, "copy": copying.section, "depth": depth.section,
    "clones": clones.section, "open": opening.section, "idle": idle.section,
    "live": live.section, "limits": limits.section, "quota": quota.section, "hold": hold.section,
    "merge": merge.section, "stream": streams.section, "check": checking.section,
    "tracker": trackers.section, "migrate": migrate.section,
    "clusters": clusters.section,
}
#: Run when asked for.
APART = ("clusters",)


QUICK = "A quick run: a look, with few rounds, little data and one peer of each program."


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a look, not a measurement")
    parser.add_argument("--json", type=Path, help="all that was measured, into this file")
    parser.add_argument("--only", default=",".join(s for s in SECTIONS if s not in APART), help="some sections, by a comma")
    parser.add_argument("--without", default="", help="peers that are not to run, by a comma")
    parser.add_argument("--dir", type=Path, help="where the work files go: the disk to measure on")
    parser.add_argument("--no-build", action="store_true", help="take the binaries as they are")
    args = parser.parse_args()
    names = args.only.split(",")
    for name in names:
        if name not in SECTIONS:
            parser.error(f"no section {name!r}: {', '.join(SECTIONS)}")
    # Ended from outside, servers in the background are ended, too, and the work files go.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    servers.leave_out(args.without.split(","))
    tools.need()
    if not args.no_build:
        tools.build()
    results = {"machine": tools.versions()}
    print(f"{results['machine']}.", *([QUICK] if args.quick else []), "", sep="\n")
    with tempfile.TemporaryDirectory(prefix="ploop-bench-", dir=args.dir) as top:
        for name in names:
            # What sections share stays beside their own directories to the end.
            work = Path(top) / name
            work.mkdir()
            lines, results[name] = SECTIONS[name](work, args.quick)
            shutil.rmtree(work)
            print(f"## {name}\n", *lines, "", sep="\n", flush=True)
            if args.json:
                args.json.write_text(json.dumps(results, indent=1))


main()
