"""Builds what the machines boot: one root disk for all kernels; an initrd and a disk of modules for each.

Each is built once: a stamp holds what it was built from. Our programs and the cells are not in here, they travel on a disk
that is made for each boot.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path
from typing import Callable

HERE = Path(__file__).resolve().parent
# Behind this folder: both have a run.py.
sys.path.append(str(HERE.parent / "xen-lab"))

import build  # noqa: E402
import cpio  # noqa: E402
import kernel as parts  # noqa: E402
import kernels  # noqa: E402
import packages  # noqa: E402
from progress import Step  # noqa: E402


class Images:
    """Where the built things are, for one kernel."""

    def __init__(self, cache: Path, kernel: kernels.Kernel) -> None:
        self.cache, self.kernel = cache, kernel
        self.folder = cache / kernel.suite
        self.root = cache / "root.img"
        self.vmlinuz = self.folder / "vmlinuz"
        self.initrd = self.folder / "initrd.cpio"
        self.modules = self.folder / "modules.img"
        self.release = self.folder / "release"      # what uname -r will say
        self.logs = cache / "logs"


def ensure(cache: Path, wanted: list[kernels.Kernel], again: bool = False) -> list[Images]:
    """Build what is missing or was built from another recipe. `again` asks for newer packages, too."""
    cache.mkdir(parents=True, exist_ok=True)
    logs = cache / "logs"
    packages.ensure_packages()
    stage(cache / "root.stamp", key(kernels.ROOT_SUITE, kernels.ROOT_PACKAGES), [cache / "root.img"],
          "the root disk, from Debian packages", again, lambda: make_root(cache, logs))
    found = []
    for kernel in wanted:
        images = Images(cache, kernel)
        recipe = key("with what they need", kernel, kernels.INITRD_MODULES, kernels.MODULE_FOLDERS, kernels.MODULE_FILES, (HERE / "inside/initrd-init").read_text())
        stage(images.folder / "stamp", recipe, [images.vmlinuz, images.initrd, images.modules],
              f"kernel {kernel.name}, from Debian {kernel.suite}", again, lambda images=images: make_kernel(images))
        found.append(images)
    return found


def key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def stage(stamp: Path, recipe: str, outputs: list[Path], what: str, again: bool, make: Callable[[], None]) -> None:
    if not again and stamp.is_file() and stamp.read_text() == recipe and all(path.exists() for path in outputs):
        return
    stamp.unlink(missing_ok=True)
    with Step(what):
        make()
    stamp.write_text(recipe)


def make_root(cache: Path, logs: Path) -> None:
    tree = cache / "root"
    packages.debootstrap(kernels.ROOT_SUITE, kernels.ROOT_PACKAGES, tree, logs / "debootstrap.log")
    for junk in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale"):
        shutil.rmtree(tree / junk, ignore_errors=True)
    for folder in ("lab", "srv", "usr/lib/modules"):
        (tree / folder).mkdir(parents=True, exist_ok=True)
    # Thrown away after each boot: no journal. Sparse, so the size is free.
    build.make_ext4(tree, cache / "root.img", "3G", ["-O", "^has_journal"], logs)
    shutil.rmtree(tree)


def make_kernel(images: Images) -> None:
    suite, tree = images.kernel.suite, images.folder / "packages"
    images.folder.mkdir(parents=True, exist_ok=True)
    options = packages.other_suite(suite, images.cache / "apt" / suite, images.logs / f"apt-{suite}.log")
    names = packages.kernel_packages(options=options)
    packages.download(names, tree, images.logs / f"download-{suite}.log", options)
    kernel = packages.find_kernel(tree)
    images.release.write_text(kernel.version)
    shutil.copy(kernel.vmlinuz, images.vmlinuz)

    parts.depmod(tree, kernel.version, images.logs / f"depmod-{suite}.log")
    small = images.folder / "small"
    shutil.rmtree(small, ignore_errors=True)
    choose_modules(kernel, small / "lib/modules" / kernel.version)
    parts.depmod(small, kernel.version, images.logs / f"depmod-{suite}.log")
    build.make_ext4(small / "lib/modules", images.modules, "512M", ["-O", "^has_journal"], images.logs)

    initrd = images.folder / "initrd"
    build.busybox_tree(initrd)
    parts.copy_modules(tree, kernels.INITRD_MODULES, initrd)
    shutil.copy(HERE / "inside/initrd-init", initrd / "init")
    (initrd / "init").chmod(0o755)
    with images.initrd.open("wb") as out:
        cpio.write(initrd, out)
    for folder in (tree, small, initrd):
        shutil.rmtree(folder)


def choose_modules(kernel: packages.Kernel, target: Path) -> None:
    """Copies the modules that kernels.py names and those they need, uncompressed.

    What a kernel has built in or lacks is not an error: the cell that wants it will say so.
    """
    wanted = [*(f"kernel/{folder}/" for folder in kernels.MODULE_FOLDERS), *(f"kernel/{file}" for file in kernels.MODULE_FILES)]
    for path in chosen((kernel.modules / "modules.dep").read_text(), wanted):
        parts.copy_module(kernel.modules / path, target / path)
    parts.copy_tables(kernel.modules, target)


def chosen(modules_dep: str, beginnings: list[str]) -> list[str]:
    """Paths in modules.dep's text that begin with one of these, and all they need."""
    paths: dict[str, None] = {}
    for line in modules_dep.splitlines():
        path, _, needs = line.partition(":")
        if path.startswith(tuple(beginnings)):
            paths.update(dict.fromkeys([path, *needs.split()]))
    return list(paths)
