//! A disk of 512-byte sectors on storage whose sectors are larger.
//!
//! Direct I/O wants offsets and lengths in the storage's own units, 4096 bytes on a "4Kn" disk. What a guest asks for in
//! smaller ones goes through memory of ours: a read takes the units around it, a write reads them, changes them and
//! writes them back. Between its read and its write nothing else may be written there, by any queue of the disk, or it
//! would be undone: so every write holds its units while it lasts.

mod buffers;

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hypervisor::memory::{IoList, Mapping};

use crate::storage::{Done, Storage};

use buffers::Buffers;

/// Which units of a disk are being written, shared by its queues.
#[derive(Debug, Default)]
pub struct Units {
    inner: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    ranges: Vec<Range<u64>>,
    /// Queues that wait for one of them: eventfds that end their sleep.
    waiting: Vec<Arc<OwnedFd>>,
}

impl Units {
    fn lock(&self) -> MutexGuard<'_, Held> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the bytes of `range`, or has `wake` written to when some are given back.
    fn take(&self, range: &Range<u64>, wake: &Arc<OwnedFd>) -> bool {
        let mut held = self.lock();
        if held.ranges.iter().any(|other| other.start < range.end && range.start < other.end) {
            if !held.waiting.iter().any(|waiting| Arc::ptr_eq(waiting, wake)) {
                held.waiting.push(Arc::clone(wake));
            }
            return false;
        }
        held.ranges.push(range.clone());
        true
    }

    fn give_back(&self, range: &Range<u64>) {
        let mut held = self.lock();
        if let Some(at) = held.ranges.iter().position(|other| other == range) {
            held.ranges.swap_remove(at);
        }
        for wake in held.waiting.drain(..) {
            if let Err(error) = rustix::io::write(&*wake, &1u64.to_ne_bytes()) {
                tracing::error!(%error, "cannot wake a queue that waits to write");
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Filling the buffer for a read.
    Read,
    /// Filling the buffer with what is around a write.
    Before,
    /// Writing, from the buffer or from the guest's own pages.
    Write,
    Discard,
    Erase,
}

/// An operation under way that is not simply passed on.
#[derive(Debug)]
struct Op {
    token: u32,
    stage: Stage,
    offset: u64,
    memory: IoList,
    /// Whole units around it.
    units: Range<u64>,
    buffer: Option<Rc<Mapping>>,
}

/// Storage in units larger than sectors.
#[derive(Debug)]
pub struct Bounced<S> {
    inner: S,
    /// Bytes; 512 where nothing has to be done.
    unit: u64,
    units: Arc<Units>,
    wake: Arc<OwnedFd>,
    ops: Vec<Option<Op>>,
    /// Writes and discards that wait for their units, in the order they came.
    blocked: VecDeque<Op>,
    /// Operations that wait for memory, in the order they came.
    starved: VecDeque<Op>,
    ready: VecDeque<Done>,
    buffers: Buffers,
}

/// Tokens of ours count up from here; the queue's are smaller, and the inner storage's own are larger.
const OURS: u32 = 1 << 20;

impl<S: Storage> Bounced<S> {
    /// Storage in units of `unit` bytes, a power of two and at least 512, under requests of at most `largest` bytes.
    /// `wake` ends the sleep of the queue's thread.
    pub fn new(inner: S, unit: u32, largest: usize, units: Arc<Units>, wake: Arc<OwnedFd>) -> Self {
        Self {
            inner,
            unit: unit.into(),
            units,
            wake,
            ops: Vec::new(),
            blocked: VecDeque::new(),
            starved: VecDeque::new(),
            ready: VecDeque::new(),
            // The largest request, and a unit more at each end.
            buffers: Buffers::new(largest + 2 * unit as usize),
        }
    }

    /// What is underneath, for who drives the queue.
    pub fn inner(&mut self) -> &mut S {
        &mut self.inner
    }

    fn is_plain(&self) -> bool {
        self.unit == 512
    }

    /// Whole units around some bytes.
    fn around(&self, offset: u64, len: u64) -> Range<u64> {
        offset / self.unit * self.unit..(offset + len).next_multiple_of(self.unit)
    }

    /// Bytes of memory of ours that an operation goes through; none where the guest's pages can be used themselves.
    fn detour(&self, op: &Op) -> Option<usize> {
        let fits = op.units == (op.offset..op.offset + op.memory.len() as u64);
        let direct =
            matches!(op.stage, Stage::Discard | Stage::Erase) || fits && op.memory.is_multiple_of(self.unit as usize);
        (!direct).then(|| (op.units.end - op.units.start) as usize)
    }

    /// Begins an operation, when there is memory for it.
    fn begin(&mut self, op: Op) {
        let waits = |len| !self.starved.is_empty() || !self.buffers.has_room(len);
        if self.detour(&op).is_some_and(waits) {
            self.starved.push_back(op);
        } else {
            self.begin_now(op);
        }
    }

    /// Begins what waits for memory, as far as there is some.
    fn feed(&mut self) {
        while let Some(op) = self.starved.pop_front() {
            if self.detour(&op).is_some_and(|len| !self.buffers.has_room(len)) {
                return self.starved.push_front(op);
            }
            self.begin_now(op);
        }
    }

    /// Gives an operation a number, and passes what is to be done first to the storage.
    fn begin_now(&mut self, mut op: Op) {
        let fits = op.units == (op.offset..op.offset + op.memory.len() as u64);
        if let Some(len) = self.detour(&op) {
            match self.buffers.take(len) {
                Ok(buffer) => op.buffer = Some(buffer),
                Err(error) => return self.end(op, Err(error)),
            }
        }
        if op.stage == Stage::Before && fits {
            if let Some(buffer) = &op.buffer {
                op.memory.copy_to(buffer, 0);
            }
            op.stage = Stage::Write;
        }
        let free = self.ops.iter().position(Option::is_none).unwrap_or_else(|| {
            self.ops.push(None);
            self.ops.len() - 1
        });
        let (offset, len) = (op.units.start, op.units.end - op.units.start);
        let token = OURS + free as u32;
        match op.stage {
            Stage::Read | Stage::Before => self.inner.read(offset, list(&op), token),
            Stage::Write => {
                let memory = if op.buffer.is_some() { list(&op) } else { std::mem::take(&mut op.memory) };
                self.inner.write(offset, memory, token);
            }
            Stage::Discard => self.inner.discard(offset, len, token),
            Stage::Erase => self.inner.erase(offset, len, token),
        }
        self.ops[free] = Some(op);
    }

    /// Starts a write or discard if nobody writes there.
    fn begin_or_wait(&mut self, op: Op) {
        // One that waits must not be overtaken by one that overlaps it, or the guest's last write could lose.
        let overtakes =
            self.blocked.iter().any(|other| other.units.start < op.units.end && op.units.start < other.units.end);
        if overtakes || !self.units.take(&op.units, &self.wake) {
            self.blocked.push_back(op);
        } else {
            self.begin(op);
        }
    }

    fn retry_blocked(&mut self) {
        // Each is compared with those before it that go on waiting, not with those behind it.
        for op in std::mem::take(&mut self.blocked) {
            self.begin_or_wait(op);
        }
    }

    /// The operation is over.
    fn end(&mut self, op: Op, result: io::Result<()>) {
        if op.stage != Stage::Read {
            self.units.give_back(&op.units);
        }
        if let Some(buffer) = op.buffer {
            self.buffers.give_back(buffer);
        }
        self.ready.push_back(Done { token: op.token, memory: op.memory, result });
    }

    /// One of ours has done what it was doing.
    fn advance(&mut self, mut op: Op, token: u32, memory: IoList, result: io::Result<()>) {
        if op.stage == Stage::Write && op.buffer.is_none() {
            // The guest's own pages, or what is left of them after an error.
            op.memory = memory;
        }
        if result.is_err() {
            return self.end(op, result);
        }
        let inside = (op.offset - op.units.start.min(op.offset)) as usize;
        match (op.stage, op.buffer.as_deref()) {
            (Stage::Read, Some(buffer)) => op.memory.fill_from(buffer, inside),
            (Stage::Before, Some(buffer)) => {
                op.memory.copy_to(buffer, inside);
                op.stage = Stage::Write;
                self.inner.write(op.units.start, list(&op), token);
                self.ops[(token - OURS) as usize] = Some(op);
                return;
            }
            _ => {}
        }
        self.end(op, Ok(()));
    }
}

/// The units of an operation, in its buffer.
fn list(op: &Op) -> IoList {
    let mut memory = IoList::with_capacity(1);
    if let Some(buffer) = &op.buffer {
        memory.push(buffer, 0, (op.units.end - op.units.start) as usize);
    }
    memory
}

impl<S: Storage> Storage for Bounced<S> {
    #[inline]
    fn read(&mut self, offset: u64, memory: IoList, token: u32) {
        if self.is_plain() {
            return self.inner.read(offset, memory, token);
        }
        let units = self.around(offset, memory.len() as u64);
        if units == (offset..offset + memory.len() as u64) && memory.is_multiple_of(self.unit as usize) {
            return self.inner.read(offset, memory, token);
        }
        self.begin(Op { token, stage: Stage::Read, offset, memory, units, buffer: None });
    }

    #[inline]
    fn write(&mut self, offset: u64, memory: IoList, token: u32) {
        if self.is_plain() {
            return self.inner.write(offset, memory, token);
        }
        let units = self.around(offset, memory.len() as u64);
        self.begin_or_wait(Op { token, stage: Stage::Before, offset, memory, units, buffer: None });
    }

    fn flush(&mut self, token: u32) {
        self.inner.flush(token);
    }

    /// Gives up the whole units inside the range: what is around them is not the guest's to lose.
    fn discard(&mut self, offset: u64, len: u64, token: u32) {
        if self.is_plain() {
            return self.inner.discard(offset, len, token);
        }
        let units = offset.next_multiple_of(self.unit)..(offset + len) / self.unit * self.unit;
        if units.is_empty() {
            self.ready.push_back(Done { token, memory: IoList::default(), result: Ok(()) });
            return;
        }
        self.begin_or_wait(Op { token, stage: Stage::Discard, offset, memory: IoList::default(), units, buffer: None });
    }

    /// Erases whole units only. Of a range that ends inside one, that end would stay as it is: it is refused.
    fn erase(&mut self, offset: u64, len: u64, token: u32) {
        if self.is_plain() {
            return self.inner.erase(offset, len, token);
        }
        let (units, memory) = (self.around(offset, len), IoList::default());
        if units != (offset..offset + len) {
            let result = Err(io::ErrorKind::InvalidInput.into());
            return self.ready.push_back(Done { token, memory, result });
        }
        self.begin_or_wait(Op { token, stage: Stage::Erase, offset, memory, units, buffer: None });
    }

    #[inline]
    fn submit(&mut self) -> io::Result<()> {
        if !self.blocked.is_empty() {
            self.retry_blocked();
        }
        self.inner.submit()
    }

    #[inline]
    fn next(&mut self) -> Option<Done> {
        loop {
            if let Some(done) = self.ready.pop_front() {
                return Some(done);
            }
            let done = self.inner.next()?;
            if done.token < OURS {
                return Some(done);
            }
            let Some(op) = self.ops[(done.token - OURS) as usize].take() else { continue };
            self.advance(op, done.token, done.memory, done.result);
            self.feed();
        }
    }

    #[inline]
    fn has_completions(&mut self) -> bool {
        !self.ready.is_empty() || self.inner.has_completions()
    }

    fn give_up(&mut self) {
        self.inner.give_up();
    }
}

impl<S> Drop for Bounced<S> {
    /// A queue that goes with writes in flight must not hold up the others for ever.
    fn drop(&mut self) {
        for op in self.ops.drain(..).flatten().chain(self.starved.drain(..)).filter(|op| op.stage != Stage::Read) {
            self.units.give_back(&op.units);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use proptest::prelude::*;
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    const UNIT: u64 = 4096;
    const SECTORS: u64 = 64;

    /// Storage that refuses what is not whole units, and does nothing until it is told to.
    #[derive(Debug, Default, Clone)]
    struct Large(Rc<RefCell<Inside>>);

    #[derive(Debug, Default)]
    struct Inside {
        bytes: Vec<u8>,
        asked: Vec<(u64, IoList, u32, Option<u64>, bool)>,
        done: VecDeque<Done>,
    }

    impl Large {
        fn ask(&self, offset: u64, memory: IoList, token: u32, discard: Option<u64>, write: bool) {
            let len = discard.unwrap_or(memory.len() as u64);
            assert!(offset.is_multiple_of(UNIT) && len.is_multiple_of(UNIT) && memory.is_multiple_of(UNIT as usize));
            self.0.borrow_mut().asked.push((offset, memory, token, discard, write));
        }

        /// Carries out one of the operations that wait.
        fn complete(&self, choice: usize) -> bool {
            let mut inside = self.0.borrow_mut();
            if inside.asked.is_empty() {
                return false;
            }
            let choice = choice % inside.asked.len();
            let (offset, mut memory, token, discard, write) = inside.asked.swap_remove(choice);
            let len = discard.map_or(memory.len(), |len| len as usize);
            let range = offset as usize..offset as usize + len;
            let through = Mapping::anonymous(len.max(1)).unwrap();
            match (discard, write) {
                (Some(_), _) => inside.bytes[range].fill(0),
                (None, true) => {
                    memory.copy_to(&through, 0);
                    through.copy_out(0, &mut inside.bytes[range]);
                }
                (None, false) => {
                    through.copy_in(0, &inside.bytes[range]);
                    memory.fill_from(&through, 0);
                }
            }
            inside.done.push_back(Done { token, memory, result: Ok(()) });
            true
        }
    }

    impl Storage for Large {
        fn read(&mut self, offset: u64, memory: IoList, token: u32) {
            self.ask(offset, memory, token, None, false);
        }
        fn write(&mut self, offset: u64, memory: IoList, token: u32) {
            self.ask(offset, memory, token, None, true);
        }
        fn flush(&mut self, token: u32) {
            self.0.borrow_mut().done.push_back(Done { token, memory: IoList::default(), result: Ok(()) });
        }
        fn discard(&mut self, offset: u64, len: u64, token: u32) {
            self.ask(offset, IoList::default(), token, Some(len), true);
        }
        fn erase(&mut self, offset: u64, len: u64, token: u32) {
            self.discard(offset, len, token);
        }
        fn submit(&mut self) -> io::Result<()> {
            Ok(())
        }
        fn next(&mut self) -> Option<Done> {
            self.0.borrow_mut().done.pop_front()
        }
        fn has_completions(&mut self) -> bool {
            !self.0.borrow().done.is_empty()
        }
    }

    /// As many requests as a ring has, of the largest size: they take turns, and afterwards the memory is given back.
    #[test]
    fn a_ring_full_of_large_requests_takes_little_memory() {
        let disk = Large::default();
        disk.0.borrow_mut().bytes = vec![7; (1 << 20) + 8192];
        let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        let mut queue = Bounced::new(disk.clone(), UNIT as u32, 1 << 20, Arc::default(), wake);
        let memory = Rc::new(Mapping::anonymous(1 << 20).unwrap());
        for token in 0..512 {
            let mut list = IoList::default();
            list.push(&memory, 0, 1 << 20);
            queue.read(512, list, token);
        }
        let mut ended = std::collections::HashSet::new();
        while ended.len() < 512 {
            assert!((1..=8).contains(&disk.0.borrow().asked.len()) && queue.buffers.bytes() <= 8 << 20);
            disk.complete(ended.len());
            while let Some(done) = queue.next() {
                done.result.unwrap();
                assert!(ended.insert(done.token));
            }
        }
        assert!(queue.buffers.bytes() <= 256 << 10, "{} bytes are kept", queue.buffers.bytes());
        let mut byte = [0];
        memory.copy_out((1 << 20) - 1, &mut byte);
        assert_eq!(byte, [7]);
    }

    /// What a guest does on one of two queues.
    #[derive(Debug, Clone)]
    enum Act {
        Write { queue: usize, sector: u64, sectors: u64, odd: bool },
        Read { queue: usize, sector: u64, sectors: u64 },
        Discard { queue: usize, sector: u64, sectors: u64 },
        Complete { queue: usize, choice: usize },
    }

    fn acts() -> impl Strategy<Value = Vec<Act>> {
        let place = || (0..2usize, 0..SECTORS, 1..20u64);
        let act = prop_oneof![
            3 => (place(), any::<bool>()).prop_map(|((queue, sector, sectors), odd)| Act::Write {
                queue, sector, sectors: sectors.min(SECTORS - sector), odd }),
            2 => place().prop_map(|(queue, sector, sectors)| Act::Read {
                queue, sector, sectors: sectors.min(SECTORS - sector) }),
            1 => place().prop_map(|(queue, sector, sectors)| Act::Discard {
                queue, sector, sectors: sectors.min(SECTORS - sector) }),
            5 => (0..2usize, 0..8usize).prop_map(|(queue, choice)| Act::Complete { queue, choice }),
        ];
        prop::collection::vec(act, 1..60)
    }

    /// Requests of a guest in flight: sectors, and what a read must see.
    struct Flight {
        sectors: Range<u64>,
        read: Option<(Rc<Mapping>, Vec<u8>)>,
    }

    fn run(acts: &[Act]) {
        let disk = Large::default();
        disk.0.borrow_mut().bytes = vec![0; (SECTORS * 512) as usize];
        let units = Arc::new(Units::default());
        let mut queues: Vec<Bounced<Shared>> = (0..2)
            .map(|_| {
                let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
                let own = Shared { disk: disk.clone(), own: Large::default() };
                Bounced::new(own, UNIT as u32, 20 * 512, Arc::clone(&units), wake)
            })
            .collect();
        // One of them is always short of memory.
        queues[1].buffers.most = 20 * 512 + 2 * UNIT as usize;
        let mut model = vec![0u8; (SECTORS * 512) as usize];
        let mut flights: Vec<Option<Flight>> = Vec::new();
        let mut stamp = 0u8;
        for act in acts {
            match *act {
                Act::Complete { queue, choice } => step(&mut queues, queue, choice, &mut flights),
                Act::Write { queue, sector, sectors, .. }
                | Act::Read { queue, sector, sectors }
                | Act::Discard { queue, sector, sectors } => {
                    let range = sector..sector + sectors;
                    // A guest does not ask for what it is writing.
                    let busy = flights
                        .iter()
                        .flatten()
                        .any(|flight| flight.sectors.start < range.end && range.start < flight.sectors.end);
                    if busy {
                        continue;
                    }
                    let token = flights.len() as u32;
                    let bytes = (sector * 512) as usize..((sector + sectors) * 512) as usize;
                    let memory = Rc::new(Mapping::anonymous(20 * 512).unwrap());
                    let mut list = IoList::default();
                    let mut read = None;
                    match act {
                        Act::Write { odd, .. } => {
                            stamp = stamp.wrapping_add(1);
                            model[bytes.clone()].fill(stamp);
                            memory.copy_in(0, &vec![stamp; bytes.len()]);
                            // In one piece, or the first sector apart.
                            let first = if *odd && sectors > 1 { 512 } else { bytes.len() };
                            list.push(&memory, 0, first);
                            if first < bytes.len() {
                                let other = Rc::new(Mapping::anonymous(20 * 512).unwrap());
                                other.copy_in(0, &vec![stamp; bytes.len() - first]);
                                list.push(&other, 0, bytes.len() - first);
                            }
                            queues[queue].write(sector * 512, list, token);
                        }
                        Act::Read { .. } => {
                            list.push(&memory, 0, bytes.len());
                            read = Some((memory, model[bytes].to_vec()));
                            queues[queue].read(sector * 512, list, token);
                        }
                        _ => {
                            let whole = sector.next_multiple_of(8)..(sector + sectors) / 8 * 8;
                            if !whole.is_empty() {
                                model[(whole.start * 512) as usize..(whole.end * 512) as usize].fill(0);
                            }
                            queues[queue].discard(sector * 512, sectors * 512, token);
                        }
                    }
                    flights.push(Some(Flight { sectors: range, read }));
                }
            }
        }
        for _ in 0..10_000 {
            if flights.iter().all(Option::is_none) {
                break;
            }
            for queue in 0..2 {
                step(&mut queues, queue, 0, &mut flights);
            }
        }
        assert!(flights.iter().all(Option::is_none), "every request is answered");
        assert!(disk.0.borrow().bytes == model, "nothing was undone");
        assert!(units.lock().ranges.is_empty());
    }

    /// One queue's way to the common bytes, with completions of its own.
    #[derive(Debug)]
    struct Shared {
        disk: Large,
        own: Large,
    }

    impl Shared {
        fn complete(&mut self, choice: usize) {
            // Its operations are carried out on the common bytes.
            std::mem::swap(&mut self.disk.0.borrow_mut().bytes, &mut self.own.0.borrow_mut().bytes);
            self.own.complete(choice);
            std::mem::swap(&mut self.disk.0.borrow_mut().bytes, &mut self.own.0.borrow_mut().bytes);
        }
    }

    impl Storage for Shared {
        fn read(&mut self, offset: u64, memory: IoList, token: u32) {
            self.own.read(offset, memory, token);
        }
        fn write(&mut self, offset: u64, memory: IoList, token: u32) {
            self.own.write(offset, memory, token);
        }
        fn flush(&mut self, token: u32) {
            self.own.flush(token);
        }
        fn discard(&mut self, offset: u64, len: u64, token: u32) {
            self.own.discard(offset, len, token);
        }
        fn erase(&mut self, offset: u64, len: u64, token: u32) {
            self.discard(offset, len, token);
        }
        fn submit(&mut self) -> io::Result<()> {
            Ok(())
        }
        fn next(&mut self) -> Option<Done> {
            self.own.next()
        }
        fn has_completions(&mut self) -> bool {
            self.own.has_completions()
        }
    }

    fn step(queues: &mut [Bounced<Shared>], queue: usize, choice: usize, flights: &mut [Option<Flight>]) {
        queues[queue].inner().complete(choice);
        queues[queue].submit().unwrap();
        while let Some(done) = queues[queue].next() {
            done.result.unwrap();
            let flight = flights[done.token as usize].take().expect("answered once");
            if let Some((memory, expected)) = flight.read {
                let mut seen = vec![0; expected.len()];
                memory.copy_out(0, &mut seen);
                assert!(seen == expected, "a read of sectors {:?}", flight.sectors);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        /// Whatever two queues do at once, and in whatever order the storage finishes it, each sector has what was
        /// written to it last.
        #[test]
        fn no_write_is_undone(acts in acts()) {
            run(&acts);
        }
    }
}
