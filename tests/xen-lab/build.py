"""Builds the lab's images into a cache folder: hypervisor, kernel, dom0 disk, guest initrds, guest root disk.

Each stage is named by a key over its recipe; a stage whose key is unchanged is skipped, so a second run touches
no network. What changes often (the agent, scenario scripts, the guests' init, our binary) is NOT in here: it
travels in the payload disk made for each boot (payload.py).
"""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Callable

import cpio
import elf
import packages
import recipe
from progress import Step, say

HERE = Path(__file__).resolve().parent


class Images:
    """Where the built things are."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.packages = cache / "packages"      # hypervisor and kernel packages, unpacked
        self.root = cache / "dom0-root"         # debootstrap's tree, and the kernel's modules
        self.xen = cache / "xen"                # ELF32 multiboot, gunzipped
        self.vmlinuz = cache / "vmlinuz"
        self.vmlinux = cache / "vmlinux"        # for guests
        self.dom0_initrd = cache / "dom0-initrd.cpio"
        self.dom0 = cache / "dom0.img"
        self.guest = cache / "guest"            # a guest's tree: busybox, modules, fio and friends
        self.guest_initrd = cache / "guest.cpio"
        self.packages32 = cache / "packages-i386"
        self.vmlinux32 = cache / "vmlinux-i386"
        self.guest32_initrd = cache / "guest-i386.cpio"
        self.logs = cache / "build-logs"

    def kernel_version(self) -> str:
        return kernel_version(self.packages)


def kernel_version(packages_tree: Path) -> str:
    return next((packages_tree / "lib/modules").iterdir()).name


def stage(images: Images, name: str, key: str, outputs: list[Path], make: Callable[[], None]) -> bool:
    """Run `make` unless the stamp says it was done with this very key and the outputs are there."""
    stamp = images.cache / f"{name}.key"
    if stamp.exists() and stamp.read_text() == key and all(path.exists() for path in outputs):
        return False
    stamp.unlink(missing_ok=True)
    with Step(f"build: {name}"):
        make()
    stamp.write_text(key)
    return True


def build(cache: Path) -> Images:
    """Bring every image up to date; says at the end whether anything had to be done."""
    images = Images(cache)
    cache.mkdir(parents=True, exist_ok=True)
    packages.ensure_packages()

    kernel_key = recipe.key(recipe.HYPERVISOR_PACKAGE, recipe.SUITE)
    root_key = recipe.key(recipe.SUITE, recipe.DOM0_PACKAGES)
    dom0_key = recipe.key(kernel_key, root_key, recipe.DOM0_MODULE_FOLDERS, recipe.DOM0_MODULE_FILES,
                          recipe.DOM0_INITRD_MODULES, HERE / "dom0/initrd-init", HERE / "build.py", HERE / "cpio.py")
    guest_key = recipe.key(kernel_key, root_key, recipe.GUEST_MODULES, recipe.GUEST_MODULES_LATER, recipe.GUEST_TOOLS,
                           recipe.FIO_LIBRARIES, HERE / "build.py", HERE / "cpio.py", HERE / "elf.py")

    fetch32_key = recipe.key(recipe.SUITE, recipe.I386_KERNEL, recipe.I386_BUSYBOX)
    guest32_key = recipe.key(fetch32_key, recipe.GUEST_MODULES, HERE / "build.py", HERE / "cpio.py")
    done = stage(images, "kernel", kernel_key, [images.xen, images.vmlinuz, images.vmlinux],
                 lambda: make_kernel(images))
    done |= stage(images, "debootstrap", root_key, [images.root], lambda: make_root(images))
    done |= stage(images, "dom0", dom0_key, [images.dom0, images.dom0_initrd], lambda: make_dom0(images))
    done |= stage(images, "guest", guest_key, [images.guest, images.guest_initrd], lambda: make_guests(images))
    done |= stage(images, "i386-packages", fetch32_key, [images.packages32], lambda: fetch_i386(images))
    done |= stage(images, "i386-guest", guest32_key, [images.vmlinux32, images.guest32_initrd],
                  lambda: make_i386(images))
    say("build: " + ("complete" if done else "nothing to do"))
    return images


def make_kernel(images: Images) -> None:
    """Fetch the hypervisor and the kernel; `-kernel` takes Xen only as the uncompressed ELF."""
    packages.quiet(["apt-get", "update"], images.logs / "apt-update.log", fatal=False)
    names = [recipe.HYPERVISOR_PACKAGE, packages.kernel_package()]
    packages.download(names, images.packages, images.logs / "download.log")
    say("build: " + ", ".join(names))
    boot = images.packages / "boot"
    images.xen.write_bytes(gzip.decompress((boot / f"xen-{recipe.XEN}-amd64.gz").read_bytes()))
    shutil.copy(boot / f"vmlinuz-{images.kernel_version()}", images.vmlinuz)
    images.vmlinux.write_bytes(uncompressed_kernel(images.vmlinuz.read_bytes()))
    packages.quiet(["depmod", "-b", str(images.packages), images.kernel_version()], images.logs / "depmod.log")


def uncompressed_kernel(bzimage: bytes) -> bytes:
    """The ELF inside a bzImage (Documentation/x86/boot: payload_offset and payload_length, protocol 2.08).

    libxl's domain builder would unpack it itself, in dom0, with every `xl create`: many seconds under emulation.
    """
    sectors = bzimage[0x1F1] or 4
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    payload = bzimage[(sectors + 1) * 512 + offset:][:length]
    # The last four bytes are the size, not part of the XZ stream.
    return lzma.LZMADecompressor().decompress(payload)


def make_root(images: Images) -> None:
    packages.debootstrap(recipe.SUITE, recipe.DOM0_PACKAGES, images.root, images.logs / "debootstrap.log")
    for junk in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale"):
        shutil.rmtree(images.root / junk, ignore_errors=True)


def make_dom0(images: Images) -> None:
    """dom0's disk: mkfs.ext4 fills it from the folder, so nothing is ever loop-mounted on the host."""
    version = images.kernel_version()
    source = images.packages / "lib/modules" / version
    target = images.root / "lib/modules" / version
    shutil.rmtree(images.root / "usr/lib/modules", ignore_errors=True)
    target.mkdir(parents=True)
    for folder in recipe.DOM0_MODULE_FOLDERS:
        if (source / "kernel" / folder).is_dir():
            shutil.copytree(source / "kernel" / folder, target / "kernel" / folder, dirs_exist_ok=True)
    for file in recipe.DOM0_MODULE_FILES:
        if (source / "kernel" / file).is_file():    # some are built in in some kernels
            (target / "kernel" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / "kernel" / file, target / "kernel" / file)
    for index in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        shutil.copy(source / index, target / index)
    packages.quiet(["depmod", "-b", str(images.root), version], images.logs / "depmod.log")
    for folder in ("lab", "srv/lab", "var/log/lab", "var/log/xen/console"):
        (images.root / folder).mkdir(parents=True, exist_ok=True)

    tree = images.cache / "dom0-initrd"
    busybox_tree(tree)
    copy_modules(images.packages, recipe.DOM0_INITRD_MODULES, tree)
    shutil.copy(HERE / "dom0/initrd-init", tree / "init")
    (tree / "init").chmod(0o755)
    pack(tree, images.dom0_initrd)

    # Without a journal: the disk is thrown away after each boot (QEMU's snapshot=on). Sparse, so size is free.
    make_ext4(images.root, images.dom0, "6G", ["-O", "^has_journal"], images.logs)


def make_ext4(tree: Path, image: Path, size: str, options: list[str], logs: Path) -> None:
    image.unlink(missing_ok=True)
    packages.quiet(["mkfs.ext4", "-q", "-F", *options, "-d", str(tree), str(image), size], logs / f"{image.name}.log")


def make_guests(images: Images) -> None:
    """One tree for all guests: it is an initrd, and it is what a guest's root disk is filled with."""
    busybox_tree(images.guest)
    copy_modules(images.packages, recipe.GUEST_MODULES, images.guest, recipe.GUEST_MODULES_LATER)
    packages.quiet(["depmod", "-b", str(images.guest), images.kernel_version()], images.logs / "depmod.log")
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
    version = kernel_version(images.packages32)
    images.vmlinux32.write_bytes(uncompressed_kernel((images.packages32 / "boot" / f"vmlinuz-{version}").read_bytes()))
    packages.quiet(["depmod", "-b", str(images.packages32), version], images.logs / "depmod.log")
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


def module_closure(modules_dep: str, wanted: list[str]) -> list[str]:
    """Paths of the wanted modules and all they need, in loading order. Pure: takes modules.dep's text."""
    table: dict[str, tuple[str, list[str]]] = {}
    for line in modules_dep.splitlines():
        path, _, needs = line.partition(":")
        table[Path(path).name.split(".")[0].replace("-", "_")] = (path, needs.split())
    order: list[str] = []
    for name in wanted:
        found = table.get(name.replace("-", "_"))
        if found is None:
            continue                    # built into this kernel
        for path in [*reversed(found[1]), found[0]]:
            if path not in order:
                order.append(path)
    return order


def copy_modules(packages_tree: Path, names: list[str], tree: Path, later: list[str] | None = None) -> None:
    """Copy modules with their dependencies; leaves the loading order in /etc/lab-modules for a plain insmod loop.

    Those `later` are only there, not in that list.
    """
    version = kernel_version(packages_tree)
    base = packages_tree / "lib/modules" / version
    table = (base / "modules.dep").read_text()
    order = module_closure(table, names)
    target = tree / "lib/modules" / version
    for path in dict.fromkeys(order + module_closure(table, later or [])):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(base / path, target / path)
    for index in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        shutil.copy(base / index, target / index)
    lines = [f"/lib/modules/{version}/{path}\n" for path in order]
    (tree / "etc/lab-modules").write_text("".join(lines))


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
