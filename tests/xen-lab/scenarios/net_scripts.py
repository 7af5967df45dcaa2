"""network-bridge and its kin in a real dom0: no guest, cards that are pairs of virtual ones, a machine on the wire behind them."""

from __future__ import annotations

import network as net
from lab import Lab
from scenario import Scenario

SCRIPTS = "/etc/xen/scripts"
CARD, OWN, OUTSIDE = "eth0", "10.18.0.1", "10.18.0.254"
#: How dom0's network is, in a form that is the same again when everything was put back.
STANDING = ("ip -o address | sed 's/^[0-9]*: //; s/valid_lft.*//'; ip route show table all; ip -6 route show table all | sed 's/ proto kernel.*//'; "
            "ip -o link | sed 's/^[0-9]*: //; s/ qdisc .*link/ link/; s/@if[0-9]*//; s/^\\(.*\\) state [A-Z]*/\\1/'; nft list ruleset; "
            "cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding; ls /run/bridge-scripts 2>/dev/null | grep -v lock; true")
#: What the administrator has besides. Nothing of ours may touch it.
ADMIN = "table inet admin { chain input { type filter hook input priority 0; policy accept; tcp dport 23 counter drop comment \"mine\"; }; }"


def scripts(lab: Lab) -> None:
    net.outside(lab, CARD, f"{OWN}/24", f"{OUTSIDE}/24")
    lab.sh(f"ip address add fd18::1/64 dev {CARD} nodad; ip route add default via {OUTSIDE}; ip route add 10.99.0.0/16 via {OUTSIDE}")
    lab.sh(f"nft '{ADMIN}'")
    admin = lab.sh("nft list table inet admin")
    # Somebody's session, over which the administrator types.
    session = net.ticker(lab, OWN)
    lab.background(f"ip netns exec outside {net.NET} tick {OWN} 5002")
    session.alive()
    before = net.settled(lab, STANDING)

    lab.step("network-bridge start, twice; stop")
    lab.links.append("xenbr0")
    mac = lab.sh(f"cat /sys/class/net/{CARD}/address")
    start = f"{SCRIPTS}/network-bridge start netdev={CARD} bridge=xenbr0"
    lab.sh(start)
    assert lab.sh("cat /sys/class/net/xenbr0/address") == mac
    assert f"inet {OWN}/24" in lab.sh("ip address show dev xenbr0") and "inet " not in lab.sh(f"ip address show dev {CARD}")
    routes = lab.sh("ip route")
    assert "default via 10.18.0.254 dev xenbr0" in routes and "10.99.0.0/16 via 10.18.0.254 dev xenbr0" in routes, routes
    session.alive()
    bridged = net.settled(lab, STANDING)
    assert "nothing to do" in lab.sh(start)
    net.same(lab, STANDING, bridged, "a second start")
    lab.note("network-bridge status", lab.sh(f"{SCRIPTS}/network-bridge status bridge=xenbr0").strip().splitlines()[1])
    lab.sh(f"{SCRIPTS}/network-bridge stop netdev={CARD} bridge=xenbr0")
    session.alive()
    net.same(lab, STANDING, before, "network-bridge stop")

    lab.step("layout=xen3: eth0 becomes peth0, vif0.0 and peth0 in xenbr0, dom0's eth0 as before")
    lab.sh(f"{start} layout=xen3")
    lab.links += ["peth0"]
    assert sorted(lab.sh("ls /sys/class/net/xenbr0/brif").split()) == ["peth0", "vif0.0"]
    assert lab.sh("cat /sys/class/net/peth0/address").strip() == "fe:ff:ff:ff:ff:ff"
    assert "NOARP" in lab.sh("ip link show peth0")
    assert lab.sh(f"cat /sys/class/net/{CARD}/address") == mac and f"inet {OWN}/24" in lab.sh(f"ip address show dev {CARD}")
    net.ping(lab, OUTSIDE)
    session.alive()
    lab.sh(f"{SCRIPTS}/network-bridge stop netdev={CARD} bridge=xenbr0")
    session.alive()
    net.same(lab, STANDING, before, "network-bridge stop layout=xen3")
    session.complete()

    two_bridges(lab, before)
    tagged_xen3(lab, before)
    bond(lab, before)

    lab.step("network-nat; the administrator's table stays as it is")
    lab.sh(f"{SCRIPTS}/network-nat start netdev={CARD}")
    assert "masquerade" in lab.sh("nft list table inet xen-nat")
    lab.sh(f"{SCRIPTS}/network-nat stop")
    net.same(lab, STANDING, before, "network-nat stop")
    assert lab.sh("nft list table inet admin") == admin
    lab.sh(f"nft delete table inet admin; ip route delete 10.99.0.0/16; ip route delete default")


def two_bridges(lab: Lab, before: str) -> None:
    lab.step("two bridges by the wrapper of the handbooks")
    lab.links += ["eth1", "xenbr1"]
    lab.sh("ip link add eth1 type veth peer name wire1 netns outside; ip address add 10.19.0.1/24 dev eth1; ip link set eth1 up; "
           "ip -n outside address add 10.19.0.254/24 dev wire1; ip -n outside link set wire1 up")
    lab.sh(f"cat > {SCRIPTS}/my-network-script <<'END'\n"
           '#!/bin/sh\ndir=$(dirname "$0")\n"$dir/network-bridge" "$@" vifnum=0 netdev=eth0 bridge=xenbr0\n'
           '"$dir/network-bridge" "$@" vifnum=1 netdev=eth1 bridge=xenbr1\nEND\n'
           f"chmod +x {SCRIPTS}/my-network-script; {SCRIPTS}/my-network-script start")
    for number in (0, 1):
        assert lab.sh(f"ls /sys/class/net/xenbr{number}/brif").split() == [f"eth{number}"]
    net.ping(lab, OUTSIDE)
    net.ping(lab, "10.19.0.254")
    lab.sh(f"{SCRIPTS}/my-network-script stop; rm {SCRIPTS}/my-network-script")
    net.unlink(lab, "eth1")
    net.same(lab, STANDING, before, "the wrapper's stop")


def tagged_xen3(lab: Lab, before: str) -> None:
    lab.step("a VLAN of the card in Xen 3's layout: peth0.411 in xenbr411")
    lab.links += ["eth0.411", "peth0.411", "xenbr411"]
    lab.sh("ip link add link eth0 name eth0.411 type vlan id 411; ip address add 10.11.0.1/24 dev eth0.411; ip link set eth0.411 up; "
           "ip -n outside link add link wire0 name wire0.411 type vlan id 411; ip -n outside address add 10.11.0.254/24 dev wire0.411; "
           "ip -n outside link set wire0.411 up")
    lab.sh(f"{SCRIPTS}/network-bridge start netdev=eth0.411 vifnum=0 bridge=xenbr411 layout=xen3")
    assert "peth0.411" in lab.sh("ls /sys/class/net/xenbr411/brif").split()
    net.ping(lab, "10.11.0.254")
    lab.sh(f"{SCRIPTS}/network-bridge stop netdev=eth0.411 vifnum=0 bridge=xenbr411")
    net.ping(lab, "10.11.0.254")
    net.unlink(lab, "eth0.411")
    net.same(lab, STANDING, before, "the VLAN's stop")


def bond(lab: Lab, before: str) -> None:
    lab.step("a bond keeps its slaves in both layouts")
    lab.links += ["bond0", "pbond0", "slave0", "slave1"]
    lab.sh("ip link add bond0 type bond mode active-backup miimon 100; for n in 0 1; do ip link add slave$n type dummy; "
           "ip link set slave$n master bond0; done; ip address add 10.20.0.1/24 dev bond0; ip link set bond0 up")
    for layout, name in (("bridge", "bond0"), ("xen3", "pbond0")):
        lab.sh(f"{SCRIPTS}/network-bridge start netdev=bond0 bridge=xenbr0 layout={layout}")
        assert lab.sh(f"cat /sys/class/net/{name}/bonding/slaves").split() == ["slave0", "slave1"], layout
        assert name in lab.sh("ls /sys/class/net/xenbr0/brif").split()
        lab.sh(f"{SCRIPTS}/network-bridge stop netdev=bond0 bridge=xenbr0")
        assert lab.sh("cat /sys/class/net/bond0/bonding/slaves").split() == ["slave0", "slave1"], f"after {layout}"
        assert "inet 10.20.0.1/24" in lab.sh("ip address show dev bond0")
    net.unlink(lab, "bond0", "slave0", "slave1")
    net.same(lab, STANDING, before, "the bond's stop")


SCRIPTS_SCENARIO = Scenario("net-scripts", "network-bridge in both layouts under a session, two bridges, VLANs, bonds, network-nat", scripts,
                            backends=("ours",), network=True, order=59)
