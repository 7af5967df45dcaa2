//! Bugs planted on purpose, to show that the checker finds them. They are put together from outside: the queue's own
//! code is the same in all of them.

use std::collections::{HashSet, VecDeque};
use std::fs::File;
use std::io;

use blkback::lock;
use blkback::spec::Access;
use blkback::storage::{Done, Storage};
use hypervisor::memory::IoList;

use super::bench::SimStorage;

/// A bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// A flush is answered and nothing is flushed.
    FlushDoesNothing,
    /// A flush is answered when it begins.
    FlushAnsweredEarly,
    /// A write is answered when it begins.
    WriteAnsweredEarly,
    /// Each queue has its own barriers.
    BarrierPerQueue,
    /// A flush that failed is tried again, and the second one's success is believed.
    RetryAfterError,
    /// A discard gives up the whole blocks of 4 KiB that it touches.
    DiscardRoundedOutward,
    /// The lock is on the path: two guests get the same file by two names.
    LockOnPath,
    /// A response is shown twice.
    AnswerTwice,
}

impl Bug {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::FlushDoesNothing,
        Self::FlushAnsweredEarly,
        Self::WriteAnsweredEarly,
        Self::BarrierPerQueue,
        Self::RetryAfterError,
        Self::DiscardRoundedOutward,
        Self::LockOnPath,
        Self::AnswerTwice,
    ];

    /// In one word.
    pub fn name(self) -> &'static str {
        match self {
            Self::FlushDoesNothing => "flush-does-nothing",
            Self::FlushAnsweredEarly => "flush-answered-early",
            Self::WriteAnsweredEarly => "write-answered-early",
            Self::BarrierPerQueue => "barrier-per-queue",
            Self::RetryAfterError => "retry-after-error",
            Self::DiscardRoundedOutward => "discard-rounded-outward",
            Self::LockOnPath => "lock-on-path",
            Self::AnswerTwice => "answer-twice",
        }
    }
}

/// The simulated disk, and between it and the queue perhaps a bug.
#[derive(Debug)]
pub struct Planted {
    inner: SimStorage,
    bug: Option<Bug>,
    /// Answers that the disk knows nothing of.
    invented: VecDeque<Done>,
    /// Flushes under way: which are tried again.
    flushes: Vec<u32>,
}

/// Marks tokens of operations that were answered before they ended.
const ANSWERED: u32 = 1 << 31;
/// The block that discards are rounded to, in bytes.
const BLOCK: u64 = 4096;

impl Planted {
    /// The disk as it is, or with a bug.
    pub fn new(inner: SimStorage, bug: Option<Bug>) -> Self {
        Self { inner, bug, invented: VecDeque::new(), flushes: Vec::new() }
    }

    fn invent(&mut self, token: u32) {
        self.invented.push_back(Done { token, memory: IoList::default(), result: Ok(()) });
    }
}

impl Storage for Planted {
    fn read(&mut self, offset: u64, memory: IoList, token: u32) {
        self.inner.read(offset, memory, token);
    }

    fn write(&mut self, offset: u64, memory: IoList, token: u32) {
        if self.bug == Some(Bug::WriteAnsweredEarly) {
            self.invent(token);
            return self.inner.write(offset, memory, token | ANSWERED);
        }
        self.inner.write(offset, memory, token);
    }

    fn flush(&mut self, token: u32) {
        match self.bug {
            Some(Bug::FlushDoesNothing) => self.invent(token),
            Some(Bug::FlushAnsweredEarly) => {
                self.invent(token);
                self.inner.flush(token | ANSWERED);
            }
            Some(Bug::RetryAfterError) => {
                self.flushes.push(token);
                self.inner.flush(token);
            }
            _ => self.inner.flush(token),
        }
    }

    fn discard(&mut self, offset: u64, len: u64, token: u32) {
        if self.bug == Some(Bug::DiscardRoundedOutward) {
            let (first, end) = (offset / BLOCK * BLOCK, (offset + len).next_multiple_of(BLOCK));
            return self.inner.discard(first, end - first, token);
        }
        self.inner.discard(offset, len, token);
    }

    fn erase(&mut self, offset: u64, len: u64, token: u32) {
        self.inner.erase(offset, len, token);
    }

    fn submit(&mut self) -> io::Result<()> {
        self.inner.submit()
    }

    fn next(&mut self) -> Option<Done> {
        if let Some(done) = self.invented.pop_front() {
            return Some(done);
        }
        loop {
            let done = self.inner.next()?;
            if done.token & ANSWERED != 0 {
                continue;
            }
            if self.bug == Some(Bug::RetryAfterError) && self.flushes.contains(&done.token) {
                if done.result.is_err() {
                    self.inner.flush(done.token);
                    continue;
                }
                self.flushes.retain(|&token| token != done.token);
            }
            return Some(done);
        }
    }

    fn has_completions(&mut self) -> bool {
        !self.invented.is_empty() || self.inner.has_completions()
    }
}

/// Whether two guests get to write to one file that has two names; `on_path` if the lock is a table of paths, else as
/// blkback claims it.
///
/// # Errors
/// When there is no room for the file.
pub fn both_get_the_lock(on_path: bool) -> io::Result<bool> {
    let folder = tempfile::tempdir()?;
    let names = [folder.path().join("disk.img"), folder.path().join("alias.img")];
    let first = File::create(&names[0])?;
    std::fs::hard_link(&names[0], &names[1])?;
    let second = File::options().read(true).write(true).open(&names[1])?;
    if on_path {
        let mut held = HashSet::new();
        return Ok(names.into_iter().all(|name| held.insert(name)));
    }
    let claim = |file: &File| lock::claim(file, Access::Write).is_ok();
    Ok(claim(&first) && claim(&second))
}
