"""A writer for the kernel's initramfs format ("newc", Documentation/driver-api/early-userspace/buffer-format.rst).

Written out here because it is thirty lines, needs no tool, and because archives may simply be concatenated:
the guest with fio is the small guest's archive with another one behind it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO


def entry(name: str, mode: int, data: bytes, number: int) -> bytes:
    """One member: 110 bytes of ASCII header, the name, the data; both padded to four bytes."""
    raw = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(raw), 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + raw
    head += b"\0" * (-len(head) % 4)
    return head + data + b"\0" * (-len(data) % 4)


def write(tree: Path, out: BinaryIO) -> None:
    """Everything below `tree`, owned by root, in sorted order; modification times are 0, so it is reproducible."""
    number = 1
    for folder, folders, files in os.walk(tree):
        folders.sort()
        for name in sorted(folders + files):
            path = Path(folder) / name
            info = path.lstat()
            if stat.S_ISLNK(info.st_mode):
                data = os.readlink(path).encode()
            elif stat.S_ISREG(info.st_mode):
                data = path.read_bytes()
            elif stat.S_ISDIR(info.st_mode):
                data = b""
            else:
                continue
            out.write(entry(str(path.relative_to(tree)), info.st_mode, data, number))
            number += 1
    out.write(entry("TRAILER!!!", 0, b"", 0))
