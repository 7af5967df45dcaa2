"""The network's filter against what a kernel, an administrator and other programs do to it."""

from __future__ import annotations

import time
from pathlib import Path

from cells import Report
from system import Failed, Media, PATIENCE, Program, becomes, last_words, run, sh

#: An address that no guest was given.
FORGED = "10.0.0.77"


class Guest:
    """An emulated guest with eth0 in a namespace of its own, on the bridge, with one address it may use."""

    def __init__(self, network: "Network", number: int) -> None:
        self.name, self.netns, self.address = f"guest{number}", f"guest{number}", f"10.0.0.{number}"
        self.mac = f"00:16:3e:00:00:{number:02x}"
        sh(f"ip netns add {self.netns}; ip -n {self.netns} link set lo up")
        argv = ["dom0-bench", "guest", "--hypervisor", network.hypervisor, "--name", self.name, "--vif", "0", "--netns", self.netns]
        self.process = Program(self.name, argv, network.folder)
        self.domid = self.process.expect("waits for its vif 0").split()[1]
        self.vif = f"vif{self.domid}.0"

    def configure(self) -> None:
        """What the guest's own scripts do, with a forged address beside its own."""
        sh(f"ip -n {self.netns} address replace {self.address}/24 dev eth0; ip -n {self.netns} address replace {FORGED}/32 dev eth0")
        sh(f"ip -n {self.netns} link set eth0 up")

    def probe(self) -> None:
        """Counts what arrives here from the forged address."""
        sh(f"ip netns exec {self.netns} nft 'add table ip probe; add chain ip probe seen {{ type filter hook prerouting"
           f" priority -300; }}; add rule ip probe seen ip saddr {FORGED} counter'")

    def forged(self) -> int:
        listed = sh(f"ip netns exec {self.netns} nft list table ip probe")
        return int(listed.split("packets ")[1].split()[0])

    def pings(self, other: "Guest", source: str, count: int = 2) -> bool:
        return run(["ip", "netns", "exec", self.netns, "ping", "-q", "-c", str(count), "-W", "2", "-I", source, other.address]).returncode == 0


class Network:
    """An emulated machine with netback, a bridge, and two guests on it."""

    def __init__(self, folder: Path, antispoof: bool = True) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.hypervisor = f"emu:{folder}/machine"
        self.machine = Program("emu-xen", ["emu-xen", "serve", "--dir", f"{folder}/machine"], folder)
        self.machine.expect("ready")
        self.starts = 0
        self.serve()
        sh("sysctl -qw net.ipv6.conf.all.disable_ipv6=0; ip link add xenbr0 type bridge; ip link set xenbr0 up")
        self.more = "" if antispoof else ",antispoof=off"
        self.first, self.second = Guest(self, 1), Guest(self, 2)
        for guest in (self.first, self.second):
            self.attach(guest)
        self.neighbours()
        self.second.probe()

    def neighbours(self) -> None:
        """They are known, so that a forged packet needs no forged ARP before it."""
        for one, other in ((self.first, self.second), (self.second, self.first)):
            sh(f"ip -n {one.netns} neighbour replace {other.address} lladdr {other.mac} dev eth0 nud permanent")

    def restart(self) -> None:
        """netback is killed and started again; the guests' drivers notice nothing."""
        self.netback.kill()
        self.serve()

    def serve(self) -> None:
        self.starts += 1
        self.netback = Program(f"netback{self.starts}", ["netback", "serve", "--hypervisor", self.hypervisor], self.folder, BRIDGE_SCRIPTS_RUN=str(self.folder))
        self.netback.expect("serving")

    def command(self, *argv: str) -> str:
        done = run(["env", f"BRIDGE_SCRIPTS_RUN={self.folder}", *argv])
        if done.returncode:
            raise Failed(f"`{' '.join(argv)}`: {last_words(done.stdout)}")
        return done.stdout

    def attach(self, guest: Guest) -> None:
        self.command("netback", "attach", guest.name, f"mac={guest.mac},ip={guest.address},bridge=xenbr0{self.more}", "--wait",
                     f"{PATIENCE:.0f}", "--hypervisor", self.hypervisor)
        guest.process.expect("eth0 is connected")
        guest.configure()

    def works(self) -> None:
        """Own addresses get through."""
        becomes("the guests reach each other", lambda: self.first.pings(self.second, self.first.address))

    def filters(self) -> None:
        """A forged address does not, though the link carries others: those are sent before and after."""
        before = self.second.forged()
        self.works()
        self.first.pings(self.second, FORGED)
        self.works()
        passed = self.second.forged() - before
        if passed:
            raise Failed(f"{passed} packets with a forged address got through; nft: {last_words(run(['nft', 'list', 'ruleset']).stdout, 200)}")

    def end(self, report: Report) -> None:
        with report.step("detach"):
            for guest in (self.first, self.second):
                self.command("netback", "detach", guest.name, "0", "--hypervisor", self.hypervisor)
        with report.step("end of netback"):
            self.netback.stop()
            if "panicked" in self.netback.said():
                raise Failed(f"netback panicked: {last_words(self.netback.said())}")


def filtered(media: Media, folder: Path, report: Report) -> None:
    """The filter filters, and without it the same packets get through: or the other cells would show nothing."""
    open_network = Network(folder / "open", antispoof=False)
    with report.step("without a filter"):
        open_network.works()
        open_network.first.pings(open_network.second, FORGED)
        if not open_network.second.forged():
            raise Failed("forged packets do not arrive even without a filter: this cell tests nothing")
    open_network.end(report)
    for guest in (open_network.first, open_network.second):
        guest.process.kill()
        sh(f"ip netns delete {guest.netns}")
    sh("ip link delete xenbr0")
    network = Network(folder / "closed")
    with report.step("with the filter"):
        network.filters()
    network.end(report)


def restarted(media: Media, folder: Path, report: Report) -> None:
    """netback is killed and started again: the guest's link comes back, and never without its filter."""
    network = Network(folder)
    with report.step("before"):
        network.filters()
    for round_ in range(2):
        with report.step(f"kill {round_ + 1}"):
            network.restart()
            network.filters()
    network.end(report)


def flushed(media: Media, folder: Path, report: Report) -> None:
    """`nft flush ruleset`, as Debian's nftables.service does at each reload."""
    network = Network(folder)
    with report.step("before"):
        network.filters()
    with report.step("flush"):
        sh("nft flush ruleset")
        began = time.monotonic()
        becomes("the filter is back by itself", lambda: network.first.vif in run(["nft", "list", "ruleset"]).stdout, 20)
        report.facts["seconds until it is back"] = round(time.monotonic() - began, 1)
        network.filters()
    network.end(report)


def reloaded(media: Media, folder: Path, report: Report) -> None:
    """What `nft list ruleset` prints can be loaded again, and still filters."""
    network = Network(folder)
    with report.step("list and check"):
        sh("nft list ruleset > /run/rules; nft -c -f /run/rules")
    with report.step("flush and load"):
        sh("{ echo flush ruleset; cat /run/rules; } > /run/rules.all; nft -f /run/rules.all")
        network.filters()
    with report.step("load at the next boot, without the interfaces"):
        # In a namespace of its own, which has none of them.
        sh("ip netns add boot; ip netns exec boot nft -f /run/rules")
    network.end(report)


def forward_dropped(media: Media, folder: Path, report: Report) -> None:
    """br_netfilter and a FORWARD policy of drop, as Docker and firewalls have it, before the guests come."""
    sh("modprobe br_netfilter; sysctl -qw net.bridge.bridge-nf-call-iptables=1 net.bridge.bridge-nf-call-ip6tables=1")
    sh("nft 'add table ip filter; add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }'")
    try:
        network = Network(folder)
        with report.step("guests on the bridge"):
            try:
                network.works()
            except Failed:
                # Then it has to be said, with what to add.
                said = "".join(log.read_text(errors="replace") for log in folder.glob("*.log")) + run(["bridge-scripts", "network-bridge", "status"]).stdout
                if "FORWARD" not in said and "forward" not in said:
                    raise
                report.facts["said"] = last_words(said, 200)
        network.end(report)
    finally:
        sh("sysctl -qw net.bridge.bridge-nf-call-iptables=0 net.bridge.bridge-nf-call-ip6tables=0; nft delete table ip filter; modprobe -r br_netfilter || true")


NETWORK = {
    "filter": filtered,
    "filter after a kill": restarted,
    "filter after nft flush ruleset": flushed,
    "nft list ruleset, loaded again": reloaded,
    "br_netfilter, FORWARD drops": forward_dropped,
}
