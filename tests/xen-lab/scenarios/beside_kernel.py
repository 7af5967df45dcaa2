"""blkback and a loaded xen-blkback: both would serve backend/vbd. Ours does not start beside it, says so when it comes later, and
serves the disks it does not know: those with backendtype=tap, which xl has from Xen 4.19 on."""

from __future__ import annotations

from lab import FUNCTIONS, OURS_STOP, Disk, GuestConfig, Lab
from scenario import Scenario

LOG = "/var/log/lab/blkback.log"
TAP = "/etc/xen/scripts/block-tap"


def beside(lab: Lab) -> None:
    blkback = lab.program("blkback")
    lab.step("loaded beside one that runs: an error in its log")
    # Without a guest: it would lose its disks.
    lab.sh(f"modprobe xen-blkback; for i in $(seq {int(150 * lab.slow)}); do grep -q 'has been loaded beside this process' {LOG} && exit 0; "
           "sleep 0.2; done; exit 1", 60)
    lab.step("ours started beside it: refused")
    lab.sh(OURS_STOP)
    lab.backend = ""
    refused = lab.machine.run(["bash", "-c", f"{blkback} serve 2>&1"], 60 * lab.slow)
    assert refused.code != 0 and "modprobe -r xen-blkback" in refused.out and "--only vbd3" in refused.out, refused.out
    lab.step("tap disks alone")
    lab.sh(FUNCTIONS + f"serve /run/lab-backend.pid {LOG} $(program blkback) serve --only vbd3; sleep 1; serves /run/lab-backend.pid {LOG}")
    if lab.world.name != "4.17":
        tap(lab, blkback)
    lab.sh(OURS_STOP)
    lab.use_backend("ours")


def tap(lab: Lab, blkback: str) -> None:
    """A disk of the kernel's and one of ours in one guest."""
    kernels, ours = lab.image("kernels", "16M"), lab.image("ours", "16M")
    lab.sh(f"[ ! -e {TAP} ] || mv {TAP} {TAP}.stock; ln -sfn {blkback} {TAP}")
    try:
        guest = lab.guest(GuestConfig("both", disks=[Disk(kernels, "xvda")]))
        lab.xl(f"block-attach both format=raw,backendtype=tap,vdev=xvdb,access=rw,target={ours}")
        guest.wait_device("xvdb")
        for vdev, kind, there in (("xvda", "vbd", True), ("xvdb", "vbd3", True), ("xvdb", "vbd", False)):
            state = lab.sh(f"xenstore-read {guest.backend_path(vdev, kind)}/state 2>/dev/null || echo none").strip()
            assert state == ("4" if there else "none"), f"{vdev} below {kind}: {state}"
        for vdev, image in (("xvda", kernels), ("xvdb", ours)):
            digest = guest.run(f"dd if=/dev/urandom of=/tmp/data bs=64k count=32 2>/dev/null; dd if=/tmp/data of=/dev/{vdev} bs=64k "
                               "oflag=direct conv=fsync 2>/dev/null; sha256sum < /tmp/data").split()[0]
            assert lab.sh(f"head -c 2M {image} | sha256sum").split()[0] == digest, vdev
        guest.detach("xvdb")
        guest.wait_device("xvdb", present=False)
        guest.poweroff()
    finally:
        lab.sh(f"rm -f {TAP}; [ ! -e {TAP}.stock ] || mv {TAP}.stock {TAP}")


BESIDE = Scenario("beside-kernel", "blkback and a loaded xen-blkback: refused, said, and tap disks alone", beside, backends=("ours",),
                  tolerated=(r"ERROR .*has been loaded beside this process",), order=46)
