"""What a tracker costs: writes to where it has the granule already, and the first in a region."""

import statistics
import time

from tools import (KIB, MIB, PLOOP, Client, daemon, empty_template, light, run, settle, spread,
                   table)

REGION = 16 * MIB
TITLE = "A tracked disk beside one that is not"


def first_touches(socket, container, size):
    """Seconds that the first write in each region took, and the second there."""
    client, out = Client(socket, container), ([], [])
    for offset in range(0, size, REGION):
        for times, at in zip(out, (offset, offset + 4 * KIB)):
            begun = time.perf_counter()
            client.write_all([(at, b"x" * 4 * KIB)])
            times.append(time.perf_counter() - begun)
    client.close()
    return out


def section(work, quick):
    size, rounds, seconds = (256 * MIB, 3, 0.3) if quick else (1024 * MIB, 7, 1)
    root = work / "store"
    empty_template(root, "t", size)
    run(PLOOP, "--root", root, "create", "plain", "tracked", "--template", "t")

    def write(socket, container):
        return light(socket, container, "write", block=4 * KIB, depth=16, seconds=seconds)["iops"]

    def fill(socket, container):
        client = Client(socket, container)
        client.write_all((at, b"y" * MIB) for at in range(0, size, MIB))
        client.flush()
        client.close()

    warm = {"plain": [], "tracked": []}
    with daemon(root) as (_, socket, _):
        for _ in range(rounds):
            # The same files, filled in the same way: two are not equally fast.
            run(PLOOP, "--root", root, "tracker", "start", "tracked", "a")
            fill(socket, "tracked")
            settle()
            warm["tracked"].append(write(socket, "tracked"))
            run(PLOOP, "--root", root, "tracker", "stop", "tracked", "a")
            settle()
            warm["plain"].append(write(socket, "tracked"))
        run(PLOOP, "--root", root, "tracker", "start", "tracked", "a")
        fill(socket, "plain")
    touches = {}
    for container in warm:
        # Opened anew: nothing is announced.
        with daemon(root) as (_, socket, _):
            touches[container] = first_touches(socket, container, size)
    return report(warm, touches, size, rounds, seconds), {"warm": warm, "touches": touches}


def report(warm, touches, size, rounds, seconds):
    ratios = [t / p for t, p in zip(warm["tracked"], warm["plain"])]
    rows = [["random 4 KiB writes, 16 in flight, IOPS", spread(warm["plain"], 0),
             spread(warm["tracked"], 0), f"×{statistics.median(ratios):.3f}"]]
    for n, name in enumerate(("first write in a region", "second write there")):
        one, other = ([t * 1e6 for t in touches[c][n]] for c in ("plain", "tracked"))
        rows.append([name + ", µs", spread(one, 0), spread(other, 0),
                     f"×{statistics.median(other) / statistics.median(one):.2f}"])
    lines = table([TITLE, "not tracked", "one tracker", "ratio"], *rows)
    return lines + ["", f"Median of {rounds} (min – max), {seconds} s each, {size // MIB} MiB of data; of "
                    f"{size // REGION} regions of 16 MiB, from a newly opened disk."]
