"""Debian kernels: fetched, unpacked, and cut down to what a guest needs of them."""

from __future__ import annotations

import lzma
import shutil
import struct
import subprocess
from pathlib import Path

import packages

#: Bytes a compressed kernel begins with (lib/decompress.c).
_XZ, _ZSTD = b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"


class KernelImages:
    """Where the parts of one kernel are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.packages = folder / "packages"     # the unpacked package
        self.vmlinuz = folder / "vmlinuz"       # for dom0, whose modules QEMU loads, and for HVM guests
        self.vmlinux = folder / "vmlinux"       # for PV and PVH guests
        self.vmlinux_gz = folder / "vmlinux.gz"     # for pvgrub
        self.modules = folder / "guest-modules.cpio"    # what an initrd for guests has besides the tools
        self.small = folder / "small.cpio"      # an initrd of busybox and drivers


def uncompressed(data: bytes) -> bytes:
    """The ELF inside a bzImage (Documentation/x86/boot: payload_offset and payload_length, protocol 2.08).

    libxl's domain builder would unpack it itself, in dom0, with every `xl create`: many seconds under emulation.
    """
    sectors = data[0x1F1] or 4
    offset, length = struct.unpack_from("<II", data, 0x248)
    payload = data[(sectors + 1) * 512 + offset:][:length]
    # The last four bytes are the size, not part of the compressed stream.
    if payload.startswith(_XZ):
        return lzma.LZMADecompressor().decompress(payload)
    if payload.startswith(_ZSTD):
        return subprocess.run(["zstd", "-dc"], input=payload[:-4], stdout=subprocess.PIPE, check=True).stdout
    raise ValueError(f"a kernel compressed in a way the lab does not know: it begins with {payload[:6].hex()}")


def module_closure(modules_dep: str, wanted: list[str]) -> list[str]:
    """Paths of the wanted modules and all they need, in loading order. Pure: takes modules.dep's text."""
    table: dict[str, tuple[str, list[str]]] = {}
    for line in modules_dep.splitlines():
        path, _, needs = line.partition(":")
        table[Path(path).name.split(".")[0].replace("-", "_")] = (path, needs.split())
    order: list[str] = []
    for name in wanted:
        found = table.get(name.replace("-", "_"))
        if found is None:
            continue                    # built into this kernel
        for path in [*reversed(found[1]), found[0]]:
            if path not in order:
                order.append(path)
    return order


def plain(path: str) -> str:
    """A module's name without the compression's: busybox' insmod takes no compressed module."""
    return path.removesuffix(".xz")


def copy_module(source: Path, target: Path) -> None:
    """Copy a module, uncompressed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.name.endswith(".xz"):
        target.with_name(plain(target.name)).write_bytes(lzma.decompress(source.read_bytes()))
    else:
        shutil.copy(source, target)


def copy_tables(source: Path, target: Path) -> None:
    """What depmod and modprobe want besides the modules."""
    target.mkdir(parents=True, exist_ok=True)
    for index in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        # The order names compressed files where they are.
        (target / index).write_bytes((source / index).read_bytes().replace(b".ko.xz", b".ko"))


def copy_modules(tree: Path, names: list[str], into: Path, later: list[str] | None = None) -> None:
    """Copy modules with their dependencies; leaves the loading order in /etc/lab-modules for a plain insmod loop.

    Those `later` are only there, not in that list.
    """
    found = packages.find_kernel(tree)
    name, base = found.version, found.modules
    table = (base / "modules.dep").read_text()
    order = module_closure(table, names)
    target = into / "lib/modules" / name
    for path in dict.fromkeys(order + module_closure(table, later or [])):
        copy_module(base / path, target / path)
    copy_tables(base, target)
    lines = [f"/lib/modules/{name}/{plain(path)}\n" for path in order]
    (into / "etc/lab-modules").write_text("".join(lines))


def depmod(tree: Path, name: str, log: Path) -> None:
    """Write modules.dep for a tree. depmod looks below lib/modules only."""
    if not (tree / "lib").exists():
        (tree / "lib").symlink_to("usr/lib")
    packages.quiet(["depmod", "-b", str(tree), name], log)
