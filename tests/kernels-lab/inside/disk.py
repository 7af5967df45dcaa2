"""A guest's disk as an NBD client sees it, beside a model of what it has to hold."""

from __future__ import annotations

import random
import time

import nbd

from system import Failed, PATIENCE


class Disk:
    """Writes through the guest go into the model too; `verify` compares all of it."""

    def __init__(self, uri: str, content: bytes, seed: int = 1) -> None:
        self.uri, self.model, self.random = uri, bytearray(content), random.Random(seed)
        self.nbd = connect(uri)
        self.unit = max(self.nbd.get_block_size(nbd.SIZE_MINIMUM), 512)

    @property
    def size(self) -> int:
        return len(self.model)

    def finish(self, cookies: list[int], what: str, patience: float = PATIENCE) -> None:
        """Waits for commands in flight; a command's error is raised as nbd.Error."""
        until = time.monotonic() + patience
        for cookie in cookies:
            while not self.nbd.aio_command_completed(cookie):
                if time.monotonic() > until:
                    raise Failed(f"no answer: {what}")
                self.nbd.poll(1000)

    def write_at(self, offset: int, data: bytes) -> int:
        """Starts a write; the model has it at once."""
        self.model[offset:offset + len(data)] = data
        return self.nbd.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), offset)

    def write(self, offset: int, length: int, patience: float = PATIENCE) -> None:
        self.finish([self.write_at(offset, self.random.randbytes(length))], f"a write of {length} bytes at {offset}", patience)

    def scattered_writes(self, count: int = 24, largest: int = 128 << 10) -> None:
        """Writes of all sizes, in flight together, that do not touch each other."""
        stripe = self.size // count // self.unit * self.unit
        cookies = []
        for number in range(count):
            length = self.random.randrange(1, min(largest, stripe) // self.unit + 1) * self.unit
            offset = number * stripe + self.random.randrange(0, (stripe - length) // self.unit + 1) * self.unit
            cookies.append(self.write_at(offset, self.random.randbytes(length)))
        self.finish(cookies, "writes")

    def flush(self, patience: float = PATIENCE) -> None:
        self.finish([self.nbd.aio_flush()], "a flush", patience)

    def read(self, offset: int, length: int, patience: float = PATIENCE) -> bytes:
        buffer = nbd.Buffer(length)
        self.finish([self.nbd.aio_pread(buffer, offset)], f"a read of {length} bytes at {offset}", patience)
        return bytes(buffer.to_bytearray())

    def verify(self, step: int = 1 << 20) -> None:
        """Everything is read through the guest and compared."""
        for at in range(0, self.size, 4 * step):
            buffers, cookies = [], []
            for offset in range(at, min(at + 4 * step, self.size), step):
                buffers.append((offset, nbd.Buffer(min(step, self.size - offset))))
                cookies.append(self.nbd.aio_pread(buffers[-1][1], offset))
            self.finish(cookies, "reads")
            for offset, buffer in buffers:
                compare(bytes(buffer.to_bytearray()), self.model[offset:offset + step], offset, "read through the guest")

    def can_trim(self) -> bool:
        return bool(self.nbd.can_trim())

    def trim(self, offset: int, length: int) -> None:
        self.finish([self.nbd.aio_trim(length, offset)], "a discard")

    def reconnect(self) -> None:
        """A new connection, which learns the disk's size as it is now."""
        self.nbd = connect(self.uri)
        grown = self.nbd.get_size() - self.size
        self.model.extend(bytes(max(grown, 0)))


def connect(uri: str) -> nbd.NBD:
    handle = nbd.NBD()
    handle.connect_uri(uri)
    return handle


def compare(found: bytes, wanted: bytes, offset: int, what: str) -> None:
    """Failed at the first byte that differs."""
    if found == bytes(wanted):
        return
    if len(found) != len(wanted):
        raise Failed(f"{what}: {len(found)} bytes instead of {len(wanted)} at {offset}")
    at = next(index for index in range(len(found)) if found[index] != wanted[index])
    raise Failed(f"{what}: another content than was written, from byte {offset + at} on")
