//! The client against the embedded store, and against stores that misbehave.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use xenstore_client::server::Server;
use xenstore_client::wire::{MessageType, Packet};
use xenstore_client::{Access, Client, DomId, Error, ErrorCode, Perm, Result, Store, WatchEvent, Watcher};

const LONG: Duration = Duration::from_secs(60);

fn event(path: &str, token: &str) -> Option<WatchEvent> {
    Some(WatchEvent { path: path.into(), token: token.into() })
}

fn readable(watcher: &Watcher) -> bool {
    let fd = watcher.fd();
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).expect("poll") == 1
}

#[test]
fn reads_and_writes() -> Result<()> {
    let server = Server::new()?;
    let dom0 = server.connect(DomId::DOM0)?;
    dom0.write("/a/b", "text")?;
    dom0.write_bytes("/a/c", b"\xff\0")?;
    assert_eq!(dom0.read_str("/a/b")?, "text");
    assert_eq!(dom0.read("/a/c")?, b"\xff\0");
    assert!(matches!(dom0.read_str("/a/c"), Err(Error::Reply { .. })));
    assert_eq!(dom0.read_opt("/none")?, None);
    assert!(dom0.read("/none").is_err_and(|error| error.is_not_found()));
    assert_eq!(dom0.read("/none").expect_err("none").to_string(), "xenstore read \"/none\": ENOENT");
    assert!(matches!(dom0.read("/a//b"), Err(Error::Invalid { .. })));
    assert!(matches!(dom0.write("/a", &"x".repeat(4096)), Err(Error::Invalid { .. })));
    assert_eq!(dom0.directory("/a")?, ["b", "c"]);
    let perms = [Perm::new(Access::None, DomId(0)), Perm::new(Access::Read, DomId(5))];
    dom0.set_perms("/a", &perms)?;
    assert_eq!(dom0.get_perms("/a")?, perms);
    dom0.rm("/a")?;
    dom0.rm_if_exists("/a/b/c")?;
    assert_eq!(dom0.directory_opt("/a")?, None);
    assert_eq!(dom0.get_domain_path(DomId(5))?, "/local/domain/5");
    fn through(store: &dyn Store) -> Result<String> {
        store.write("/x", "1")?;
        store.read_str("/x")
    }
    assert_eq!(through(&dom0)?, "1");
    assert_eq!(dom0.transaction(|tx| through(tx))?, "1");
    Ok(())
}

#[test]
fn many_threads_share_a_connection() -> Result<()> {
    let server = Server::new()?;
    let dom0 = server.connect(DomId::DOM0)?;
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let dom0 = dom0.clone();
            scope.spawn(move || {
                for i in 0..200 {
                    let path = format!("/threads/{thread}/{i}");
                    dom0.write(&path, &path).expect("write");
                    assert_eq!(dom0.read_str(&path).expect("read"), path);
                }
            });
        }
    });
    Ok(())
}

#[test]
fn transactions_are_tried_again_and_give_up() -> Result<()> {
    let server = Server::new()?;
    let dom0 = server.connect(DomId::DOM0)?;
    dom0.write("/count", "0")?;
    std::thread::scope(|scope| {
        for _ in 0..4 {
            let dom0 = server.connect(DomId::DOM0).expect("connect");
            scope.spawn(move || {
                for _ in 0..25 {
                    let add = |tx: &xenstore_client::Transaction<'_>| {
                        let count: u32 = tx.read_str("/count")?.parse().expect("number");
                        tx.write("/count", &(count + 1).to_string())
                    };
                    while dom0.transaction(add).is_err_and(|e| matches!(e, Error::Conflict { .. })) {}
                }
            });
        }
    });
    assert_eq!(dom0.read_str("/count")?, "100");
    let tries = AtomicU32::new(0);
    let result = dom0.transaction(|tx| {
        tx.read("/count")?;
        dom0.write("/count", &tries.fetch_add(1, Ordering::Relaxed).to_string())
    });
    assert!(matches!(result, Err(Error::Conflict { attempts }) if attempts == tries.into_inner()));
    let failed: Result<()> = dom0.transaction(|tx| {
        tx.write("/half", "1")?;
        tx.read("/none").map(drop)
    });
    assert!(failed.is_err_and(|error| error.is_not_found()));
    assert_eq!(dom0.read_opt("/half")?, None);
    Ok(())
}

#[test]
fn watchers_are_independent() -> Result<()> {
    let server = Server::new()?;
    let dom0 = server.connect(DomId::DOM0)?;
    let (one, two) = (dom0.watcher()?, dom0.watcher()?);
    one.add("/w", "t:1")?;
    assert_eq!(one.add("/w", "t:1").expect_err("twice").code(), Some(&ErrorCode::Exists));
    two.add("/w/x", "t")?;
    assert_eq!(one.wait(LONG)?, event("/w", "t:1"));
    assert_eq!(two.wait(LONG)?, event("/w/x", "t"));
    assert_eq!((one.next()?, readable(&one)), (None, false));
    assert_eq!(one.wait(Duration::from_millis(1))?, None);
    for _ in 0..100 {
        dom0.write("/w/x", "1")?;
    }
    dom0.write("/w/y", "1")?;
    // The last event has arrived when the one after it has.
    one.add("/mark", "m")?;
    assert!(readable(&one));
    assert_eq!(one.wait(LONG)?, event("/w/x", "t:1"));
    assert_eq!(one.wait(LONG)?, event("/w/y", "t:1"));
    assert_eq!(one.wait(LONG)?, event("/mark", "m"));
    assert_eq!(two.wait(LONG)?, event("/w/x", "t"));
    assert!(!readable(&two));
    two.remove("/w/x", "t")?;
    assert!(two.remove("/w/x", "t").is_err_and(|error| error.is_not_found()));
    dom0.write("/w/x", "1")?;
    drop(one);
    dom0.write("/w/x", "1")?;
    assert_eq!(two.next()?, None);
    Ok(())
}

#[test]
fn a_lost_connection_is_told_to_everybody() -> Result<()> {
    let server = Server::new()?;
    let dom0 = server.connect(DomId::DOM0)?;
    let watcher = dom0.watcher()?;
    watcher.add("/w", "t")?;
    server.shutdown();
    assert_eq!(watcher.wait(LONG)?, event("/w", "t"));
    assert!(matches!(watcher.wait(LONG), Err(Error::Disconnected)));
    assert!(readable(&watcher));
    assert!(matches!(watcher.next(), Err(Error::Disconnected)));
    assert!(matches!(dom0.read("/a"), Err(Error::Disconnected)));
    assert!(matches!(dom0.watcher(), Err(Error::Disconnected)));
    Ok(())
}

/// A client whose store answers the first request with `bytes`, written `chunk` at a time, and hangs up.
fn answered(bytes: &[u8], chunk: usize) -> Result<Vec<u8>> {
    let (ours, theirs) = UnixStream::pair().expect("socketpair");
    let bytes = bytes.to_vec();
    let store = std::thread::spawn(move || {
        let mut request = [0; 16];
        (&theirs).read_exact(&mut request).expect("a request");
        for piece in bytes.chunks(chunk) {
            // The client may have hung up on what it saw already.
            if (&theirs).write_all(piece).is_err() {
                break;
            }
        }
    });
    let result = Client::from_stream(ours)?.read("/a");
    store.join().expect("no panic");
    result
}

#[test]
fn stores_that_misbehave() {
    let packet = |kind, req_id, payload: &[u8]| {
        Packet { kind, req_id, tx_id: 0, payload: payload.to_vec() }.encode().expect("short")
    };
    let good = packet(MessageType::Read, 1, b"value");
    for chunk in 1..=good.len() {
        assert_eq!(answered(&good, chunk).expect("good"), b"value");
        assert!(matches!(answered(&good[..good.len() - 1], chunk), Err(Error::Disconnected)));
    }
    let unterminated = packet(MessageType::Error, 1, b"ENOENT");
    assert!(answered(&unterminated, 99).is_err_and(|error| error.is_not_found()));
    let odd = packet(MessageType::Error, 1, b"\xff\xfe");
    assert!(answered(&odd, 99).is_err_and(|error| matches!(error.code(), Some(ErrorCode::Other(_)))));
    assert!(matches!(answered(&packet(MessageType::Write, 1, b"OK\0"), 99), Err(Error::Reply { .. })));
    for broken in [
        packet(MessageType::Read, 2, b"value"),
        packet(MessageType::Read, 0, b"value"),
        packet(MessageType::WatchEvent, 0, b"no end"),
        packet(MessageType::WatchEvent, 0, b"\xff\0\0"),
        vec![0xff; 64],
        Vec::new(),
    ] {
        assert!(matches!(answered(&broken, 5), Err(Error::Disconnected)), "{broken:?}");
    }
    // A storm of events for watches nobody has, and then the reply.
    let mut storm = packet(MessageType::WatchEvent, 0, b"/a\x0099:t\0").repeat(1000);
    storm.extend(packet(MessageType::WatchEvent, 0, b"/a\0no number\0"));
    storm.extend(&good);
    assert_eq!(answered(&storm, 4096).expect("good"), b"value");
}

/// oxenstored knows no DIRECTORY_PART.
#[test]
fn a_store_without_directory_part() {
    let (ours, theirs) = UnixStream::pair().expect("socketpair");
    let store = std::thread::spawn(move || {
        for (path_and_more, error) in [(3, "E2BIG\0"), (5, "ENOSYS\0")] {
            let mut request = vec![0; 16 + path_and_more];
            (&theirs).read_exact(&mut request).expect("a request");
            let req_id = u32::from_le_bytes([request[4], request[5], request[6], request[7]]);
            let reply = Packet { kind: MessageType::Error, req_id, tx_id: 0, payload: error.into() };
            (&theirs).write_all(&reply.encode().expect("short")).expect("a reply");
        }
    });
    let client = Client::from_stream(ours).expect("client");
    assert_eq!(client.directory("/a").expect_err("too big").code(), Some(&ErrorCode::TooBig));
    store.join().expect("no panic");
}
