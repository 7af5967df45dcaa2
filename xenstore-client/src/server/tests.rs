//! Tables over the store without sockets, then the sockets.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::Server;
use super::store::{ConnId, Store as Logic};
use crate::wire::{MessageType as M, Packet};
use crate::{Client, DomId, Error, ErrorCode, Store};

/// A store with dom0 on connection 1 (and 4), guests 5 and 6 on 2 and 3, and homes for the guests.
struct Table {
    logic: Logic,
    events: Vec<(ConnId, String)>,
}

impl Table {
    fn new() -> Self {
        let mut logic = Logic::new();
        for dom in [0, 5, 6, 0] {
            logic.connect(DomId(dom));
        }
        let mut table = Self { logic, events: Vec::new() };
        for (path, perms) in [("/local/domain/5", "n0 r5"), ("/local/domain/5/data", "n5"), ("/local/domain/6", "n6")] {
            table.expect(1, 0, M::Mkdir, path, "OK");
            table.expect(1, 0, M::SetPerms, &format!("{path} {perms}"), "OK");
        }
        table
    }

    /// Sends a request; spaces stand for NUL, and `WRITE` has none at its end. Returns the reply in the same spelling.
    fn ask(&mut self, conn: ConnId, tx_id: u32, kind: M, payload: &str) -> String {
        let mut payload = payload.replace(' ', "\0").into_bytes();
        if kind != M::Write {
            payload.push(0);
        }
        let (out, _) = self.logic.request(conn, &Packet { kind, req_id: 7, tx_id, payload });
        let mut out = out.into_iter().map(|(to, packet)| {
            let text = String::from_utf8_lossy(&packet.payload).replace('\0', " ");
            (to, packet.kind, text.trim_end().to_owned())
        });
        let reply = out.next().expect("a reply");
        self.events.extend(out.map(|(to, kind, text)| {
            assert_eq!(kind, M::WatchEvent);
            (to, text)
        }));
        assert!(reply.0 == conn && (reply.1 == kind || reply.1 == M::Error));
        reply.2
    }

    fn expect(&mut self, conn: ConnId, tx_id: u32, kind: M, payload: &str, reply: &str) {
        let got = self.ask(conn, tx_id, kind, payload);
        assert_eq!(got, reply, "connection {conn}, transaction {tx_id}: {kind} {payload}");
    }

    fn rows(&mut self, rows: &[(ConnId, u32, M, &str, &str)]) {
        for &(conn, tx_id, kind, payload, reply) in rows {
            self.expect(conn, tx_id, kind, payload, reply);
        }
    }

    fn events(&mut self) -> Vec<(ConnId, String)> {
        std::mem::take(&mut self.events)
    }
}

#[test]
fn nodes_and_permissions() {
    let mut table = Table::new();
    table.rows(&[
        (1, 0, M::Read, "/none", "ENOENT"),
        (1, 0, M::Write, "/a/b/c value", "OK"),
        (1, 0, M::Read, "/a/b/c", "value"),
        (1, 0, M::Directory, "/a", "b"),
        (1, 0, M::Rm, "/a", "OK"),
        (1, 0, M::Rm, "/a", "OK"),
        (1, 0, M::Rm, "/a/b/c", "ENOENT"),
        (1, 0, M::Read, "/a/b/c", "ENOENT"),
        (1, 0, M::Rm, "/", "EINVAL"),
        (1, 0, M::Read, "bad//path", "EINVAL"),
        (1, 0, M::Read, "a b", "EINVAL"),
        (1, 0, M::Write, "@special value", "EINVAL"),
        (1, 0, M::Mkdir, "/m", "OK"),
        (1, 0, M::Mkdir, "/m", "OK"),
        (1, 0, M::Read, "/m", ""),
        (1, 0, M::Rm, "/m", "OK"),
        // A guest: at home, relative, and elsewhere.
        (2, 0, M::Write, "data/x 1", "OK"),
        (1, 0, M::GetPerms, "/local/domain/5/data/x", "n5"),
        (2, 0, M::Read, "/local/domain/5/data/x", "1"),
        (2, 0, M::Write, "name x", "EACCES"),
        (3, 0, M::Read, "/local/domain/5/data/x", "EACCES"),
        // Not even whether it exists.
        (3, 0, M::Read, "/local/domain/5/data/none", "EACCES"),
        (3, 0, M::Write, "/local/domain/5/data/x 2", "EACCES"),
        (3, 0, M::Rm, "/local/domain/5/data", "EACCES"),
        (3, 0, M::Directory, "/local/domain", "EACCES"),
        // What dom0 creates below a guest's node stays the guest's.
        (1, 0, M::Write, "/local/domain/5/data/y 1", "OK"),
        (1, 0, M::GetPerms, "/local/domain/5/data/y", "n5"),
        // Sharing.
        (2, 0, M::SetPerms, "data/x n5 r6", "OK"),
        (3, 0, M::Read, "/local/domain/5/data/x", "1"),
        (3, 0, M::Write, "/local/domain/5/data/x 2", "EACCES"),
        (2, 0, M::SetPerms, "data/x n5 b6", "OK"),
        (3, 0, M::Write, "/local/domain/5/data/x 2", "OK"),
        // What a guest creates below a shared node it owns.
        (3, 0, M::Write, "/local/domain/5/data/x/mine 2", "OK"),
        (1, 0, M::GetPerms, "/local/domain/5/data/x/mine", "n6 b6"),
        (3, 0, M::SetPerms, "/local/domain/5/data/x n6", "EACCES"),
        (2, 0, M::SetPerms, "data/x n6", "EPERM"),
        (2, 0, M::SetPerms, "data/x q5", "EINVAL"),
        (2, 0, M::SetPerms, "data/x n5 r1 r2 r3 r4 r6", "ENOSPC"),
        // The owner needs no entry; a default is for those without one.
        (2, 0, M::SetPerms, "data/x r5 n6", "OK"),
        (3, 0, M::Read, "/local/domain/5/data/x", "EACCES"),
    ]);
}

#[test]
fn domains_and_what_is_not_offered() {
    let mut table = Table::new();
    table.rows(&[
        (2, 0, M::GetDomainPath, "6", "/local/domain/6"),
        (1, 0, M::IsDomainIntroduced, "5", "F"),
        (2, 0, M::Introduce, "5 1 1", "EACCES"),
        (1, 0, M::Introduce, "5 1 1", "OK"),
        (1, 0, M::IsDomainIntroduced, "5", "T"),
        (2, 0, M::Release, "6", "EACCES"),
        (1, 0, M::Release, "9", "ENOENT"),
        (1, 0, M::Release, "0", "EINVAL"),
        (1, 0, M::Control, "print", "ENOSYS"),
        (1, 0, M::SetTarget, "5 6", "ENOSYS"),
        (1, 0, M::GetFeature, "", "ENOSYS"),
        (1, 0, M::Unknown(99), "", "ENOSYS"),
        (1, 0, M::WatchEvent, "a b", "ENOSYS"),
    ]);
}

#[test]
fn transactions() {
    let mut table = Table::new();
    table.rows(&[
        (1, 0, M::Write, "/t/a 1", "OK"),
        (1, 0, M::TransactionStart, "", "1"),
        (1, 1, M::TransactionStart, "", "EBUSY"),
        (1, 1, M::Write, "/t/a 2", "OK"),
        (1, 1, M::Write, "/t/new/deep 2", "OK"),
        (1, 1, M::Read, "/t/a", "2"),
        (1, 0, M::Read, "/t/a", "1"),
        (1, 0, M::Directory, "/t", "a"),
        (4, 1, M::Read, "/t/a", "ENOENT"),
        (1, 1, M::TransactionEnd, "x", "EINVAL"),
        (1, 1, M::TransactionEnd, "T", "OK"),
        (1, 1, M::TransactionEnd, "T", "ENOENT"),
        (1, 0, M::Read, "/t/a", "2"),
        (1, 0, M::Read, "/t/new/deep", "2"),
        // Read, and changed by another.
        (1, 0, M::TransactionStart, "", "2"),
        (1, 2, M::Read, "/t/a", "2"),
        (4, 0, M::Write, "/t/a 3", "OK"),
        (1, 2, M::Write, "/t/b 3", "OK"),
        (1, 2, M::TransactionEnd, "T", "EAGAIN"),
        (1, 0, M::Read, "/t/b", "ENOENT"),
        // Absence is something seen, too.
        (1, 0, M::TransactionStart, "", "3"),
        (1, 3, M::Read, "/t/c", "ENOENT"),
        (4, 0, M::Write, "/t/c 3", "OK"),
        (1, 3, M::TransactionEnd, "T", "EAGAIN"),
        // Two that touch different nodes.
        (1, 0, M::TransactionStart, "", "4"),
        (4, 0, M::TransactionStart, "", "1"),
        (1, 4, M::Write, "/t/a 4", "OK"),
        (4, 1, M::Write, "/t/c 4", "OK"),
        (1, 4, M::TransactionEnd, "T", "OK"),
        (4, 1, M::TransactionEnd, "T", "OK"),
        // Removed and created anew inside; and dropped.
        (1, 0, M::TransactionStart, "", "5"),
        (1, 5, M::Rm, "/t", "OK"),
        (1, 5, M::Directory, "/t", "ENOENT"),
        (1, 5, M::Write, "/t/z 1", "OK"),
        (1, 5, M::Directory, "/t", "z"),
        (1, 5, M::TransactionEnd, "F", "OK"),
        (1, 0, M::Read, "/t/a", "4"),
        (1, 0, M::TransactionStart, "", "6"),
        (1, 6, M::Rm, "/t", "OK"),
        (1, 6, M::TransactionEnd, "T", "OK"),
        (1, 0, M::Directory, "/t", "ENOENT"),
    ]);
}

#[test]
fn watches() {
    let mut table = Table::new();
    let on = |conn, text: &str| (conn, text.to_owned());
    table.rows(&[
        (1, 0, M::Watch, "/w one", "OK"),
        (1, 0, M::Watch, "/w one", "EEXIST"),
        (4, 0, M::Watch, "/w/sub/leaf deep", "OK"),
        (2, 0, M::Watch, "data rel", "OK"),
        (3, 0, M::Watch, "/local/domain/5/data spy", "OK"),
    ]);
    assert_eq!(
        table.events(),
        [on(1, "/w one"), on(4, "/w/sub/leaf deep"), on(2, "data rel"), on(3, "/local/domain/5/data spy")]
    );
    table.expect(1, 0, M::Write, "/w/sub/leaf 1", "OK");
    assert_eq!(table.events(), [on(1, "/w/sub/leaf one"), on(4, "/w/sub/leaf deep")]);
    table.expect(1, 0, M::Write, "/wider 1", "OK");
    assert_eq!(table.events(), []);
    // A subtree goes: who watches above hears once, who watches inside hears of its own node.
    table.expect(1, 0, M::Rm, "/w/sub", "OK");
    assert_eq!(table.events(), [on(1, "/w/sub one"), on(4, "/w/sub/leaf deep")]);
    // Relative as set, and not to those who may not read.
    table.expect(2, 0, M::Write, "data/x 1", "OK");
    assert_eq!(table.events(), [on(2, "data/x rel")]);
    // Losing sight is heard of.
    table.expect(2, 0, M::SetPerms, "data/x n5 r6", "OK");
    assert_eq!(table.events(), [on(2, "data/x rel"), on(3, "/local/domain/5/data/x spy")]);
    table.expect(2, 0, M::SetPerms, "data/x n5", "OK");
    assert_eq!(table.events(), [on(2, "data/x rel"), on(3, "/local/domain/5/data/x spy")]);
    // A transaction fires when it is committed, once per path.
    table.rows(&[
        (1, 0, M::TransactionStart, "", "1"),
        (1, 1, M::Write, "/w/a 1", "OK"),
        (1, 1, M::Write, "/w/a 2", "OK"),
    ]);
    assert_eq!(table.events(), []);
    table.expect(1, 1, M::TransactionEnd, "T", "OK");
    assert_eq!(table.events(), [on(1, "/w/a one")]);
    table.rows(&[(1, 0, M::Unwatch, "/w one", "OK"), (1, 0, M::Unwatch, "/w one", "ENOENT")]);
    // Domains come and go: only those who may know.
    table.rows(&[
        (1, 0, M::Watch, "@introduceDomain in", "OK"),
        (1, 0, M::Watch, "@releaseDomain out", "OK"),
        (2, 0, M::Watch, "@releaseDomain out", "OK"),
    ]);
    table.events();
    table.rows(&[(1, 0, M::Introduce, "6 1 1", "OK"), (1, 0, M::Introduce, "6 1 1", "OK")]);
    assert_eq!(table.events(), [on(1, "@introduceDomain in")]);
    table.rows(&[(1, 0, M::Release, "6", "OK")]);
    assert_eq!(table.events(), [on(1, "@releaseDomain out")]);
    table.rows(&[(1, 0, M::Introduce, "6 1 1", "OK"), (1, 0, M::SetPerms, "@releaseDomain r0", "OK")]);
    table.events();
    table.expect(1, 0, M::Release, "6", "OK");
    assert_eq!(table.events(), [on(1, "@releaseDomain out"), on(2, "@releaseDomain out")]);
    table.rows(&[(2, 0, M::ResetWatches, "", "OK"), (2, 0, M::Write, "data/x 5", "OK")]);
    assert_eq!(table.events(), []);
}

#[test]
fn a_released_domain_leaves_nothing() {
    let mut table = Table::new();
    table.rows(&[
        (2, 0, M::Write, "data/x/y 1", "OK"),
        (3, 0, M::Write, "/local/domain/6/mine 1", "OK"),
        (3, 0, M::SetPerms, "/local/domain/6/mine n6 r5", "OK"),
        (1, 0, M::Watch, "/local/domain/5 t", "OK"),
        (1, 0, M::Watch, "/local/domain/5/data/x/y t", "OK"),
    ]);
    table.events();
    let (closed, events) = table.logic.release(DomId(5));
    let events: Vec<_> = events.iter().map(|(_, packet)| String::from_utf8_lossy(&packet.payload)).collect();
    assert_eq!(closed, [2]);
    assert_eq!(events, ["/local/domain/5/data/x/y\0t\0", "/local/domain/5/data\0t\0"]);
    table.rows(&[
        (1, 0, M::Directory, "/local/domain/5", ""),
        (1, 0, M::GetPerms, "/local/domain/6/mine", "n6"),
        (1, 0, M::GetPerms, "/local/domain/5", "n0"),
    ]);
}

#[test]
fn guests_have_quotas_and_dom0_has_none() {
    let mut table = Table::new();
    let mut last = String::new();
    // One node ("data") is owned already, and each write makes one.
    for i in 0..1000 {
        last = table.ask(2, 0, M::Write, &format!("data/{}/{i} x", i % 50));
    }
    assert_eq!(last, "ENOSPC");
    table.expect(1, 0, M::Write, "/local/domain/5/data/0/more x", "OK");
    let value = "v".repeat(2048);
    table.rows(&[
        (3, 0, M::Write, &format!("/local/domain/6/x {}", &value[..2000]), "OK"),
        (3, 0, M::Write, &format!("/local/domain/6/x {value}"), "ENOSPC"),
        (3, 0, M::Write, &format!("/local/domain/6/y {value}"), "ENOSPC"),
        (3, 0, M::Read, "/local/domain/6/y", "ENOENT"),
        (1, 0, M::Write, &format!("/local/domain/6/x {value}"), "OK"),
    ]);
    for i in 0..128 {
        table.expect(3, 0, M::Watch, &format!("w {i}"), "OK");
    }
    table.expect(3, 0, M::Watch, "w 128", "E2BIG");
    for i in 1..=10 {
        table.expect(3, 0, M::TransactionStart, "", &i.to_string());
    }
    table.expect(3, 0, M::TransactionStart, "", "ENOSPC");
    let long = format!("/local/domain/6/{}", "p".repeat(2049));
    table.rows(&[(3, 0, M::Write, &format!("{long} x"), "EINVAL"), (1, 0, M::Write, &format!("{long} x"), "OK")]);
}

#[test]
fn a_long_directory_comes_in_parts() -> crate::Result<()> {
    let server = Server::new()?;
    let dom0 = server.connect(DomId::DOM0)?;
    let mut names: Vec<String> = (0..3000).map(|i| format!("child-{i}")).collect();
    for name in &names {
        dom0.write(&format!("/big/{name}"), "")?;
    }
    names.sort();
    assert_eq!(dom0.directory("/big")?, names);
    assert_eq!(dom0.directory("/big/child-0")?, Vec::<String>::new());
    let raw = dom0.request(M::Directory, "/big", &[b"/big\0"]);
    assert_eq!(raw.expect_err("too long").code(), Some(&ErrorCode::TooBig));
    dom0.transaction(|tx| {
        assert_eq!(tx.directory("/big")?.len(), 3000);
        Ok(())
    })
}

#[test]
fn whoever_does_not_read_is_cut_off_and_nobody_waits() -> Result<(), Box<dyn std::error::Error>> {
    let server = Server::new()?;
    let (deaf, theirs) = UnixStream::pair()?;
    server.attach(theirs, DomId::DOM0)?;
    let watch = Packet { kind: M::Watch, req_id: 1, tx_id: 0, payload: b"/\0token\0".to_vec() };
    (&deaf).write_all(&watch.encode().expect("short"))?;
    let dom0 = server.connect(DomId::DOM0)?;
    let path = format!("/{}", "x".repeat(2000));
    for _ in 0..4000 {
        dom0.write(&path, "1")?;
    }
    // 4000 events of 2 KB are more than the server keeps: the stream ends after what the socket held.
    deaf.set_read_timeout(Some(Duration::from_secs(60)))?;
    let got = std::io::copy(&mut (&deaf).take(64 << 20), &mut std::io::sink())?;
    assert!(got < 8 << 20, "{got}");
    Ok(())
}

#[test]
fn pipelined_requests_are_paused_not_lost() -> Result<(), Box<dyn std::error::Error>> {
    let server = Server::new()?;
    server.connect(DomId::DOM0)?.write("/v", &"v".repeat(4000))?;
    let (us, theirs) = UnixStream::pair()?;
    server.attach(theirs, DomId::DOM0)?;
    let read = Packet { kind: M::Read, req_id: 1, tx_id: 0, payload: b"/v\0".to_vec() }.encode().expect("short");
    let writer = us.try_clone()?;
    let sender = std::thread::spawn(move || (&writer).write_all(&read.repeat(3000)));
    us.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut replies = vec![0; 3000 * 4016];
    (&us).read_exact(&mut replies)?;
    sender.join().expect("no panic")?;
    Ok(())
}

#[test]
fn sockets_and_the_end() -> Result<(), Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("socket");
    let server = Server::bind(&path)?;
    assert!(matches!(Server::bind(&path), Err(Error::Io { .. })), "one store per socket");
    let client = Client::connect_unix(&path)?;
    client.write("/a", "1")?;
    let guest = server.connect(DomId(5))?;
    server.introduce(DomId(5))?;
    assert!(client.is_domain_introduced(DomId(5))?);
    assert_eq!(guest.read("/a").expect_err("not for guests").code(), Some(&ErrorCode::Access));
    let watcher = guest.watcher()?;
    server.release(DomId(5))?;
    assert!(matches!(watcher.wait(Duration::from_secs(60)), Err(Error::Disconnected)));
    assert!(matches!(guest.read("/a"), Err(Error::Disconnected)));
    server.shutdown();
    assert!(matches!(client.read("/a"), Err(Error::Disconnected)));
    assert!(matches!(server.connect(DomId(0)), Err(Error::Disconnected)));
    assert!(!path.exists());
    // A socket left behind by a killed process.
    drop(std::os::unix::net::UnixListener::bind(&path)?);
    Server::bind(&path)?;
    Ok(())
}
