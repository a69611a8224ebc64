"""Starting a server to the first answer, for disks of 1 TiB."""

import shutil
import statistics
import struct
import time

from tools import PLOOP, Client, run, serving


def section(work, quick):
    rounds = 5 if quick else 15
    ours, theirs = work / "big.hds", work / "big.qcow2"
    run(PLOOP, "init", "-s", "1T", "-b", "128", ours)
    run("qemu-img", "create", "-f", "qcow2", theirs, "1T")
    # The same size, every cluster allocated (the data itself is holes of the file).
    full = work / "full.hds"
    shutil.copyfile(ours, full)
    with open(full, "r+b") as f:
        clusters = (1 << 40) // 65536
        first = struct.unpack_from("<I", f.read(64), 48)[0] // 128
        f.seek(64)
        for start in range(0, clusters, 1 << 20):
            n = min(1 << 20, clusters - start)
            f.write(struct.pack(f"<{n}I", *range(first + start, first + start + n)))
        f.truncate((first + clusters) * 65536)
    sock = work / "s"
    servers = {
        "ploop, 1 TiB empty": [PLOOP, "serve", ours, "--socket", sock],
        "ploop, 1 TiB fully allocated": [PLOOP, "serve", full, "--socket", sock],
        "qemu-nbd, qcow2 1 TiB empty": ["qemu-nbd", "-t", "-k", sock, "-f", "qcow2", theirs],
    }
    times = {name: [] for name in servers}
    for _ in range(rounds):
        for name, command in servers.items():
            times[name].append(first_read(command, sock, 1 << 39) * 1000)
    lines = ["| start of the server to the first 4k read | median | min – max |", "|---|---|---|"]
    for name, t in times.items():
        span = f"{min(t):.1f} – {max(t):.1f} ms"
        lines.append(f"| {name} | {statistics.median(t):.1f} ms | {span} |")
    return lines, times


def first_read(command, sock, offset):
    """Seconds from the start of a server to its first answer to a 4 KiB read."""
    began = time.perf_counter()
    with serving(command, sock):
        client = Client(sock, "")
        client.read(offset, 4096)
        took = time.perf_counter() - began
        client.close()
    return took
