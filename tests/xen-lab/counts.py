"""What a device leaves behind if something forgot to release it: counted before and after each scenario."""

from __future__ import annotations

import re

#: One script for all counts: a process costs tens of milliseconds in dom0, so there is one call and few programs.
SCRIPT = r"""
xl debug-keys g
echo "xenstore $(xenstore-ls -f / | grep -vc ' = ""$')"
echo "ports $(lsevtchn 0 | wc -l)"
echo "loops $(ls -d /sys/block/loop*/loop 2>/dev/null | wc -l)"
echo "domains $(xl list | wc -l)"
echo "links $(ls -d /sys/class/net/*/ | wc -l)"       # not bonding_masters
echo "nft-tables $(nft list tables | wc -l)"
echo "filters $(ls -d /run/bridge-scripts/filter-* 2>/dev/null | wc -l)"
echo "routes $({ ip -4 route show table all; ip -6 route show table all; } | wc -l)"
echo "neighbours $({ ip neigh show nud permanent; ip neigh show proxy; } | wc -l)"
for name in backend netback; do
    pid=$(cat /run/lab-$name.pid 2>/dev/null) || continue
    echo "$name-fds $(ls /proc/$pid/fd | wc -l)"
    echo "$name-threads $(ls /proc/$pid/task | wc -l)"
    echo "$name-maps $(grep -c gntdev /proc/$pid/maps)"
done
echo BEGIN-XEN
xl dmesg -c | tee -a /var/log/lab/xl-dmesg.log
"""


def parse(text: str) -> dict[str, int]:
    """Numbers by name; grants are the active entries in what Xen prints for debug key g."""
    head, _, grants = text.partition("BEGIN-XEN")
    counts = {match[1]: int(match[2]) for match in re.finditer(r"^([\w-]+) (\d+)$", head, re.M)}
    counts["grants"] = active_grants(grants)
    return counts


def xen_log(text: str) -> str:
    """The part of the script's output that is Xen's log: emptied there, so whoever looks for trouble needs it."""
    return text.partition("BEGIN-XEN")[2]


def active_grants(text: str) -> int:
    """Entries that somebody has mapped, over all domains ("[0x008]  0 0x…" lines of the last gnttab_usage_print)."""
    text = text.rpartition("gnttab_usage_print_all [")[2]
    return len(re.findall(r"^\(XEN\).*\[0x[0-9a-f]+\]\s+\d+\s+0x", text, re.M))


def leaks(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """What there is more of than before. Less is no leak: the first guest's leftovers may be tidied later."""
    return [f"{name}: {before.get(name, 0)} → {count}" for name, count in after.items()
            if count > before.get(name, 0) and name in before]
