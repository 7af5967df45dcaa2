//! The thread that drives a queue.

mod build;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel;
use hypervisor::{Backend, DomId, GrantRef, Port};
use ring::Patience;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use xenstore_client::xenbus::{Blame, Fault};

use crate::broken::Broken;
use crate::counters::Counters;
use crate::hash::HashState;
use crate::multicast::Multicast;
use crate::negotiate::{QueueKeys, Receives};
use crate::queue::{Live, Queue};
use crate::steer::Post;
use crate::tap::Tap;

/// What the queues of one vif share.
#[derive(Debug, Clone)]
pub struct Shared {
    /// The hypervisor.
    pub xen: Arc<dyn Backend>,
    /// The guest.
    pub peer: DomId,
    /// What it can receive.
    pub receives: Receives,
    /// Bytes it wants before each frame.
    pub headroom: Arc<AtomicU16>,
    /// How it wants frames to be hashed.
    pub hash: Arc<HashState>,
    /// The groups it joined.
    pub multicast: Arc<Multicast>,
    /// What may change.
    pub live: Arc<Live>,
}

/// Everything a queue's thread needs to build the queue.
#[derive(Debug)]
pub struct Plan {
    /// What all queues have.
    pub shared: Shared,
    /// A short name for the thread.
    pub name: String,
    /// The rings and the event channels.
    pub keys: QueueKeys,
    /// The control ring and how many queues it may speak of, for one of the queues.
    pub control: Option<(GrantRef, Port, u32)>,
    /// This queue of the tap.
    pub tap: Tap,
    /// The way to and from the vif's other queues, where there are any.
    pub post: Option<Post>,
    /// Read by others.
    pub counters: Arc<Counters>,
    /// The processor to stay on.
    pub cpu: Option<usize>,
    /// The rings are in use, and the backend that served them has died.
    pub resume: bool,
}

/// How a queue's thread reports.
#[derive(Debug)]
pub enum Report {
    /// The queue cannot go on; it stays until it is told to stop.
    Broken(Fault),
    /// The thread has ended: nothing is mapped any more. The tap's queue comes back.
    Ended,
}

/// A queue on a thread of its own.
#[derive(Debug)]
pub struct Worker {
    stop: Arc<AtomicBool>,
    wake: Arc<OwnedFd>,
    /// Lets the thread begin; gone once it has.
    go: Option<channel::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts a thread, which builds the queue and then waits for [`serve`](Self::serve): nothing is taken from a ring
    /// before all queues of a vif have been built. `report` is called on that thread.
    ///
    /// # Errors
    /// When a ring cannot be mapped, a port not be bound, or the machine is out of something.
    pub fn prepare(plan: Plan, report: impl Fn(Report) + Send + 'static) -> Result<Self, Fault> {
        let stop = Arc::new(AtomicBool::new(false));
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let wake = Arc::new(eventfd(0, flags).map_err(|error| host("eventfd", error.into()))?);
        let (ready, built) = channel::bounded(1);
        let (go, may_go) = channel::bounded(1);
        let name = plan.name.clone();
        let body = {
            let (stop, wake) = (Arc::clone(&stop), Arc::clone(&wake));
            move || {
                // One span for the thread's life, so that what it logs names the vif.
                let _span = tracing::info_span!("queue", name = plan.name).entered();
                pin(plan.cpu);
                let counters = Arc::clone(&plan.counters);
                let (built, queue) = match build::build(plan) {
                    Ok(queue) => (Ok(()), Some(queue)),
                    Err(fault) => (Err(fault), None),
                };
                // prepare waits for exactly this.
                let _ = ready.send(built);
                let Some(queue) = queue else { return };
                if may_go.recv().is_err() {
                    return;
                }
                // A bug of ours in one queue must not take the other vifs along.
                let drive = AssertUnwindSafe(|| {
                    Drive { queue, counters: &counters, stop: &stop, wake: &wake, report: &report }.run();
                });
                if catch_unwind(drive).is_err() {
                    report(Report::Broken(Fault::host(libc::EIO, "a queue's thread panicked; see the log")));
                    wait_for_stop(&stop, &wake);
                }
                report(Report::Ended);
            }
        };
        let thread = std::thread::Builder::new().name(name).spawn(body);
        let thread = thread.map_err(|error| host("starting a thread", error))?;
        let worker = Self { stop, wake, go: Some(go), thread: Some(thread) };
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

    /// Has the queue look at what is [`Live`].
    pub fn wake(&self) {
        if let Err(error) = rustix::io::write(&*self.wake, &1u64.to_ne_bytes()) {
            tracing::error!(%error, "cannot wake a queue");
        }
    }

    /// Tells the queue to end. Does not wait: [`Report::Ended`] follows.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.wake();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop();
        self.go = None;
        // A queue has nothing in flight: its thread ends within one turn.
        if let Some(thread) = self.thread.take()
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

fn fault(broken: &Broken) -> Fault {
    let text = broken.to_string();
    match broken {
        Broken::Ring { .. } | Broken::Packet(_) => Fault { errno: libc::EINVAL, text, blame: Blame::Guest },
        Broken::Copy(_) => Fault::host(libc::EIO, text),
        Broken::Host { source, .. } => Fault::host(source.raw_os_error().unwrap_or(libc::EIO), text),
    }
}

/// Waits for the control thread's word.
fn wait_for_stop(stop: &AtomicBool, wake: &OwnedFd) {
    while !stop.load(Ordering::Acquire) {
        let waited = poll(&mut [PollFd::new(wake, PollFlags::IN)], None);
        quiet(wake);
        if let Err(error) = waited
            && error != rustix::io::Errno::INTR
        {
            tracing::error!(%error, "cannot wait to be stopped");
            return;
        }
    }
}

/// Takes the control thread's bell, so that it can ring again. What it means stands elsewhere.
fn quiet(wake: &OwnedFd) {
    // Empty is as good.
    let _ = rustix::io::read(wake, &mut [0; 8]);
}

/// The life of a queue on its thread.
struct Drive<'a, R> {
    queue: Queue,
    counters: &'a Counters,
    stop: &'a AtomicBool,
    wake: &'a OwnedFd,
    report: &'a R,
}

/// What a sleep ended with.
struct Woken {
    rang: bool,
    control: bool,
}

impl<R: Fn(Report)> Drive<'_, R> {
    fn run(mut self) {
        if let Err(broken) = self.serve() {
            (self.report)(Report::Broken(fault(&broken)));
            wait_for_stop(self.stop, self.wake);
        }
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Serves until told to stop, or until the queue is broken.
    fn serve(&mut self) -> Result<(), Broken> {
        let mut patience = Patience::default();
        while !self.stopped() {
            let progress = self.queue.turn(Instant::now())?;
            if !progress.is_idle() {
                patience.asked();
                continue;
            }
            if self.look(&mut patience)? || self.queue.rearm()? {
                continue;
            }
            self.sleep(&mut patience)?;
        }
        Ok(())
    }

    /// Looks for work for a while: at the rings all the time, at the tap now and then, because that takes a system call.
    /// True when there may be some.
    fn look(&mut self, patience: &mut Patience) -> Result<bool, Broken> {
        let longest = patience.look();
        if longest.is_zero() {
            return Ok(false);
        }
        let began = Instant::now();
        loop {
            for _ in 0..64 {
                if self.queue.has_work()? {
                    patience.found();
                    return Ok(true);
                }
                std::hint::spin_loop();
            }
            let now = Instant::now();
            if !self.queue.turn(now)?.is_idle() {
                patience.found();
                patience.asked();
                return Ok(true);
            }
            if now.duration_since(began) > longest || self.stopped() {
                patience.found_nothing();
                return Ok(false);
            }
        }
    }

    /// Sleeps until the guest, the tap, the clock or the control thread has something. The ports are written back only
    /// now: while we are awake the guest's notifications cost nobody anything.
    fn sleep(&mut self, patience: &mut Patience) -> Result<(), Broken> {
        let channel_failed = |source| Broken::Host { what: "event channel", source };
        self.counters.sleeps.add(1);
        let hold = patience.hold();
        if !hold.is_zero() {
            // A guest that rings for nothing is not listened to for a while. The tap is.
            self.wait(Some(hold), false)?;
            if self.queue.has_work()? {
                return Ok(());
            }
        }
        self.queue.channels().unmask().map_err(channel_failed)?;
        if let Some(control) = self.queue.control() {
            control.unmask().map_err(channel_failed)?;
        }
        let began = Instant::now();
        let timeout = self.queue.deadline().map(|deadline| deadline.saturating_duration_since(began));
        let woken = self.wait(timeout, true)?;
        patience.slept(began.elapsed());
        if woken.rang {
            self.queue.channels().take().map_err(channel_failed)?;
            patience.rang();
        }
        if let Some(control) = self.queue.control().filter(|_| woken.control) {
            control.take().map_err(channel_failed)?;
            patience.rang();
        }
        Ok(())
    }

    fn wait(&self, timeout: Option<Duration>, listen: bool) -> Result<Woken, Broken> {
        let tap = self.queue.tap().as_fd();
        let control = self.queue.control().map(|control| control.fd());
        let post = self.queue.post();
        let channels: [_; 2] = {
            let mut fds = self.queue.channels().fds();
            [fds.next(), fds.next()]
        };
        let listened = if listen { PollFlags::IN } else { PollFlags::empty() };
        let frames = if self.queue.wants_frames() { PollFlags::IN } else { PollFlags::empty() };
        let fd = |fd, flags| PollFd::from_borrowed_fd(fd, flags);
        // A descriptor that is not there stands for the bell, which nobody minds being asked about twice.
        let bell = self.wake.as_fd();
        let mut fds = [
            fd(bell, PollFlags::IN),
            fd(tap, frames),
            fd(channels[0].unwrap_or(bell), if channels[0].is_some() { listened } else { PollFlags::empty() }),
            fd(channels[1].unwrap_or(bell), if channels[1].is_some() { listened } else { PollFlags::empty() }),
            fd(control.unwrap_or(bell), if control.is_some() { listened } else { PollFlags::empty() }),
            fd(post.map_or(bell, Post::bell), if post.is_some() { frames } else { PollFlags::empty() }),
        ];
        // Rounded up: a deadline must have passed when we look at the clock again.
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout + Duration::from_micros(1)).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Broken::Host { what: "poll", source: error.into() }),
        }
        let ready = |index: usize, flags: PollFlags| fds[index].revents().intersects(flags);
        if ready(0, PollFlags::IN) {
            quiet(self.wake);
        }
        if let Some(post) = post.filter(|_| ready(5, PollFlags::IN)) {
            post.quiet();
        }
        // An interface that was deleted under us is readable for ever, with errors.
        if ready(1, PollFlags::ERR | PollFlags::NVAL) && !ready(1, PollFlags::IN) {
            let source = io::Error::from_raw_os_error(libc::ENODEV);
            return Err(Broken::Host { what: "the tap is gone", source });
        }
        Ok(Woken {
            rang: listen && (ready(2, PollFlags::IN) || ready(3, PollFlags::IN)),
            control: listen && control.is_some() && ready(4, PollFlags::IN),
        })
    }
}
