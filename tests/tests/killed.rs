//! blkback is killed under a guest: what the guest waits for ends with an error, and the disk can be had again.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hypervisor::emu::Member;
use hypervisor::memory::Mapping;
use hypervisor::{Backend, DomId, GrantAccess, GrantRef};
use nix::sys::signal::Signal;
use system_tests::{Dom0, Guest, PATIENCE, Process, have, run};
use xenstore_client::Store;

/// Waits for something to come true.
fn until(what: &str, mut true_now: impl FnMut() -> bool) {
    let began = Instant::now();
    while !true_now() {
        assert!(began.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// How many requests are in flight, by the logs in this folder (see blkback's inflight.rs).
fn in_flight(folder: &Path) -> usize {
    let Ok(logs) = std::fs::read_dir(folder) else { return 0 };
    let count = |bytes: Vec<u8>| bytes[64..].chunks_exact(24).filter(|entry| entry[20] == 1).count();
    logs.flatten().filter_map(|log| std::fs::read(log.path()).ok()).map(count).sum()
}

/// The ring of a guest's disk, looked at from dom0.
struct Ring {
    page: Mapping,
    _dom0: Member,
}

impl Ring {
    fn of(guest: &Guest, dom0: &Dom0) -> Self {
        let xen = Member::join(dom0.dir(), DomId::DOM0).unwrap();
        let key = format!("/local/domain/{}/device/vbd/51712/ring-ref", guest.domid);
        let page = GrantRef(xen.store().unwrap().read_str(&key).unwrap().parse().unwrap());
        let page = xen.map(DomId(guest.domid.parse().unwrap()), &[page], GrantAccess::ReadOnly).unwrap();
        Self { page, _dom0: xen }
    }

    /// How many requests the guest has put into it: req_prod, its first word.
    fn requests(&self) -> u32 {
        let mut req_prod = [0; 4];
        self.page.read_once(0, &mut req_prod);
        u32::from_ne_bytes(req_prod)
    }
}

fn write(uri: &str, at: &str) -> Child {
    let mut command = Command::new("qemu-io");
    // Written past the cache, and only that: no flush behind it.
    command.args(["-f", "raw", "-t", "none", "-c", &format!("write -P 7 {at} 64k"), uri]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// It ends, and not well.
fn fails(child: Child) {
    let ended = child.wait_with_output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr));
    assert!(!ended.status.success() || said.contains("failed"), "{said}");
}

struct Slow(Child);

impl Drop for Slow {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Both kinds of requests: taken, on a storage that does not answer; and left in the ring by a process that stood still.
#[test]
fn what_a_killed_blkback_had_in_flight_ends_with_an_error() {
    if !have("nbdkit", "killed with writes in flight") || !have("qemu-io", "killed with writes in flight") {
        return;
    }
    let mut dom0 = Dom0::start();
    let socket = dom0.path("slow.sock");
    let slow = Command::new("nbdkit")
        .args(["-f", "--filter=delay", "-U"])
        .arg(&socket)
        .args(["memory", "8M", "wdelay=3600"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let slow = Slow(slow);
    until("nbdkit does not listen", || std::os::unix::net::UnixStream::connect(&socket).is_ok());
    let guest = dom0.guest("guest", &[]);
    let disk = format!("nbd:unix:{}", socket.display());
    run(&mut dom0.blkback(["attach", "guest", &format!("vdev=xvda,access=w,target={disk}"), "--wait", "60"]));
    guest.process.expect("nbd+unix");
    let logs = dom0.dir().join("blkback-0");
    let taken = write(&guest.uri(), "0");
    until("the write does not come", || in_flight(&logs) > 0);
    let pid = nix::unistd::Pid::from_raw(dom0.blkback.pid().cast_signed());
    nix::sys::signal::kill(pid, Signal::SIGSTOP).unwrap();
    let ring = Ring::of(&guest, &dom0);
    let before = ring.requests();
    let standing = write(&guest.uri(), "1M");
    until("the second write does not come", || ring.requests() != before);
    drop(ring);
    dom0.blkback.signal(Signal::SIGKILL);
    let listed = run(&mut dom0.blkback(["list", "guest"]));
    assert!(listed.contains("no server") && listed.contains("blkback serve"), "{listed}");

    let hypervisor = dom0.hypervisor();
    // The storage does not answer still: nothing of this depends on it.
    dom0.blkback = Process::start("blkback", ["serve", "--hypervisor", &hypervisor]);
    dom0.blkback.expect("serving");
    fails(taken);
    fails(standing);
    guest.process.expect("is gone");
    let listed = run(&mut dom0.blkback(["list", "guest"]));
    assert!(listed.contains("was killed") && !listed.contains("no server"), "{listed}");
    run(&mut dom0.blkback(["detach", "guest", "xvda"]));
    until("a log is left", || std::fs::read_dir(&logs).unwrap().next().is_none());
    drop(slow);

    let image = dom0.image("disk.img", 8 << 20);
    run(&mut dom0.blkback(["attach", "guest", &format!("{},raw,xvda,w", image.display()), "--wait", "60"]));
    guest.process.expect("is connected");
}

/// What was answered and flushed is there, and the image is free, also while the guest still stands at its old disk.
#[test]
fn a_killed_blkback_holds_nothing() {
    if !have("qemu-io", "the image after a kill") {
        return;
    }
    let mut dom0 = Dom0::start();
    let image = dom0.image("disk.img", 8 << 20);
    let guest = dom0.guest_with("guest", &image, "w", &["--queues", "2"]);
    run(Command::new("qemu-io").args(["-f", "raw", "-c", "write -P 7 0 1M", "-c", "flush", &guest.uri()]));
    dom0.blkback.signal(Signal::SIGKILL);
    let hypervisor = dom0.hypervisor();
    dom0.blkback = Process::start("blkback", ["serve", "--hypervisor", &hypervisor]);
    dom0.blkback.expect("serving");
    guest.process.expect("is gone");
    let read = run(Command::new("qemu-io").args(["-f", "raw", "-c", "read -P 7 0 1M"]).arg(&image));
    assert!(!read.contains("failed"), "{read}");
    let other = dom0.guest_with("other", &image, "w", &[]);
    other.detach(&dom0);
    run(&mut dom0.blkback(["detach", "guest", "xvda"]));
}

/// Nothing in flight: then it does not matter that a log is missing. Something in flight, and nobody knows what: that is said.
#[test]
fn without_its_log_a_killed_blkback_leaves_what_is_known() {
    if !have("qemu-io", "a kill without a log") {
        return;
    }
    let mut dom0 = Dom0::start();
    let (image, other) = (dom0.image("disk.img", 8 << 20), dom0.image("other.img", 8 << 20));
    let idle = dom0.guest_with("idle", &image, "w", &[]);
    let mut busy = dom0.guest_with("busy", &other, "w", &[]);
    let pid = nix::unistd::Pid::from_raw(dom0.blkback.pid().cast_signed());
    nix::sys::signal::kill(pid, Signal::SIGSTOP).unwrap();
    let ring = Ring::of(&busy, &dom0);
    let before = ring.requests();
    let mut standing = write(&busy.uri(), "1M");
    until("the write does not come", || ring.requests() != before);
    drop(ring);
    dom0.blkback.signal(Signal::SIGKILL);
    std::fs::remove_dir_all(dom0.dir().join("blkback-0")).unwrap();
    let hypervisor = dom0.hypervisor();
    dom0.blkback = Process::start("blkback", ["serve", "--hypervisor", &hypervisor]);
    dom0.blkback.expect("serving");
    idle.process.expect("is gone");
    let mut listed = String::new();
    until("no word of what is in flight", || {
        listed = run(&mut dom0.blkback(["list", "busy"]));
        listed.contains("is not known")
    });
    assert!(listed.contains("destroy the guest"), "{listed}");
    standing.kill().unwrap();
    standing.wait().unwrap();
    // Told to stop, it would wait for an answer first.
    busy.process.signal(Signal::SIGKILL);
}
