"""What the sections share: programs, servers, an NBD client, the control API, /proc, figures."""

import contextlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
PLOOP = TOP / "target/release/ploop"
PLOOPD = TOP / "target/release/ploopd"
LIGHT = TOP / "target/release/light"
PACKAGES = {
    "fio": "fio", "qemu-nbd": "qemu-utils", "qemu-img": "qemu-utils", "qemu-io": "qemu-utils",
    "qemu-storage-daemon": "qemu-utils", "nbdkit": "nbdkit", "nbd-server": "nbd-server",
    "nbdinfo": "libnbd-bin", "nbdcopy": "libnbd-bin", "mke2fs": "e2fsprogs",
    "/usr/bin/time": "time",
}
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
CLUSTER = 64 * KIB


# ------------------------------------------------------------------------------------- programs

def need():
    """Every tool, or the line that installs what is missing."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    missing = [tool for tool in PACKAGES if not shutil.which(tool)]
    if missing:
        packages = sorted({PACKAGES[tool] for tool in missing})
        sys.exit(f"{', '.join(missing)}: required; apt-get install {' '.join(packages)}")


def build():
    """The programs as users build them, and the light client."""
    crates = ["-p", "ploop-cli", "-p", "ploop-nbd-server", "-p", "ploop-tests"]
    subprocess.run(["cargo", "build", "--release", "-q", "--bins", *crates], cwd=TOP, check=True)


def versions():
    """The machine and the programs, in a line."""
    words = [f"{os.cpu_count()} processors", f"Linux {os.uname().release}"]
    for tool in ("qemu-nbd", "nbdkit", "nbd-server", "fio", "nbdcopy"):
        done = subprocess.run([tool, "--version"], capture_output=True, text=True)
        number = re.search(r"\d+\.\d+[\d.]*", done.stdout + done.stderr)
        words.append(f"{tool} {number[0] if number else '?'}")
    return ", ".join(words)


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


class Daemonized:
    """A server that went into the background and left its pid in a file; ended like a child."""

    def __init__(self, command, pid_file):
        run(*command)
        while not (text := pid_file.read_text().strip() if pid_file.exists() else ""):
            time.sleep(0.001)
        self.pid, self.returncode = int(text), 0

    def poll(self):
        with contextlib.suppress(FileNotFoundError):
            state = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
            return 0 if state == "Z" else None
        return 0

    def wait(self):
        while self.poll() is None:
            time.sleep(0.001)
        return 0

    def send_signal(self, number):
        os.kill(self.pid, number)

    def rest(self):
        """Waits for the process that had the first connection, which was there only to look:
        nbd-server's takes a while over a client that goes without a word."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        while children.read_text():
            time.sleep(0.005)


def answers(place):
    """True when somebody listens at a unix socket, or at a port of 127.0.0.1."""
    tcp = isinstance(place, int)
    family, address = (socket.AF_INET, ("127.0.0.1", place)) if tcp else (
        socket.AF_UNIX, str(place))
    with contextlib.suppress(OSError), socket.socket(family) as s:
        s.connect(address)
        return True
    return False


@contextlib.contextmanager
def serving(command, place, log=None, pid_file=None, env=None):
    """A server that listens at `place` while the block runs; what it logs goes to the file `log`.
    Afterwards its `stop_seconds` say how long it took to end in order."""
    if not isinstance(place, int):
        Path(place).unlink(missing_ok=True)
    command = [str(c) for c in command]
    err = open(log, "w+b") if log else tempfile.TemporaryFile()
    child = Daemonized(command, pid_file) if pid_file else subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=err, env=env)

    def give_up(why):
        err.seek(0)
        sys.exit(f"{command}: {why}\n{err.read().decode(errors='replace')}")

    try:
        for _ in range(20000):
            if answers(place):
                break
            if child.poll() is not None:
                give_up(f"ended with {child.returncode}")
            time.sleep(0.0005)
        else:
            give_up("does not listen")
        if pid_file:
            child.rest()
        yield child
    finally:
        began = time.perf_counter()
        child.send_signal(signal.SIGTERM)
        if child.wait() not in (0, -signal.SIGTERM):
            give_up(f"exit {child.returncode}")
        child.stop_seconds = time.perf_counter() - began
        err.close()


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

    def exchange(self, method, path, body=None, headers=None):
        if time.monotonic() - self.used > 2:  # the server lets go of one that is idle
            self.connect()
        self.http.request(method, path, body, headers or {})
        answer = self.http.getresponse()
        text = answer.read().decode()
        self.used = time.monotonic()
        if answer.status >= 300:
            sys.exit(f"{method} {path}: {answer.status} {text}")
        return text

    def ask(self, method, path, body=None):
        body = None if body is None else json.dumps(body)
        headers = {"content-type": "application/json"} if body else {}
        return json.loads(self.exchange(method, path, body, headers))

    def metrics(self):
        """The durability counters of `/metrics` (syncs, journal, flushes), each summed up over its
        labels, and the engines that it names. What a build does not count is not there."""
        text, counters = self.exchange("GET", "/metrics"), {}
        for line in text.splitlines():
            if found := re.match(r"ploop_(\w*(?:sync|flush|journal)\w*)_total\b.* (\d+)$", line):
                counters[found[1]] = counters.get(found[1], 0) + int(found[2])
        return counters, sorted(set(re.findall(r'\bengine="([^"]*)"', text)))

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

    def greet(self, place):
        if isinstance(place, int):
            self.s = socket.create_connection(("127.0.0.1", place))
        else:
            self.s = socket.socket(socket.AF_UNIX)
            self.s.connect(str(place))
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


def pieces(size, every=1):
    """(offset, data) to write `size` bytes with, 64 KiB at a time; or one MiB in `every`."""
    for offset in range(0, size, CLUSTER):
        if offset // MIB % every == 0:
            start = offset // CLUSTER % 15 * CLUSTER
            yield offset, NOISE[start:start + CLUSTER]


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
    """User and system time of a process, its threads that ended and its children included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    total = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            total += sum(map(cpu_seconds, children.read_text().split()))
    return total


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


def device_flushes(path):
    """Cache flushes that the disk below `path` was asked for so far, by anybody; None where the
    system does not count them."""
    dev = os.stat(path).st_dev
    stat = Path(f"/sys/dev/block/{os.major(dev)}:{os.minor(dev)}/stat")
    fields = stat.read_text().split() if stat.exists() else []
    return int(fields[15]) if len(fields) > 15 else None


def settle():
    """Lets the disk do what earlier measurements left to it."""
    os.sync()


# --------------------------------------------------------------------------------------- figures

def fio_time(seconds):
    """fio reads a fraction of a second as none."""
    return f"{round(seconds * 1000)}ms"


def fio(uri, rw, bs, depth, seconds, *more, jobs=1, ramp=0.3):
    """One run of fio over NBD: its I/O per second, bytes per second, I/Os and flushes."""
    out = run("fio", "--name=x", "--ioengine=nbd", f"--uri={uri}", f"--rw={rw}", f"--bs={bs}",
              f"--iodepth={depth}", f"--numjobs={jobs}", "--group_reporting", "--randrepeat=0",
              f"--runtime={fio_time(seconds)}", f"--ramp_time={fio_time(ramp)}",
              "--output-format=json", *more)
    job = json.loads(out[out.index("{"):])["jobs"][0]
    sides = [job[side] for side in ("read", "write") if job[side]["total_ios"]]
    if not sides:
        sys.exit(f"fio: no I/O done on {uri}")
    return {"iops": sum(s["iops"] for s in sides), "bytes": sum(s["bw_bytes"] for s in sides),
            "ops": sum(s["total_ios"] for s in sides), "flushes": job["sync"]["total_ios"]}


def light(address, export, op, **options):
    """One run of the light client; see its source for the options."""
    options = [word for key, value in options.items()
               for word in ([f"--{key}"] if value is True else [f"--{key}", value])]
    return json.loads(run(LIGHT, address, export, op, *options))


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
