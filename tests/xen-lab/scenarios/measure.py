"""Figures, not verdicts: time to Connected, and what one 4 KiB request costs the hypervisor."""

from __future__ import annotations

import re

import xentrace
from lab import Disk, GuestConfig, Lab
from scenario import Scenario

REQUESTS = 256


def time_to_connected(lab: Lab) -> None:
    """From the start of `xl create` (and of `xl block-attach`) to the backend's state 4.

    Seconds follow the host's load: the same thing measured twice, minutes apart, differed by a factor of four beside
    other people's compilers. The emulator's CPU seconds follow it less, the count of processes not at all.
    """
    image = lab.image("first", "16M")
    config = GuestConfig("timed", disks=[Disk(image, "xvda")])
    path = lab.write_config(config)
    folder = "qdisk" if lab.backend == "qdisk" else "vbd"
    done = rf"/backend/{folder}/\d+/51712/state 4$"
    report_times(lab, "xl create", *lab.timeline(f"create {path}", done))
    guest = lab.adopt(config)
    guest.wait_shell()

    disk = Disk(lab.loop(lab.image("second", "16M")), "xvdb")
    report_times(lab, "xl block-attach",
                 *lab.timeline(f"block-attach timed {disk.spec(lab.backend)}", rf"/backend/{folder}/\d+/51728/state 4$"))


def report_times(lab: Lab, what: str, times: dict[str, float], work: float, processes: int) -> None:
    def first(pattern: str) -> float | None:
        return min((seconds for key, seconds in times.items() if re.search(pattern, key)), default=None)
    one, two, hotplug, four = (first(pattern) for pattern in (r"/state 1$", r"/state 2$", r"hotplug-status connected$", r"/state 4$"))
    assert four is not None
    lab.note(f"{what}: to Connected", f"{four:.2f} s")
    lab.note(f"{what}: to Connected, work", f"{work:.2f} CPU-s")
    lab.note(f"{what}: processes started in dom0", str(processes))
    if two is not None and hotplug is not None and lab.backend != "qdisk":
        lab.note(f"{what}: hotplug program", f"{hotplug - two:.2f} s")
    if one is not None and two is not None:
        lab.note(f"{what}: backend to InitWait", f"{two - one:.2f} s")


def request_path(lab: Lab, persistent: bool) -> None:
    """Grant operations (xentrace) and notifications (/proc/interrupts on both sides) per 4 KiB request.

    Persistent grants are warmed up first, so that they show what they cost in the long run: nothing. Without them
    (feature_persistent=N in the guest) each request shows what its backend does with its pages.
    """
    device = lab.loop(lab.image("data", "32M"))
    blkfront: dict[str, object] = {} if persistent else {"feature_persistent": "N"}
    guest = lab.guest(GuestConfig("counted", disks=[Disk(device, "xvda")], blkfront=blkfront))
    guest.run("dd if=/dev/zero of=/dev/xvda bs=256k count=128 oflag=direct 2>/dev/null", 120)
    for name, mode, depth in (("read depth 1", "randread", 1), ("read depth 32", "randread", 32), ("write depth 32", "randwrite", 32)):
        job = (f"fio --name=c --filename=/dev/xvda --direct=1 --ioengine=libaio --rw={mode} --bs=4k --iodepth={depth} "
               f"--size=32M --number_ios={REQUESTS} --output-format=terse --terse-version=3 > /dev/null")
        lab.sh(f"rm -f /tmp/trace; (xentrace -D -S 512 -e {xentrace.EVENT_MASK} /tmp/trace & echo $! > /run/trace.pid) > /tmp/xentrace.log 2>&1; sleep 1")
        to_backend = backend_interrupts(lab)
        to_guest, ios = guest_counts(guest)
        guest.run(job, 120)
        to_guest_after, ios_after = guest_counts(guest)
        to_backend = backend_interrupts(lab) - to_backend
        lab.sh("kill -INT $(cat /run/trace.pid); for i in $(seq 50); do [ -d /proc/$(cat /run/trace.pid) ] || break; sleep 0.1; done")
        found = xentrace.count(lab.fetch("/tmp/trace"))
        requests = max(ios_after - ios, 1)

        def per(value: int) -> str:
            return f"{value / requests:.3f} per request"
        lab.note(f"{name}: requests", str(requests))
        for key, plural in (("map", "maps"), ("unmap", "unmaps"), ("copy", "copies")):
            lab.note(f"{name}: grant {plural}", f"{per(found[key])}, {found[key + ' calls']} hypercalls")
        lab.note(f"{name}: notifications to backend", per(to_backend))
        lab.note(f"{name}: notifications to guest", per(to_guest_after - to_guest))
        lab.note(f"{name}: event-channel hypercalls (all domains)", per(found["event-channel calls"]))
        if found["lost"]:
            lab.note(f"{name}: trace records lost", str(found["lost"]))


def backend_interrupts(lab: Lab) -> int:
    """Events that reached dom0 for a block backend: the kernel names its port, a user space port carries the
    name of the thread that bound it (ours: 3.vbd51712-0)."""
    total = 0
    for line in lab.sh("cat /proc/interrupts").splitlines():
        words = line.split()
        if words and re.search(r"blkif-backend|evtchn:(\d+\.vbd|xen-qemu|qemu)", words[-1]):
            total += sum(int(word) for word in words[1:] if word.isdigit())
    return total


def guest_counts(guest) -> tuple[int, int]:
    """(events that reached the guest's blkfront, requests its disk completed)."""
    out = guest.run("grep blkif /proc/interrupts; cat /sys/block/xvda/stat")
    *lines, stat = out.strip().splitlines()
    events = sum(int(word) for line in lines for word in line.split()[1:] if word.isdigit())
    fields = stat.split()
    return events, int(fields[0]) + int(fields[4])


TIME = Scenario("time-to-connected", "from xl create, and from block-attach, to backend state 4", time_to_connected,
                backends=("kernel", "qdisk", "ours"), compare=True, order=30)
COUNT = Scenario("request-path", "grant maps, copies and notifications per 4 KiB request",
                 lambda lab: request_path(lab, True), backends=("kernel", "qdisk", "ours"), compare=True, order=31)
COUNT_PLAIN = Scenario("request-path-np", "the same with a guest that has no persistent grants",
                       lambda lab: request_path(lab, False), compare=True, order=32)
