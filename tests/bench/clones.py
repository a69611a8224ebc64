"""A thousand writable clones in one call; what a clone costs as its template grows."""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import goals
from tools import (CLUSTER, GIB, KIB, MIB, PLOOP, Client, daemon, du, empty_template, fill, run,
                   settle, spread, table, timed)


def make_store(root, work):
    """A store with a template of 1 GiB that has 64 MiB of data in a filesystem."""
    tree = work / "tree"
    if not tree.exists():
        (tree / "etc").mkdir(parents=True)
        (tree / "etc/hostname").write_text("bench\n")
        (tree / "data").write_bytes(os.urandom(64 * MIB))
    run(PLOOP, "--root", root, "template", "import", "t", tree, "--size", "1G")


def remove(root, count, name="ct"):
    names = [f"{name}-{i:04}" for i in range(1, count + 1)]
    run(PLOOP, "--root", root, "rm", *names)


def create(root, count, *source, name="ct"):
    return timed(PLOOP, "--root", root, "create", name, "--count", count, *source)


def thousand(root, work, count, rounds, peer_count):
    """The same work by ploop and by qemu-img, in one place, one after the other."""
    make_store(root, work)
    before, times, peer = du(root), [], []
    base = root.with_suffix(".qcow2")
    run("qemu-img", "create", "-f", "qcow2", base, "1G")
    for round in range(rounds):
        if round:
            remove(root, count)
        settle()
        times.append(create(root, count, "--template", "t"))
        settle()
        began = time.perf_counter()
        for i in range(peer_count):
            clone = root.with_suffix(f".c{i}.qcow2")
            run("qemu-img", "create", "-f", "qcow2", "-F", "qcow2", "-b", base, clone)
        peer.append((time.perf_counter() - began) * count / peer_count)
    size, peer_size = (du(root) - before) / count, du(clone)
    remove(root, count)
    for i in range(peer_count):
        root.with_suffix(f".c{i}.qcow2").unlink()
    return {
        "seconds": times, "qemu_img_seconds": peer, "bytes_per_clone": size,
        "qemu_img_bytes_per_clone": peer_size, "count": count, "qemu_img_count": peer_count,
    }


def start_of_a_process():
    """Seconds that a process takes that does nothing: qemu-img's figure contains it."""
    return statistics.median(timed("true") for _ in range(50))


def by_size(root, count, rounds):
    """Milliseconds per clone, by the template's size; half of each is data, at most 256 MiB."""
    sizes = {"64 MiB": 64 * MIB, "1 GiB": GIB, "8 GiB, sparse": 8 * GIB}
    for i, size in enumerate(sizes.values()):
        raw = root.with_suffix(".raw")
        with open(raw, "wb") as f:
            f.truncate(size)
            for offset, data in fill(range(min(size // 2, 256 * MIB) // CLUSTER)):
                f.seek(offset * 2 if size > 64 * MIB else offset)
                f.write(data)
        run(PLOOP, "--root", root, "template", "import", f"s{i}", raw, "--from", "raw")
        raw.unlink()
    times = {name: [] for name in sizes}
    for _ in range(rounds):
        for i, name in enumerate(sizes):
            settle()
            times[name].append(create(root, count, "--template", f"s{i}") * 1000 / count)
            remove(root, count)
    return times


def of_live(root, count):
    """Seconds for clones of a snapshot while a client has the container open, and of a template
    by the same daemon."""
    empty_template(root, "live", GIB)
    run(PLOOP, "--root", root, "create", "source", "--template", "live")
    with daemon(root) as (_, sock, api):
        client = Client(sock, "source")
        client.write_all(fill(range(256 * MIB // CLUSTER)))
        api.snapshot("source", "s")
        client.write_all(fill(range(16)))
        settle()
        first = create(root, 1, "--from", "source@s", name="first")
        settle()
        live = create(root, count, "--from", "source@s")
        settle()
        client.write_all(fill(range(16)))
        template = create(root, count, "--template", "live", name="tc")
        client.close()
        remove(root, count)
        remove(root, count, name="tc")
    return {"first": first, "snapshot": live, "template": template}


def section(work, quick):
    count, peer_count, rounds = (200, 25, 2) if quick else (1000, 200, 3)
    small = 50 if quick else 200
    if not os.access("/dev/shm", os.W_OK):
        sys.exit("/dev/shm is required: a tmpfs to measure without a disk")
    with tempfile.TemporaryDirectory(prefix="ploop-bench-", dir="/dev/shm") as shm:
        places = {"tmpfs": Path(shm) / "clones", "disk": work / "clones"}
        results = {where: thousand(root, work, count, rounds, peer_count)
                   for where, root in places.items()}
    results["by_size_ms"] = by_size(places["disk"], small, rounds)
    results["live"] = of_live(places["disk"], count)
    results["start_of_a_process"] = start_of_a_process()
    return report(results, count, small), results


def report(results, count, small):
    rows = []
    for where in ("tmpfs", "disk"):
        r = results[where]
        ours, theirs = (statistics.median(r[k]) for k in ("seconds", "qemu_img_seconds"))
        rows.append([f"`ploop create --count {count}`, {where}", spread(r["seconds"], 2, " s"),
                     f"{ours * 1000 / count:.2f} ms", f"{r['bytes_per_clone'] / KIB:.1f} KiB",
                     "yes", ""])
        rows.append([f"`qemu-img create -b`, {where} ({r['qemu_img_count']} calls, scaled)",
                     spread(r["qemu_img_seconds"], 2, " s"), f"{theirs * 1000 / count:.2f} ms",
                     f"{r['qemu_img_bytes_per_clone'] / KIB:.0f} KiB", "no",
                     f"×{theirs / ours:.1f}"])
    lines = table([f"{count} clones of a 1 GiB template", "in all", "each", "on disk, each",
                   "durable on return", "ploop is faster by"], *rows)
    spawn = results["start_of_a_process"] * 1000
    lines += ["", f"Goals: under 1 s on tmpfs, 3 s on the disk, at most 32 KiB each. Of qemu-img's "
              f"time, {spawn:.2f} ms each start a process.", ""]
    lines += table([f"a clone, {small} in one call, on the disk", "ms each"],
                   *([f"of a template of {name}", spread(t, 2)]
                     for name, t in results["by_size_ms"].items()))
    live = results["live"]
    lines += ["", *table(
        [f"through the daemon, while the source is in use, {count} in one call", "in all"],
        ["of a template", f"{live['template']:.2f} s"],
        ["of a snapshot of the container, the first one (its layers become shared)",
         f"{live['first'] * 1000:.1f} ms"],
        ["of that snapshot, the next", f"{live['snapshot']:.2f} s"])]
    met = []
    for where in ("tmpfs", "disk"):
        r = results[where]
        speeds = {"ploop": [1 / t for t in r["seconds"]],
                  "qemu-img create -b": [1 / t for t in r["qemu_img_seconds"]]}
        met += [goals.at_least(f"{count} clones, {where}", 15, "qemu-img create -b", speeds),
                goals.at_most(f"a clone, {where}", 32, " KiB", r["bytes_per_clone"] / KIB, 1)]
    return lines + goals.lines(*met)
