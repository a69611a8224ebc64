"""Merging 1 GiB: the writers meanwhile, speed beside qemu-img commit, and a rate that is held."""

import statistics
import time

from live import Writer
from tools import (CLUSTER, GIB, MIB, PLOOP, Client, daemon, empty_template, fill, run, settle,
                   spread, table, timed)


def make(root, name, size):
    """A container whose two snapshots have `size` bytes each, of different places."""
    run(PLOOP, "--root", root, "create", name, "--template", "t")
    with daemon(root) as (_, sock, api):
        client = Client(sock, name)
        for i in range(2):
            first = i * size // CLUSTER
            client.write_all(fill(range(first, first + size // CLUSTER)))
            api.snapshot(name, f"s{i}")
        client.close()
    settle()


def follow(api, job, rows):
    """Notes (time, done, total) of a job until it is over."""
    while True:
        j = api.job(job)
        rows.append((time.monotonic_ns(), j["done"], j["total"]))
        if j["state"] == "done":
            return j
        time.sleep(0.01)


def live(work, root, size, idle_seconds):
    """Deletes the older snapshot while a client writes to the live disk."""
    make(root, "live", size)
    with daemon(root) as (_, sock, api):
        writer = Writer(work, sock, "live", 2 * size, 64 * MIB)
        # The clusters of its region are allocated first.
        time.sleep(1)
        start = time.monotonic_ns()
        time.sleep(idle_seconds)
        began = time.monotonic_ns()
        job = api.ask("DELETE", "/v1/containers/live/snapshots/s0")["id"]
        rows = []
        follow(api, job, rows)
        ended = time.monotonic_ns()
        writer.stop()
    line = [{"t": round((t - began) / 1e9, 4), "done": done, "total": total,
             "gap_ms": round(writer.worst(before, t), 3)}
            for (before, _, _), (t, done, total) in zip([(began, 0, 0)] + rows, rows)]
    return {
        "timeline": line, "seconds": (ended - began) / 1e9, "moved": rows[-1][2],
        "worst_gap_ms": writer.worst(began, ended), "writer_iops": writer.rate(began, ended),
        "idle_worst_gap_ms": writer.worst(start, began),
        "idle_writer_iops": writer.rate(start, began),
        "idle_seconds": (began - start) / 1e9,
    }


def rate(root, size, limit):
    """A merge that may move so many bytes per second; what it moves."""
    make(root, "rate", size)
    with daemon(root) as (_, _, api):
        body = {"snapshot": "s1", "rate": limit}
        job = api.ask("POST", "/v1/containers/rate/merge", body)["id"]
        rows = []
        follow(api, job, rows)
    moved = rows[-1][2]
    # From the first step to the last: no set-up, no final sync.
    steps = [r for r in rows if 0 < r[1] < moved]
    (t0, done0, _), (t1, done1, _) = steps[0], steps[-1]
    return {"limit": limit, "held": (done1 - done0) / ((t1 - t0) / 1e9), "moved": moved,
            "seconds": (rows[-1][0] - rows[0][0]) / 1e9}


def offline(work, root, size, rounds):
    """Seconds to merge `size` bytes, by `ploop snapshot delete` and by `qemu-img commit`."""
    ours, theirs = [], []
    for i in range(rounds):
        name = f"off{i}"
        make(root, name, size)
        ours.append(timed(PLOOP, "--root", root, "snapshot", "delete", name, "s0"))
        run(PLOOP, "--root", root, "rm", name)
        base, top = work / "base.qcow2", work / "top.qcow2"
        run("qemu-img", "create", "-f", "qcow2", base, "4G")
        run("qemu-img", "create", "-f", "qcow2", "-F", "qcow2", "-b", base, top)
        for image, first in ((base, 0), (top, size)):
            writes = [f"write -q {offset} {len(data)}" for offset, data in
                      fill(range(first // CLUSTER, (first + size) // CLUSTER))]
            run("qemu-io", "-f", "qcow2", "-t", "writeback", image,
                input="\n".join(writes) + "\nquit\n")
        settle()
        theirs.append(timed("qemu-img", "commit", "-q", top))
        base.unlink()
        top.unlink()
    return {"ploop": ours, "qemu-img commit": theirs}


def section(work, quick):
    size, rounds = (256 * MIB, 2) if quick else (GIB, 3)
    root = work / "merge"
    empty_template(root, "t", 4 * GIB)
    results = {"size": size, "live": live(work, root, size, 2 if quick else 5)}
    # Half of what it does unlimited: a rate that the machine can hold.
    speed = results["live"]["moved"] / results["live"]["seconds"]
    limit = max(MIB, int(speed / 2) // MIB * MIB)
    results["rate"] = rate(root, size, limit)
    results["offline"] = offline(work, root, size, rounds)
    return report(results), results


def report(results):
    size, l, r = results["size"], results["live"], results["rate"]
    lines = table(
        ["one client writes 4 KiB blocks, one after another", "its longest time without an answer",
         "its writes per second"],
        [f"for {l['idle_seconds']:.1f} s before the merge", f"{l['idle_worst_gap_ms']:.1f} ms",
         f"{l['idle_writer_iops']:.0f}"],
        [f"while a snapshot is deleted that moves {l['moved'] / MIB:.0f} MiB "
         f"({l['seconds']:.2f} s, {l['moved'] / l['seconds'] / 1e6:.0f} MB/s)",
         f"{l['worst_gap_ms']:.1f} ms", f"{l['writer_iops']:.0f}"])
    lines += ["", *timeline(l["timeline"]), ""]
    off = results["offline"]
    pairs = [b / a for a, b in zip(off["ploop"], off["qemu-img commit"])]
    lines += table(
        [f"merge of {size // MIB} MiB, nobody has the disk", "time", "speed"],
        *([who, spread(t, 2, " s"), f"{size / statistics.median(t) / 1e6:.0f} MB/s"]
          for who, t in off.items()))
    lines += ["", f"ploop is ×{statistics.median(pairs):.2f} as fast; both are durable on return.",
              "", f"A merge limited to {r['limit'] / MIB:.0f} MiB/s moved "
              f"{r['held'] / MIB:.1f} MiB/s ({(r['held'] / r['limit'] - 1) * 100:+.1f} %; goal: "
              "within 10 %)."]
    return lines


def timeline(rows, parts=8):
    """The timeline in as many parts; all of it is in the JSON."""
    end, out = rows[-1]["t"] or 1e-9, []
    for i in range(parts):
        part = [r for r in rows if i / parts <= r["t"] / end < (i + 1) / parts]
        if part or i == parts - 1:
            part = part or [rows[-1]]
            last = rows[-1] if i == parts - 1 else part[-1]
            done = f"{last['done'] / MIB:.0f} of {last['total'] / MIB:.0f} MiB"
            gap = max(r["gap_ms"] for r in part)
            out.append([f"{last['t']:.2f} s", done, f"{gap:.1f} ms"])
    return table(["the merge, at", "done", "longest gap since the line above"], *out)
