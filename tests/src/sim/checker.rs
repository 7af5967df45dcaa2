//! What a disk has promised, and whether what is found on it, or read from it, keeps that.
//!
//! Of two changes of a sector one is *before* the other if it was answered before the other was asked for, or if a
//! barrier was taken between them. What is found must not be older than anything promised: by a flush or a barrier
//! when the power went; by any answer when only a process died, and for a read.

use super::bench::Bench;
use super::plan::{Op, Range};
use super::stamp::{Content, Stamp};

/// What can be wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// After a power cut: older than what a flush had covered.
    LostFlushed,
    /// After the death of the process: older than what had been answered.
    LostAcknowledged,
    /// Neither one write nor another.
    Torn,
    /// Meant for another sector, or changed although nobody asked for that.
    Misdirected,
    /// Read, and older than what had been answered when the read was asked for.
    Stale,
    /// Written by somebody else.
    Foreign,
    /// A barrier was overtaken.
    Reordered,
    /// An answer to what was not asked, or was answered before.
    AnsweredTwice,
    /// Everything has come to rest, and a request has no answer, or its memory is still held.
    Unanswered,
    /// A write or flush answered OK after a flush had failed; or a flush answered with an error, which Linux takes for
    /// success.
    FalsePromise,
    /// An error although nothing went wrong.
    Refused,
}

impl Class {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::LostFlushed,
        Self::LostAcknowledged,
        Self::Torn,
        Self::Misdirected,
        Self::Stale,
        Self::Foreign,
        Self::Reordered,
        Self::AnsweredTwice,
        Self::Unanswered,
        Self::FalsePromise,
        Self::Refused,
    ];
}

impl std::fmt::Display for Class {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::LostFlushed => "lost-flushed",
            Self::LostAcknowledged => "lost-acknowledged",
            Self::Torn => "torn",
            Self::Misdirected => "misdirected",
            Self::Stale => "stale",
            Self::Foreign => "foreign",
            Self::Reordered => "reordered",
            Self::AnsweredTwice => "answered-twice",
            Self::Unanswered => "unanswered",
            Self::FalsePromise => "false-promise",
            Self::Refused => "refused",
        })
    }
}

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Of what kind.
    pub class: Class,
    /// In words.
    pub text: String,
}

impl Finding {
    /// Of this kind, in these words.
    pub fn new(class: Class, text: impl Into<String>) -> Self {
        Self { class, text: text.into() }
    }
}

/// How a machine stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Crash {
    /// The power goes: of what is not flushed any part is left.
    Power,
    /// The process is killed: what the disk's cache has stays.
    Kill,
}

/// A request and what became of it. Times are events of the history.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Its queue.
    pub lane: usize,
    /// What it asks for.
    pub op: Op,
    published: u32,
    /// Twice the number of barriers taken before it; one more for a barrier.
    epoch: Option<u32>,
    /// What it writes or gives up.
    changes: Option<Range>,
    /// When it was answered, and whether OK.
    ended: Option<(u32, bool)>,
    durable: bool,
    /// Another guest's.
    foreign: bool,
}

impl Entry {
    fn changes(&self, sector: u64) -> bool {
        self.changes.is_some_and(|range| range.has(sector))
    }

    fn is_okay(&self) -> bool {
        self.ended.is_some_and(|(_, okay)| okay)
    }

    fn failed(&self) -> bool {
        self.ended.is_some_and(|(_, okay)| !okay)
    }

    fn is_before(&self, other: &Self) -> bool {
        self.ended.is_some_and(|(ended, _)| ended < other.published) || self.is_barred_from(other)
    }

    /// Whether a barrier stands between them, this one first.
    fn is_barred_from(&self, other: &Self) -> bool {
        self.epoch.zip(other.epoch).is_some_and(|(this, other)| this < other)
    }

    /// Whether it has been answered.
    pub fn is_answered(&self) -> bool {
        self.ended.is_some()
    }
}

/// All requests of a history.
#[derive(Debug, Default)]
pub struct Checker {
    entries: Vec<Entry>,
    run: u64,
    /// Sectors that a discard gives up at a time.
    unit: u64,
    /// Barriers taken.
    barriers: u32,
    /// The event in which a queue learned that a flush failed.
    broken: Option<u32>,
}

impl Checker {
    /// A new history. `run` is different for each, so that what is left of another shows.
    /// `unit` is how many sectors the disk gives up at a time: of a discard only whole units count.
    pub fn reset(&mut self, run: u64, unit: u64) {
        self.entries.clear();
        self.unit = unit;
        (self.run, self.barriers, self.broken) = (run, 0, None);
    }

    /// All requests so far.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The stamps of request `index`, which is the next one of this queue.
    pub fn stamp(&self, index: usize, lane: usize, lba: u64, foreign: bool) -> Stamp {
        let writer = self.run << 8 | (lane as u64 + 1) | u64::from(foreign) << 7;
        Stamp { lba, writer, generation: index as u64 + 1 }
    }

    /// The guest has asked. Returns the request's index.
    pub fn published(&mut self, lane: usize, op: Op, now: u32, foreign: bool) -> usize {
        let changes = match op {
            Op::Discard(range) => range.inward(self.unit),
            // All of it, or it must be refused.
            Op::Erase(range) => Some(range).filter(|&range| range.inward(self.unit) == Some(range)),
            op => op.writes(),
        };
        let entry = Entry { lane, op, published: now, epoch: None, changes, ended: None, durable: false, foreign };
        self.entries.push(entry);
        self.entries.len() - 1
    }

    /// A queue has taken the request out of its ring.
    pub fn taken(&mut self, index: usize) {
        let is_barrier = self.entries[index].op.is_barrier();
        self.entries[index].epoch = Some(2 * self.barriers + u32::from(is_barrier));
        self.barriers += u32::from(is_barrier);
    }

    /// A queue has learned that a flush failed.
    pub fn flush_failed(&mut self, now: u32) {
        self.broken.get_or_insert(now);
    }

    /// Whether a queue has learned that a flush failed.
    pub fn is_broken(&self) -> bool {
        self.broken.is_some()
    }

    /// The guest has seen an answer.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn answered(&mut self, index: usize, status: i16, now: u32, failures: u32) -> Result<(), Finding> {
        let Some(entry) = self.entries.get_mut(index) else {
            return Err(Finding::new(Class::AnsweredTwice, format!("an answer to #{}, which nobody asked", index + 1)));
        };
        let (op, okay, number) = (entry.op, status == 0, index + 1);
        if entry.ended.is_some() {
            return Err(Finding::new(Class::AnsweredTwice, format!("#{number} ({op}) was answered before")));
        }
        entry.ended = Some((now, okay));
        // Ends that would stay readable.
        let ragged = matches!(op, Op::Erase(_)) && entry.changes.is_none();
        if ragged && okay {
            return Err(Finding::new(Class::FalsePromise, format!("#{number} ({op}): OK, and its ends are left")));
        }
        if !okay && failures == 0 && !ragged {
            return Err(Finding::new(
                Class::Refused,
                format!("#{number} ({op}): status {status}, and nothing had failed"),
            ));
        }
        if !okay && matches!(op, Op::Flush | Op::Barrier) {
            return Err(Finding::new(Class::FalsePromise, format!("#{number} ({op}) was answered {status}")));
        }
        if okay && !matches!(op, Op::Read(_)) && self.broken.is_some_and(|broken| broken < now) {
            return Err(Finding::new(Class::FalsePromise, format!("#{number} ({op}): OK after a flush had failed")));
        }
        match op {
            _ if !okay => {}
            Op::Flush | Op::FlushWrite(_) => {
                let asked = self.entries[index].published;
                for entry in &mut self.entries {
                    entry.durable |= entry.ended.is_some_and(|(ended, okay)| okay && ended < asked);
                }
            }
            Op::Barrier | Op::BarrierWrite(_) => {
                let barrier = self.entries[index].clone();
                for (other, entry) in self.entries.iter_mut().enumerate() {
                    if entry.is_barred_from(&barrier) {
                        if entry.ended.is_none() {
                            let text = format!("barrier #{number} was answered before #{} ({})", other + 1, entry.op);
                            return Err(Finding::new(Class::Reordered, text));
                        }
                        entry.durable |= entry.is_okay();
                    }
                }
                self.entries[index].durable = true;
            }
            Op::Erase(_) => {
                // It ends with a flush, which began after it was asked for.
                let asked = self.entries[index].published;
                for entry in &mut self.entries {
                    entry.durable |= entry.ended.is_some_and(|(ended, okay)| okay && ended < asked);
                }
                self.entries[index].durable = true;
            }
            Op::Read(_) | Op::Write(_) | Op::Discard(_) => {}
        }
        Ok(())
    }

    /// The request that a content comes from; none for what stood there first.
    fn origin(&self, sector: u64, stamp: Stamp) -> Result<Option<usize>, Class> {
        if stamp.lba != sector {
            return Err(Class::Misdirected);
        }
        if stamp.writer == 0 && stamp.generation == 0 {
            return Ok(None);
        }
        let index = (stamp.generation as usize).wrapping_sub(1);
        match self.entries.get(index) {
            Some(entry) if !entry.foreign && self.stamp(index, entry.lane, sector, false) == stamp => {
                // The guest stamps only what it writes.
                if entry.changes(sector) { Ok(Some(index)) } else { Err(Class::Misdirected) }
            }
            _ => Err(Class::Foreign),
        }
    }

    /// A promised change of the sector that comes after the one it has (none: what stood there first).
    fn superseded(&self, sector: u64, by: Option<usize>, promised: impl Fn(&Entry) -> bool) -> Option<usize> {
        self.entries.iter().enumerate().position(|(index, later)| {
            later.changes(sector)
                && !later.foreign
                && Some(index) != by
                && promised(later)
                && by.is_none_or(|by| self.entries[by].is_before(later))
        })
    }

    /// What is wrong with a sector's content, if what is promised must be there; `old` if it is too old.
    fn judge(
        &self,
        sector: u64,
        content: Content,
        old: Class,
        promised: impl Fn(&Entry) -> bool,
    ) -> Result<(), Finding> {
        let superseded = match content {
            Content::Torn => return Err(Finding::new(Class::Torn, format!("sector {sector} holds {content}"))),
            Content::Stamp(stamp) => match self.origin(sector, stamp) {
                Ok(by) => self.superseded(sector, by, promised),
                Err(class) => return Err(Finding::new(class, format!("sector {sector} holds {content}"))),
            },
            Content::Zeros => {
                let mut superseded = None;
                let mut discards = self.discards(sector).peekable();
                if discards.peek().is_none() {
                    let text = format!("sector {sector} holds zeros, and nobody gave it up");
                    return Err(Finding::new(Class::Misdirected, text));
                }
                // Zeros do not say whose they are: the latest will do.
                for discard in discards {
                    superseded = self.superseded(sector, Some(discard), &promised);
                    if superseded.is_none() {
                        break;
                    }
                }
                superseded
            }
        };
        match superseded {
            Some(by) => {
                let later = self.entries[by].op;
                Err(Finding::new(old, format!("sector {sector} holds {content}, older than #{} ({later})", by + 1)))
            }
            None => Ok(()),
        }
    }

    fn discards(&self, sector: u64) -> impl Iterator<Item = usize> + '_ {
        let discard = move |(index, entry): (usize, &Entry)| {
            (matches!(entry.op, Op::Discard(_) | Op::Erase(_)) && entry.changes(sector)).then_some(index)
        };
        self.entries.iter().enumerate().filter_map(discard)
    }

    /// Looks at everything the disk may hold after a crash now. That is every image that a crash can leave: what one
    /// sector holds does not depend on what another one does.
    ///
    /// # Errors
    /// What is wrong with one of them.
    pub fn crash(&self, bench: &Bench, crash: Crash) -> Result<(), Finding> {
        let concerned = bench.concerned();
        let left = |sector| {
            let (survivors, seen) = match crash {
                Crash::Power => (Some(bench.disk.survivors(sector)), None),
                Crash::Kill => (None, Some(bench.disk.seen(sector))),
            };
            let versions = survivors.into_iter().flatten().chain(seen).chain(bench.in_flight(sector));
            versions.map(|version| bench.disk.content(version))
        };
        let mut reached = 0;
        for sector in sectors(concerned) {
            for content in left(sector) {
                match crash {
                    Crash::Power => self.judge(sector, content, Class::LostFlushed, |entry| entry.durable)?,
                    Crash::Kill => self.judge(sector, content, Class::LostAcknowledged, Entry::is_okay)?,
                }
                if self.barriers > 0 {
                    reached = reached.max(self.epoch(sector, content));
                }
            }
        }
        // If anything from behind a barrier may be there, everything before that barrier must be.
        if crash == Crash::Power && reached > 0 {
            let before = |entry: &Entry| entry.epoch.is_some_and(|epoch| epoch < reached) && !entry.failed();
            for sector in sectors(concerned) {
                for content in left(sector) {
                    self.judge(sector, content, Class::Reordered, before)?;
                }
            }
        }
        Ok(())
    }

    /// Behind which barrier a content comes from, at least.
    fn epoch(&self, sector: u64, content: Content) -> u32 {
        let of = |index: usize| self.entries[index].epoch.unwrap_or(0);
        match content {
            Content::Stamp(stamp) => self.origin(sector, stamp).ok().flatten().map_or(0, of),
            Content::Zeros => self.discards(sector).map(of).min().unwrap_or(0),
            Content::Torn => 0,
        }
    }

    /// Looks at what a read, answered OK, has brought.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(&self, index: usize, mut content: impl FnMut(u64) -> Content) -> Result<(), Finding> {
        let read = &self.entries[index];
        let Some(range) = read.op.range() else { return Ok(()) };
        for sector in range.first..range.first + range.count {
            let content = content(sector);
            // What was withheld may never have been done.
            let done = |entry: &Entry| entry.is_okay() || (!entry.is_answered() && self.broken.is_none());
            let promised = |entry: &Entry| {
                entry.ended.is_some_and(|(ended, okay)| okay && ended < read.published)
                    || (entry.is_barred_from(read) && done(entry))
            };
            let judged = self.judge(sector, content, Class::Stale, promised);
            judged.map_err(|found| Finding::new(found.class, format!("read #{}: {}", index + 1, found.text)))?;
            if read.epoch.is_some_and(|epoch| self.epoch(sector, content) > epoch) {
                let text = format!("read #{} saw {content} in sector {sector}, from behind a barrier", index + 1);
                return Err(Finding::new(Class::Reordered, text));
            }
        }
        Ok(())
    }
}

fn sectors(mask: u64) -> impl Iterator<Item = u64> {
    (0..64).filter(move |sector| mask & (1 << sector) != 0)
}
