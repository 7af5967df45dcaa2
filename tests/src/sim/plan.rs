//! What a guest does in one history.

use super::bench::Faults;
use super::disk::SECTORS;
use super::random::Random;

/// A request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// READ.
    Read(Range),
    /// WRITE.
    Write(Range),
    /// FLUSH_DISKCACHE without data.
    Flush,
    /// FLUSH_DISKCACHE with data.
    FlushWrite(Range),
    /// WRITE_BARRIER without data.
    Barrier,
    /// WRITE_BARRIER with data.
    BarrierWrite(Range),
    /// DISCARD.
    Discard(Range),
    /// DISCARD with BLKIF_DISCARD_SECURE.
    Erase(Range),
}

/// Sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The first.
    pub first: u64,
    /// How many, not 0.
    pub count: u64,
}

impl Range {
    /// Whether a sector is in it.
    pub fn has(self, sector: u64) -> bool {
        (self.first..self.first + self.count).contains(&sector)
    }

    /// The whole units of so many sectors in it, if there is one.
    pub fn inward(self, unit: u64) -> Option<Self> {
        let first = self.first.next_multiple_of(unit);
        let end = (self.first + self.count) / unit * unit;
        (end > first).then(|| Self { first, count: end - first })
    }
}

impl Op {
    /// The sectors it reads or changes.
    pub fn range(self) -> Option<Range> {
        match self {
            Self::Read(range)
            | Self::Write(range)
            | Self::FlushWrite(range)
            | Self::BarrierWrite(range)
            | Self::Discard(range)
            | Self::Erase(range) => Some(range),
            Self::Flush | Self::Barrier => None,
        }
    }

    /// The sectors it writes.
    pub fn writes(self) -> Option<Range> {
        match self {
            Self::Write(range) | Self::FlushWrite(range) | Self::BarrierWrite(range) => Some(range),
            _ => None,
        }
    }

    /// The sectors it writes or gives up.
    pub fn changes(self) -> Option<Range> {
        if let Self::Discard(range) | Self::Erase(range) = self { Some(range) } else { self.writes() }
    }

    /// Whether it is a barrier.
    pub fn is_barrier(self) -> bool {
        matches!(self, Self::Barrier | Self::BarrierWrite(_))
    }
}

impl std::fmt::Display for Op {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = match self {
            Self::Read(_) => "read",
            Self::Write(_) => "write",
            Self::Flush => "flush",
            Self::FlushWrite(_) => "flush with data",
            Self::Barrier => "barrier",
            Self::BarrierWrite(_) => "barrier with data",
            Self::Discard(_) => "discard",
            Self::Erase(_) => "secure discard",
        };
        match self.range() {
            Some(Range { first, count }) => write!(f, "{name} {first}+{count}"),
            None => f.write_str(name),
        }
    }
}

/// In which order things tend to happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Manner {
    /// Any.
    #[default]
    Any,
    /// The guest fills its rings first.
    Deep,
    /// What began last ends first.
    Backwards,
    /// Flushes take long.
    SlowFlushes,
    /// The first queue's thread is seldom scheduled.
    Starved,
}

/// One history's requests and circumstances.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Queues of the disk: 1 to 3.
    pub lanes: usize,
    /// Whether the guest's pages are kept mapped, or copied.
    pub persistent: bool,
    /// The disk's own sectors, in sectors of 512 bytes: 1, or 8 for a disk that is read and written in 4096 bytes.
    pub unit: u64,
    /// Requests in the order the guest makes them, each with its queue.
    pub ops: Vec<(usize, Op)>,
    /// What goes wrong.
    pub faults: Faults,
    /// Order.
    pub manner: Manner,
    /// Queues run on by themselves until they sleep, so that only requests and completions are choices.
    pub eager: bool,
    /// The guest asks only when it has all answers that it can get.
    pub patient: bool,
    /// Writes that find no room wait for it.
    pub hold: bool,
    /// The guest dies, and its queues are dropped, at this event.
    pub cut: Option<u32>,
    /// The last queue is another guest's, which writes to the same disk.
    pub intruder: bool,
}

impl std::fmt::Display for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { lanes, persistent, unit, ops, faults, manner, eager, hold, cut, intruder, .. } = self;
        let pages = if *persistent { "mapped" } else { "copied" };
        write!(
            f,
            "{lanes} queues, pages {pages}, unit {unit}, order {manner:?}, eager {eager}, hold {hold}, cut {cut:?}"
        )?;
        write!(f, ", two guests {intruder}, {faults:?}:")?;
        ops.iter().try_for_each(|(lane, op)| write!(f, " [{lane}] {op};"))
    }
}

/// Longest random history.
pub const LONGEST: usize = 24;

/// The two places that the enumerated operations are about; they overlap.
const A: Range = Range { first: 8, count: 8 };
const B: Range = Range { first: 12, count: 8 };

/// The operations that are enumerated.
pub const ALPHABET: [Op; 8] = [
    Op::Write(A),
    Op::Write(B),
    Op::Flush,
    Op::FlushWrite(B),
    Op::BarrierWrite(A),
    Op::Barrier,
    Op::Discard(Range { first: 10, count: 8 }),
    Op::Read(Range { first: 8, count: 12 }),
];

impl Plan {
    /// These requests, nothing going wrong.
    pub fn of(lanes: usize, ops: Vec<(usize, Op)>) -> Self {
        Self {
            lanes,
            persistent: false,
            unit: 1,
            ops,
            faults: Faults::default(),
            manner: Manner::Any,
            eager: false,
            patient: false,
            hold: true,
            cut: None,
            intruder: false,
        }
    }

    /// A history of a seed.
    pub fn random(dice: &mut Random) -> Self {
        let lanes = 1 + dice.below(3) as usize;
        // Short ones often: they are cheap, and most bugs need little.
        let longest = if dice.once_in(4) { LONGEST as u64 } else { 8 };
        let count = 1 + dice.below(longest);
        // Few places, so that operations meet.
        let width = [8, 16, SECTORS][dice.below(3) as usize];
        let base = dice.below(SECTORS - width + 1);
        let barriers = dice.once_in(2);
        let ops = (0..count)
            .map(|_| {
                let first = base + dice.below(width);
                let most = (base + width - first).min(if dice.once_in(4) { 16 } else { 4 });
                let range = Range { first, count: 1 + dice.below(most) };
                let op = match dice.below(16) {
                    0..=5 => Op::Write(range),
                    6..=8 => Op::Flush,
                    9 => Op::FlushWrite(range),
                    10 if barriers => Op::Barrier,
                    11 if barriers => Op::BarrierWrite(range),
                    12 => Op::Discard(range),
                    13 => Op::Erase(range),
                    10 | 11 => Op::Write(range),
                    _ => Op::Read(range),
                };
                (dice.below(lanes as u64) as usize, op)
            })
            .collect();
        let faults = Faults {
            error: if dice.once_in(4) { 6 } else { 0 },
            flush: if dice.once_in(8) { 2 } else { 0 },
            short: if dice.once_in(4) { 3 } else { 0 },
        };
        let manners = [Manner::Any, Manner::Deep, Manner::Backwards, Manner::SlowFlushes, Manner::Starved];
        Self {
            lanes,
            persistent: dice.once_in(2),
            unit: if dice.once_in(4) { 8 } else { 1 },
            ops,
            faults,
            manner: manners[dice.below(5) as usize],
            eager: dice.once_in(4),
            patient: false,
            hold: dice.once_in(2),
            cut: dice.once_in(256).then(|| 1 + dice.below(40) as u32),
            intruder: false,
        }
    }
}
