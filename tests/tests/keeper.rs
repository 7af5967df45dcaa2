//! The memory of a server outlives it for as long as its I/O is in flight (ring/src/uring/keeper.rs says why).

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use system_tests::sim::fuse::Mounted;
use system_tests::{Dom0, PATIENCE, Process, have, run};

fn until(what: &str, mut true_now: impl FnMut() -> bool) {
    let began = Instant::now();
    while !true_now() {
        assert!(began.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A field of /proc/PID/status of a process that has not ended.
fn status(pid: u32, field: &str) -> Option<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let value = |field: &str| text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(":\t"));
    value(field).filter(|_| value("State").is_some_and(|state| !state.starts_with('Z'))).map(str::to_owned)
}

fn lives(pid: u32) -> bool {
    status(pid, "Name").as_deref() == Some("grant-keeper")
}

/// The children of a server, dead ones among them.
fn children(server: u32) -> Vec<u32> {
    let parent = format!("\nPPid:\t{server}\n");
    let is_child =
        |pid: &u32| std::fs::read_to_string(format!("/proc/{pid}/status")).is_ok_and(|text| text.contains(&parent));
    let number = |entry: std::fs::DirEntry| entry.file_name().to_str()?.parse().ok();
    std::fs::read_dir("/proc").unwrap().flatten().filter_map(number).filter(is_child).collect()
}

fn keeper(server: &Process) -> u32 {
    let [keeper] = children(server.pid())[..] else { panic!("a server has one child") };
    until("the keeper has no name", || lives(keeper));
    keeper
}

fn descriptors(pid: u32) -> Vec<PathBuf> {
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let mut links: Vec<_> = open.filter_map(|fd| std::fs::read_link(fd.path()).ok()).collect();
    links.sort();
    links
}

fn holds_its_two(keeper: u32) {
    until("the keeper holds what is not its own", || descriptors(keeper).len() == 2);
    let held = descriptors(keeper);
    let is = |what: &str| held.iter().any(|link| link.to_string_lossy().contains(what));
    assert!(is("pidfd") && is("pipe:"), "{held:?}");
}

#[test]
fn the_keeper_stays_while_writes_are_in_flight() {
    if !have("qemu-io", "a kill with writes in the storage's hands") {
        return;
    }
    // A mount namespace of this thread's own, which the processes below are in too.
    let mounted = match Mounted::asynchronous(8 << 20) {
        Ok(mounted) => mounted,
        Err(error) => return println!("NOT TESTED: a kill with writes in the storage's hands: {error}"),
    };
    let mut dom0 = Dom0::start();
    let keeper = keeper(&dom0.blkback);
    holds_its_two(keeper);
    // As SIGTERM to a whole control group would be.
    kill(Pid::from_raw(keeper.cast_signed()), Signal::SIGTERM).unwrap();
    let guest = dom0.guest_with("guest", &mounted.path(), "w", &["--queues", "2"]);
    mounted.medium.withhold_writes();
    let mut write = Command::new("qemu-io");
    write.args(["-f", "raw", "-t", "none", "-c", "write -P 7 0 64k", &guest.uri()]).stdout(Stdio::null());
    let mut write = write.stderr(Stdio::null()).spawn().unwrap();
    until("the write does not come", || mounted.medium.withheld() > 0);

    // The process has ended, no thread of it is left.
    dom0.blkback.signal(Signal::SIGKILL);
    let maps = || std::fs::read_to_string(format!("/proc/{keeper}/maps")).unwrap();
    until("the rings are kept", || !maps().contains("[io_uring]"));
    assert!(lives(keeper) && maps().contains("blkback"), "it has ended before the write");
    holds_its_two(keeper);
    // The next server does not mind it, and has its own.
    let hypervisor = dom0.hypervisor();
    dom0.blkback = Process::start("blkback", ["serve", "--hypervisor", &hypervisor]);
    dom0.blkback.expect("serving");
    guest.process.expect("is gone");
    write.wait().unwrap();
    // So much has happened since that it would have ended by now.
    assert!(lives(keeper) && maps().contains("blkback"), "it has ended before the write");

    mounted.medium.answer_writes().unwrap();
    until("the keeper stays", || !lives(keeper));
    run(&mut dom0.blkback(["detach", "guest", "xvda"]));
}

#[test]
fn a_server_that_stops_leaves_no_keeper() {
    let mut dom0 = Dom0::start();
    let image = dom0.image("disk.img", 8 << 20);
    let guest = dom0.guest_with("guest", &image, "w", &[]);
    let keeper = keeper(&dom0.blkback);
    dom0.blkback.signal(Signal::SIGTERM);
    until("the keeper stays", || !lives(keeper));
    guest.process.expect("is gone");
}

#[test]
fn a_keeper_that_is_killed_is_missed() {
    let mut dom0 = Dom0::start();
    let server = dom0.blkback.pid();
    let keeper = keeper(&dom0.blkback);
    kill(Pid::from_raw(keeper.cast_signed()), Signal::SIGKILL).unwrap();
    until("it stays as a zombie", || children(server).is_empty());
    let image = dom0.image("disk.img", 8 << 20);
    dom0.guest_with("guest", &image, "w", &[]).detach(&dom0);
    dom0.blkback.signal(Signal::SIGTERM);
    let log = dom0.blkback.log();
    assert!(log.contains("ERROR") && log.contains("the grant keeper was killed"), "{log}");
}
