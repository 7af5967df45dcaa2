"""Commands, block devices and programs in the machine. Everything here waits for a state, and gives up after PATIENCE."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path
from typing import Callable

#: Seconds until something that was waited for counts as "did not happen". The machine is emulated and may be slow.
PATIENCE = 30.0 * float(os.environ.get("LAB_SLOW", "1"))


class Failed(Exception):
    """What a cell's step wanted did not come true; the text is a sentence for the table."""


def run(argv: list[str], timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    """A command to its end, whatever its exit code; both outputs in stdout."""
    try:
        return subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              errors="replace", timeout=timeout or PATIENCE)
    except subprocess.TimeoutExpired:
        raise Failed(f"`{' '.join(argv)}` has not ended after {timeout or PATIENCE:.0f} s") from None


def sh(script: str, timeout: float | None = None) -> str:
    """A shell script that has to succeed; what it printed."""
    done = run(["bash", "-ec", script], timeout)
    if done.returncode:
        raise Failed(f"`{' '.join(script.split())[:160]}` ended with {done.returncode}: {last_words(done.stdout)}")
    return done.stdout


def last_words(text: str, limit: int = 400) -> str:
    """The end of what a program said, on one line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return " / ".join(line.strip() for line in text.splitlines() if line.strip())[-limit:] or "(nothing said)"


def becomes(what: str, so: Callable[[], object], patience: float | None = None) -> None:
    """Waits until `so` is true."""
    until = time.monotonic() + (patience or PATIENCE)
    while not so():
        if time.monotonic() > until:
            raise Failed(f"did not happen: {what}")
        time.sleep(0.05)


def flushes(disk: str) -> int:
    """Flushes the disk has carried out (Documentation/block/stat.rst: "flush I/Os")."""
    return int(Path(f"/sys/block/{disk}/stat").read_text().split()[15])


def discarded(disk: str) -> int:
    """Sectors of 512 bytes the disk was told to discard, or to write: freeing with a promise of zeros is REQ_OP_WRITE_ZEROES,
    which the kernel counts as a write (blk_types.h, op_stat_group). Rises by nothing else while nobody writes."""
    fields = Path(f"/sys/block/{disk}/stat").read_text().split()
    return int(fields[13]) + int(fields[6])


class Media:
    """QEMU's virtual disks, 1 GiB each, with a volatile write cache; each is given out once."""

    def __init__(self, folder: Path) -> None:
        self.given = folder / "media-given"

    def take(self, sectors: int = 512) -> str:
        """The name (sdX) of a disk that nobody has had; `sectors` is its sector size in bytes."""
        given = set(self.given.read_text().split()) if self.given.exists() else set()
        for disk in sorted(os.listdir("/sys/block"), key=lambda name: (len(name), name)):
            queue = Path(f"/sys/block/{disk}/queue/logical_block_size")
            model = Path(f"/sys/block/{disk}/device/vendor")
            if disk in given or not disk.startswith("sd") or "QEMU" not in model.read_text():
                continue
            if int(queue.read_text()) == sectors:
                self.given.write_text(" ".join(given | {disk}))
                return disk
        raise Failed(f"no disk with sectors of {sectors} bytes is left: boot.py makes them")


class Program:
    """A program of ours in the background; what it says goes to files, so that it stays when the program is killed."""

    def __init__(self, name: str, argv: list[str], folder: Path, **environment: str) -> None:
        self.name = name
        self.out, self.log = folder / f"{name}.out", folder / f"{name}.log"
        with self.out.open("ab") as out, self.log.open("ab") as log:
            env = dict(os.environ, RUST_LOG="info", NO_COLOR="1", **environment)
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=log, env=env)
        self.seen = 0

    def expect(self, text: str, patience: float | None = None) -> str:
        """The next line of its output with `text` in it."""
        until = time.monotonic() + (patience or PATIENCE)
        while True:
            said = self.out.read_text(errors="replace")[self.seen:]
            for line in said.splitlines(keepends=True):
                if not line.endswith("\n"):
                    break
                self.seen += len(line)
                if text in line:
                    return line.strip()
            if self.process.poll() is not None:
                raise Failed(f"{self.name} ended with {self.process.returncode} instead of saying \"{text}\": {last_words(self.log.read_text())}")
            if time.monotonic() > until:
                raise Failed(f"{self.name} did not say \"{text}\": {last_words(self.log.read_text(errors='replace'))}")
            time.sleep(0.05)

    def said(self) -> str:
        return self.out.read_text(errors="replace") + self.log.read_text(errors="replace")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)

    def stop(self) -> None:
        """SIGTERM, and the end has to come."""
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise Failed(f"{self.name} does not end after SIGTERM") from None
