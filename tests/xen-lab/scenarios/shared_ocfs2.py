"""One disk that two guests write to (`w!`), with a cluster file system on it: OCFS2, its nodes connected by our netback.

Both work in the same directories and append to the same file. One is destroyed in the middle; the other waits until
its heartbeat has stopped, replays its journal, and goes on. What the dead one had fsynced must be there.
"""

from __future__ import annotations

import re
import time

import network as net
from guest import Disk, Guest
from lab import GuestConfig, Lab
from machine import CommandFailed
from scenario import Scenario

VDEV = "xvdb"
#: Heartbeats come every 2 s; a node is dead after (this - 1) of them. Linux' own value is 31, a minute. On a busy host
#: one heartbeat was seen to take 11 s.
DEAD_THRESHOLD = 12
FIRST_ADDRESS = 11

#: A cluster by hand, as the o2cb tool does it: Documentation/filesystems/ocfs2.rst of Linux, o2cb(7).
CLUSTER = """
hostname {me}
modprobe ocfs2_stack_o2cb
modprobe ocfs2
mount -t configfs configfs /sys/kernel/config
echo o2cb > /sys/fs/ocfs2/cluster_stack
cd /sys/kernel/config/cluster
mkdir lab
echo {threshold} > lab/heartbeat/dead_threshold
for node in {nodes}; do
    mkdir lab/node/$node
    echo 7777 > lab/node/$node/ipv4_port
    echo 10.17.0.$(({first} + ${{node#node}})) > lab/node/$node/ipv4_address
    echo ${{node#node}} > lab/node/$node/num
done
for node in {nodes}; do
    [ $node = {me} ] && echo 1 > lab/node/$node/local || echo 0 > lab/node/$node/local
done
"""

#: What both do at the same time: a file with random content in a directory of both, a line at the end of a file of
#: both, fsync of each; then it is written down, in the guest's memory, that this is done. Every REMOVEDth file is
#: removed again.
#: Lines are appended under a lock, which the cluster keeps and takes from a dead node, and after a look at the file's
#: size: OCFS2 itself takes the end of the file for O_APPEND from its cache, before it asks the cluster for the inode
#: (ocfs2_file_write_iter), so two nodes that append at once may write one over the other.
REMOVED = 3
WORK = r"""
cat > /tmp/append <<'END'
stat -c %s /mnt/log > /dev/null && echo "$*" | dd of=/mnt/log oflag=append conv=notrunc,fsync 2> /dev/null
END
cat > /tmp/work <<'END'
n=0
while [ ! -e /tmp/stop ]; do
    n=$((n+1))
    folder=/mnt/tree/$((n % 5))/$((n % 2))
    mkdir -p $folder || exit 1
    head -c $((n % 7 * 5000 + 3000)) /dev/urandom > $folder/$1-$n.new || exit 1
    sum=$(sha256sum < $folder/$1-$n.new)
    mv $folder/$1-$n.new $folder/$1-$n || exit 1
    dd if=/dev/null of=$folder/$1-$n conv=notrunc,fsync 2> /dev/null || exit 1
    flock /mnt/lock sh /tmp/append $1 $n || exit 1
    read up idle < /proc/uptime
    echo "$n ${sum%% *} $folder/$1-$n $up" >> /tmp/done
    [ $((n % REMOVED)) != 0 ] || rm $folder/$1-$n || exit 1
done
END
: > /tmp/done
(sh /tmp/work NAME > /tmp/work.out 2>&1; echo "ended with $?" >> /tmp/work.out) &
""".replace("REMOVED", str(REMOVED))


def run(lab: Lab) -> None:
    net.link(lab, "xenbr0", "bridge", "10.17.0.1/24")
    image = lab.image("shared", "160M")
    # Two at a time: each boots on a processor of its own.
    nodes = [lab.create(GuestConfig(f"node{number}", memory=288, vifs=["bridge=xenbr0"])) for number in range(2)]
    for number, node in enumerate(nodes):
        net.give(node, "eth0", f"10.17.0.{FIRST_ADDRESS + number}/24")
    one, two = nodes
    net.ping(lab, f"10.17.0.{FIRST_ADDRESS}", two)

    lab.step("one writes with others (w!): who wants to write alone (w) is refused, and told who has it")
    attach(lab, one, image, "w!")
    said = refused(lab, two, image, "w")
    assert re.search(r"cannot be written alone \(w\): process \d+ \(blkback\) has it open", said), said
    lab.note("the second guest with w", said.strip().splitlines()[-1])

    lab.step("both with w!: a cluster of two nodes, mkfs.ocfs2, mounted by both")
    attach(lab, two, image, "w!")
    for node in nodes:
        node.run(CLUSTER.format(me=node.name, nodes="node0 node1", threshold=DEAD_THRESHOLD, first=FIRST_ADDRESS))
    one.run(f"mkfs.ocfs2 -q -F -b 4K -C 4K -N 2 -J size=4M --cluster-stack=o2cb --cluster-name=lab /dev/{VDEV} 2>&1", 120)
    for node in nodes:
        began = time.monotonic()
        node.run(f"mount.ocfs2 /dev/{VDEV} /mnt 2>&1", 150)
        lab.note(f"mount in {node.name}", f"{time.monotonic() - began:.0f} s")
    one.run("mkdir /mnt/tree; : > /mnt/log; : > /mnt/lock; sync")
    two.run("ls /mnt/log")

    lab.step("both work in the same directories and at the end of the same file")
    for node in nodes:
        node.run(WORK.replace("NAME", node.name))
    for node in nodes:
        wait_done(node, 8)
    # A file that the other one just wrote, by way of the cluster's locks.
    for reader, writer in ((one, two), (two, one)):
        found = check(reader, settled(done(writer)))
        assert not found, found

    lab.step("one is destroyed")
    wait_done(two, 20)
    before = done(two)
    lab.keep_dmesg(two)
    domid = two.domid()
    two.destroy()
    forget_backend(lab, domid)
    lab.note("rounds of the dead one", str(len(before)))

    lab.step("the other replays its journal and goes on")
    began = time.monotonic()
    wait_dmesg(one, r"End replay journal \(node 1")
    lab.note("recovery after", f"{time.monotonic() - began:.0f} s")
    wait_done(one, max(entry.number for entry in done(one)) + 8)
    one.run("touch /tmp/stop; n=0; until grep -q ended /tmp/work.out; do n=$((n+1)); [ $n -lt 600 ]; sleep 0.2; done; "
            "grep -qx 'ended with 0' /tmp/work.out || { cat /tmp/work.out; exit 1; }", 150)
    mine = done(one)
    lab.note("longest pause of the survivor", f"{longest_pause(mine):.0f} s of {mine[-1].at - mine[0].at:.0f} s")
    lab.note("rounds of the survivor", str(len(mine)))

    lab.step("what the dead one had fsynced is there, and what the survivor wrote")
    one.run("sync; echo 3 > /proc/sys/vm/drop_caches")
    found = check(one, settled(before) | settled(mine))
    found += lines(one.run("cat /mnt/log", 60).rstrip(), {"node0": mine, "node1": before})
    assert not found, "\n".join(found)

    lab.step("unmount, and the host's view")
    one.run("umount /mnt", 90)
    lab.keep_dmesg(one)
    detach(lab, one)
    out = lab.sh(f"fsck.ocfs2 -fn {image} 2>&1", 120)
    assert not (found := fsck_complaints(out)), "\n".join(found)
    # -n looks at no journal: that none is left to be replayed is said elsewhere.
    for slot in range(2):
        flags = lab.sh(f"debugfs.ocfs2 -R 'stat //journal:000{slot}' {image} | grep -i flags")
        assert "Flags: Valid System Journal" in flags and "Dirty" not in flags, flags
    lab.note("fsck.ocfs2 -fn", out.strip().splitlines()[-1])

    lab.step("the same check of a copy with one block of zeros")
    # It ends with 0 and "All passes succeeded" even so; what it says before that is what counts.
    bad = lab.sh(f"cp --sparse=always {image} {image}.bad; "
                 f"block=$(debugfs.ocfs2 -R 'stat //global_bitmap' {image} | awk '$1 == 1 && NF == 5 {{print $5; exit}}'); "
                 f"dd if=/dev/zero of={image}.bad bs=4096 seek=$block count=1 conv=notrunc 2>/dev/null; "
                 f"fsck.ocfs2 -fn {image}.bad > /tmp/fsck.out 2>&1; head -n 30 /tmp/fsck.out; tail -n 2 /tmp/fsck.out", 120)
    assert (found := fsck_complaints(bad)), f"a damaged file system passes:\n{bad}"
    lab.note("of a damaged copy", found[0])


# ---- disks that xl cannot describe: it refuses the spelling `w!`


def attach(lab: Lab, guest: Guest, image: str, access: str) -> None:
    lab.sh(f"{lab.program('blkback')} attach {guest.name} {image},raw,{VDEV},'{access}' --wait 30")
    guest.wait_device(VDEV)


def refused(lab: Lab, guest: Guest, image: str, access: str) -> str:
    result = lab.machine.run(["bash", "-c", f"{lab.program('blkback')} attach {guest.name} {image},raw,{VDEV},'{access}' 2>&1"],
                             60 * lab.slow)
    assert result.code != 0, f"{access} was granted to {guest.name}: {result.out}"
    return result.out


def detach(lab: Lab, guest: Guest) -> None:
    lab.sh(f"{lab.program('blkback')} detach {guest.name} {VDEV}")
    guest.wait_device(VDEV, present=False)


def forget_backend(lab: Lab, domid: int) -> None:
    """xl removes what it has added itself, with the guest; this disk's directory is not its own."""
    assert "is detached" in lab.sh(f"{lab.program('blkback')} detach {domid} {VDEV}")
    lab.sh(f"! xenstore-exists /local/domain/0/backend/vbd/{domid}")


# ---- the work


class Entry:
    """A line of what a worker has done: `number sha256 path uptime`."""

    def __init__(self, line: str) -> None:
        number, self.digest, self.path, at = line.split()
        self.number, self.at = int(number), float(at)


def done(guest: Guest) -> list[Entry]:
    # The last line may be half written.
    return [Entry(line) for line in guest.run("cat /tmp/done").splitlines() if len(line.split()) == 4]


def wait_done(guest: Guest, rounds: int, timeout: float = 150) -> None:
    guest.run(f"n=0; until grep -q '^{rounds} ' /tmp/done; do n=$((n+1)); "
              f"[ $n -lt {int(timeout * 2 * guest.lab.slow)} ] && [ ! -s /tmp/work.out ] || "
              f"{{ echo round {rounds} did not come; cat /tmp/work.out; tail -n 3 /tmp/done; dmesg | tail -n 20; exit 1; }}; "
              "sleep 0.5; done",
              timeout * 2 + 30)


def wait_dmesg(guest: Guest, pattern: str, timeout: float = 120) -> None:
    until = time.monotonic() + timeout * guest.lab.slow
    while not re.search(pattern, log := guest.run("dmesg", 60)):
        if time.monotonic() > until:
            raise CommandFailed(f"guest {guest.name}: waited {timeout * guest.lab.slow:.0f} s for {pattern!r} in its log:\n{log[-3000:]}")
        time.sleep(2)


def settled(entries: list[Entry]) -> dict[str, str]:
    """{path: sha256} of what must be there. Of a file that is to be removed nothing is said: it may be gone or not."""
    return {entry.path: entry.digest for entry in entries if entry.number % REMOVED}


def check(guest: Guest, files: dict[str, str]) -> list[str]:
    """Which of these files are not there, or have another content."""
    assert len(files) > 4, f"only {len(files)} files to look at"
    there = net.digests(guest.run("find /mnt/tree -type f | xargs sha256sum 2>/dev/null || true", 150))
    return differences(files, there)


def differences(files: dict[str, str], there: dict[str, str]) -> list[str]:
    return [f"{path}: is {there.get(path, 'missing')}, was written with {digest}"
            for path, digest in files.items() if there.get(path) != digest]


def lines(log: str, writers: dict[str, list[Entry]]) -> list[str]:
    """What is wrong with the file that all append to: each line once, in its writer's order, none cut or mixed, and
    all that were done (more may be there: what came after somebody looked)."""
    numbers: dict[str, list[int]] = {name: [] for name in writers}
    found = []
    for line in log.splitlines():
        match = re.fullmatch(r"(\w+) (\d+)", line)
        if match and match[1] in numbers:
            numbers[match[1]].append(int(match[2]))
        else:
            found.append(f"a line that nobody wrote: {line!r}")
    for name, entries in writers.items():
        last = max(entry.number for entry in entries)
        if len(numbers[name]) < last or numbers[name] != list(range(1, len(numbers[name]) + 1)):
            found.append(f"{name} appended 1 to {last}; there are {numbers[name]}")
    return found


def longest_pause(entries: list[Entry]) -> float:
    return max(after.at - before.at for before, after in zip(entries, entries[1:]))


def fsck_complaints(out: str) -> list[str]:
    """Lines of fsck.ocfs2's output that are neither its head nor the names of its passes: `[CODE] question? n`, errors."""
    usual = (r"fsck\.ocfs2 |Checking OCFS2 filesystem|  (Label|UUID|Number of (blocks|slots)|Block size|Cluster size|Number of clusters)"
             r"|\S+ was run with -f, check forced|\*\* Skipping slot recovery because -n was given|Pass \d\w?: |All passes succeeded|$")
    found = [line for line in out.splitlines() if not re.match(usual, line)]
    return found if "All passes succeeded" in out else [*found, "not all passes succeeded"]


SHARED = Scenario("shared-ocfs2", "w!: two guests on one OCFS2, one destroyed, the other recovers; fsync kept, fsck.ocfs2 clean",
                  run, backends=("ours",), network=True, order=70)
