"""pvgrub: a boot loader in the guest that reads kernel and initrd from the guest's own disk, by a frontend of its own
(Mini-OS' descendant: one ring page, no persistent grants), and hands the disk over to Linux' frontend."""

from __future__ import annotations

import re

from lab import IMAGES, Disk, GuestConfig, Lab
from scenario import Scenario

CONFIG = """set timeout=0
menuentry lab {{
    linux /boot/{kernel} console=hvc0 quiet loglevel=1 panic=1
    initrd /boot/initrd
}}
"""


def boot(lab: Lab, kind: str, image: str, kernel: str, abi: str) -> None:
    lab.step("a disk with kernel, initrd and grub.cfg")
    config = CONFIG.format(kernel=kernel)
    disk, tree = f"{IMAGES}/grub.img", f"{IMAGES}/grub"
    lab.sh(f"mkdir -p {tree}/boot/grub; cp /lab/boot/{kernel} {tree}/boot/{kernel}; cp /lab/boot/small.cpio.gz {tree}/boot/initrd\n"
           f"cat > {tree}/boot/grub/grub.cfg <<'END'\n{config}END\n"
           f"mkfs.ext4 -q -F -O ^has_journal -d {tree} {disk} 192M && rm -r {tree}", 180)
    data = lab.image("data", "16M")

    lab.step(f"{image} boots it")
    guest = lab.create(GuestConfig("grub", kind=kind, loader=f"/lab/boot/{image}", memory=512,
                                   disks=[Disk(disk, "xvda", access="ro"), Disk(data, "xvdb")]), paused=True)
    domid = guest.domid()
    # What pvgrub prints must not come back to it as if it had been typed: its menu would stop.
    lab.machine.open_console(guest.name)
    lab.xl("unpause grub")
    guest.wait_shell(400)
    connected = lab.sh(f"grep -a 'backend/vbd/{domid}/51712.*protocol' /var/log/lab/blkback.log")
    abis = re.findall(r"protocol\W*(x86_\d+-abi)", connected)
    lab.note("protocols of the disk's frontends", ", ".join(abis))
    assert abis == [abi, "x86_64-abi"], connected

    lab.step("Linux has both disks after it")
    guest.run("dd if=/dev/urandom of=/tmp/x bs=64k count=64 2>/dev/null; dd if=/tmp/x of=/dev/xvdb bs=64k conv=fsync 2>/dev/null; "
              "echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/xvdb bs=64k count=64 2>/dev/null | cmp - /tmp/x")
    written = guest.run("sha256sum < /tmp/x").split()[0]
    guest.run("[ $(cat /sys/block/xvda/ro) = 1 ]; mount -t ext4 -o ro /dev/xvda /mnt && [ -e /mnt/boot/grub/grub.cfg ] && umount /mnt")
    guest.poweroff()
    seen_outside = lab.sh(f"head -c 4194304 {data} | sha256sum").split()[0]
    assert seen_outside == written, f"sha256 in the guest {written}, on the host {seen_outside}"


#: By name only: grub reads some 100 KiB a second here. PV: the kernel in a gzip file, which any program of grub's reads,
#: since the loader knows no zstd.
PV = Scenario("pvgrub-pv", "grub-x86_64-xen.bin reads kernel and initrd from the guest's disk and boots them (PV)",
              lambda lab: boot(lab, "pv", "grub-x86_64-xen.bin", "vmlinux.gz", "x86_64-abi"), backends=("ours",), by_name_only=True, order=42)
PVH = Scenario("pvgrub-pvh", "grub-i386-xen_pvh.bin does, a 32-bit frontend, and then a 64-bit Linux",
               lambda lab: boot(lab, "pvh", "grub-i386-xen_pvh.bin", "vmlinuz", "x86_32-abi"), backends=("ours",), by_name_only=True, order=43)
