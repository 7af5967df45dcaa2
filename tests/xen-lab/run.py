#!/usr/bin/env python3
"""The Xen lab: real Xen, a Debian dom0 and unmodified guests in QEMU's emulation. See README.md beside this file.

    run.py build                      images into target/xen-lab (cached)
    run.py test [SCENARIO…]           boot, run, print a table
    run.py list                       the scenarios
    run.py shell                      boot and give a dom0 shell (Ctrl-] leaves it and ends the machine)
    run.py stop                       end a machine left open by --keep
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tarfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import build  # noqa: E402
import machine as machines  # noqa: E402
import payload  # noqa: E402
import report  # noqa: E402
import scenario as scenarios  # noqa: E402
import terminal  # noqa: E402
from lab import BACKENDS, Lab  # noqa: E402
from progress import die, say  # noqa: E402
from worlds import DEFAULT_WORLD, WORLDS, World  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=REPOSITORY / "target/xen-lab", help="where images and logs go")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="build the images")
    commands.add_parser("list", help="list the scenarios")
    commands.add_parser("stop", help="end a kept machine")
    for name in ("test", "shell"):
        command = commands.add_parser(name)
        command.add_argument("--binary", type=Path, help="a folder with our programs, or our blkback with the others beside "
                             "it (static, or for glibc 2.36); copied into dom0")
        command.add_argument("--backend", help="comma separated: " + ", ".join(BACKENDS))
    for name in ("build", "test", "shell"):
        commands.choices[name].add_argument("--world", default="", metavar="V", help="Xen's version: " + ", ".join(WORLDS)
                                            + f"; build and test take several, with commas; by default {DEFAULT_WORLD}")
    test = commands.choices["test"]
    test.add_argument("scenarios", nargs="*", metavar="SCENARIO", help="name, name[backend], "
                      "and either with @WORLD for one of the worlds only; none means all")
    test.add_argument("--keep", action="store_true", help="leave the machine running; `shell` then connects to it")
    test.add_argument("--on-kept", action="store_true", help="use the machine an earlier --keep left: no boot, but also "
                      "its agent; what --binary names is copied in (and the machine stays)")
    test.add_argument("--slow", type=float, default=1.0, metavar="X", help="multiply every time-out (busy machine)")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    args.cache = args.cache.resolve()
    if args.command == "list":
        for entry in scenarios.load():
            print(f"{entry.name:<18} {','.join(entry.backends):<18} {entry.about}{' (by name only)' if entry.by_name_only else ''}")
        return 0
    worlds = chosen_worlds(getattr(args, "world", ""))
    running = [world for world in WORLDS if machines.running_pid(args.cache / world / "run")]
    if args.command == "stop":
        ended = [world for world in running if machines.stop_kept(args.cache / world / "run")]
        print("stopped " + ", ".join(ended) if ended else "no machine is running")
        return 0
    if args.command == "shell" and running and (not args.world or worlds[0].name in running):
        world = worlds[0].name if args.world else running[0]
        return terminal.attach(args.cache / world / "run/console.sock", f"a kept machine, Xen {world}; `run.py stop` ends it")
    if getattr(args, "binary", None):
        if not args.binary.exists():
            die(f"--binary {args.binary}: no such file or folder")
        if payload.PROGRAMS[0] not in payload.programs(args.binary):
            die(f"--binary {args.binary}: there is no {payload.PROGRAMS[0]} in it")
    if args.command == "test":
        return test(args, worlds)
    images = [build.build(args.cache, world) for world in (worlds[:1] if args.command == "shell" else worlds)]
    return shell(args, images[0]) if args.command == "shell" else 0


def chosen_worlds(names: str) -> list[World]:
    """`4.17,4.20` as worlds."""
    for name in (chosen := (names or DEFAULT_WORLD).split(",")):
        if name not in WORLDS:
            die(f"--world {name}: not one of {', '.join(WORLDS)}")
    return [WORLDS[name] for name in chosen]


def backends(args: argparse.Namespace) -> list[str]:
    """The backends asked for by name; none means that the scenarios decide."""
    chosen = args.backend.split(",") if args.backend else []
    for name in chosen:
        if name not in BACKENDS:
            die(f"--backend {name}: not one of {', '.join(BACKENDS)}")
    if "ours" in chosen and not args.binary and not getattr(args, "on_kept", False):
        die("--backend ours needs --binary PATH")
    return chosen


def shell(args: argparse.Namespace, images: build.Images) -> int:
    backend = (backends(args) or ["ours" if args.binary else "kernel"])[0]
    machine = machines.Machine(images, payload.make(images, payload.programs(args.binary)))
    try:
        machine.start()
        Lab(machine).use_backend(backend)
        return terminal.attach(machine.folder / "console.sock", f"Xen {images.world.name}, backend {backend}; kernel and initrd for guests in /lab/boot")
    finally:
        machine.stop()


def ready(args: argparse.Namespace, world: World, runs: list[scenarios.Run]) -> build.Images:
    """What a world's scenarios need. A kept machine runs on the images as they were: they are not touched under it."""
    kernels = {kernel for run in runs for kernel in run.scenario.kernels}
    return build.Images(args.cache, world, kernels) if args.on_kept else build.build(args.cache, world, kernels)


def test(args: argparse.Namespace, worlds: list[World]) -> int:
    """The chosen scenarios in each world, one machine after the other: two at once would need twice the memory."""
    try:
        chosen = backends(args)
        known = scenarios.load()
        runs = {world.name: scenarios.choose_in(known, args.scenarios, world.name, chosen, bool(args.binary)) for world in worlds}
    except KeyError as error:
        die(str(error.args[0]))
    if not any(runs.values()):
        die("no scenario fits these backends and worlds")
    images = [ready(args, world, runs[world.name]) for world in worlds if runs[world.name]]
    logs = args.cache / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    outcomes: list[scenarios.Outcome] = []
    began = time.monotonic()
    boots = 0
    try:
        for world in images:
            boots += in_world(args, world, runs[world.world.name], logs, outcomes)
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    print("\n" + report.table(outcomes, [world.world.name for world in images]))
    for line in report.ratios(outcomes):
        print("ratio: " + line)
    failed = sum(not outcome.passed for outcome in outcomes)
    print(f"\n{len(outcomes)} runs, {failed} failed, {boots} boot(s), {time.monotonic() - began:.0f} s"
          + (f"; logs in {logs}" if failed else ""))
    return 1 if failed else 0


def in_world(args: argparse.Namespace, images: build.Images, runs: list[scenarios.Run], logs: Path,
             outcomes: list[scenarios.Outcome]) -> int:
    """Run scenarios in one world; adds to `outcomes`. Returns how often a machine was booted for it."""
    name = images.world.name
    if not args.on_kept:
        payload.make(images, payload.programs(args.binary))
    elif not machines.running_pid(images.cache / "run"):
        die(f"--on-kept: no machine with Xen {name} is running; start one with --keep")
    lab: Lab | None = None
    machine: machines.Machine | None = None
    boots = 0
    try:
        for number, run in enumerate(runs, 1):
            count = f"[{number}/{len(runs)}] Xen {name}: {run.title}"
            say(f"{count}: {run.scenario.about}")
            if lab is None:
                machine = machines.Machine(images, images.cache / "payload.img", keep=args.keep)
                if args.on_kept and not boots:
                    machine.connect(30)
                else:
                    machine.start(images.world.boot_seconds * args.slow)
                    boots += 1
                lab = Lab(machine, args.slow)
                if args.on_kept and not boots:
                    lab.clean()
                    lab.install(payload.programs(args.binary))
            if run.scenario.network and run.backend == "ours" and not lab.has_network:
                say(f"NOT TESTED: {run.title}: no netback and bridge-scripts beside blkback")
                continue
            outcome = one(lab, run, logs / name)
            outcomes.append(outcome)
            say(f"{count}: {'ok' if outcome.passed else 'FAILED'} {outcome.seconds:.1f} s")
            if not machine.alive():
                machine.stop()
                lab = None      # the next scenario gets a new machine
    finally:
        if machine:
            if (args.keep or machine.qemu is None) and machine.alive():
                machine.release_consoles()
                say("the machine is still running: `run.py shell` connects, `run.py stop` ends it")
            else:
                machine.stop()
    return boots


def one(lab: Lab, run: scenarios.Run, logs: Path) -> scenarios.Outcome:
    """One scenario with one backend: select it, count, run, clean, count again, read the logs."""
    import checks
    began = time.monotonic()
    lab.notes = []
    why = ""
    try:
        lab.use_backend(run.backend)
        before = lab.last_counts or lab.counts()
        lab.last_counts = None
        run.scenario.run(lab)
        for guest in list(lab.guests):
            guest.poweroff()
        lab.clean()
        leaked = lab.leaks(before)
        if leaked:
            why = "left behind: " + ", ".join(leaked)
    except machines.MachineGone as error:
        why = f"the machine is gone: {error}"
    except machines.CommandFailed as error:
        why = str(error)
    except AssertionError as error:
        why = f"assertion: {error}\n{''.join(traceback.format_tb(error.__traceback__)[-1:])}"
    except Exception:  # noqa: BLE001  a mistake in a scenario must not end the other scenarios
        why = traceback.format_exc()
    try:
        trouble = checks.expect("\n".join(lab.trouble()), list(run.scenario.tolerated))
        if trouble:
            why = (why + "\n" if why else "") + "log lines that fail a run:\n  " + "\n  ".join(trouble[:20])
        if why:
            tail(lab, run, logs)
            lab.clean()
    except (machines.MachineGone, machines.CommandFailed) as error:
        why = (why + "\n" if why else "") + f"while collecting logs: {error}"
    if why:
        say(f"    {run.title} FAILED: {why}")
    return scenarios.Outcome(run, not why, time.monotonic() - began, why, lab.notes, lab.world.name)


def tail(lab: Lab, run: scenarios.Run, logs: Path) -> None:
    """Collect all logs of a failed run and show the ends of the telling ones."""
    into = logs / run.title
    lab.collect(into)
    with tarfile.open(into / "logs.tar") as archive:
        archive.extractall(into, filter="data") if hasattr(tarfile, "data_filter") else archive.extractall(into)
    (into / "logs.tar").unlink()
    shutil.copy(lab.machine.console_log, into / "console.log")
    for name in ("lab/blkback.log", "lab/netback.log", "lab/xl.log", "lab/dmesg.log", "lab/xl-dmesg.log"):
        file = into / name
        if file.exists() and file.stat().st_size:
            print(f"--- end of {name}")
            print("\n".join(file.read_text(errors="replace").splitlines()[-12:]))
    for file in sorted((into / "lab").glob("guest-*.log")):
        print(f"--- end of {file.name}")
        print("\n".join(file.read_text(errors="replace").splitlines()[-8:]))


if __name__ == "__main__":
    sys.exit(main())
