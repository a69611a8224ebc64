#!/usr/bin/env python3
"""Measures ploop beside its peers, in one run on one machine, and prints Markdown (and JSON).

    tests/bench/run.py [--quick] [--json FILE] [--only SECTION,...]

Sections: io (fio over NBD, interleaved with qemu-nbd and nbdkit), clone, open, idle.
Needs: fio, qemu-utils, nbdkit, libnbd-bin; builds the release binary itself. A tool that is
missing, or a peer that does not run, is an error: no ratio is printed without its peer.

Only ratios within one run mean something: the machine may be shared. Every server runs with the
defaults a user gets, on the same file system, from a warm page cache, over a unix socket.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
PLOOP = TOP / "target/release/ploop"
PACKAGES = {
    "fio": "fio", "qemu-nbd": "qemu-utils", "qemu-img": "qemu-utils", "nbdkit": "nbdkit",
    "nbdinfo": "libnbd-bin", "mke2fs": "e2fsprogs",
}
MIB = 1 << 20


def need(tool):
    path = shutil.which(tool, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    if not path:
        sys.exit(f"{tool} is required: apt-get install {PACKAGES[tool]}")
    return path


def run(*command, **kw):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **kw)
    if done.returncode:
        sys.exit(f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


@contextlib.contextmanager
def serving(command, sock):
    """A server that listens on `sock` while the block runs."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(sock)
    child = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL)
    try:
        for _ in range(20000):
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as s:
                s.connect(str(sock))
                break
            if child.poll() is not None:
                sys.exit(f"{command}: ended with {child.returncode}")
            time.sleep(0.0005)
        else:
            sys.exit(f"{command}: does not listen")
        yield child
    finally:
        child.send_signal(signal.SIGTERM)
        if child.wait() not in (0, -signal.SIGTERM):
            sys.exit(f"{command}: exit {child.returncode}")


class Client:
    """The least of an NBD client: GO, then reads."""

    def __init__(self, sock, name):
        self.s = socket.socket(socket.AF_UNIX)
        self.s.connect(str(sock))
        self.take(18)
        self.s.sendall(struct.pack(">I", 3))
        data = struct.pack(">I", len(name)) + name.encode() + struct.pack(">H", 0)
        self.s.sendall(b"IHAVEOPT" + struct.pack(">II", 7, len(data)) + data)
        while True:
            _, _, kind, length = struct.unpack(">QIII", self.take(20))
            text = self.take(length)
            if kind >> 31:
                sys.exit(f"export {name}: {text.decode(errors='replace')}")
            if kind == 1:
                return

    def take(self, n):
        out = b""
        while len(out) < n:
            piece = self.s.recv(n - len(out))
            if not piece:
                sys.exit("the server closed the connection")
            out += piece
        return out

    def read(self, offset, length):
        self.s.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, offset, length))
        _, error, _ = struct.unpack(">IIQ", self.take(16))
        if error:
            sys.exit(f"read: error {error}")
        return self.take(length)

    def close(self):
        self.s.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 2, 2, 0, 0))
        self.s.close()


def memory_kib(pid):
    """(RSS, PSS) of a process."""
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        key, value = line.split(":")
        fields[key] = int(value.split()[0])
    return fields["Rss"], fields["Pss"]


# ---------------------------------------------------------------------------------- fio over NBD

ROWS = [
    ("random read 4k, 16 in flight", "randread", "4k", 16, "iops"),
    ("random write 4k in place, 16 in flight", "randwrite", "4k", 16, "iops"),
    ("sequential read 1 MiB, 8 in flight", "read", "1m", 8, "bw"),
    ("sequential write 1 MiB, 8 in flight", "write", "1m", 8, "bw"),
]


def fio(uri, rw, bs, depth, seconds):
    out = run("fio", "--name=x", "--ioengine=nbd", f"--uri={uri}", f"--rw={rw}", f"--bs={bs}",
              f"--iodepth={depth}", "--time_based", f"--runtime={seconds}", "--ramp_time=0.3",
              "--randrepeat=0", "--output-format=json")
    side = json.loads(out[out.index("{"):])["jobs"][0]["read" if "read" in rw else "write"]
    if not side["total_ios"]:
        sys.exit(f"fio: no I/O done on {uri}")
    return side


def section_io(work, quick):
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


# ------------------------------------------------------------------------------------ the others

def make_store(work):
    root = work / "store"
    tree = work / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/hostname").write_text("bench\n")
    with open(tree / "data", "wb") as f:
        for _ in range(64):
            f.write(os.urandom(MIB))
    run(PLOOP, "--root", root, "template", "import", "t", tree, "--size", "1G")
    return root


def du(path):
    return int(run("du", "-s", "-B1", path).split()[0])


def section_clone(work, quick):
    count, peer_count = (300, 100) if quick else (1000, 200)
    root = make_store(work)
    before = du(root)
    began = time.perf_counter()
    made = json.loads(run(PLOOP, "--root", root, "create", "--json", "--template", "t",
                          *[f"ct{i:04}" for i in range(count)]))
    total = time.perf_counter() - began
    each = [m["seconds"] * 1000 for m in made]
    size = (du(root) - before) / count
    base = work / "base.qcow2"
    run("qemu-img", "create", "-f", "qcow2", base, "1G")
    peer = []
    for i in range(peer_count):
        began = time.perf_counter()
        run("qemu-img", "create", "-f", "qcow2", "-F", "qcow2", "-b", base, work / f"c{i}.qcow2")
        peer.append((time.perf_counter() - began) * 1000)
    # The floor: a process that does nothing, which qemu-img's figure contains.
    spawn = []
    for _ in range(50):
        began = time.perf_counter()
        run("true")
        spawn.append((time.perf_counter() - began) * 1000)
    peer_size = du(work / "c0.qcow2")
    ours, theirs = statistics.median(each), statistics.median(peer)
    lines = [
        "| clones of a 1 GiB template | each (median) | on disk | durable on return |",
        "|---|---|---|---|",
        f"| `ploop create`, {count} in one call ({total:.2f} s) | {ours:.2f} ms "
        f"(min {min(each):.2f}, max {max(each):.2f}) | {size / 1024:.1f} KiB | yes |",
        f"| `qemu-img create -b`, {peer_count} calls | {theirs:.2f} ms, of which "
        f"{statistics.median(spawn):.2f} ms start a process | {peer_size / 1024:.0f} KiB | no |",
        "",
        f"Ratio: ×{theirs / ours:.1f}.",
    ]
    return lines, {"ploop_ms": each, "qemu_img_ms": peer, "bytes_per_clone": size}


def section_open(work, quick):
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
            began = time.perf_counter()
            with serving(command, sock):
                client = Client(sock, "")
                client.read(1 << 39, 4096)
                times[name].append((time.perf_counter() - began) * 1000)
                client.close()
    lines = ["| start of the server to the first 4k read | median | min – max |", "|---|---|---|"]
    for name, t in times.items():
        lines.append(f"| {name} | {statistics.median(t):.1f} ms | {min(t):.1f} – {max(t):.1f} ms |")
    return lines, times


def section_idle(work, quick):
    count = 300 if quick else 1000
    root = work / "store"
    if not root.exists():
        root = make_store(work)
    have = len(list((root / "containers").iterdir()))
    if have < count:
        run(PLOOP, "--root", root, "create", "--template", "t",
            *[f"ct{i:04}" for i in range(have, count)])
    sock = work / "s"
    with serving([PLOOP, "serve", "--store", "--root", root, "--socket", sock], sock) as child:
        rss, pss = memory_kib(child.pid)
        clients = []
        for i in range(count):
            c = Client(sock, f"ct{i:04}")
            c.read(1 << 20, 4096)
            clients.append(c)
        time.sleep(2.5)
        open_rss, open_pss = memory_kib(child.pid)
        for c in clients:
            c.close()
    peer = []
    disk = work / "idle.raw"
    run("qemu-img", "create", "-f", "raw", disk, "1G")
    for i in range(5):
        s = work / f"q{i}"
        with serving(["qemu-nbd", "-t", "-r", "-k", s, "-f", "raw", disk], s) as child:
            c = Client(s, "")
            c.read(0, 4096)
            peer.append(memory_kib(child.pid)[1])
            c.close()
    theirs = statistics.median(peer)
    lines = [
        f"| {count} exports of one store | RSS | per export |",
        "|---|---|---|",
        f"| served, none open | {rss} KiB | {rss / count:.1f} KiB |",
        f"| each open, read once, its connection idle | {open_rss} KiB | "
        f"{(open_pss - pss) / count:.1f} KiB more |",
        f"| qemu-nbd raw, one process each | – | {theirs:.0f} KiB (PSS) |",
    ]
    return lines, {"idle_rss": rss, "open_rss": open_rss, "qemu_nbd_pss": peer, "count": count}


SECTIONS = {"io": section_io, "clone": section_clone, "open": section_open, "idle": section_idle}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--dir", type=Path, help="where the work files go")
    args = parser.parse_args()
    for tool in PACKAGES:
        need(tool)
    subprocess.run(["cargo", "build", "--release", "-q", "-p", "ploop-cli"], cwd=TOP, check=True)
    results = {}
    with tempfile.TemporaryDirectory(prefix="ploop-bench-", dir=args.dir) as tmp:
        for name in args.only.split(","):
            lines, results[name] = SECTIONS[name](Path(tmp), args.quick)
            print("\n".join(lines), "\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


main()
