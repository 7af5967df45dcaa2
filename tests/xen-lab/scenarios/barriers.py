"""A backend that offers barriers and no flushes (`--no-flush`): Linux' blkfront then makes every flush, and every
write that has to be durable at once, a barrier."""

from __future__ import annotations

import re

from lab import Disk, GuestConfig, Lab
from scenario import Scenario


def run(lab: Lab) -> None:
    lab.serve_with("--no-flush")
    try:
        barriers(lab)
    finally:
        lab.clean()
        lab.serve_with("")


def barriers(lab: Lab) -> None:
    data = lab.image("data", "64M")
    device = lab.loop(data)
    guest = lab.guest(GuestConfig("fence", vcpus=2, disks=[Disk(device, "xvda")]))

    lab.step("what was agreed on")
    path = guest.backend_path("xvda")
    assert lab.sh(f"cd /; xenstore-read {path}/feature-flush-cache {path}/feature-barrier").split() == ["0", "1"]
    said = guest.run("dmesg | grep 'blkfront: xvda'")
    lab.note("the guest's driver", said.partition("] ")[2].strip())
    assert "barrier: enabled" in said, said
    # Durable writes are asked for as such only where the driver has barriers.
    assert guest.run("cat /sys/block/xvda/queue/write_cache /sys/block/xvda/queue/fua").split() == ["write", "back", "1"]

    lab.step("a file system that cannot do without them, fsynced files, compared on the host")
    written = guest.run("mkfs.ext4 -q -F /dev/xvda && mount -t ext4 /dev/xvda /mnt && cd /mnt && "
                        "for n in 1 2 3 4 5 6 7 8; do dd if=/dev/urandom of=$n bs=64k count=4 conv=fsync 2>/dev/null; done; "
                        "sha256sum [1-8]", 180)
    # Seen as the file is while the guest has it mounted: its journal is replayed as after a power cut.
    lab.sh(f"cp --sparse=always {data} /srv/lab/copy.img && e2fsck -fy /srv/lab/copy.img > /dev/null; e2fsck -fn /srv/lab/copy.img", 120)
    seen = lab.sh("mount -o ro,loop /srv/lab/copy.img /mnt && cd /mnt && sha256sum [1-8]; cd /; umount /mnt")
    assert sorted(seen.split()) == sorted(written.split()), f"fsynced in the guest:\n{written}in the image:\n{seen}"

    lab.step("fio: writes, one in four of them fsynced, verified")
    guest.run("cd /; umount /mnt; fio --name=v --filename=/dev/xvda --direct=1 --ioengine=libaio --iodepth=16 --rw=randwrite --bs=4k "
              "--size=2M --fsync=4 --verify=crc32c --verify_fatal=1 --output-format=terse --terse-version=3", 180)
    lab.keep_dmesg(guest)
    assert "empty write barrier op failed" not in guest.run("dmesg")
    guest.detach("xvda")
    guest.wait_device("xvda", present=False)
    totals = lab.sh("grep -a disconnected /var/log/lab/blkback.log | tail -n 1")
    counted = re.search(r"writes=(\d+) flushes=(\d+)", totals)
    assert counted and int(counted[2]) > 8, totals
    lab.note("the backend counted", f"{counted[1]} writes, {counted[2]} barriers without data")


BARRIERS = Scenario("barriers", "no flushes on offer: Linux' blkfront uses barriers; ext4 and fio on them, fsynced data in the image",
                    run, backends=("ours",), order=43)
