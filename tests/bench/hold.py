"""The holder: what it costs beside a direct connection."""

from limits import ON, ploopd
from tools import MIB, PLOOP, empty_template, fio, run, serving, spread, table

SIZE = 256 * MIB
#: (what, fio's rw, block size, depth)
WORK = (("random read 4k, 1 in flight", "randread", "4k", 1),
        ("random read 4k, 16", "randread", "4k", 16),
        ("random write 4k in place, 16", "randwrite", "4k", 16),
        ("sequential read 1 MiB, 8", "read", "1M", 8),
        ("sequential write 1 MiB, 8", "write", "1M", 8))


def uri(sock):
    return f"nbd+unix:///a?socket={sock}"


def section(work, quick):
    rounds, seconds = (2, 3) if quick else (5, 10)
    root, sock = work / "store", work / "hold.sock"
    empty_template(root, "t", 512 * MIB)
    run(PLOOP, "--root", root, "create", "a", "--template", "t")
    got = {what: {"direct": [], "held": []} for what, *_ in WORK}
    hold = [PLOOP, "hold", "--socket", sock, "--to", f"unix:{root / 'nbd.sock'}"]
    with ploopd(root), serving(hold, sock, log=work / "hold.log"):
        places = {"direct": root / "nbd.sock", "held": sock}
        fio(uri(places["direct"]), "write", "1M", 4, 600, f"--size={SIZE}", ramp=0)
        for _ in range(rounds):
            for what, rw, bs, depth in WORK:
                for how, place in places.items():
                    figure = fio(uri(place), rw, bs, depth, seconds, f"--size={SIZE}", *ON)
                    got[what][how].append(figure["iops"])
    rows = []
    for what, figures in got.items():
        ratios = [h / d for h, d in zip(figures["held"], figures["direct"])]
        rows.append([what, spread(figures["direct"], 0), spread(figures["held"], 0),
                     spread(ratios, 2)])
    lines = table(["fio, requests a second", "direct", "through the holder", "ratio"], *rows)
    note = f"{seconds} s each; median (min – max) of {rounds}. The holder has its defaults."
    return lines + ["", note], got
