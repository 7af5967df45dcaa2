"""Routed, translated, host-only and tagged networks: one guest that is given an interface of each kind after the other.

`outside` is a network namespace of dom0 behind a pair of virtual cards: what a machine on the wire sees.
"""

from __future__ import annotations

import network as net
from guest import Guest
from lab import GuestConfig, Lab
from scenario import Scenario

CARD, CARD_ADDRESS, OUTSIDE = "card0", "10.18.0.1", "10.18.0.254"
SCRIPTS = "/etc/xen/scripts"


def topologies(lab: Lab) -> None:
    net.outside(lab, CARD, f"{CARD_ADDRESS}/24", f"{OUTSIDE}/24")
    lab.sh(f"ip route add default via {OUTSIDE}")
    offered = net.offer_outside(lab, small=8)
    before = net.settled(lab, STANDING)
    guest = lab.guest(GuestConfig("tenant"))
    routed(lab, guest, offered)
    translated(lab, guest, offered)
    host_only(lab, guest)
    net.same(lab, STANDING, before, "afterwards")
    vlan_bridges(lab, guest)
    vlan_port(lab, guest)
    guest.poweroff()
    net.same(lab, STANDING, before, "afterwards")
    lab.sh(f"ip route delete default via {OUTSIDE}")


#: What has to be the same again after each kind of network was taken away.
STANDING = (f"ip -4 route show table all; ip -o -4 address; cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding "
            f"/proc/sys/net/ipv4/conf/{CARD}/proxy_arp; nft list tables; ip neigh show proxy; ip -o link | sed 's/^[0-9]*: //' | grep -v vif")


def attach(lab: Lab, guest: Guest, spec: str, program: str = "xl") -> None:
    """Interface 0 of the guest."""
    if program == "xl":
        lab.xl(f"network-attach {guest.name} {spec.replace(',', ' ')}")     # a word each, unlike xl.cfg
    else:
        lab.sh(f"{lab.program('netback')} attach {guest.name} {spec}")
    net.wait_connected(lab, guest, 0)


def detach(lab: Lab, guest: Guest, program: str = "xl") -> None:
    name = net.vif(guest, 0)
    if program == "xl":
        lab.xl(f"network-detach {guest.name} 0")
    else:
        lab.sh(f"{lab.program('netback')} detach {guest.name} 0")
    net.wait_removed(guest, "eth0")
    lab.sh(f"! ip link show {name} 2>/dev/null")


def routed(lab: Lab, guest: Guest, offered: dict[str, str]) -> None:
    lab.step("routed: the guest's own subnet, dom0's end its gateway")
    lab.sh(f"{SCRIPTS}/network-route start netdev={CARD}")
    attach(lab, guest, f"script=vif-route,ip=192.168.17.1/24,gatewaydev={CARD}")
    ends = lab.sh(f"ip -o -4 address show dev {net.vif(guest, 0)}")
    assert "192.168.17.254/24" in ends, f"dom0's end is not 192.168.17.254/24: {ends}"
    net.give(guest, "eth0", "192.168.17.1/24", gateway="192.168.17.254")
    lab.sh(f"ip -n outside route add 192.168.17.0/24 via {CARD_ADDRESS}")
    net.ping(lab, "192.168.17.1")
    net.ping(lab, OUTSIDE, guest)
    net.sniff(lab, "wire0", "outside")
    net.fetch(lab, "from outside to the guest, routed", OUTSIDE, offered, guest)
    assert "192.168.17.1" in net.sources(net.sniffed(lab)), "the guest's own address is not seen outside"
    detach(lab, guest)

    lab.step("routed: one address of the card's network, dom0 answering ARP for it")
    attach(lab, guest, f"script=vif-route,ip=10.18.0.77,gatewaydev={CARD}")
    net.give(guest, "eth0", "10.18.0.77/24", gateway=OUTSIDE)
    net.ping(lab, OUTSIDE, guest)
    lab.sh(f"ip netns exec outside {net.BUSYBOX} ping -c 2 -W 5 10.18.0.77")
    detach(lab, guest)
    lab.sh(f"{SCRIPTS}/network-route stop netdev={CARD}")


def translated(lab: Lab, guest: Guest, offered: dict[str, str]) -> None:
    lab.step("NAT: nobody outside sees the guest's address")
    lab.sh(f"{SCRIPTS}/network-nat start netdev={CARD} network=10.0.0.0/16")
    attach(lab, guest, f"script=vif-nat,gatewaydev={CARD}")
    # As the stock vif-nat has it: 10.x.y.1 for the first interface of domain 256·x + y, its gateway 127 above.
    domid = guest.domid()
    own, gateway = f"10.{domid >> 8}.{domid & 255}.1", f"10.{domid >> 8}.{domid & 255}.128"
    net.give(guest, "eth0", f"{own}/16", gateway=gateway)
    rules = lab.sh("nft list ruleset")
    assert "masquerade" in rules, f"no masquerade rule:\n{rules}"
    net.ping(lab, OUTSIDE, guest)
    net.sniff(lab, "wire0", "outside")
    net.fetch(lab, "from outside to the guest, NAT", OUTSIDE, offered, guest)
    seen = net.sources(net.sniffed(lab))
    assert CARD_ADDRESS in seen and own not in seen, f"seen outside: {seen}"
    lab.note("NAT: sources seen on the wire", ", ".join(sorted(seen)))
    detach(lab, guest)
    lab.sh(f"{SCRIPTS}/network-nat stop")


def host_only(lab: Lab, guest: Guest) -> None:
    lab.step("host-only: a dummy device in the card's place")
    lab.links.append("xenhost0")
    lab.sh(f"{SCRIPTS}/network-dummy start bridge=xenhost0 address=192.168.99.254/24")
    ports = lab.sh("ls /sys/class/net/xenhost0/brif")
    assert ports.startswith("dummy"), f"no dummy device in xenhost0: {ports!r}"
    attach(lab, guest, "bridge=xenhost0")
    net.give(guest, "eth0", "192.168.99.1/24")
    net.ping(lab, "192.168.99.254", guest)
    net.silent(lab, OUTSIDE, guest)
    detach(lab, guest)
    lab.sh(f"{SCRIPTS}/network-dummy stop bridge=xenhost0")


def vlan_bridges(lab: Lab, guest: Guest) -> None:
    lab.step("VLANs 411 and 412 of the card, a bridge each")
    lab.links += ["xenbr411", "xenbr412"]
    lab.sh(f"{SCRIPTS}/network-vlan start netdev={CARD} vlan=411,412")
    for vlan in (411, 412):
        ports = lab.sh(f"ls /sys/class/net/xenbr{vlan}/brif").split()
        assert ports == [f"{CARD}.{vlan}"], f"ports of xenbr{vlan}: {ports}"
        lab.sh(f"ip -n outside link add link wire0 name wire0.{vlan} type vlan id {vlan} && "
               f"ip -n outside address add 10.{vlan - 400}.0.254/24 dev wire0.{vlan} && ip -n outside link set wire0.{vlan} up")
    attach(lab, guest, "bridge=xenbr411")
    # Both networks' addresses on it: only the one of VLAN 411 may work.
    net.give(guest, "eth0", "10.11.0.1/24", "10.12.0.1/24")
    net.sniff(lab, "wire0", "outside")
    net.ping(lab, "10.11.0.254", guest)
    net.silent(lab, "10.12.0.254", guest)
    tags = {net.tag(frame) for frame in net.sniffed(lab) if frame[6:12] == net.mac(guest)}
    assert tags == {411}, f"the guest's frames have the tags {tags} on the wire"
    detach(lab, guest)
    attach(lab, guest, "bridge=xenbr412")
    net.give(guest, "eth0", "10.12.0.1/24")
    net.ping(lab, "10.12.0.254", guest)
    detach(lab, guest)
    lab.sh(f"{SCRIPTS}/network-vlan stop netdev={CARD}")


def vlan_port(lab: Lab, guest: Guest) -> None:
    # xl 4.17 has no vlan=, 4.19 has; our own attach command has it.
    program = "netback" if lab.world.name == "4.17" else "xl"
    lab.step(f"vlan=10p/20 on an interface ({program}), VLAN filtering of the bridge")
    lab.links.append("xenbr5")
    lab.sh(f"ip link add xenbr5 type bridge vlan_filtering 1 && ip link set {CARD} master xenbr5 && "
           f"bridge vlan add dev {CARD} vid 10 && bridge vlan add dev {CARD} vid 20 && bridge vlan add dev {CARD} vid 30 && "
           "ip link set xenbr5 up")
    for vlan in (10, 20, 30):
        lab.sh(f"ip -n outside link add link wire0 name wire0.{vlan} type vlan id {vlan} && "
               f"ip -n outside address add 10.{vlan}.0.254/24 dev wire0.{vlan} && ip -n outside link set wire0.{vlan} up")
    attach(lab, guest, "bridge=xenbr5,vlan=10p/20", program)
    net.give(guest, "eth0", "10.10.0.1/24")
    guest.run("modprobe 8021q\n" + "".join(
        f"ip link add link eth0 name eth0.{vlan} type vlan id {vlan}\nip address add 10.{vlan}.0.1/24 dev eth0.{vlan}\nip link set eth0.{vlan} up\n"
        for vlan in (20, 30)))
    net.sniff(lab, "wire0", "outside")
    net.ping(lab, "10.10.0.254", guest)
    net.ping(lab, "10.20.0.254", guest)
    net.silent(lab, "10.30.0.254", guest)
    tags = {net.tag(frame) for frame in net.sniffed(lab) if frame[6:12] == net.mac(guest)}
    assert tags == {10, 20}, f"the guest's frames have the tags {tags} on the wire"
    guest.run("ip link delete eth0.20; ip link delete eth0.30")
    detach(lab, guest, program)
    lab.sh(f"ip link set {CARD} nomaster")
    net.unlink(lab, "xenbr5")


TOPOLOGIES = Scenario("net-topologies", "routed, NAT, host-only, VLAN bridges, vlan= on an interface", topologies, backends=("ours",),
                      network=True, order=62)
