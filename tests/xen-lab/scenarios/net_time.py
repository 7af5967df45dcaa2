"""How long an interface takes to Connected, and what the hotplug program has of it. Figures, not verdicts."""

from __future__ import annotations

import statistics

import network as net
from lab import GuestConfig, Lab
from scenario import Scenario

ROUNDS = 3


def time_to_connected(lab: Lab) -> None:
    """`xl network-attach` to the backend's state 4, and of it from state 2 to hotplug-status, which is the program.

    The median of a few rounds. Seconds follow the host's load, the count of processes does not; see README.md.
    """
    net.link(lab, "xenbr0", "bridge")
    guest = lab.guest(GuestConfig("timed"))
    whole, programs, work, started = [], [], [], []
    for _ in range(ROUNDS):
        times, cpu, processes = lab.timeline(f"network-attach {guest.name} bridge=xenbr0", r"/backend/vif/\d+/0/state 4$")

        def first(end: str) -> float:
            return min(seconds for key, seconds in times.items() if key.endswith(end))
        whole.append(first("/state 4"))
        programs.append(first("/hotplug-status connected") - first("/state 2"))
        work.append(cpu)
        started.append(processes)
        lab.xl(f"network-detach {guest.name} 0")
        net.wait_removed(guest, "eth0")
    lab.note("xl network-attach: to Connected", f"{statistics.median(whole):.2f} s")
    lab.note("xl network-attach: to Connected, work", f"{statistics.median(work):.2f} CPU-s")
    lab.note("xl network-attach: hotplug program", f"{statistics.median(programs):.3f} s")
    lab.note("xl network-attach: processes started in dom0", str(round(statistics.median(started))))


TIME = Scenario("net-time", "xl network-attach to Connected: seconds, hotplug program, processes", time_to_connected, compare=True,
                network=True, order=64)
