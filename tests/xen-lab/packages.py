"""What comes from Debian, and how: only by package name, only through apt and debootstrap.

No mirror is written down anywhere in the lab: the machine's own apt configuration is asked, so a machine
behind a cache or with a local mirror needs no setting.
"""

from __future__ import annotations

import lzma
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from progress import Step, die

#: Installs what the host needs: the group `lab` of tests/packages.txt.
INSTALLER = Path(__file__).resolve().parent.parent / "install-packages"


@dataclass(frozen=True)
class Source:
    """One line of apt's sources: where, which suites, which components."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]


def parse_one_line(text: str) -> list[Source]:
    """The `deb URI SUITE COMPONENT…` format (sources.list(5)); options in [brackets] are skipped."""
    found = []
    for line in text.splitlines():
        line = line.split("#", 1)[0].strip()
        match = re.match(r"deb\s+(?:\[[^\]]*\]\s+)?(\S+)\s+(\S+)\s*(.*)$", line)
        if match:
            found.append(Source(match[1], (match[2],), tuple(match[3].split())))
    return found


def parse_deb822(text: str) -> list[Source]:
    """The deb822 format (`Types:`, `URIs:` …); a stanza with `Enabled: no` does not count."""
    found = []
    for stanza in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        last = ""
        for line in stanza.splitlines():
            if line.startswith("#"):
                continue
            if line[:1].isspace() and last:
                fields[last] += " " + line.strip()
            elif ":" in line:
                last, value = line.split(":", 1)
                last = last.strip().lower()
                fields[last] = value.strip()
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() == "no":
            continue
        for uri in fields.get("uris", "").split():
            found.append(Source(uri, tuple(fields.get("suites", "").split()),
                                tuple(fields.get("components", "").split())))
    return found


def machine_sources(etc: Path = Path("/etc/apt")) -> list[Source]:
    """Every enabled source of this machine, in apt's order."""
    found = []
    files = [etc / "sources.list"]
    if (etc / "sources.list.d").is_dir():
        files += sorted((etc / "sources.list.d").iterdir())
    for file in files:
        if not file.is_file():
            continue
        text = file.read_text(errors="replace")
        found += parse_deb822(text) if file.suffix == ".sources" else parse_one_line(text)
    return found


def mirror_for(suite: str, sources: list[Source]) -> str | None:
    """The first mirror that carries exactly this suite's `main` (not -updates, not -security)."""
    for source in sources:
        if suite in source.suites and "main" in source.components:
            return source.uri
    return None


#: The suite this machine's own sources are expected to name; the others are taken from the same mirror, by name.
HOME_SUITE = "bookworm"
#: Debian's signing keys of all suites (package debian-archive-keyring); the name's end differs between releases.
KEYRINGS = [Path("/usr/share/keyrings") / f"debian-archive-keyring.{end}" for end in ("gpg", "pgp")]


def mirror_of(suite: str, sources: list[Source]) -> str | None:
    """Where to ask for a suite: the mirror of its own line, else the one that carries HOME_SUITE (it carries all)."""
    return mirror_for(suite, sources) or mirror_for(HOME_SUITE, sources)


def _path() -> str:
    # mkfs, depmod and debootstrap live in sbin, which a plain user's PATH lacks.
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def quiet(argv: list[str], log: Path, cwd: Path | None = None, fatal: bool = True) -> None:
    """Run a long command with its output in a log; on failure show the log's end (unless not `fatal`)."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        env = dict(os.environ, PATH=_path(), DEBIAN_FRONTEND="noninteractive", LC_ALL="C")
        code = subprocess.run(argv, stdout=out, stderr=subprocess.STDOUT, cwd=cwd, env=env).returncode
    if code and fatal:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        die(f"`{' '.join(argv[:4])} …` ended with {code}; end of {log}:\n{tail}")


def ensure_packages() -> None:
    """Install what is missing, and only that. Needs root only when something is."""
    done = subprocess.run([str(INSTALLER), "lab"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode or "NOT TESTED" in done.stdout:
        die(f"the lab is NOT run here: {done.stdout.strip()}")


def kernel_package(meta: str = "linux-image-amd64", options: list[str] | None = None) -> str:
    """The versioned package behind a meta package (never the cloud flavour: it cannot be a dom0)."""
    name = versioned_kernel(_depends(meta, options))
    if name is None:
        die(f"apt-cache knows no {meta}: run apt-get update, or this is no Debian")
    assert name
    return name


def kernel_packages(meta: str = "linux-image-amd64", options: list[str] | None = None) -> list[str]:
    """What holds the kernel and its modules. From 7.x on linux-image is empty and depends on packages that do."""
    image = kernel_package(meta, options)
    return [image, *kernel_parts(_depends(image, options))]


def versioned_kernel(depends: str) -> str | None:
    """The linux-image with a version in what `apt-cache depends META` printed."""
    match = re.search(r"Depends:\s+(linux-image-\d\S+)\s*$", depends, re.M)
    return match[1] if match else None


def kernel_parts(depends: str) -> list[str]:
    """The versioned linux-{base,binary,modules} in what `apt-cache depends linux-image-VERSION` printed."""
    return re.findall(r"^\s*Depends:\s+(linux-(?:base|binary|modules)-\d\S+)\s*$", depends, re.M)


def _depends(name: str, options: list[str] | None) -> str:
    return subprocess.run(["apt-cache", *(options or []), "depends", name], capture_output=True, text=True).stdout


@dataclass(frozen=True)
class Kernel:
    """Where an unpacked kernel's parts lie; before 7.x vmlinuz is in /boot and modules are below /lib."""

    version: str
    vmlinuz: Path
    modules: Path


def find_kernel(tree: Path) -> Kernel:
    """The kernel in a folder that `download` has filled."""
    for modules in ("usr/lib/modules", "lib/modules"):
        for folder in sorted((tree / modules).glob("*/kernel")):
            version = folder.parent.name
            for vmlinuz in (tree / "boot" / f"vmlinuz-{version}", folder.parent / "vmlinuz"):
                if vmlinuz.is_file():
                    return Kernel(version, vmlinuz, folder.parent)
    raise FileNotFoundError(f"{tree} has no vmlinuz with modules of the same version")


def unpack_modules(folder: Path) -> None:
    """Decompress every .ko.xz below `folder` in place: busybox' insmod takes none. depmod comes after this."""
    for packed in folder.rglob("*.ko.xz"):
        packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
        packed.unlink()


def other_suite(suite: str, state: Path, log: Path) -> list[str]:
    """Options that let apt see another Debian suite (trixie, sid) and nothing else, for `kernel_packages` and `download`.

    Sources, lists and cache are in `state`, so the machine's own stay as they are. What the machine's configuration
    says of proxies and passwords still holds.
    """
    mirror = mirror_of(suite, machine_sources())
    if mirror is None:
        die(f"no source for {suite} or {HOME_SUITE} main in /etc/apt: Debian {suite}'s packages cannot be had, the lab is NOT run here")
    keyring = next((path for path in KEYRINGS if path.is_file()), None)
    if keyring is None:
        die("Debian's signing keys are not there: apt-get install debian-archive-keyring")
    options = _own_state(state)
    (state / "sources.list").write_text(f"deb [signed-by={keyring}] {mirror} {suite} main\n")
    options += ["-o", f"Dir::Etc::sourcelist={state}/sources.list", "-o", "Dir::Etc::sourceparts=/dev/null",
                "-o", "Dir::Etc::preferences=/dev/null", "-o", "Dir::Etc::preferencesparts=/dev/null"]
    quiet(["apt-get", *options, "update"], log, fatal=False)    # as below: a name that is missing says so later
    return options


def _own_state(state: Path) -> list[str]:
    for folder in ("lists/partial", "cache/archives/partial"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    return ["-o", f"Dir::State={state}", "-o", f"Dir::State::lists={state}/lists", "-o", f"Dir::State::status={state}/status",
            "-o", f"Dir::Cache={state}/cache", "-o", "Acquire::Languages=none", "-o", "APT::Sandbox::User=root"]


def foreign(architecture: str, state: Path, log: Path) -> list[str]:
    """Options that let apt see another architecture's packages, with lists of its own: the machine's stay as they are."""
    options = ["-o", "APT::Architectures::=amd64", "-o", f"APT::Architectures::={architecture}", *_own_state(state)]
    # A mirror in the middle of its own update makes this fail for one list; what is needed is asked for by name next.
    quiet(["apt-get", *options, "update"], log, fatal=False)
    return options


def download(names: list[str], into: Path, log: Path, options: list[str] | None = None) -> None:
    """Fetch .deb files and unpack them into one folder without installing anything."""
    shutil.rmtree(into, ignore_errors=True)
    debs = into / "debs"
    debs.mkdir(parents=True)
    quiet(["apt-get", "-o", "APT::Sandbox::User=root", *(options or []), "download", *names], log, cwd=debs)
    for deb in sorted(debs.glob("*.deb")):
        quiet(["dpkg", "-x", str(deb), str(into)], log)
    shutil.rmtree(debs)


def debootstrap(suite: str, packages: list[str], into: Path, log: Path) -> None:
    """A minimal Debian with these packages in `into`, from the mirror this machine uses itself."""
    mirror = mirror_of(suite, machine_sources())
    if mirror is None:
        die(f"no source for {suite} or {HOME_SUITE} main in /etc/apt: the lab needs Debian {suite}'s packages and is NOT run here")
    if os.geteuid() != 0:
        die("building needs root (debootstrap makes device nodes and chroots)")
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    assert mirror
    quiet(["debootstrap", "--variant=minbase", "--include=" + ",".join(packages), suite, str(into), mirror], log)
