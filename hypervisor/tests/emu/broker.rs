//! The broker against members that do not keep to the protocol.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use hypervisor::emu::{Machine, Member};
use hypervisor::{Backend, DomId};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketType,
};

use crate::rig::{LIMITS, Rig, eventually, reason};

fn stranger(rig: &Rig) -> OwnedFd {
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    rustix::net::connect(&socket, &SocketAddrUnix::new(rig.dir().join("hypervisor.sock")).unwrap()).unwrap();
    socket
}

/// The broker's answer; nothing when it hung up.
fn say(socket: &OwnedFd, message: &[u8]) -> Option<String> {
    rustix::net::send(socket, message, SendFlags::NOSIGNAL).ok()?;
    let mut text = vec![0; 65536];
    let (len, _) = rustix::net::recv(socket, &mut *text, RecvFlags::empty()).ok()?;
    text.truncate(len);
    (len > 0).then(|| String::from_utf8(text).unwrap())
}

#[test]
fn malformed_messages_end_their_connection_and_nothing_else() {
    let rig = Rig::served();
    let long = vec![b' '; 100_000];
    let deep = "[".repeat(60_000);
    for message in [
        &b""[..],
        b"\0",
        b"{",
        b"null",
        b"\"List",
        b"\"Nonsense\"",
        b"{\"Peer\":{\"domid\":65536}}",
        b"{\"Peer\":{\"domid\":-1}}",
        b"{\"Peer\":{}}",
        b"{\"Join\":{\"Backend\":{\"domid\":0,\"more\":1}}}",
        b"\xff\xfe\xfd",
        &long,
        deep.as_bytes(),
    ] {
        let socket = stranger(&rig);
        assert_eq!(say(&socket, message), None, "{:?}", String::from_utf8_lossy(&message[..message.len().min(40)]));
    }
    for message in ["\"List\"", "\"Store\"", "\"Leave\"", "{\"Unmap\":{\"handle\":1}}", "{\"Close\":{\"port\":1}}"] {
        let answer = say(&stranger(&rig), message.as_bytes()).unwrap();
        assert!(answer.contains("first message has to be a join"), "{answer}");
    }
    assert_eq!(rig.dom0.domains().unwrap().len(), 1);
}

#[test]
fn a_seat_cannot_touch_what_others_hold() {
    let rig = Rig::served();
    let guest = rig.guest();
    let shared = hypervisor::Guest::share(&guest, DomId::DOM0, 1, hypervisor::GrantAccess::ReadWrite).unwrap();
    let domid = hypervisor::Guest::domid(&guest);
    let mapping = rig.dom0.map(domid, &shared.refs, hypervisor::GrantAccess::ReadWrite).unwrap();
    let front = hypervisor::Guest::alloc_unbound(&guest, DomId::DOM0).unwrap();
    let back = rig.dom0.bind(domid, front.port()).unwrap();

    // Even another seat of the same domain.
    let other = stranger(&rig);
    assert!(say(&other, b"{\"Join\":{\"Backend\":{\"domid\":0}}}").unwrap().contains("Joined"));
    for (message, refusal) in [
        (format!("{{\"Close\":{{\"port\":{}}}}}", back.port()), "not a port of this seat"),
        ("{\"Close\":{\"port\":4294967295}}".to_owned(), "not a port of this seat"),
        ("{\"Unmap\":{\"handle\":1}}".to_owned(), "-4"),
        ("{\"Unmap\":{\"handle\":18446744073709551615}}".to_owned(), "-4"),
        ("{\"Join\":{\"Backend\":{\"domid\":9}}}".to_owned(), "a seat already"),
        ("{\"Map\":{\"peer\":1,\"generation\":999,\"refs\":[8],\"writable\":false}}".to_owned(), "-2"),
        ("{\"Map\":{\"peer\":1,\"generation\":2,\"refs\":[],\"writable\":false}}".to_owned(), "1 to 4096"),
        ("{\"Destroy\":{\"domid\":0}}".to_owned(), "cannot be destroyed"),
        ("{\"Bind\":{\"remote\":65535,\"port\":1}}".to_owned(), "no such domain"),
    ] {
        let answer = say(&other, message.as_bytes()).unwrap();
        assert!(answer.contains("Err") && answer.contains(refusal), "{message}: {answer}");
    }
    assert!(say(&other, b"\"Leave\"").unwrap().contains("Done"));
    assert!(say(&other, b"\"List\"").unwrap().contains("destroyed"));
    drop((mapping, back, front));
}

#[test]
fn descriptors_sent_to_the_broker_are_not_kept() {
    let rig = Rig::served();
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let socket = stranger(&rig);
    assert!(say(&socket, b"{\"Join\":{\"Backend\":{\"domid\":0}}}").unwrap().contains("Joined"));
    // Other tests open and close descriptors of this process too; these would be ten thousand.
    let before = open();
    let file = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    for _ in 0..100 {
        let fds = [file.as_fd(); 100];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(100))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let text = [IoSlice::new(b"{\"Close\":{\"port\":1}}")];
        rustix::net::sendmsg(&socket, &text, &mut control, SendFlags::empty()).unwrap();
        let mut answer = [0; 1024];
        rustix::net::recv(&socket, &mut answer[..], RecvFlags::empty()).unwrap();
    }
    assert!(open() < before + 5000);
}

#[test]
fn one_that_never_reads_is_thrown_out() {
    let rig = Rig::served();
    let socket = stranger(&rig);
    let thrown_out = (0..1_000_000).any(|_| {
        rustix::net::send(&socket, b"\"List\"", SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
            .is_err_and(|error| error != rustix::io::Errno::AGAIN)
    });
    assert!(thrown_out);
    rig.dom0.domains().unwrap();
}

#[test]
fn a_directory_has_one_machine() {
    let rig = Rig::served();
    assert!(reason(Machine::start(rig.dir(), LIMITS)).contains("another machine lives"));
    assert!(reason(Member::join("/nonexistent", DomId::DOM0)).contains("/nonexistent/hypervisor.sock"));
    rig.dom0.domains().unwrap();
}

#[test]
fn members_notice_that_the_machine_ended_and_another_can_start() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("machine");
    let running = Machine::start(&home, LIMITS).unwrap();
    let member = Member::join(&home, DomId::DOM0).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&home).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o700);
    drop(running);
    assert!(reason(member.domains()).contains("has emu-xen ended"));
    assert!(!home.join("hypervisor.sock").exists() && !home.join("xenstored.sock").exists());
    let running = Machine::start(&home, LIMITS).unwrap();
    drop(member);
    Member::join(&home, DomId::DOM0).unwrap();
    eventually("the seat's end", || running.machine().domains()[0].seats == 0);
}
