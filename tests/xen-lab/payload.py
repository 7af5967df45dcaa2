"""The payload: a small read-only disk made for each boot, mounted at /lab in dom0.

It carries all that changes between two runs (the agent, the guests' init, our binaries), so that changing any of it
costs a second and not a new dom0 image.
"""

from __future__ import annotations

import gzip
import io
import shutil
from pathlib import Path

import build
import cpio
from progress import Step

HERE = Path(__file__).resolve().parent

#: Our programs as dom0 knows them, below /lab/bin. The first one is what `--binary FILE` names.
PROGRAMS = ("blkback", "netback", "bridge-scripts", "dom0-bench")

#: A guest's kernel ends the machine by calling these. As scripts, because busybox' own would ask an init that is
#: not there.
_HALT = "#!/bin/sh\nsync\nexec busybox {verb} -f\n"


def guest_overlay(tree: Path) -> None:
    """What a guest has on top of the built trees."""
    (tree / "usr/sbin").mkdir(parents=True, exist_ok=True)
    (tree / "lab").mkdir(exist_ok=True)
    shutil.copy(HERE / "guest/init", tree / "init")
    shutil.copy(HERE / "guest/init", tree / "lab/init")
    for verb in ("poweroff", "reboot"):
        (tree / "usr/sbin" / verb).write_text(_HALT.format(verb=verb))
        (tree / "usr/sbin" / verb).chmod(0o755)


def archive(tree: Path) -> bytes:
    out = io.BytesIO()
    cpio.write(tree, out)
    return out.getvalue()


def programs(path: Path | None) -> dict[str, Path]:
    """Which of our programs `--binary PATH` means: a folder holds them under their names; a file is blkback, and the
    others are taken from beside it, as far as they are there."""
    if path is None:
        return {}
    folder = path if path.is_dir() else path.parent
    found = {name: folder / name for name in PROGRAMS if (folder / name).is_file()}
    if not path.is_dir():
        found[PROGRAMS[0]] = path
    return found


def make(images: build.Images, binaries: dict[str, Path]) -> Path:
    """Build the payload disk and return it. The layout below /lab is what scenarios rely on:

    boot/vmlinux-K, the same as .gz, boot/vmlinuz-K (bzImage), boot/guest-K.cpio and boot/small-K.cpio.gz (without the
    tools) for each kernel K, and without -K for dom0's; boot/vmlinux-i386 and boot/guest-i386.cpio where there are 32-bit
    guests; boot/grub-ARCHITECTURE.bin is pvgrub; guest-root.img, bin/busybox (dom0's ping, wget and httpd), bin/NAME for
    each of our programs that is there, dom0/agent.py, dom0/net.py
    """
    image = images.cache / "payload.img"
    tree = images.cache / "payload"
    with Step("payload"):
        shutil.rmtree(tree, ignore_errors=True)
        for folder in ("boot", "bin", "dom0"):
            (tree / folder).mkdir(parents=True)
        for file in (HERE / "dom0").iterdir():
            if file.is_file():
                shutil.copy(file, tree / "dom0" / file.name)
        shutil.copy(HERE / "wire.py", tree / "wire.py")
        shutil.copy(images.guest / "bin/busybox", tree / "bin/busybox")
        for name, file in binaries.items():
            shutil.copy(file, tree / "bin" / name)
            (tree / "bin" / name).chmod(0o755)

        overlay = images.cache / "guest-overlay"
        shutil.rmtree(overlay, ignore_errors=True)
        overlay.mkdir()
        guest_overlay(overlay)
        above = archive(overlay)
        for name, kernel in images.kernels.items():
            shutil.copy(kernel.vmlinux, tree / f"boot/vmlinux-{name}")
            shutil.copy(kernel.vmlinuz, tree / f"boot/vmlinuz-{name}")
            shutil.copy(kernel.vmlinux_gz, tree / f"boot/vmlinux-{name}.gz")
            (tree / f"boot/guest-{name}.cpio").write_bytes(
                images.guest_initrd.read_bytes() + kernel.modules.read_bytes() + above)
            (tree / f"boot/small-{name}.cpio.gz").write_bytes(gzip.compress(kernel.small.read_bytes() + above, mtime=0))
        for name, ending in (("vmlinux", ""), ("vmlinux", ".gz"), ("vmlinuz", ""), ("guest", ".cpio"), ("small", ".cpio.gz")):
            (tree / f"boot/{name}{ending}").symlink_to(f"{name}-{images.world.kernel}{ending}")
        for file in (images.pvgrub / "usr/lib/grub-xen").glob("*.bin"):
            shutil.copy(file, tree / "boot" / file.name)
        if images.world.guest32:
            shutil.copy(images.vmlinux32, tree / "boot/vmlinux-i386")
            (tree / "boot/guest-i386.cpio").write_bytes(images.guest32_initrd.read_bytes() + above)
        _guest_root(images, tree / "guest-root.img")
        size = sum(file.stat().st_blocks * 512 for file in tree.rglob("*")) // (1 << 20) + 64
        build.make_ext4(tree, image, f"{size}M", ["-O", "^has_journal"], images.logs)
    return image


def _guest_root(images: build.Images, image: Path) -> None:
    """A guest's root filesystem: the same tools, on a sparse 512 MiB image with a journal."""
    tree = images.cache / "guest-root"
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(images.guest, tree, symlinks=True)
    for kernel in images.kernels.values():
        modules = kernel.folder / "guest-modules/usr/lib/modules"
        shutil.copytree(modules, tree / "usr/lib/modules", dirs_exist_ok=True)
    guest_overlay(tree)
    (tree / "lab/on-disk").touch()
    build.make_ext4(tree, image, "512M", [], images.logs)
