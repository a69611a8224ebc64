"""nbdcopy of an export whose data is a quarter of it, to nowhere."""

import statistics

import goals
from servers import PLOOP_NAME, nbdkit, ploop, qemu_nbd, qsd, there
from tools import (GIB, PLOOP, empty_template, pieces, run, settle, spread, table, timed)


TITLE = "nbdcopy of a quarter full export to null"


def section(work, quick):
    size, rounds = (GIB, 3) if quick else (4 * GIB, 7)
    raw, qcow2, root, sock = work / "disk.raw", work / "disk.qcow2", work / "store", work / "s"
    with open(raw, "wb") as f:
        f.truncate(size)
    run("qemu-img", "create", "-q", "-f", "qcow2", qcow2, str(size))
    empty_template(root, "t", size)
    run(PLOOP, "--root", root, "create", "disk", "--template", "t")
    servers = there([ploop(root, "disk", sock), nbdkit(raw, sock), qemu_nbd(qcow2, "qcow2", sock),
                     qsd(qcow2, "qcow2", sock)])
    for name in (PLOOP_NAME, "nbdkit file", "qemu-nbd qcow2", "qsd qcow2"):
        # The two QEMUs share their image.
        if name in servers and not (name == "qsd qcow2" and "qemu-nbd qcow2" in servers):
            with servers[name].up():
                client = servers[name].client()
                client.write_all(pieces(size, every=4))
                client.flush()
                client.close()
    settle()
    times = {name: [] for name in servers}
    for _ in range(rounds):
        for name, server in servers.items():
            with server.up():
                times[name].append(timed("nbdcopy", server.uri, "null:"))
    return report(times, size, rounds), times


def report(times, size, rounds):
    mine = statistics.median(times[PLOOP_NAME])
    rows = [[name, spread(t, 3, " s"),
             "" if name == PLOOP_NAME else f"×{statistics.median(t) / mine:.2f}"]
            for name, t in times.items()]
    out = table([f"{TITLE}, {size // GIB} GiB", "time", "ploop is faster by"], *rows)
    out += ["", f"Median of {rounds} (min – max); the data is one MiB in four, page cache warm, "
            "nbdcopy's start included."]
    speeds = {name: [1 / x for x in t] for name, t in times.items()}
    return out + goals.lines(goals.at_least(TITLE, 1.3, "nbdkit file", speeds))
