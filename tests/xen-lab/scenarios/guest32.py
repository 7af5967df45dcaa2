"""A 32-bit guest: its requests have another layout (x86_32-abi), which a backend must tell from the `protocol` key."""

from __future__ import annotations

from lab import Disk, GuestConfig, Lab
from scenario import Scenario


def run(lab: Lab) -> None:
    image = lab.image("data", "32M")
    # PVH: Xen 4.17 in Debian has no 32-bit PV any more, and neither has Linux.
    guest = lab.guest(GuestConfig("old", kind="pvh", kernel="i386", disks=[Disk(image, "xvda")]))
    assert guest.run("uname -m").strip() in ("i686", "i386")
    protocol = lab.sh(f"xenstore-read /local/domain/{guest.domid()}/device/vbd/51712/protocol").strip()
    lab.note("protocol", protocol)
    assert protocol == "x86_32-abi", protocol
    written = guest.run("dd if=/dev/urandom of=/tmp/x bs=64k count=64 2>/dev/null; dd if=/tmp/x of=/dev/xvda bs=64k oflag=direct 2>/dev/null; "
                        "sync; echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/xvda bs=12k count=300 2>/dev/null | cmp -n 3686400 - /tmp/x; "
                        "sha256sum < /tmp/x").split()[0]
    guest.poweroff()
    seen = lab.sh(f"head -c 4194304 {image} | sha256sum").split()[0]
    assert seen == written, f"sha256 in the guest {written}, on the host {seen}"


GUEST32 = Scenario("guest-32bit", "a 32-bit PVH guest (x86_32-abi): write, read, compare with the host", run, by_name_only=True,
                   order=41, worlds=("4.17",))
