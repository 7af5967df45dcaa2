#!/usr/bin/env python3
"""The kernels' lab: our programs on Debian's kernels, on every kind of storage, in QEMU without Xen.

    run.py                          every cell on every kernel, and the table
    run.py --kernel 6.1 --cell thin --cell "a device"     only kernels and cells whose names begin with or contain that
    run.py --short                  what goes into every run of tests/run
    run.py --list                   the cells' names
    run.py --update                 ask Debian for newer kernels before
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from pathlib import Path

import boot
import images
import kernels
import table
from progress import say

ROOT = Path(__file__).resolve().parents[2]
SHORT_KERNELS = ["6.1"]
SHORT_CELLS = ["file on ext4", "LVM thin", "dm-crypt (LUKS)", "filter after a kill"]


def names() -> list[str]:
    """The cells, from the tables in inside/ (which only the machine itself can import)."""
    found = []
    for file, wanted in (("storage", "KINDS"), ("faults", "FAULTS"), ("network", "NETWORK")):
        for node in ast.parse((images.HERE / f"inside/{file}.py").read_text()).body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            if isinstance(target, ast.Name) and target.id == wanted and isinstance(node.value, ast.Dict):
                found += [key.value for key in node.value.keys if isinstance(key, ast.Constant)]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", action="append", default=[], help="6.1, 6.12 or newest; may be given again")
    parser.add_argument("--cell", action="append", default=[], help="part of a cell's name; may be given again")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--steps", action="store_true", help="show each step of a cell as it begins")
    parser.add_argument("--storage-only", action="store_true", help="build the storage and do nothing with it: to try the cells themselves")
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release", help="folder of our programs")
    parser.add_argument("--cache", type=Path, default=ROOT / "target/kernels-lab")
    parser.add_argument("--slow", type=float, default=1, help="factor for every time-out")
    parser.add_argument("--markdown", type=Path, help="write the table there, too")
    parser.add_argument("--json", type=Path, help="write everything that was found there")
    wanted = parser.parse_args()

    cells = names()
    if wanted.short:
        cells, wanted.kernel = [cell for cell in cells if cell in SHORT_CELLS], SHORT_KERNELS
    if wanted.cell:
        cells = [cell for cell in cells if any(part in cell for part in wanted.cell)]
    if wanted.list:
        print("\n".join(cells))
        return 0
    chosen = [kernel for kernel in kernels.KERNELS if not wanted.kernel or kernel.name in wanted.kernel]
    if not cells or not chosen:
        parser.error("no such cell or kernel; --list has the cells, kernels are " + ", ".join(kernel.name for kernel in kernels.KERNELS))

    outcomes: table.Outcomes = {}
    for built in images.ensure(wanted.cache, chosen, wanted.update):
        say(f"kernel {built.kernel.name}: {built.release.read_text()}, {len(cells)} cells")
        outcomes[built.kernel.name] = one_kernel(built, cells, wanted)
    text = table.markdown({f"{name} ({images.Images(wanted.cache, kernel).release.read_text()})": outcomes[name]
                           for kernel in chosen for name in [kernel.name]}, cells)
    print("\n" + text)
    if wanted.markdown:
        wanted.markdown.write_text(text)
    if wanted.json:
        wanted.json.write_text(json.dumps(outcomes, indent=1))
    failed = table.failed(outcomes, cells)
    say(f"{len(failed)} of {len(cells) * len(chosen)} cells failed" + (": " + "; ".join(failed) if failed else ""))
    return 1 if failed else 0


def one_kernel(built: images.Images, cells: list[str], wanted: argparse.Namespace) -> dict[str, dict]:
    """Every cell on one kernel, in one boot; what a dead machine has not run stays out."""
    found: dict[str, dict] = {}
    machine = boot.Machine(built, wanted.binary, cells, wanted.slow, wanted.storage_only)
    try:
        for event in machine.cells():
            if "kernel" in event:
                say(f"kernel {built.kernel.name}: booted, {event['kernel']}")
                continue
            if "step" in event:
                if wanted.steps:
                    say(f"{built.kernel.name:6} {event['of']}: {event['step']}, after {event['after']} s")
                continue
            found[event["cell"]] = event
            say(f"{built.kernel.name:6} " + table.line(event["cell"], event))
            for name, log in {**event.get("logs", {}), "stacks": event.get("stacks", "")}.items():
                if log:
                    (built.logs / f"{built.kernel.name} {event['cell'].replace('/', ' ')} {name}").write_text(log)
    except boot.MachineGone as error:
        say(f"kernel {built.kernel.name}: {error}")
    finally:
        machine.stop()
    return found


if __name__ == "__main__":
    sys.exit(main())
