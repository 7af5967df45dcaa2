//! NBD clients that break the rules, disks that break theirs, and the server between them. A client written by hand, as
//! no well-behaved library would send this.

// clippy.toml lets tests unwrap, and does not see that these helpers are tests.
#![allow(clippy::unwrap_used)]

use dom0_bench::nbd::protocol::*;
use dom0_bench::nbd::{Command, Completion, Config, Disk, Geometry, Limits, RamDisk, Server};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

const SIZE: u64 = 1 << 20;

struct Client(UnixStream);

impl Client {
    /// A stream into the server, the handshake still to come.
    fn raw(server: &Server) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        // Not a timing that is asserted: a hang shall fail and not hang.
        ours.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        server.serve(theirs).unwrap();
        Self(ours)
    }

    fn connect(server: &Server) -> Self {
        let mut client = Self::raw(server);
        assert_eq!(client.take(GREETING_SIZE), greeting(3));
        client.send(&3u32.to_be_bytes());
        client.send(&OptionHeader { option: NBD_OPT_EXPORT_NAME, length: 0 }.encode());
        client.take(10);
        client
    }

    fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn ask(&mut self, command: u16, flags: u16, cookie: u64, offset: u64, length: u32) {
        self.send(&Request { flags, command, cookie, offset, length }.encode());
    }

    /// The next reply's cookie and error.
    fn reply(&mut self) -> (u64, u32) {
        let SimpleReply { error, cookie } = SimpleReply::decode(&self.take(16).try_into().unwrap()).unwrap();
        (cookie, error)
    }

    fn assert_closed(&mut self) {
        // Reset instead of an orderly end, if the server left something unread.
        if let Ok(more) = self.0.read(&mut [0]) {
            assert_eq!(more, 0, "the server hangs up");
        }
    }

    /// The connection is in step and the disk alive.
    fn assert_well(&mut self) {
        self.ask(NBD_CMD_WRITE, 0, 77, 512, 512);
        self.send(&[0x5a; 512]);
        assert_eq!(self.reply(), (77, 0));
        self.ask(NBD_CMD_READ, 0, 78, 512, 512);
        assert_eq!(self.reply(), (78, 0));
        assert_eq!(self.take(512), [0x5a; 512]);
    }
}

fn ram(geometry: Geometry, window: usize) -> (Arc<RamDisk>, Server) {
    let disk = Arc::new(RamDisk::unruly(geometry, window).unwrap());
    let server = Server::without_socket(Arc::clone(&disk) as Arc<dyn Disk>, Config::default()).unwrap();
    (disk, server)
}

/// Keeps what it gets until told to let go.
#[derive(Default)]
struct Gate(Mutex<Vec<Completion>>);

impl Gate {
    fn wait_for(&self, count: usize) {
        for _ in 0..60_000 {
            if self.0.lock().unwrap().len() >= count {
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
        panic!("{count} requests never reached the disk");
    }

    fn open(&self) {
        let held = std::mem::take(&mut *self.0.lock().unwrap());
        held.into_iter().for_each(|done| done.succeed(Vec::new()));
    }
}

impl Disk for Gate {
    fn geometry(&self) -> Geometry {
        Geometry::writable(SIZE)
    }

    fn submit(&self, _: Command, done: Completion) {
        self.0.lock().unwrap().push(done);
    }
}

#[test]
fn replies_come_as_the_disk_finishes() {
    let (disk, server) = ram(Geometry::writable(SIZE), 16);
    let mut client = Client::connect(&server);
    for i in 0..100 {
        client.ask(NBD_CMD_WRITE, 0, i, i * 512, 512);
        client.send(&[i as u8; 512]);
    }
    let mut cookies: Vec<_> =
        (0..100).map(|_| client.reply()).inspect(|(_, e)| assert_eq!(*e, 0)).map(|r| r.0).collect();
    assert!(!cookies.is_sorted(), "the unruly disk was not unruly");
    cookies.sort_unstable();
    assert!(cookies.into_iter().eq(0..100), "every request is answered once");
    (0..100).for_each(|i| client.ask(NBD_CMD_READ, 0, i, i * 512, 512));
    for _ in 0..100 {
        let (cookie, error) = client.reply();
        assert_eq!((error, client.take(512)), (0, vec![cookie as u8; 512]));
    }
    assert!(disk.counts().overtaken > 0);
    server.stop();
}

#[test]
fn refused_requests_leave_the_stream_in_step() {
    let (disk, server) = ram(Geometry { max_payload: 1 << 20, ..Geometry::writable(SIZE) }, 1);
    let mut client = Client::connect(&server);
    for (offset, length, error) in [
        (SIZE, 512, NBD_ENOSPC),
        (u64::MAX - 511, 512, NBD_ENOSPC),
        (1, 512, NBD_EINVAL),
        (0, 700, NBD_EINVAL),
        (0, 0, NBD_EINVAL),
        (0, 33 << 20, NBD_ENOSPC),
    ] {
        client.ask(NBD_CMD_WRITE, 0, 5, offset, length);
        client.send(&vec![0xee; length as usize]);
        assert_eq!(client.reply(), (5, error), "write of {length} at {offset}");
    }
    for (command, length, error) in [
        (NBD_CMD_READ, u32::MAX, NBD_EINVAL),
        (NBD_CMD_READ, 0xffff_fe00, NBD_EINVAL),
        (NBD_CMD_TRIM, 0xffff_fe00, NBD_EINVAL),
        (NBD_CMD_WRITE_ZEROES, u32::MAX, NBD_EINVAL),
        (NBD_CMD_WRITE_ZEROES, 0xffff_fe00, NBD_ENOSPC),
        (NBD_CMD_FLUSH, u32::MAX, NBD_EINVAL),
        (5, 512, NBD_EINVAL),
        (7, 512, NBD_EINVAL),
        (0xffff, u32::MAX, NBD_EINVAL),
    ] {
        client.ask(command, 0, 6, 0, length);
        assert_eq!(client.reply(), (6, error), "command {command} of {length}");
    }
    client.ask(NBD_CMD_READ, 0x8000, 7, 0, 512);
    assert_eq!(client.reply(), (7, NBD_EINVAL));
    client.assert_well();
    let counts = disk.counts();
    assert_eq!((counts.reads, counts.writes, counts.zeroes), (1, 1, 0), "nothing refused reached the disk");
}

#[test]
fn a_read_only_disk() {
    let (disk, server) = ram(Geometry { read_only: true, ..Geometry::writable(SIZE) }, 1);
    let mut client = Client::connect(&server);
    client.ask(NBD_CMD_WRITE, 0, 1, 0, 4096);
    client.send(&[1; 4096]);
    assert_eq!(client.reply(), (1, NBD_EPERM));
    client.ask(NBD_CMD_TRIM, 0, 2, 0, 4096);
    assert_eq!(client.reply(), (2, NBD_EPERM));
    client.ask(NBD_CMD_WRITE_ZEROES, 0, 3, 0, 4096);
    assert_eq!(client.reply(), (3, NBD_EPERM));
    client.ask(NBD_CMD_READ, 0, 4, 0, 512);
    assert_eq!((client.reply(), client.take(512)), ((4, 0), vec![0; 512]));
    assert_eq!(disk.counts().writes, 0);
}

#[test]
fn durability_is_passed_down() {
    let (disk, server) = ram(Geometry::writable(SIZE), 1);
    let mut client = Client::connect(&server);
    client.ask(NBD_CMD_TRIM, NBD_CMD_FLAG_FUA, 1, 0, 4096);
    assert_eq!(client.reply(), (1, 0));
    assert_eq!((disk.counts().trims, disk.counts().flushes), (1, 1), "a trim with FUA is a trim and a flush");
    client.ask(NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE, 2, 0, 4096);
    assert_eq!(client.reply(), (2, 0));
    assert_eq!((disk.counts().fua, disk.counts().no_hole), (1, 1));
    client.ask(NBD_CMD_WRITE, NBD_CMD_FLAG_FUA, 3, 0, 512);
    client.send(&[1; 512]);
    assert_eq!(client.reply(), (3, 0));
    assert_eq!(disk.counts().fua, 2);
    client.ask(NBD_CMD_FLUSH, 0, 4, 0, 0);
    assert_eq!(client.reply(), (4, 0));
    assert_eq!(disk.counts().flushes, 2);
}

#[test]
fn clients_that_talk_nonsense_are_dropped_alone() {
    let (_, server) = ram(Geometry::writable(SIZE), 1);
    let mut good = Client::connect(&server);

    let mut bad = Client::connect(&server);
    bad.send(&[0x12, 0x56, 0x09, 0x53]);
    bad.send(&[0; 64]);
    bad.assert_closed();

    let mut bad = Client::raw(&server);
    bad.take(GREETING_SIZE);
    bad.send(b"GET / HTTP/1.1\r\n\r\n");
    bad.assert_closed();

    let mut bad = Client::raw(&server);
    bad.take(GREETING_SIZE);
    bad.send(&3u32.to_be_bytes());
    bad.send(&[0x55; OPTION_SIZE]);
    bad.assert_closed();

    for option in [NBD_OPT_EXPORT_NAME, NBD_OPT_GO, 4711] {
        let mut bad = Client::raw(&server);
        bad.take(GREETING_SIZE);
        bad.send(&3u32.to_be_bytes());
        bad.send(&OptionHeader { option, length: u32::MAX }.encode());
        bad.assert_closed();
    }
    good.assert_well();
}

#[test]
fn clients_that_vanish_anywhere() {
    let (disk, server) = ram(Geometry::writable(SIZE), 4);
    let mut words = 3u32.to_be_bytes().to_vec();
    words.extend(OptionHeader { option: NBD_OPT_EXPORT_NAME, length: 0 }.encode());
    for offset in [0, SIZE] {
        // One that is written and one whose payload is thrown away.
        words.extend(Request { flags: 0, command: NBD_CMD_WRITE, cookie: 1, offset, length: 512 }.encode());
        words.extend([0xaa; 512]);
    }
    words.extend(Request { flags: 0, command: NBD_CMD_READ, cookie: 2, offset: 0, length: 1 << 20 }.encode());
    for end in 0..=words.len() {
        let mut client = Client::raw(&server);
        // Every other one waits for its turn to speak. The others find the server hanging up on them, perhaps.
        if end % 2 == 0 && end > 20 {
            client.take(GREETING_SIZE);
            client.send(&words[..20]);
            client.take(10);
            client.send(&words[20..end]);
        } else {
            let _ = client.0.write_all(&words[..end]);
        }
        drop(client);
        while server.connections() > 32 {
            thread::sleep(Duration::from_millis(1));
        }
    }
    // In the middle of a write that claims 4 GiB, and one of 32 MiB.
    for (offset, length) in [(0, u32::MAX), (0, MAX_PAYLOAD), (SIZE, MAX_PAYLOAD)] {
        let mut client = Client::connect(&server);
        client.ask(NBD_CMD_WRITE, 0, 1, offset, length);
        client.send(&[0; 100_000]);
    }
    while server.connections() > 0 {
        thread::sleep(Duration::from_millis(1));
    }
    // How far the others came depends on when the server noticed; the orderly ones came as far as their first write.
    assert!(disk.counts().writes > 0);
    Client::connect(&server).assert_well();
    server.stop();
}

#[test]
fn a_client_that_sends_and_never_reads_is_no_longer_read() {
    let disk = Arc::new(RamDisk::new(Geometry::writable(SIZE)).unwrap());
    let limits = Limits { requests: 8, payload: 64 << 20 };
    let config = Config { limits, grace: Duration::from_millis(100), ..Config::default() };
    let server = Server::without_socket(Arc::clone(&disk) as Arc<dyn Disk>, config).unwrap();
    let mut client = Client::connect(&server);
    client.0.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    let mut request = Request { flags: 0, command: NBD_CMD_READ, cookie: 0, offset: 0, length: 1 << 20 };
    while client.0.write_all(&request.encode()).is_ok() {
        request.cookie += 1;
    }
    while disk.counts().reads < 8 {
        thread::sleep(Duration::from_millis(1));
    }
    // The replies are larger than the socket's buffer: none was sent whole, none of the room came back.
    assert_eq!(disk.counts().reads, 8);
    let mut other = Client::connect(&server);
    other.assert_well();
    server.stop();
    other.assert_closed();
}

#[test]
fn room_comes_back_with_the_replies() {
    let gate = Arc::new(Gate::default());
    let config = Config { limits: Limits { requests: 9, payload: 1 << 20 }, ..Config::default() };
    let server = Server::without_socket(Arc::clone(&gate) as Arc<dyn Disk>, config).unwrap();
    let mut client = Client::connect(&server);
    (0..6).for_each(|i| client.ask(NBD_CMD_READ, 0, i, 0, 512 << 10));
    for turn in 0..3 {
        gate.wait_for(2);
        gate.open();
        (0..2).for_each(|i| assert_eq!(client.reply(), (turn * 2 + i, NBD_EIO), "no data, no read"));
    }
}

#[test]
fn goodbye_waits_for_what_is_in_flight() {
    let gate = Arc::new(Gate::default());
    let server = Server::without_socket(Arc::clone(&gate) as Arc<dyn Disk>, Config::default()).unwrap();
    let mut client = Client::connect(&server);
    (0..3).for_each(|i| client.ask(NBD_CMD_TRIM, 0, i, 0, 512));
    client.ask(NBD_CMD_DISC, 0, 0, 0, 0);
    gate.wait_for(3);
    gate.open();
    (0..3).for_each(|i| assert_eq!(client.reply(), (i, 0)));
    client.assert_closed();
}

#[test]
fn stop_answers_what_is_in_flight_and_refuses_the_rest() {
    let gate = Arc::new(Gate::default());
    let config =
        Config { limits: Limits { requests: 1, payload: 0 }, grace: Duration::from_secs(60), ..Config::default() };
    let server = Server::without_socket(Arc::clone(&gate) as Arc<dyn Disk>, config).unwrap();
    let mut client = Client::connect(&server);
    (0..4).for_each(|i| client.ask(NBD_CMD_FLUSH, 0, i, 0, 0));
    gate.wait_for(1);
    let stopping = thread::spawn(move || server.stop());
    // Once the server has shut its reading side, even sending nothing fails.
    while rustix::net::send(&client.0, &[], rustix::net::SendFlags::NOSIGNAL).is_ok() {
        thread::sleep(Duration::from_millis(1));
    }
    // Again and again: the second request may have passed the check already, and reaches the disk when the first is done.
    let opening = thread::spawn(move || {
        while !stopping.is_finished() {
            gate.open();
            thread::sleep(Duration::from_millis(1));
        }
        stopping.join().unwrap();
    });
    assert_eq!(client.reply(), (0, 0));
    assert!([(1, 0), (1, NBD_ESHUTDOWN)].contains(&client.reply()));
    assert_eq!(client.reply(), (2, NBD_ESHUTDOWN));
    assert_eq!(client.reply(), (3, NBD_ESHUTDOWN));
    client.assert_closed();
    opening.join().unwrap();
}

#[test]
fn stop_does_not_wait_for_ever_on_a_disk_that_does_not_answer() {
    let gate = Arc::new(Gate::default());
    let config = Config { grace: Duration::from_millis(50), ..Config::default() };
    let server = Server::without_socket(Arc::clone(&gate) as Arc<dyn Disk>, config).unwrap();
    let mut client = Client::connect(&server);
    client.ask(NBD_CMD_FLUSH, 0, 1, 0, 0);
    gate.wait_for(1);
    server.stop();
    client.assert_closed();
    // Late answers go nowhere, and harm nobody.
    gate.open();
}

/// Forgets reads, answers writes with data, panics on trims.
struct Broken;

impl Disk for Broken {
    fn geometry(&self) -> Geometry {
        Geometry::writable(SIZE)
    }

    fn submit(&self, command: Command, done: Completion) {
        match command {
            Command::Read { .. } => drop(done),
            Command::Write { .. } => done.succeed(vec![1, 2, 3]),
            Command::Trim { .. } => panic!("this disk panics on purpose"),
            _ => done.fail(0),
        }
    }
}

#[test]
fn a_broken_disk_fails_its_client_and_does_not_hang_it() {
    let server = Server::without_socket(Arc::new(Broken), Config::default()).unwrap();
    let mut client = Client::connect(&server);
    client.ask(NBD_CMD_READ, 0, 1, 0, 512);
    assert_eq!(client.reply(), (1, NBD_EIO));
    client.ask(NBD_CMD_WRITE, 0, 2, 0, 512);
    client.send(&[0; 512]);
    assert_eq!(client.reply(), (2, NBD_EIO));
    client.ask(NBD_CMD_FLUSH, 0, 3, 0, 0);
    assert_eq!(client.reply(), (3, NBD_EIO), "errno 0 is not success");
    client.ask(NBD_CMD_TRIM, 0, 4, 0, 512);
    assert_eq!(client.reply(), (4, NBD_EIO));
    client.assert_closed();
    while server.connections() > 0 {
        thread::sleep(Duration::from_millis(1));
    }
    server.stop();
}

#[test]
fn no_more_connections_than_allowed() {
    let disk = Arc::new(RamDisk::new(Geometry::writable(SIZE)).unwrap());
    let server = Server::without_socket(disk, Config { connections: 1, ..Config::default() }).unwrap();
    let mut client = Client::connect(&server);
    assert!(server.serve(UnixStream::pair().unwrap().0).is_err());
    client.assert_well();
    client.ask(NBD_CMD_DISC, 0, 0, 0, 0);
    client.assert_closed();
    while server.connections() > 0 {
        thread::sleep(Duration::from_millis(1));
    }
    Client::connect(&server).assert_well();
}
