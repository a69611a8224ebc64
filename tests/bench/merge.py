"""Merging 1 GiB: the writers meanwhile, speed beside QEMU's commits, and a rate that is held."""

import contextlib
import json
import socket
import statistics
import sys
import time

import goals
from live import Writer
from servers import left_out
from tools import (CLUSTER, GIB, MIB, PLOOP, Client, daemon, empty_template, fill, run, serving,
                   settle, spread, table, timed)

QSD = "qsd block-commit"


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
    run(PLOOP, "--root", root, "rm", "live")
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


def quiet(root, size):
    """Seconds of the same while clients have the disk and nobody writes."""
    make(root, "quiet", size)
    with daemon(root) as (_, sock, api):
        client = Client(sock, "quiet")
        began = time.monotonic_ns()
        follow(api, api.ask("DELETE", "/v1/containers/quiet/snapshots/s0")["id"], [])
        ended = time.monotonic_ns()
        client.close()
    run(PLOOP, "--root", root, "rm", "quiet")
    return (ended - began) / 1e9


class Qmp:
    """A monitor of QEMU's."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        self.lines = self.socket.makefile("rb")
        self.lines.readline()
        self.ask("qmp_capabilities")

    def ask(self, command, **arguments):
        request = {"execute": command, "arguments": arguments}
        self.socket.sendall(json.dumps(request).encode())
        return self.until(lambda said: "return" in said)

    def until(self, is_it):
        while True:
            said = json.loads(self.lines.readline())
            if "error" in said or said.get("data", {}).get("error"):
                sys.exit(f"qemu-storage-daemon: {said}")
            if is_it(said):
                return said


def qcow2_chain(work, size, layers):
    """Images over one another, the first ones with `size` bytes each, of different places."""
    paths = [work / f"layer{i}.qcow2" for i in range(layers)]
    for i, image in enumerate(paths):
        backing = ["-F", "qcow2", "-b", paths[i - 1]] if i else []
        run("qemu-img", "create", "-q", "-f", "qcow2", *backing, image, "4G")
        if i < 2:
            clusters = range(i * size // CLUSTER, (i + 1) * size // CLUSTER)
            script = "".join(f"write -q {offset} {len(data)}\n" for offset, data in fill(clusters))
            run("qemu-io", "-f", "qcow2", "-t", "writeback", image, input=script + "quit\n")
    return paths


def qsd_live(work, size, writes=True):
    """The same by qemu-storage-daemon: the layer below the live disk goes into the one below it,
    while a client writes, or has it open."""
    images = qcow2_chain(work, size, 3)
    sock, monitor = work / "q", work / "qmp"
    command = ["qemu-storage-daemon", "--object", "iothread,id=thread",
               "--chardev", f"socket,path={monitor},server=on,wait=off,id=monitor",
               "--monitor", "chardev=monitor"]
    for i, image in enumerate(images):
        backing = f",backing=layer{i - 1}" if i else ""
        command += ["--blockdev", f"driver=file,node-name=file{i},filename={image}",
                    "--blockdev", f"driver=qcow2,node-name=layer{i},file=file{i}{backing}"]
    command += ["--nbd-server", f"addr.type=unix,addr.path={sock}", "--export",
                "type=nbd,id=export,node-name=layer2,writable=on,iothread=thread"]
    settle()
    with serving(command, sock), contextlib.ExitStack() as last:
        client = (Writer(work, sock, "layer2", 2 * size, 64 * MIB) if writes
                  else Client(sock, "layer2"))
        qmp = Qmp(monitor)
        last.callback(qmp.socket.close)
        time.sleep(1)
        began = time.monotonic_ns()
        qmp.ask("block-commit", **{"job-id": "job", "device": "layer2", "top-node": "layer1",
                                   "base-node": "layer0"})
        qmp.until(lambda said: said.get("event") == "BLOCK_JOB_COMPLETED")
        ended = time.monotonic_ns()
        (client.stop if writes else client.close)()
    for image in images:
        image.unlink()
    if not writes:
        return (ended - began) / 1e9
    return {"seconds": (ended - began) / 1e9, "worst_gap_ms": client.worst(began, ended),
            "writer_iops": client.rate(began, ended)}


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
        base, top = qcow2_chain(work, size, 2)
        settle()
        theirs.append(timed("qemu-img", "commit", "-q", top))
        base.unlink()
        top.unlink()
    return {"ploop": ours, "qemu-img commit": theirs}


def section(work, quick):
    size, rounds = (256 * MIB, 1) if quick else (GIB, 3)
    root = work / "merge"
    empty_template(root, "t", 4 * GIB)
    results = {"size": size, "live": [], QSD: [], "quiet": [], f"{QSD}, quiet": []}
    for _ in range(rounds):
        results["live"].append(live(work, root, size, 1 if quick else 5))
        if "qsd qcow2" not in left_out:
            results[QSD].append(qsd_live(work, size))
            results[f"{QSD}, quiet"].append(qsd_live(work, size, writes=False))
        results["quiet"].append(quiet(root, size))
    # Half of what it does unlimited: a rate that the machine can hold.
    last = results["live"][-1]
    limit = max(MIB, int(last["moved"] / last["seconds"] / 2) // MIB * MIB)
    results["rate"] = rate(root, size, limit)
    results["offline"] = offline(work, root, size, rounds)
    return report(results), results


def report(results):
    size, runs, r = results["size"], results["live"], results["rate"]

    def line(what, of, prefix=""):
        gap, iops = ([x[prefix + key] for x in of] for key in ("worst_gap_ms", "writer_iops"))
        return [what, spread(gap, 1, " ms"), spread(iops, 0)]

    def speed(of):
        return spread([x["seconds"] for x in of], 2, " s")

    lines = table(
        ["one client writes 4 KiB blocks, one after another", "its longest time without an answer",
         "its writes per second"],
        line(f"for {runs[-1]['idle_seconds']:.1f} s before the merge", runs, "idle_"),
        line(f"while a snapshot is deleted that moves {runs[-1]['moved'] / MIB:.0f} MiB, in "
             f"{speed(runs)}", runs),
        *([line(f"while qemu-storage-daemon commits {size / MIB:.0f} MiB, in {speed(results[QSD])}",
                results[QSD])] if results[QSD] else []))
    lines += ["", *timeline(runs[-1]["timeline"]), ""]
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
    beside = {"while a client writes": ("live", QSD),
              "while nobody writes": ("quiet", f"{QSD}, quiet")}
    seconds = {key: [x["seconds"] if isinstance(x, dict) else x for x in results[key]]
               for pair in beside.values() for key in pair}
    met = []
    for when, (ours, theirs) in beside.items():
        met.append([f"live merge of {size // MIB} MiB, {when}", f"≤ 0.6 × {QSD}",
                    "its peer did not run", "–"])
        if seconds[theirs]:
            ratio = statistics.median(seconds[ours]) / statistics.median(seconds[theirs])
            met[-1][2:] = f"{ratio:.2f}", goals.yes(ratio <= 0.6)
    lines += ["", "While nobody writes it takes " + spread(seconds["quiet"], 2, " s") + (
        f"; {QSD} takes " + spread(seconds[beside["while nobody writes"][1]], 2, " s")
        if results[QSD] else "") + "."]
    return lines + goals.lines(*met)


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
