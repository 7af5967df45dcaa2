"""What is done with every kind of storage: one round of a disk's life, each step judged for itself."""

from __future__ import annotations

import contextlib
import os
import random
from pathlib import Path
from typing import Iterator

import nbd

from disk import Disk, compare
from dom0 import Dom0, Refused
from storage import GROWN, KINDS, MIB, SIZE, Storage
from system import Failed, Media, becomes, last_words


class Report:
    """What a cell found: failures by step, and facts for the table."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.facts: dict[str, object] = {}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """A step that fails does not keep the next from being tried."""
        print(f"step: {name}", flush=True)
        try:
            yield
        except (Failed, nbd.Error, OSError) as error:
            self.failures.append(f"{name}: {error}")


def host_bytes(storage: Storage) -> bytes:
    """The content as the host reads it, not from a page cache that the backend went past."""
    Path("/proc/sys/vm/drop_caches").write_text("3")
    return storage.path().read_bytes()


def prepare(storage: Storage) -> bytes:
    """Some of the content is there before the guest is: written by the host."""
    with storage.path().open("r+b") as file:
        file.write(random.Random(7).randbytes(MIB))
        os.fsync(file.fileno())
    return host_bytes(storage)


def storage_of(kind: str, media: Media) -> None:
    """Only what the cell itself does to storage, without our programs: for who works on the cells."""
    storage = KINDS[kind](media)
    content = prepare(storage)
    if len(content) != SIZE:
        raise Failed(f"{storage.path()} has {len(content)} bytes instead of {SIZE}")
    storage.flushes()
    storage.freed()
    if storage.grow:
        storage.grow()
        becomes("it is larger", lambda: len(host_bytes(storage)) == GROWN)


def round_of(kind: str, media: Media, folder: Path, report: Report) -> None:
    """Attach, write, flush, discard, keep others out, grow, detach, compare."""
    storage = KINDS[kind](media)
    print("step: attach", flush=True)
    content = prepare(storage)
    dom0 = Dom0(folder)
    guest = dom0.guest("guest")
    dom0.attach(guest, storage.target)
    disk = Disk(guest.uri, content)

    with report.step("first read"):
        disk.verify()
    with report.step("writes"):
        for _ in range(2):
            disk.scattered_writes()
        disk.verify()
    with report.step("flush"):
        flush(disk, storage, report)
    with report.step("discard"):
        discard(disk, storage, report)
    with report.step("a second writer"):
        second(dom0, storage, report)
    if storage.grow:
        with report.step("growth"):
            grow(dom0, guest, disk, storage)
    with report.step("detach"):
        disk.flush()
        dom0.detach(guest)
    with report.step("contents"):
        compare(host_bytes(storage)[:disk.size], disk.model, 0, "read by the host")
    with report.step("attached again, read-only"):
        reader = dom0.guest("reader")
        dom0.attach(reader, storage.target, "r")
        again = Disk(reader.uri, bytes(disk.model))
        again.verify()
        dom0.detach(reader)
    with report.step("end of blkback"):
        dom0.stop()


def flush(disk: Disk, storage: Storage, report: Report) -> None:
    """Each flush after a write reaches the medium before it is answered."""
    seen = []
    for _ in range(3):
        began = storage.flushes()
        disk.write(disk.random.randrange(64) * 8 * disk.unit, 4 * disk.unit)
        before = began if storage.stable_writes else storage.flushes()
        disk.flush()
        seen.append(storage.flushes() - before)
    report.facts["flushes at the medium"] = seen if storage.media else "no medium"
    if storage.media and min(seen) < 1:
        raise Failed(f"three flushes of the guest were {seen} at the medium")


def discard(disk: Disk, storage: Storage, report: Report) -> None:
    offered = disk.can_trim()
    report.facts["discard"] = "offered" if offered else "not offered"
    if offered != storage.discard:
        raise Failed("it is offered though it cannot work" if offered else "it is not offered")
    if not offered:
        return
    start, length = 2 * MIB, 2 * MIB
    disk.finish([disk.write_at(start - MIB, disk.random.randbytes(length + 2 * MIB))], "a large write")
    disk.flush()
    storage.settle()
    before = storage.freed()
    disk.trim(start, length)
    disk.flush()
    found = disk.read(start, length)
    if storage.zeros:
        compare(found, bytes(length), start, "what was discarded")
    disk.model[start:start + length] = found
    disk.verify()       # its neighbours are what they were
    becomes("the storage gets the room back", lambda: storage.freed() > before)
    disk.write(start + disk.unit, 2 * disk.unit)


def second(dom0: Dom0, storage: Storage, report: Report) -> None:
    if not storage.locked:
        return
    other = dom0.guest("other")
    report.facts["second writer"] = dom0.refuses(other, storage.target, "w")
    dom0.refuses(other, storage.target, "r")
    if storage.path().is_block_device():
        try:
            os.close(os.open(storage.path(), os.O_RDWR | os.O_EXCL))
        except OSError:
            return
        raise Failed("a program of the host can claim the device (O_EXCL)")


def grow(dom0: Dom0, guest, disk: Disk, storage: Storage) -> None:
    assert storage.grow
    storage.grow()

    def larger() -> bool:
        disk.reconnect()
        return disk.size == GROWN
    done = dom0.tool("resize", guest.name, "xvda")
    if done.returncode:
        raise Failed(last_words(done.stdout))
    try:
        becomes(f"the guest sees {GROWN >> 20} MiB", larger)
    except Failed as error:
        raise Failed(f"{error}; it sees {disk.size >> 20}; {last_words(dom0.list(guest))}") from None
    # What is there is not ours to say: zeros, or under dm-crypt what zeros decrypt to. The host compares it in the end.
    for at in range(SIZE, GROWN, MIB):
        disk.model[at:at + MIB] = disk.read(at, MIB)
    disk.write(disk.size - 4 * disk.unit, 4 * disk.unit)
    disk.verify()


__all__ = ["Refused", "Report", "round_of", "storage_of"]
