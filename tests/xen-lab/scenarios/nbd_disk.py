"""A disk on an NBD server: qcow2 by way of qemu-nbd, spoken to by our own client. The server is killed in the middle."""

from __future__ import annotations

import json

from guest import Guest
from lab import Disk, GuestConfig, Lab
from scenario import Scenario

SOCKET = "/run/lab-nbd.sock"
IMAGE = "/srv/lab/disk.qcow2"
MIB = 32
#: Where, in MiB, something is written that is not flushed; behind the file system.
UNFLUSHED = 28
#: Rounds of writes, each fsynced, while the server goes and comes.
WRITES = r"""
(n=0; while [ ! -e /tmp/stop ]; do
    n=$((n+1))
    dd if=/dev/urandom of=/mnt/$n bs=32k count=8 conv=fsync 2> /tmp/dd.err || { echo "round $n failed: $(cat /tmp/dd.err)"; break; }
    echo "$(sha256sum < /mnt/$n | cut -d ' ' -f 1)  $n" >> /tmp/sums
done; echo ended at $n) > /tmp/writes.out 2>&1 &
"""


def run(lab: Lab) -> None:
    lab.sh(f"qemu-img create -q -f qcow2 {IMAGE} {MIB}M")
    server = serve(lab)
    guest = lab.guest(GuestConfig("far"))

    lab.step("attached by xl: target=nbd:unix:PATH, with script=block so that libxl looks for no such file")
    guest.attach(Disk(f"nbd:unix:{SOCKET}", "xvdc", extra="script=block"))
    assert int(guest.run("cat /sys/block/xvdc/size")) == MIB << 11
    guest.run("mkfs.ext4 -q -F /dev/xvdc 24M && mount -t ext4 /dev/xvdc /mnt && : > /tmp/sums", 120)
    guest.run(WRITES)
    wait_rounds(guest, 6)

    for which in ("first", "second"):
        lab.step(f"kill -9 of the server, the {which} time")
        end(lab, server, "KILL")
        stopped = int(guest.run("sleep 1; wc -l < /tmp/sums"))
        # Nothing is done without it, and nothing fails.
        assert int(guest.run("sleep 3; wc -l < /tmp/sums")) <= stopped + 1
        server = serve(lab)
        wait_rounds(guest, stopped + 5)

    lab.step("compare")
    out = guest.run("touch /tmp/stop; n=0; until grep -q ended /tmp/writes.out; do n=$((n+1)); [ $n -lt 600 ]; sleep 0.2; done; "
                    "cat /tmp/writes.out", 150)
    assert "failed" not in out, out
    lab.note("rounds", out.strip())
    guest.run("umount /mnt; mount -t ext4 /dev/xvdc /mnt; cd /mnt; sha256sum -c /tmp/sums > /tmp/check || "
              "{ grep -v OK /tmp/check; exit 1; }; cd /; umount /mnt", 150)

    lab.step("the server is killed with 1 MiB written and not flushed, and forgets it; the backend does not")
    guest.run(f"dd if=/dev/urandom of=/tmp/block bs=64k count=16 2>/dev/null; "
              f"dd if=/tmp/block of=/dev/xvdc bs=64k seek={UNFLUSHED * 16} oflag=direct conv=notrunc 2>/dev/null")
    end(lab, server, "KILL")
    kept = allocated(lab.sh(f"qemu-img map -U --output=json {IMAGE}"), UNFLUSHED << 20, 1 << 20)
    lab.note("of 1 MiB not flushed, the server's image has", f"{kept >> 10} KiB")
    assert kept < 1 << 20, "the server forgot nothing, so that nothing is shown"
    server = serve(lab)
    guest.run(f"dd if=/dev/xvdc bs=64k skip={UNFLUSHED * 16} count=16 iflag=direct 2>/dev/null | cmp - /tmp/block")
    whole = guest.run("dd if=/dev/xvdc bs=256k iflag=direct 2>/dev/null | sha256sum", 120).split()[0]
    lab.keep_dmesg(guest)
    guest.detach("xvdc")
    guest.wait_device("xvdc", present=False)

    lab.step("the server's file after detach")
    end(lab, server, "TERM")
    # Leaked clusters are what a killed qemu-nbd leaves; errors (exit code 2) are not.
    checked = lab.machine.run(["qemu-img", "check", IMAGE], 60 * lab.slow)
    assert checked.code in (0, 3), f"qemu-img check: {checked.code} {checked.out}"
    lab.sh(f"qemu-img convert -O raw {IMAGE} /srv/lab/disk.raw && e2fsck -fn /srv/lab/disk.raw", 120)
    there = lab.sh("sha256sum < /srv/lab/disk.raw").split()[0]
    assert there == whole, f"sha256 in the guest {whole}, in the server's image {there}"


def allocated(mapping: str, first: int, length: int) -> int:
    """How many bytes of a range hold data, by `qemu-img map --output=json`."""
    return sum(max(0, min(part["start"] + part["length"], first + length) - max(part["start"], first))
               for part in json.loads(mapping) if part["data"])


def serve(lab: Lab) -> int:
    """qemu-nbd, for several connections; its process id."""
    pid = lab.background(f"exec qemu-nbd --persistent --shared=8 --format=qcow2 --socket={SOCKET} {IMAGE}")
    lab.sh(f"for i in $(seq {int(100 * lab.slow)}); do grep -q {SOCKET} /proc/net/unix && exit 0; sleep 0.1; done; "
           "tail /var/log/lab/background.log; exit 1")
    return pid


def end(lab: Lab, server: int, signal: str) -> None:
    lab.sh(f"kill -{signal} {server}; while [ -d /proc/{server} ]; do sleep 0.1; done")


def wait_rounds(guest: Guest, rounds: int, timeout: float = 120) -> None:
    guest.run(f"n=0; until [ $(wc -l < /tmp/sums) -ge {rounds} ]; do n=$((n+1)); "
              f"[ $n -lt {int(timeout * 5 * guest.lab.slow)} ] && [ ! -s /tmp/writes.out ] || "
              f"{{ echo round {rounds} did not come; cat /tmp/writes.out; tail -n 2 /tmp/sums; exit 1; }}; sleep 0.2; done", timeout * 2)


NBD = Scenario("nbd-disk", "a qcow2 disk through qemu-nbd and our NBD client; the server killed and started again under load", run,
               backends=("ours",), order=42)
