"""Guests with each kernel that Debian has, whatever dom0's is: the frontends differ, the backends must not care."""

from __future__ import annotations

import network as net
from lab import Disk, GuestConfig, Lab
from scenario import Scenario
from worlds import KERNELS

FIO = ("fio --name=verify --filename=/dev/xvda --direct=1 --ioengine=libaio --iodepth=32 --rw=randwrite --bsrange=512-64k "
       "--blockalign=512 --size=4M --verify=crc32c --verify_fatal=1 --output-format=terse --terse-version=3")


def boot(lab: Lab, kernel: str) -> None:
    net.link(lab, "xenbr0", "bridge", "10.17.0.1/24")
    offered = net.offer_dom0(lab, small=6)
    for kind in ("pv", "pvh"):
        lab.step(f"a {kind.upper()} guest with Linux {kernel}")
        data, more = lab.image(f"data-{kind}", "32M"), lab.loop(lab.image(f"more-{kind}", "48M"))
        guest = lab.guest(GuestConfig("visitor", kind=kind, kernel=kernel, disks=[Disk(data, "xvda")], vifs=["bridge=xenbr0"]), 240)
        lab.note(f"{kind}: kernel", guest.run("uname -r").strip())
        lab.note(f"{kind}: features", guest.features("xvda"))
        guest.run(FIO, 240)
        net.give(guest, "eth0", "10.17.0.12/24")
        net.ping(lab, "10.17.0.12")
        net.fetch(lab, "dom0 to guest", "10.17.0.1", offered, guest)

        guest.attach(Disk(more, "xvdb"))
        guest.run("[ $(cat /sys/block/xvdb/queue/discard_max_bytes) -gt 0 ] && blkdiscard -o 32M -l 8M /dev/xvdb")
        written = guest.run("mkfs.ext4 -q -F /dev/xvdb && mount -t ext4 /dev/xvdb /mnt && "
                            "dd if=/dev/urandom of=/mnt/file bs=256k count=16 conv=fsync 2>/dev/null && "
                            "sha256sum < /mnt/file && umount /mnt", 180).split()[0]
        lab.keep_dmesg(guest)
        guest.detach("xvdb")
        guest.wait_device("xvdb", present=False)
        lab.sh(f"e2fsck -fn {more}")
        seen = lab.sh(f"mount -o ro {more} /mnt && sha256sum < /mnt/file; umount /mnt").split()[0]
        assert seen == written, f"sha256 in the guest {written}, on the host {seen}"
        lab.unloop(more)
        guest.poweroff()


def of(kernel: str) -> Scenario:
    return Scenario(f"guest-{kernel}", f"PV and PVH guests with Linux {kernel}: verified I/O, attach, detach, traffic, contents compared",
                    lambda lab: boot(lab, kernel), backends=("ours",), network=True, kernels=(kernel,), order=45)


OLD, NEW, NEWEST = (of(kernel) for kernel in KERNELS)
