"""HVM guests, typed as in the handbooks: the device model has the image first, then the guest's own driver, and at no time
anybody else. Beside them one without PV drivers, and one that has both disks live."""

from __future__ import annotations

import time

import network as net
from guest import Guest
from lab import Disk, GuestConfig, Lab
from scenario import Scenario

MAC = "00:16:3e:00:00:0a"
PLAIN_MAC = "00:16:3e:00:00:0b"
#: What a kernel without PV drivers wants for its emulated disk and card.
EMULATED = "modprobe -a ata_piix sd_mod 8139cp; n=0; until [ -b /dev/sda ]; do n=$((n+1)); [ $n -lt 600 ]; sleep 0.1; done"


def emulated(lab: Lab, name: str, vdev: str, mac: str = "", unplug: str = "") -> tuple[GuestConfig, str]:
    """The configuration of an HVM guest with one disk from a file, and that file."""
    image = lab.image(name, "32M")
    vifs = [f"mac={mac},bridge=xenbr0"] if mac else []
    disks = [Disk(image, vdev, prefix="file:")]
    return GuestConfig(name, kind="hvm", memory=256, emul_unplug=unplug, disks=disks, vifs=vifs), image


def users(lab: Lab, image: str) -> set[str]:
    """Which programs have an image open. Few processes: each costs 100 ms in an emulated dom0."""
    return set(lab.sh(f"cat $(ls -l /proc/[0-9]*/fd 2>/dev/null | awk '/^.proc/ {{ sub(\"fd:\", \"comm\"); p = $1 }} "
                      f"$NF == \"{image}\" {{ print p }}' | sort -u) 2>/dev/null; true").split())


def wait_device_model(lab: Lab, image: str, patience: float = 90) -> None:
    """Wait until a device model has an image open."""
    until = time.monotonic() + patience * lab.slow
    while not any("qemu" in name for name in users(lab, image)):
        assert time.monotonic() < until, f"no device model has opened {image}"
        time.sleep(0.3)


def state(lab: Lab, guest: Guest) -> str:
    disk = guest.config.disks[0]
    return lab.sh(f"xenstore-read {guest.backend_path(disk.vdev)}/state").strip()


def wait_state(lab: Lab, guest: Guest, wanted: str, patience: float = 90) -> None:
    until = time.monotonic() + patience * lab.slow
    while (now := state(lab, guest)) != wanted:
        assert time.monotonic() < until, f"{guest.name}'s disk is in state {now}, not {wanted}"
        time.sleep(0.5)


def nobody_else(lab: Lab, second: Guest, image: str, when: str) -> None:
    """Neither another guest nor a program of root's gets the image."""
    said = lab.machine.run(["bash", "-c", f"{lab.program('blkback')} attach {second.name} {image},raw,xvdb,w 2>&1"], 60 * lab.slow)
    assert said.code != 0 and "cannot be written alone" in said.out, f"another guest {when}: {said}"
    said = lab.sh(f"qemu-io -f raw -c 'write -P 99 0 512' {image} 2>&1; true")
    assert "lock" in said, f"qemu-io was given the image {when}: {said}"
    lab.step(f"nobody else got it {when}; it is open in {' '.join(sorted(users(lab, image)))}")


def pattern(guest: Guest, device: str) -> None:
    guest.run(f"dd if=/dev/urandom of=/tmp/pattern bs=64k count=16 2>/dev/null; sync; "
              f"dd if=/tmp/pattern of=/dev/{device} bs=64k seek=64 conv=fsync 2>/dev/null; sha256sum < /tmp/pattern > /tmp/sum")


def digest(guest: Guest, device: str) -> str:
    """The sum of the pattern's place on a disk, past the guest's page cache."""
    return guest.run(f"echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/{device} bs=64k skip=64 count=16 2>/dev/null | sha256sum").split()[0]


def digest_in(lab: Lab, image: str) -> str:
    return lab.sh(f"dd if={image} bs=64k skip=64 count=16 2>/dev/null | sha256sum").split()[0]


def iso(lab: Lab, word: str) -> str:
    """A disc that has nothing on it but a word."""
    path = lab.image(word, "64K")
    lab.sh(f"printf {word} | dd of={path} conv=notrunc 2>/dev/null")
    return path


def has(word: str) -> str:
    """Wait until the guest's drive has that disc: the drive tells of a new one late."""
    return (f"n=0; until dd if=/dev/sr0 bs=2k count=1 2>/dev/null | grep -q {word}; do n=$((n+1)); [ $n -lt 100 ]; sleep 0.3; done")


def beside(lab: Lab) -> tuple[Guest, str, str]:
    """A guest without PV drivers on a disk of its own, with the image and the sum of what it has written."""
    config, image = emulated(lab, "beside", "hda", unplug="never")
    guest = lab.create(config, 240)
    guest.wait_shell(300)
    guest.run(EMULATED)
    pattern(guest, "sda")
    return guest, image, digest(guest, "sda")


def hvm(lab: Lab) -> None:
    net.link(lab, "xenbr0", "bridge", "10.17.0.1/24")
    second = lab.guest(GuestConfig("second", memory=192))
    lab.step("a guest without PV drivers")
    neighbour, neighbour_image, neighbour_sum = beside(lab)

    lab.step("from file:…,hda,w, by way of the emulated disk")
    config, image = emulated(lab, "fully", "hda", MAC)
    guest = lab.create(config, 240)
    nobody_else(lab, second, image, "while it boots")
    guest.wait_shell(300)
    guest.wait_device("xvda")
    assert state(lab, guest) == "4"
    assert users(lab, image) == {"blkback"}, users(lab, image)
    # xl says the same as our own command.
    said = lab.sh(f"xl block-attach second file:{image},xvdc,w 2>&1; echo exit $?", 90)
    assert "cannot be written alone" in said and "exit 0" not in said, said
    nobody_else(lab, second, image, "once its driver is connected")
    pattern(guest, "xvda")
    sum_ = digest(guest, "xvda")
    net.give(guest, "eth0", "10.17.0.20/24")
    net.ping(lab, "10.17.0.20")

    lab.step("xl reboot")
    before = guest.domid()
    lab.xl("reboot fully")
    guest.wait_new_domain(before)
    wait_device_model(lab, image)
    nobody_else(lab, second, image, "after the reboot")
    guest.wait_shell(300)
    guest.wait_device("xvda")
    assert digest(guest, "xvda") == sum_
    net.give(guest, "eth0", "10.17.0.20/24")
    net.ping(lab, "10.17.0.20")

    lab.step("xl save, xl restore")
    lab.xl("save fully /srv/lab/fully.save", 240)
    lab.wait_gone("fully")
    lab.xl("restore /srv/lab/fully.save", 240)
    guest.restored()
    wait_state(lab, guest, "4")
    assert digest(guest, "xvda") == sum_
    nobody_else(lab, second, image, "after the restore")
    net.ping(lab, "10.17.0.20")

    lab.step("xl migrate to this machine")
    before = guest.domid()
    lab.xl("migrate -s '' fully 'xl migrate-receive'", 300)
    assert guest.domid() != before
    wait_state(lab, guest, "4")
    assert digest(guest, "xvda") == sum_
    # The pattern's file was lost with the reboot.
    guest.run("dd if=/dev/xvda of=/tmp/pattern bs=64k skip=64 count=16 2>/dev/null; "
              "dd if=/tmp/pattern of=/dev/xvda bs=64k seek=192 conv=fsync 2>/dev/null")
    nobody_else(lab, second, image, "after the migration")
    net.ping(lab, "10.17.0.20")

    lab.step("xl destroy")
    lab.keep_dmesg(guest)
    guest.destroy()
    lab.wait_gone("fully")
    assert digest_in(lab, image) == sum_
    lab.sh(f"cmp <(dd if={image} bs=64k skip=192 count=16 2>/dev/null) <(dd if={image} bs=64k skip=64 count=16 2>/dev/null)")
    lab.sh(f"qemu-io -f raw -c 'write -P 99 0 512' {image}")

    lab.step("the guest without PV drivers has not noticed")
    assert state(lab, neighbour) == "2"
    assert digest(neighbour, "sda") == neighbour_sum
    neighbour.poweroff()
    assert digest_in(lab, neighbour_image) == neighbour_sum


def plain(lab: Lab) -> None:
    net.link(lab, "xenbr0", "bridge", "10.17.0.1/24")
    second = lab.guest(GuestConfig("second", memory=192))
    config, image = emulated(lab, "plain", "hda", PLAIN_MAC, "never")
    config.disks += [Disk(iso(lab, "first"), "hdc", "ro", ":cdrom", "file:")]
    guest = lab.create(config, 240)
    guest.wait_shell(300)
    guest.run(EMULATED)
    pattern(guest, "sda")
    assert state(lab, guest) == "2"
    nobody_else(lab, second, image, "while the emulated disk is in use")
    net.give(guest, "eth0", "10.17.0.21/24")
    net.ping(lab, "10.17.0.21")
    sum_ = digest(guest, "sda")

    lab.step("its CD-ROM: read, ejected, another inserted")
    guest.run("modprobe sr_mod; " + has("first"))
    lab.sh(f"xenstore-read {guest.backend_path('hdc', 'qdisk')}/params")
    lab.xl("cd-eject plain hdc")
    guest.run("! dd if=/dev/sr0 bs=2k count=1 of=/dev/null 2>/dev/null")
    lab.xl(f"cd-insert plain hdc {iso(lab, 'other')}")
    guest.run(has("other"))

    lab.step("xl save, xl restore")
    lab.xl("save plain /srv/lab/plain.save", 240)
    lab.wait_gone("plain")
    lab.xl("restore /srv/lab/plain.save", 240)
    guest.restored()
    assert digest(guest, "sda") == sum_
    assert state(lab, guest) == "2"
    nobody_else(lab, second, image, "after the restore")
    lab.keep_dmesg(guest)
    guest.destroy()
    lab.wait_gone("plain")
    assert digest_in(lab, image) == sum_


def both(lab: Lab) -> None:
    """The emulated disk stays, and the PV driver comes: two caches on one image."""
    second = lab.guest(GuestConfig("second", memory=192))
    config, image = emulated(lab, "both", "xvda", "", "unnecessary")
    guest = lab.create(config, 240)
    path = guest.backend_path("xvda")
    lab.sh(f"until xenstore-read {path}/on-hold 2>/dev/null | grep 'device model'; do sleep 0.5; done", 300)
    assert state(lab, guest) == "2"
    listed = lab.sh(f"{lab.program('blkback')} list {guest.domid()}")
    assert "emulated disk is in use" in listed, listed
    nobody_else(lab, second, image, "while both drivers are there")
    guest.destroy()
    lab.wait_gone("both")
    lab.sh(f"qemu-io -f raw -c 'write -P 99 0 512' {image}")


HVM = Scenario("hvm", "an HVM guest from file:…,hda,w: boot, unplug, reboot, save, restore, migrate, destroy; nobody else gets its disk, "
               "one without PV drivers runs beside it",
               hvm, backends=("ours",), network=True, order=26)
PLAIN = Scenario("hvm-plain", "an HVM guest without PV drivers keeps its emulated disk, and nobody else gets it",
                 plain, backends=("ours",), network=True, tolerated=(r"I/O error.* dev sr0",), order=27)
BOTH = Scenario("hvm-both", "a PV driver that comes while the emulated disk is live is left waiting",
                both, backends=("ours",), order=28)
