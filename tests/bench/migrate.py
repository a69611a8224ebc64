"""A disk moves from one server to another under its client: ploop beside two storage daemons of QEMU
and the mirror between them, which is what QEMU's own migration moves disks with.

The client has one request in flight. ploop's is behind a holder; QEMU's connects to the other server
when it is told to, at once. What is compared is the longest that one request took.
"""

import contextlib
import json
import random
import socket
import statistics
import threading
import time

from tools import (KIB, MIB, PLOOP, Api, Client, answers, daemon, empty_template, pieces, run, serving, settle,
                   spread, table)

#: (what, requests a second or None: as fast as they are answered, whether they write)
LOADS = (("reads 1,000 a second", 1000, False), ("writes 1,000 a second", 1000, True),
         ("writes as fast as it can", None, True))
BLOCK = b"w" * 4 * KIB
WAYS = ("pre-copy", "post-copy", "QEMU's mirror")


class Lost(Exception):
    """The connection ended."""


class Restless(Client):
    """A client that can lose its server."""

    def take(self, n):
        out = b""
        while len(out) < n:
            with contextlib.suppress(ConnectionError):
                if piece := self.s.recv(n - len(out)):
                    out += piece
                    continue
            raise Lost
        return out

    def send(self, *request):
        try:
            super().send(*request)
        except ConnectionError:
            raise Lost from None


class Load:
    """Small requests by one client, one after the other, until it is stopped. `next` is where it
    connects when its connection has ended, once `moved` is set."""

    def __init__(self, place, export, size, rate, writes):
        self.place, self.export, self.size, self.rate, self.writes = place, export, size, rate, writes
        self.ended, self.moved, self.waits = threading.Event(), threading.Event(), []
        self.client = Restless(place, export)
        self.thread = threading.Thread(target=self.work)
        self.thread.start()

    def work(self):
        at, due = random.Random(1), time.perf_counter()
        while not self.ended.is_set():
            if self.rate:
                due += 1 / self.rate
                time.sleep(max(0, due - time.perf_counter()))
            offset = at.randrange(self.size // len(BLOCK)) * len(BLOCK)
            began = time.perf_counter()
            while True:
                try:
                    if self.writes:
                        self.client.write_all([(offset, BLOCK)])
                    else:
                        self.client.read(offset, len(BLOCK))
                    break
                except (Lost, SystemExit):
                    self.moved.wait()
                    self.client = Restless(self.place, self.export)
            self.waits.append(time.perf_counter() - began)
        self.client.close()

    def stop(self):
        """The longest wait of a request."""
        self.ended.set()
        self.thread.join()
        return max(self.waits)


# -------------------------------------------------------------------------------------- QEMU's way

class Qmp:
    """The monitor of a qemu-storage-daemon."""

    def __init__(self, path):
        self.s = socket.socket(socket.AF_UNIX)
        self.s.connect(str(path))
        self.lines = self.s.makefile("r")
        self.events = []
        json.loads(self.lines.readline())
        self.ask("qmp_capabilities")

    def ask(self, command, **arguments):
        text = json.dumps({"execute": command, "arguments": arguments})
        self.s.sendall(text.encode() + b"\n")
        while "event" in (said := json.loads(self.lines.readline())):
            self.events.append(said)
        if "error" in said:
            raise SystemExit(f"{command}: {said['error']}")
        return said["return"]

    def wait(self, name):
        while True:
            for event in self.events:
                if event["event"] == name:
                    self.events.clear()
                    return
            self.events.append(json.loads(self.lines.readline()))


@contextlib.contextmanager
def storage_daemon(image, place):
    monitor = place.with_suffix(".qmp")
    command = ["qemu-storage-daemon", "--chardev", f"socket,id=m,path={monitor},server=on,wait=off",
               "--monitor", "chardev=m",
               "--blockdev", f"driver=file,node-name=file,filename={image}",
               "--blockdev", "driver=qcow2,node-name=disk,file=file",
               "--nbd-server", f"addr.type=unix,addr.path={place}",
               "--export", "type=nbd,id=export,node-name=disk,writable=on"]
    with serving(command, place):
        while not answers(monitor):
            time.sleep(0.001)
        yield Qmp(monitor)


def by_mirror(work, size, image, load):
    """One move: its seconds, the bytes that were sent, and what its client saw. Nothing that was
    mirrored is synced."""
    here, there, other = work / "here", work / "there", work / "other.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", other, str(2 * size))
    with storage_daemon(image, here) as source, storage_daemon(other, there):
        client = Load(here, "disk", size, *load)
        time.sleep(0.3)
        began, before = time.perf_counter(), len(client.waits)
        source.ask("blockdev-add", driver="nbd", **{"node-name": "target"}, export="disk",
                   server={"type": "unix", "path": str(there)})
        # As it converges whatever is written.
        source.ask("blockdev-mirror", **{"job-id": "move", "device": "disk", "target": "target",
                                         "sync": "full", "copy-mode": "write-blocking"})
        source.wait("BLOCK_JOB_READY")
        client.place = there
        source.ask("block-export-del", id="export", mode="hard")
        source.wait("BLOCK_EXPORT_DELETED")
        sent = source.ask("query-block-jobs")[0]["offset"]
        source.ask("block-job-cancel", device="move")
        source.wait("BLOCK_JOB_COMPLETED")
        client.moved.set()
        took = time.perf_counter() - began
        rate = (len(client.waits) - before) / took
        time.sleep(0.3)
        waited = client.stop()
    other.unlink()
    return {"seconds": took, "sent": sent, "waited": waited, "rate": rate}


# ------------------------------------------------------------------------------------- ploop's way

@contextlib.contextmanager
def service(root):
    with daemon(root):
        while not (answers(root / "migrate.sock") and answers(root / "control.sock")):
            time.sleep(0.001)
        yield


def by_ploop(work, size, stores, load, *how):
    """One move between two services, under a holder; `stores` has them in turn."""
    here, there = stores
    held, control = work / "held", work / "hold.control"
    hold = [PLOOP, "hold", "--socket", held, "--to", f"unix:{here / 'nbd.sock'}",
            "--control", control]
    with service(here), service(there), serving(hold, held, log=work / "hold.log"):
        client = Load(held, "disk", size, *load)
        time.sleep(0.3)
        began, before = time.perf_counter(), len(client.waits)
        said = run(PLOOP, "--root", here, "migrate", "disk", f"unix:{there / 'migrate.sock'}",
                   "--holder", control, "--holder-to", f"unix:{there / 'nbd.sock'}", "--json", *how)
        # Post-copy, data follows the command's end.
        api = Api(there / "control.sock")
        while any("move" in entry for entry in api.ask("GET", "/v1/containers")):
            time.sleep(0.005)
        took = time.perf_counter() - began
        rate = (len(client.waits) - before) / took
        time.sleep(0.3)
        waited = client.stop()
    stores.reverse()
    gap = json.loads(said)["migration"]["moved"]["gap"]
    return {"seconds": took, "waited": waited, "rate": rate, "gap": gap}


def prepared(work, size):
    """The same disk, `size` of data in twice as much, in a store and as a qcow2."""
    stores = [work / "a", work / "b"]
    empty_template(stores[0], "t", 2 * size)
    run(PLOOP, "--root", stores[0], "create", "disk", "--template", "t")
    empty_template(stores[1], "other", MIB)
    image = work / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, str(2 * size))
    with service(stores[0]):
        write(Client(stores[0] / "nbd.sock", "disk"), size)
    with storage_daemon(image, work / "fill"):
        write(Client(work / "fill", "disk"), size)
    return stores, image


def write(client, size):
    client.write_all(pieces(size))
    client.flush()
    client.close()


def section(work, quick):
    size, rounds = (64 * MIB, 3) if quick else (512 * MIB, 7)
    stores, image = prepared(work, size)
    got = {what: {way: [] for way in WAYS} for what, *_ in LOADS}
    for _ in range(rounds):
        for what, *load in LOADS:
            for way, figures in got[what].items():
                settle()
                if way == "QEMU's mirror":
                    figures.append(by_mirror(work, size, image, load))
                else:
                    more = ("--post-copy",) if way == "post-copy" else ()
                    figures.append(by_ploop(work, size, stores, load, *more))
    return report(got, size, rounds), got


def report(got, size, rounds):
    lines = []
    for what, ways in got.items():
        mine = statistics.median(f["waited"] for f in ways["pre-copy"])
        for way, figures in ways.items():
            waits = [f["waited"] * 1e3 for f in figures]
            ratio = "" if way == "pre-copy" else f" ×{statistics.median(waits) / mine / 1e3:.2f}"
            gaps = [f["gap"] * 1e3 for f in figures if "gap" in f]
            lines.append([what, way, spread(waits, 1, " ms") + ratio,
                          spread(gaps, 1, " ms") if gaps else "not said",
                          spread([f["seconds"] for f in figures], 2, " s"),
                          spread([f["rate"] for f in figures], 0)])
    head = [f"A disk of {size // MIB} MiB moves, unix sockets; its client: {len(BLOCK) // KIB} KiB",
            "by", "longest wait of a request", "the hand-over, as it says", "until all is there", "requests a second meanwhile"]
    return table(head, *lines) + [
        "", f"Median of {rounds} (min – max); after ×, beside pre-copy. ploop's client is behind a holder; "
        "QEMU's is told where to connect, and does so at once."]
