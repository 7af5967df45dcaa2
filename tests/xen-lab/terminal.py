"""This terminal on the machine's console: raw in both directions until Ctrl-] is typed."""

from __future__ import annotations

import os
import select
import socket
import sys
import termios
import tty
from pathlib import Path

LEAVE = b"\x1d"     # Ctrl-], as in telnet and virsh


def attach(path: Path, about: str) -> int:
    """Relay until Ctrl-], end of input, or the machine's end. Works without a terminal too (input from a pipe)."""
    console = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    console.connect(str(path))
    print(f"dom0 shell: {about}. Ctrl-] leaves.", flush=True)
    console.sendall(b"\r")
    typing = sys.stdin.fileno()
    before = termios.tcgetattr(typing) if os.isatty(typing) else None
    inputs: list[object] = [console, typing]
    try:
        if before:
            tty.setraw(typing)
        while True:
            for ready in select.select(inputs, [], [])[0]:
                if ready is console:
                    data = console.recv(65536)
                    if not data:
                        return 0
                    os.write(sys.stdout.fileno(), data)
                else:
                    data = os.read(typing, 4096)
                    if not data or LEAVE in data:
                        return 0
                    console.sendall(data)
    finally:
        if before:
            termios.tcsetattr(typing, termios.TCSADRAIN, before)
        print(flush=True)
