//! The program `emu-xen`, as a user starts it.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use hypervisor::emu::{GuestOptions, Member};
use hypervisor::{Backend, DomId, GrantAccess, Guest};
use rustix::process::{Pid, Signal, kill_process};

fn emu_xen(arguments: &[&str], dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_emu-xen"));
    command.args(arguments).arg("--dir").arg(dir).stdin(Stdio::null());
    command
}

/// Starts a machine and waits until it says that it is ready.
fn serve(dir: &Path) -> Child {
    let mut child = emu_xen(&["serve", "--memory", "128"], dir).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, format!("emu-xen: machine ready in {}\n", dir.display()));
    child
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn serve_list_stats_and_stop() {
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path().join("machine");
    let mut machine = serve(&dir);

    let dom0 = Member::join(&dir, DomId::DOM0).unwrap();
    let guest = dom0.create_guest(GuestOptions { name: "web".to_owned(), ..GuestOptions::default() }).unwrap();
    let shared = guest.share(DomId::DOM0, 2, GrantAccess::ReadWrite).unwrap();
    let mapping = dom0.map(guest.domid(), &shared.refs, GrantAccess::ReadWrite).unwrap();
    assert!(dom0.map(guest.domid(), &[hypervisor::GrantRef(1)], GrantAccess::ReadOnly).is_err());

    let list = stdout(&emu_xen(&["list"], &dir).output().unwrap());
    let words: Vec<Vec<&str>> = list.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(words[0], ["id", "name", "pages", "grants", "mapped", "maps-held", "ports", "seats", "state"]);
    assert_eq!(words[1], ["0", "Domain-0", "0", "0", "0", "2", "0", "2", "running"]);
    assert_eq!(words[2], ["1", "web", "128", "2", "2", "0", "0", "1", "running"]);

    let stats = stdout(&emu_xen(&["stats"], &dir).output().unwrap());
    assert!(stats.contains("refused grants: 1 refused (GNTST_general_error)"), "{stats}");
    let pair: Vec<_> = stats.lines().nth(2).unwrap().split_whitespace().collect();
    assert_eq!(pair, ["0", "1", "2", "0", "0", "0", "0", "0", "0", "0", "1"], "{stats}");

    let second = emu_xen(&["serve"], &dir).output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&second.stderr).contains("another machine lives in"));

    kill_process(Pid::from_child(&machine), Signal::TERM).unwrap();
    assert!(machine.wait().unwrap().success());
    assert!(!dir.join("hypervisor.sock").exists() && !dir.join("xenstored.sock").exists());
    // What was mapped stays memory, whatever becomes of the machine.
    mapping.copy_in(0, b"still there");
}

#[test]
fn a_machine_that_was_killed_is_followed_by_another() {
    let temporary = tempfile::tempdir().unwrap();
    let mut machine = serve(temporary.path());
    machine.kill().unwrap();
    machine.wait().unwrap();
    assert!(temporary.path().join("hypervisor.sock").exists());
    let said = Member::join(temporary.path(), DomId::DOM0).unwrap_err().to_string();
    assert!(said.contains("does emu-xen serve it?"), "{said}");
    let mut machine = serve(temporary.path());
    Member::join(temporary.path(), DomId::DOM0).unwrap();
    kill_process(Pid::from_child(&machine), Signal::INT).unwrap();
    assert!(machine.wait().unwrap().success());
}

#[test]
fn mistakes_are_said_in_one_line() {
    let nowhere = Path::new("/nonexistent/machine");
    for (command, said) in [("serve", "creating /nonexistent/machine"), ("list", "does emu-xen serve it?")] {
        let output = emu_xen(&[command], nowhere).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(text.starts_with("emu-xen: ") && text.contains(said) && text.lines().count() == 1, "{text}");
    }
    assert_eq!(emu_xen(&["serve", "--memory", "0"], nowhere).output().unwrap().status.code(), Some(2));
    let help = Command::new(env!("CARGO_BIN_EXE_emu-xen")).arg("--help").output().unwrap();
    assert!(stdout(&help).contains("serve"));
}
