"""Reads what `xentrace` recorded: how often dom0 asked the hypervisor for grant maps, unmaps and copies.

Debian's hypervisor has no performance counters (`xenperf` finds none), but it has the trace buffer, and every
hypercall of a PV domain leaves a record there. For grant_table_op the record carries the sub-command and the count of
operations in the batch: just what is to be compared. Layouts: xen/include/public/trace.h, and __trace_hypercall in
xen/common/trace.c.
"""

from __future__ import annotations

import struct
from collections import Counter

#: TRC_PV_HYPERCALL_V2, and the same as part of a multicall (TRC_PV_HYPERCALL_SUBCALL).
HYPERCALL, SUBCALL = 0x0020100D, 0x0020200E
LOST_RECORDS = 0x0001F001
GRANT_TABLE_OP, EVENT_CHANNEL_OP = 20, 32
GRANT_COMMANDS = {0: "map", 1: "unmap", 5: "copy", 7: "unmap-and-replace", 12: "cache-flush"}

#: `xentrace -e` takes the class and subclass: PV entries and subcalls.
EVENT_MASK = "0x0020f000"


def records(data: bytes):
    """Every (event, [32-bit arguments]). The header's bit 31 says that 8 bytes of time follow it."""
    place = 0
    while place + 4 <= len(data):
        head, = struct.unpack_from("<I", data, place)
        place += 4
        if head >> 31:
            place += 8
        count = head >> 28 & 7
        if place + 4 * count > len(data):
            return
        yield head & 0x0FFFFFFF, list(struct.unpack_from(f"<{count}I", data, place))
        place += 4 * count


def count(data: bytes) -> Counter[str]:
    """Hypercalls and grant operations by name: "map calls" (hypercalls) and "map" (operations in them) and so on.

    The first argument holds the hypercall's number in its low 20 bits and, from bit 20, two bits per argument that
    tell whether it is recorded as 32 (1) or 64 (2) bits.
    """
    found: Counter[str] = Counter()
    for event, arguments in records(data):
        if event == LOST_RECORDS:
            found["lost"] += arguments[0] if arguments else 1
        if event not in (HYPERCALL, SUBCALL) or not arguments:
            continue
        number = arguments[0] & 0xFFFFF
        if number == GRANT_TABLE_OP and len(arguments) >= 3:
            name = GRANT_COMMANDS.get(arguments[1], f"grant-op-{arguments[1]}")
            found[f"{name} calls"] += 1
            found[name] += arguments[2]
        elif number == EVENT_CHANNEL_OP:
            found["event-channel calls"] += 1
        found["hypercalls"] += 1
    return found
