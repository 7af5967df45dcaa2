//! The thread that drives a queue.

mod back_off;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel;
use hypervisor::{Backend, DomId, EventChannel, GrantAccess, PAGE_SIZE};
use ring::{BackRing, Layout, Patience};
use rustix::event::{EventfdFlags, eventfd};
use xenstore_client::xenbus::{Blame, Fault};

use crate::abi::{DIRECT_SEGMENTS, Protocol};
use crate::barrier::Barriers;
use crate::below::Below;
use crate::bounce::{Bounced, Units};
use crate::counters::Counters;
use crate::grants::Grants;
use crate::health::Health;
use crate::image::Image;
use crate::inflight::{Connection, InFlightLog};
use crate::negotiate::QueueKeys;
use crate::queue::{Broken, Parts, Queue};
use crate::request::Shape;
use crate::storage::{Sleep, Storage};

use back_off::BackOff;

/// Pages of ours that a queue copies through: 8 MiB, eight of the largest requests at a time.
const ARENA_PAGES: u32 = 2048;
/// Pages that a queue keeps mapped, as many as Linux' backend: a ring of one page full of requests of 32 segments,
/// and one indirect page for each.
const MOST_KEPT: usize = 1056;
/// How often writes are tried again that the storage had no room for.
const RETRY: Duration = Duration::from_secs(1);
/// How often unused pages, and a disk that has grown, are looked for.
const PERIOD: Duration = Duration::from_secs(10);

/// Everything a queue's thread needs to build the queue.
#[derive(Debug)]
pub struct Plan {
    /// The hypervisor.
    pub xen: Arc<dyn Backend>,
    /// The guest.
    pub peer: DomId,
    /// A short name for the thread.
    pub name: String,
    /// The ring and the event channel.
    pub keys: QueueKeys,
    /// The layout of the slots.
    pub protocol: Protocol,
    /// Whether pages stay mapped.
    pub persistent: bool,
    /// The disk.
    pub image: Arc<Image>,
    /// What the disk can do.
    pub shape: Shape,
    /// Shared by the disk's queues.
    pub health: Arc<Health>,
    /// Shared by the disk's queues.
    pub barriers: Arc<Barriers>,
    /// Shared by the disk's queues.
    pub units: Arc<Units>,
    /// Read by others.
    pub counters: Arc<Counters>,
    /// The processor to stay on.
    pub cpu: Option<usize>,
    /// Whether this queue looks from time to time if the disk has grown: one of a disk's queues does.
    pub measures: bool,
    /// Whether writes wait when the storage is full.
    pub hold_when_full: bool,
    /// Where what is in flight is logged.
    pub log: Option<PathBuf>,
}

/// What a queue is told while it serves. Each is answered by [`Report::Changed`].
#[derive(Debug, Clone)]
pub enum Order {
    /// The disk can do something else from now on.
    Shape(Shape),
    /// There is another disk.
    Disk(Arc<Image>, Shape),
    /// Finish what is in flight and take no more requests (true), or go on. Writes that wait for room go on waiting.
    Pause(bool),
}

/// How a queue's thread reports.
#[derive(Debug, Clone)]
pub enum Report {
    /// The queue cannot go on; it stays until it is told to stop.
    Broken(Fault),
    /// An [`Order`] was carried out.
    Changed,
    /// Writes wait for room on the storage (true), or none do any more.
    Full(bool),
    /// A flush has failed: what was written to this disk may be lost.
    FlushFailed(Arc<Image>, String),
    /// The size of the storage is not what it was, or cannot be found out any more.
    Resized,
    /// The thread has ended: nothing is mapped or in flight any more.
    Ended,
}

/// A queue on a thread of its own.
#[derive(Debug)]
pub struct Worker {
    stop: Arc<AtomicBool>,
    wake: Arc<OwnedFd>,
    orders: channel::Sender<Order>,
    /// Lets the thread begin; gone once it has.
    go: Option<channel::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts a thread, which builds the queue and then waits for [`serve`](Self::serve): no request is taken before
    /// all queues of a disk have been built. `report` is called on that thread.
    ///
    /// # Errors
    /// When the ring cannot be mapped, the port not be bound, or the machine is out of something.
    pub fn prepare(plan: Plan, report: impl Fn(Report) + Send + 'static) -> Result<Self, Fault> {
        let stop = Arc::new(AtomicBool::new(false));
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let wake = Arc::new(eventfd(0, flags).map_err(|error| host("eventfd", error.into()))?);
        let (ready, built) = channel::bounded(1);
        let (go, may_go) = channel::bounded(1);
        let (orders, inbox) = channel::unbounded();
        let name = plan.name.clone();
        let body = {
            let (stop, wake) = (Arc::clone(&stop), Arc::clone(&wake));
            move || {
                // One span for the thread's life, so that what it logs names the disk.
                let _span = tracing::info_span!("queue", name = plan.name).entered();
                pin(plan.cpu);
                let (counters, image) = (Arc::clone(&plan.counters), Arc::clone(&plan.image));
                let (units, measures) = (Arc::clone(&plan.units), plan.measures);
                let hold_when_full = plan.hold_when_full;
                let (built, queue) = match build(plan, &wake) {
                    Ok(queue) => (Ok(()), Some(queue)),
                    Err(fault) => (Err(fault), None),
                };
                // prepare waits for exactly this.
                let _ = ready.send(built);
                let Some(queue) = queue else { return };
                if may_go.recv().is_err() {
                    return;
                }
                // A bug of ours in one queue must not take the other disks along.
                let drive = AssertUnwindSafe(|| {
                    let (stop, wake, report, counters) = (&*stop, &wake, &report, &*counters);
                    let (orders, full, retried) = (inbox, false, Instant::now());
                    Drive {
                        paused: false,
                        queue,
                        image,
                        units,
                        measures,
                        hold_when_full,
                        counters,
                        stop,
                        wake,
                        orders,
                        full,
                        retried,
                        report,
                    }
                    .run();
                });
                if catch_unwind(drive).is_err() {
                    report(Report::Broken(Fault::host(libc::EIO, "a queue's thread panicked; see the log")));
                }
                report(Report::Ended);
            }
        };
        let thread = std::thread::Builder::new().name(name).spawn(body);
        let thread = thread.map_err(|error| host("starting a thread", error))?;
        let worker = Self { stop, wake, orders, go: Some(go), thread: Some(thread) };
        match built.recv() {
            Ok(built) => built.map(|()| worker),
            Err(_) => Err(Fault::host(libc::EIO, "a queue's thread panicked while it was being built; see the log")),
        }
    }

    /// Lets the queue begin.
    pub fn serve(&mut self) {
        if let Some(go) = self.go.take() {
            // The thread waits for this, or for the sender to be dropped.
            let _ = go.send(());
        }
    }

    /// Tells the queue to do something between two requests. False if it has ended.
    pub fn order(&self, order: Order) -> bool {
        let taken = self.orders.send(order).is_ok();
        self.ring_bell();
        taken
    }

    fn ring_bell(&self) {
        if let Err(error) = rustix::io::write(&self.wake, &1u64.to_ne_bytes()) {
            tracing::error!(%error, "cannot wake a queue");
        }
    }

    /// Tells the queue to finish what is in flight and end. Does not wait: [`Report::Ended`] follows.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.ring_bell();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop();
        // A queue that never served has nothing in flight and ends at once. One that did is joined only if that does
        // not wait: a disk that hangs must not hold up the other devices.
        let never_served = self.go.take().is_some();
        if let Some(thread) = self.thread.take_if(|thread| never_served || thread.is_finished())
            && thread.join().is_err()
        {
            tracing::error!("a queue's thread had panicked");
        }
    }
}

fn host(what: &str, error: io::Error) -> Fault {
    Fault::host(error.raw_os_error().unwrap_or(libc::EIO), format!("{what}: {error}"))
}

/// Keeps the calling thread on one processor.
fn pin(cpu: Option<usize>) {
    let Some(cpu) = cpu else { return };
    let mut set = nix::sched::CpuSet::new();
    let pinned = set.set(cpu).and_then(|()| nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set));
    if let Err(error) = pinned {
        tracing::warn!(cpu, %error, "cannot keep a queue on its processor; it runs anywhere");
    }
}

/// Wakers of the storage.
const EVENT: u32 = 0;
const CONTROL: u32 = 1;

fn build(plan: Plan, wake: &Arc<OwnedFd>) -> Result<Queue<Bounced<Below>>, Fault> {
    let Plan {
        xen,
        peer,
        keys,
        protocol,
        persistent,
        image,
        shape,
        health,
        barriers,
        units,
        counters,
        hold_when_full,
        log,
        ..
    } = plan;
    let ring = xen
        .map(peer, &keys.ring, GrantAccess::ReadWrite)
        .map_err(|error| Fault::guest(libc::EINVAL, format!("mapping the ring: {error}")))?;
    let channel = xen
        .bind(peer, keys.port)
        .map_err(|error| Fault::guest(libc::EINVAL, format!("binding the event channel: {error}")))?;
    let layout = Layout::new(protocol.stride(), keys.ring.len());
    let storage = storage(&image, &*channel, wake, layout.entries(), shape, units)?;
    let most_kept = if persistent { MOST_KEPT } else { 0 };
    let grants = Grants::new(xen, peer, ARENA_PAGES, most_kept).map_err(|error| host("memory for copies", error))?;
    let ring = BackRing::attach(ring, layout, 0);
    let wake = Arc::clone(wake);
    let connection = Connection { entries: layout.entries(), gref: keys.ring[0], port: keys.port };
    let log = log.and_then(|path| match InFlightLog::create(&path, connection) {
        Ok(log) => Some(log),
        Err(error) => {
            let path = path.display();
            tracing::warn!(%path, %error, "no log of what is in flight: should this process be killed, its guest hangs");
            None
        }
    });
    let parts = Parts { ring, protocol, grants, channel, storage, shape, health, barriers, wake, counters, log };
    let mut queue = Queue::new(parts);
    queue.hold_when_full(hold_when_full);
    Ok(queue)
}

/// The way from a queue to an image.
fn storage(
    image: &Image,
    channel: &dyn EventChannel,
    wake: &Arc<OwnedFd>,
    entries: u32,
    shape: Shape,
    units: Arc<Units>,
) -> Result<Bounced<Below>, Fault> {
    let inner = Below::new(image, &[channel.fd(), wake.as_fd()], entries)
        .map_err(|error| host("io_uring (Linux 6.1 or newer, and kernel.io_uring_disabled=0, are needed)", error))?;
    // All indirect segments, of a page each.
    let largest = shape.indirect.max(DIRECT_SEGMENTS) * PAGE_SIZE;
    Ok(Bounced::new(inner, image.unit, largest, units, Arc::clone(wake)))
}

fn fault(broken: &Broken) -> Fault {
    match broken {
        Broken::Ring(_) => Fault { errno: libc::EINVAL, text: broken.to_string(), blame: Blame::Guest },
        Broken::Flush(source) | Broken::Host { source, .. } => {
            Fault::host(source.raw_os_error().unwrap_or(libc::EIO), broken.to_string())
        }
    }
}

/// The life of a queue on its thread.
struct Drive<'a, R> {
    /// Nothing is taken from the ring, and nothing is in flight.
    paused: bool,
    queue: Queue<Bounced<Below>>,
    image: Arc<Image>,
    units: Arc<Units>,
    measures: bool,
    hold_when_full: bool,
    counters: &'a Counters,
    stop: &'a AtomicBool,
    wake: &'a Arc<OwnedFd>,
    orders: channel::Receiver<Order>,
    /// Writes wait for room, and it was said.
    full: bool,
    /// When they were last tried again.
    retried: Instant,
    report: &'a R,
}

impl<R: Fn(Report)> Drive<'_, R> {
    fn run(mut self) {
        if let Err(broken) = self.serve() {
            self.note(&broken);
            (self.report)(Report::Broken(fault(&broken)));
        }
        if let Err(broken) = self.drain() {
            tracing::error!(%broken, "queue closed with operations in flight");
        }
    }

    /// Sees to it that a failed flush is not forgotten with this queue.
    fn note(&self, broken: &Broken) {
        if matches!(broken, Broken::Flush(_)) {
            (self.report)(Report::FlushFailed(Arc::clone(&self.image), broken.to_string()));
        }
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Serves until told to stop, or until the queue is broken.
    fn serve(&mut self) -> Result<(), Broken> {
        let (mut patience, mut back_off) = (Patience::default(), BackOff::default());
        let mut period_began = Instant::now();
        let mut turns = 0u32;
        while !self.stopped() {
            turns = turns.wrapping_add(1);
            if turns.is_multiple_of(4096) && period_began.elapsed() > PERIOD {
                self.next_period();
                period_began = Instant::now();
            }
            // All of them: they rang once, and the bell is silent by now.
            while let Ok(order) = self.orders.try_recv() {
                self.carry_out(order)?;
            }
            if self.paused {
                self.sleep_paused(PERIOD)?;
                continue;
            }
            if self.queue.held() > 0 {
                self.retry_held();
            }
            let progress = self.queue.turn()?;
            if let Some(pause) = back_off.after(progress.taken, progress.refused) {
                std::thread::sleep(pause);
            }
            if progress.taken > 0 {
                patience.asked();
            }
            if !progress.is_idle() || self.look(&mut patience)? || self.queue.rearm()? {
                continue;
            }
            self.say_if_full();
            self.sleep(&mut patience)?;
            if period_began.elapsed() > PERIOD {
                self.next_period();
                period_began = Instant::now();
            }
        }
        Ok(())
    }

    fn next_period(&mut self) {
        self.queue.next_period();
        if self.measures && self.image.has_changed() {
            (self.report)(Report::Resized);
        }
    }

    fn retry_held(&mut self) {
        if self.queue.take_room() || self.retried.elapsed() >= RETRY {
            self.queue.retry_held();
            self.retried = Instant::now();
        }
    }

    fn say_if_full(&mut self) {
        let full = self.queue.held() > 0;
        if full != self.full {
            self.full = full;
            (self.report)(Report::Full(full));
        }
    }

    fn carry_out(&mut self, order: Order) -> Result<(), Broken> {
        match order {
            Order::Shape(shape) => self.queue.reshape(shape),
            Order::Disk(image, shape) => {
                // Who takes a disk out does not wait for room on it, nor for its server to come back.
                self.queue.hold_when_full(false);
                self.queue.give_up_held();
                while self.queue.in_flight() > 0 {
                    self.queue.drain()?;
                    if self.queue.in_flight() > 0 {
                        self.queue.storage().give_up();
                        self.wait(RETRY)?;
                    }
                }
                self.queue.hold_when_full(self.hold_when_full);
                let units = Arc::clone(&self.units);
                let entries = self.queue.slots();
                let made = storage(&image, self.queue.channel(), self.wake, entries, shape, units);
                let failed =
                    |fault: Fault| Broken::Host { what: "changing the disk", source: io::Error::other(fault.text) };
                self.queue.change_disk(made.map_err(failed)?, shape);
                self.image = image;
            }
            Order::Pause(paused) => {
                while paused && self.queue.in_flight() > self.queue.held() && !self.stopped() {
                    self.sleep_paused(RETRY)?;
                }
                self.paused = paused;
            }
        }
        (self.report)(Report::Changed);
        Ok(())
    }

    /// Sleeps until there is an order, or something in flight has ended. The guest may ring once: its port is not written
    /// back meanwhile.
    fn sleep_paused(&mut self, longest: Duration) -> Result<(), Broken> {
        self.queue.drain()?;
        self.wait(longest)?;
        self.queue.drain()?;
        self.quiet_control();
        if self.queue.storage().inner().take_rung(EVENT) {
            let taken = self.queue.channel().take();
            taken.map(drop).map_err(|source| Broken::Host { what: "event channel", source })?;
        }
        Ok(())
    }

    fn wait(&mut self, longest: Duration) -> Result<(), Broken> {
        let waited = self.queue.storage().inner().wait(Some(longest));
        self.quiet_control();
        waited.map_err(|source| Broken::Host { what: "io_uring", source })
    }

    /// Looks for work for a while. True when there is some.
    fn look(&mut self, patience: &mut Patience) -> Result<bool, Broken> {
        let longest = patience.look();
        if longest.is_zero() {
            return Ok(false);
        }
        let began = Instant::now();
        loop {
            for _ in 0..16 {
                if self.queue.has_work()? {
                    patience.found();
                    return Ok(true);
                }
                std::hint::spin_loop();
            }
            if began.elapsed() > longest || self.stopped() {
                patience.found_nothing();
                return Ok(false);
            }
        }
    }

    /// Sleeps until the guest, the disk or the control thread has something. The port is written back only now: while
    /// we are awake the guest's notifications cost nobody anything.
    fn sleep(&mut self, patience: &mut Patience) -> Result<(), Broken> {
        let channel_failed = |source| Broken::Host { what: "event channel", source };
        let waiting_failed = |source| Broken::Host { what: "io_uring", source };
        self.counters.sleeps.add(1);
        let hold = patience.hold();
        if !hold.is_zero() {
            self.queue.storage().inner().wait(Some(hold)).map_err(waiting_failed)?;
            if self.queue.has_work()? {
                return Ok(());
            }
        }
        self.queue.channel().unmask().map_err(channel_failed)?;
        let began = Instant::now();
        let longest = if self.queue.held() > 0 { RETRY } else { PERIOD };
        self.queue.storage().inner().wait(Some(longest)).map_err(waiting_failed)?;
        patience.slept(began.elapsed());
        // Finds out who rang; what the disk has finished is answered along the way.
        self.queue.drain()?;
        if self.queue.storage().inner().take_rung(EVENT) {
            self.queue.channel().take().map_err(channel_failed)?;
            patience.rang();
        }
        self.quiet_control();
        Ok(())
    }

    /// Takes the control thread's bell, or another queue's, so that it can ring again. What it means stands elsewhere.
    fn quiet_control(&mut self) {
        if self.queue.storage().inner().take_rung(CONTROL) {
            // Empty is as good.
            let _ = rustix::io::read(self.wake, &mut [0; 8]);
        }
    }

    /// Finishes what is in flight, and waits until told to stop.
    fn drain(&mut self) -> Result<(), Broken> {
        // Nobody takes the guest's events any more: a descriptor that stays readable would have us spin until a slow
        // disk is done.
        self.queue.storage().inner().ignore(EVENT);
        self.queue.hold_when_full(false);
        self.queue.give_up_held();
        // Nothing waits any more: whoever looks at the disk is not to be told so.
        self.say_if_full();
        while self.queue.in_flight() > 0 || !self.stopped() {
            match self.queue.drain() {
                Ok(_) => {}
                // The guest is going, or has been told; the rest must still come back before memory may go.
                Err(broken @ Broken::Flush(_)) => self.note(&broken),
                Err(broken) => return Err(broken),
            }
            if self.queue.in_flight() > 0 || !self.stopped() {
                self.wait(if self.stopped() { RETRY } else { PERIOD })?;
            }
            if self.stopped() {
                self.queue.storage().give_up();
            }
        }
        Ok(())
    }
}
