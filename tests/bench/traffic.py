"""fio over NBD beside qemu-nbd and nbdkit, interleaved."""

import os
import shutil
import statistics

from tools import MIB, PLOOP, fio, run, serving

ROWS = [
    ("random read 4k, 16 in flight", "randread", "4k", 16, "iops"),
    ("random write 4k in place, 16 in flight", "randwrite", "4k", 16, "iops"),
    ("sequential read 1 MiB, 8 in flight", "read", "1m", 8, "bw"),
    ("sequential write 1 MiB, 8 in flight", "write", "1m", 8, "bw"),
]


def section(work, quick):
    size = 512 * MIB if quick else 1024 * MIB
    rounds, seconds = (3, 1) if quick else (5, 2)
    raw = work / "data.raw"
    with open(raw, "wb") as f:
        for _ in range(size // MIB):
            f.write(os.urandom(MIB))
    images = {
        "qcow2": work / "data.qcow2", "parallels": work / "data.hdd", "nbdkit": work / "kit.raw",
    }
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, images["qcow2"])
    run("qemu-img", "convert", "-f", "raw", "-O", "parallels", raw, images["parallels"])
    shutil.copy(raw, images["nbdkit"])
    ours = work / "data.hds"
    run(PLOOP, "convert", raw, ours, "--to", "ploop")
    sock = work / "s"
    qemu = ["qemu-nbd", "-t", "-k", sock, "-e", "16", "-x", ""]
    servers = {
        "ploop": [PLOOP, "serve", ours, "--socket", sock],
        "qemu-nbd raw": qemu + ["-f", "raw", raw],
        "qemu-nbd qcow2": qemu + ["-f", "qcow2", images["qcow2"]],
        "qemu-nbd parallels": qemu + ["-f", "parallels", images["parallels"]],
        "nbdkit file": ["nbdkit", "-f", "-U", sock, "file", images["nbdkit"]],
    }
    results = {row[0]: {name: [] for name in servers} for row in ROWS}
    for _ in range(rounds):
        for name, command in servers.items():
            with serving(command, sock):
                for title, rw, bs, depth, unit in ROWS:
                    side = fio(f"nbd+unix:///?socket={sock}", rw, bs, depth, seconds)
                    value = side["iops"] if unit == "iops" else side["bw_bytes"] / 1e6
                    results[title][name].append(value)
    lines = ["| work (median of %d) | %s |" % (rounds, " | ".join(servers)),
             "|---|" + "---|" * len(servers)]
    for title, _, _, _, unit in ROWS:
        mine = statistics.median(results[title]["ploop"])
        cells = []
        for name in servers:
            v = statistics.median(results[title][name])
            text = f"{v / 1000:.1f} k" if unit == "iops" else f"{v:.0f} MB/s"
            cells.append(text if name == "ploop" else f"{text} (×{mine / v:.2f})")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines.append("")
    lines.append("In brackets: ploop's figure divided by that peer's. fio, one connection, "
                 f"{size // MIB} MiB of data, page cache warm.")
    return lines, results
