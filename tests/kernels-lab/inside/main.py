"""Runs the cells, each in a process group and a cgroup of its own, with a deadline, and prints one JSON line for each.

    main.py             all cells that /lab/plan.json names
    main.py CELL        one cell, in this process
"""

from __future__ import annotations

import glob
import json
import os
import platform
import select
import subprocess
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, "/lab/inside")
PLAN = json.loads(Path("/lab/plan.json").read_text())
os.environ["LAB_SLOW"] = str(PLAN["slow"])

from cells import Refused, Report, round_of, storage_of  # noqa: E402
from faults import FAULTS  # noqa: E402
from network import NETWORK  # noqa: E402
from storage import KINDS  # noqa: E402
from system import Failed, Media  # noqa: E402

WORK = Path("/run/lab")
#: Seconds one cell may take.
DEADLINE = 240 * PLAN["slow"]


def emit(**event: object) -> None:
    print(json.dumps(event), flush=True)


def one(name: str) -> None:
    """A cell, in a process of its own; its last line is the outcome."""
    folder = WORK / str(os.getpid())
    folder.mkdir(parents=True)
    report, media = Report(), Media(WORK)
    outcome = "ok"
    try:
        if name in KINDS and PLAN["storage_only"]:
            storage_of(name, media)
        elif name in KINDS:
            round_of(name, media, folder, report)
        else:
            {**FAULTS, **NETWORK}[name](media, folder, report)
    except Refused as error:
        # Every kind in the table is to be served: a refusal, however well said, is told apart from a fault, no more.
        outcome, report.failures = "refused", [*report.failures, str(error)]
    except Failed as error:
        report.failures.append(str(error))
    except Exception:  # noqa: BLE001  the cell's own fault; the next cell is to run
        report.failures.append("the cell itself: " + " / ".join(traceback.format_exc().splitlines()[-4:]))
    if report.failures and outcome == "ok":
        outcome = "FAILED"
    logs = {log.name: log.read_text(errors="replace")[-6000:] for log in sorted(folder.glob("*.log"))} if report.failures else {}
    print("outcome: " + json.dumps({"outcome": outcome, "failures": report.failures, "facts": report.facts, "logs": logs}), flush=True)


def supervised(name: str) -> dict[str, object]:
    """Runs a cell; what still runs of it afterwards is ended, and what has to be ended by force is told."""
    group = Path("/sys/fs/cgroup") / f"lab-{abs(hash(name))}"
    group.mkdir()
    began, steps, result = time.monotonic(), ["the storage"], None
    process = subprocess.Popen([sys.executable, "-u", __file__, name], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())))
    assert process.stdout
    rest = b""
    while result is None:
        left = began + DEADLINE - time.monotonic()
        if left <= 0:
            result = {"outcome": "FAILED", "failures": [f"not done after {DEADLINE:.0f} s, in step \"{steps[-1]}\""], "stacks": stacks(group)}
            break
        if not select.select([process.stdout], [], [], min(left, 1.0))[0]:
            continue
        data = os.read(process.stdout.fileno(), 65536)
        rest += data
        *lines, rest = rest.split(b"\n")
        for line in lines:
            text = line.decode(errors="replace")
            if text.startswith("step: "):
                steps.append(text[6:])
                emit(step=text[6:], of=name, after=round(time.monotonic() - began, 1))
            elif text.startswith("outcome: "):
                result = json.loads(text[9:])
        if not data and result is None:
            result = {"outcome": "FAILED", "failures": [f"the cell's process died in step \"{steps[-1]}\""]}
    left_over = clear(group)
    if left_over:
        result["outcome"] = "FAILED"
        result["failures"].append(f"cannot be killed: {left_over}")
    result["seconds"] = round(time.monotonic() - began, 1)
    return result


def stacks(group: Path) -> str:
    """Where every thread of the cell is, in the kernel's words."""
    text = []
    for pid in (group / "cgroup.procs").read_text().split():
        for task in sorted(glob.glob(f"/proc/{pid}/task/*")):
            try:
                stat = Path(task, "stat").read_text().rpartition(")")[2].split()[0]
                stack = [line.split("] ")[-1] for line in Path(task, "stack").read_text().splitlines()[:6]]
                text.append(f"{pid} {Path(task, 'comm').read_text().strip()} {stat}: {' < '.join(stack)}")
            except OSError:
                continue
    return "\n".join(text)


def removed(group: Path) -> bool:
    try:
        group.rmdir()
    except OSError:
        return False
    return True


def clear(group: Path) -> str:
    """Ends what runs in the group and takes the cell's storage down; names what does not go."""
    # A suspended device would hold its users for ever.
    subprocess.run(["bash", "-c", "for d in $(ls /dev/mapper | grep -v control); do timeout 10 dmsetup resume $d; done"], capture_output=True)
    (group / "cgroup.kill").write_text("1")
    until = time.monotonic() + 60
    # The list is empty a moment before the group is: threads that are still ending, as nbd-client's, are not in it.
    while not removed(group):
        if time.monotonic() > until:
            return stacks(group) or f"something in {group}: {(group / 'cgroup.threads').read_text().split()}"
        time.sleep(0.1)
    # As well as it goes: the next cell has disks of its own, and says what it misses.
    subprocess.run(["timeout", "60", "bash", "/lab/inside/clear"], capture_output=True)
    return ""


def main() -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    emit(kernel=platform.release())
    for name in PLAN["cells"]:
        emit(cell=name, **supervised(name))
    emit(end=True)


if __name__ == "__main__":
    one(sys.argv[1]) if len(sys.argv) > 1 else main()
