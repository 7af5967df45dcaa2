//! Power cuts: the medium has a volatile cache, and is killed together with everything above it. What was flushed is
//! there.
//!
//! The medium is nbdkit with its cache filter, which keeps in memory what was not flushed. blkback serves it, a guest's
//! applications write stamped sectors through it, and this process, which is not killed, notes what was asked, answered
//! and flushed. `POWER_CUTS` says how often (`tests/run powercut [N]`; 50 there, fewer here). The control is the same
//! medium lying about its flushes: if nothing were found missing there, the test would be worth nothing.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use blkback::nbd::link::Link;
use blkback::nbd::protocol::*;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use system_tests::sim::stamp::{Bytes, Content, SECTOR, Stamp};
use system_tests::{Dom0, PATIENCE, have, quick};

const SECTORS: u64 = 8192;
const DEPTH: usize = 16;
const WRITER: u64 = 0x706f_7765_7263_7574;

/// What may stand in a sector.
#[derive(Debug, Clone, Copy, Default)]
struct Known {
    /// The newest write asked for, answered, and covered by a flush that was answered.
    asked: u64,
    answered: u64,
    flushed: u64,
}

/// What is found missing or wrong.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Found {
    lost_flushed: usize,
    torn: usize,
    misdirected: usize,
    from_nowhere: usize,
    /// Answered and not flushed: a power cut may take it.
    lost_answered: usize,
}

/// xorshift; a test's random numbers have to come again from the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

struct Medium {
    child: Child,
    socket: PathBuf,
}

impl Medium {
    fn start(image: &Path, socket: &Path, cache: &str) -> Self {
        // What the one before left behind.
        let _ = std::fs::remove_file(socket);
        let child = Command::new("nbdkit")
            .args(["-f", "--filter=cache", "-U"])
            .arg(socket)
            .args(["file", image.to_str().unwrap(), cache])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let began = Instant::now();
        while std::os::unix::net::UnixStream::connect(socket).is_err() {
            assert!(began.elapsed() < PATIENCE, "nbdkit does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        Self { child, socket: socket.to_owned() }
    }
}

impl Drop for Medium {
    fn drop(&mut self) {
        // It may be dead already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

enum Asked {
    Write {
        sectors: Vec<(u64, u64)>,
    },
    /// With what had been answered when it was asked for.
    Flush {
        covers: Vec<(u64, u64)>,
    },
}

/// Writes and flushes at random until the connection breaks, and notes what happens.
fn work(uri: &str, known: &mut [Known], next: &mut u64, random: &mut Random) -> (u64, u64) {
    let mut link = Link::make(&format!("nbd:unix:{uri}").parse().unwrap()).unwrap();
    link.stream.be_patient().unwrap();
    let mut flying: HashMap<u64, Asked> = HashMap::new();
    let mut busy = std::collections::HashSet::new();
    let (mut cookie, mut writes, mut flushes) = (0u64, 0, 0);
    loop {
        while flying.len() < DEPTH {
            cookie += 1;
            let mut message = Vec::new();
            if random.below(12) == 0 {
                let covers = known.iter().enumerate().map(|(lba, known)| (lba as u64, known.answered)).collect();
                let header = Request { flags: 0, command: NBD_CMD_FLUSH, cookie, offset: 0, length: 0 };
                message.extend_from_slice(&header.encode());
                flying.insert(cookie, Asked::Flush { covers });
            } else {
                let first = random.below(SECTORS);
                let count = 1 + random.below(32).min(SECTORS - first - 1);
                // Two writes to one sector at a time could end in either order.
                if (first..first + count).any(|lba| busy.contains(&lba)) {
                    continue;
                }
                let header = Request {
                    flags: 0,
                    command: NBD_CMD_WRITE,
                    cookie,
                    offset: first * SECTOR as u64,
                    length: (count * SECTOR as u64) as u32,
                };
                message.extend_from_slice(&header.encode());
                let mut sectors = Vec::new();
                for lba in first..first + count {
                    *next += 1;
                    let mut bytes: Bytes = [0; SECTOR];
                    Stamp { lba, writer: WRITER, generation: *next }.fill(&mut bytes);
                    message.extend_from_slice(&bytes);
                    known[lba as usize].asked = *next;
                    busy.insert(lba);
                    sectors.push((lba, *next));
                }
                flying.insert(cookie, Asked::Write { sectors });
            }
            if link.stream.write_all(&message).is_err() {
                return (writes, flushes);
            }
        }
        let mut reply = [0; SIMPLE_REPLY_SIZE];
        if link.stream.read_exact(&mut reply).is_err() {
            return (writes, flushes);
        }
        let SimpleReply { error, cookie } = SimpleReply::decode(&reply).unwrap();
        let asked = flying.remove(&cookie).expect("an answer to what was asked, and one only");
        // While everything dies, a request may fail; that it was not done was said then.
        match asked {
            Asked::Write { sectors } => {
                for (lba, generation) in sectors {
                    busy.remove(&lba);
                    if error == 0 {
                        known[lba as usize].answered = generation;
                    }
                }
                writes += 1;
            }
            Asked::Flush { covers } if error == 0 => {
                for (lba, generation) in covers {
                    let known = &mut known[lba as usize];
                    known.flushed = known.flushed.max(generation);
                }
                flushes += 1;
            }
            Asked::Flush { .. } => {}
        }
    }
}

/// Looks at the medium, and takes what is there for the new beginning.
fn check(image: &Path, known: &mut [Known]) -> Found {
    let file = std::fs::File::open(image).unwrap();
    let mut found = Found::default();
    for (lba, known) in known.iter_mut().enumerate() {
        let mut bytes: Bytes = [0; SECTOR];
        file.read_exact_at(&mut bytes, (lba * SECTOR) as u64).unwrap();
        let there = match Content::of(&bytes) {
            Content::Zeros => 0,
            Content::Torn => {
                found.torn += 1;
                0
            }
            Content::Stamp(stamp) if stamp.lba != lba as u64 => {
                found.misdirected += 1;
                0
            }
            Content::Stamp(stamp) if stamp.writer != WRITER || stamp.generation > known.asked => {
                found.from_nowhere += 1;
                0
            }
            Content::Stamp(stamp) => stamp.generation,
        };
        found.lost_flushed += usize::from(there < known.flushed);
        found.lost_answered += usize::from(there >= known.flushed && there < known.answered);
        *known = Known { asked: there, answered: there, flushed: there };
    }
    found
}

/// Cuts the power `cuts` times. Returns what was found missing in all.
fn cut(cuts: usize, cache: &str) -> Found {
    let folder = tempfile::tempdir().unwrap();
    let (image, socket) = (folder.path().join("medium.img"), folder.path().join("medium.sock"));
    std::fs::File::create(&image).unwrap().set_len(SECTORS * SECTOR as u64).unwrap();
    let mut known = vec![Known::default(); SECTORS as usize];
    let (mut next, mut random, mut sum) = (0, Random(0x9e37_79b9_7f4a_7c15), Found::default());
    let (mut writes, mut flushes) = (0, 0);
    for number in 0..cuts {
        let medium = Medium::start(&image, &socket, cache);
        let dom0 = Dom0::start();
        let target = PathBuf::from(format!("nbd:unix:{}", medium.socket.display()));
        let further = if number % 2 == 0 { &["--queues", "2"][..] } else { &["--no-persistent"] };
        let guest = dom0.guest_with("guest", &target, "w", further);
        let uri = dom0.path("guest.sock");
        // Everything at once, the medium first: what is still answered then was promised before.
        let dying: Vec<_> = [medium.child.id(), dom0.blkback.pid(), guest.process.pid(), dom0.emu_xen.pid()]
            .map(|pid| Pid::from_raw(pid.cast_signed()))
            .into();
        let after = Duration::from_millis(30 + random.below(400));
        let killer = std::thread::spawn(move || {
            std::thread::sleep(after);
            for pid in dying {
                nix::sys::signal::kill(pid, Signal::SIGKILL).unwrap();
            }
        });
        let (more_writes, more_flushes) = work(uri.to_str().unwrap(), &mut known, &mut next, &mut random);
        killer.join().unwrap();
        writes += more_writes;
        flushes += more_flushes;
        drop(guest);
        drop(dom0);
        drop(medium);
        let found = check(&image, &mut known);
        if (number + 1) % 10 == 0 || number + 1 == cuts {
            println!("{cache}: {} cuts, {writes} writes, {flushes} flushes answered; this cut: {found:?}", number + 1);
        }
        sum.lost_flushed += found.lost_flushed;
        sum.torn += found.torn;
        sum.misdirected += found.misdirected;
        sum.from_nowhere += found.from_nowhere;
        sum.lost_answered += found.lost_answered;
    }
    assert!(flushes > cuts as u64, "there was something to lose");
    sum
}

#[test]
fn what_was_flushed_survives_power_cuts() {
    if !have("nbdkit", "power cuts") {
        return;
    }
    let cuts = match std::env::var("POWER_CUTS") {
        Ok(text) => text.parse().expect("POWER_CUTS is a number"),
        Err(_) if quick() => 4,
        Err(_) => 12,
    };
    let found = cut(cuts, "cache=writeback");
    let expected = Found { lost_answered: found.lost_answered, ..Found::default() };
    assert_eq!(found, expected, "what was flushed is there, whole and in its place");
    let control = cut(cuts.div_ceil(5).max(3), "cache=unsafe");
    assert!(control.lost_flushed > 0, "a medium that lies about its flushes is not noticed: this test is void");
}
