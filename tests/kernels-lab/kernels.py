"""Which kernels, and what the machine around them is made of. Changing a line here rebuilds what depends on it."""

from __future__ import annotations

from dataclasses import dataclass

#: The root file system is one for all kernels: our programs are built against this Debian's C library or an older one.
ROOT_SUITE = "bookworm"


@dataclass(frozen=True)
class Kernel:
    """A kernel of the table: what it is called there, and the Debian suite its package comes from."""

    name: str
    suite: str


#: The oldest that is supported, the one in between, and the newest Debian has.
KERNELS = (Kernel("6.1", "bookworm"), Kernel("6.12", "trixie"), Kernel("newest", "sid"))

#: What builds storage and networks inside, and what the cells look at them with.
ROOT_PACKAGES = [
    "kmod", "iproute2", "procps", "util-linux", "fdisk", "e2fsprogs", "xfsprogs", "btrfs-progs", "lvm2", "dmsetup",
    "thin-provisioning-tools", "cryptsetup-bin", "mdadm", "nfs-kernel-server", "nfs-common", "nbd-client", "qemu-utils", "bindfs",
    "nftables", "iputils-ping", "python3", "python3-libnbd",
]

#: What the initrd loads to reach the root disk; some are built into some kernels.
INITRD_MODULES = ["virtio_pci", "virtio_blk", "crc32c_generic", "crc32c", "ext4"]

#: Folders of modules below lib/modules/VERSION/kernel that go to the machine; all of them would be 400 MB.
MODULE_FOLDERS = [
    "arch/x86/crypto", "block", "crypto", "lib", "fs/ext4", "fs/jbd2", "fs/xfs", "fs/btrfs", "fs/fuse", "fs/overlayfs",
    "fs/nfs", "fs/nfsd", "fs/nfs_common", "fs/lockd", "fs/nls", "net/sunrpc", "net/bridge", "net/llc", "net/802", "net/8021q", "net/netfilter", "net/sched",
    "net/ipv4/netfilter", "net/ipv6/netfilter", "drivers/block", "drivers/md", "drivers/virtio", "drivers/char/hw_random",
]
MODULE_FILES = [
    "fs/mbcache.ko", "fs/configfs/configfs.ko", "fs/netfs/netfs.ko", "fs/fscache/fscache.ko", "fs/grace.ko", "drivers/net/tun.ko", "drivers/net/dummy.ko",
    "drivers/net/veth.ko", "drivers/scsi/scsi_debug.ko", "drivers/scsi/scsi_mod.ko", "drivers/scsi/scsi_common.ko",
    "drivers/scsi/sd_mod.ko", "drivers/scsi/virtio_scsi.ko", "drivers/char/virtio_console.ko",
]
