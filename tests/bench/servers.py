"""The servers that are measured, each as its users start it, and the images that they serve.

A place is the path of a unix socket, or a port of 127.0.0.1. What is not a default is what the work
cannot do without: several clients at once (qemu-nbd's `-e`), a cache that is not written through to
the disk on every write (its own default), flushes (nbd-server's `flush` and `fua`).
"""

import contextlib
import functools
import json
import os
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tools import (MIB, PLOOP, Api, Client, answers, device_flushes, empty_template, pieces, run,
                   serving, settle)

PLOOP_NAME = "ploop"
NULL = "nbdkit null"
#: One of each program, for a quick run and for what only repeats another section.
FEW = (PLOOP_NAME, "qemu-nbd raw", "qemu-nbd qcow2", "qsd qcow2", "nbdkit file", "nbd-server")
#: Peers that `--without` leaves out.
left_out = set()


@dataclass
class Server:
    """What to start, where it listens then, and what to know of it."""

    name: str
    command: list
    place: Path | int
    engine: str
    cluster: int | None = None
    export: str = ""
    control: Path | None = None
    pid_file: Path | None = None
    env: dict | None = None
    api: Api | None = field(default=None, repr=False)

    @property
    def uri(self):
        if isinstance(self.place, int):
            return f"nbd://127.0.0.1:{self.place}/{self.export}"
        return f"nbd+unix:///{self.export}?socket={self.place}"

    @property
    def address(self):
        return f"127.0.0.1:{self.place}" if isinstance(self.place, int) else str(self.place)

    @contextlib.contextmanager
    def up(self):
        if self.control:
            self.control.unlink(missing_ok=True)
        with serving(self.command, self.place, pid_file=self.pid_file, env=self.env) as child:
            # Clients are let in before the control API is there.
            while self.control and not answers(self.control):
                time.sleep(0.001)
            self.api = Api(self.control) if self.control else None
            yield child

    def client(self):
        return Client(self.place, self.export)

    def counters(self, work):
        """What it says of its syncs, and the flushes of the disk below."""
        own, engines = self.api.metrics() if self.api else ({}, [])
        if engines:
            self.engine = " + ".join(engines)
        return own | {"device_flushes": device_flushes(work)}


def there(servers):
    """The servers by name, without those that are left out."""
    names = {s.name: s for s in servers}
    return {name: s for name, s in names.items() if name not in left_out}


def port():
    """A port that is free."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def at(place, unix, tcp):
    """The words that tell a server its place."""
    return [*tcp, str(place)] if isinstance(place, int) else [unix, place]


# ---------------------------------------------------------------------------------- each of them

def ploop(root, container, place):
    """A container of a store. Its control socket is in a short path."""
    info = json.loads(run(PLOOP, "--root", root, "info", container, "--json"))
    control = root.with_suffix(".control")
    where = ["--listen", f"127.0.0.1:{place}"] if isinstance(place, int) else ["--socket", place]
    command = [PLOOP, "serve", "--root", root, container, "--name", "", "--control", control]
    return Server(PLOOP_NAME, command + where, place, "default", info["cluster_size"],
                  control=control)


def qemu_nbd(image, kind, place, aio="threads"):
    command = ["qemu-nbd", "-t", "-e", "16", "-x", "", "-f", kind, image]
    command += at(place, "-k", ["-b", "127.0.0.1", "-p"])
    name = f"qemu-nbd {kind}"
    if aio != "threads":
        command, name = command + [f"--aio={aio}"], f"{name} {aio}"
    return Server(name, command, place, aio, cluster_of(image, kind))


def qsd(image, kind, place):
    """qemu-storage-daemon, with a thread of its own for the export."""
    tcp = f"addr.type=inet,addr.host=127.0.0.1,addr.port={place}"
    where = tcp if isinstance(place, int) else f"addr.type=unix,addr.path={place}"
    command = ["qemu-storage-daemon", "--object", "iothread,id=thread",
               "--blockdev", f"driver=file,node-name=file,filename={image}",
               "--blockdev", f"driver={kind},node-name=disk,file=file",
               "--nbd-server", where,
               "--export", "type=nbd,id=export,node-name=disk,writable=on,iothread=thread"]
    return Server(f"qsd {kind}", command, place, "threads, iothread", cluster_of(image, kind),
                  export="disk")


def nbdkit(raw, place, *filters, name="file"):
    command = ["nbdkit", "-f", *at(place, "-U", ["-i", "127.0.0.1", "-p"])]
    command += [f"--filter={f}" for f in filters] + ["file", raw]
    # The filter's overlay goes where everybody's images are.
    return Server(f"nbdkit {name}", command, place, "threads", 64 << 10 if filters else None,
                  env=os.environ | {"TMPDIR": str(Path(raw).parent)})


def nbdkit_null(size, place):
    command = ["nbdkit", "-f", *at(place, "-U", ["-i", "127.0.0.1", "-p"]), "null", str(size)]
    return Server(NULL, command, place, "threads")


def nbd_server(raw, place, cow=False):
    tcp = isinstance(place, int)
    here = Path(raw).parent
    config, pid_file = here / "nbd-server.conf", here / "nbd-server.pid"
    where = f"listenaddr = 127.0.0.1\nport = {place}" if tcp else f"unixsock = {place}"
    what = f"copyonwrite = true\ncowdir = {here}" if cow else ""
    config.write_text(f"[generic]\n{where}\nallowlist = true\n[disk]\nexportname = {raw}\n"
                      f"flush = true\nfua = true\n{what}\n")
    pid_file.unlink(missing_ok=True)
    return Server("nbd-server copyonwrite" if cow else "nbd-server",
                  ["nbd-server", "-C", config, "-p", pid_file], place, "a process per client",
                  4096 if cow else None, export="disk", pid_file=pid_file)


def cluster_of(image, kind):
    if kind == "raw":
        return None
    return json.loads(run("qemu-img", "info", "-f", kind, "--output=json", image)).get(
        "cluster-size")


# ------------------------------------------------------------------------ images that are full

@functools.cache
def full_images(top, size):
    """Images of `size` bytes, all of it data: a raw one, a qcow2, a parallels, and a container's.
    Each was written by a server for it, from the same client, 64 KiB at a time: what a small
    overwrite costs depends on the pieces that the page cache was filled in."""
    work = top / "full"
    work.mkdir()
    images = {kind: work / f"disk.{kind}" for kind in ("raw", "qcow2", "parallels")}
    for kind, image in images.items():
        run("qemu-img", "create", "-q", "-f", kind, image, str(size))
    root = work / "store"
    empty_template(root, "t", size)
    run(PLOOP, "--root", root, "create", "disk", "--template", "t")
    sock = work / "s"
    writers = [nbdkit(images["raw"], sock), ploop(root, "disk", sock),
               qemu_nbd(images["qcow2"], "qcow2", sock),
               qemu_nbd(images["parallels"], "parallels", sock)]
    for server in writers:
        with server.up():
            client = server.client()
            client.write_all(pieces(size))
            client.flush()
            client.close()
    settle()
    return images, root


def in_place(top, size, place, few=False):
    """Every server on data that is there; or a few, with one of each program."""
    images, root = full_images(top, size)
    raw = images["raw"]
    all = there([
        ploop(root, "disk", place),
        *(qemu_nbd(image, kind, place, aio) for kind, image in images.items()
          for aio in ("threads", "io_uring")),
        qsd(images["qcow2"], "qcow2", place),
        nbdkit(raw, place),
        nbdkit_null(size, place),
        nbd_server(raw, place),
    ])
    return {name: s for name, s in all.items() if not few or name in FEW}


def leave_out(names):
    """`--without`: these peers do not run, and nothing is compared with them."""
    names = {name for name in names if name}
    if PLOOP_NAME in names:
        sys.exit("--without: everything is compared with ploop")
    left_out.update(names)


def size_of_full(quick):
    return 512 * MIB if quick else 1024 * MIB
