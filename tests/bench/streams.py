"""ploop send into ploop receive, beside programs that copy a file of the same data; all durable."""

import statistics

from tools import GIB, MIB, PLOOP, pieces, run, settle, spread, table, timed


TITLE = "A disk from one store to another"


def section(work, quick):
    size, rounds = (256 * MIB, 3) if quick else (GIB, 5)
    raw, here, there = work / "disk.raw", work / "here", work / "there"
    with open(raw, "wb") as f:
        # Half of it holes.
        f.truncate(2 * size)
        for offset, data in pieces(size):
            f.seek(offset)
            f.write(data)
    run(PLOOP, "--root", here, "template", "import", "t", raw)
    run(PLOOP, "--root", here, "create", "disk", "--template", "t")
    out = work / "out"
    shell = lambda text: ("sh", "-c", text)
    jobs = {
        "ploop send, ploop receive": shell(
            f"{PLOOP} --root {here} send disk | {PLOOP} --root {there} receive disk"),
        "cp --sparse=always, sync": shell(f"cp --sparse=always {raw} {out} && sync {out}"),
        "tar -S, tar, sync": shell(
            f"tar -C {work} -cSf - disk.raw | (mkdir {out} && tar -C {out} -xSf - && sync {out}/disk.raw)"),
        "qemu-img convert to qcow2, sync": shell(
            f"qemu-img convert -O qcow2 {raw} {out} && sync {out}"),
    }
    times = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            settle()
            times[name].append(timed(*job))
            run("rm", "-rf", there, out)
    mine = statistics.median(times["ploop send, ploop receive"])
    rows = [[name, spread(t, 2, " s"), f"{size / MIB / statistics.median(t):.0f} MiB/s",
             f"×{statistics.median(t) / mine:.2f}"] for name, t in times.items()]
    lines = table([f"{TITLE}, {size // MIB} MiB of data", "time", "rate", "beside ploop"], *rows)
    return lines + ["", f"Median of {rounds} (min – max), page cache warm, each program's start and the sync "
                    "included."], times
