"""The protocol as a real blkfront can be made to speak it: ring size, queues, indirect segments, persistent grants.

The module is reloaded in one running guest with other parameters; that costs a detach and an attach, not a boot.
Not the full product (5 × 4 × 3 × 2 = 120) but rows chosen so that each value of each parameter comes with several
values of the others, the corners included; `pairs()` computes what is covered and the unit test holds it to that.
"""

from __future__ import annotations

import re

from lab import Disk, GuestConfig, Lab
from scenario import Scenario

#: (max_ring_page_order, max_queues, max_indirect_segments, persistent)
ROWS = [
    (0, 1, 0, False),       # the oldest protocol: one page, eleven segments, nothing else
    (0, 1, 256, True),
    (0, 4, 32, True),
    (1, 2, 0, True),
    (2, 3, 256, False),
    (3, 4, 0, False),
    (3, 1, 32, True),
    (4, 4, 0, True),        # 2048 requests in flight
    (4, 1, 256, False),
]
# Not (4, 4, 256, True): with persistent grants blkfront keeps a page for every segment of every request of every
# queue, here 2 GiB, and more grants than a guest has. (3, 1, 256, True) is 256 MiB and ended in the guest's OOM killer.

VERIFY = ("fio --name=v --filename=/dev/xvdb --direct=1 --ioengine=libaio --iodepth=32 --rw=randwrite --bsrange=512-128k "
          "--blockalign=512 --size=3M --verify=crc32c --verify_fatal=1 --output-format=terse --terse-version=3")


def pairs(rows: list[tuple[int, int, int, bool]]) -> set[tuple[int, object]]:
    """The values each parameter takes, as (position, value)."""
    return {(position, value) for row in rows for position, value in enumerate(row)}


def run(lab: Lab) -> None:
    device = lab.loop(lab.image("data", "32M"))
    guest = lab.guest(GuestConfig("matrix", memory=512, vcpus=4, no_blkfront=True))
    attached = False
    for order, queues, segments, persistent in ROWS:
        text = f"order {order}, queues {queues}, indirect {segments}, persistent {'Y' if persistent else 'N'}"
        parameters = (f"max_ring_page_order={order} max_queues={queues} max_indirect_segments={segments} "
                      f"feature_persistent={'Y' if persistent else 'N'}")
        if attached:
            # In this order: a disk that is connected holds the module.
            guest.detach("xvdb")
            guest.wait_device("xvdb", present=False)
            guest.run("rmmod xen_blkfront")
        guest.run(f"dmesg -c > /dev/null; insmod $(grep xen-blkfront /etc/lab-modules) {parameters}")
        guest.attach(Disk(device, "xvdb"))
        attached = True
        path = guest.backend_path("xvdb").replace("/local/domain/0/backend/vbd", f"/local/domain/{guest.domid()}/device/vbd", 1)
        path = re.sub(r"/device/vbd/\d+/", "/device/vbd/", path)
        keys = lab.sh(f"xenstore-ls {path}")
        agreed = negotiated(keys)
        guest.run(VERIFY, 180)
        log = guest.run("dmesg")
        lab.guest_dmesg["matrix"] = lab.guest_dmesg.get("matrix", "") + log
        told = re.search(r"persistent grants: (\w+); indirect descriptors: (\w+)", log)
        lab.note(text, f"agreed: {agreed}" + (f", persistent {told[1]}, indirect {told[2]}" if told else ""))
        assert told and (told[1] == "enabled") <= persistent, f"{text}: blkfront says {told and told[0]}"
        assert agreed[0] == order and agreed[1] == queues, f"{text}: agreed on {agreed}; frontend's keys:\n{keys}"


def negotiated(keys: str) -> tuple[int, int]:
    """(ring page order, queues) out of a frontend's keys: with one queue they are in the folder itself."""
    queues = re.search(r'multi-queue-num-queues = "(\d+)"', keys)
    order = re.search(r'ring-page-order = "(\d+)"', keys)
    return int(order[1]) if order else 0, int(queues[1]) if queues else 1


MATRIX = Scenario("blkfront-matrix", "ring order 0-4, queues 1-4, indirect segments, persistent grants: fio crc32c on each",
                  run, order=40)
