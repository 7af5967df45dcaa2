//! Every failure at every place of every request: on the simulated disk in many orders, and on a file whose kernel
//! says it.

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use blkback::erase::Erase;
use blkback::queue::Broken;
use blkback::storage::{Sleep, UringStorage};
use hypervisor::emu::{GuestOptions, Limits, Machine, Member};
use hypervisor::{Backend, DomId};
use rustix::event::{EventfdFlags, eventfd};

use super::bench::{Aim, What};
use super::checker::{Checker, Class, Finding};
use super::disk::SECTORS;
use super::fuse::{Failure, Mounted};
use super::lane::{Lane, Pages, Together};
use super::plan::{Op, Plan, Range};
use super::random::Random;
use super::stamp::{Bytes, Content, SECTOR};
use super::world::World;

/// What is asked, and in which of its steps it fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// In words.
    pub name: &'static str,
    /// The request.
    pub op: Op,
    /// The disk's operation that fails.
    pub what: What,
    /// How many of the kind the request does before that.
    pub after: u32,
}

const PLACE: Range = Range { first: 20, count: 8 };

const fn row(name: &'static str, op: Op, what: What, after: u32) -> Row {
    Row { name, op, what, after }
}

/// All rows.
pub const ROWS: [Row; 13] = [
    row("read", Op::Read(PLACE), What::Read, 0),
    row("write", Op::Write(PLACE), What::Write, 0),
    row("discard", Op::Discard(PLACE), What::Discard, 0),
    row("secure discard: erase", Op::Erase(PLACE), What::Erase, 0),
    row("secure discard: zeros", Op::Erase(PLACE), What::Discard, 0),
    row("secure discard: flush", Op::Erase(PLACE), What::Flush, 0),
    row("flush", Op::Flush, What::Flush, 0),
    row("flush with data: flush", Op::FlushWrite(PLACE), What::Flush, 0),
    row("flush with data: write", Op::FlushWrite(PLACE), What::Write, 0),
    row("barrier: first flush", Op::BarrierWrite(PLACE), What::Flush, 0),
    row("barrier: write", Op::BarrierWrite(PLACE), What::Write, 0),
    row("barrier: last flush", Op::BarrierWrite(PLACE), What::Flush, 1),
    row("barrier without data", Op::Barrier, What::Flush, 0),
];

/// All columns: an errno, or none for a short transfer.
pub const FAILURES: [(&str, Option<i32>); 6] = [
    ("EIO", Some(libc::EIO)),
    ("ENOSPC", Some(libc::ENOSPC)),
    ("ESTALE", Some(libc::ESTALE)),
    ("EAGAIN", Some(libc::EAGAIN)),
    ("EINTR", Some(libc::EINTR)),
    ("short", None),
];

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Done after all.
    Okay,
    /// Done, after it had waited for room.
    Held,
    /// BLKIF_RSP_ERROR.
    Error,
    /// No answer; nor will any write or flush get one again.
    Withheld,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Okay => "OK",
            Self::Held => "held, OK",
            Self::Error => "-1",
            Self::Withheld => "withheld",
        })
    }
}

/// What must become of it; none where there is no such failure.
pub fn expected(row: &Row, errno: Option<i32>) -> Option<Verdict> {
    match (row.what, errno) {
        (What::Flush | What::Discard | What::Erase, None) => None,
        (_, None | Some(libc::EAGAIN | libc::EINTR)) => Some(Verdict::Okay),
        (What::Flush, _) => Some(Verdict::Withheld),
        (What::Write, Some(libc::ENOSPC)) => Some(Verdict::Held),
        _ => Some(Verdict::Error),
    }
}

/// What the guest does around it: writes before and after, a flush, and a read of everything.
fn requests(row: &Row) -> Vec<Op> {
    let range = |first, count| Range { first, count };
    vec![Op::Write(range(16, 4)), row.op, Op::Write(range(28, 4)), Op::Flush, Op::Read(range(16, 16))]
}

fn verdict(status: Option<i16>, held: bool) -> Verdict {
    match status {
        Some(0) if held => Verdict::Held,
        Some(0) => Verdict::Okay,
        Some(_) => Verdict::Error,
        None => Verdict::Withheld,
    }
}

/// Counts those of a kind that the write before the request does.
fn before(row: &Row) -> u32 {
    row.after + u32::from(row.what == What::Write)
}

/// Plays a cell on the simulated disk, `orders` times with a guest that waits for its answers and as often with one
/// that does not. The verdict is that of the patient one.
///
/// # Errors
/// What is wrong.
pub fn simulated(row: &Row, errno: Option<i32>, orders: u64) -> Result<Verdict, Finding> {
    let mut world = World::new(2, false, 1, None);
    let mut first = None;
    for seed in 0..2 * orders {
        let mut dice = Random::new(seed);
        let patient = seed % 2 == 0;
        let ops = requests(row).into_iter().map(|op| (dice.below(2) as usize, op)).collect();
        let plan = Plan { patient, ..Plan::of(2, ops) };
        let aim = Aim { what: row.what, after: before(row), errno };
        let outcome = world.play(&plan, &mut dice.clone(), dice, Some(aim), false);
        if let Some(finding) = outcome.finding {
            return Err(finding);
        }
        if patient {
            let now = verdict(outcome.statuses[1], outcome.retries > 0);
            if *first.get_or_insert(now) != now {
                return Err(Finding::new(Class::Refused, format!("once {now}, once {first:?}")));
            }
            rest(now, &outcome.statuses)?;
        }
    }
    first.ok_or_else(|| Finding::new(Class::Unanswered, "nothing was played"))
}

/// The write, the flush and the read after it.
fn rest(verdict: Verdict, statuses: &[Option<i16>]) -> Result<(), Finding> {
    let expected = if verdict == Verdict::Withheld { [None, None, Some(0)] } else { [Some(0); 3] };
    // A queue whose flush failed takes nothing any more, not even reads.
    if statuses[2..] == expected || (verdict == Verdict::Withheld && statuses[2..] == [None; 3]) {
        return Ok(());
    }
    Err(Finding::new(Class::FalsePromise, format!("{verdict}, and then {:?}", &statuses[2..])))
}

/// Plays cells on a real file.
#[derive(Debug)]
pub struct Real {
    pages: Pages,
    lane: Lane<UringStorage>,
    mounted: Mounted,
    checker: Checker,
    // Dropped last.
    _guest: hypervisor::emu::GuestSeat,
    _machine: Machine,
}

impl Real {
    /// Mounts a file, and connects a guest to it.
    ///
    /// # Errors
    /// When this process may not mount, or has no io_uring.
    pub fn new() -> io::Result<Self> {
        let mounted = Mounted::new(SECTORS as usize * SECTOR)?;
        let other = |error: hypervisor::Error| io::Error::other(error.to_string());
        let machine = Machine::new(Limits::default()).map_err(other)?;
        let xen: Arc<dyn Backend> = Arc::new(Member::local(&machine, DomId::DOM0).map_err(other)?);
        let options = GuestOptions { name: "matrix".into(), ..GuestOptions::default() };
        let guest = machine.create_guest(options).map_err(other)?;
        let pages = Pages::new(&guest);
        let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
        let erase: Arc<dyn Erase> = mounted.medium.clone();
        let storage = UringStorage::with_eraser(mounted.file.as_fd(), &[wake.as_fd()], 32, Some(erase))?;
        let lane = Lane::new((&xen, &guest), &pages, &Together::default(), false, (storage, wake));
        Ok(Self { pages, lane, mounted, checker: Checker::default(), _guest: guest, _machine: machine })
    }

    /// Plays a cell.
    ///
    /// # Errors
    /// What is wrong.
    pub fn play(&mut self, row: &Row, errno: Option<i32>) -> Result<Verdict, Finding> {
        self.checker.reset(1, 1);
        self.mounted.medium().failure = Some(Failure { what: row.what, after: before(row), errno, times: 1 });
        let (mut statuses, mut held) = (Vec::new(), false);
        for (nth, op) in requests(row).into_iter().enumerate() {
            let (status, waited) = self.ask(nth, op).map_err(|text| Finding::new(Class::Unanswered, text))?;
            statuses.push(status);
            held |= waited;
        }
        let medium = self.mounted.medium();
        if medium.failure.is_some() {
            return Err(Finding::new(Class::Refused, "the failure never came"));
        }
        if medium.flushes_after_failure > 0 {
            return Err(Finding::new(Class::FalsePromise, "it was flushed again after a flush had failed"));
        }
        let flushed = statuses[3] == Some(0);
        for (nth, op) in requests(row).into_iter().enumerate() {
            let Some(Range { first, count }) = op.changes().filter(|_| statuses[nth] == Some(0)) else { continue };
            for sector in first..first + count {
                let place = sector as usize * SECTOR..(sector as usize + 1) * SECTOR;
                let wanted = match op {
                    Op::Discard(_) | Op::Erase(_) => Content::Zeros,
                    _ => Content::Stamp(self.checker.stamp(nth, 0, sector, false)),
                };
                let holds =
                    |bytes: &[u8]| bytes[place.clone()].first_chunk::<SECTOR>().map(Content::of) == Some(wanted);
                if !holds(&medium.seen) {
                    return Err(Finding::new(Class::LostAcknowledged, format!("{op}: sector {sector}")));
                }
                if flushed && !holds(&medium.flushed) {
                    return Err(Finding::new(Class::LostFlushed, format!("{op}: sector {sector}")));
                }
            }
        }
        if statuses[4] == Some(0) {
            for nth in 0..16 {
                let at = (16 + nth as usize) * SECTOR;
                let on_disk = medium.seen[at..].first_chunk::<SECTOR>().map(Content::of);
                if on_disk != Some(Lane::<UringStorage>::was_read(&self.pages, 4, nth)) {
                    return Err(Finding::new(Class::Stale, format!("sector {}", 16 + nth)));
                }
            }
        }
        let verdict = verdict(statuses[1], held);
        rest(verdict, &statuses)?;
        Ok(verdict)
    }

    /// One request: its status, and whether it had to wait for room.
    fn ask(&mut self, nth: usize, op: Op) -> Result<(Option<i16>, bool), String> {
        let checker = &self.checker;
        let stamp = |sector: u64, bytes: &mut Bytes| checker.stamp(nth, 0, sector, false).fill(bytes);
        self.lane.ask(&self.pages, (nth, nth as u64), op, stamp);
        let (mut held, mut idle) = (false, 0);
        loop {
            let lane = &mut self.lane;
            let outcome = if lane.broken { lane.back.drain() } else { lane.back.turn() };
            match outcome {
                Ok(_) => {}
                Err(Broken::Flush(_)) => lane.broken = true,
                Err(error) => return Err(error.to_string()),
            }
            if let Some((id, status)) = lane.answer().map_err(|error| error.to_string())? {
                if id != nth as u64 {
                    return Err(format!("request {id} was answered instead of {nth}"));
                }
                return Ok((Some(status), held));
            }
            if lane.back.held() > 0 {
                held = true;
                lane.back.retry_held();
                continue;
            }
            if lane.back.in_flight() == 0 {
                // Withheld; or, where the queue is broken, not even taken.
                idle += 1;
                if idle > 2 {
                    return Ok((None, held));
                }
            }
            let millis = if lane.back.in_flight() == 0 { 1 } else { 50 };
            let waited = lane.back.storage().wait(Some(Duration::from_millis(millis)));
            waited.map_err(|error| error.to_string())?;
        }
    }
}
