"""A guest whose suspension is cancelled, and one that moves to another domain of the same machine: both domains have the
disk for a while, and only one of them may write."""

from __future__ import annotations

import network as net
from guest import Guest
from lab import Disk, GuestConfig, Lab
from scenario import Scenario

MAC = "00:16:3e:00:00:02"
#: Writes a number at its own place on the disk, flushes it, and only then says it. Ends with its file.
COUNT = """touch /tmp/counting
(n=0; while [ -e /tmp/counting ]; do
    n=$((n+1)); printf '%511d\\n' $n | dd of=/dev/xvda bs=512 seek=$n conv=notrunc,fsync 2>/dev/null || break; echo $n > /tmp/count
done; echo ended >> /tmp/ended) >/dev/null 2>&1 &"""


def migrate(lab: Lab) -> None:
    net.link(lab, "xenbr0", "bridge", "10.17.0.1/24")
    image = lab.image("data", "32M")
    # Debian's Xen cannot log which pages of a PV guest are written to, so that only PVH guests migrate.
    guest = lab.guest(GuestConfig("nomad", kind="pvh", memory=256, disks=[Disk(image, "xvda")], vifs=[f"mac={MAC},bridge=xenbr0"]))
    guest.run("dd if=/dev/urandom of=/tmp/pattern bs=64k count=64 2>/dev/null; "
              "dd if=/tmp/pattern of=/dev/xvda bs=64k seek=128 oflag=direct 2>/dev/null")
    net.give(guest, "eth0", "10.17.0.12/24")
    ticker = net.ticker(lab, "10.17.0.1")
    net.tick_from(guest, "10.17.0.1")
    ticker.alive()
    guest.run(COUNT)

    lab.step("xl save -c: saved, and the guest goes on as it was")
    old = guest.domid()
    counted, ticked = count(guest), ticker.last()
    lab.xl("save -c nomad /srv/lab/nomad.save", 180)
    assert guest.domid() == old
    wait_count(guest, counted + 20)
    ticker.wait(ticked + 5, 120)

    lab.step("xl migrate to this machine")
    counted, ticked = count(guest), ticker.last()
    # With an empty command for ssh the "host" is what runs at the other end (xl(1)).
    lab.xl("migrate -s '' nomad 'xl migrate-receive'", 240)
    new = guest.domid()
    assert new != old
    guest.restored()
    wait_count(guest, counted + 20)
    ticker.wait(ticked + 5, 120)
    lab.sh(f"! ip link show vif{old}.0 2>/dev/null")
    # It did wait for its former self: nothing else shows that nobody wrote too early.
    said = lab.sh(f"grep -a 'arrives, and waits\\|is this guest.s now' /var/log/lab/blkback.log | grep backend/vbd/{new}/").splitlines()
    assert len(said) == 2 and "arrives, and waits" in said[0], said

    lab.step("what was said to be on the disk is there")
    total = int(guest.run("rm /tmp/counting; until [ -e /tmp/ended ]; do sleep 0.2; done; cat /tmp/count"))
    wrong = guest.run("dd if=/dev/xvda bs=512 skip=1 iflag=direct count=" + str(total) + " 2>/dev/null | "
                      "awk '$1 != NR { print NR \": \" $1 }' | head -5")
    assert not wrong.strip(), f"of {total} numbers: {wrong}"
    guest.run("dd if=/dev/xvda bs=64k skip=128 count=64 iflag=direct 2>/dev/null | cmp - /tmp/pattern")
    lab.note("numbers written", str(total))
    guest.run("kill $(cat /tmp/ticker.pid); sleep 1")
    ticker.complete()


def count(guest: Guest) -> int:
    wait_count(guest, 1)
    return int(guest.run("cat /tmp/count"))


def wait_count(guest: Guest, least: int) -> None:
    """Wait until the guest has written that many numbers, or has failed to."""
    guest.run(f"until [ -e /tmp/ended ] || [ $(cat /tmp/count 2>/dev/null || echo 0) -ge {least} ]; do sleep 0.2; done; "
              "! [ -e /tmp/ended ]")


MIGRATE = Scenario("migrate", "xl save -c, and xl migrate to another domain of this machine, with I/O and a TCP connection under way",
                   migrate, backends=("ours",), network=True, order=24)
