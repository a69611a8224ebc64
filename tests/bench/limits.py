"""I/O limits: how near a limited export comes to its rate, and how two share a store's budget."""

import threading

from tools import MIB, PLOOP, PLOOPD, empty_template, fio, run, serving, spread, table

RATES = (100, 1000, 10000)
BUDGET = 2000
#: Priorities that are 4:1.
HEAVY, LIGHT = 6, 4
#: On and on, not until all blocks were there once.
ON = ("--time_based", "--norandommap")


def ploopd(root, *more):
    command = [PLOOPD, "--root", root, "--socket", root / "nbd.sock", *more]
    return serving(command, root / "control.sock", log=root.with_suffix(".log"))


def uri(root, container):
    return f"nbd+unix:///{container}?socket={root / 'nbd.sock'}"


def alone(root, rounds, seconds):
    """One export at each rate. No peer is beside it: the throttle group of qemu-storage-daemon 10.0
    did not hold a rate over NBD, however it was set."""
    out = {}
    for rate in RATES:
        figures = out[rate] = []
        run(PLOOP, "--root", root, "set", "a", "--iops", str(rate))
        for _ in range(rounds):
            # A second goes by first, in which what was saved up is used up.
            with ploopd(root):
                for depth, rw in ((16, "randread"), (1, "randread"), (16, "randwrite")):
                    got = fio(uri(root, "a"), rw, "4k", depth, seconds, *ON, ramp=1)
                    figures.append({"depth": depth, "rw": rw, "iops": got["iops"]})
    run(PLOOP, "--root", root, "set", "a", "--iops", "none")
    return out


def together(root, rounds, seconds, sizes):
    """Two exports that ask for all they can get, under one budget."""
    for name, priority in (("a", HEAVY), ("b", LIGHT)):
        run(PLOOP, "--root", root, "set", name, "--ioprio", str(priority))
    out = []
    for _ in range(rounds):
        with ploopd(root, "--iops", str(BUDGET)):
            got = {}

            def ask(name, size):
                got[name] = fio(uri(root, name), "randread", size, 16, seconds, *ON,
                                ramp=1)["iops"]

            threads = [threading.Thread(target=ask, args=pair) for pair in zip("ab", sizes)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            out.append(got)
    return out


def section(work, quick):
    rounds, seconds = (1, 3) if quick else (3, 10)
    root = work / "store"
    empty_template(root, "t", 64 * MIB)
    run(PLOOP, "--root", root, "create", "a", "b", "--template", "t")
    rates = alone(root, rounds, seconds)
    shared = {"4k and 4k": together(root, rounds, seconds, ("4k", "4k")),
              "64k and 4k": together(root, rounds, seconds, ("64k", "4k"))}
    return report(rates, shared, rounds, seconds), {"rates": rates, "shared": shared}


def error(values, rate):
    return spread([(v / rate - 1) * 100 for v in values], 2, " %")


def report(rates, shared, rounds, seconds):
    rows = []
    for rate, figures in rates.items():
        def of(depth, rw):
            return error([f["iops"] for f in figures if (f["depth"], f["rw"]) == (depth, rw)], rate)
        rows.append([f"{rate} IOPS", of(16, "randread"), of(1, "randread"), of(16, "randwrite")])
    lines = table(["limit", "reads, 16 in flight", "reads, 1", "writes, 16"], *rows)
    rows = []
    for sizes, all in shared.items():
        rows.append([sizes, spread([g["a"] for g in all], 0), spread([g["b"] for g in all], 0),
                     spread([g["a"] / g["b"] for g in all], 2),
                     error([g["a"] + g["b"] for g in all], BUDGET)])
    lines += ["", *table([f"two exports of weights 4:1, {BUDGET} IOPS together", "the heavier",
                          "the lighter",
                          "ratio", "sum, off the budget"], *rows)]
    return lines + ["", f"fio, 4 KiB, {seconds} s after 1 s of ramp; median (min – max) of {rounds}. "
                    "In percent: how far the rate was off the limit. fio counts those in flight at the "
                    "end into the time: at 100 IOPS, 16 of them are 0.16 s."]
