#!/usr/bin/env python3
"""Measures ploop beside its peers, in one run on one machine, and prints Markdown (and JSON).

    tests/bench/run.py [--quick] [--json FILE] [--only SECTION,...] [--dir DIR]

Sections: io (fio over NBD, interleaved with qemu-nbd and nbdkit), clones (a thousand in one call),
open (start to first read), depth (deep chains), idle (exports and clients at rest), live (snapshots
of a disk that is written to), merge.
Needs: fio, qemu-utils, nbdkit, libnbd-bin; builds the release binaries itself. A tool that is
missing, or a peer that does not run, is an error: no ratio is printed without its peer.

Only ratios within one run mean something: the machine may be shared. Every server runs with the
defaults a user gets, on the same file system, from a warm page cache, over a unix socket. Times are
medians with their range.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.dont_write_bytecode = True  # not into the checkout

import clones
import depth
import idle
import live
import merge
import opening
import tools
import traffic

SECTIONS = {
    "io": traffic.section, "clones": clones.section, "open": opening.section,
    "depth": depth.section, "idle": idle.section, "live": live.section, "merge": merge.section,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a look, not a measurement")
    parser.add_argument("--json", type=Path, help="all that was measured, into this file")
    parser.add_argument("--only", default=",".join(SECTIONS), help="some sections, by a comma")
    parser.add_argument("--dir", type=Path, help="where the work files go: the disk to measure on")
    parser.add_argument("--no-build", action="store_true", help="take the binaries as they are")
    args = parser.parse_args()
    names = args.only.split(",")
    for name in names:
        if name not in SECTIONS:
            parser.error(f"no section {name!r}: {', '.join(SECTIONS)}")
    for tool in tools.PACKAGES:
        tools.need(tool)
    if not args.no_build:
        tools.build()
    results = {}
    for name in names:
        with tempfile.TemporaryDirectory(prefix="ploop-bench-", dir=args.dir) as tmp:
            lines, results[name] = SECTIONS[name](Path(tmp), args.quick)
        print("\n".join(lines), "\n", flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))


main()
