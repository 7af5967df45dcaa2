//! Real NBD clients against the server, over a disk that answers in arbitrary order.
//!
//! A tool this machine lacks is named on standard error ("NOT TESTED: ...", past the test harness's capture) and its test
//! passes. Debian has them all: `apt-get install fio qemu-utils libnbd-bin python3-libnbd`.

// clippy.toml lets tests unwrap, and does not see that these helpers are tests.
#![allow(clippy::unwrap_used)]

use dom0_bench::nbd::{Config, Counts, Disk, Geometry, RamDisk, Server};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

const SIZE: u64 = 64 << 20;

/// A server, its disk, and a folder that holds the socket and whatever a test needs.
struct Guest {
    disk: Arc<RamDisk>,
    server: Server,
    dir: tempfile::TempDir,
}

impl Guest {
    fn new(geometry: Geometry) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = Arc::new(RamDisk::unruly(geometry, 16).unwrap());
        let config = Config { name: "xvda".into(), description: "an emulated guest".into(), ..Config::default() };
        let served = Arc::clone(&disk) as Arc<dyn Disk>;
        let server = Server::listen(dir.path().join("nbd.sock"), served, config).unwrap();
        Self { disk, server, dir }
    }

    fn uri(&self) -> String {
        self.server.uri()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn stop(self) -> Counts {
        let counts = self.disk.counts();
        self.server.stop();
        counts
    }
}

/// A tool, if it is here; else a loud word about it.
fn tool(name: &str, package: &str) -> Option<String> {
    let found =
        std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(name).is_file()));
    if !found {
        // Not eprintln!, which the harness keeps to itself when a test passes.
        let _ = writeln!(std::io::stderr(), "\nNOT TESTED: {name} is missing (apt-get install {package})\n");
    }
    found.then(|| name.to_owned())
}

/// Runs a tool to its end; one that hangs is killed, and counts as failed.
fn run(tool: &str, args: &[&str]) -> Output {
    // Debian's own programs first: nbdsh starts `python3`, and only Debian's has the module it needs.
    let path = format!("/usr/bin:/bin:{}", std::env::var("PATH").unwrap_or_default());
    Command::new("timeout").args(["-k", "5", "300", tool]).args(args).env("PATH", path).output().unwrap()
}

fn must(tool: &str, args: &[&str]) -> String {
    let output = run(tool, args);
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{tool} {args:?}: {}\n{text}", output.status);
    text
}

/// Data, zeroes and holes, none of it compressible by accident.
fn image(path: &Path) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    let mut state = 1_u64;
    for (index, chunk) in bytes.chunks_mut(64 << 10).enumerate() {
        if index % 3 == 0 {
            for word in chunk.chunks_mut(8) {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                word.copy_from_slice(&state.to_le_bytes());
            }
        }
    }
    std::fs::write(path, &bytes).unwrap();
    bytes
}

#[test]
fn qemu_img_converts_both_ways() {
    let Some(qemu_img) = tool("qemu-img", "qemu-utils") else { return };
    let guest = Guest::new(Geometry::writable(SIZE));
    let (uri, source, back, qcow2) = (guest.uri(), guest.file("source"), guest.file("back"), guest.file("back.qcow2"));
    let bytes = image(&source);
    let (source, back, qcow2) = (source.to_str().unwrap(), back.to_str().unwrap(), qcow2.to_str().unwrap());
    must(&qemu_img, &["convert", "-n", "-W", "-m", "16", "-f", "raw", "-O", "raw", source, &uri]);
    must(&qemu_img, &["compare", "-f", "raw", "-F", "raw", source, &uri]);
    must(&qemu_img, &["convert", "-W", "-m", "16", "-f", "raw", "-O", "raw", &uri, back]);
    assert!(std::fs::read(back).unwrap() == bytes);
    must(&qemu_img, &["convert", "-f", "raw", "-O", "qcow2", &uri, qcow2]);
    must(&qemu_img, &["compare", "-f", "qcow2", "-F", "raw", qcow2, &uri]);
    let counts = guest.stop();
    assert!(counts.zeroes > 0 && counts.flushes > 0 && counts.overtaken > 0, "{counts:?}");
}

#[test]
fn qemu_io_script() {
    let Some(qemu_io) = tool("qemu-io", "qemu-utils") else { return };
    let guest = Guest::new(Geometry::writable(SIZE));
    let uri = guest.uri();
    let mut args = vec!["-f", "raw", "-d", "unmap", uri.as_str()];
    for command in [
        "write -P 0xab 0 4M",
        "read -P 0xab 0 4M",
        "write -z 512k 128k",
        "write -z -u 1M 64k",
        "read -P 0xab 0 512k",
        "read -P 0 512k 128k",
        "read -P 0xab 640k 384k",
        "read -P 0 1M 64k",
        "write -f -P 7 4096 4096",
        "read -P 7 4096 4096",
        "discard 2M 1M",
        "aio_write -P 1 8M 64k",
        "aio_write -P 2 9M 64k",
        "aio_write -P 3 10M 64k",
        "aio_flush",
        "read -P 2 9M 64k",
        // Unaligned ends: qemu reads, changes and writes the whole block.
        "write -P 9 5000 100",
        "read -P 7 4096 904",
        "read -P 9 5000 100",
        "read -P 7 5100 3092",
        "flush",
    ] {
        args.extend(["-c", command]);
    }
    let text = must(&qemu_io, &args);
    assert!(!text.contains("fail") && !text.contains("error"), "{text}");
    let counts = guest.stop();
    assert!(counts.trims > 0 && counts.fua > 0 && counts.zeroes > 1 && counts.flushes > 0, "{counts:?}");
    assert!(counts.no_hole > 0, "without -u qemu asks for allocated zeroes: {counts:?}");
}

#[test]
fn qemu_io_on_a_read_only_disk() {
    let Some(qemu_io) = tool("qemu-io", "qemu-utils") else { return };
    let guest = Guest::new(Geometry { read_only: true, ..Geometry::writable(SIZE) });
    let uri = guest.uri();
    must(&qemu_io, &["-r", "-f", "raw", "-c", "read -P 0 0 1M", &uri]);
    assert!(!run(&qemu_io, &["-f", "raw", "-c", "write 0 1M", &uri]).status.success());
    assert_eq!(guest.stop().writes, 0);
}

#[test]
fn nbdinfo_describes_the_export() {
    let Some(nbdinfo) = tool("nbdinfo", "libnbd-bin") else { return };
    let guest =
        Guest::new(Geometry { block: 4096, preferred: 65536, max_payload: 1 << 20, ..Geometry::writable(SIZE) });
    let text = must(&nbdinfo, &[&guest.uri()]);
    for line in [
        "newstyle-fixed without TLS",
        "simple packets",
        "export=\"xvda\"",
        "description: an emulated guest",
        "export-size: 67108864",
        "is_read_only: false",
        "can_fua: true",
        "can_multi_conn: true",
        "can_trim: true",
        "can_zero: true",
        "can_flush: true",
        "block_size_minimum: 4096",
        "block_size_preferred: 65536",
        "block_size_maximum: 1048576",
    ] {
        assert!(text.contains(line), "{line:?} is missing in\n{text}");
    }
    assert!(must(&nbdinfo, &["--list", &guest.uri()]).contains("export=\"xvda\""));
}

#[test]
fn nbdcopy_over_many_connections() {
    let Some(nbdcopy) = tool("nbdcopy", "libnbd-bin") else { return };
    let guest = Guest::new(Geometry::writable(SIZE));
    let (uri, source, back) = (guest.uri(), guest.file("source"), guest.file("back"));
    let bytes = image(&source);
    let many = ["--connections=4", "--threads=2", "--requests=64", "--request-size=65536", "--flush"];
    must(&nbdcopy, &[&many[..], &[source.to_str().unwrap(), &uri]].concat());
    must(&nbdcopy, &[&many[..], &[&uri, back.to_str().unwrap()]].concat());
    assert!(std::fs::read(back).unwrap() == bytes);
    let counts = guest.stop();
    assert!(counts.flushes > 0 && counts.overtaken > 0, "{counts:?}");
}

const NBDSH: &str = r#"
import errno
def refused(code, act):
    try:
        act()
    except nbd.Error as error:
        assert error.errno == code, (error.errno, code)
    else:
        raise AssertionError(code)

assert h.get_size() == 64 << 20
assert h.get_block_size(nbd.SIZE_MINIMUM) == 512
assert h.get_block_size(nbd.SIZE_PREFERRED) == 4096
assert h.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20
assert h.can_multi_conn() and h.can_fua() and h.can_flush() and h.can_trim() and h.can_zero()
assert not h.get_structured_replies_negotiated() and not h.is_read_only()

h.pwrite(b"x" * 4096, 0, nbd.CMD_FLAG_FUA)
h.zero(512, 512, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
h.zero(512, 1024)
assert h.pread(4096, 0) == b"x" * 512 + bytes(1024) + b"x" * 2560
h.trim(4096, 4096, nbd.CMD_FLAG_FUA)
h.flush()
h.zero(64 << 20, 0)                                     # larger than the largest payload
h.pwrite(b"z" * (32 << 20), 0)
assert h.pread(32 << 20, 0) == b"z" * (32 << 20)

h.set_strict_mode(0)                                    # from here on libnbd lets mistakes through to the server
refused("ENOSPC", lambda: h.pwrite(b"x" * 1024, (64 << 20) - 512))
refused("ENOSPC", lambda: h.zero(1024, (64 << 20) - 512))
refused("EINVAL", lambda: h.pread(1024, (64 << 20) - 512))
refused("EINVAL", lambda: h.trim(1024, (64 << 20) - 512))
refused("EINVAL", lambda: h.pwrite(b"x" * 100, 0))
refused("EINVAL", lambda: h.pread(512, 7))
refused("EINVAL", lambda: h.pread(512, 0, 1 << 12))
refused("EINVAL", lambda: h.pwrite(b"x" * (33 << 20), 0))
assert h.pread(512, 0) == b"z" * 512                    # and still in step

buffers = [nbd.Buffer.from_bytearray(bytearray([i]) * 4096) for i in range(200)]
cookies = [h.aio_pwrite(buffer, i * 4096) for i, buffer in enumerate(buffers)]
while h.aio_in_flight() > 0:
    h.poll(-1)
assert all(h.aio_command_completed(cookie) for cookie in cookies)
for i in range(200):
    assert h.pread(4096, i * 4096) == bytes([i]) * 4096
print("nbdsh is content")
"#;

#[test]
fn nbdsh_script() {
    let Some(nbdsh) = tool("nbdsh", "libnbd-bin python3-libnbd") else { return };
    if !run("python3", &["-c", "import nbd"]).status.success() {
        let missing = "NOT TESTED: nbdsh's Python module is missing (apt-get install python3-libnbd)";
        let _ = writeln!(std::io::stderr(), "\n{missing}\n");
        return;
    }
    let guest = Guest::new(Geometry::writable(SIZE));
    let text = must(&nbdsh, &["--uri", &guest.uri(), "-c", NBDSH]);
    assert!(text.contains("nbdsh is content"), "{text}");
    let counts = guest.stop();
    assert!(counts.overtaken > 0 && counts.fua == 2 && counts.no_hole == 1 && counts.flushes == 2, "{counts:?}");
}

fn fio(guest: &Guest, job: &[&str]) {
    let (uri, dir) = (format!("--uri={}", guest.uri()), guest.dir.path().to_str().unwrap().to_owned());
    let aux = format!("--aux-path={dir}");
    let common = ["--name=nbd", "--ioengine=nbd", &uri, &aux, "--iodepth=32", "--size=16m", "--thread"];
    must("fio", &[&common[..], job].concat());
}

#[test]
fn fio_writes_and_verifies() {
    let Some(name) = tool("fio", "fio") else { return };
    if !must(&name, &["--enghelp"]).contains("nbd") {
        let _ = writeln!(std::io::stderr(), "\nNOT TESTED: this fio was built without its nbd engine\n");
        return;
    }
    let guest = Guest::new(Geometry::writable(SIZE));
    fio(&guest, &["--rw=randwrite", "--bs=4k", "--verify=crc32c", "--verify_fatal=1", "--fsync=256"]);
    fio(&guest, &["--rw=write", "--bsrange=512-256k", "--bs_unaligned=0", "--blockalign=512", "--verify=md5"]);
    fio(&guest, &["--rw=randtrimwrite", "--bs=4k"]);
    fio(&guest, &["--rw=randrw", "--bs=16k", "--numjobs=4", "--offset_increment=16m", "--group_reporting"]);
    let counts = guest.stop();
    assert!(counts.writes > 4096 && counts.reads > 4096, "{counts:?}");
    assert!(counts.flushes > 0 && counts.trims > 0 && counts.overtaken > 0, "{counts:?}");
}
