"""Guests on bridges: everything libxl does to an interface, and bytes that are compared on both ends."""

from __future__ import annotations

import network as net
from lab import GuestConfig, Lab
from scenario import Scenario

MACS = ("00:16:3e:5f:77:fd", "00:16:3e:5f:77:fc")
OFFLOADS_OFF = "ethtool -K eth0 tx off sg off tso off gso off gro off"


def bridge(lab: Lab) -> None:
    net.link(lab, "xenbr0", "bridge", "10.17.0.1/24", "fd17::1/64")
    net.link(lab, "xenbr1", "bridge", "10.17.1.1/24")
    net.link(lab, "xenbr2", "bridge", "10.17.2.1/24")
    vifs = [f"mac={mac}, bridge=xenbr{devid}" for devid, mac in enumerate(MACS)]
    if lab.backend == "ours":
        one = lab.guest(GuestConfig("one", vcpus=2, vifs=vifs))
    else:
        # Two of the stock scripts at once do not end within libxl's 40 s on a busy machine.
        one = lab.guest(GuestConfig("one", vcpus=2, vifs=vifs[:1]))
        lab.xl(f"network-attach one {vifs[1].replace(',', ' ')}")
    net.give(one, "eth0", "10.17.0.11/24", "fd17::11/64")
    net.give(one, "eth1", "10.17.1.11/24")

    lab.step("both interfaces, as the guest, xl and the bridges see them")
    for devid, mac in enumerate(MACS):
        net.wait_connected(lab, one, devid)
        assert one.run(f"cat /sys/class/net/eth{devid}/address").strip() == mac
        assert lab.sh(f"readlink /sys/class/net/{net.vif(one, devid)}/master").strip().endswith(f"/xenbr{devid}")
    assert net.listed(lab, one) == {0: (MACS[0], 4), 1: (MACS[1], 4)}, lab.xl("network-list one")
    for name, value in net.agreed(lab, one, 0).items():
        lab.note(name, value)
        assert value != "0" and value != "no", f"{name} was not agreed on"
    for address in ("10.17.0.11", "fd17::11", "10.17.1.11"):
        net.ping(lab, address)

    mine, hers = net.offer_dom0(lab, large=24, small=6), net.offer(one, large=24, small=6)
    net.fetch(lab, "guest to dom0, 24 MiB", "10.17.0.11", hers, file="large")
    net.fetch(lab, "dom0 to guest, 24 MiB", "10.17.0.1", mine, one, file="large")
    net.fetch(lab, "guest to dom0, IPv6", "fd17::11", hers)
    net.fetch(lab, "dom0 to guest, IPv6", "fd17::1", mine, one)

    two = lab.guest(GuestConfig("two", vifs=["bridge=xenbr0"]))
    net.give(two, "eth0", "10.17.0.12/24")
    net.ping(lab, "10.17.0.11", two)
    his = net.offer(two, small=6)
    net.fetch(lab, "guest to guest", "10.17.0.11", hers, two)
    net.fetch(lab, "and back", "10.17.0.12", his, one)

    lab.step("a guest without offloads")
    one.run(OFFLOADS_OFF)
    net.fetch(lab, "guest to dom0, no offloads", "10.17.0.11", hers)
    net.fetch(lab, "dom0 to guest, no offloads", "10.17.0.1", mine, one)
    one.run("ethtool -K eth0 tx on sg on tso on gso on gro on")

    lab.step("MTU 9000")
    lab.sh(f"for link in {net.vif(one, 0)} {net.vif(two, 0)} xenbr0; do ip link set $link mtu 9000; done")
    for guest in (one, two):
        guest.run("ip link set eth0 mtu 9000")
    before = frames(one)
    net.ping(lab, "10.17.0.12", one, "-s 8900")
    assert frames(one) - before < 12, "a ping of 8900 bytes did not go as one frame"
    net.fetch(lab, "guest to guest, MTU 9000", "10.17.0.11", hers, two)
    net.fetch(lab, "dom0 to guest, MTU 9000", "10.17.0.1", mine, one)
    two.poweroff()

    attach_detach(lab, one)


def attach_detach(lab: Lab, guest) -> None:
    domid = guest.domid()
    lab.step(f"xl network-attach {domid} bridge=xenbr2")
    lab.xl(f"network-attach {domid} bridge=xenbr2")
    net.wait_connected(lab, guest, 2)
    net.give(guest, "eth2", "10.17.2.11/24")
    net.ping(lab, "10.17.2.11")
    assert sorted(net.listed(lab, guest)) == [0, 1, 2]
    lab.step(f"xl network-detach {domid} 2; by address")
    lab.xl(f"network-detach {domid} 2")
    gone(lab, guest, 2)
    lab.xl(f"network-attach {guest.name} mac=00:16:3e:00:00:77 bridge=xenbr2 vifname=shop0")
    net.wait_connected(lab, guest, 2)
    assert lab.sh("readlink /sys/class/net/shop0/master").strip().endswith("/xenbr2")
    net.give(guest, "eth2", "10.17.2.11/24")
    net.ping(lab, "10.17.2.11")
    lab.xl(f"network-detach {guest.name} 00:16:3e:00:00:77")
    gone(lab, guest, 2)
    lab.sh("! ip link show shop0 2>/dev/null")
    net.ping(lab, "10.17.0.11")


def gone(lab: Lab, guest, devid: int) -> None:
    """Nothing of the interface is left: link, forwarding entries, filter, XenStore, and not in the guest either."""
    name, domid = net.vif(guest, devid), guest.domid()
    net.wait_removed(guest, f"eth{devid}")
    left = lab.sh(f"ip -o link; bridge fdb; nft list tables; ls /run/bridge-scripts; xenstore-ls -f /local/domain/0/backend/vif/{domid}; "
                  f"xenstore-ls -f /local/domain/{domid}/device/vif; xenstore-ls -f /libxl/{domid}/device/vif")
    found = [line for line in left.splitlines() if name in line or f"/{devid}/" in line]
    assert not found, f"left of {name}: {found}"
    assert devid not in net.listed(lab, guest)


def frames(guest) -> int:
    return int(guest.run("cat /sys/class/net/eth0/statistics/tx_packets"))


BRIDGE = Scenario("net-bridge", "two guests on bridges: ping, TCP with sha256, offloads off, MTU 9000, xl network-attach/-list/-detach",
                  bridge, network=True, order=60)
