"""The tour a customer would take: a root disk on a sparse file, data on a block device, everything verified."""

from __future__ import annotations

from lab import Disk, GuestConfig, Lab
from scenario import Scenario

#: Mixed sizes from one sector up, unaligned to pages: the requests that need segments to be cut right.
VERIFY = ("fio --name=verify --filename=/dev/xvdb --direct=1 --ioengine=libaio --iodepth=32 --rw=randwrite "
          "--bsrange=512-64k --blockalign=512 --size=6M --verify=crc32c --verify_fatal=1 --output-format=terse "
          "--terse-version=3")
TRIM = ("fio --name=trim --filename=/dev/xvdb --offset=16M --direct=1 --ioengine=libaio --iodepth=32 --rw=trimwrite "
        "--bs=64k --size=2M --verify=crc32c --verify_fatal=1 --output-format=terse --terse-version=3")


def run_kind(lab: Lab, kind: str) -> None:
    root = lab.root_image("root")
    data = lab.image("data", "64M")
    device = lab.loop(data)
    guest = lab.guest(GuestConfig("tour", kind=kind, root="xvda", disks=[Disk(root, "xvda")]))
    # Attached afterwards, not in xl.cfg: two of the stock scripts at once wait for each other's lock, and on a busy
    # machine that ends in libxl's 40 s.
    guest.attach(Disk(device, "xvdb"))

    lab.step("sizes and write cache as the guest sees them")
    for vdev in ("xvda", "xvdb"):
        size = int(guest.run(f"lsblk -bdno SIZE /dev/{vdev}"))
        path = guest.backend_path(vdev)
        sectors = int(lab.sh(f"xenstore-read {path}/sectors"))
        assert size == sectors * 512, f"{vdev}: the guest sees {size} bytes, XenStore says {sectors} sectors"
        cache = guest.run(f"cat /sys/block/{vdev}/queue/write_cache").strip()
        assert cache == "write back", f"{vdev}: write_cache is {cache!r}"
    discard = int(guest.run("cat /sys/block/xvdb/queue/discard_max_bytes"))
    lab.note("features", guest.features("xvdb") + f"; discard {'yes' if discard else 'no'}")

    lab.step("fio with crc32c verification")
    guest.run(VERIFY, 240)
    if discard:
        lab.step("trim and write, verified")
        guest.run(TRIM, 120)
        guest.run("blkdiscard -o 32M -l 16M /dev/xvdb")

    lab.step("mkfs.ext4, a file, its sha256")
    written = guest.run("mkfs.ext4 -q -F /dev/xvdb && mount -t ext4 /dev/xvdb /mnt && "
                        "dd if=/dev/urandom of=/mnt/file bs=256k count=16 conv=fsync 2>/dev/null && "
                        "sha256sum < /mnt/file && umount /mnt", 180).split()[0]
    lab.keep_dmesg(guest)
    guest.detach("xvdb")
    guest.wait_device("xvdb", present=False)

    lab.step("the host's view after detach")
    lab.sh(f"e2fsck -fn {device}")
    seen = lab.sh(f"mount -o ro {device} /mnt && sha256sum < /mnt/file; umount /mnt").split()[0]
    assert seen == written, f"sha256 in the guest {written}, on the host {seen}"

    guest.poweroff()
    lab.step("the root file after a clean shutdown")
    # The guest's root was mounted until the end; its journal is replayed, then all must be in order.
    lab.sh(f"e2fsck -fy {root}; e2fsck -fn {root}")


PV = Scenario("tour-pv", "root on a sparse file, data on phy:, fio crc32c, trim, mkfs, sha256, e2fsck (PV)",
              lambda lab: run_kind(lab, "pv"), backends=("kernel", "qdisk", "ours"), order=10)
PVH = Scenario("tour-pvh", "the same with a PVH guest", lambda lab: run_kind(lab, "pvh"), order=11)
