"""Guests: their xl.cfg, and what a scenario does with a running one."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from machine import CommandFailed, Result

if TYPE_CHECKING:
    from lab import Lab


@dataclass
class Disk:
    """One disk as xl.cfg names it. `target` is a file or a block device in dom0."""

    target: str
    vdev: str
    access: str = "rw"
    extra: str = ""
    prefix: str = ""            # "file:" or "phy:": written as the handbooks do, `file:/srv/x.img,hda,w`

    def spec(self, backend: str) -> str:
        """The same for the kernel's backend and for ours: that is the point. Only qdisk has to be asked for."""
        if self.prefix:
            return f"{self.prefix}{self.target},{self.vdev}{self.extra},{'w' if self.access == 'rw' else 'r'}"
        kind = "backendtype=qdisk," if backend == "qdisk" else ""
        more = f"{self.extra}," if self.extra else ""
        return f"format=raw,{kind}{more}vdev={self.vdev},access={self.access},target={self.target}"

    def number(self) -> int:
        """The device number libxl gives (xen-vbd-interface(7)): xvdX has major 202, 16 minors each; hdX the IDE majors,
        two disks each."""
        index = ord(self.vdev[-1]) - ord("a")
        if self.vdev in ("hda", "hdb", "hdc", "hdd"):
            return (3, 22)[index // 2] << 8 | (index % 2) << 6
        if not (self.vdev.startswith("xvd") and len(self.vdev) == 4):
            raise ValueError(f"only whole disks xvda…xvdp and hda…hdd here, not {self.vdev}")
        return 202 << 8 | index << 4


@dataclass
class GuestConfig:
    name: str
    kind: str = "pv"                    # or "pvh", "hvm"
    memory: int = 320
    vcpus: int = 1
    disks: list[Disk] = field(default_factory=list)
    vifs: list[str] = field(default_factory=list)               # as in xl.cfg
    root: str = ""                      # "xvda": the initrd goes on to that disk
    blkfront: dict[str, object] = field(default_factory=dict)   # module parameters
    kernel: str = ""                    # a name in worlds.KERNELS, or "i386"; "" is the world's own, as dom0's
    loader: str = ""                    # a file in dom0 in the kernel's place, which finds kernel and initrd by itself
    no_blkfront: bool = False           # leave loading the module to the scenario
    emul_unplug: str = ""               # of an HVM guest's kernel: "never", "unnecessary"
    on_reboot: str = "restart"

    def text(self, backend: str) -> str:
        extra = "console=hvc0 quiet loglevel=1 panic=1"
        if self.root:
            extra += f" lab.root={self.root}"
        if self.no_blkfront:
            extra += " lab.noblk=1"
        if self.blkfront:
            extra += " lab.blkfront=" + ",".join(f"{name}={value}" for name, value in self.blkfront.items())
        if self.emul_unplug:
            extra += f" xen_emul_unplug={self.emul_unplug}"
        image, initrd, more = "vmlinux", "guest{}.cpio", ""
        if self.kind == "hvm":
            # hvmloader boots a bzImage by way of the device model. The rest saves what is slow under emulation: 13 s of
            # looking for PCI devices by ports, a screen, USB. builder= is how the handbooks ask for such a guest.
            # It reads both through a port of the device model's, the initrd byte by byte: no tools in that one.
            image, initrd = "vmlinuz", "small{}.cpio.gz"
            extra += " tsc=reliable pci=noearly"
            more = 'builder="hvm"\nacpi=1\nvnc=0\nsdl=0\nnographic=1\nvga="none"\nusb=0\n'
        kind = more or f'type="{self.kind}"\n'
        disks = ", ".join(f'"{disk.spec(backend)}"' for disk in self.disks)
        vifs = ",".join(f"'{vif}'" for vif in self.vifs)
        # Xen would emulate every RDTSC here, because QEMU's TSC is not invariant, and that is slow: of a PVH guest's each
        # is an exit that QEMU has to emulate too.
        tsc = 'tsc_mode="native"\n' if self.kind == "pvh" else ""
        which = f"-{self.kernel}" if self.kernel else ""
        boot = (f'kernel="{self.loader}"\n' if self.loader
                else f'kernel="/lab/boot/{image}{which}"\nramdisk="/lab/boot/{initrd.format(which)}"\n')
        return (f'{tsc}name="{self.name}"\n{kind}{boot}'
                f'extra="{extra}"\nmemory={self.memory}\nvcpus={self.vcpus}\n'
                f'on_poweroff="destroy"\non_reboot="{self.on_reboot}"\non_crash="destroy"\ndisk=[{disks}]\nvif=[{vifs}]\n')


class Guest:
    """A guest that was created. Scenarios get one from Lab.guest()."""

    def __init__(self, lab: Lab, config: GuestConfig) -> None:
        self.lab, self.config, self.name = lab, config, config.name
        self._restored = False

    # ---- inside

    def try_run(self, script: str, timeout: float = 120) -> Result:
        """Run a script in the guest, whatever comes out."""
        return self.lab.machine.guest(self.name, script, timeout * self.lab.slow, self._restored)

    def run(self, script: str, timeout: float = 120) -> str:
        """Run a script in the guest and return what it printed; any exit but 0 fails the scenario."""
        result = self.try_run("set -e\n" + script, timeout)
        if result.code:
            why = f"not done after {timeout * self.lab.slow:.0f} s" if result.code == 124 else f"exit {result.code}"
            raise CommandFailed(f"guest {self.name}: {why} {result.error}: {script}\n{result.out[-3000:]}")
        return result.out

    def wait_shell(self, timeout: float = 150) -> None:
        """Wait until the guest's init answers."""
        self.run("true", timeout)

    def wait_device(self, vdev: str, present: bool = True, timeout: float = 60) -> None:
        """Wait until a block device is there (with a size: blkfront adds the disk before it connects), or gone."""
        test = f"[ -b /dev/{vdev} ] && [ $(cat /sys/block/{vdev}/size) -gt 0 ]" if present else f"[ ! -e /sys/block/{vdev} ]"
        self.run(f"n=0; until {test}; do n=$((n+1)); [ $n -lt {int(timeout * 5 * self.lab.slow)} ] || "
                 f"{{ echo /dev/{vdev}: present={present} did not come true; exit 1; }}; sleep 0.2; done", timeout + 10)

    def features(self, vdev: str) -> str:
        """blkfront's own account of what was agreed on, shortened."""
        line = self.run(f"dmesg | grep 'blkfront: {vdev}'")
        return ", ".join(f"{name} {value}" for name, value in
                         re.findall(r"(flush diskcache|barrier or flush|persistent grants|indirect descriptors): (\w+)", line))

    # ---- from outside

    def domid(self) -> int:
        return int(self.lab.sh(f"xl domid {self.name}"))

    def wait_new_domain(self, old: int) -> None:
        """Wait until the name belongs to another domain than before."""
        patience = 120 * self.lab.slow
        until = time.monotonic() + patience
        while time.monotonic() < until:
            result = self.lab.machine.run(["xl", "domid", self.name], 30)
            if result.code == 0 and int(result.out) != old:
                return
            time.sleep(1)
        raise CommandFailed(f"waited {patience:.0f} s for {self.name} to come back under a new domain id (it was {old})")

    def backend_path(self, vdev: str, kind: str | None = None) -> str:
        kind = kind or ("qdisk" if self.lab.backend == "qdisk" else "vbd")
        return f"/local/domain/0/backend/{kind}/{self.domid()}/{Disk('', vdev).number()}"

    def attach(self, disk: Disk, timeout: float = 90) -> None:
        """xl block-attach, and wait until the guest sees the disk."""
        self.lab.xl(f"block-attach {self.name} {disk.spec(self.lab.backend)}", timeout)
        self.wait_device(disk.vdev)

    def detach(self, vdev: str, timeout: float = 60) -> None:
        self.lab.xl(f"block-detach {self.name} {vdev}", timeout)

    def destroy(self) -> None:
        self.lab.xl(f"destroy {self.name}", 60)
        self.lab.forget(self)

    def poweroff(self, timeout: float = 90) -> None:
        """Shut down from outside and wait until the domain is gone, its devices with it."""
        self.lab.keep_dmesg(self)
        self.lab.xl(f"shutdown -w {self.name}", timeout)
        self.lab.wait_gone(self.name)
        self.lab.forget(self)

    def restored(self) -> None:
        """Tell that the guest goes on under a new domain id: its init will not announce itself again."""
        self._restored = True

    def rebooted(self) -> None:
        """Tell that it starts anew under a new domain id, and will say when it is ready."""
        self._restored = False
