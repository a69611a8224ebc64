#!/usr/bin/env python3
"""A client that writes 4 KiB at random places of a region, one at a time, and notes when each was
answered. Runs as a process of its own, so that nothing but the server and the machine delay it.

    writer.py SOCKET EXPORT OFFSET LENGTH FLUSH-EVERY FILE

Until its standard input is closed. FILE gets pairs of 8-byte numbers, native: CLOCK_MONOTONIC in
nanoseconds of an answer, and how long it took since the one before; of a flush, that is negative.
FLUSH-EVERY is the number of writes before a flush, 0 for none.
"""

import array
import gc
import random
import select
import struct
import sys
import time

from tools import NOISE, Client

BLOCK = 4096


def main():
    sock, export, offset, length, every, file = sys.argv[1:]
    offset, length, every = int(offset), int(length), int(every)
    client = Client(sock, export)
    at, log, now = random.Random(11), array.array("q"), time.monotonic_ns
    gc.disable()
    ended = select.poll()
    ended.register(sys.stdin, select.POLLIN | select.POLLHUP)
    print("writing", flush=True)
    last, done = now(), 0
    while done % 16 or not ended.poll(0):
        place = offset + at.randrange(length // BLOCK) * BLOCK
        stamp = struct.pack(">QQ", done, place)
        start = place % (len(NOISE) - BLOCK)
        client.send(1, 1, place, BLOCK, stamp + NOISE[start:start + BLOCK - len(stamp)])
        client.answered()
        done += 1
        last = note(log, last, now(), 1)
        if every and done % every == 0:
            client.flush()
            last = note(log, last, now(), -1)
    client.close()
    with open(file, "wb") as f:
        log.tofile(f)


def note(log, last, t, sign):
    log.append(t)
    log.append(sign * (t - last))
    return t


main()
