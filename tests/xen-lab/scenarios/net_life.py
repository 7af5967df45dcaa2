"""An interface through its guest's life: save and restore with a connection that goes on, reboot, destroy under load. And
through its backend's: killed and started again."""

from __future__ import annotations

import time

import network as net
from lab import GuestConfig, Lab
from scenario import Scenario

MAC = "00:16:3e:00:00:01"


def life(lab: Lab) -> None:
    net.link(lab, "xenbr0", "bridge", "10.17.0.1/24")
    guest = lab.guest(GuestConfig("nomad", memory=256, vifs=[f"mac={MAC},bridge=xenbr0"]))
    net.give(guest, "eth0", "10.17.0.11/24")
    net.ping(lab, "10.17.0.11")

    ticker = net.ticker(lab, "10.17.0.1")
    net.tick_from(guest, "10.17.0.1")
    ticker.alive()
    lab.step("save")
    lab.xl("save nomad /srv/lab/nomad.save", 180)
    lab.wait_gone("nomad")
    before = ticker.last()
    lab.step("restore")
    lab.xl("restore /srv/lab/nomad.save", 180)
    guest.restored()
    lab.step(f"the connection that stood at {before} goes on under the new domain id")
    ticker.wait(before + 5, 120)
    net.wait_connected(lab, guest, 0)
    guest.run("kill $(cat /tmp/ticker.pid); sleep 1")
    ticker.complete()

    lab.step("reboot")
    lab.keep_dmesg(guest)
    old = guest.domid()
    lab.xl("reboot nomad")
    guest.wait_new_domain(old)
    guest.rebooted()
    net.give(guest, "eth0", "10.17.0.11/24")
    net.wait_connected(lab, guest, 0)
    assert guest.run("cat /sys/class/net/eth0/address").strip() == MAC
    assert guest.domid() != old
    lab.sh(f"! ip link show vif{old}.0 2>/dev/null")
    net.ping(lab, "10.17.0.11")

    lab.step("destroy with both directions busy")
    lab.background("iperf3 -s -B 10.17.0.1")
    guest.run("(iperf3 -c 10.17.0.1 -t 600 --bidir || echo failed > /tmp/failed) > /dev/null 2>&1 &\nsleep 5; ! [ -e /tmp/failed ]")
    name = net.vif(guest, 0)
    flowing = packets(lab, name)
    time.sleep(1)
    assert packets(lab, name) > flowing + 20, "no load on the interface"
    lab.keep_dmesg(guest)
    guest.destroy()
    lab.wait_gone("nomad")
    left = lab.sh("ip -o link; bridge fdb; nft list tables; ls /run/bridge-scripts; xenstore-ls -f /local/domain/0/backend/vif 2>/dev/null; true")
    found = [line for line in left.splitlines() if name in line or f"/{name[3:-2]}/" in line]
    assert not found, f"left of {name}: {found}"


def killed(lab: Lab) -> None:
    net.link(lab, "xenbr0", "bridge", "10.17.0.1/24")
    guests = [lab.guest(GuestConfig(name, vcpus=2, vifs=["bridge=xenbr0"])) for name in ("one", "two")]
    for number, guest in enumerate(guests, 11):
        net.give(guest, "eth0", f"10.17.0.{number}/24")
    ticker = net.ticker(lab, "10.17.0.1")
    net.tick_from(guests[0], "10.17.0.1")
    ticker.alive()
    net.ping(lab, "10.17.0.12", guests[0])
    lab.step("kill -9 of netback, five times; the connection goes on each time")
    for _ in range(5):
        lab.kill_netback()
        before = ticker.last()
        time.sleep(1)
        lab.serve_netback()
        ticker.wait(before + 5, 60)
    lab.step("also with both directions busy")
    lab.background("iperf3 -s -B 10.17.0.1")
    guests[1].run("(iperf3 -c 10.17.0.1 -t 600 --bidir || echo failed > /tmp/failed) > /dev/null 2>&1 &\nsleep 5; ! [ -e /tmp/failed ]")
    name = net.vif(guests[1], 0)
    for _ in range(3):
        lab.kill_netback()
        lab.serve_netback()
        lab.sh(f"n=0; until [ -e /sys/class/net/{name} ]; do n=$((n+1)); [ $n -lt 100 ] || exit 1; sleep 0.2; done")
        flowing = packets(lab, name)
        time.sleep(5)
        assert packets(lab, name) > flowing + 100, f"{name} stands still"
    guests[1].run("! [ -e /tmp/failed ]; killall iperf3")
    net.ping(lab, "10.17.0.12", guests[0])
    guests[0].run("kill $(cat /tmp/ticker.pid); sleep 1")
    ticker.complete()


def packets(lab: Lab, name: str) -> int:
    return sum(int(word) for word in lab.sh(f"cat /sys/class/net/{name}/statistics/[rt]x_packets").split())


LIFE = Scenario("net-life", "save and restore with a TCP connection alive, reboot, destroy under load", life, network=True, order=61)
KILLED = Scenario("net-killed", "netback is killed and started again, under TCP connections that go on", killed,
                  backends=("ours",), network=True, order=62)
