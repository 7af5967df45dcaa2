//! One guest, one disk, and a history: whose turn it is, and what could be lost if everything stopped now.

use std::fmt::Write;
use std::sync::Arc;

use blkback::abi::DIRECT_SEGMENTS;
use blkback::bounce::Bounced;
use blkback::queue::Broken;
use hypervisor::emu::{GuestOptions, GuestSeat, Limits, Machine, Member};
use hypervisor::{Backend, DomId, PAGE_SIZE};
use rustix::event::{EventfdFlags, eventfd};

use super::bench::{Aim, Bench, SharedBench, SimStorage, Step, What};
use super::checker::{Checker, Class, Crash, Finding};
use super::lane::{Lane, Pages, Together};
use super::plan::{Manner, Op, Plan};
use super::plant::{Bug, Planted};
use super::random::{Choose, Random};
use super::stamp::SECTOR;

/// Events after which a history must have come to rest.
const ENDLESS: u32 = 5000;

/// What a history came to.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// Power cuts and deaths looked at.
    pub crashes: (u64, u64),
    /// Things that happened.
    pub events: u32,
    /// What is wrong.
    pub finding: Option<Finding>,
    /// For each request whether it was answered, and how.
    pub statuses: Vec<Option<i16>>,
    /// Operations that failed, and flushes among them.
    pub failures: (u32, u32),
    /// How often a queue tried again what had found no room.
    pub retries: u32,
}

/// What happens next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    /// The guest asks for its next operation.
    Ask,
    /// A queue's thread runs.
    Turn(usize),
    /// An operation of the disk ends.
    End(usize),
    /// A queue tries again to write what found no room.
    Retry(usize),
}

/// A guest and a disk with so many queues. Used for one history after the other.
#[derive(Debug)]
pub struct World {
    lanes: Vec<Lane<Bounced<Planted>>>,
    pages: Vec<Pages>,
    bench: SharedBench,
    checker: Checker,
    persistent: bool,
    /// The disk's own sectors, in sectors of 512 bytes.
    unit: u64,
    bug: Option<Bug>,
    run: u64,
    now: u32,
    actions: Vec<Action>,
    outcome: Outcome,
    trace: Option<String>,
    xen: Arc<dyn Backend>,
    guest: GuestSeat,
    _machine: Machine,
}

macro_rules! say {
    ($world:expr, $($text:tt)*) => {
        if let Some(trace) = &mut $world.trace {
            // Writing to a string does not fail.
            let _ = writeln!(trace, $($text)*);
        }
    };
}

impl World {
    /// Makes a machine, a guest, and queues.
    ///
    /// # Panics
    /// When there is no memory for them.
    pub fn new(lanes: usize, persistent: bool, unit: u64, bug: Option<Bug>) -> Self {
        let machine = Machine::new(Limits::default()).expect("a machine");
        let xen: Arc<dyn Backend> = Arc::new(Member::local(&machine, DomId::DOM0).expect("dom0"));
        let guest =
            machine.create_guest(GuestOptions { name: "sim".into(), ..GuestOptions::default() }).expect("a guest");
        let mut world = Self {
            lanes: Vec::new(),
            pages: (0..lanes).map(|_| Pages::new(&guest)).collect(),
            bench: Bench::new(lanes, unit * SECTOR as u64),
            checker: Checker::default(),
            persistent,
            unit,
            bug,
            run: 0,
            now: 0,
            actions: Vec::new(),
            outcome: Outcome::default(),
            trace: None,
            xen,
            guest,
            _machine: machine,
        };
        world.connect();
        world
    }

    /// New queues over the same pages, as after a reconnect.
    pub fn connect(&mut self) {
        self.lanes.clear();
        self.bench.borrow_mut().reset(super::bench::Faults::default(), Random::new(0));
        let together = Together::default();
        let units = Arc::default();
        for (lane, pages) in self.pages.iter().enumerate() {
            let together = match self.bug {
                Some(Bug::BarrierPerQueue) => &Together { barriers: Arc::default(), ..together.clone() },
                _ => &together,
            };
            let storage = Planted::new(SimStorage { bench: std::rc::Rc::clone(&self.bench), lane }, self.bug);
            let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).expect("an eventfd");
            let wake = Arc::new(wake);
            let unit = self.unit as u32 * SECTOR as u32;
            let largest = DIRECT_SEGMENTS * PAGE_SIZE;
            let storage = Bounced::new(storage, unit, largest, Arc::clone(&units), Arc::clone(&wake));
            let storage = (storage, wake);
            self.lanes.push(Lane::new((&self.xen, &self.guest), pages, together, self.persistent, storage));
        }
    }

    /// Plays a history to its end, and looks at every crash on the way. With `trace` it says what happens.
    pub fn play(
        &mut self,
        plan: &Plan,
        choose: &mut dyn Choose,
        dice: Random,
        aim: Option<Aim>,
        trace: bool,
    ) -> Outcome {
        self.run += 1;
        self.now = 0;
        self.checker.reset(self.run, self.unit);
        self.bench.borrow_mut().reset(plan.faults, dice);
        self.bench.borrow_mut().aim = aim;
        self.outcome = Outcome { statuses: vec![None; plan.ops.len()], ..Outcome::default() };
        self.trace = trace.then(String::new);
        let result = self.events(plan, choose);
        let cut = plan.cut.is_some_and(|cut| self.now >= cut);
        if let Err(finding) = result {
            say!(self, "{:>4}  FOUND {}: {}", self.now, finding.class, finding.text);
            self.outcome.finding = Some(finding);
        }
        self.outcome.events = self.now;
        self.outcome.failures = self.bench.borrow().failures;
        if cut || self.checker.is_broken() || self.outcome.finding.is_some() {
            self.connect();
        }
        std::mem::take(&mut self.outcome)
    }

    /// What the last history said, if it was asked to.
    pub fn take_trace(&mut self) -> String {
        self.trace.take().unwrap_or_default()
    }

    fn events(&mut self, plan: &Plan, choose: &mut dyn Choose) -> Result<(), Finding> {
        let mut asked = 0;
        // A queue that was just built is awake, and finds that there is nothing to do.
        self.settle()?;
        self.lanes.iter_mut().for_each(|lane| lane.back.hold_when_full(plan.hold));
        self.outcome.crashes = (0, 0);
        self.now = 0;
        loop {
            self.find_actions(plan, asked);
            if self.actions.is_empty() {
                return self.at_rest(asked);
            }
            let mut action = self.actions[choose.pick(self.actions.len())];
            for _ in 0..3 {
                if !self.is_disliked(plan.manner, action) || !self.bench.borrow_mut().dice.once_in(2) {
                    break;
                }
                action = self.actions[choose.pick(self.actions.len())];
            }
            match action {
                Action::Ask => {
                    self.ask(plan, asked);
                    asked += 1;
                }
                Action::Turn(lane) => self.turn(lane)?,
                Action::End(index) => self.end(index),
                Action::Retry(lane) => self.retry(lane)?,
            }
            self.crash()?;
            if plan.eager {
                self.settle()?;
            }
            if plan.cut.is_some_and(|cut| self.now >= cut) {
                say!(self, "{:>4}  the guest is gone", self.now);
                return Ok(());
            }
            if self.now > ENDLESS {
                return Err(Finding::new(Class::Unanswered, "it never comes to rest"));
            }
        }
    }

    /// The queues run until all sleep.
    fn settle(&mut self) -> Result<(), Finding> {
        while let Some(lane) = self.lanes.iter_mut().position(Lane::is_ready) {
            self.turn(lane)?;
            self.crash()?;
            if self.now > ENDLESS {
                return Err(Finding::new(Class::Unanswered, "a queue spins"));
            }
        }
        Ok(())
    }

    fn find_actions(&mut self, plan: &Plan, asked: usize) {
        self.actions.clear();
        let waits = plan.patient && self.checker.entries().iter().any(|entry| !entry.is_answered());
        if asked < plan.ops.len() && !waits {
            self.actions.push(Action::Ask);
        }
        for (index, lane) in self.lanes.iter_mut().enumerate() {
            if lane.is_ready() {
                self.actions.push(Action::Turn(index));
            }
            if lane.back.held() > 0 {
                self.actions.push(Action::Retry(index));
            }
        }
        self.actions.extend((0..self.bench.borrow().running.len()).map(Action::End));
        if asked < plan.ops.len() && self.actions.is_empty() {
            self.actions.push(Action::Ask);
        }
    }

    fn is_disliked(&self, manner: Manner, action: Action) -> bool {
        match (manner, action) {
            (Manner::Deep, action) => self.actions[0] == Action::Ask && action != Action::Ask,
            (Manner::Backwards, Action::End(index)) => index + 1 < self.bench.borrow().running.len(),
            (Manner::SlowFlushes, Action::End(index)) => self.bench.borrow().running[index].what == What::Flush,
            (Manner::Starved, action) => action == Action::Turn(0),
            _ => false,
        }
    }

    fn ask(&mut self, plan: &Plan, nth: usize) {
        self.now += 1;
        let (lane, op) = plan.ops[nth];
        let foreign = plan.intruder && lane + 1 == plan.lanes;
        let index = self.checker.published(lane, op, self.now, foreign);
        say!(self, "{:>4}  the guest asks queue {lane}: #{} {op}", self.now, index + 1);
        let id = self.run << 16 | index as u64;
        let checker = &self.checker;
        self.lanes[lane].ask(&self.pages[lane], (index, id), op, |sector, bytes| {
            checker.stamp(index, lane, sector, foreign).fill(bytes);
        });
    }

    /// What blkback's thread would do, see `worker::Drive`.
    fn turn(&mut self, which: usize) -> Result<(), Finding> {
        self.now += 1;
        let lane = &mut self.lanes[which];
        let was_asleep = std::mem::replace(&mut lane.asleep, false);
        say!(self, "{:>4}  queue {which} {}", self.now, if was_asleep { "wakes up" } else { "runs" });
        let lane = &mut self.lanes[which];
        let mut taken = 0;
        let outcome = if lane.broken || was_asleep {
            lane.woken = false;
            if !lane.broken && std::mem::take(&mut lane.event) {
                let took = lane.back.channel().take().expect("the event channel");
                assert!(took, "an event was lost");
            }
            lane.back.drain()
        } else {
            lane.back.turn()
        };
        match outcome {
            Ok(progress) => {
                taken = progress.taken;
                if lane.broken {
                    lane.asleep = true;
                } else if !was_asleep && progress.is_idle() && !lane.back.rearm().expect("the guest is honest") {
                    lane.back.channel().unmask().expect("the event channel");
                    lane.asleep = true;
                }
            }
            Err(Broken::Flush(error)) => {
                say!(self, "{:>4}  queue {which}: flush failed: {error}", self.now);
                self.checker.flush_failed(self.now);
                let lane = &mut self.lanes[which];
                lane.broken = true;
                lane.asleep = true;
                lane.back.hold_when_full(false);
                lane.back.give_up_held();
                if let Err(error) = lane.back.drain() {
                    return Err(Finding::new(Class::FalsePromise, format!("a second flush: {error}")));
                }
            }
            Err(error) => return Err(Finding::new(Class::Unanswered, format!("queue {which}: {error}"))),
        }
        for _ in 0..taken {
            let lane = &mut self.lanes[which];
            let Some(index) = lane.waiting.pop_front() else {
                return Err(Finding::new(Class::AnsweredTwice, "more requests were taken than were made"));
            };
            self.checker.taken(index);
            say!(self, "{:>4}  queue {which} takes #{}", self.now, index + 1);
        }
        for lane in &mut self.lanes {
            lane.take_wake();
        }
        self.look(which)
    }

    /// The guest looks for answers.
    fn look(&mut self, which: usize) -> Result<(), Finding> {
        let broke = |error: ring::Overflow| Finding::new(Class::AnsweredTwice, format!("queue {which}: {error}"));
        let mut last = None;
        loop {
            let lane = &mut self.lanes[which];
            let again = if self.bug == Some(Bug::AnswerTwice) { last.take() } else { None };
            let fresh = again.is_none();
            let answer = match again {
                Some(answer) => Some(answer),
                None => lane.answer().map_err(broke)?,
            };
            let Some((id, status)) = answer else {
                if lane.rearm().map_err(broke)? == 0 {
                    return Ok(());
                }
                continue;
            };
            if fresh {
                last = Some((id, status));
            }
            say!(self, "{:>4}  queue {which} answers #{}: {status}", self.now, (id & 0xffff) + 1);
            if id >> 16 != self.run {
                return Err(Finding::new(Class::AnsweredTwice, format!("an answer with number {id:#x}")));
            }
            let index = (id & 0xffff) as usize;
            let failures = self.bench.borrow().failures.0;
            self.checker.answered(index, status, self.now, failures)?;
            self.outcome.statuses[index] = Some(status);
            if let (Op::Read(range), 0) = (self.checker.entries()[index].op, status) {
                let pages = &self.pages[which];
                self.checker
                    .read(index, |sector| Lane::<Bounced<Planted>>::was_read(pages, index, sector - range.first))?;
            }
        }
    }

    /// Its timer has run out.
    fn retry(&mut self, which: usize) -> Result<(), Finding> {
        say!(self, "{:>4}  queue {which} tries again what found no room", self.now);
        self.outcome.retries += 1;
        self.lanes[which].back.retry_held();
        self.lanes[which].asleep = false;
        self.turn(which)
    }

    fn end(&mut self, index: usize) {
        self.now += 1;
        let mut bench = self.bench.borrow_mut();
        let job = &bench.running[index];
        let (what, lane, first, count) = (job.what, job.lane, job.sector, job.count);
        let step = bench.end(index);
        drop(bench);
        let step = match step {
            Step::Done => "done".to_owned(),
            Step::Part => "done in part".to_owned(),
            Step::Failed(errno) => std::io::Error::from_raw_os_error(errno).to_string(),
        };
        say!(self, "{:>4}  disk: queue {lane}'s {what:?} {first}+{count}: {step}", self.now);
    }

    fn crash(&mut self) -> Result<(), Finding> {
        let bench = self.bench.borrow();
        if bench.memory_changed {
            return Err(Finding::new(Class::Torn, "the memory of a write changed while it was under way"));
        }
        if bench.misaligned {
            return Err(Finding::new(Class::Misdirected, "an operation that is no multiple of the disk's sectors"));
        }
        let now = self.now;
        let at =
            |found: Finding, how: &str| Finding::new(found.class, format!("{how} after event {now}: {}", found.text));
        self.outcome.crashes.0 += 1;
        self.checker.crash(&bench, Crash::Power).map_err(|found| at(found, "power cut"))?;
        self.outcome.crashes.1 += 1;
        self.checker.crash(&bench, Crash::Kill).map_err(|found| at(found, "kill"))
    }

    /// Nothing more will happen: everything must have been answered, but for what no flush can cover any more.
    fn at_rest(&mut self, asked: usize) -> Result<(), Finding> {
        for (index, lane) in self.lanes.iter().enumerate() {
            if lane.back.in_flight() > 0 {
                let text = format!("queue {index} holds {} requests, and sleeps", lane.back.in_flight());
                return Err(Finding::new(Class::Unanswered, text));
            }
        }
        if self.checker.is_broken() {
            return Ok(());
        }
        match self.checker.entries()[..asked].iter().position(|entry| !entry.is_answered()) {
            Some(index) => {
                let op = self.checker.entries()[index].op;
                Err(Finding::new(Class::Unanswered, format!("#{} ({op})", index + 1)))
            }
            None => Ok(()),
        }
    }
}
