"""The protocol's layouts on real Xen. No 32-bit guest boots here (see guest32.py), so dom0 plays the frontend itself, through
/dev/xen/gntalloc: what it writes into the ring is byte for byte what a 32-bit guest writes."""

from __future__ import annotations

from lab import Lab
from scenario import Scenario

BENCH = "/lab/bin/dom0-bench"
BLKBACK = "/lab/bin/blkback"


def run(lab: Lab) -> None:
    lab.sh(f"test -x {BENCH} || {{ echo 'build dom0-bench beside blkback'; exit 1; }}; modprobe xen-gntalloc")
    lab.step("XenStore over /dev/xen/xenbus, where xenstored's socket is out of sight")
    listed = lab.sh(f"unshare -m sh -c 'mount -t tmpfs none /run/xenstored && {BLKBACK} list 0'")
    assert listed.startswith("Vdev"), listed
    image = lab.image("layouts", "8M")
    # gntalloc gives pages back when nobody maps them any more, a moment after the end: one case at a time.
    for protocol, order in (("x86_32-abi", 0), ("x86_32-abi", 2), ("x86_64-abi", 0), ("arm-abi", 1)):
        for extra in ("", " --no-persistent"):
            lab.step(f"{protocol}, rings of {1 << order} page(s){extra}")
            lab.sh(f"{BLKBACK} attach 0 {image},raw,xvdq,rw --wait 0 && "
                   f"{BENCH} guest --hypervisor xen --vdev xvdq --protocol {protocol} --ring-order {order}{extra} --verify; "
                   f"code=$?; {BLKBACK} detach 0 xvdq && exit $code", 120)


LAYOUTS = Scenario("layouts", "the 32-bit and the other layouts of the ring, dom0 itself playing the frontend", run,
                   backends=("ours",), order=42)
