"""One emulated machine: QEMU running Xen and dom0, and the host's end of the control channel."""

from __future__ import annotations

import ctypes
import itertools
import os
import queue
import signal
import socket
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import build
import wire
from progress import Step, say

#: SMAP kills dom0 at its first fault under emulation; with AVX, and with XSAVE at all, programs crash now and then
#: (fio's heap, xl's thread exit): extended state is not always carried over a switch of domains, FXSAVE's is; without
#: masking RDTSCP Xen stops PVH guests with an instruction-length mismatch. For the same reason never give Xen
#: spec-ctrl=no: it turns eager FPU switching off. Nothing here is about Xen, all of it about QEMU's TCG.
CPU = "max,-smap,-smep,-pku,-la57,-avx512f,-avx2,-avx,-xsave,-rdtscp"


class MachineGone(Exception):
    """QEMU ended, or dom0 does not answer."""


class CommandFailed(Exception):
    """A command in dom0 or in a guest ended with another code than 0."""


@dataclass
class Result:
    code: int
    out: str
    error: str = ""


class Machine:
    """Start with `start`, then `run`; `stop` always. With keep=True QEMU outlives this process."""

    def __init__(self, images: build.Images, payload: Path, keep: bool = False) -> None:
        self.images, self.payload, self.keep, self.world = images, payload, keep, images.world
        self.folder = images.cache / "run"
        self.console_log = self.folder / "console.log"
        self.qemu: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._numbers = itertools.count(1)
        self._waiting: dict[int, queue.Queue[wire.Message]] = {}
        self._hello = threading.Event()
        self._sending = threading.Lock()
        self.boot_seconds = 0.0

    # ---- life

    def command(self) -> list[str]:
        """QEMU's command line. Dom0's disk is opened with snapshot=on: every boot starts from the built image."""
        return [
            "qemu-system-x86_64", "-name", "xen-lab", "-accel", "tcg,thread=multi", "-m", str(self.world.memory_mb),
            "-smp", "2", "-cpu", CPU, "-nodefaults", "-no-reboot", "-display", "none",
            "-kernel", str(self.images.xen), "-append", self.world.xen_arguments,
            "-initrd", f"{self.images.kernel.vmlinuz} {self.world.dom0_arguments},{self.images.dom0_initrd}",
            "-drive", f"file={self.images.dom0},if=virtio,format=raw,snapshot=on,cache=unsafe,discard=unmap",
            "-drive", f"file={self.payload},if=virtio,format=raw,readonly=on",
            "-chardev", f"socket,id=console,path={self.folder}/console.sock,server=on,wait=off,logfile={self.console_log}",
            "-serial", "chardev:console",
            "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=control,path={self.folder}/control.sock,server=on,wait=off",
            "-device", "virtserialport,chardev=control,name=lab.control",
            "-device", "virtio-rng-pci",
            "-pidfile", f"{self.folder}/qemu.pid",
        ]

    def start(self, timeout: float = 180) -> None:
        """Boot. A dom0 that crashes before its agent says hello is booted a second time: nothing of ours has run by then,
        and QEMU lets an emulated processor, once in some thirty boots here, run into a breakpoint by which Linux patches its
        own code (seen: int3 in sched_clock_cpu)."""
        try:
            self._boot(timeout)
        except MachineGone as error:
            if self.qemu is None or self.qemu.poll() is None:
                raise
            say(f"dom0 crashed before anything of ours ran; once more. {error}")
            self._boot(timeout)

    def _boot(self, timeout: float) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        running = running_pid(self.folder)
        if running:
            raise MachineGone(f"a lab machine is running (pid {running}): `run.py stop` ends it")
        for file in ("console.sock", "control.sock", "console.log", "qemu.log"):
            (self.folder / file).unlink(missing_ok=True)
        with Step(f"boot Xen {self.world.name} and dom0"):
            began = time.monotonic()
            env = dict(os.environ, TMPDIR=str(self.folder))     # where snapshot=on keeps its overlay
            with (self.folder / "qemu.log").open("wb") as log:
                self.qemu = subprocess.Popen(self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env,
                                             start_new_session=True, preexec_fn=None if self.keep else _die_with_parent)
            self.connect(timeout)
            self.boot_seconds = time.monotonic() - began

    def connect(self, timeout: float) -> None:
        """Reach the agent: of a machine just started, or of one that was kept."""
        until = time.monotonic() + timeout
        control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        while True:
            try:
                control.connect(str(self.folder / "control.sock"))
                break
            except OSError:
                self._check_alive("its control socket")
                if time.monotonic() > until:
                    raise MachineGone(f"waited {timeout:.0f} s for QEMU's control socket") from None
                time.sleep(0.1)
        self._control = control
        threading.Thread(target=self._read, daemon=True).start()
        while not self._hello.wait(1.0):
            self._check_alive("the agent's hello")
            if time.monotonic() > until:
                raise MachineGone(f"waited {timeout:.0f} s for the agent in dom0; the console's end:\n{self.console_tail()}")
            # Only a kept machine needs the question, but a fresh one is not disturbed by it.
            self._send({"id": 0, "op": "hello"})

    def _check_alive(self, waiting_for: str) -> None:
        if self.qemu and self.qemu.poll() is not None:
            raise MachineGone(f"QEMU ended with {self.qemu.returncode} while waiting for {waiting_for}; "
                              f"the console's end:\n{self.console_tail()}")

    def console_tail(self, lines: int = 25) -> str:
        text = self.console_log.read_text(errors="replace") if self.console_log.exists() else ""
        log = self.folder / "qemu.log"
        return "\n".join((text + (log.read_text(errors="replace") if log.exists() else "")).splitlines()[-lines:])

    def alive(self) -> bool:
        """Whether dom0 still answers."""
        if self.qemu is not None and self.qemu.poll() is not None:
            return False
        try:
            return self.run(["true"], 30).code == 0
        except MachineGone:
            return False

    def stop(self) -> None:
        """Power off in an orderly way if dom0 still listens, else end the process we started."""
        if self.qemu is None or self.qemu.poll() is not None:
            return
        try:
            self._send({"id": 0, "op": "run", "timeout": 5,
                        "argv": ["sh", "-c", "echo 1 > /proc/sys/kernel/sysrq; echo o > /proc/sysrq-trigger"]})
            self.qemu.wait(8)
        except (OSError, MachineGone, subprocess.TimeoutExpired):
            self.qemu.terminate()
            try:
                self.qemu.wait(10)
            except subprocess.TimeoutExpired:
                self.qemu.kill()
                self.qemu.wait()
        say("machine is off")

    def cpu_seconds(self) -> float:
        """CPU time the emulator has used: what was done, whatever else the host was busy with meanwhile."""
        pid = self.qemu.pid if self.qemu else running_pid(self.folder)
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    # ---- commands

    def _send(self, message: wire.Message) -> None:
        if self._control is None:
            raise MachineGone("not connected")
        with self._sending:
            try:
                self._control.sendall(wire.encode(message))
            except OSError as error:
                raise MachineGone(f"control channel: {error}") from error

    def _read(self) -> None:
        lines = wire.Lines()
        assert self._control
        while True:
            try:
                data = self._control.recv(65536)
            except OSError:
                data = b""
            if not data:
                for box in list(self._waiting.values()):
                    box.put({"exit": -1, "error": "the machine is gone"})
                return
            for message in lines.feed(data):
                if "hello" in message:
                    self._hello.set()
                box = self._waiting.get(message.get("id", 0))
                if box:
                    box.put(message)

    def ask(self, message: wire.Message, timeout: float, what: str) -> tuple[int, bytes, str]:
        """Send one request and wait for its exit. The agent keeps the time-out; we add a margin for a dead agent."""
        number = next(self._numbers)
        box: queue.Queue[wire.Message] = queue.Queue()
        self._waiting[number] = box
        until = time.monotonic() + timeout + 30
        out = b""
        try:
            self._send({**message, "id": number, "timeout": timeout})
            while True:
                try:
                    answer = box.get(timeout=1.0)
                except queue.Empty:
                    self._check_alive(what)
                    if time.monotonic() > until:
                        raise MachineGone(f"dom0 did not answer within {timeout + 30:.0f} s to: {what}") from None
                    continue
                if "out" in answer:
                    out += wire.unpack(answer["out"])
                elif "exit" in answer:
                    if answer["exit"] == -1:
                        raise MachineGone(f"the machine is gone while waiting for: {what}\n{self.console_tail()}")
                    return answer["exit"], out, answer.get("error", "")
        finally:
            self._waiting.pop(number, None)

    def run(self, argv: list[str], timeout: float = 60, **more: object) -> Result:
        """Run a program in dom0."""
        code, out, error = self.ask({"op": "run", "argv": argv, **more}, timeout, " ".join(argv)[:200])
        return Result(code, out.decode(errors="replace"), error)

    def sh(self, script: str, timeout: float = 60, check: bool = True, **more: object) -> str:
        """Run a shell script in dom0 and return what it printed; fail loudly unless told not to."""
        result = self.run(["bash", "-c", script], timeout, **more)
        if check and result.code:
            why = f"not done after {timeout:.0f} s" if result.code == 124 else f"exit {result.code} {result.error}"
            raise CommandFailed(f"dom0: {why}: {script}\n{result.out[-3000:]}")
        return result.out

    def guest(self, name: str, script: str, timeout: float, running: bool = False) -> Result:
        """Run a shell script in a guest, through its console."""
        code, out, error = self.ask({"op": "guest", "name": name, "script": script, "running": running}, timeout,
                                    f"guest {name}: {script[:200]}")
        return Result(code, out.decode(errors="replace"), error)

    def open_console(self, name: str) -> None:
        """Let the agent hold a guest's console, raw, before the guest says anything: the terminal in between would send it
        back as an echo."""
        code, _, error = self.ask({"op": "console", "name": name}, 30, f"console of {name}")
        if code:
            raise CommandFailed(f"console of {name}: {error}")

    def get(self, path: str, to: Path) -> None:
        """Copy a file out of dom0."""
        code, out, error = self.ask({"op": "get", "path": path}, 60, f"get {path}")
        if code:
            raise CommandFailed(f"get {path}: {error}")
        to.write_bytes(out)

    def put(self, local: Path, path: str, mode: int = 0o755) -> None:
        """Copy a file into a running dom0 (a new binary into a kept machine)."""
        data = local.read_bytes()
        for start in range(0, max(len(data), 1), wire.CHUNK):
            piece = {"op": "put", "path": path, "data": wire.pack(data[start:start + wire.CHUNK]), "append": start > 0, "mode": mode}
            code, _, error = self.ask(piece, 30, f"put {path}")
            if code:
                raise CommandFailed(f"put {path}: {error}")

    def release_consoles(self) -> None:
        self.ask({"op": "release"}, 10, "release consoles")


def host_busy_seconds() -> float:
    """CPU seconds all processes of this host have used (proc(5): everything on the first line but idle and iowait)."""
    fields = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def running_pid(folder: Path) -> int | None:
    """The pid of the lab's QEMU if it runs; looks at the command line, since pids are used again."""
    try:
        pid = int((folder / "qemu.pid").read_text())
        return pid if b"xen-lab" in Path(f"/proc/{pid}/cmdline").read_bytes() else None
    except (OSError, ValueError):
        return None


def stop_kept(folder: Path) -> bool:
    """End a machine left open by --keep or shell."""
    pid = running_pid(folder)
    if pid is None:
        return False
    os.kill(pid, signal.SIGTERM)
    for _ in range(100):
        if running_pid(folder) is None:
            return True
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    return True


def _die_with_parent() -> None:
    # PR_SET_PDEATHSIG: an interrupted run must not leave an emulator eating both cores.
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
