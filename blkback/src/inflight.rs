//! What was taken from a ring and has not been answered: kept in a file in memory, where it outlives this process.
//!
//! The ring cannot tell. An answer takes the slot of some request, not of the one it answers, so that of a request that
//! has long been in flight nothing is left there. Who takes over from a process that was killed needs the numbers, for
//! a frontend believes no answer to what it did not ask (Linux' blkfront: "response references no pending request").
//!
//! One thread writes, and it may end after any store. The order of its stores makes sense of every beginning of them:
//! a request is noted before it counts as taken; an answer is noted, with its place in the ring, before the frontend can
//! see it; and only what the frontend can see is forgotten.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use hypervisor::memory::Mapping;
use hypervisor::{DomId, GrantRef, Port};
use rustix::fs::{FallocateFlags, Mode, OFlags};

/// "blkback1": another version has another layout.
const MAGIC: u64 = u64::from_le_bytes(*b"blkback1");

/// The header: [`MAGIC`], then four 32-bit numbers.
const ENTRIES: usize = 8;
const GREF: usize = 12;
const PORT: usize = 16;
/// How many requests were taken, as the ring counts.
const TAKEN: usize = 20;
const HEADER: usize = 64;

/// An entry: the frontend's number of the request; its place and its answer's place, as the ring counts; its operation;
/// and what it is.
const ENTRY: usize = 24;
const TAKEN_AT: usize = 8;
const ANSWERED_AT: usize = 12;
const OPERATION: usize = 16;
const STATE: usize = 20;
const FREE: u32 = 0;
const IN_FLIGHT: u32 = 1;
const ANSWERED: u32 = 2;

/// Which ring this is about: a log that another connection left must not be taken for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connection {
    /// Requests that fit into the ring.
    pub entries: u32,
    /// Its first page.
    pub gref: GrantRef,
    /// The frontend's event channel.
    pub port: Port,
}

/// A request in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// The frontend's number.
    pub id: u64,
    /// What the answer has to say was asked.
    pub operation: u8,
}

/// What a killed process left behind.
#[derive(Debug, PartialEq, Eq)]
pub struct Left {
    /// How many requests it took, as the ring counts.
    pub taken: u32,
    /// Those that the frontend waits for.
    pub requests: Vec<Request>,
}

/// The log of one ring. Dropped in order it takes its file along.
#[derive(Debug)]
pub struct InFlightLog {
    memory: Mapping,
    path: PathBuf,
    free: Vec<u32>,
    /// Answered, and not to be seen by the frontend yet.
    answered: Vec<u32>,
}

fn size(entries: u32) -> usize {
    HEADER + entries as usize * ENTRY
}

fn entry(place: u32) -> usize {
    HEADER + place as usize * ENTRY
}

impl InFlightLog {
    /// A new log, in place of one that may be left at `path`. The folder is made.
    ///
    /// # Errors
    /// When there is no room for it.
    pub fn create(path: &Path, connection: Connection) -> io::Result<Self> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        remove(path)?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)?);
        let len = size(connection.entries);
        // Memory that is there before it is needed: a page that cannot be had later would end the process.
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, len as u64)?;
        let memory = Mapping::of_file(&file, 0, len, true)?;
        for (at, value) in
            [(ENTRIES, connection.entries), (GREF, connection.gref.0), (PORT, connection.port.0), (TAKEN, 0)]
        {
            memory.atomic_u32(at).store(value, Ordering::Relaxed);
        }
        memory.atomic_u64(0).store(MAGIC, Ordering::Release);
        let entries = connection.entries as usize;
        let free = (0..connection.entries).rev().collect();
        Ok(Self { memory, path: path.to_owned(), free, answered: Vec::with_capacity(entries) })
    }

    /// Notes the request that the ring counts as the `index`th. Returns its place here.
    ///
    /// # Panics
    /// When more requests are in flight than fit into the ring.
    #[inline]
    pub fn take(&mut self, index: u32, request: Request) -> u32 {
        let Some(place) = self.free.pop() else { panic!("more requests in flight than the ring has slots") };
        let at = entry(place);
        self.memory.atomic_u64(at).store(request.id, Ordering::Relaxed);
        self.memory.atomic_u32(at + TAKEN_AT).store(index, Ordering::Relaxed);
        self.memory.atomic_u32(at + OPERATION).store(request.operation.into(), Ordering::Relaxed);
        self.memory.atomic_u32(at + STATE).store(IN_FLIGHT, Ordering::Release);
        self.memory.atomic_u32(TAKEN).store(index.wrapping_add(1), Ordering::Release);
        place
    }

    /// Notes that a request is answered, by what the ring counts as the `index`th answer.
    #[inline]
    pub fn answer(&mut self, place: u32, index: u32) {
        let at = entry(place);
        self.memory.atomic_u32(at + ANSWERED_AT).store(index, Ordering::Release);
        self.memory.atomic_u32(at + STATE).store(ANSWERED, Ordering::Release);
        self.answered.push(place);
    }

    /// The frontend can see all answers that were noted.
    #[inline]
    pub fn published(&mut self) {
        for &place in &self.answered {
            self.memory.atomic_u32(entry(place) + STATE).store(FREE, Ordering::Release);
        }
        self.free.append(&mut self.answered);
    }
}

impl Drop for InFlightLog {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "removing the log of requests in flight");
        }
    }
}

/// Removes a log, if it is there.
///
/// # Errors
/// When it cannot be removed.
pub fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The file of a queue's log, below the folder of all.
pub fn name(kind: &str, frontend: DomId, devid: u32, queue: usize) -> String {
    format!("{kind}-{frontend}-{devid}-{queue}")
}

/// Removes the logs of devices that are gone: their guests ended while no server ran. `exists` is told a device's kind,
/// domain and number.
///
/// # Errors
/// When the folder cannot be read, a log not be removed, or `exists` fails.
pub fn sweep(folder: &Path, exists: impl Fn(&str, DomId, u32) -> io::Result<bool>) -> io::Result<()> {
    let logs = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        logs => logs?,
    };
    for log in logs {
        let log = log?;
        let name = log.file_name();
        let parts: Vec<&str> = name.to_str().unwrap_or_default().split('-').collect();
        // What is not ours stays.
        let [kind, frontend, devid, _] = parts[..] else { continue };
        if let (Ok(frontend), Ok(devid)) = (frontend.parse(), devid.parse())
            && !exists(kind, frontend, devid)?
        {
            remove(&log.path())?;
        }
    }
    Ok(())
}

/// Reads what a killed process left at `path` about a ring of which the frontend can see `visible` answers.
///
/// # Errors
/// A sentence: there is no log, it is another ring's, or it makes no sense.
pub fn read(path: &Path, connection: Connection, visible: u32) -> Result<Left, String> {
    let failed = |error: io::Error| format!("{}: {error}", path.display());
    let file = File::open(path).map_err(failed)?;
    let len = size(connection.entries);
    if file.metadata().map_err(failed)?.len() < len as u64 {
        return Err(format!("{} is too short", path.display()));
    }
    // Writable for the atomics alone: nothing is written.
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).map_err(failed)?;
    let memory = Mapping::of_file(&file, 0, len, true).map_err(failed)?;
    let number = |at| memory.atomic_u32(at).load(Ordering::Acquire);
    let magic = memory.atomic_u64(0).load(Ordering::Acquire);
    let found = Connection { entries: number(ENTRIES), gref: GrantRef(number(GREF)), port: Port(number(PORT)) };
    if magic != MAGIC || found != connection {
        return Err(format!("{} is about another connection", path.display()));
    }
    let taken = number(TAKEN);
    let requests: Vec<Request> = (0..connection.entries)
        .map(entry)
        .filter(|at| match number(at + STATE) {
            // One that was noted and did not come to count stands in the ring still.
            IN_FLIGHT => number(at + TAKEN_AT) != taken,
            ANSWERED => number(at + ANSWERED_AT).wrapping_sub(visible) < connection.entries,
            _ => false,
        })
        .map(|at| Request {
            id: memory.atomic_u64(at).load(Ordering::Acquire),
            operation: number(at + OPERATION) as u8,
        })
        .collect();
    if requests.len() as u32 != taken.wrapping_sub(visible) {
        let (noted, missing) = (requests.len(), taken.wrapping_sub(visible));
        return Err(format!("{} has {noted} requests in flight where the ring has {missing}", path.display()));
    }
    Ok(Left { taken, requests })
}

#[cfg(test)]
mod tests {
    use super::*;

    const RING: Connection = Connection { entries: 4, gref: GrantRef(8), port: Port(3) };

    fn request(id: u64) -> Request {
        Request { id, operation: 1 }
    }

    fn ids(path: &Path, visible: u32) -> (u32, Vec<u64>) {
        let left = read(path, RING, visible).unwrap();
        let mut ids: Vec<u64> = left.requests.iter().map(|request| request.id).collect();
        ids.sort_unstable();
        (left.taken, ids)
    }

    #[test]
    fn what_is_left_at_each_step() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("folder/3-51712-0");
        let mut log = InFlightLog::create(&path, RING).unwrap();
        assert_eq!(ids(&path, 0), (0, vec![]));
        let places: Vec<u32> = (0..4).map(|index| log.take(index, request(10 + u64::from(index)))).collect();
        assert_eq!(ids(&path, 0), (4, vec![10, 11, 12, 13]));
        // Out of order, and not shown yet: killed here, the successor answers them.
        log.answer(places[2], 0);
        log.answer(places[0], 1);
        assert_eq!(ids(&path, 0), (4, vec![10, 11, 12, 13]));
        // Killed between showing and forgetting.
        assert_eq!(ids(&path, 2), (4, vec![11, 13]));
        log.published();
        assert_eq!(ids(&path, 2), (4, vec![11, 13]));
        // The same numbers again, while older ones are out.
        log.take(4, request(12));
        log.take(5, request(10));
        assert_eq!(ids(&path, 2), (6, vec![10, 11, 12, 13]));
        drop(log);
        assert!(read(&path, RING, 2).unwrap_err().contains("No such file"));
    }

    #[test]
    fn a_request_that_was_noted_and_not_counted_is_still_in_the_ring() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = InFlightLog::create(&path, RING).unwrap();
        log.take(u32::MAX, request(1));
        log.take(0, request(2));
        log.memory.atomic_u32(TAKEN).store(0, Ordering::Release);
        assert_eq!(ids(&path, u32::MAX), (0, vec![1]));
    }

    #[test]
    fn logs_of_devices_that_are_gone_go() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("logs");
        sweep(&folder, |_, _, _| Ok(false)).unwrap();
        let names = [name("vbd", DomId(3), 51712, 0), name("vbd3", DomId(4), 51712, 1), "notes".to_owned()];
        std::fs::create_dir(&folder).unwrap();
        names.iter().for_each(|name| std::fs::write(folder.join(name), "").unwrap());
        sweep(&folder, |kind, frontend, devid| Ok((kind, frontend, devid) == ("vbd3", DomId(4), 51712))).unwrap();
        let left = names.map(|name| folder.join(name).exists());
        assert_eq!(left, [false, true, true]);
    }

    #[test]
    fn what_is_not_about_this_ring_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = InFlightLog::create(&path, RING).unwrap();
        log.take(0, request(1));
        for (other, visible) in [
            (Connection { gref: GrantRef(9), ..RING }, 0),
            (Connection { port: Port(4), ..RING }, 0),
            (Connection { entries: 2, ..RING }, 0),
            (Connection { entries: 8, ..RING }, 0),
            (RING, 1),
            (RING, u32::MAX),
        ] {
            read(&path, other, visible).unwrap_err();
        }
    }
}
