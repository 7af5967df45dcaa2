"""blkback is killed under guests that write: their I/O ends with errors when the next one starts, they can be shut down, the
images are free, and what was flushed is there."""

from __future__ import annotations

from guest import Guest
from lab import FUNCTIONS, Disk, GuestConfig, Lab
from scenario import Scenario

#: Two writers: one past the cache, which has requests in flight all the time, and one that makes its data durable and then
#: says how much it has.
WRITERS = r"""
dd if=/dev/urandom of=/tmp/pattern bs=64k count=16 2>/dev/null
(code=0; dd if=/dev/zero of=/dev/xvda bs=64k seek=256 oflag=direct 2>/tmp/direct.err || code=$?; echo $code > /tmp/direct.code) &
(i=0; while dd if=/tmp/pattern of=/dev/xvda bs=64k seek=$((i * 16)) conv=fsync,notrunc 2>/tmp/synced.err; do i=$((i + 1)); echo $i > /tmp/synced; [ $i -lt 15 ] || i=0; done
 echo stopped > /tmp/synced.code) &
sleep 1; sha256sum < /tmp/pattern
"""


def killed(lab: Lab) -> None:
    blkback = lab.program("blkback")
    images = {kind: lab.image(kind, "2G") for kind in ("pv", "pvh")}
    guests = {kind: lab.guest(GuestConfig(f"mourner-{kind}", kind=kind, disks=[Disk(image, "xvda")]))
              for kind, image in images.items()}
    digests = {}
    for kind, guest in guests.items():
        digests[kind] = guest.run(WRITERS).split()[0]
        guest.run("n=0; until [ -s /tmp/synced ]; do n=$((n+1)); [ $n -lt 600 ] || exit 1; sleep 0.2; done", 150)
        lab.keep_dmesg(guest)

    lab.step("kill -9: the guests wait, and blkback list says that nobody serves")
    lab.sh("pid=$(cat /run/lab-backend.pid); kill -KILL $pid; while [ -d /proc/$pid ]; do sleep 0.1; done")
    for guest in guests.values():
        listed = lab.sh(f"{blkback} list {guest.name}")
        assert "no server" in listed, listed
        guest.run("! [ -e /tmp/direct.code ]")

    lab.step("started again: what was in flight ends with an I/O error, and so does what is asked from now on")
    lab.sh(FUNCTIONS + "serve /run/lab-backend.pid /var/log/lab/blkback.log $(program blkback) serve --queues 4; sleep 1; "
           "serves /run/lab-backend.pid /var/log/lab/blkback.log")
    for kind, guest in guests.items():
        ended(guest)
        said = guest.run("cat /tmp/direct.code /tmp/direct.err; dmesg | grep -i xvda | tail -n 4; cat /proc/mounts > /dev/null")
        lab.note(f"{kind}: dd past the cache", " ".join(said.split()[:1]) + ": " + said.strip().splitlines()[1])
        assert "Input/output error" in said or "No space" in said or "I/O error" in said, said
        # A disk that is dead has no sectors; reading it must end too.
        guest.try_run("dd if=/dev/xvda of=/dev/null bs=4k count=1 iflag=direct", 60)
        listed = lab.sh(f"{blkback} list {guest.name}")
        assert "was killed" in listed and "no server" not in listed, listed

    lab.step("the images are free, and hold what was flushed; the guests can be shut down")
    for kind, guest in guests.items():
        lab.sh(f"qemu-io -f raw -c 'write -q 1900M 4k' {images[kind]}")
        found = lab.sh(f"head -c 1M {images[kind]} | sha256sum").split()[0]
        assert found == digests[kind], f"{kind}: what was flushed is not there"
    guests["pv"].detach("xvda")
    guests["pv"].wait_device("xvda", present=False)
    guests["pv"].attach(Disk(images["pv"], "xvda"))
    guests["pv"].run("dd if=/dev/xvda bs=64k count=16 iflag=direct 2>/dev/null | cmp - /tmp/pattern")
    for guest in guests.values():
        # Not by keep_dmesg: its I/O errors are what this is about.
        lab.xl(f"shutdown -w {guest.name}", 90)
        lab.wait_gone(guest.name)
        lab.forget(guest)


def ended(guest: Guest) -> None:
    """Both writers have ended, and no process waits for the disk."""
    guest.run("n=0; until [ -e /tmp/direct.code ] && [ -e /tmp/synced.code ]; do n=$((n+1)); [ $n -lt 300 ] || "
              "{ ls /tmp; ps; for p in /proc/[0-9]*; do grep -q '^State:.D' $p/status && cat $p/comm $p/wchan; done; exit 1; }; sleep 0.2; done", 180)


KILLED = Scenario("disk-killed", "blkback is killed under guests that write, and started again: errors, no hang, no loss", killed,
                  backends=("ours",), tolerated=(r"ERROR .*was killed",), order=42)
