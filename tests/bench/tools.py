"""What the sections share: programs, servers, an NBD client, the control API, /proc, figures."""

import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
PLOOP = TOP / "target/release/ploop"
PLOOPD = TOP / "target/release/ploopd"
PACKAGES = {
    "fio": "fio", "qemu-nbd": "qemu-utils", "qemu-img": "qemu-utils", "qemu-io": "qemu-utils",
    "nbdkit": "nbdkit", "nbdinfo": "libnbd-bin", "mke2fs": "e2fsprogs",
}
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
CLUSTER = 64 * KIB


# ------------------------------------------------------------------------------------- programs

def need(tool):
    path = shutil.which(tool, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    if not path:
        sys.exit(f"{tool} is required: apt-get install {PACKAGES[tool]}")
    return path


def build():
    crates = ["-p", "ploop-cli", "-p", "ploop-nbd-server"]
    subprocess.run(["cargo", "build", "--release", "-q", *crates], cwd=TOP, check=True)


def run(*command, **kw):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **kw)
    if done.returncode:
        sys.exit(f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def timed(*command, **kw):
    """Seconds that a command takes, its start included."""
    began = time.perf_counter()
    run(*command, **kw)
    return time.perf_counter() - began


@contextlib.contextmanager
def serving(command, sock, log=None):
    """A server that listens on `sock` while the block runs; what it logs goes to the file `log`."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(sock)
    with open(log, "w") if log else contextlib.nullcontext() as err:
        child = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL, stderr=err)
    try:
        for _ in range(20000):
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as s:
                s.connect(str(sock))
                break
            if child.poll() is not None:
                sys.exit(f"{command}: ended with {child.returncode}")
            time.sleep(0.0005)
        else:
            sys.exit(f"{command}: does not listen")
        yield child
    finally:
        child.send_signal(signal.SIGTERM)
        if child.wait() not in (0, -signal.SIGTERM):
            sys.exit(f"{command}: exit {child.returncode}")


@contextlib.contextmanager
def daemon(root):
    """A `ploopd` for the store `root`: (process, NBD socket, control API)."""
    sock = root / "nbd.sock"
    with serving([PLOOPD, "--root", root], sock, log=root.with_suffix(".log")) as child:
        yield child, sock, Api(root / "control.sock")


class Api:
    """The control API, by one connection that is kept while it is used."""

    def __init__(self, path):
        self.path = path
        self.connect()

    def connect(self):
        self.http = http.client.HTTPConnection("ploopd")
        self.http.sock = socket.socket(socket.AF_UNIX)
        self.http.sock.connect(str(self.path))
        self.used = time.monotonic()

    def ask(self, method, path, body=None):
        if time.monotonic() - self.used > 2:  # the server lets go of one that is idle
            self.connect()
        body = None if body is None else json.dumps(body)
        headers = {"content-type": "application/json"} if body else {}
        self.http.request(method, path, body, headers)
        answer = self.http.getresponse()
        text = answer.read()
        self.used = time.monotonic()
        if answer.status >= 300:
            sys.exit(f"{method} {path}: {answer.status} {text.decode()}")
        return json.loads(text)

    def snapshot(self, container, name):
        path = f"/v1/containers/{container}/snapshots"
        return self.ask("POST", path, {"name": name})

    def job(self, job, wait=None):
        query = "" if wait is None else f"?wait={wait}"
        job = self.ask("GET", f"/v1/jobs/{job}{query}")
        if job["state"] in ("failed", "cancelled", "paused"):
            sys.exit(f"job: {job}")
        return job

    def finish(self, job):
        while (now := self.job(job, wait=30))["state"] != "done":
            pass
        return now

    def writes(self, container):
        """Writes done so far by the clients that are connected to it."""
        all = self.ask("GET", "/v1/connections")
        return sum(c["writes"] for c in all if c["export"] == container)


# ---------------------------------------------------------------------------------- an NBD client

class Client:
    """The least of an NBD client: GO, then reads and writes."""

    def __init__(self, sock, name):
        self.greet(sock)
        data = struct.pack(">I", len(name)) + name.encode() + struct.pack(">H", 0)
        for kind, text in self.option(7, data):
            if kind >> 31:
                sys.exit(f"export {name}: {text.decode(errors='replace')}")

    def greet(self, sock):
        self.s = socket.socket(socket.AF_UNIX)
        self.s.connect(str(sock))
        self.take(18)
        self.s.sendall(struct.pack(">I", 3))

    def option(self, option, data):
        self.s.sendall(b"IHAVEOPT" + struct.pack(">II", option, len(data)) + data)
        answers = []
        while not answers or (answers[-1][0] != 1 and not answers[-1][0] >> 31):
            _, _, kind, length = struct.unpack(">QIII", self.take(20))
            answers.append((kind, self.take(length)))
        return answers

    def take(self, n):
        out = b""
        while len(out) < n:
            piece = self.s.recv(n - len(out))
            if not piece:
                sys.exit("the server closed the connection")
            out += piece
        return out

    def send(self, kind, cookie, offset, length, data=b""):
        self.s.sendall(struct.pack(">IHHQQI", 0x25609513, 0, kind, cookie, offset, length) + data)

    def answered(self):
        _, error, _ = struct.unpack(">IIQ", self.take(16))
        if error:
            sys.exit(f"NBD: error {error}")

    def read(self, offset, length):
        self.send(0, 1, offset, length)
        self.answered()
        return self.take(length)

    def flush(self):
        self.send(3, 1, 0, 0)
        self.answered()

    def write_all(self, pieces):
        """Writes (offset, data) pieces, a few in flight."""
        waiting = 0
        for offset, data in pieces:
            self.send(1, 1, offset, len(data), data)
            waiting += 1
            if waiting == 8:
                self.answered()
                waiting -= 1
        for _ in range(waiting):
            self.answered()

    def close(self):
        self.send(2, 2, 0, 0)
        self.s.close()


def list_exports(sock):
    """How many exports LIST names, and the seconds it takes from connecting on."""
    client = Client.__new__(Client)
    began = time.perf_counter()
    client.greet(sock)
    answers = client.option(3, b"")
    took = time.perf_counter() - began
    if answers.pop()[0] != 1:
        sys.exit("LIST was refused")
    client.s.close()
    return len(answers), took


NOISE = os.urandom(MIB)


def fill(clusters, seed=0):
    """(offset, data) to write these 64 KiB clusters with; neighbours go together."""
    at = random.Random(seed)
    clusters = sorted(clusters)
    while clusters:
        n = 1
        while n < min(16, len(clusters)) and clusters[n] == clusters[0] + n:
            n += 1
        start = at.randrange(256) * 4096
        data = (NOISE[start:] + NOISE[:start])[:n * CLUSTER]
        yield clusters[0] * CLUSTER, data
        del clusters[:n]


# ------------------------------------------------------------------------------------- processes

def memory_kib(pid):
    """(RSS, PSS) of a process."""
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        key, value = line.split(":")
        fields[key] = int(value.split()[0])
    return fields["Rss"], fields["Pss"]


def cpu_seconds(pid):
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wakeups(pid):
    """Times that its threads went to sleep."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that ended
            for line in (task / "status").read_text().splitlines():
                if line.startswith("voluntary_ctxt_switches"):
                    total += int(line.split()[1])
    return total


def at_rest(pid, seconds):
    """What a process costs while nobody asks anything of it."""
    cpu, wakes = cpu_seconds(pid), wakeups(pid)
    time.sleep(seconds)
    cpu, wakes = cpu_seconds(pid) - cpu, wakeups(pid) - wakes
    rss, pss = memory_kib(pid)
    proc = Path(f"/proc/{pid}")
    return {
        "rss_kib": rss, "pss_kib": pss, "cpu_seconds": cpu, "wakeups": wakes, "seconds": seconds,
        "threads": len(list((proc / "task").iterdir())),
        "descriptors": len(list((proc / "fd").iterdir())),
    }


def du(*paths):
    """Bytes on disk (allocated blocks) of everything below."""
    return sum(int(line.split()[0]) for line in run("du", "-s", "-B1", *paths).splitlines())


def settle():
    """Lets the disk do what earlier measurements left to it."""
    os.sync()


# --------------------------------------------------------------------------------------- figures

def fio(uri, rw, bs, depth, seconds, *more):
    out = run("fio", "--name=x", "--ioengine=nbd", f"--uri={uri}", f"--rw={rw}", f"--bs={bs}",
              f"--iodepth={depth}", "--time_based", f"--runtime={seconds}", "--ramp_time=0.3",
              "--randrepeat=0", "--output-format=json", *more)
    side = json.loads(out[out.index("{"):])["jobs"][0]["read" if "read" in rw else "write"]
    if not side["total_ios"]:
        sys.exit(f"fio: no I/O done on {uri}")
    return side


def spread(values, digits=1, unit=""):
    """Median and range, for people."""
    f = f"{{:.{digits}f}}"
    median, low, high = (f.format(v) for v in (statistics.median(values), min(values), max(values)))
    return f"{median}{unit} ({low} – {high})"


def table(head, *rows):
    rule = "|---" * len(head) + "|"
    return ["| " + " | ".join(str(c) for c in row) + " |" for row in (head,)] + [rule] + [
        "| " + " | ".join(str(c) for c in row) + " |" for row in rows]


def empty_template(root, name, size):
    """A template of `size` without any data."""
    raw = root.with_suffix(f".{name}.raw")
    with open(raw, "wb") as f:
        f.truncate(size)
    run(PLOOP, "--root", root, "template", "import", name, raw, "--from", "raw")
    raw.unlink()
