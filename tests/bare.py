"""`tests/run bare`: tests/run quick on a Debian that has nothing but a compiler, from a clean clone.

A machine on which people develop has every tool by now, so what tests/run forgets to install shows only elsewhere.
Here the machine is a minimal root file system in namespaces of its own, with Rust's toolchain and cargo's registry
mounted in. It has the host's network, to install packages, and the host's kernel.

    tests/bare.py [COMMAND...]      another command than `tests/run quick` and `tests/install-packages`
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "xen-lab"))
import packages  # noqa: E402
from progress import Step, die, say  # noqa: E402

REPOSITORY = HERE.parent
WORK = REPOSITORY / "target" / "bare"
#: What a fresh machine for Rust has. qemu-utils comes from backports where they can be had: its version does not
#: fit that of the qemu-system-x86 which tests/install-packages wants later.
FRESH = ["ca-certificates", "gcc", "libc6-dev", "python3"]
FROM_BACKPORTS = ["qemu-utils"]
#: Where the clone is inside.
CLONE = "/src/clone"
#: The last step installs what labs want too, so that every line of the table is tried.
COMMANDS = ["tests/run quick", "tests/install-packages"]


def in_root(root: Path, script: str, shared: list[Shared]) -> list[str]:
    """A shell script inside, as init of process and mount namespaces of its own: all it started ends with it."""
    binds = "".join(f"""
mkdir -p .{folder.inside}
mount --bind {shlex.quote(str(folder.host))} .{folder.inside}
{f"mount -o remount,bind,ro .{folder.inside}" if folder.read_only else ""}""" for folder in shared)
    # /dev is the host's: loop devices, tun, fuse. /sys shows the network namespace of who mounts it.
    # Not by chroot: a program that leaves the mount namespace inside would be told the host's path of its own file.
    mounts = f"""set -e
cd {shlex.quote(str(root))}
mount --bind . . && cd {shlex.quote(str(root))}
mount -t proc proc proc
mount -t sysfs sysfs sys
mount --rbind /dev dev
mount -t tmpfs -o mode=755 run run{binds}
pivot_root . mnt
umount -l mnt
cd /
exec /bin/sh -ec {shlex.quote(script)}
"""
    return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--ipc", "--uts", "--propagation", "private",
            "sh", "-c", mounts]


@dataclass(frozen=True)
class Shared:
    """A folder of the host that is seen inside too."""

    host: Path
    inside: str
    read_only: bool = False

    def __post_init__(self) -> None:
        if not self.read_only:
            self.host.mkdir(parents=True, exist_ok=True)


def archives() -> Shared:
    """What apt has fetched, only to be quicker the second time."""
    return Shared(WORK / "archives", "/var/cache/apt/archives")


def for_cargo() -> list[Shared]:
    """Rust's toolchain without rustup, crates, and what was built the last time."""
    said = subprocess.run(["rustc", "--print", "sysroot"], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True)
    home = Path(os.environ.get("CARGO_HOME") or Path.home() / ".cargo")
    return [Shared(Path(said.stdout.strip()), "/opt/rust", read_only=True),
            Shared(home / "registry", "/opt/cargo/registry", read_only=True), Shared(WORK / "target", f"{CLONE}/target")]


def apt_settings() -> str:
    """What this machine's apt says about the way to its mirror, in apt.conf(5)'s words."""
    said = subprocess.run(["apt-config", "dump"], stdout=subprocess.PIPE, text=True, check=True).stdout
    way = ("Acquire::http", "Acquire::Retries", "Acquire::Check-Valid-Until", "Acquire::Check-Date")
    return "".join(line + "\n" for line in said.splitlines() if line.startswith(way))


def pristine() -> Path:
    """The root file system of a fresh machine; made once."""
    root, stamp, log = WORK / "pristine", WORK / "pristine.stamp", WORK / "pristine.log"
    recipe = Path(__file__).read_text()
    if stamp.exists() and stamp.read_text() == recipe:
        return root
    stamp.unlink(missing_ok=True)
    with Step(f"debootstrap {packages.HOME_SUITE}"):
        packages.debootstrap(packages.HOME_SUITE, FRESH, root, log)
    sources = packages.machine_sources()
    mirror = packages.mirror_of(packages.HOME_SUITE, sources)
    own = [source for source in sources if packages.HOME_SUITE in " ".join(source.suites) and "main" in source.components]
    lines = [f"deb {source.uri} {suite} main" for source in own for suite in source.suites]
    (root / "etc/apt/apt.conf.d/99-bare").write_text(apt_settings())
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    backports, listed = root / "etc/apt/sources.list.d/backports.list", root / "etc/apt/sources.list"
    listed.write_text("\n".join(dict.fromkeys(lines)) + "\n")
    backports.write_text(f"deb {mirror} {packages.HOME_SUITE}-backports main\n")
    install = "apt-get -qy install --no-install-recommends " + " ".join(FROM_BACKPORTS)
    with Step("what a fresh machine has"):
        packages.quiet(in_root(root, f"""export DEBIAN_FRONTEND=noninteractive LC_ALL=C
            apt-get -q update && {install} -t {packages.HOME_SUITE}-backports && exit
            rm {backports.relative_to(root)}
            echo 'no backports: from the suite itself'
            apt-get -q update && {install}""", [archives()]), log)
    backports.unlink(missing_ok=True)
    stamp.write_text(recipe)
    return root


def clean_clone() -> Shared:
    """A clone of this repository's HEAD, without anything else. Files that have not changed since the last run keep their
    times, so that cargo builds the rest only."""
    clone = Shared(WORK / "clone", CLONE)
    if not (clone.host / ".git").exists():
        subprocess.run(["git", "init", "-q", str(clone.host)], check=True)
    for words in (["fetch", "-q", str(REPOSITORY), "HEAD"], ["checkout", "-q", "--force", "--detach", "FETCH_HEAD"],
                  ["clean", "-ffdxq"]):
        subprocess.run(["git", "-C", str(clone.host), *words], check=True)
    return clone


def machine() -> Path:
    """A fresh machine."""
    root = WORK / "root"
    fresh = pristine()
    with Step("a fresh machine"):
        shutil.rmtree(root, ignore_errors=True)
        subprocess.run(["cp", "-a", "--reflink=auto", str(fresh), str(root)], check=True)
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True)
    if changed.stdout:
        say("what is not committed is not tested")
    return root


def main() -> int:
    if os.geteuid() != 0:
        die("tests/run bare makes a root file system and namespaces: run it as root")
    packages.ensure_packages()
    root, clone = machine(), clean_clone()
    environment = "env -i HOME=/root TERM=dumb PATH=/opt/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin " \
        "CARGO_HOME=/opt/cargo CARGO_NET_OFFLINE=true"
    for command in [shlex.join(sys.argv[1:])] if sys.argv[1:] else COMMANDS:
        say(f"on a bare machine: {command}")
        script = f"cd {CLONE} && exec {environment} sh -c {shlex.quote(command)}"
        code = subprocess.run(in_root(root, script, [archives(), clone, *for_cargo()])).returncode
        if code:
            die(f"{command} ended with {code} on a bare machine")
        say(f"on a bare machine: {command}: passed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
