"""Storage that fails or hangs under a guest: what the guest is told, and that nobody else notices."""

from __future__ import annotations

import contextlib
from pathlib import Path

import nbd

from cells import Report, host_bytes
from disk import Disk, compare
from dom0 import Dom0, Guest
from storage import SIZE, Storage
from system import Failed, Media, becomes, last_words, sh

SECTORS = SIZE // 512


class Scene:
    """A guest on a disk that is about to have trouble, and an honest neighbour on another."""

    def __init__(self, media: Media, folder: Path, table: str) -> None:
        self.below = f"/dev/{media.take()}"
        sh(f"modprobe dm-mod; modprobe dm-flakey; dmsetup create bad --table '{table.format(disk=self.below)}'")
        self.storage = Storage("/dev/mapper/bad")
        fine = media.take()
        sh(f"dmsetup create fine --table '0 {SECTORS} linear /dev/{fine} 0'")
        self.neighbour_storage = Storage("/dev/mapper/fine")
        self.dom0 = Dom0(folder)
        self.neighbour = self.dom0.guest("neighbour")
        self.dom0.attach(self.neighbour, self.neighbour_storage.target)
        self.neighbour_disk = Disk(self.neighbour.uri, bytes(SIZE), 2)

    def guest(self, name: str = "guest") -> tuple[Guest, Disk]:
        guest = self.dom0.guest(name)
        self.dom0.attach(guest, self.storage.target)
        return guest, Disk(guest.uri, bytes(SIZE))

    def neighbour_goes_on(self) -> None:
        try:
            self.neighbour_disk.scattered_writes(8)
            self.neighbour_disk.flush()
            self.neighbour_disk.verify()
        except (Failed, nbd.Error) as error:
            raise Failed(f"the neighbour's disk: {error}") from None

    def reload(self, table: str) -> None:
        sh(f"dmsetup reload bad --table '{table.format(disk=self.below)}'; dmsetup suspend --noflush --nolockfs bad; dmsetup resume bad")

    def end(self, report: Report) -> None:
        with report.step("the neighbour's end"):
            self.neighbour_goes_on()
            self.dom0.detach(self.neighbour)
            compare(host_bytes(self.neighbour_storage), self.neighbour_disk.model, 0, "the neighbour's, read by the host")
        with report.step("end of blkback"):
            self.dom0.stop()


LINEAR = f"0 {SECTORS} linear {{disk}} 0"


def bad_sectors(media: Media, folder: Path, report: Report) -> None:
    """Eight sectors in the middle fail: the guest is told, for these and for nothing else."""
    bad = SECTORS // 2
    scene = Scene(media, folder, f"0 {bad} linear {{disk}} 0\n{bad} 8 error\n{bad + 8} {SECTORS - bad - 8} linear {{disk}} {bad + 8}")
    guest, disk = scene.guest()
    with report.step("good sectors"):
        disk.write(0, 1 << 20)
        disk.write((bad + 8) * 512, 4096)
        compare(disk.read(0, 1 << 20), disk.model[:1 << 20], 0, "good sectors")
    for what, act in (("a read", lambda: disk.read(bad * 512, 4096)), ("a write", lambda: disk.write(bad * 512, 4096))):
        with report.step(f"{what} of bad sectors"):
            try:
                act()
            except nbd.Error as error:
                report.facts[what] = str(error.string)
            else:
                raise Failed("was answered as done")
    with report.step("good sectors, afterwards"):
        disk.write(6 << 20, 65536)
        disk.flush()
        compare(disk.read(6 << 20, 65536), disk.model[6 << 20:(6 << 20) + 65536], 6 << 20, "good sectors")
    with report.step("detach"):
        scene.dom0.detach(guest)
    scene.end(report)


def failing_flush(media: Media, folder: Path, report: Report) -> None:
    """A flush that fails stops the disk, and nobody writes to it before `blkback checked`."""
    scene = Scene(media, folder, LINEAR)
    guest, disk = scene.guest()
    disk.write(0, 65536)
    disk.flush()
    scene.reload(f"0 {SECTORS} flakey {{disk}} 0 0 10000 1 error_writes")
    with report.step("the flush"):
        cookie = disk.nbd.aio_flush()
        becomes("blkback closes the disk", lambda: "flush failed" in scene.dom0.list(guest))
        try:
            disk.finish([cookie], "the flush", 1)
        except (Failed, nbd.Error):
            pass        # no answer at all, or the end of the connection
        else:
            raise Failed("a flush that failed was answered as done")
        report.facts["list says"] = last_words(scene.dom0.list(guest), 160)
    with report.step("the neighbour, meanwhile"):
        scene.neighbour_goes_on()
    with report.step("detach"):
        scene.dom0.tool("detach", guest.name, "xvda")
        becomes("the disk is gone", lambda: "51712" not in scene.dom0.list(guest))
    scene.reload(LINEAR)
    other = scene.dom0.guest("other")
    with report.step("refused until checked"):
        report.facts["refused"] = scene.dom0.refuses(other, scene.storage.target, "w")
    with report.step("checked"):
        done = scene.dom0.tool("checked", scene.storage.target)
        if done.returncode:
            raise Failed(last_words(done.stdout))
        scene.dom0.attach(other, scene.storage.target)
        again = Disk(other.uri, bytes(SIZE))
        compare(again.read(0, 65536), disk.model[:65536], 0, "what was flushed before")
        scene.dom0.detach(other)
    scene.end(report)


def hang(media: Media, folder: Path, report: Report) -> None:
    """A device that answers nothing: others go on, and what was asked is answered when it answers again."""
    scene = Scene(media, folder, LINEAR)
    guest, disk = scene.guest()
    disk.write(0, 65536)
    sh("dmsetup suspend --noflush --nolockfs bad")
    try:
        cookies = [disk.write_at(number << 20, disk.random.randbytes(16384)) for number in range(8)]
        with report.step("the neighbour, meanwhile"):
            scene.neighbour_goes_on()
        with report.step("another disk comes, meanwhile"):
            third = scene.dom0.guest("third")
            sh(f"truncate -s 16M {folder}/third.img")
            scene.dom0.attach(third, f"{folder}/third.img")
            scene.dom0.detach(third)
        with report.step("detach, meanwhile"):
            done = scene.dom0.tool("detach", guest.name, "xvda")
            report.facts["detach says"] = last_words(done.stdout, 160)
            if done.returncode == 0:
                raise Failed("detach says that the disk is gone while its writes hang")
            if "run this again" not in done.stdout:
                raise Failed(f"detach does not say what to do: {last_words(done.stdout)}")
    finally:
        sh("dmsetup resume bad")
    with report.step("the answers"):
        try:
            disk.finish(cookies, "writes of before")
        except nbd.Error as error:
            report.facts["writes"] = str(error.string)
    with report.step("the end of it"):
        # It was asked to go, and goes; what is left in XenStore the second detach clears away, as the first one said.
        becomes("the disk is let go of", lambda: "let go of" in scene.dom0.list(guest))
        scene.dom0.detach(guest)
        compare(host_bytes(scene.storage), disk.model, 0, "read by the host")
    scene.end(report)


def hang_and_die(media: Media, folder: Path, report: Report) -> None:
    """The guest is killed while its disk hangs: nothing of it stays when the device answers again."""
    scene = Scene(media, folder, LINEAR)
    guest, disk = scene.guest()
    sh("dmsetup suspend --noflush --nolockfs bad")
    try:
        for number in range(8):
            disk.write_at(number << 20, disk.random.randbytes(16384))
        guest.process.kill()
        with report.step("the neighbour, meanwhile"):
            scene.neighbour_goes_on()
    finally:
        sh("dmsetup resume bad")
    with report.step("the device is free again"):
        heir = scene.dom0.guest("heir")

        def attached() -> bool:
            return scene.dom0.tool("attach", heir.name, f"{scene.storage.target},raw,xvda,w").returncode == 0
        becomes("the next guest gets the disk", attached)
        scene.dom0.detach(heir)
    scene.end(report)


def hang_at_attach(media: Media, folder: Path, report: Report) -> None:
    """A device that hangs when it is attached keeps nobody else waiting, and is there when it answers."""
    scene = Scene(media, folder, LINEAR)

    def openers() -> list[str]:
        """Where threads of blkback's that open an image are in the kernel."""
        stacks = []
        for task in Path(f"/proc/{scene.dom0.blkback.process.pid}/task").iterdir():
            with contextlib.suppress(OSError):      # it has ended meanwhile
                if (task / "comm").read_text() == "opener\n":
                    stacks.append((task / "stack").read_text())
        return stacks

    sh("dmsetup suspend --noflush --nolockfs bad")
    try:
        with report.step("attach ends"):
            done = scene.dom0.tool("attach", scene.dom0.guest("first").name, f"{scene.storage.target},raw,xvda,w", timeout=120)
            report.facts["attach says"] = last_words(done.stdout, 160)
            if done.returncode == 0 or "has not answered for" not in done.stdout:
                raise Failed(f"attach does not say that the storage hangs: {last_words(done.stdout)}")
            # The thread that hangs has the device claimed. (Another guest, as the lab's end when their disk goes.)
            report.facts["again"] = scene.dom0.refuses(scene.dom0.guest("second"), scene.storage.target, "w")
            stacks = openers()
            report.facts["the opener is in"] = " < ".join(line.split()[-1] for line in "".join(stacks).splitlines()[:4])
            if len(stacks) != 1:
                raise Failed(f"{len(stacks)} threads wait for the one device")
        with report.step("the neighbour, meanwhile"):
            scene.neighbour_goes_on()
        with report.step("another disk comes, meanwhile"):
            third = scene.dom0.guest("third")
            sh(f"truncate -s 16M {folder}/third.img")
            scene.dom0.attach(third, f"{folder}/third.img")
            scene.dom0.detach(third)
    finally:
        sh("dmsetup resume bad")
    with report.step("it answers"):
        becomes("no thread waits", lambda: not openers())
        guest = scene.dom0.guest("guest")
        scene.dom0.attach(guest, scene.storage.target)
        disk = Disk(guest.uri, bytes(SIZE))
        disk.write(0, 65536)
        disk.flush()
        disk.verify()
        scene.dom0.detach(guest)
    scene.end(report)


FAULTS = {
    "dm-error: bad sectors": bad_sectors,
    "dm-flakey: a flush fails": failing_flush,
    "a device that hangs": hang,
    "a device that hangs, its guest dies": hang_and_die,
    "a device that hangs at attach": hang_at_attach,
}
