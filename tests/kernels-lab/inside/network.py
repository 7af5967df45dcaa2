"""The network's filter against what a kernel, an administrator and other programs do to it."""

from __future__ import annotations

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

    def filter(self) -> str:
        return run(["tc", "-s", "filter", "show", "dev", self.vif, "ingress"]).stdout

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
            raise Failed(f"{passed} packets with a forged address got through; tc: {last_words(self.first.filter(), 200)}")

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
    """`nft flush ruleset`, as Debian's nftables.service does at each reload: of no concern to the filter."""
    network = Network(folder)
    with report.step("before"):
        network.filters()
    with report.step("flush"):
        sh("nft flush ruleset")
        network.filters()
    network.end(report)


def deleted(media: Media, folder: Path, report: Report) -> None:
    """Somebody deletes the filter at the device, and a part of it."""
    network = Network(folder)
    for what in ("qdisc del dev {} clsact", "filter del dev {} ingress prio 4"):
        with report.step(what.format("vif")):
            before = network.first.filter().count("jited")
            sh("tc " + what.format(network.first.vif))
            becomes("the filter is back by itself", lambda: network.first.filter().count("jited") == before, 20)
            network.filters()
    network.end(report)


#: Sends ARP requests for itself as fast as it can for some seconds, and prints how many, and how long it took.
FLOOD = """
import socket, sys, time
mac, own = bytes.fromhex(sys.argv[1].replace(":", "")), socket.inet_aton(sys.argv[2])
arp = bytes.fromhex("0001080006040001") + mac + own + bytes(6) + socket.inet_aton("10.0.0.99")
out = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
out.bind(("eth0", 0))
began, sent = time.monotonic(), 0
while time.monotonic() - began < 10:
    try:
        sent += out.send(bytes([255] * 6) + mac + bytes.fromhex("0806") + arp) > 0
    except BlockingIOError:
        pass
print(sent, time.monotonic() - began)
"""


def limited(media: Media, folder: Path, report: Report) -> None:
    """A guest that floods the network with ARP: no more than the limit arrives, and honest traffic goes on."""
    network = Network(folder)
    first, second = network.first, network.second
    sh(f"ip netns exec {second.netns} nft 'add table arp flood; add chain arp flood seen {{ type filter hook input priority 0; }}; "
       "add rule arp flood seen arp daddr ip 10.0.0.99 counter'")
    with report.step("before"):
        network.works()
    with report.step("flood"):
        (folder / "flood.py").write_text(FLOOD)
        sent, seconds = sh(f"ip netns exec {first.netns} python3 {folder}/flood.py {first.mac} {first.address}").split()
        # Behind the flood, on the same way: when it has come, all that was to come has.
        network.works()
        listed = sh(f"ip netns exec {second.netns} nft list table arp flood")
        arrived = int(listed.split("packets ")[1].split()[0])
        report.facts["ARP sent, arrived"] = f"{sent} in {float(seconds):.0f} s, {arrived}"
        # 500 a second, and two seconds' worth at once; a little more while the last ones were on their way.
        most = 500 * (float(seconds) + 2) * 1.25
        if int(sent) < 2 * most:
            raise Failed(f"only {sent} frames were sent: this cell shows nothing")
        if not 100 < arrived < most:
            raise Failed(f"{arrived} of {sent} frames arrived, {most:.0f} may; tc: {last_words(first.filter(), 400)}")
    with report.step("afterwards"):
        network.filters()
    network.end(report)


def unfilterable(media: Media, folder: Path, report: Report) -> None:
    """A kernel without cls_bpf: no guest gets on the network, and it is said why."""
    with report.step("attach is refused"):
        ban = Path("/etc/modprobe.d/no-cls_bpf.conf")
        ban.write_text("install cls_bpf /bin/false\n")
        try:
            sh("modprobe -r cls_bpf")
            try:
                Network(folder)
            except Failed as failed:
                if "sch_ingress and cls_bpf" not in str(failed):
                    raise
                report.facts["said"] = last_words(str(failed), 200)
            else:
                raise Failed("a guest is on the network without a filter")
            up = [line for line in sh("ip -o link").splitlines() if ": vif" in line and ",UP" in line]
            if up:
                raise Failed(f"an interface without a filter is on: {up}")
        finally:
            ban.unlink()


def reloaded(media: Media, folder: Path, report: Report) -> None:
    """What `nft list ruleset` prints can be loaded again, and still filters."""
    network = Network(folder)
    with report.step("list and check"):
        # For guests on a bridge nothing of ours is in nftables; for others there is.
        network.command("bridge-scripts", "network-nat", "start", "netdev=xenbr0")
        sh("nft list ruleset > /run/rules; nft -c -f /run/rules; grep -q masquerade /run/rules")
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


class InVlans(Network):
    """Guests in VLANs of one bridge: the first in 10, the second in 10 and, with tags, in 20, the third in 20."""

    VLANS = {"guest1": "10", "guest2": "10p/20", "guest3": "20"}

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.third = Guest(self, 3)
        self.attach(self.third)
        # The first sends with tags too, though it may not.
        for guest in (self.first, self.second):
            sh(f"ip -n {guest.netns} link add link eth0 name eth0.20 type vlan id 20; ip -n {guest.netns} link set eth0.20 up")
        for guest, device in ((self.first, "eth0.20"), (self.second, "eth0.20"), (self.third, "eth0")):
            sh(f"ip -n {guest.netns} address replace {self.in_20(guest)}/24 dev {device}")
        # That no ARP answer comes is not to be what keeps them apart.
        for device, address in (("eth0", self.third.address), ("eth0.20", self.in_20(self.third))):
            sh(f"ip -n {self.first.netns} neighbour replace {address} lladdr {self.third.mac} dev {device} nud permanent")

    @staticmethod
    def in_20(guest: Guest) -> str:
        return guest.address.replace("10.0.0.", "10.0.20.")

    def attach(self, guest: Guest) -> None:
        self.command("netback", "attach", guest.name, f"mac={guest.mac},bridge=xenbr0,vlan={self.VLANS[guest.name]}", "--wait",
                     f"{PATIENCE:.0f}", "--hypervisor", self.hypervisor)
        guest.process.expect("eth0 is connected")
        guest.configure()

    def together(self) -> None:
        """Who is in a VLAN with another reaches it."""
        self.works()
        becomes("the second and the third reach each other in VLAN 20", lambda: self.reaches(self.second, "eth0.20", self.in_20(self.third)))

    def apart(self) -> None:
        """Nobody else is reached; those who may be are, before and after."""
        self.together()
        for guest, device, address in ((self.first, "eth0", self.third.address), (self.first, "eth0.20", self.in_20(self.third)),
                                       (self.first, "eth0.20", self.in_20(self.second)), (self.second, "eth0", self.third.address)):
            if self.reaches(guest, device, address):
                raise Failed(f"{guest.name} reaches {address} through {device}, in whose VLAN it is not: {last_words(run(['bridge', 'vlan']).stdout)}")
        self.together()

    @staticmethod
    def reaches(guest: Guest, device: str, address: str) -> bool:
        return run(["ip", "netns", "exec", guest.netns, "ping", "-q", "-c", "2", "-W", "2", "-I", device, address]).returncode == 0

    def end(self, report: Report) -> None:
        with report.step("detach of the third"):
            self.command("netback", "detach", self.third.name, "0", "--hypervisor", self.hypervisor)
        super().end(report)


def in_vlans(media: Media, folder: Path, report: Report) -> None:
    """Guests in VLANs, tagged and untagged: they reach whom they should and nobody else, also after netback was killed."""
    network = InVlans(folder)
    with report.step("before"):
        network.apart()
    for round_ in range(2):
        with report.step(f"kill {round_ + 1}"):
            network.restart()
            network.apart()
    network.end(report)


NETWORK = {
    "filter": filtered,
    "filter after a kill": restarted,
    "filter after nft flush ruleset": flushed,
    "filter deleted by tc": deleted,
    "rate": limited,
    "no cls_bpf": unfilterable,
    "nft list ruleset, loaded again": reloaded,
    "br_netfilter, FORWARD drops": forward_dropped,
    "VLANs after a kill": in_vlans,
}
