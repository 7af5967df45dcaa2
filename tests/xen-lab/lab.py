"""What a scenario holds in its hand: a booted machine, one backend selected, guests, images, counts, notes."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import checks
import counts
from guest import Disk, Guest, GuestConfig
from machine import CommandFailed, Machine, host_busy_seconds
from progress import say

BACKENDS = ("kernel", "qdisk", "ours")

#: dom0's folder for images. On its root disk, which is thrown away with the machine.
IMAGES = "/srv/lab"

#: For starting our programs.
FUNCTIONS = r"""
program() { if [ -e /run/lab-bin/$1 ]; then echo /run/lab-bin/$1; else echo /lab/bin/$1; fi; }     # see Lab.install
serve() {       # serve PID-FILE LOG PROGRAM ARGUMENT…
    local pid=$1 log=$2; shift 2
    RUST_LOG=${LAB_RUST_LOG:-info} RUST_BACKTRACE=1 setsid "$@" >> $log 2>&1 < /dev/null &
    echo $! > $pid
}
serves() { kill -0 $(cat $1) || { tail -20 $2; exit 1; }; }
serve_netback() { serve /run/lab-netback.pid /var/log/lab/netback.log $(program netback) serve; }
"""
#: Everything our programs are given. Documented in README.md: change both. A kept machine may still run older ones:
#: OURS_STOP comes first.
OURS_START = FUNCTIONS + r"""
modprobe -r xen-blkback xen-netback 2>/dev/null
lsmod | grep -E '^xen_(blk|net)back' && { echo "the kernel's backend is loaded and cannot be removed"; exit 1; }
script=/etc/xen/scripts/block
[ -e $script.stock ] || cp -p $script $script.stock
mount --bind $(program blkback) $script
serve /run/lab-backend.pid /var/log/lab/blkback.log $(program blkback) serve --queues 4 $LAB_OPTIONS
netback=$(program netback); scripts=$(program bridge-scripts)
if [ -e $netback ] && [ -e $scripts ]; then
    for name in NAMES; do
        script=/etc/xen/scripts/$name
        [ ! -e $script ] || [ -L $script ] || mv $script $script.stock
        ln -sfn $scripts $script
    done
    modprobe tun
    serve_netback
fi
sleep 1
serves /run/lab-backend.pid /var/log/lab/blkback.log
[ ! -e /run/lab-netback.pid ] || serves /run/lab-netback.pid /var/log/lab/netback.log
"""
OURS_STOP = r"""
for name in backend netback; do
    [ -e /run/lab-$name.pid ] || continue
    pid=$(cat /run/lab-$name.pid)
    kill -TERM $pid 2>/dev/null
    for i in $(seq 100); do [ -d /proc/$pid ] || break; sleep 0.1; done
    [ -d /proc/$pid ] && { kill -KILL $pid; echo "our $name did not end within 10 s of SIGTERM"; }
    rm -f /run/lab-$name.pid
done
mountpoint -q /etc/xen/scripts/block && umount /etc/xen/scripts/block
for name in NAMES; do
    script=/etc/xen/scripts/$name
    [ ! -L $script ] || rm $script
    [ ! -e $script.stock ] || mv $script.stock $script
done
true
"""
#: What bridge-scripts is called as. The first three are libxl's hotplug programs, the others xend's and ours.
SCRIPT_NAMES = ("vif-bridge", "vif-route", "vif-nat", "network-bridge", "network-vlan", "network-dummy", "network-route",
                "network-nat")
OURS_START, OURS_STOP = (text.replace("NAMES", " ".join(SCRIPT_NAMES)) for text in (OURS_START, OURS_STOP))


class Lab:
    def __init__(self, machine: Machine, slow: float = 1.0) -> None:
        self.machine, self.slow, self.world = machine, slow, machine.world
        self.backend = ""
        self.guests: list[Guest] = []
        self.notes: list[tuple[str, str]] = []
        self.guest_dmesg: dict[str, str] = {}
        self._xen_log = ""          # read while counting, not yet looked at
        self.last_counts: dict[str, int] | None = None
        self.links: list[str] = []          # made by scenarios, deleted afterwards
        self.sh(f"mkdir -p {IMAGES}")
        # Under systemd dom0's own number comes some seconds after XenStore, and libxl does nothing without it.
        self.sh("for i in $(seq 600); do xenstore-read /local/domain/0/domid && exit 0; sleep 0.2; done 2>/dev/null; "
                "echo XenStore has no /local/domain/0/domid; exit 1", 150)
        self.sniffer = 0                    # see network.sniff
        self._find_programs()

    def program(self, name: str) -> str:
        """Where one of our programs is in dom0."""
        return self.sh(f"for f in /run/lab-bin/{name} /lab/bin/{name}; do [ -e $f ] && echo $f && break; done").strip()

    def _find_programs(self) -> None:
        there = set(self.sh("ls /lab/bin /run/lab-bin 2>/dev/null; true").split())
        self.has_binary = "blkback" in there
        self.has_network = {"netback", "bridge-scripts"} <= there

    def install(self, programs: dict[str, Path]) -> None:
        """Put newer programs of ours into a running dom0."""
        if programs:
            self.sh(OURS_STOP + "mkdir -p /run/lab-bin")      # a running program's file cannot be written
            for name, file in programs.items():
                self.machine.put(file, f"/run/lab-bin/{name}")
            self._find_programs()

    # ---- dom0

    def sh(self, script: str, timeout: float = 60, check: bool = True, **more: object) -> str:
        return self.machine.sh(script, timeout * self.slow, check, **more)

    def xl(self, command: str, timeout: float = 90, check: bool = True) -> str:
        """`xl -vvv`, its chatter kept in a log of its own; a failure shows libxl's errors and the log's end."""
        result = self.machine.run(["bash", "-c", f"echo '+ xl {command}' >> /var/log/lab/xl.log; "
                                   f"xl -vvv {command} 2>> /var/log/lab/xl.log"], timeout * self.slow)
        if check and result.code:
            why = f"not done after {timeout * self.slow:.0f} s" if result.code == 124 else f"exit {result.code}"
            log = self.sh("tail -n 200 /var/log/lab/xl.log | grep -aE 'error|warn|hotplug' | tail -n 12", check=False)
            raise CommandFailed(f"xl {command}: {why}\n{result.out}{log}")
        return result.out

    def note(self, name: str, value: str) -> None:
        """A figure for the report. Figures are printed, never asserted."""
        self.notes.append((name, value))
        say(f"    {name}: {value}")

    def step(self, text: str) -> None:
        say(f"    · {text}")

    # ---- backends

    def use_backend(self, backend: str) -> None:
        """Let this backend serve from now on. There must be no guests."""
        if backend == self.backend:
            return
        if backend == "ours":
            if not self.has_binary:
                raise CommandFailed("backend 'ours' needs --binary")
            self.sh(OURS_STOP + OURS_START)
        else:
            said = self.sh(OURS_STOP)
            if "did not end" in said:
                raise CommandFailed(said)
            if backend == "kernel":
                # More queues than dom0 has CPUs, so that the guest's parameter decides.
                self.sh("modprobe xen-blkback max_queues=4; modprobe xen-netback")
        self.backend = backend
        self.last_counts = None

    def serve_with(self, options: str) -> None:
        """Start our backends anew, blkback with more options ("" for none). There should be no guests."""
        said = self.sh(f"{OURS_STOP}\nexport LAB_OPTIONS='{options}'\n{OURS_START}")
        if "did not end" in said:
            raise CommandFailed(said)

    def background(self, command: str) -> int:
        """Start something in dom0 that goes on until the scenario ends; returns its process id."""
        return int(self.sh(f"{command} >> /var/log/lab/background.log 2>&1 < /dev/null & echo $! | tee -a /run/lab-pids"))

    # ---- images

    def image(self, name: str, size: str) -> str:
        """A new sparse file in dom0."""
        path = f"{IMAGES}/{name}.img"
        self.sh(f"rm -f {path}; truncate -s {size} {path}")
        return path

    def root_image(self, name: str) -> str:
        """A copy of the guests' root filesystem, still sparse."""
        path = f"{IMAGES}/{name}.img"
        self.sh(f"cp --sparse=always /lab/guest-root.img {path}")
        return path

    def loop(self, path: str) -> str:
        """A block device over a file: our `phy:` device. Takes discard (it punches holes) and flush."""
        return self.sh(f"losetup -f --show {path}").strip()

    def unloop(self, device: str) -> None:
        self.sh(f"losetup -d {device}")

    # ---- guests

    def guest(self, config: GuestConfig, timeout: float = 150) -> Guest:
        """Write the xl.cfg, `xl create`, wait for the guest's shell."""
        guest = self.create(config, timeout)
        guest.wait_shell()
        return guest

    def write_config(self, config: GuestConfig) -> str:
        path = f"/tmp/{config.name}.cfg"
        self.sh(f"cat > {path} <<'END'\n{config.text(self.backend)}END")
        return path

    def create(self, config: GuestConfig, timeout: float = 150, paused: bool = False) -> Guest:
        path = self.write_config(config)
        guest = self.adopt(config)
        self.xl(f"create {'-p ' if paused else ''}{path}", timeout)
        return guest

    def adopt(self, config: GuestConfig) -> Guest:
        """A guest that was created by other means."""
        guest = Guest(self, config)
        self.guests.append(guest)
        return guest

    def fetch(self, path: str) -> bytes:
        """A file's content out of dom0."""
        code, out, error = self.machine.ask({"op": "get", "path": path}, 60, f"get {path}")
        if code:
            raise CommandFailed(f"get {path}: {error}")
        return out

    def timeline(self, command: str, until: str, timeout: float = 150) -> tuple[dict[str, float], float, int]:
        """Run `xl COMMAND` and time changes of state below dom0's backend folder, until `path value` matches.

        Returns {"path value": seconds since the command's start} (the first time each came), the emulator's CPU
        seconds for the whole of it, and how many processes were started in dom0.
        """
        processes, before = self.processes(), self.machine.cpu_seconds()
        began, busy = time.monotonic(), host_busy_seconds()
        out = self.sh(f"xl {command}", timeout, timeline="/local/domain/0/backend", until=until)
        times: dict[str, float] = {}
        for match in re.finditer(r"^@T ([\d.]+) (\S+ \S*)$", out, re.M):
            times.setdefault(match[2], float(match[1]))
        if not any(re.search(until, key) for key in times):
            raise CommandFailed(f"xl {command}: waited {timeout * self.slow:.0f} s for `{until}`; came: {times}\n{out}")
        work = self.machine.cpu_seconds() - before
        others = max(host_busy_seconds() - busy - work, 0) / ((time.monotonic() - began) * (os.cpu_count() or 1))
        self.note("host's cores used by others meanwhile", f"{100 * others:.0f} %")
        return times, work, self.processes() - processes

    def processes(self) -> int:
        """How many processes dom0's kernel has started so far (proc(5)). Asked without starting one."""
        match = re.search(r"^processes (\d+)$", self.fetch("/proc/stat").decode(), re.M)
        return int(match[1]) if match else 0

    def keep_dmesg(self, guest: Guest) -> None:
        """Read a guest's kernel log while it can still speak."""
        result = guest.try_run("dmesg", 20)
        if result.code == 0:
            self.guest_dmesg[guest.name] = self.guest_dmesg.get(guest.name, "") + result.out

    def forget(self, guest: Guest) -> None:
        if guest in self.guests:
            self.guests.remove(guest)

    def wait_gone(self, name: str, timeout: float = 60) -> None:
        """Wait until no domain has that name (the toolstack's own cleaning comes before it)."""
        n = int(timeout * self.slow * 4)
        self.sh(f"for i in $(seq {n}); do xl domid {name} >/dev/null 2>&1 || exit 0; sleep 0.25; done; "
                f"echo {name} is still there; xl list; exit 1", timeout + 20)

    def clean(self) -> None:
        """Whatever a scenario left: guests away, loops away, images away."""
        self.sh("for name in $(xl list | awk 'NR>2 {print $1}'); do xl destroy $name; done; "
                "umount /mnt 2>/dev/null; losetup -D; rm -rf " + IMAGES + "/*; "
                "for pid in $(cat /run/lab-pids 2>/dev/null); do kill $pid; done 2>/dev/null; rm -f /run/lab-pids; "
                "ip -all netns delete; " + "".join(f"ip link delete {name} 2>/dev/null; " for name in self.links), 120, check=False)
        self.guests.clear()
        self.links.clear()

    def kill_netback(self) -> None:
        """SIGKILL; whoever comes next finds the rings as they were."""
        self.sh("pid=$(cat /run/lab-netback.pid); kill -KILL $pid; while [ -d /proc/$pid ]; do sleep 0.1; done")

    def serve_netback(self) -> None:
        self.sh(FUNCTIONS + "serve_netback; sleep 1; serves /run/lab-netback.pid /var/log/lab/netback.log")

    # ---- counting

    def counts(self) -> dict[str, int]:
        text = self.sh(counts.SCRIPT, 90)
        self._xen_log += counts.xen_log(text)
        return counts.parse(text)

    def leaks(self, before: dict[str, int], patience: float = 15) -> list[str]:
        """What there is more of than `before`, after giving late cleaning some time."""
        until = time.monotonic() + patience * self.slow
        while True:
            self.last_counts = self.counts()        # the next scenario's "before", if nothing is wrong
            found = counts.leaks(before, self.last_counts)
            if not found or time.monotonic() > until:
                return found
            time.sleep(1)

    # ---- trouble

    def trouble(self) -> list[str]:
        """New lines in the kernel's, Xen's, the guests' and our backend's logs that fail a run."""
        new = self.sh("dmesg -c | tee -a /var/log/lab/dmesg.log; echo; echo @@XEN; xl dmesg -c | tee -a /var/log/lab/xl-dmesg.log; "
                      "echo @@OURS; for name in blkback netback; do log=/var/log/lab/$name.log; seen=/run/lab-seen-$name; "
                      "tail -c +$(($(cat $seen 2>/dev/null || echo 0)+1)) $log 2>/dev/null; "
                      "stat -c %s $log > $seen 2>/dev/null; done; true")
        kernel, _, rest = new.partition("@@XEN")
        xen, _, ours = rest.partition("@@OURS")
        found = [f"dom0: {line}" for line in checks.trouble(kernel, checks.KERNEL_TROUBLE)]
        xen, self._xen_log = self._xen_log + xen, ""
        found += [f"xen: {line}" for line in checks.trouble(xen, checks.XEN_TROUBLE)]
        found += [f"ours: {line}" for line in checks.trouble(ours, checks.BACKEND_TROUBLE)]
        for name, text in self.guest_dmesg.items():
            found += [f"{name}: {line}" for line in checks.trouble(text, checks.KERNEL_TROUBLE)]
        self.guest_dmesg.clear()
        return found

    def collect(self, into: Path) -> None:
        """Every log of every part, into a folder on the host."""
        into.mkdir(parents=True, exist_ok=True)
        self.sh("dmesg > /var/log/lab/dmesg-now.log; xl dmesg > /var/log/lab/xl-dmesg-now.log; "
                "xenstore-ls -f / > /var/log/lab/xenstore.txt; xl list -l > /var/log/lab/xl-list.json; ps aux > /var/log/lab/ps.txt; "
                "cp /proc/interrupts /var/log/lab/interrupts.txt; "
                "{ ip -d address; ip route show table all; ip neigh; bridge vlan; bridge fdb; nft list ruleset; } > /var/log/lab/network.txt 2>&1; "
                "for pid in $(cat /run/lab-backend.pid /run/lab-netback.pid 2>/dev/null); do cat /proc/$pid/task/*/stack > /var/log/lab/backend-stacks.txt; done; "
                "tar cf /tmp/logs.tar -C /var/log lab xen", check=False)
        self.machine.get("/tmp/logs.tar", into / "logs.tar")


__all__ = ["BACKENDS", "Disk", "GuestConfig", "Lab"]
