"""The cluster size: what each costs and gives, to choose the default by.

Only ploop, the same work on disks over one template, imported with clusters of each size. Every
figure starts on a new container.
"""

from fresh import Cow, burst, new, sustained
from rows import Row, cell, measure
from servers import PLOOP_NAME, ploop
from tools import GIB, KIB, MIB, PLOOP, run, table

SIZES = (32, 64, 128, 256, 1024)
FSYNC = Row("fsync after each 4k write over a template", "fio", "randwrite", 4 * KIB, 1,
            more=("--fsync=1",))
WRITE = Row("sequential write 1 MiB over a template", "fio", "write", MIB, 8, unit="mb")
READ = Row("random read 4k, 16", "light", "read", 4 * KIB, 16)
#: Writes of 4 KiB whose space is looked at.
SCATTERED = 2000


class Over:
    """A container over a template with clusters of `kib` KiB."""

    title, remarks = Cow.title, ()

    def __init__(self, work, base, kib, sock):
        self.work, self.root = work, work / f"c{kib}"
        run(PLOOP, "--root", self.root, "template", "import", "t", base, "--from", "raw",
            "--cluster", f"{kib}K")
        self.make()
        self.server = ploop(self.root, "ct", sock)

    def make(self):
        run(PLOOP, "--root", self.root, "create", "ct", "--template", "t")

    def space(self):
        """MiB that the container takes on the host."""
        top = self.root / "containers" / "ct"
        return sum(f.stat().st_blocks for f in top.rglob("*") if f.is_file()) * 512 / MIB


def section(work, quick):
    size = GIB if quick else 4 * GIB
    rounds, seconds = (2, 0.6) if quick else (5, 2)
    base = work / "base.raw"
    # Its content is the same for all; so is the order of the writes.
    Cow(work, size)
    disks = {kib: Over(work, base, kib, work / "s") for kib in SIZES}
    results = {kib: {} for kib in SIZES}

    def note(kib, what, got):
        results[kib].setdefault(what, []).append(got)

    for _ in range(rounds):
        for kib, disk in disks.items():
            server = disk.server
            assert server.name == PLOOP_NAME
            new(disk, server, disk.make)
            note(kib, "burst", burst(disk, server, size // (64 * KIB), seconds))
            new(disk, server, disk.make)
            note(kib, "sustained", sustained(disk, server, size // (64 * KIB), seconds))
            for row in (FSYNC, WRITE):
                new(disk, server, disk.make)
                with server.up() as child:
                    note(kib, row.title, measure(server, child, row, seconds, work))
            with server.up() as child:
                note(kib, READ.title, measure(server, child, READ, seconds, work))
            new(disk, server, disk.make)
            sustained(disk, server, SCATTERED, 30)
            note(kib, "space", {"value": disk.space()})
    titles = {
        "burst": f"{Cow.title}, burst, fio", "sustained": "sustained, light client",
        FSYNC.title: FSYNC.title, WRITE.title: f"{WRITE.title}",
        READ.title: f"{READ.title}, light client",
        "space": f"space on the host after {SCATTERED} scattered 4k writes",
    }
    units = {WRITE.title: "mb", "space": "mib"}
    rows = [[f"{kib} KiB", *(cell(results[kib][what], units.get(what, "iops"), None)
                             for what in titles)] for kib in SIZES]
    out = table(["clusters", *titles.values()], *rows)
    return out + ["", f"Median of {rounds} (min – max)."], results
