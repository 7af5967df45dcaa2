"""The kinds of storage an administrator has, each built on fresh disks."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

from system import Media, Program, becomes, discarded, flushes, sh

MIB = 1 << 20
SIZE = 8 * MIB
GROWN = 16 * MIB


@dataclass
class Storage:
    """What is attached, and what to hold it to."""

    target: str
    #: Disks (sdX) that have to see a flush when the guest flushes; empty for memory.
    media: list[str] = field(default_factory=list)
    #: Makes it GROWN bytes large; None where this kind cannot grow while it is in use.
    grow: Callable[[], object] | None = None
    #: Where the host reads the content; the target itself unless that is no path.
    content: str = ""
    #: Whether discard has to be offered.
    discard: bool = True
    #: Whether what was discarded reads as zeros.
    zeros: bool = True
    #: How much storage is used, in any unit: falls when the guest discards. None: the disk below counts discards.
    used: Callable[[], int] | None = None
    #: Whether others are kept out (NBD knows no locks).
    locked: bool = True
    #: Whether a write is on the medium when it is answered, so that a flush has nothing left to do there.
    stable_writes: bool = False

    def path(self) -> Path:
        return Path(self.content or self.target)

    def flushes(self) -> int:
        return sum(flushes(disk) for disk in self.media)

    def settle(self) -> None:
        """What file systems below have to write is written."""
        os.sync()

    def freed(self) -> int:
        """Rises when the guest discards."""
        return -self.used() if self.used else sum(discarded(disk) for disk in self.media)


def disk_path(media: Media, sectors: int = 512) -> tuple[str, str]:
    disk = media.take(sectors)
    return disk, f"/dev/{disk}"


# ---- files

def file_in(folder: str, media: list[str], **more) -> Storage:
    """A sparse image in a folder."""
    path = f"{folder}/disk.img"
    sh(f"truncate -s {SIZE} {path}")
    more.setdefault("used", lambda: os.stat(path).st_blocks)
    return Storage(path, media, grow=lambda: os.truncate(path, GROWN), **more)


def mounted(media: Media, mkfs: str, folder: str = "/srv/fs", sectors: int = 512) -> tuple[str, str]:
    disk, device = disk_path(media, sectors)
    sh(f"{mkfs} {device}; mkdir -p {folder}; mount {device} {folder}", 180)
    return disk, folder


def on_filesystem(mkfs: str, module: str, sectors: int = 512, **more) -> Callable[[Media], Storage]:
    def make(media: Media) -> Storage:
        sh(f"modprobe {module}")
        disk, folder = mounted(media, mkfs, sectors=sectors)
        return file_in(folder, [disk], **more)
    return make


def btrfs(media: Media) -> Storage:
    storage = on_filesystem("mkfs.btrfs -q", "btrfs")(media)

    def used() -> int:
        # st_blocks of a hole is right at once; what a discard frees goes with the transaction.
        sh("sync -f /srv/fs")
        return os.stat(storage.target).st_blocks
    storage.used = used
    return storage


def tmpfs(media: Media) -> Storage:
    sh("mkdir -p /srv/fs; mount -t tmpfs tmpfs /srv/fs")
    return file_in("/srv/fs", [])


def overlay(media: Media) -> Storage:
    sh("modprobe overlay")
    disk, folder = mounted(media, "mkfs.ext4 -q", "/srv/below")
    sh(f"cd {folder}; mkdir lower upper work /srv/fs; mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work /srv/fs")
    return file_in("/srv/fs", [disk])


def fuse(media: Media) -> Storage:
    """bindfs hands everything on to the ext4 below, but has no way to punch a hole."""
    sh("modprobe fuse")
    disk, folder = mounted(media, "mkfs.ext4 -q", "/srv/below")
    sh(f"mkdir /srv/fs; bindfs {folder} /srv/fs")
    return file_in("/srv/fs", [disk], discard=False)


def nfs(media: Media) -> Storage:
    """The kernel's server and client, both here. No grace period: there is nobody whose locks could come back."""
    sh("modprobe nfsd; modprobe nfsv4")
    disk, folder = mounted(media, "mkfs.ext4 -q", "/srv/below")
    sh("mountpoint -q /proc/fs/nfsd || mount -t nfsd nfsd /proc/fs/nfsd; mkdir -p /run/rpc_pipefs /var/lib/nfs/nfsdcld /srv/fs")
    sh("mountpoint -q /run/rpc_pipefs || mount -t rpc_pipefs rpc_pipefs /run/rpc_pipefs; echo 10 > /proc/fs/nfsd/nfsv4gracetime || true")
    sh("touch /etc/exports; rpc.mountd -N 3")
    sh(f"exportfs -o rw,no_root_squash,insecure,no_subtree_check,fsid=0 127.0.0.1:{folder}; rpc.nfsd -N 3 4")
    sh("echo Y > /proc/fs/nfsd/v4_end_grace || true")
    sh("mount -t nfs4 -o vers=4.2,port=2049 127.0.0.1:/ /srv/fs")
    # A direct write that is one request asks the server for FILE_SYNC (FLUSH_COND_STABLE in Linux' fs/nfs/direct.c).
    storage = file_in("/srv/fs", [disk], stable_writes=True)
    storage.used = lambda: os.stat(f"{folder}/disk.img").st_blocks
    return storage


# ---- devices

def whole(media: Media, sectors: int = 512) -> Storage:
    """A disk as it is: 1 GiB would be too much to read often, so only its partition is used by the cells."""
    disk, device = disk_path(media, sectors)
    sh(f"echo 'start=2048, size={SIZE // sectors}' | sfdisk -q --no-tell-kernel {device}; partx -u {device} || partx -a {device}")
    becomes("the partition's node", lambda: Path(f"{device}1").exists())

    def grow() -> None:
        sh(f"resizepart() {{ echo ', {GROWN // sectors}' | sfdisk -q --no-reread --no-tell-kernel --force -N 1 {device}; partx -u {device}; }}; resizepart")
    return Storage(f"{device}1", [disk], grow)


def partition(media: Media) -> Storage:
    return whole(media)


def partition_4k(media: Media) -> Storage:
    return whole(media, 4096)


def volume_group(media: Media, disks: int = 1) -> list[str]:
    taken = [media.take() for _ in range(disks)]
    sh("modprobe dm-mod; vgcreate -q vg " + " ".join(f"/dev/{disk}" for disk in taken))
    return taken


def linear(media: Media) -> Storage:
    disks = volume_group(media)
    sh("lvcreate -q -y -W n -n disk -L 8M vg")
    return Storage("/dev/vg/disk", disks, lambda: sh("lvextend -q -L 16M vg/disk"))


def striped(media: Media) -> Storage:
    disks = volume_group(media, 2)
    sh("lvcreate -q -y -W n -n disk -L 8M -i 2 vg")
    return Storage("/dev/vg/disk", disks, lambda: sh("lvextend -q -L 16M vg/disk"))


def thin(media: Media) -> Storage:
    """Discarded blocks go back to the pool; dm-thin promises no zeros, but unmapped blocks read as such."""
    disks = volume_group(media)
    sh("modprobe dm-thin-pool; lvcreate -q -y --type thin-pool -n pool -L 256M vg; lvcreate -q -y -V 8M --thinpool pool -n disk vg")

    def used() -> int:
        return int(re.search(r" (\d+)/\d+ (\d+)/\d+ ", sh("dmsetup status vg-pool-tpool"))[2])
    return Storage("/dev/vg/disk", disks, lambda: sh("lvextend -q -L 16M vg/disk"), used=used)


def snapshot(media: Media) -> Storage:
    """The snapshot itself is the guest's disk: it has the size of its origin, for good, and cannot discard."""
    disks = volume_group(media)
    sh("modprobe dm-snapshot; lvcreate -q -y -W n -n origin -L 8M vg; lvcreate -q -y -s -n disk -L 32M vg/origin")
    return Storage("/dev/vg/disk", disks, discard=False)


def crypt(media: Media) -> Storage:
    disks = volume_group(media)
    sh("modprobe dm-crypt; lvcreate -q -y -W n -n below -L 24M vg; echo -n secret > /run/key")
    sh("cryptsetup -q luksFormat --pbkdf pbkdf2 --pbkdf-force-iterations 1000 /dev/vg/below /run/key", 180)
    sh("cryptsetup open --key-file /run/key /dev/vg/below secret", 180)
    return Storage("/dev/mapper/secret", disks, lambda: sh("lvextend -q -L 32M vg/below; cryptsetup -q resize --key-file /run/key secret"),
                   discard=False)


def raid1(media: Media) -> Storage:
    disks = [media.take(), media.take()]
    devices = " ".join(f"/dev/{disk}" for disk in disks)
    sh(f"modprobe raid1; mdadm -q --create /dev/md0 --run --level=1 --raid-devices=2 --metadata=1.2 --assume-clean --size={SIZE >> 10} {devices}")
    return Storage("/dev/md0", disks, lambda: sh(f"mdadm -q --grow /dev/md0 --size={GROWN >> 10} --assume-clean"))


def loop(media: Media) -> Storage:
    disk, folder = mounted(media, "mkfs.ext4 -q")
    sh(f"truncate -s {SIZE} {folder}/disk.img")
    device = sh(f"losetup --direct-io=on -f --show {folder}/disk.img").strip()
    return Storage(device, [disk], lambda: sh(f"truncate -s {GROWN} {folder}/disk.img; losetup -c {device}"),
                   used=lambda: os.stat(f"{folder}/disk.img").st_blocks)


def nbd_server(media: Media) -> tuple[str, str]:
    disk, folder = mounted(media, "mkfs.ext4 -q")
    path = f"{folder}/disk.img"
    sh(f"truncate -s {SIZE} {path}")
    Program("qemu-nbd", ["qemu-nbd", "-f", "raw", "--discard=unmap", "--persistent", "--shared=8", "-k", "/run/nbd.sock", path], Path("/run"))
    becomes("qemu-nbd's socket", lambda: Path("/run/nbd.sock").exists())
    return disk, path


def nbd_kernel(media: Media) -> Storage:
    """The kernel's client, over a server's socket."""
    sh("modprobe nbd nbds_max=4")
    disk, path = nbd_server(media)
    sh("nbd-client -unix /run/nbd.sock /dev/nbd0")
    return Storage("/dev/nbd0", [disk], used=lambda: os.stat(path).st_blocks)


def nbd_direct(media: Media) -> Storage:
    """blkback's own client."""
    disk, path = nbd_server(media)
    return Storage("nbd:unix:/run/nbd.sock", [disk], content=path, locked=False, used=lambda: os.stat(path).st_blocks)


def null_blk(media: Media) -> Storage:
    before = set(os.listdir("/sys/block"))
    sh("modprobe null_blk nr_devices=0; mount -t configfs configfs /sys/kernel/config 2>/dev/null || true")
    sh("mkdir /sys/kernel/config/nullb/lab4k; cd /sys/kernel/config/nullb/lab4k; echo 4096 > blocksize; echo 8 > size; echo 1 > memory_backed;"
       " echo 1 > discard; echo 4 > cache_size; echo 1 > power")
    name = (set(os.listdir("/sys/block")) - before).pop()       # nullb0, or the folder's name on newer kernels
    becomes("its node", lambda: Path(f"/dev/{name}").exists())
    return Storage(f"/dev/{name}", [name])


def scsi_debug(media: Media) -> Storage:
    before = set(os.listdir("/sys/block"))
    sh("modprobe scsi_debug sector_size=4096 dev_size_mb=8 lbpu=1 delay=0")
    becomes("scsi_debug's disk", lambda: set(os.listdir("/sys/block")) - before)
    name = (set(os.listdir("/sys/block")) - before).pop()
    becomes("its node", lambda: Path(f"/dev/{name}").exists())
    return Storage(f"/dev/{name}", [name])


def delayed(media: Media) -> Storage:
    """Every request takes 50 ms longer."""
    disk, device = disk_path(media)
    sh(f"modprobe dm-delay; dmsetup create slow --table '0 {SIZE // 512} delay {device} 0 50'")

    def grow() -> None:
        sh(f"dmsetup reload slow --table '0 {GROWN // 512} delay {device} 0 50'; dmsetup suspend slow; dmsetup resume slow")
    return Storage("/dev/mapper/slow", [disk], grow)


#: In the order of the table. Each is the name there, and how it is built.
KINDS: dict[str, Callable[[Media], Storage]] = {
    "file on ext4": on_filesystem("mkfs.ext4 -q", "ext4"),
    "file on XFS": on_filesystem("mkfs.xfs -q -f", "xfs"),
    "file on btrfs": btrfs,
    "file on tmpfs": tmpfs,
    "file on NFS 4.2": nfs,
    "file on overlay": overlay,
    "file on FUSE": fuse,
    "file on 4096-byte sectors": on_filesystem("mkfs.ext4 -q -b 4096", "ext4", 4096),
    "partition": partition,
    "partition, 4096-byte sectors": partition_4k,
    "LVM linear": linear,
    "LVM striped": striped,
    "LVM thin": thin,
    "LVM snapshot": snapshot,
    "dm-crypt (LUKS)": crypt,
    "md RAID1": raid1,
    "loop": loop,
    "nbd, the kernel's client": nbd_kernel,
    "nbd, blkback's client": nbd_direct,
    "null_blk, 4096-byte sectors": null_blk,
    "scsi_debug, 4096-byte sectors": scsi_debug,
    "dm-delay": delayed,
}
