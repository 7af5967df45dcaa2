"""The protocol between the host and the agent in dom0: one JSON object a line, over a virtio-serial port.

A port of its own, so that kernel messages on the console cannot get between the lines. Used on both ends (the
file travels in the payload), so it imports nothing of the lab.

    host → dom0   {"id": 7, "op": "run", "argv": [...], "timeout": 60}
                  {"id": 8, "op": "get", "path": "/var/log/…"}
                  {"id": 12, "op": "put", "path": "/run/…", "data": "<base64>", "append": false, "mode": 493}
                  {"id": 9, "op": "guest", "name": "g1", "script": "…", "timeout": 60}
                  {"id": 13, "op": "console", "name": "g1"}    open a guest's console before it says anything
                  {"id": 10, "op": "release"}          let go of guests' consoles, so that a person can use them
                  {"id": 11, "op": "hello"}
    dom0 → host   {"hello": "…"}                       once at the start, and as answer to "hello"
                  {"id": 7, "out": "<base64>"}         any number, as the output comes
                  {"id": 7, "exit": 0}                 exactly one; 124 after a timeout, 125 with "error" text
"""

from __future__ import annotations

import base64
import json
from typing import Any

#: Pieces of output per line. Small enough that one reply cannot hold up another for long.
CHUNK = 24 * 1024

Message = dict[str, Any]


def encode(message: Message) -> bytes:
    """One line, newline included."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def pack(data: bytes) -> str:
    return base64.b64encode(data).decode()


def unpack(text: str) -> bytes:
    return base64.b64decode(text)


class Lines:
    """Bytes in, whole messages out. A line that is no JSON object is handed to `junk` and otherwise ignored:
    the port may hold the rest of a line that was cut when the host's end was opened."""

    def __init__(self) -> None:
        self._rest = b""
        self.junk: list[bytes] = []

    def feed(self, data: bytes) -> list[Message]:
        self._rest += data
        *lines, self._rest = self._rest.split(b"\n")
        found = []
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                message = None
            if isinstance(message, dict):
                found.append(message)
            elif line:
                self.junk.append(line)
        return found
