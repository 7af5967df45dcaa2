"""The payload: a small read-only disk made for each boot, mounted at /lab in dom0.

It carries all that changes between two runs (the agent, the guests' init, our binary), so that changing any of it
costs a second and not a new dom0 image.
"""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import build
import cpio
from progress import Step

HERE = Path(__file__).resolve().parent

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


def make(images: build.Images, binary: Path | None) -> Path:
    """Build the payload disk and return it. The layout below /lab is what scenarios rely on:

    boot/vmlinux, boot/guest.cpio, boot/vmlinux-i386, boot/guest-i386.cpio, guest-root.img, bin/blkback, bin/dom0-bench (if built beside it), dom0/agent.py
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
        shutil.copy(images.vmlinux, tree / "boot/vmlinux")
        if binary:
            shutil.copy(binary, tree / "bin/blkback")
            (tree / "bin/blkback").chmod(0o755)
            # dom0 can play a guest with it.
            bench = binary.with_name("dom0-bench")
            if bench.is_file():
                shutil.copy(bench, tree / "bin/dom0-bench")

        overlay = images.cache / "guest-overlay"
        shutil.rmtree(overlay, ignore_errors=True)
        overlay.mkdir()
        guest_overlay(overlay)
        (tree / "boot/guest.cpio").write_bytes(images.guest_initrd.read_bytes() + archive(overlay))
        shutil.copy(images.vmlinux32, tree / "boot/vmlinux-i386")
        (tree / "boot/guest-i386.cpio").write_bytes(images.guest32_initrd.read_bytes() + archive(overlay))
        _guest_root(images, tree / "guest-root.img")
        size = sum(file.stat().st_blocks * 512 for file in tree.rglob("*")) // (1 << 20) + 64
        build.make_ext4(tree, image, f"{size}M", ["-O", "^has_journal"], images.logs)
    return image


def _guest_root(images: build.Images, image: Path) -> None:
    """A guest's root filesystem: the same tools, on a sparse 512 MiB image with a journal."""
    tree = images.cache / "guest-root"
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(images.guest, tree, symlinks=True)
    guest_overlay(tree)
    (tree / "lab/on-disk").touch()
    build.make_ext4(tree, image, "512M", [], images.logs)
