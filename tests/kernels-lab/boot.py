"""One machine: QEMU with a kernel of the table, and the lines it writes while its cells run."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Iterator

import images
from images import HERE, build
from progress import say

#: Disks of 1 GiB with sectors of 512 bytes, and some with 4096. Sparse files, gone with the machine.
DISKS, DISKS_4K = 44, 4
MEMORY_MB = 2048
ARGUMENTS = "console=ttyS0 quiet printk.devkmsg=on panic=-1 random.trust_cpu=on mitigations=off"
#: Emulated, AVX and `rep movsb` copy many times slower than what a C library and a kernel do without them.
CPU = "max,-avx,-avx2,-avx512f,-erms,-fsrm,-smap,-smep,-la57"
#: What the cells run of ours.
PROGRAMS = ("blkback", "emu-xen", "dom0-bench", "netback", "bridge-scripts")


class MachineGone(Exception):
    """QEMU ended, or says nothing any more."""


class Machine:
    """`cells` starts it and gives what it says; `stop` always."""

    def __init__(self, built: images.Images, programs: Path, cells: list[str], slow: float, storage_only: bool = False) -> None:
        self.images, self.slow = built, slow
        self.folder = built.folder / "run"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.console, self.lines = self.folder / "console.log", self.folder / "lines"
        self.qemu: subprocess.Popen[bytes] | None = None
        payload = self.folder / "payload"
        shutil.copytree(HERE / "inside", payload / "inside", ignore=shutil.ignore_patterns("__pycache__"))
        (payload / "programs").mkdir()
        for name in PROGRAMS:
            # Debug information is most of a binary, and nobody inside reads it.
            subprocess.run(["strip", "-o", payload / "programs" / name, programs / name], check=True)
        (payload / "plan.json").write_text(json.dumps({"cells": cells, "slow": slow, "storage_only": storage_only}))
        build.make_ext4(payload, self.folder / "payload.img", "256M", ["-O", "^has_journal"], built.logs)

    def command(self) -> list[str]:
        argv = [
            "qemu-system-x86_64", "-name", "kernels-lab", "-accel", "tcg,thread=multi", "-m", str(MEMORY_MB), "-smp", "2", "-cpu", CPU,
            "-nodefaults", "-no-reboot", "-display", "none", "-kernel", str(self.images.vmlinuz), "-initrd", str(self.images.initrd),
            "-append", ARGUMENTS, "-serial", f"file:{self.console}", "-serial", f"file:{self.lines}", "-device", "virtio-rng-pci",
            "-drive", f"file={self.images.root},if=virtio,format=raw,snapshot=on,cache=unsafe",
            "-drive", f"file={self.images.modules},if=virtio,format=raw,readonly=on",
            "-drive", f"file={self.folder}/payload.img,if=virtio,format=raw,readonly=on",
            "-device", "virtio-scsi-pci,id=scsi",
        ]
        for number in range(DISKS + DISKS_4K):
            file = self.folder / f"disk{number}.img"
            with file.open("wb") as image:
                image.truncate(1 << 30)
            sectors = 512 if number < DISKS else 4096
            argv += ["-drive", f"file={file},if=none,id=disk{number},format=raw,cache=unsafe,discard=unmap,detect-zeroes=off",
                     "-device", f"scsi-hd,drive=disk{number},bus=scsi.0,scsi-id={number},logical_block_size={sectors},physical_block_size={sectors}"]
        return argv

    def cells(self) -> Iterator[dict]:
        """Boots, and yields what main.py says, to its end. Raises MachineGone when nothing comes for longer than a cell may take."""
        env = dict(os.environ, TMPDIR=str(self.folder))     # where snapshot=on keeps its overlay
        self.lines.touch()
        with (self.folder / "qemu.log").open("wb") as log:
            self.qemu = subprocess.Popen(self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env,
                                         start_new_session=True, preexec_fn=_die_with_parent)
        seen, last = 0, time.monotonic()
        while True:
            text = self.lines.read_bytes()[seen:]
            end = text.rfind(b"\n") + 1
            for line in text[:end].splitlines():
                event = json.loads(line)
                last = time.monotonic()
                if event.get("end"):
                    return
                yield event
            seen += end
            if self.qemu.poll() is not None:
                raise MachineGone(f"the machine is off before its cells were through; the console's end:\n{self.tail()}")
            if time.monotonic() - last > 420 * self.slow:
                raise MachineGone(f"the machine has said nothing for {420 * self.slow:.0f} s; the console's end:\n{self.tail()}")
            time.sleep(0.1)

    def tail(self, lines: int = 30) -> str:
        text = "".join(path.read_text(errors="replace") for path in (self.console, self.folder / "qemu.log") if path.exists())
        return "\n".join(text.splitlines()[-lines:])

    def stop(self) -> None:
        """It powers itself off after its cells; what does not is ended."""
        if self.qemu is not None:
            try:
                self.qemu.wait(15)
            except subprocess.TimeoutExpired:
                self.qemu.kill()
                self.qemu.wait()
        for file in self.folder.glob("*.img"):
            file.unlink()
        shutil.rmtree(self.folder / "payload", ignore_errors=True)
        say(f"kernel {self.images.kernel.name}: machine is off")


def _die_with_parent() -> None:
    # PR_SET_PDEATHSIG: an interrupted run must not leave an emulator eating the processors.
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
