"""Progress lines: which step, how many seconds so far.

Emulation is slow and a silent terminal looks like a hang, so every step says when it starts and every
long wait says what it waits for.
"""

from __future__ import annotations

import sys
import threading
import time

_START = time.monotonic()
_LOCK = threading.Lock()


def say(text: str) -> None:
    """Print one line with the seconds since the program started."""
    with _LOCK:
        print(f"[{time.monotonic() - _START:6.1f}s] {text}", flush=True)


class Step:
    """`with Step("debootstrap"):` announces itself, repeats itself while it lasts, and reports its time."""

    def __init__(self, name: str, every: float = 20.0) -> None:
        self.name = name
        self.every = every
        self.seconds = 0.0
        self._done = threading.Event()

    def __enter__(self) -> "Step":
        self._began = time.monotonic()
        say(f"{self.name} …")
        self._thread = threading.Thread(target=self._remind, daemon=True)
        self._thread.start()
        return self

    def _remind(self) -> None:
        while not self._done.wait(self.every):
            say(f"{self.name} … {time.monotonic() - self._began:.0f} s so far")

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._done.set()
        self._thread.join()
        self.seconds = time.monotonic() - self._began
        say(f"{self.name}: {'FAILED after' if error else 'done in'} {self.seconds:.1f} s")


def die(text: str) -> None:
    """End with a message for a person; never a traceback for something the reader can repair."""
    print(f"xen-lab: {text}", file=sys.stderr, flush=True)
    raise SystemExit(2)
