"""What all machines have in common; worlds.py says what they differ in. Changing a line rebuilds exactly what depends on it."""

from __future__ import annotations

import hashlib
from pathlib import Path

#: Module folders copied into dom0 (below lib/modules/VERSION/kernel). The whole package is 380 MB, mostly
#: drivers no emulated machine has.
DOM0_MODULE_FOLDERS = [
    "arch", "block", "crypto", "lib", "fs/ext4", "fs/jbd2", "fs/fuse", "fs/ocfs2", "fs/overlayfs",
    "fs/dlm", "net/8021q", "net/802", "net/bridge", "net/llc", "net/netfilter", "net/openvswitch", "net/sched",
    "net/ipv4/netfilter", "net/ipv6/netfilter", "drivers/block", "drivers/xen", "drivers/virtio", "drivers/md",
    "drivers/char/hw_random", "drivers/net/xen-netback", "drivers/net/bonding", "net/tls",
]
DOM0_MODULE_FILES = [
    "fs/mbcache.ko", "drivers/char/virtio_console.ko", "drivers/net/tun.ko", "drivers/net/dummy.ko",
    "drivers/net/veth.ko", "drivers/net/ifb.ko", "drivers/net/xen-netfront.ko", "drivers/scsi/scsi_debug.ko",
    "drivers/scsi/scsi_mod.ko", "drivers/scsi/scsi_common.ko", "drivers/scsi/sd_mod.ko",
]

#: What dom0's initrd loads to reach its root disk and the payload disk; dependencies are resolved.
DOM0_INITRD_MODULES = ["virtio_pci", "virtio_blk", "crc32c_generic", "ext4"]

#: Units that cost a dom0 under systemd time at its start, or wake up while something is measured.
MASKED_UNITS = ["apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service",
                "fstrim.timer", "grub-common.service", "getty@tty1.service", "systemd-pstore.service", "systemd-logind.service"]

#: What every guest has.
GUEST_MODULES = ["xen-blkfront", "xen-netfront", "crc32c_generic", "ext4"]
#: What an HVM guest's emulated hardware wants: libxl's card is an RTL8139 unless `model=` says otherwise.
EMULATED_MODULES = ["ata_piix", "sd_mod", "sr_mod", "8139cp"]
#: What guests have besides, loaded by the scenario that wants it (`modprobe`): tagged frames, bridge protocol frames,
#: a cluster file system.
GUEST_MODULES_LATER = ["8021q", "bridge", "ocfs2", "ocfs2_stack_o2cb", "ocfs2_dlm", "configfs"]
#: Programs copied out of dom0's tree, with their libraries, for the guests that measure.
GUEST_TOOLS = [
    "/opt/lab/fio", "/sbin/mke2fs", "/sbin/e2fsck", "/sbin/resize2fs", "/sbin/blkdiscard", "/bin/lsblk", "/bin/dd",
    "/usr/bin/iperf3", "/sbin/ethtool", "/sbin/blockdev",
    # ocfs2_hb_ctl is run by the kernel when a file system is unmounted.
    "/sbin/mkfs.ocfs2", "/sbin/mount.ocfs2", "/sbin/ocfs2_hb_ctl", "/usr/bin/flock",
]
#: pvgrub, a guest's boot loader as its kernel= in xl.cfg.
PVGRUB_PACKAGE = "grub-xen-host"
#: A 32-bit guest (x86_32-abi): kernel, frontend, busybox. Its kernel runs 32-bit programs only, busybox included.
I386_KERNEL = "linux-image-686-pae:i386"
I386_BUSYBOX = "busybox-static:i386"
#: The libraries a guest's fio keeps; see elf.py.
FIO_LIBRARIES = ["libc.so", "libm.so", "libz.so", "libaio.so", "libnuma.so", "ld-linux"]


def key(*parts: object) -> str:
    """A short name for a recipe: lists, strings and the contents of files go in."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.read_bytes() if isinstance(part, Path) else repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]
