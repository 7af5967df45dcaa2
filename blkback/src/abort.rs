//! The end of a disk whose server was killed: the guest gets an I/O error for all it waits for, and for all it still asks.
//!
//! Without that a Linux guest waits for ever: its blkfront gives requests no time, and neither state 5 nor state 6 of ours
//! ends those that stand in the ring (blkfront_closing stops its queues and marks the disk dead; only an answer ends a
//! request). So whoever comes after a killed process maps its rings once more, answers what is in flight
//! ([`inflight`]) with an error, says 5, and goes on answering until the guest has let go. No image is opened for it.
//!
//! Linux' blkfront stops its queues at our 5, with requests in them that have not come to the ring. Any event from us has
//! it start them again (blkif_interrupt, kick_pending_request_queues): so it gets one when it has closed, and what then
//! comes is answered too.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use hypervisor::memory::Mapping;
use hypervisor::{Backend, DomId, EventChannel, GrantAccess};
use ring::{BackRing, Layout};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use xenstore_client::xenbus::{Fault, State};
use xenstore_client::{Client, Store};

use crate::abi::{Protocol, Response, Slot, Status, op};
use crate::inflight::{self, Connection, Left, Request};
use crate::negotiate::QueueKeys;
use crate::request::answered_operation;

/// How often a closing guest is looked at.
const OFTEN: Duration = Duration::from_millis(50);
/// For so long nothing may come from a guest that has closed, before its rings are given up.
const QUIET: Duration = Duration::from_secs(2);
/// For so long a guest that was asked to close is waited for. One whose file systems hold the disk open (Linux before
/// 5.14) stays at Closing as long as they do.
const PATIENCE: Duration = Duration::from_secs(20);

/// A ring whose requests get an error.
#[derive(Debug)]
pub struct Remains {
    ring: BackRing<Mapping>,
    channel: Box<dyn EventChannel>,
    protocol: Protocol,
    /// In flight when its server died.
    left: Vec<Request>,
}

/// What an aborted request is answered with. Linux takes BLKIF_RSP_ERROR for an empty flush as "not supported", and
/// that as success; any other failure is an error to it.
fn status(operation: u8) -> Status {
    match operation {
        op::FLUSH_DISKCACHE | op::WRITE_BARRIER => Status::Aborted,
        _ => Status::Error,
    }
}

impl Remains {
    /// Maps a killed server's ring and binds its event channel. `log` is where it kept what was in flight.
    ///
    /// # Errors
    /// When the hypervisor refuses, or nobody knows what is in flight.
    pub fn of(
        xen: &dyn Backend,
        peer: DomId,
        keys: &QueueKeys,
        protocol: Protocol,
        log: Option<&PathBuf>,
    ) -> Result<Self, Fault> {
        let memory = xen
            .map(peer, &keys.ring, GrantAccess::ReadWrite)
            .map_err(|error| Fault::guest(libc::EINVAL, format!("mapping the ring: {error}")))?;
        let layout = Layout::new(protocol.stride(), keys.ring.len());
        let connection = Connection { entries: layout.entries(), gref: keys.ring[0], port: keys.port };
        // Responses that the frontend can see; what the guest writes there harms itself alone.
        let visible = BackRing::resume(&memory, layout, 0).answered();
        let unknown = |why: String| {
            let text = format!(
                "the process that served this disk was killed, and what it had in flight is not known ({why}): the \
                 guest gets no answer to that; destroy the guest"
            );
            Fault::host(libc::EPIPE, text)
        };
        let left = match log {
            Some(path) => inflight::read(path, connection, visible),
            None => Err("no log of it is kept".to_owned()),
        };
        let Left { taken, requests } = match left {
            Ok(left) => left,
            // As many answers as requests: then no log is needed.
            Err(_) if BackRing::resume(&memory, layout, visible).pending() == Ok(0) => {
                Left { taken: visible, requests: Vec::new() }
            }
            Err(why) => return Err(unknown(why)),
        };
        let channel = xen
            .bind(peer, keys.port)
            .map_err(|error| Fault::guest(libc::EINVAL, format!("binding the event channel: {error}")))?;
        Ok(Self { ring: BackRing::resume(memory, layout, taken), channel, protocol, left: requests })
    }

    fn answer(&mut self, request: Request) {
        let Request { id, operation } = request;
        self.ring.respond(Response::new(self.protocol, id, operation, status(operation)).record());
    }

    /// Answers all there is. Returns how many requests that were.
    fn answer_all(&mut self) -> Result<usize, Fault> {
        let broken =
            |error: ring::Overflow| Fault::guest(libc::EINVAL, format!("the frontend broke the ring: {error}"));
        let mut answered = 0;
        for request in std::mem::take(&mut self.left) {
            self.answer(request);
            answered += 1;
        }
        loop {
            let mut slot = Slot::new(self.protocol);
            while self.ring.pending().map_err(broken)? > 0 && self.ring.consume(slot.record()) {
                self.answer(Request { id: slot.id(), operation: answered_operation(&slot) });
                answered += 1;
            }
            if self.ring.publish() {
                self.notify();
            }
            if self.ring.rearm().map_err(broken)? == 0 {
                return Ok(answered);
            }
        }
    }

    fn notify(&self) {
        if let Err(error) = self.channel.notify() {
            tracing::warn!(%error, "notifying a guest whose disk ends");
        }
    }
}

/// What the control thread wants: to go on, to have the guest closed, or an end at once.
const SERVE: u8 = 0;
const CLOSE: u8 = 1;
const END: u8 = 2;

/// A thread that answers all of a disk's rings with errors until the guest has closed.
#[derive(Debug)]
pub struct Abort {
    wish: Arc<AtomicU8>,
    wake: Arc<OwnedFd>,
}

impl Abort {
    /// Begins. `frontend` is the guest's directory; `ended` is called on the thread, when nothing is mapped any more.
    ///
    /// # Errors
    /// When the machine is out of something.
    pub fn begin(
        rings: Vec<Remains>,
        name: String,
        (store, frontend): (Client, String),
        ended: impl FnOnce() + Send + 'static,
    ) -> Result<Self, Fault> {
        let host = |what: &str, error: std::io::Error| {
            Fault::host(error.raw_os_error().unwrap_or(libc::EIO), format!("{what}: {error}"))
        };
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let wake = Arc::new(eventfd(0, flags).map_err(|error| host("eventfd", error.into()))?);
        let wish = Arc::new(AtomicU8::new(SERVE));
        let mut work = Work {
            rings,
            wish: Arc::clone(&wish),
            wake: Arc::clone(&wake),
            store,
            state: format!("{frontend}/state"),
            closing_since: None,
            closed: false,
            active: Instant::now(),
        };
        let body = move || {
            let _span = tracing::info_span!("abort", name = work.state).entered();
            let answered = work.run();
            tracing::info!(answered, "all that the guest waited for has ended with an error");
            drop(work);
            ended();
        };
        std::thread::Builder::new().name(name).spawn(body).map_err(|error| host("starting a thread", error))?;
        Ok(Self { wish, wake })
    }

    /// The guest is being told to close: the thread ends when it has, or does not.
    pub fn close(&self) {
        self.tell(CLOSE);
    }

    fn tell(&self, wish: u8) {
        self.wish.store(wish, Ordering::Release);
        if let Err(error) = rustix::io::write(&self.wake, &1u64.to_ne_bytes()) {
            tracing::error!(%error, "cannot wake a thread");
        }
    }
}

impl Drop for Abort {
    fn drop(&mut self) {
        self.tell(END);
    }
}

struct Work {
    rings: Vec<Remains>,
    wish: Arc<AtomicU8>,
    wake: Arc<OwnedFd>,
    store: Client,
    /// The frontend's `state` node.
    state: String,
    closing_since: Option<Instant>,
    /// The guest has closed, and has had its event.
    closed: bool,
    /// When the guest last asked for something.
    active: Instant,
}

impl Work {
    fn run(&mut self) -> usize {
        let mut answered = 0;
        while !self.is_over() {
            let mut now = 0;
            self.rings.retain_mut(|ring| match ring.answer_all() {
                Ok(count) => {
                    now += count;
                    true
                }
                Err(fault) => {
                    tracing::warn!("{fault}");
                    false
                }
            });
            if now > 0 {
                answered += now;
                self.active = Instant::now();
            }
            if self.closing_since.is_some() && !self.closed && self.has_left() {
                self.closed = true;
                self.active = Instant::now();
                self.rings.iter().for_each(Remains::notify);
            }
            self.sleep();
        }
        answered
    }

    fn is_over(&mut self) -> bool {
        match self.wish.load(Ordering::Acquire) {
            SERVE => return false,
            CLOSE => {}
            _ => return true,
        }
        let since = *self.closing_since.get_or_insert_with(Instant::now);
        match self.closed {
            true => self.active.elapsed() > QUIET,
            false => since.elapsed() > PATIENCE,
        }
    }

    /// Whether the guest has closed, or is gone.
    fn has_left(&self) -> bool {
        match self.store.read_opt(&self.state) {
            Ok(state) => !matches!(
                state.as_deref().and_then(State::parse),
                Some(
                    State::Initialised | State::Connected | State::Closing | State::Reconfiguring | State::Reconfigured
                )
            ),
            Err(error) => {
                tracing::debug!(%error, "reading the frontend's state");
                true
            }
        }
    }

    fn sleep(&self) {
        let fds: Vec<_> = self.rings.iter().map(|ring| ring.channel.fd()).chain([self.wake.as_fd()]).collect();
        let mut polled: Vec<_> = fds.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        for ring in &self.rings {
            if let Err(error) = ring.channel.unmask() {
                tracing::warn!(%error, "event channel");
            }
        }
        let longest = if self.wish.load(Ordering::Acquire) == SERVE { Duration::from_secs(1) } else { OFTEN };
        let timeout = Timespec::try_from(longest).ok();
        // Whatever ends it: all is looked at anew.
        let _ = poll(&mut polled, timeout.as_ref());
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        for ring in &self.rings {
            if let Err(error) = ring.channel.take() {
                tracing::warn!(%error, "event channel");
            }
        }
    }
}
