"""Builds the lab's images into a cache folder: hypervisor, kernel, dom0 disk, guest initrds, guest root disk.

Kernels are shared by all worlds and lie below kernels/, the rest in a folder for each world. Each stage is named by a key
over its recipe; a stage whose key is unchanged is skipped, so a second run touches no network. What changes often (the agent, scenario scripts, the guests' init, our binary) is NOT in here: it
travels in the payload disk made for each boot (payload.py).
"""

from __future__ import annotations

import fcntl
import gzip
import os
import shutil
import subprocess
from pathlib import Path
from typing import Callable, Iterable

import cpio
import elf
import kernel as kernels
import packages
import recipe
from kernel import KernelImages, copy_modules
from progress import Step, say
from worlds import KERNELS, XEN_4_17, Kernel, World

HERE = Path(__file__).resolve().parent
#: What a dom0 under systemd has on top of its packages.
SYSTEMD = HERE / "dom0/systemd"


class Images:
    """Where the built things of one world are."""

    def __init__(self, cache: Path, world: World, guests: Iterable[str] = ()) -> None:
        """`guests`: kernels that some guests want besides dom0's, by their names in KERNELS."""
        self.world = world
        self.common = cache                     # what the worlds share is below kernels/ there
        self.cache = cache / world.name
        self.kernels = {name: KernelImages(cache / "kernels" / name) for name in sorted({world.kernel, *guests})}
        self.kernel = self.kernels[world.kernel]        # dom0's
        self.packages = self.cache / "packages"     # the hypervisor's, unpacked
        self.root = self.cache / "dom0-root"        # debootstrap's tree, and the kernel's modules
        self.xen = self.cache / "xen"               # ELF32 multiboot, gunzipped
        self.dom0_initrd = self.cache / "dom0-initrd.cpio"
        self.dom0 = self.cache / "dom0.img"
        self.guest = self.cache / "guest"           # a guest's tree without modules: busybox, fio and friends
        self.guest_initrd = self.cache / "guest.cpio"
        self.pvgrub = self.cache / "pvgrub"         # grub-xen-host, unpacked
        self.packages32 = self.cache / "packages-i386"
        self.vmlinux32 = self.cache / "vmlinux-i386"
        self.guest32_initrd = self.cache / "guest-i386.cpio"
        self.logs = self.cache / "build-logs"


def stage(folder: Path, name: str, key: str, outputs: list[Path], make: Callable[[], None]) -> bool:
    """Run `make` unless the stamp says it was done with this very key and the outputs are there."""
    stamp = folder / f"{name}.key"
    if stamp.exists() and stamp.read_text() == key and all(path.exists() for path in outputs):
        return False
    stamp.unlink(missing_ok=True)
    with Step(f"build: {folder.name}: {name}"):
        make()
    stamp.write_text(key)
    return True


def build(cache: Path, world: World, guests: Iterable[str] = ()) -> Images:
    """Bring every image of a world up to date; says at the end whether anything had to be done."""
    images = Images(cache, world, guests)
    images.cache.mkdir(parents=True, exist_ok=True)
    with (cache / "build.lock").open("w") as lock:
        # Two builds at once into one folder would fill each other's trees. Let go when the file is closed.
        fcntl.flock(lock, fcntl.LOCK_EX)
        adopt(cache)
        packages.ensure_packages()
        done = make_all(images)
    say(f"build: Xen {world.name}: " + ("complete" if done else "nothing to do"))
    return images


def make_all(images: Images) -> bool:
    """Every stage in order; whether anything had to be done."""
    world = images.world
    tools = [HERE / "build.py", HERE / "kernel.py", HERE / "cpio.py"]

    done = False
    for name, kernel in images.kernels.items():
        done |= build_kernel(KERNELS[name], kernel, tools)
    kernel_key = kernel_fetch_key(KERNELS[world.kernel])
    xen_key = recipe.key(world.hypervisor, world.suite)
    root_key = recipe.key(world.suite, list(world.packages))
    dom0_key = recipe.key(kernel_key, root_key, recipe.DOM0_MODULE_FOLDERS, recipe.DOM0_MODULE_FILES,
                          recipe.DOM0_INITRD_MODULES, HERE / "dom0/initrd-init", recipe.MASKED_UNITS,
                          *sorted(path for path in SYSTEMD.rglob("*") if path.is_file()), *tools)
    guest_key = recipe.key(root_key, recipe.GUEST_TOOLS, recipe.FIO_LIBRARIES, HERE / "elf.py", *tools)
    done |= stage(images.cache, "hypervisor", xen_key, [images.xen], lambda: make_hypervisor(images))
    done |= stage(images.cache, "debootstrap", root_key, [images.root], lambda: make_root(images))
    done |= stage(images.cache, "dom0", dom0_key, [images.dom0, images.dom0_initrd], lambda: make_dom0(images))
    done |= stage(images.cache, "guest", guest_key, [images.guest, images.guest_initrd], lambda: make_guests(images))
    done |= stage(images.cache, "pvgrub", recipe.key(world.suite, recipe.PVGRUB_PACKAGE), [images.pvgrub], lambda: fetch_pvgrub(images))
    if world.guest32:
        fetch32_key = recipe.key(world.suite, recipe.I386_KERNEL, recipe.I386_BUSYBOX)
        guest32_key = recipe.key(fetch32_key, recipe.GUEST_MODULES, *tools)
        done |= stage(images.cache, "i386-packages", fetch32_key, [images.packages32], lambda: fetch_i386(images))
        done |= stage(images.cache, "i386-guest", guest32_key, [images.vmlinux32, images.guest32_initrd],
                      lambda: make_i386(images))
    return done


def adopt(cache: Path) -> None:
    """Before there were two worlds, the images of the one lay in `cache` itself: the dear ones are kept, the others go."""
    old = cache / XEN_4_17.name
    if not (cache / "dom0-root").is_dir():
        return
    old.mkdir(exist_ok=True)
    for name in ("dom0-root", "debootstrap.key", "packages-i386", "i386-packages.key", "apt-i386"):
        if (cache / name).exists() and not (old / name).exists():
            (cache / name).rename(old / name)
    for name in ("packages", "packages-i386", "apt-i386", "payload", "guest", "guest-root", "guest-overlay", "guest-i386", "dom0-initrd",
                 "build-logs", "run", "logs"):
        shutil.rmtree(cache / name, ignore_errors=True)
    for pattern in ("*.img", "*.key", "*.cpio", "vmlinu*", "xen"):
        for path in cache.glob(pattern):
            path.unlink()


def apt_options(suite: str, folder: Path, logs: Path) -> list[str]:
    """For apt to see a suite, its lists brought up to date: none where the machine's own sources have it."""
    if packages.mirror_for(suite, packages.machine_sources()) is None:
        return packages.other_suite(suite, folder / "apt", logs / "apt-update.log")
    packages.quiet(["apt-get", "update"], logs / "apt-update.log", fatal=False)
    return []


def kernel_fetch_key(kernel: Kernel) -> str:
    return recipe.key(kernel.suite, kernel.meta)


def build_kernel(kernel: Kernel, images: KernelImages, tools: list[Path]) -> bool:
    images.folder.mkdir(parents=True, exist_ok=True)
    fetch_key = kernel_fetch_key(kernel)
    modules_key = recipe.key(fetch_key, recipe.GUEST_MODULES, recipe.GUEST_MODULES_LATER, *tools)
    done = stage(images.folder, "kernel", fetch_key, [images.packages, images.vmlinuz, images.vmlinux, images.vmlinux_gz],
                 lambda: fetch_kernel(kernel, images))
    small_key = recipe.key(fetch_key, recipe.GUEST_MODULES, recipe.EMULATED_MODULES, *tools)
    done |= stage(images.folder, "modules", modules_key, [images.modules], lambda: make_modules(images))
    return done | stage(images.folder, "small", small_key, [images.small], lambda: make_small(images))


def fetch_kernel(kernel: Kernel, images: KernelImages) -> None:
    logs = images.folder / "build-logs"
    options = apt_options(kernel.suite, images.folder, logs)
    names = packages.kernel_packages(kernel.meta, options)
    packages.download(names, images.packages, logs / "download.log", options)
    say("build: " + ", ".join(names))
    found = packages.find_kernel(images.packages)
    kernels.depmod(images.packages, found.version, logs / "depmod.log")
    shutil.copy(found.vmlinuz, images.vmlinuz)
    images.vmlinux.write_bytes(kernels.uncompressed(images.vmlinuz.read_bytes()))
    images.vmlinux_gz.write_bytes(gzip.compress(images.vmlinux.read_bytes(), 6, mtime=0))


def make_modules(images: KernelImages) -> None:
    """What every guest with this kernel has of it; unpacked over the tools' tree, in an initrd and on a root disk."""
    tree = images.folder / "guest-modules"
    shutil.rmtree(tree, ignore_errors=True)
    for folder in ("usr/lib/modules", "etc"):
        (tree / folder).mkdir(parents=True)
    (tree / "lib").symlink_to("usr/lib")
    copy_modules(images.packages, recipe.GUEST_MODULES, tree, recipe.GUEST_MODULES_LATER)
    kernels.depmod(tree, packages.find_kernel(images.packages).version, images.folder / "build-logs/depmod.log")
    pack(tree, images.modules)


def make_small(images: KernelImages) -> None:
    """The initrd for guests whose boot loader reads it slowly: an HVM guest's firmware byte by byte from a port of its
    device model, pvgrub sector by sector."""
    tree = images.folder / "small"
    busybox_tree(tree)
    copy_modules(images.packages, recipe.GUEST_MODULES, tree, recipe.EMULATED_MODULES)
    kernels.depmod(tree, packages.find_kernel(images.packages).version, images.folder / "build-logs/depmod.log")
    pack(tree, images.small)


def make_hypervisor(images: Images) -> None:
    """`-kernel` takes Xen only as the uncompressed ELF."""
    options = apt_options(images.world.suite, images.cache, images.logs)
    packages.download([images.world.hypervisor], images.packages, images.logs / "download.log", options)
    packed = images.packages / f"boot/xen-{images.world.name}-amd64.gz"
    images.xen.write_bytes(gzip.decompress(packed.read_bytes()))


def fetch_pvgrub(images: Images) -> None:
    options = apt_options(images.world.suite, images.cache, images.logs)
    packages.download([recipe.PVGRUB_PACKAGE], images.pvgrub, images.logs / "download-pvgrub.log", options)


def make_root(images: Images) -> None:
    packages.debootstrap(images.world.suite, list(images.world.packages), images.root, images.logs / "debootstrap.log")
    for junk in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale"):
        shutil.rmtree(images.root / junk, ignore_errors=True)


def make_dom0(images: Images) -> None:
    """dom0's disk: mkfs.ext4 fills it from the folder, so nothing is ever loop-mounted on the host."""
    found = packages.find_kernel(images.kernel.packages)
    version, source = found.version, found.modules
    target = images.root / "lib/modules" / version
    shutil.rmtree(images.root / "usr/lib/modules", ignore_errors=True)
    wanted = [file for folder in recipe.DOM0_MODULE_FOLDERS for file in (source / "kernel" / folder).rglob("*.ko*")]
    for name in recipe.DOM0_MODULE_FILES:       # some are built in in some kernels
        wanted += (source / "kernel" / name).parent.glob(Path(name).name + "*")
    for file in wanted:
        kernels.copy_module(file, target / file.relative_to(source))
    kernels.copy_tables(source, target)
    kernels.depmod(images.root, version, images.logs / "depmod.log")
    for folder in ("lab", "srv/lab", "var/log/lab", "var/log/xen/console"):
        (images.root / folder).mkdir(parents=True, exist_ok=True)

    if images.world.systemd:
        set_up_systemd(images.root)

    tree = images.cache / "dom0-initrd"
    busybox_tree(tree)
    copy_modules(images.kernel.packages, recipe.DOM0_INITRD_MODULES, tree)
    shutil.copy(HERE / "dom0/initrd-init", tree / "init")
    (tree / "init").chmod(0o755)
    pack(tree, images.dom0_initrd)

    # Without a journal: the disk is thrown away after each boot (QEMU's snapshot=on). Sparse, so size is free.
    make_ext4(images.root, images.dom0, "6G", ["-O", "^has_journal"], images.logs)


def set_up_systemd(root: Path) -> None:
    """The agent as a unit; what only costs time is masked."""
    shutil.copytree(SYSTEMD, root, dirs_exist_ok=True)
    units = root / "etc/systemd/system"
    for name, target in [(name, "/dev/null") for name in recipe.MASKED_UNITS] + [
            ("multi-user.target.wants/lab-agent.service", "/etc/systemd/system/lab-agent.service")]:
        (units / name).parent.mkdir(parents=True, exist_ok=True)
        (units / name).unlink(missing_ok=True)
        (units / name).symlink_to(target)


def make_ext4(tree: Path, image: Path, size: str, options: list[str], logs: Path) -> None:
    image.unlink(missing_ok=True)
    packages.quiet(["mkfs.ext4", "-q", "-F", *options, "-d", str(tree), str(image), size], logs / f"{image.name}.log")


def make_guests(images: Images) -> None:
    """One tree for all guests, whatever their kernel: with its modules it is an initrd, and what a root disk is filled with."""
    busybox_tree(images.guest)
    (images.root / "opt/lab").mkdir(parents=True, exist_ok=True)
    slim = elf.Program((images.root / "usr/bin/fio").read_bytes())
    slim.keep_only(recipe.FIO_LIBRARIES)
    (images.root / "opt/lab/fio").write_bytes(slim.data)
    (images.root / "opt/lab/fio").chmod(0o755)
    for name in recipe.GUEST_TOOLS:
        install_program(images.root, name, images.guest)
    (images.guest / "usr/bin/fio").symlink_to("/usr/opt/lab/fio")
    # Under a name of its own: Debian's static busybox prefers its own mke2fs (ext2 only) whatever PATH says.
    (images.guest / "usr/sbin/mkfs.ext4").symlink_to("mke2fs")
    pack(images.guest, images.guest_initrd)


def fetch_i386(images: Images) -> None:
    options = packages.foreign("i386", images.cache / "apt-i386", images.logs / "apt-i386.log")
    names = [packages.kernel_package(recipe.I386_KERNEL, options), recipe.I386_BUSYBOX]
    if ":" not in names[0]:
        names[0] += ":i386"
    packages.download(names, images.packages32, images.logs / "download-i386.log", options)


def make_i386(images: Images) -> None:
    """The 32-bit guest. No fio: its libraries would be another Debian; busybox' dd and checksums do."""
    found = packages.find_kernel(images.packages32)
    images.vmlinux32.write_bytes(kernels.uncompressed(found.vmlinuz.read_bytes()))
    kernels.depmod(images.packages32, found.version, images.logs / "depmod.log")
    tree = images.cache / "guest-i386"
    busybox_tree(tree, images.packages32 / "bin/busybox")
    copy_modules(images.packages32, recipe.GUEST_MODULES, tree)
    pack(tree, images.guest32_initrd)


def busybox_tree(tree: Path, busybox: Path = Path("/bin/busybox")) -> None:
    """A root with busybox under all its names, laid out with merged /usr like Debian's."""
    shutil.rmtree(tree, ignore_errors=True)
    for folder in ("usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "proc", "sys", "dev", "run", "tmp", "mnt", "root",
                   "etc", "lab"):
        (tree / folder).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (tree / name).symlink_to(f"usr/{name}")
    shutil.copy(busybox, tree / "bin/busybox")
    for applet in subprocess.run(["/bin/busybox", "--list"], capture_output=True, text=True).stdout.split():
        if applet != "busybox":
            (tree / "bin" / applet).symlink_to("busybox")


def install_program(root: Path, name: str, tree: Path) -> None:
    """Copy a program and every library its loader would load, at the paths they have in dom0."""
    listing = subprocess.run(["chroot", str(root), "ldd", name], capture_output=True, text=True).stdout
    wanted = [name]
    for line in listing.splitlines():
        words = line.split()
        wanted += [word for word in words if word.startswith("/")][:1]
    for path in wanted:
        # Merged /usr: always the place below /usr, since the tree is unpacked over one whose /bin is a link.
        inside = path if path.startswith("/usr/") else "/usr" + path
        target = tree / inside.lstrip("/")
        if target.exists() and not target.is_symlink():
            continue
        target.unlink(missing_ok=True)      # busybox' own program of that name: never write through the link
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy((root / path.lstrip("/")).resolve() if not (root / path.lstrip("/")).is_symlink()
                    else _inside(root, path), target)


def _inside(root: Path, path: str) -> Path:
    """Follow links as the chroot would: an absolute link must not lead out to the host's files."""
    current = path
    for _ in range(20):
        here = root / current.lstrip("/")
        if not here.is_symlink():
            return here
        link = os.readlink(here)
        current = link if link.startswith("/") else os.path.normpath(os.path.join(os.path.dirname(current), link))
    raise OSError(f"too many links at {path}")


def pack(tree: Path, archive: Path) -> None:
    with archive.open("wb") as out:
        cpio.write(tree, out)
