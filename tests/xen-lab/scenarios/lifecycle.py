"""Everything libxl does to a disk. Leaks are counted around every scenario, so here only the doing counts."""

from __future__ import annotations

import time

from lab import Disk, GuestConfig, Lab
from scenario import Scenario

#: I/O that goes on in the background of the guest until it is killed or fails.
BUSY = ("(while dd if=/dev/zero of=/dev/{vdev} bs=64k count=64 oflag=direct 2>/dev/null; do :; done) > /dev/null 2>&1 &")


def attach_detach(lab: Lab) -> None:
    device = lab.loop(lab.image("data", "32M"))
    file = lab.image("file", "16M")
    guest = lab.guest(GuestConfig("hot", disks=[Disk(lab.image("first", "8M"), "xvda")]))

    lab.step("a block device and a file, listed, detached")
    guest.attach(Disk(device, "xvdb"))
    guest.attach(Disk(file, "xvdc", access="ro"))
    listing = lab.xl(f"block-list {guest.name}")
    assert len(listing.splitlines()) == 4, f"block-list shows not three disks:\n{listing}"
    assert all(line.split()[3] == "4" for line in listing.splitlines()[1:]), f"not all Connected:\n{listing}"
    assert guest.run("cat /sys/block/xvdc/ro").strip() == "1", "a read-only disk is writable in the guest"
    refused = guest.try_run("dd if=/dev/zero of=/dev/xvdc bs=4k count=1 oflag=direct")
    assert refused.code != 0, "a write to a read-only disk was accepted"
    guest.detach("xvdc")
    guest.wait_device("xvdc", present=False)

    lab.step("detach, attach again under the same name")
    guest.run("mkfs.ext4 -q -F /dev/xvdb\nmount -t ext4 /dev/xvdb /mnt\necho kept > /mnt/file\numount /mnt")
    guest.detach("xvdb")
    guest.wait_device("xvdb", present=False)
    lab.sh(f"e2fsck -fn {device}")
    guest.attach(Disk(device, "xvdb"))
    guest.run("mount -t ext4 /dev/xvdb /mnt\ngrep kept /mnt/file")

    lab.step("detach while it is mounted and written to")
    guest.run("(while dd if=/dev/zero of=/mnt/x bs=64k count=32 conv=fsync 2>/dev/null; do :; done) >/dev/null 2>&1 &\nsleep 1")
    lab.keep_dmesg(guest)
    began = time.monotonic()
    result = lab.machine.run(["xl", "block-detach", guest.name, "xvdb"], 60 * lab.slow)
    lab.note("busy detach", f"{time.monotonic() - began:.1f} s, xl's exit code {result.code}")
    listed = str(Disk("", "xvdb").number()) in lab.xl(f"block-list {guest.name}")
    lab.note("busy detach: still listed", "yes" if listed else "no")
    # Linux' blkfront (5.16 and later) marks the disk dead at once and stops its queues, so a sync in the guest may
    # never return: that guest cannot be shut down any more. What counts is that the host's side comes away clean.
    guest.destroy()
    lab.wait_gone(guest.name)
    lab.sh(f"e2fsck -fy {device} > /dev/null; e2fsck -fn {device}")


def pause_and_destroy(lab: Lab) -> None:
    device = lab.loop(lab.image("data", "32M"))
    guest = lab.guest(GuestConfig("victim", disks=[Disk(device, "xvda")]))
    guest.run(BUSY.format(vdev="xvda"))

    lab.step("pause and unpause under load")
    lab.xl("pause victim")
    time.sleep(2)
    lab.xl("unpause victim")
    guest.run("dd if=/dev/xvda of=/dev/null bs=64k count=8 iflag=direct")

    lab.step("destroy with I/O in flight")
    lab.keep_dmesg(guest)
    guest.destroy()
    lab.wait_gone("victim")


def vanish(lab: Lab) -> None:
    """A frontend whose directory goes away under it, as when a toolstack is killed halfway through a destroy."""
    image = lab.image("data", "16M")
    guest = lab.guest(GuestConfig("ghost", disks=[Disk(image, "xvda")]))
    guest.run(BUSY.format(vdev="xvda"))
    domid = guest.domid()
    lab.keep_dmesg(guest)

    lab.step("the frontend's directory is removed under load")
    lab.sh(f"xenstore-rm /local/domain/{domid}/device/vbd/51712")
    state = f"/local/domain/0/backend/vbd/{domid}/51712/state"
    lab.sh(f"for i in $(seq 200); do [ \"$(xenstore-read {state})\" = 6 ] && exit 0; sleep 0.1; done; "
           f"echo the backend stayed in state $(xenstore-read {state}); exit 1")
    guest.destroy()
    lab.wait_gone("ghost")

    lab.step("the file can be served again")
    again = lab.guest(GuestConfig("again", disks=[Disk(image, "xvda")]))
    again.run("dd if=/dev/xvda of=/dev/null bs=64k count=8 iflag=direct")


def reboot(lab: Lab) -> None:
    image = lab.root_image("root")
    guest = lab.guest(GuestConfig("phoenix", root="xvda", disks=[Disk(image, "xvda")]))
    before = guest.domid()
    guest.run("echo here > /root/mark; sync")
    lab.keep_dmesg(guest)
    lab.xl("reboot phoenix")
    guest.wait_new_domain(before)
    assert guest.run("cat /root/mark", 150).strip() == "here", "what was written before the reboot is gone"


def save_restore(lab: Lab) -> None:
    device = lab.loop(lab.image("data", "32M"))
    guest = lab.guest(GuestConfig("sleeper", memory=256, disks=[Disk(device, "xvda")]))
    guest.run("dd if=/dev/urandom of=/tmp/pattern bs=64k count=64 2>/dev/null; dd if=/tmp/pattern of=/dev/xvda bs=64k oflag=direct 2>/dev/null")
    # I/O goes on while the guest is suspended: blkfront must resend what was in flight.
    guest.run("(while :; do dd if=/tmp/pattern of=/dev/xvda seek=64 bs=64k oflag=direct 2>/dev/null || break; done) >/dev/null 2>&1 &\n"
              "echo $! > /tmp/busy")
    lab.step("save")
    lab.xl("save sleeper /srv/lab/sleeper.save", 180)
    lab.wait_gone("sleeper")
    lab.step("restore")
    lab.xl("restore /srv/lab/sleeper.save", 180)
    guest.restored()
    guest.run("kill $(cat /tmp/busy); sleep 1; wait", 60)
    lab.step("compare")
    guest.run("dd if=/dev/xvda bs=64k count=64 iflag=direct 2>/dev/null | cmp - /tmp/pattern && "
              "dd if=/dev/xvda bs=64k skip=64 count=64 iflag=direct 2>/dev/null | cmp - /tmp/pattern", 60)


ATTACH = Scenario("attach-detach", "xl block-attach, block-list, block-detach, also of a read-only and of a busy disk",
                  attach_detach, order=20)
DESTROY = Scenario("pause-destroy", "pause, unpause, destroy with I/O in flight", pause_and_destroy, order=21)
REBOOT = Scenario("reboot", "reboot of a guest with its root on a sparse file", reboot, order=22)
SAVE = Scenario("save-restore", "xl save and restore with I/O in flight, data compared", save_restore, order=23)
VANISH = Scenario("vanish", "a frontend that vanishes from XenStore under load", vanish, backends=("ours",), order=33)
