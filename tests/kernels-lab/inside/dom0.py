"""The emulated machine with blkback in it, and its guests."""

from __future__ import annotations

import time
from pathlib import Path

from system import Failed, PATIENCE, Program, last_words, run


class Guest:
    """An emulated guest that offers its disk at a socket."""

    def __init__(self, dom0: "Dom0", name: str) -> None:
        self.name = name
        self.socket = dom0.folder / f"{name}.sock"
        argv = ["dom0-bench", "guest", "--hypervisor", dom0.hypervisor, "--name", name, "--nbd", f"unix:{self.socket}"]
        self.process = Program(name, argv, dom0.folder)
        self.domid = self.process.expect("waits for its disk").split()[1]

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.socket}"


class Dom0:
    """emu-xen and blkback, processes of their own, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.hypervisor = f"emu:{folder}/machine"
        self.machine = Program("emu-xen", ["emu-xen", "serve", "--dir", f"{folder}/machine"], folder)
        self.machine.expect("ready")
        self.blkback = Program("blkback", ["blkback", "serve", "--hypervisor", self.hypervisor], folder)
        self.blkback.expect("serving")

    def tool(self, *words: str, timeout: float | None = None):
        """`blkback WORDS`, to its end."""
        return run(["blkback", *words, "--hypervisor", self.hypervisor], timeout)

    def guest(self, name: str) -> Guest:
        return Guest(self, name)

    def attach(self, guest: Guest, target: str, access: str = "w") -> None:
        """Attached and connected, or Failed with what was said."""
        done = self.tool("attach", guest.name, spec(target, access), "--wait", f"{PATIENCE:.0f}", timeout=2 * PATIENCE)
        if done.returncode:
            raise Refused(last_words(done.stdout))
        guest.process.expect("nbd+unix")

    def refuses(self, guest: Guest, target: str, access: str) -> str:
        """The sentence with which an attach is refused."""
        done = self.tool("attach", guest.name, spec(target, access), timeout=2 * PATIENCE)
        if done.returncode == 0:
            raise Failed(f"a second guest got the disk with {access}")
        if done.returncode < 0 or "panicked" in done.stdout:
            raise Failed(f"attach died instead of refusing: {last_words(done.stdout)}")
        return last_words(done.stdout)

    def detach(self, guest: Guest) -> None:
        """Detached, as an administrator does it: where the guest takes longer than 10 s, as on a busy host, once more."""
        until = time.monotonic() + PATIENCE
        while (done := self.tool("detach", guest.name, "xvda")).returncode:
            if "run this again" not in done.stdout or time.monotonic() > until:
                raise Failed(f"detach: {last_words(done.stdout)}")
        guest.process.expect("is gone")

    def list(self, guest: Guest) -> str:
        return self.tool("list", guest.name).stdout

    def stop(self) -> None:
        """Ends blkback in order; it must not have panicked."""
        self.blkback.stop()
        if "panicked" in self.blkback.said():
            raise Failed(f"blkback panicked: {last_words(self.blkback.said())}")
        self.machine.stop()


class Refused(Failed):
    """attach said no, in a sentence."""


def spec(target: str, access: str) -> str:
    return f"{target},raw,xvda,{access}"
