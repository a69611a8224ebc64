"""Deep chains: random reads beside a disk whose data is in one image, and opening."""

import contextlib
import random
import statistics

import goals
from opening import first_read
from servers import left_out, qsd
from tools import (CLUSTER, GIB, MIB, PLOOP, Client, daemon, empty_template, fill, fio, light, run,
                   settle, spread, table)

QSD = "qsd qcow2"
DEPTHS = (1, 4, 16, 64, 256)
READS = ("random read 4k, 16 in flight", "light: random read 4k, 16 × 4 connections")


def layers(data, depth):
    """The clusters that each layer writes: `data` bytes in all, at random places."""
    clusters = list(range(data // CLUSTER))
    random.Random(7).shuffle(clusters)
    share = len(clusters) / depth
    return [clusters[round(i * share):round((i + 1) * share)] for i in range(depth)]


def make(sock, api, root, name, data, depth):
    """A container with `data` bytes in `depth` images: a snapshot after each but the last."""
    run(PLOOP, "--root", root, "create", name, "--template", "t")
    client = Client(sock, name)
    for i, part in enumerate(layers(data, depth)):
        client.write_all(fill(part, seed=i))
        if i + 1 < depth:
            api.snapshot(name, f"s{i}")
    client.flush()
    client.close()


def make_qcow2(work, name, data, depth):
    """The same by QEMU; the path of the top."""
    below = None
    for i, part in enumerate(layers(data, depth)):
        image = work / f"{name}-{i}.qcow2"
        backing = ["-F", "qcow2", "-b", below] if below else []
        run("qemu-img", "create", "-f", "qcow2", *backing, image, "2G")
        writes = [f"write -q {offset} {len(data)}" for offset, data in fill(part)]
        script = "\n".join(writes) + "\nquit\n"
        run("qemu-io", "-f", "qcow2", "-t", "writeback", image, input=script)
        below = image
    return below


def reads(exports, rounds, seconds, data):
    """IOPS of each of {name: (address, uri, export)}, by fio and the light client, interleaved."""
    out = {work: {name: [] for name in exports} for work in READS}
    for _ in range(rounds):
        for name, (address, uri, export) in exports.items():
            got = fio(uri, "randread", "4k", 16, seconds, "--time_based", f"--size={data}")
            out[READS[0]][name].append(got["iops"])
            got = light(address, export, "read", depth=16, connections=4, range=data,
                        seconds=seconds)
            out[READS[1]][name].append(got["iops"])
    return out


def warm(client, data):
    for offset in range(0, data, MIB):
        client.read(offset, MIB)
    client.close()


def section(work, quick):
    depths = (1, 64) if quick else DEPTHS
    peer_depths = () if QSD in left_out else tuple(d for d in depths if d <= 64)
    rounds, seconds, opens = (2, 0.5, 3) if quick else (3, 1, 5)
    data = 32 * MIB if quick else 256 * MIB
    sizes = {"16 MiB": 16 * MIB} if quick else {"16 MiB": 16 * MIB, "1 GiB": GIB}
    root, sock = work / "depth", work / "s"
    empty_template(root, "t", 2 * GIB)
    with daemon(root) as (_, nbd, api):
        for depth in depths:
            make(nbd, api, root, f"read{depth}", data, depth)
            for size in sizes.values():
                make(nbd, api, root, f"open{depth}-{size}", size, depth)
    tops = {d: make_qcow2(work, f"read{d}", data, d) for d in peer_depths}
    settle()
    results = {"data": data}
    with contextlib.ExitStack() as all:
        _, nbd, _ = all.enter_context(daemon(root))
        exports = {}
        for d in depths:
            uri = f"nbd+unix:///read{d}?socket={nbd}"
            exports[f"ploop / {d}"] = nbd, uri, f"read{d}"
            warm(Client(nbd, f"read{d}"), data)
        for d, top in tops.items():
            # All are up at once: the idle ones cost nothing.
            server = qsd(top, "qcow2", work / f"q{d}")
            all.enter_context(server.up())
            exports[f"{QSD} / {d}"] = server.address, server.uri, server.export
            warm(server.client(), data)
        results["iops"] = reads(exports, rounds, seconds, data)
    results["open_ms"] = openings(work, root, sock, sizes, depths, opens)
    return report(results, sizes), results


def openings(work, root, sock, sizes, depths, rounds):
    """Milliseconds from the start of a server to its first answer, by data, program and depth."""
    commands = {}
    for text, size in sizes.items():
        for d in depths:
            name = f"open{d}-{size}"
            commands[text, "ploop", d] = [PLOOP, "serve", "--root", root, name, "--name", "",
                                          "--socket", sock]
        for d in (d for d in depths if d <= 64):
            top = make_qcow2(work, f"open{d}-{size}", size, d)
            commands[text, "qemu-nbd", d] = ["qemu-nbd", "-t", "-k", sock, "-f", "qcow2", top]
    times = {key: [] for key in commands}
    for _ in range(rounds):
        for key, command in commands.items():
            times[key].append(first_read(command, sock, 8 * MIB) * 1000)
    return {" / ".join(map(str, key)): t for key, t in times.items()}


def report(results, sizes):
    lines, met = [], []
    for work, iops in results["iops"].items():
        depths = sorted({int(name.split(" / ")[1]) for name in iops})
        rows = []
        for who in ("ploop", QSD):
            base = iops.get(f"{who} / 1")
            cells = []
            for d in depths:
                values = iops.get(f"{who} / {d}")
                cells.append(f"{spread([v / 1000 for v in values], 1, ' k')} "
                             f"×{middle(values) / middle(base):.2f}" if values else "–")
            rows.append([who, *cells])
        lines += [*table([work, *(f"depth {d}" for d in depths)], *rows), ""]
        met += met_by(work, iops, depths)
    lines += [f"{results['data'] // MIB} MiB of data, spread over all images of the chain; page "
              "cache warm. After ×: by the same server's depth 1.", ""]
    times = results["open_ms"]
    depths = sorted({int(k.split(" / ")[2]) for k in times})
    rows = []
    for who in ("ploop", "qemu-nbd"):
        for text in sizes:
            cells = [times.get(f"{text} / {who} / {d}") for d in depths]
            rows.append([f"{who}, {text} of data", *(spread(t) if t else "–" for t in cells)])
    lines += table(["start to first read, ms", *(f"depth {d}" for d in depths)], *rows)
    for text in sizes:
        ours, theirs = (middle(times[f"{text} / {who} / 64"]) for who in ("ploop", "qemu-nbd"))
        met.append(goals.at_most(f"open and first read at depth 64, {text} of data, by qemu-nbd's",
                                 0.15, "", ours / theirs))
    return lines + goals.lines(*met)


def middle(values):
    return statistics.median(values)


def met_by(work, iops, depths):
    rows = []
    for d in (d for d in (64, 256) if d in depths):
        ratio = middle(iops[f"ploop / {d}"]) / middle(iops["ploop / 1"])
        rows.append([f"{work}, depth {d}", "≥ 0.9 × our depth 1", f"{ratio:.2f}",
                     goals.yes(ratio >= 0.9)])
    pair = {"ploop": iops["ploop / 64"], QSD: iops.get(f"{QSD} / 64")}
    rows.append(goals.at_least(f"{work}, depth 64", 5, QSD, {k: v for k, v in pair.items() if v}))
    return rows
