"""The agent in dom0: runs what the host asks for, and speaks to guests over their consoles.

One thread per request, so that I/O in a guest goes on while a disk is detached. It has no opinion about tests:
those live on the host.
"""

from __future__ import annotations

import glob
import os
import re
import select
import signal
import subprocess
import sys
import termios
import threading
import time
import tty

sys.path.insert(0, "/lab")
import wire  # noqa: E402
import xenstore  # noqa: E402

PORT_NAME = "lab.control"


def find_port() -> str:
    """Without udev nobody makes /dev/virtio-ports/NAME: look the name up in sysfs."""
    for _ in range(600):
        for name in glob.glob("/sys/class/virtio-ports/*/name"):
            with open(name) as file:
                if file.read().strip() == PORT_NAME:
                    return "/dev/" + name.split("/")[-2]
        time.sleep(0.1)
    raise SystemExit("no virtio port named " + PORT_NAME)


class GuestConsole:
    """A guest's console: its init reads `RUN id base64` lines and brackets the output with markers."""

    def __init__(self, name: str, domid: int, path: str) -> None:
        self.name, self.domid = name, domid
        self.fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        tty.setraw(self.fd, termios.TCSANOW)
        self.lock = threading.Lock()        # one command at a time
        self.log = open(f"/var/log/lab/guest-{name}.log", "ab", buffering=0)
        self.rest = b""
        self.ready = False
        self.count = 0

    def close(self) -> None:
        try:
            os.close(self.fd)
        except OSError:
            pass

    def line(self, until: float) -> bytes:
        """The next whole line; TimeoutError when it does not come, OSError when the guest is gone."""
        while b"\n" not in self.rest:
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if not select.select([self.fd], [], [], min(left, 1.0))[0]:
                continue
            try:
                data = os.read(self.fd, 65536)
            except BlockingIOError:
                continue
            if not data:
                raise OSError("console closed")
            self.log.write(data)
            self.rest += data
        line, self.rest = self.rest.split(b"\n", 1)
        return line.rstrip(b"\r")

    def write(self, data: bytes, until: float) -> None:
        while data:
            if time.monotonic() > until:
                raise TimeoutError
            if select.select([], [self.fd], [], 1.0)[1]:
                try:
                    data = data[os.write(self.fd, data):]
                except BlockingIOError:
                    pass

    def run(self, script: str, timeout: float, send) -> int:
        until = time.monotonic() + timeout
        with self.lock:
            while not self.ready:
                self.ready = self.line(until).startswith(b"@@lab ready")
            self.count += 1
            tag = f"{self.domid}.{self.count}".encode()
            self.write(b"RUN " + tag + b" " + wire.pack(script.encode()).encode() + b"\n", until)
            begun = False
            while True:
                line = self.line(until)
                if line == b"@@lab " + tag + b" begin":
                    begun = True
                elif line.startswith(b"@@lab " + tag + b" exit "):
                    return int(line.split()[-1])
                elif line.startswith(b"@@lab ready"):
                    raise OSError("the guest started anew during the command")
                elif begun:
                    send(line + b"\n")


class Agent:
    def __init__(self) -> None:
        self.port = os.open(find_port(), os.O_RDWR)
        self.sending = threading.Lock()
        self.consoles: dict[str, GuestConsole] = {}
        self.consoles_lock = threading.Lock()

    def send(self, message: wire.Message) -> None:
        data = wire.encode(message)
        with self.sending:
            while data:
                data = data[os.write(self.port, data):]

    def hello(self) -> None:
        self.send({"hello": os.uname().release})

    def serve(self) -> None:
        lines = wire.Lines()
        self.hello()
        while True:
            data = os.read(self.port, 65536)
            if not data:            # the host's end is closed; it may come back
                time.sleep(0.2)
                continue
            for message in lines.feed(data):
                threading.Thread(target=self.answer, args=(message,), daemon=True).start()

    def answer(self, message: wire.Message) -> None:
        number = message.get("id")

        def out(data: bytes) -> None:
            for start in range(0, len(data), wire.CHUNK):
                self.send({"id": number, "out": wire.pack(data[start:start + wire.CHUNK])})
        try:
            operation = getattr(self, "op_" + message["op"])
            code = operation(message, out)
            self.send({"id": number, "exit": code})
        except TimeoutError:
            self.send({"id": number, "exit": 124, "error": "timeout"})
        except Exception as error:  # noqa: BLE001  whatever it was, the host must hear of it
            self.send({"id": number, "exit": 125, "error": f"{type(error).__name__}: {error}"})

    def op_hello(self, message: wire.Message, out) -> int:
        self.hello()
        return 0

    def op_run(self, message: wire.Message, out) -> int:
        """Run a program; with "timeline", also watch that XenStore path and report each change of a `state` or
        hotplug-status node as a line `@T seconds path value` (seconds since the program's start), and go on
        after the program's end until a line `path value` matches the pattern in "until"."""
        stop, seen = threading.Event(), threading.Event()
        watcher = None
        if "timeline" in message:
            armed = threading.Event()
            watcher = threading.Thread(target=self._watch, args=(message, armed, stop, seen, out))
            watcher.start()
            armed.wait(10)
        began = time.monotonic()
        process = subprocess.Popen(message["argv"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, start_new_session=True, cwd="/root")
        until = began + message.get("timeout", 60)
        assert process.stdout
        fd = process.stdout.fileno()
        code = None
        try:
            while True:
                left = until - time.monotonic()
                if left <= 0:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    code = 124
                    break
                # A program may leave children behind that hold its output open (daemons): end with the program.
                if select.select([fd], [], [], min(left, 0.2))[0]:
                    data = os.read(fd, wire.CHUNK)
                    if data:
                        out(data)
                        continue
                    code = process.wait(max(left, 0.1))
                    break
                if process.poll() is not None:
                    code = process.returncode
                    break
        finally:
            if watcher:
                if code == 0 and "until" in message:
                    seen.wait(max(until - time.monotonic(), 0.1))
                stop.set()
                watcher.join()
        return code if code is not None and code >= 0 else 128 - (code or 0)

    def _watch(self, message: wire.Message, armed: threading.Event, stop: threading.Event, seen: threading.Event,
               out) -> None:
        store = xenstore.Store()
        store.watch(message["timeline"])
        wanted = re.compile(message.get("until", "$^"))
        values: dict[str, str] = {}
        armed.set()
        began = time.monotonic()
        while not stop.is_set():
            changed = store.event(0.2)
            if changed is None or not changed.endswith(("/state", "/hotplug-status")):
                continue
            now = time.monotonic() - began
            value = store.read(changed)
            if value is not None and values.get(changed) != value:
                values[changed] = value
                out(f"@T {now:.3f} {changed} {value}\n".encode())
                if wanted.search(f"{changed} {value}"):
                    seen.set()
        store.close()

    def op_get(self, message: wire.Message, out) -> int:
        with open(message["path"], "rb") as file:
            while data := file.read(wire.CHUNK):
                out(data)
        return 0

    def op_put(self, message: wire.Message, out) -> int:
        """Write a piece of a file; the first piece replaces what was there."""
        with open(message["path"], "ab" if message.get("append") else "wb") as file:
            file.write(wire.unpack(message["data"]))
        os.chmod(message["path"], message.get("mode", 0o644))
        return 0

    def console(self, name: str, until: float) -> GuestConsole:
        """The console of the guest of that name; opened again when the domain behind the name is another one."""
        store = xenstore.Store()
        try:
            while True:
                for domid in store.list("/local/domain"):
                    if domid != "0" and store.read(f"/local/domain/{domid}/name") == name:
                        path = store.read(f"/local/domain/{domid}/console/tty")
                        if path:
                            with self.consoles_lock:
                                old = self.consoles.get(name)
                                if old and old.domid == int(domid):
                                    return old
                                if old:
                                    old.close()
                                new = self.consoles[name] = GuestConsole(name, int(domid), path)
                                return new
                if time.monotonic() > until:
                    raise OSError(f"no running guest {name} with a console")
                time.sleep(0.2)
        finally:
            store.close()

    def op_guest(self, message: wire.Message, out) -> int:
        timeout = message.get("timeout", 60)
        console = self.console(message["name"], time.monotonic() + min(timeout, 20))
        if message.get("running"):          # a restored guest does not say "ready" again
            console.ready = True
        try:
            return console.run(message["script"], timeout, out)
        except OSError:
            with self.consoles_lock:
                console.close()
                if self.consoles.get(message["name"]) is console:
                    del self.consoles[message["name"]]
            raise

    def op_console(self, message: wire.Message, out) -> int:
        self.console(message["name"], time.monotonic() + 20)
        return 0

    def op_release(self, message: wire.Message, out) -> int:
        with self.consoles_lock:
            for console in self.consoles.values():
                console.close()
            self.consoles.clear()
        return 0


if __name__ == "__main__":
    Agent().serve()
