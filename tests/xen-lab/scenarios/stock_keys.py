"""What tools see of a disk and of an interface, with the kernel's backends and with ours: every key in XenStore, what the
guest's kernel makes of them, and the interface in dom0. Differences that are meant are listed with a reason; any other fails."""

from __future__ import annotations

import re

import network as net
from guest import Guest
from lab import Disk, GuestConfig, Lab
from machine import CommandFailed
from scenario import Scenario

MAC = "00:16:3e:00:00:09"

NO_LOOP = ("there is no loop device below a file. Who reads these keys takes them for one: the stock script compares "
           "physical-device with those of mounted and attached devices, and gives node to losetup -d")
READ_ONLY = "an image that is only read has nothing to discard; 0 says what a missing key says"
DRIVE = "a CD-ROM's disc can be changed (blkback insert, eject): the drive is removable, which the loop device below was not"
TAP = "a tap in the place of a device of xen-netback's"
FILTER = "the port of a guest whose addresses are known: nothing is learnt, nothing unknown flooded, no spanning tree spoken"
#: (what, why): differences that are meant. `what` is matched from the beginning to the end.
MEANT = [
    (r"vbd \w+ back max-ring-pages", "the older name of max-ring-page-order, which some frontends know alone"),
    (r"vbd (file|cdrom) back (node|physical-device|physical-device-path)", NO_LOOP),
    (r"vbd cdrom back feature-discard", READ_ONLY),
    (r"vbd cdrom (back info|guest removable)", DRIVE),
    (r"vif back carrier", "netif.h has it; xen-netback does not write it"),
    (r"vif dom0 brport/(bpdu_guard|root_block|learning|unicast_flood)", FILTER),
    (r"vif dom0 (driver|version|bus-info|supports-statistics):|vif dom0 (tun_flags|owner|group|uevent)", TAP),
    (r"vif dom0 (rx-checksumming|tx-checksum-\S+|tx-tcp-ecn-segmentation|tx-udp-segmentation|tx-lockless|tx-vlan-\S+):", TAP),
    (r"vif dom0 (speed|duplex)", "said to be unknown; xen-netback says nothing"),
    (r"vif dom0 (carrier_\w+|ifindex|iflink)", "counted anew"),
    (r"vif dom0 qdisc", "frames are queued in the tap; a discipline for each of its 256 queues would cost 6 MB"),
    (r"vif dom0 tx_queue_len", "what a guest may have queued in dom0 is bounded at the tap"),
    (r"vif dom0 queues/tx-0/\w+", TAP),
]


def stock_keys(lab: Lab) -> None:
    seen = {}
    for backend in ("kernel", "ours"):
        lab.use_backend(backend)
        lab.step(f"a file, a block device, a CD-ROM, and an interface in a bridge: {backend}")
        seen[backend] = look(lab)
    unknown = []
    print("| | kernel | ours | |\n|---|---|---|---|")
    for what in sorted(seen["kernel"].keys() | seen["ours"].keys()):
        kernel, ours = (seen[backend].get(what, "—") for backend in ("kernel", "ours"))
        if kernel != ours:
            reason = next((why for pattern, why in MEANT if re.fullmatch(pattern, what)), "")
            print(f"| {what} | {kernel} | {ours} | {reason or '**not known**'} |")
            if not reason:
                unknown.append(f"{what}: the kernel's {kernel}, ours {ours}")
    same = sum(seen["kernel"].get(what) == value for what, value in seen["ours"].items())
    lab.note("the same", f"{same} of {len(seen['ours'])}")
    assert not unknown, "differences that nobody knows of:\n" + "\n".join(unknown)


def look(lab: Lab) -> dict[str, str]:
    """Everything of three disks and an interface, by what it is of."""
    net.link(lab, "xenbr0", "bridge")
    file, below, disc = lab.image("file", "8M"), lab.image("below", "8M"), lab.image("disc", "4M")
    device = lab.loop(below)
    disks = {"file": Disk(file, "xvda"), "phy": Disk(device, "xvdb"), "cdrom": Disk(disc, "xvdc", "ro", extra="devtype=cdrom")}
    guest = lab.guest(GuestConfig("seen", vifs=[f"mac={MAC},bridge=xenbr0"]))
    for disk in disks.values():
        # One after the other: two of the stock scripts at once wait for each other's lock.
        guest.attach(disk)
    guest.run("ip link set eth0 up")
    net.wait_connected(lab, guest, 0)
    found: dict[str, str] = {}
    for name, disk in disks.items():
        found |= keys(lab, guest, f"vbd {name}", "vbd", disk.number())
        found |= files(f"vbd {name} guest", guest.run(
            f"cd /sys/block/{disk.vdev}; for f in size ro removable queue/*; do [ -f $f ] && echo $f $(cat $f 2>/dev/null); done; true"))
    found |= keys(lab, guest, "vif", "vif", 0)
    vif = net.vif(guest, 0)
    found |= files("vif dom0", lab.sh(
        f"cd /sys/class/net/{vif}; for f in * brport/* queues/*/*; do [ -f $f ] && echo $f $(cat $f 2>/dev/null); done; "
        f"ethtool -k {vif} | sed 's/^[[:space:]]*//'; ethtool -i {vif}; "
        f"echo qdisc $(tc qdisc show dev {vif} | grep -v 'parent' | cut -d ' ' -f 2); true"))
    found |= files("vif guest", guest.run(
        "cd /sys/class/net/eth0; for f in address mtu carrier tx_queue_len; do echo $f $(cat $f); done; ls -d queues/*"))
    domid = guest.domid()
    guest.poweroff()
    lab.unloop(device)
    net.unlink(lab, "xenbr0")
    # The stock script's `remove` finds its node gone, and writes that it failed into the directory that is gone too.
    lab.sh(f"xenstore-rm /local/domain/0/backend/vbd/{domid} 2>/dev/null; true")
    # Frames that pass by themselves, and what is named after the interface.
    noise = re.compile(r"vif dom0 (statistics/.*|brport/(change_ack|hold_timer|message_age_timer|forward_delay_timer|port_id|port_no"
                       r"|designated_\w+)|queues/\S+/(tx_timeout|byte_queue_limits.*)|Features)")
    return {what: value.replace(vif, "VIF") for what, value in found.items() if not noise.fullmatch(what)}


def files(title: str, text: str) -> dict[str, str]:
    return {f"{title} {name}": value for name, _, value in (line.partition(" ") for line in text.splitlines()) if name}


def keys(lab: Lab, guest: Guest, title: str, kind: str, number: int) -> dict[str, str]:
    """All keys of both ends, with their permissions; the domain's number is DOM."""
    domid = guest.domid()
    found = {}
    for end, path in (("back", f"/local/domain/0/backend/{kind}/{domid}/{number}"),
                      ("front", f"/local/domain/{domid}/device/{kind}/{number}")):
        for line in lab.sh(f"xenstore-ls -f -p {path}").splitlines():
            if match := re.match(r"(\S+) = \"(.*)\" +\((.*)\)$", line):
                name = match[1].removeprefix(path).lstrip("/")
                value = re.sub(rf"(?<=/){domid}(?=/|$)", "DOM", match[2]) if name != "frontend-id" else "DOM"
                # Chosen anew at each connection.
                value = "…" if re.fullmatch(r"ring-ref\d*|tx-ring-ref|rx-ring-ref|event-channel(-[tr]x)?", name) else value
                found[f"{title} {end} {name}"] = f"{value} ({match[3].replace(str(domid), 'DOM')})"
        if not any(name.startswith(f"{title} {end}") for name in found):
            raise CommandFailed(f"nothing of {path} could be read")
    return found


KEYS = Scenario("stock-keys", "every key of disks and interfaces, the kernel's backends' beside ours, as a table", stock_keys,
                backends=("ours",), network=True, order=45)
