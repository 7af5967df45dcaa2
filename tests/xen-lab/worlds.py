"""The worlds: each is a Debian dom0 on one version of Xen. The scenarios are the same in all of them.

What differs between two worlds is written down here and nowhere else; what they share is in recipe.py.
"""

from __future__ import annotations

from dataclasses import dataclass

#: What dom0 has in every world: what Xen's scripts call, what the scenarios measure with. python3 comes with xen-utils
#: (pygrub needs it), which is why the agent inside dom0 may be Python.
_TOOLS = ["qemu-system-xen", "fio", "iperf3", "ethtool", "nftables", "bridge-utils", "strace", "ocfs2-tools", "qemu-utils"]


@dataclass(frozen=True)
class Kernel:
    """A Debian kernel: dom0's in a world, and every guest's that asks for it by this name."""

    name: str
    suite: str
    meta: str = "linux-image-amd64"     # never the cloud flavour: it cannot be a dom0


KERNELS = {kernel.name: kernel for kernel in (Kernel("6.1", "bookworm"), Kernel("6.12", "trixie"), Kernel("newest", "sid"))}


@dataclass(frozen=True)
class World:
    name: str                       # Xen's version, as in Debian's package names
    suite: str
    packages: tuple[str, ...]       # dom0's, for debootstrap
    kernel: str                     # dom0's, and that of guests that do not ask for another: a name in KERNELS
    init: str                       # what dom0's initrd goes on to
    memory_mb: int                  # the whole machine's
    dom0_mb: int
    arguments: str = ""             # for dom0's kernel
    systemd: bool = False           # dom0 is started by it; the agent is a unit
    guest32: bool = False           # has a 32-bit guest besides
    boot_seconds: float = 180       # how long dom0 may take until it answers

    @property
    def hypervisor(self) -> str:
        return f"xen-hypervisor-{self.name}-amd64"

    @property
    def xen_arguments(self) -> str:
        return (f"console=com1 com1=115200,8n1 dom0_mem={self.dom0_mb}M,max:{self.dom0_mb}M loglvl=all guest_loglvl=all "
                "conring_size=1M")

    @property
    def dom0_arguments(self) -> str:
        # No comma: QEMU takes one for the beginning of the next module.
        return f"console=hvc0 root=/dev/vda quiet printk.devkmsg=on lab.init={self.init} {self.arguments}".rstrip()


#: Xen 4.17: started by hand, with an init of the lab's own. The fast one.
XEN_4_17 = World(
    "4.17", "bookworm",
    ("kmod", "iproute2", "procps", "util-linux", "e2fsprogs", "xen-utils-4.17", "xenstore-utils", *_TOOLS),
    kernel="6.1", init="/lab/dom0/init", memory_mb=4096, dom0_mb=1536, guest32=True)

#: Xen 4.20: booted by systemd with the packages' own units, oxenstored, udev. Slower, and nearer to what users have.
XEN_4_20 = World(
    "4.20", "trixie",
    ("kmod", "iproute2", "procps", "util-linux", "e2fsprogs", "xen-utils-4.20", "xenstore-utils", *_TOOLS,
     "systemd-sysv", "udev", "dbus", "login"),
    kernel="6.12", init="/sbin/init", memory_mb=4608, dom0_mb=2048, boot_seconds=400, systemd=True,
    arguments="net.ifnames=0 fsck.mode=skip systemd.show_status=0")

WORLDS = {world.name: world for world in (XEN_4_17, XEN_4_20)}
#: Without a choice.
DEFAULT_WORLD = XEN_4_17.name
