"""Deep chains: random reads beside a disk whose data is in one image, and opening."""

import random
import statistics

from opening import first_read
from tools import (CLUSTER, GIB, MIB, PLOOP, Client, daemon, empty_template, fill, fio, run,
                   serving, settle, spread, table)


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


def reads(sock, uris, rounds, seconds, data):
    """Read IOPS of each, interleaved."""
    out = {name: [] for name in uris}
    for _ in range(rounds):
        for name, uri in uris.items():
            out[name].append(fio(uri, "randread", "4k", 16, seconds, f"--size={data}")["iops"])
    return out


def warm(client, data):
    for offset in range(0, data, MIB):
        client.read(offset, MIB)
    client.close()


def section(work, quick):
    deep = 64 if quick else 256
    depths = (1, 16, 64) if quick else (1, 16, 64, 256)
    peer_depths = (1, 16) if quick else (1, 16, 64)
    rounds, seconds, opens = (3, 1, 3) if quick else (7, 2, 9)
    data = 128 * MIB if quick else 256 * MIB
    sizes = {"16 MiB": 16 * MIB, "128 MiB" if quick else "1 GiB": 128 * MIB if quick else GIB}
    root, sock = work / "depth", work / "s"
    empty_template(root, "t", 2 * GIB)
    with daemon(root) as (_, nbd, api):
        for depth in (1, deep):
            make(nbd, api, root, f"read{depth}", data, depth)
        for text, size in sizes.items():
            for depth in depths:
                make(nbd, api, root, f"open{depth}-{size}", size, depth)
    settle()
    results = {"depth": deep, "data": data}
    with daemon(root) as (_, nbd, _):
        uris = {}
        for depth in (1, deep):
            uris[depth] = f"nbd+unix:///read{depth}?socket={nbd}"
            warm(Client(nbd, f"read{depth}"), data)
        results["iops"] = reads(nbd, uris, rounds, seconds, data)
    results["qemu_iops"] = qemu_reads(work, sock, peer_depths[-1], rounds, seconds, data)
    results["open_ms"] = openings(work, root, sock, sizes, depths, peer_depths, opens)
    return report(results, deep, peer_depths[-1], sizes), results


def qemu_reads(work, sock, depth, rounds, seconds, data):
    out = {}
    for d in (1, depth):
        top = make_qcow2(work, f"read{d}", data, d)
        command = ["qemu-nbd", "-t", "-e", "16", "-x", "", "-k", sock, "-f", "qcow2", top]
        with serving(command, sock):
            warm(Client(sock, ""), data)
            uri = {d: f"nbd+unix:///?socket={sock}"}
            out |= reads(sock, uri, rounds, seconds, data)
    return out


def openings(work, root, sock, sizes, depths, peer_depths, rounds):
    """Milliseconds from the start of a server to its first answer, by data, program and depth."""
    commands = {}
    for text, size in sizes.items():
        for d in depths:
            name = f"open{d}-{size}"
            commands[text, "ploop", d] = [PLOOP, "serve", "--root", root, name, "--name", "",
                                          "--socket", sock]
        for d in peer_depths:
            top = make_qcow2(work, f"open{d}-{size}", size, d)
            commands[text, "qemu-nbd", d] = ["qemu-nbd", "-t", "-k", sock, "-f", "qcow2", top]
    times = {key: [] for key in commands}
    for _ in range(rounds):
        for key, command in commands.items():
            times[key].append(first_read(command, sock, 8 * MIB) * 1000)
    return {" / ".join(map(str, key)): t for key, t in times.items()}


def report(results, deep, peer, sizes):
    rows = []
    for who, iops, d in (("ploop", results["iops"], deep),
                         ("qemu-nbd qcow2", results["qemu_iops"], peer)):
        pairs = [b / a for a, b in zip(iops[1], iops[d])]
        rows.append([who, f"{statistics.median(iops[1]) / 1000:.1f} k",
                     f"{statistics.median(iops[d]) / 1000:.1f} k at {d}", spread(pairs, 2)])
    lines = table(["random read 4k, 16 in flight", "depth 1", "deep", "ratio of each pair"], *rows)
    lines += ["", f"{results['data'] // MIB} MiB of data, spread over all images of the chain; "
              "page cache warm. Goal: 0.9 at depth 256. QEMU's two are measured one after the "
              "other.", ""]
    times = results["open_ms"]
    depths = sorted({int(k.split(" / ")[2]) for k in times})
    rows = []
    for who in ("ploop", "qemu-nbd"):
        for text in sizes:
            cells = [times.get(f"{text} / {who} / {d}") for d in depths]
            rows.append([f"{who}, {text} of data", *(spread(t) if t else "" for t in cells)])
    lines += table(["start to first read, ms", *(f"depth {d}" for d in depths)], *rows)
    return lines
