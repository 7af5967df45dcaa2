"""What the network scenarios share: bridges, addresses, transfers that are compared, a connection that must live on.

dom0's side uses busybox and dom0/net.py, a guest's side busybox: nothing that either would not have anyway.
"""

from __future__ import annotations

import ipaddress
import re
import time
from dataclasses import dataclass

from guest import Guest
from lab import Lab
from machine import CommandFailed

BUSYBOX = "/lab/bin/busybox"
NET = "python3 /lab/dom0/net.py"
WEB = "/srv/lab/www"        # below lab.IMAGES: goes with the scenario


def link(lab: Lab, name: str, kind: str, *addresses: str) -> None:
    """Make a link that goes when the scenario ends: `link(lab, "xenbr0", "bridge", "10.17.0.1/24")`."""
    lab.links.append(name)
    lab.sh(f"ip link add {name} type {kind} && "
           + "".join(f"ip address add {address} dev {name} {'nodad' if ':' in address else ''} && " for address in addresses)
           + f"ip link set {name} up")


def unlink(lab: Lab, *names: str) -> None:
    lab.sh("".join(f"ip link delete {name} && " for name in names) + "true")
    lab.links = [name for name in lab.links if name not in names]


def give(guest: Guest, device: str, *addresses: str, gateway: str = "") -> None:
    """Addresses for a guest's interface, which must be there within a moment (there is no udev that waits for it)."""
    guest.run(f"n=0; until [ -e /sys/class/net/{device} ]; do n=$((n+1)); [ $n -lt {int(200 * guest.lab.slow)} ] || "
              f"{{ echo {device} did not come; exit 1; }}; sleep 0.1; done\n"
              "ip link set lo up\n"
              # Without duplicate address detection: seconds of waiting for nothing.
              f"echo 0 > /proc/sys/net/ipv6/conf/{device}/accept_dad\n"
              + "".join(f"ip address add {address} dev {device}\n" for address in addresses)
              + f"ip link set {device} up\n" + (f"ip route add default via {gateway}\n" if gateway else ""))


def wait_removed(guest: Guest, device: str) -> None:
    """Wait until an interface is gone from a guest."""
    guest.run(f"n=0; while [ -e /sys/class/net/{device} ]; do n=$((n+1)); [ $n -lt {int(100 * guest.lab.slow)} ] || "
              f"{{ echo {device} stays; exit 1; }}; sleep 0.2; done")


def ping(lab: Lab, address: str, source: Guest | None = None, options: str = "", patience: int = 30) -> None:
    """Three answers in a row, after a time for links to come up. From dom0, or from a guest."""
    script = (f"n=0; until {BUSYBOX if source is None else 'busybox'} ping -c 1 -W 1 {options} {address} > /dev/null; do n=$((n+1)); "
              f"[ $n -lt {int(patience * lab.slow)} ] || {{ echo no answer from {address}; exit 1; }}; done; "
              f"{BUSYBOX if source is None else 'busybox'} ping -c 3 -W {int(5 * lab.slow)} {options} {address}")
    out = source.run(script, patience * 2 + 60) if source else lab.sh(script, patience * 2 + 60)
    assert " 0% packet loss" in out, out


def silent(lab: Lab, address: str, source: Guest | None = None, options: str = "") -> None:
    """Nobody answers."""
    script = f"ping -c 3 -W 2 {options} {address} > /tmp/ping.out && {{ cat /tmp/ping.out; exit 1; }}; exit 0"
    source.run("busybox " + script) if source else lab.sh(f"{BUSYBOX} " + script)


def settled(lab: Lab, look: str, patience: float = 30) -> str:
    """What the script `look` prints once it stays the same: carriers and addresses take a moment."""
    until = time.monotonic() + patience * lab.slow
    now = lab.sh(look)
    while True:
        time.sleep(1)
        before, now = now, lab.sh(look)
        if now == before and "tentative" not in now:
            return now
        assert time.monotonic() < until, f"does not come to rest:\n{now}"


def same(lab: Lab, look: str, before: str, what: str, patience: float = 10) -> None:
    """What the script `look` prints is what it printed before: after a moment, since the kernel tells of carriers late."""
    until = time.monotonic() + patience * lab.slow
    while True:
        after = lab.sh(look)
        gone = [line for line in before.splitlines() if line not in after.splitlines()]
        new = [line for line in after.splitlines() if line not in before.splitlines()]
        if not gone and not new:
            return
        assert time.monotonic() < until, f"{what}: not as before: gone {gone}, new {new}"
        time.sleep(1)


# ---- transfers


def noise(folder: str, files: dict[str, int]) -> str:
    """A script that makes files of so many MiB and prints their sha256s."""
    return f"mkdir -p {folder}; cd {folder}; " + "".join(
        f"head -c {mib << 20} /dev/urandom > {name}; sha256sum {name}; " for name, mib in files.items())


def offer(guest: Guest, **files: int) -> dict[str, str]:
    """Let a guest offer files of so many MiB by HTTP, over IPv4 and IPv6; returns their sha256s."""
    return digests(guest.run(noise("/tmp/www", files) + "busybox httpd -p 80 -h /tmp/www", 120))


def offer_dom0(lab: Lab, **files: int) -> dict[str, str]:
    made = digests(lab.sh(noise(WEB, files), 120))
    lab.background(f"{BUSYBOX} httpd -f -p 80 -h {WEB}")
    wait_listening(lab, 80)
    return made


def digests(out: str) -> dict[str, str]:
    """What sha256sum prints, as {file: digest}."""
    return {match[2]: match[1] for match in re.finditer(r"^([0-9a-f]{64})  (\S+)$", out, re.M)}


def wait_listening(lab: Lab, port: int, namespace: str = "") -> None:
    """Wait until somebody in dom0 listens there."""
    inside = f"ip netns exec {namespace} " if namespace else ""
    # TCP_LISTEN is 0A in proc_net_tcp.txt.
    found = f"{inside}grep -q ':{port:04X} 0*:0000 0A' /proc/net/tcp /proc/net/tcp6"
    lab.sh(f"for i in $(seq {int(100 * lab.slow)}); do {found} && exit 0; sleep 0.1; done; echo nobody listens on port {port}; exit 1")


def fetch(lab: Lab, what: str, address: str, offered: dict[str, str], into: Guest | None = None, file: str = "small") -> None:
    """Get a file that is offered there, into dom0 or a guest, and compare its sha256."""
    host = f"[{address}]" if ":" in address else address
    command = f"wget -q -O - http://{host}/{file} | sha256sum"
    began = time.monotonic()
    out = into.run("busybox " + command, 240) if into else lab.sh(f"{BUSYBOX} {command}", 240)
    got = out.strip().splitlines()[-1].split()[0]
    assert got == offered[file], f"{what}: sha256 {got}, offered was {offered[file]}: {out}"
    lab.step(f"{what}: sha256 equal, {time.monotonic() - began:.1f} s")


# ---- a connection


@dataclass
class Ticker:
    """One TCP connection into dom0 over which a number comes a few times a second."""

    lab: Lab
    file: str

    def last(self) -> int:
        words = self.lab.sh(f"tail -c 20 {self.file} 2>/dev/null; true").split()
        return int(words[-1]) if words else 0

    def wait(self, beyond: int, timeout: float = 60) -> int:
        """Wait until a number beyond that came over the same connection."""
        until = time.monotonic() + timeout * self.lab.slow
        while (now := self.last()) <= beyond:
            if time.monotonic() > until:
                raise CommandFailed(f"the TCP connection stands still at {now} (waited for more than {beyond})")
            time.sleep(0.5)
        return now

    def alive(self) -> None:
        self.wait(self.last() + 3)

    def complete(self) -> None:
        """Every number came, once and in order: nothing was lost or doubled on the way."""
        numbers = [int(word) for word in self.lab.fetch(self.file).split()[:-1]]      # the last may be cut
        assert numbers == list(range(1, len(numbers) + 1)), f"not 1…{len(numbers)}: {numbers}"


def ticker(lab: Lab, address: str, port: int = 5002) -> Ticker:
    """Listen in dom0 at an address for a connection that ticks."""
    file = f"/srv/lab/tick-{port}"
    lab.background(f"{NET} listen {address} {port} {file}")
    wait_listening(lab, port)
    return Ticker(lab, file)


def tick_from(guest: Guest, address: str, port: int = 5002) -> None:
    guest.run(f"(i=0; while :; do i=$((i+1)); echo $i; sleep 0.25; done) | busybox nc {address} {port} > /dev/null 2>&1 &\n"
              "echo $! > /tmp/ticker.pid")


# ---- what the toolstack and XenStore say


def backend_path(guest: Guest, devid: int) -> str:
    return f"/local/domain/0/backend/vif/{guest.domid()}/{devid}"


def keys(lab: Lab, path: str) -> dict[str, str]:
    """A folder of XenStore as {"queue-0/tx-ring-ref": "8"}."""
    out = lab.sh(f"xenstore-ls -f {path}")
    return {match[1]: match[2] for match in re.finditer(rf'^{re.escape(path)}/(\S+) = "(.*)"$', out, re.M)}


def agreed(lab: Lab, guest: Guest, devid: int) -> dict[str, str]:
    """What both ends of an interface settled on, as the frontend wrote it."""
    front = keys(lab, f"/local/domain/{guest.domid()}/device/vif/{devid}")
    first = "queue-0/" if "queue-0/tx-ring-ref" in front else ""
    return {
        "queues": front.get("multi-queue-num-queues", "1"),
        "split event channels": "yes" if first + "event-channel-tx" in front else "no",
        "sg": front.get("feature-sg", "0"),
        "gso v4": front.get("feature-gso-tcpv4", "0"),
        "gso v6": front.get("feature-gso-tcpv6", "0"),
        "checksum v6": front.get("feature-ipv6-csum-offload", "0"),
        "rx copy": front.get("request-rx-copy", "0"),
    }


def wait_connected(lab: Lab, guest: Guest, devid: int, timeout: float = 60) -> None:
    path = f"{backend_path(guest, devid)}/state"
    lab.sh(f"for i in $(seq {int(timeout * lab.slow * 4)}); do [ \"$(xenstore-read {path} 2>/dev/null)\" = 4 ] && exit 0; sleep 0.25; done; "
           f"echo {path} is $(xenstore-read {path}), not 4; exit 1", timeout + 20)


def listed(lab: Lab, guest: Guest) -> dict[int, tuple[str, int]]:
    """{devid: (MAC, state)} as xl network-list shows them; its third column is the address, its fifth the state."""
    lines = lab.xl(f"network-list {guest.name}").splitlines()[1:]
    return {int(line.split()[0]): (line.split()[2].lower(), int(line.split()[4])) for line in lines}


def vif(guest: Guest, devid: int) -> str:
    return f"vif{guest.domid()}.{devid}"


# ---- a machine on the wire


def outside(lab: Lab, card: str, address: str, outer: str) -> None:
    """A card of dom0's whose other end, wire0, is in the network namespace `outside`."""
    lab.links.append(card)
    lab.sh(f"ip netns add outside && ip link add {card} type veth peer name wire0 netns outside && "
           f"ip address add {address} dev {card} && ip link set {card} up && "
           f"ip -n outside address add {outer} dev wire0 && ip -n outside link set wire0 up && ip -n outside link set lo up")


def offer_outside(lab: Lab, **files: int) -> dict[str, str]:
    """Let `outside` offer files of so many MiB by HTTP; returns their sha256s."""
    folder = "/srv/lab/outside"
    made = digests(lab.sh(noise(folder, files), 120))
    lab.background(f"ip netns exec outside {BUSYBOX} httpd -f -p 80 -h {folder}")
    wait_listening(lab, 80, "outside")
    return made


def sniff(lab: Lab, device: str, namespace: str = "") -> None:
    """Record every frame that arrives at a device, until `sniffed`."""
    inside = f"ip netns exec {namespace} " if namespace else ""
    lab.sh("rm -f /run/lab-frames")
    lab.sniffer = lab.background(f"{inside}{NET} sniff {device} /run/lab-frames")
    lab.sh("for i in $(seq 200); do [ -e /run/lab-frames ] && exit 0; sleep 0.1; done; exit 1", 60)


def sniffed(lab: Lab) -> list[bytes]:
    """The frames since `sniff`, and the end of it."""
    lab.sh(f"sleep 0.5; kill {lab.sniffer}")
    return [bytes.fromhex(line) for line in lab.fetch("/run/lab-frames").decode().splitlines()]


def packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed


def ipv4_source(frame: bytes) -> str | None:
    return str(ipaddress.ip_address(frame[26:30])) if frame[12:14] == b"\x08\x00" and len(frame) >= 34 else None


def ipv6_source(frame: bytes) -> str | None:
    return str(ipaddress.ip_address(frame[22:38])) if frame[12:14] == b"\x86\xdd" and len(frame) >= 54 else None


def sources(frames: list[bytes]) -> set[str]:
    """The IPv4 addresses that these frames come from."""
    return {source for frame in frames if (source := ipv4_source(frame))}


def tag(frame: bytes) -> int:
    """A frame's VLAN; 0 without a tag."""
    return int.from_bytes(frame[14:16], "big") & 0xFFF if frame[12:14] == b"\x81\x00" else 0


def mac(guest: Guest, device: str = "eth0") -> bytes:
    return bytes.fromhex(guest.run(f"cat /sys/class/net/{device}/address").strip().replace(":", ""))
