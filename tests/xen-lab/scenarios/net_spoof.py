"""A guest that lies: frames it has no right to are seen nowhere. An interface without the filter shows that they were sent."""

from __future__ import annotations

import network as net
from guest import Guest
from lab import GuestConfig, Lab
from scenario import Scenario

OWN, OTHER, HOST = "10.17.0.11", "10.17.0.99", "10.17.0.1"
FORGED_MAC = bytes.fromhex("00163e666666")
OTHERS = f"ip address add {OTHER}/24 dev eth0; {{}}; ip address delete {OTHER}/24 dev eth0"
#: A guest's forgeries with busybox and the kernel's own drivers: (name, script, what such a frame looks like).
FORGERIES = [
    ("another IPv4 source", OTHERS.format(f"ping -c 2 -W 1 -I {OTHER} {HOST}"), lambda frame: net.ipv4_source(frame) == OTHER),
    ("ARP for another's address", OTHERS.format(f"arping -U -c 2 -w 2 -I eth0 -s {OTHER} {OTHER}"),
     lambda frame: frame[12:14] == b"\x08\x06" and frame[28:32] == net.packed(OTHER)),
    ("another Ethernet address", "ip link set eth0 down; ip link set eth0 address 00:16:3e:66:66:66; ip link set eth0 up; "
     f"ping -c 2 -W 1 {HOST}; ip link set eth0 down; ip link set eth0 address $(cat /tmp/mac); ip link set eth0 up",
     lambda frame: frame[6:12] == FORGED_MAC),
    ("another IPv6 source", "ip address add fd17::99/64 dev eth0; ping6 -c 2 -W 1 -I fd17::99 fd17::1; "
     "ip address delete fd17::99/64 dev eth0", lambda frame: net.ipv6_source(frame) == "fd17::99"),
    ("a VLAN tag", "ip link add link eth0 name eth0.7 type vlan id 7; ip address add 10.7.0.11/24 dev eth0.7; ip link set eth0.7 up; "
     "arping -c 2 -w 2 -I eth0.7 10.7.0.1; ip link delete eth0.7", lambda frame: frame[12:14] == b"\x81\x00"),
    ("bridge protocol frames", "brctl addbr br0; echo 1 > /sys/class/net/br0/bridge/stp_state; brctl addif br0 eth0; "
     "ip link set br0 up; sleep 5; ip link set br0 down; brctl delif br0 eth0; brctl delbr br0",
     lambda frame: frame[:6] == b"\x01\x80\xc2\x00\x00\x00"),
    ("a DHCP server's offer", "printf 'interface eth0\\nstart 10.17.0.50\\nend 10.17.0.60\\nlease_file /tmp/leases\\n' > /tmp/udhcpd.conf; "
     f"touch /tmp/leases; udhcpd -f -I {OWN} /tmp/udhcpd.conf & P=$!; sleep 4; kill $P",
     lambda frame: frame[12:14] == b"\x08\x00" and frame[23] == 17 and frame[34:38] == b"\x00\x43\x00\x44"),
]


def spoof(lab: Lab) -> None:
    net.link(lab, "xenbr0", "bridge", f"{HOST}/24", "fd17::1/64")
    mac = "00:16:3e:00:00:02"
    guest = lab.guest(GuestConfig("liar", vifs=[f"mac={mac},bridge=xenbr0,ip={OWN} fd17::11"]))
    prepare(guest)
    net.ping(lab, OWN)
    net.ping(lab, "fd17::11")
    arrived = lie(lab, guest)
    assert not arrived, f"arrived in spite of the filter: {arrived}"
    lab.step("the truth still arrives")
    net.ping(lab, OWN)
    net.ping(lab, HOST, guest)

    lab.step("the same guest without the filter: all of it arrives")
    lab.xl("network-detach liar 0")
    net.wait_removed(guest, "eth0")
    said = lab.sh(f"{lab.program('netback')} attach liar mac={mac},bridge=xenbr0,antispoof=off")
    lab.step(said.strip())
    net.wait_connected(lab, guest, 0)
    prepare(guest)
    net.ping(lab, OWN)
    arrived = lie(lab, guest)
    missing = [name for name, *_ in FORGERIES if name not in arrived]
    assert not missing, f"these were never sent, so that their absence proves nothing: {missing}"
    lab.note("forgeries dropped, and seen without the filter", f"{len(arrived)} of {len(FORGERIES)}")
    # xl knows nothing of what netback itself attached, and would leave it behind.
    lab.sh(f"{lab.program('netback')} detach liar 0")


def prepare(guest: Guest) -> None:
    net.give(guest, "eth0", f"{OWN}/24", "fd17::11/64")
    guest.run("cat /sys/class/net/eth0/address > /tmp/mac; modprobe 8021q; modprobe bridge")


def lie(lab: Lab, guest: Guest) -> list[str]:
    """Send all forgeries and say which of them reached the bridge or any port of it."""
    net.sniff(lab, "xenbr0")
    lab.background(DISCOVER)
    for _, script, _ in FORGERIES:
        # The guest's programs fail where nobody answers: that is what is wanted.
        guest.try_run(f"{script} > /dev/null 2>&1", 60)
        guest.run(f"ip address replace {OWN}/24 dev eth0; ip address replace fd17::11/64 dev eth0")
    frames = net.sniffed(lab)
    return [name for name, _, looks_so in FORGERIES if any(looks_so(frame) for frame in frames)]


#: Somebody in dom0 who asks for an address, so that a guest's DHCP server has someone to answer.
DISCOVER = f"{net.BUSYBOX} udhcpc -f -i xenbr0 -s /bin/true -t 1000 -T 1"

SPOOF = Scenario("net-spoof", "forged frames of a real guest are dropped; without the filter they arrive", spoof, backends=("ours",),
                 network=True, order=63)
