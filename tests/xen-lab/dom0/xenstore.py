"""Just enough of XenStore's socket protocol (xen/include/public/io/xs_wire.h) to read, list and watch.

A `xenstore-read` process costs tens of milliseconds under emulation, too coarse to time a connection with.
"""

from __future__ import annotations

import select
import socket
import struct

HEADER = struct.Struct("<IIII")     # type, request id, transaction id, length
DIRECTORY, READ, WATCH, WATCH_EVENT, ERROR = 1, 2, 4, 15, 16


class Store:
    def __init__(self, path: str = "/run/xenstored/socket") -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(path)
        self.events: list[str] = []

    def close(self) -> None:
        self.socket.close()

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.socket.recv(count - len(data))
            if not piece:
                raise ConnectionError("xenstored closed the connection")
            data += piece
        return data

    def _message(self) -> tuple[int, bytes]:
        kind, _, _, length = HEADER.unpack(self._exactly(HEADER.size))
        return kind, self._exactly(length)

    def _ask(self, kind: int, body: bytes) -> bytes | None:
        self.socket.sendall(HEADER.pack(kind, 0, 0, len(body)) + body)
        while True:
            got, data = self._message()
            if got == WATCH_EVENT:
                self.events.append(data.split(b"\0")[0].decode())
            elif got == ERROR:
                return None
            else:
                return data

    def read(self, path: str) -> str | None:
        data = self._ask(READ, path.encode() + b"\0")
        return None if data is None else data.decode(errors="replace")

    def list(self, path: str) -> list[str]:
        data = self._ask(DIRECTORY, path.encode() + b"\0")
        return [] if not data else [name.decode() for name in data.split(b"\0") if name]

    def watch(self, path: str) -> None:
        self._ask(WATCH, path.encode() + b"\0lab\0")

    def event(self, timeout: float) -> str | None:
        """The path of the next watch event, or None after the timeout."""
        if not self.events:
            if not select.select([self.socket], [], [], timeout)[0]:
                return None
            kind, data = self._message()
            if kind == WATCH_EVENT:
                self.events.append(data.split(b"\0")[0].decode())
        return self.events.pop(0) if self.events else None
