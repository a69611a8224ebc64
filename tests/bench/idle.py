"""Ten thousand exports that nobody uses, and a thousand clients that ask nothing."""

import contextlib
import statistics
import time

import goals
from tools import (GIB, PLOOP, Client, at_rest, daemon, empty_template, list_exports, memory_kib,
                   run, serving, spread, table)


def exports(root, count, seconds, listings):
    """The daemon at rest, on a store of no containers and on one of `count`."""
    with daemon(root) as (child, _, _):
        bare = at_rest(child.pid, 0.5)
    run(PLOOP, "--root", root, "create", "ct", "--template", "t", "--count", count)
    with daemon(root) as (child, sock, _):
        time.sleep(0.5)
        idle = at_rest(child.pid, seconds)
        times = []
        for _ in range(listings):
            named, took = list_exports(sock)
            times.append(took)
        listed = at_rest(child.pid, 0.5)
    return {"bare": bare, "idle": idle, "list_seconds": times, "listed": named,
            "after_list": listed}


def clients(root, count, seconds):
    """A daemon with `count` clients, each at its own container, that have read a block and rest."""
    with daemon(root) as (child, sock, _), contextlib.ExitStack() as all:
        before = at_rest(child.pid, 0.5)
        began = time.perf_counter()
        for i in range(1, count + 1):
            c = Client(sock, f"ct-{i:0{width(root)}}")
            all.callback(c.close)
        took = time.perf_counter() - began
        return {"before": before, "connected": rested(child.pid, seconds), "connect_seconds": took}


def rested(pid, seconds):
    time.sleep(2.5)
    return at_rest(pid, seconds)


def width(root):
    """Digits that the containers are numbered with."""
    return len(next((root / "containers").iterdir()).name) - len("ct-")


def peers(work, count, connected, seconds):
    """nbdkit with a directory of as many files; qemu-nbd, a process for each disk."""
    out, files, sock = {}, work / "files", work / "s"
    files.mkdir()
    for i in range(count):
        with open(files / f"ct-{i:05}", "wb") as f:
            f.truncate(GIB)
    with serving(["nbdkit", "-f", "-U", sock, "file", f"dir={files}"], sock,
                 log=work / "nbdkit.log") as child:
        bare = at_rest(child.pid, 0.5)
        idle = at_rest(child.pid, 0.5)
        named, took = list_exports(sock)
        with contextlib.ExitStack() as all:
            for i in range(connected):
                c = Client(sock, f"ct-{i:05}")
                all.callback(c.close)
            busy = rested(child.pid, seconds)
    out["nbdkit"] = {"bare": bare, "idle": idle, "listed": named, "list_seconds": [took],
                     "clients": connected, "connected": busy}
    pss = []
    for i in range(5):
        s = work / f"q{i}"
        with serving(["qemu-nbd", "-t", "-r", "-k", s, "-f", "raw", files / "ct-00000"], s) as q:
            c = Client(s, "")
            c.read(0, 4096)
            pss.append(memory_kib(q.pid)[1])
            c.close()
    out["qemu_nbd_pss_kib"] = pss
    return out


def section(work, quick):
    count, connected, seconds = (1000, 200, 1) if quick else (10_000, 1000, 10)
    root = work / "idle"
    empty_template(root, "t", GIB)
    results = exports(root, count, seconds, 3 if quick else 5)
    results["clients"] = clients(root, connected, seconds)
    results["peers"] = peers(work, count, 50 if quick else 100, seconds)
    results["count"], results["connected"] = count, connected
    return report(results), results


def line(name, r, base, of):
    each = f"{(r['rss_kib'] - base) / of:.2f} KiB" if of else "–"
    return [name, f"{r['rss_kib']} KiB", each, r["descriptors"], r["threads"],
            f"{r['cpu_seconds'] * 1000:.0f} ms, {r['wakeups']} wake-ups in {r['seconds']:.0f} s"]


def report(results):
    n, m, kit = results["count"], results["connected"], results["peers"]["nbdkit"]
    bare, few = results["bare"]["rss_kib"], results["clients"]
    head = ["", "RSS", "more, each", "descriptors", "threads", "CPU at rest"]
    lines = table(
        head,
        line("`ploopd`, an empty store", results["bare"], 0, 0),
        line(f"`ploopd`, {n} exports", results["idle"], bare, n),
        line("the same after clients have listed them", results["after_list"], bare, n),
        line(f"`ploopd`, {m} clients of as many containers", few["connected"],
             few["before"]["rss_kib"], m),
        line(f"nbdkit file, {n} exports", kit["idle"], 0, 0),
        line(f"nbdkit file, {kit['clients']} clients", kit["connected"], kit["idle"]["rss_kib"],
             kit["clients"]),
        ["qemu-nbd raw, one process for each", "–",
         f"{statistics.median(results['peers']['qemu_nbd_pss_kib']):.0f} KiB (PSS)", "", "", ""])
    times = [t * 1000 for t in results["list_seconds"]]
    lines += ["", f"A client's LIST names {results['listed']} exports in {spread(times)} ms; "
              f"nbdkit's names {kit['listed']} in {kit['list_seconds'][0] * 1000:.1f} ms. {m} "
              f"clients connect one after another in {few['connect_seconds']:.2f} s."]
    each = (results["idle"]["rss_kib"] - bare) / n
    held = (results["idle"]["descriptors"] - results["bare"]["descriptors"]) / n
    return lines + goals.lines(goals.at_most("memory of an idle export", 24, " KiB", each),
                               goals.at_most("its descriptors", 1, "", held))
