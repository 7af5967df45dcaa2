"""A disk that changes under a running guest: it grows, or another one is put into its drive."""

from __future__ import annotations

from guest import Guest
from lab import Disk, GuestConfig, Lab
from scenario import Scenario

MIB = 1 << 20


def changes(lab: Lab) -> None:
    file = lab.image("file", "32M")
    below = lab.image("below", "32M")
    device = lab.loop(below)
    guest = lab.guest(GuestConfig("taller", disks=[Disk(file, "xvda")]))

    lab.step("a file grows, with a file system on it: truncate, blkback resize, resize2fs")
    guest.run("mkfs.ext4 -q -F /dev/xvda && mount -t ext4 /dev/xvda /mnt && dmesg -c > /dev/null")
    before = blocks(guest)
    lab.sh(f"truncate -s 64M {file}")
    lab.note("blkback resize", lab.sh(f"{lab.program('blkback')} resize taller xvda").strip())
    wait_size(guest, "xvda", 64)
    lab.note("the guest's log", guest.run("dmesg | grep -i capacity").strip().splitlines()[-1].partition("] ")[2])
    written = guest.run("resize2fs /dev/xvda > /dev/null 2>&1\n"
                        # More than there was room for.
                        "dd if=/dev/urandom of=/mnt/new bs=256k count=144 conv=fsync 2>/dev/null; sha256sum < /mnt/new", 120).split()[0]
    after = blocks(guest)
    assert after > 1.8 * before, f"the file system had {before} blocks and has {after}"
    guest.run("umount /mnt")

    lab.step("a block device grows: losetup -c, and the backend sees it by itself")
    guest.attach(Disk(device, "xvdb"))
    pattern = guest.run("dd if=/dev/urandom of=/tmp/pattern bs=64k count=64 2>/dev/null; sha256sum < /tmp/pattern").split()[0]
    refused = guest.try_run("dd if=/tmp/pattern of=/dev/xvdb bs=64k seek=704 oflag=direct")
    assert refused.code != 0, "a write past the end was accepted"
    lab.sh(f"truncate -s 48M {below} && losetup -c {device}")
    wait_size(guest, "xvdb", 48)
    # The last 4 MiB of the new ones.
    assert write_and_read(guest, "xvdb", 44) == pattern, "what was written to the new part is not what is read"
    lab.keep_dmesg(guest)
    for vdev in ("xvda", "xvdb"):
        guest.detach(vdev)
        guest.wait_device(vdev, present=False)

    lab.step("the host's view after detach")
    lab.sh(f"e2fsck -fn {file}")
    assert lab.sh(f"mount -o ro,loop {file} /mnt && sha256sum < /mnt/new; umount /mnt").split()[0] == written
    assert lab.sh(f"tail -c 4M {below} | sha256sum").split()[0] == pattern

    drive(lab, guest)


def drive(lab: Lab, guest: Guest) -> None:
    blkback = lab.program("blkback")
    digests = {}
    for name, size in (("first", 8), ("second", 12)):
        image = lab.image(name, f"{size}M")
        lab.sh(f"mkdir /srv/lab/{name} && head -c 3M /dev/urandom > /srv/lab/{name}/{name} && "
               f"mkfs.ext4 -q -F -O ^has_journal -d /srv/lab/{name} {image}", 60)
        digests[name] = lab.sh(f"sha256sum < /srv/lab/{name}/{name}").split()[0]

    def there(name: str, size: int) -> None:
        wait_size(guest, "xvdd", size)
        seen = guest.run(f"mount -t ext4 -o ro /dev/xvdd /mnt && ls /mnt && sha256sum < /mnt/{name} && umount /mnt")
        assert digests[name] in seen, f"{name} in the drive, the guest sees {seen}"

    lab.step("a drive: a disk in it, taken out, another one put in, and the first again")
    guest.attach(Disk("/srv/lab/first.img", "xvdd", "ro", extra="devtype=cdrom"))
    assert guest.run("cat /sys/block/xvdd/ro /sys/block/xvdd/removable").split() == ["1", "1"]
    there("first", 8)
    lab.sh(f"{blkback} eject taller xvdd")
    wait_size(guest, "xvdd", 0)
    # Nobody has it any more: it can be written to.
    lab.sh("qemu-io -f raw -c 'read 0 512' /srv/lab/first.img > /dev/null")
    empty = guest.try_run("dd if=/dev/xvdd of=/dev/null bs=4k count=1 iflag=direct 2>&1")
    assert empty.code != 0 or "0+0 records in" in empty.out, f"an empty drive can be read: {empty.out}"
    wrong = lab.machine.run(["bash", "-c", f"{blkback} insert taller xvdd /srv/lab/none.img 2>&1"], 60 * lab.slow)
    assert wrong.code != 0 and "no such file" in wrong.out, wrong.out
    for name, size in (("second", 12), ("first", 8)):
        lab.sh(f"{blkback} insert taller xvdd /srv/lab/{name}.img")
        there(name, size)
    fixed = lab.image("fixed", "8M")
    guest.attach(Disk(fixed, "xvdc"))
    said = lab.machine.run(["bash", "-c", f"{blkback} eject taller xvdc 2>&1"], 60 * lab.slow)
    assert said.code != 0 and "fixed disk" in said.out, said.out


def blocks(guest: Guest) -> int:
    """The size of the file system at /mnt in the guest, in KiB."""
    return int(guest.run("df -k /mnt | tail -n 1").split()[1])


def wait_size(guest: Guest, vdev: str, mib: int, timeout: float = 40) -> None:
    """Wait until the guest sees a disk of that size."""
    guest.run(f"n=0; until [ $(cat /sys/block/{vdev}/size) = {mib * MIB // 512} ]; do n=$((n+1)); "
              f"[ $n -lt {int(timeout * 5 * guest.lab.slow)} ] || "
              f"{{ echo {vdev} has $(cat /sys/block/{vdev}/size) sectors, not {mib} MiB; exit 1; }}; sleep 0.2; done", timeout * 2)


def write_and_read(guest: Guest, vdev: str, at: int) -> str:
    """Write /tmp/pattern (4 MiB) at a place in MiB; the sha256 of what is there then, past the guest's cache."""
    out = guest.run(f"dd if=/tmp/pattern of=/dev/{vdev} bs=64k seek={at * 16} oflag=direct conv=notrunc,fsync 2>/dev/null\n"
                    f"dd if=/dev/{vdev} bs=64k skip={at * 16} count=64 iflag=direct 2>/dev/null | sha256sum")
    return out.split()[0]


CHANGES = Scenario("disk-changes", "a file and a block device grow under a guest; a drive's disk is taken out and exchanged", changes,
                   backends=("ours",), order=41)
