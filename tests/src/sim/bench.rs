//! The simulated disk as a queue's storage: operations wait here until the history says that they end, and how.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::rc::Rc;

use blkback::storage::{Done, Storage};
use hypervisor::memory::{IoList, Mapping};

use super::disk::{Disk, SECTORS, Version, ZEROS};
use super::random::Random;
use super::stamp::SECTOR;

/// What an operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// Fill memory.
    Read,
    /// Write memory.
    Write,
    /// Put on the medium what is in the cache.
    Flush,
    /// Give sectors up.
    Discard,
    /// Erase sectors for good.
    Erase,
    /// Say how large the disk is. No operation of a queue.
    Size,
}

/// An operation under way.
#[derive(Debug)]
pub struct Job {
    /// Of which queue.
    pub lane: usize,
    /// What it does.
    pub what: What,
    /// First sector.
    pub sector: u64,
    /// Sectors.
    pub count: u64,
    token: u32,
    memory: IoList,
    /// Sectors that are done already: the transfer was short.
    done: u64,
    /// A write's data, as they were when it began.
    data: Vec<Version>,
    /// What a flush covers.
    mark: u32,
}

/// How often things go wrong: once in so many operations, never for 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Faults {
    /// A read, write or discard fails; some of a write's sectors are written all the same.
    pub error: u64,
    /// A flush fails.
    pub flush: u64,
    /// A read or write is short, or interrupted, and has to be continued.
    pub short: u64,
}

/// One failure at a place of the test's choosing.
#[derive(Debug, Clone, Copy)]
pub struct Aim {
    /// Of which kind the operation is.
    pub what: What,
    /// How many of the kind come before it.
    pub after: u32,
    /// The error, or none for a transfer that is short.
    pub errno: Option<i32>,
}

/// What ending an operation came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// It is done.
    Done,
    /// Part of it; the rest goes on.
    Part,
    /// It failed.
    Failed(i32),
}

/// The disk and what its queues have under way.
#[derive(Debug)]
pub struct Bench {
    /// The disk.
    pub disk: Disk,
    /// Under way, in the order they began.
    pub running: Vec<Job>,
    prepared: Vec<Job>,
    ended: Vec<VecDeque<Done>>,
    /// What goes wrong by chance.
    pub faults: Faults,
    /// What goes wrong on purpose.
    pub aim: Option<Aim>,
    /// Chance, of this history.
    pub dice: Random,
    /// Operations that failed so far, and flushes among them.
    pub failures: (u32, u32),
    /// A write's memory changed while it was under way.
    pub memory_changed: bool,
    /// An operation was asked for that is no multiple of the disk's sectors.
    pub misaligned: bool,
    /// Bytes of the disk's own sectors: what operations must be multiples of.
    unit: u64,
    /// Where the disk's controller keeps what it moves.
    scratch: Mapping,
    buffer: Vec<u8>,
    spare: Vec<Vec<Version>>,
}

/// How queues hold it.
pub type SharedBench = Rc<RefCell<Bench>>;

impl Bench {
    /// A disk for so many queues, of sectors of so many bytes.
    ///
    /// # Panics
    /// When there is no memory.
    pub fn new(lanes: usize, unit: u64) -> SharedBench {
        Rc::new(RefCell::new(Self {
            disk: Disk::default(),
            running: Vec::new(),
            prepared: Vec::new(),
            ended: (0..lanes).map(|_| VecDeque::new()).collect(),
            faults: Faults::default(),
            aim: None,
            dice: Random::new(0),
            failures: (0, 0),
            memory_changed: false,
            misaligned: false,
            unit,
            scratch: Mapping::anonymous(SECTORS as usize * SECTOR).expect("memory"),
            buffer: Vec::new(),
            spare: Vec::new(),
        }))
    }

    /// A new disk, nothing under way.
    pub fn reset(&mut self, faults: Faults, dice: Random) {
        self.disk.reset();
        self.running.clear();
        self.prepared.clear();
        self.ended.iter_mut().for_each(VecDeque::clear);
        (self.faults, self.aim, self.dice) = (faults, None, dice);
        (self.failures, self.memory_changed, self.misaligned) = ((0, 0), false, false);
    }

    /// Whether this queue's storage has ended something.
    pub fn has_ended(&self, lane: usize) -> bool {
        !self.ended[lane].is_empty()
    }

    /// A controller reads a write's data when it begins, or later; if that makes a difference, somebody touched what
    /// was not his.
    fn begin(&mut self, lane: usize) {
        let Self { prepared, running, disk, scratch, buffer, spare, .. } = self;
        for mut job in prepared.extract_if(.., |job| job.lane == lane) {
            match job.what {
                What::Write => {
                    fetch(&job.memory, scratch, buffer);
                    job.data = spare.pop().unwrap_or_default();
                    job.data.extend(buffer.as_chunks::<SECTOR>().0.iter().map(|bytes| disk.remember(bytes)));
                }
                What::Flush => job.mark = disk.mark(),
                What::Read | What::Discard | What::Erase | What::Size => {}
            }
            running.push(job);
        }
    }

    fn fate(&mut self, job: &Job) -> Step {
        let left = job.count - job.done;
        if let Some(aim) = &mut self.aim
            && aim.what == job.what
        {
            if aim.after > 0 {
                aim.after -= 1;
                return Step::Done;
            }
            let errno = aim.errno;
            self.aim = None;
            return match errno {
                Some(libc::EINTR | libc::EAGAIN) | None => Step::Part,
                Some(errno) => Step::Failed(errno),
            };
        }
        match job.what {
            What::Flush if self.dice.once_in(self.faults.flush) => Step::Failed(libc::EIO),
            What::Flush => Step::Done,
            _ if self.dice.once_in(self.faults.error) => {
                Step::Failed([libc::EIO, libc::ENOSPC, libc::ESTALE][self.dice.below(3) as usize])
            }
            What::Read | What::Write if left > 1 && self.dice.once_in(self.faults.short) => Step::Part,
            _ => Step::Done,
        }
    }

    /// Ends operation `index` of those running, or a part of it.
    pub fn end(&mut self, index: usize) -> Step {
        let mut job = self.running.remove(index);
        let step = self.fate(&job);
        match step {
            Step::Part => {
                // None at all for an operation that was interrupted, and for a read, whose memory is filled at once.
                let left = job.count - job.done;
                let some = if job.what == What::Write && left > 1 { self.dice.below(left) } else { 0 };
                self.transfer(&mut job, some, None);
                self.running.insert(index, job);
                return step;
            }
            Step::Done => {
                let all = job.count - job.done;
                self.transfer(&mut job, all, None);
                if job.what == What::Flush {
                    let covers = if self.dice.once_in(4) { self.disk.mark() } else { job.mark };
                    self.disk.flushed(covers);
                }
            }
            Step::Failed(errno) => {
                self.failures.0 += 1;
                if job.what == What::Flush {
                    self.failures.1 += 1;
                    let dice = &mut self.dice;
                    self.disk.flush_failed(job.mark, |_| dice.once_in(2));
                }
                let all = job.count - job.done;
                self.transfer(&mut job, all, Some(errno));
            }
        }
        let Job { lane, token, memory, mut data, .. } = job;
        data.clear();
        self.spare.push(data);
        let result = match step {
            Step::Failed(errno) => Err(io::Error::from_raw_os_error(errno)),
            _ => Ok(()),
        };
        self.ended[lane].push_back(Done { token, memory, result });
        step
    }

    /// Moves `count` sectors; of a write or discard that fails, any of them.
    fn transfer(&mut self, job: &mut Job, count: u64, failed: Option<i32>) {
        let sectors = job.sector + job.done..job.sector + job.done + count;
        match job.what {
            What::Write => {
                if self.dice.once_in(4) {
                    fetch(&job.memory, &self.scratch, &mut self.buffer);
                    let (now, _) = self.buffer.as_chunks::<SECTOR>();
                    let then = job.data[job.done as usize..].iter().map(|&version| self.disk.bytes(version));
                    self.memory_changed |= !now.iter().eq(then);
                }
                for sector in sectors {
                    if failed.is_none() || self.dice.once_in(2) {
                        self.disk.put(sector, job.data[(sector - job.sector) as usize]);
                    }
                }
                // Of what failed nobody knows how much was written: all of it is still to be done.
                if failed.is_none() {
                    job.memory.advance(count as usize * SECTOR);
                }
            }
            What::Discard => {
                for sector in sectors {
                    if failed.is_none() || self.dice.once_in(2) {
                        self.disk.put(sector, ZEROS);
                    }
                }
            }
            What::Erase => {
                for sector in sectors {
                    if failed.is_none() || self.dice.once_in(2) {
                        self.disk.erase(sector);
                    }
                }
            }
            What::Read if failed.is_none() && count > 0 => {
                self.buffer.clear();
                for sector in sectors {
                    // What is being written may be seen already.
                    let version = self.under_way(sector).filter(|_| self.dice.once_in(2));
                    let version = version.unwrap_or_else(|| self.disk.seen(sector));
                    self.buffer.extend_from_slice(self.disk.bytes(version));
                }
                self.scratch.copy_in(0, &self.buffer);
                job.memory.fill_from(&self.scratch, 0);
            }
            What::Read | What::Flush | What::Size => {}
        }
        job.done += count;
    }

    fn under_way(&mut self, sector: u64) -> Option<Version> {
        let versions = self.in_flight(sector).count() as u64;
        if versions == 0 {
            return None;
        }
        let which = self.dice.below(versions) as usize;
        self.in_flight(sector).nth(which)
    }

    /// What running operations may have put into a sector already, or still put there after the death of who asked
    /// for them.
    pub fn in_flight(&self, sector: u64) -> impl Iterator<Item = Version> + '_ {
        self.running.iter().filter_map(move |job| {
            let at = sector.checked_sub(job.sector).filter(|at| (job.done..job.count).contains(at))?;
            match job.what {
                What::Write => Some(job.data[at as usize]),
                What::Discard | What::Erase => Some(ZEROS),
                What::Read | What::Flush | What::Size => None,
            }
        })
    }

    /// Sectors that anything may have happened to.
    pub fn concerned(&self) -> u64 {
        let running = self.running.iter().filter(|job| matches!(job.what, What::Write | What::Discard | What::Erase));
        let touched = self.disk.touched_sectors().fold(0, |mask, sector| mask | 1u64 << sector);
        running.flat_map(|job| job.sector..job.sector + job.count).fold(touched, |mask, sector| mask | 1u64 << sector)
    }
}

/// A controller's way to memory: past everybody.
fn fetch(list: &IoList, scratch: &Mapping, buffer: &mut Vec<u8>) {
    list.copy_to(scratch, 0);
    buffer.resize(list.len(), 0);
    scratch.copy_out(0, buffer);
}

/// One queue's way to the disk.
#[derive(Debug)]
pub struct SimStorage {
    /// The disk.
    pub bench: SharedBench,
    /// Which queue.
    pub lane: usize,
}

impl SimStorage {
    fn ask(&mut self, what: What, offset: u64, len: u64, memory: IoList, token: u32) {
        let mut bench = self.bench.borrow_mut();
        bench.misaligned |= !offset.is_multiple_of(bench.unit) || !len.is_multiple_of(bench.unit);
        let (sector, count) = (offset / SECTOR as u64, len / SECTOR as u64);
        let job = Job { lane: self.lane, what, sector, count, token, memory, done: 0, data: Vec::new(), mark: 0 };
        bench.prepared.push(job);
    }
}

impl Storage for SimStorage {
    fn read(&mut self, offset: u64, memory: IoList, token: u32) {
        self.ask(What::Read, offset, memory.len() as u64, memory, token);
    }

    fn write(&mut self, offset: u64, memory: IoList, token: u32) {
        self.ask(What::Write, offset, memory.len() as u64, memory, token);
    }

    fn flush(&mut self, token: u32) {
        self.ask(What::Flush, 0, 0, IoList::default(), token);
    }

    fn discard(&mut self, offset: u64, len: u64, token: u32) {
        self.ask(What::Discard, offset, len, IoList::default(), token);
    }

    fn erase(&mut self, offset: u64, len: u64, token: u32) {
        self.ask(What::Erase, offset, len, IoList::default(), token);
    }

    fn submit(&mut self) -> io::Result<()> {
        self.bench.borrow_mut().begin(self.lane);
        Ok(())
    }

    fn next(&mut self) -> Option<Done> {
        self.bench.borrow_mut().ended[self.lane].pop_front()
    }

    fn has_completions(&mut self) -> bool {
        self.bench.borrow().has_ended(self.lane)
    }
}
