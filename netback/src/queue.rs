//! One queue of a vif: both directions, and the tap's queue behind them.
//!
//! A queue has no thread and never waits: [`worker`](crate::worker) drives it, and a test can single-step it.
//! [`Queue::turn`] moves what can be moved now; when nothing can, [`Queue::rearm`] asks the guest to notify us, and the
//! thread sleeps until it does, the tap has a frame, or [`Queue::deadline`] has come.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use hypervisor::EventChannel;
use xenstore_client::LogGate;

use crate::broken::Broken;
use crate::channels::Channels;
use crate::counters::Counters;
use crate::credit::{Limit, Rate};
use crate::ctrl::{self, Control};
use crate::rx::{Pages, Rx};
use crate::steer::Post;
use crate::tap::Tap;
use crate::tx::Tx;

/// What may change while a vif is connected, shared by its queues.
#[derive(Debug)]
pub struct Live {
    /// What the guest may send.
    limit: Limit,
    /// Queues whose guest has no pages: while there is one, the tap has no carrier.
    stalled: AtomicU32,
}

impl Live {
    /// For a vif of which `stalled` queues begin without pages.
    pub fn new(rate: Option<Rate>, stalled: u32) -> Self {
        Self { limit: Limit::new(rate, Instant::now()), stalled: AtomicU32::new(stalled) }
    }

    /// Sets the rate. The queues have to be woken to see it.
    pub fn set_rate(&self, rate: Option<Rate>) {
        self.limit.set(rate, Instant::now());
    }

    /// What the guest may send.
    pub fn limit(&self) -> &Limit {
        &self.limit
    }
}

/// What a turn did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Packets taken from the guest.
    pub sent: u32,
    /// Frames read from the tap or given to the guest.
    pub received: u32,
    /// Requests of the control ring that were answered. A guest that only configures is not one that rings for nothing.
    pub answered: u32,
}

impl Progress {
    /// Whether there was nothing to do.
    pub fn is_idle(self) -> bool {
        self == Self::default()
    }
}

/// What a queue is made of.
#[derive(Debug)]
pub struct Parts {
    /// From the guest to the tap.
    pub tx: Tx,
    /// From the tap to the guest.
    pub rx: Rx,
    /// This queue of the tap.
    pub tap: Tap,
    /// The event channels.
    pub channels: Channels,
    /// The vif's control ring, which one of its queues serves.
    pub control: Option<Control>,
    /// Shared with the vif's other queues.
    pub live: Arc<Live>,
    /// Read by others.
    pub counters: Arc<Counters>,
    /// The rings are those of a backend that died, and that may have owed the guest a notification.
    pub resumed: bool,
}

/// Both directions of one queue.
#[derive(Debug)]
pub struct Queue {
    parts: Parts,
    /// The generation of the rate in use.
    generation: u64,
    log: LogGate,
}

impl Queue {
    /// Puts a queue together. The frontend may already have made requests.
    pub fn new(parts: Parts) -> Self {
        Self { parts, generation: 0, log: LogGate::default() }
    }

    /// The tap, for who drives the queue.
    pub fn tap(&self) -> &Tap {
        &self.parts.tap
    }

    /// The event channels, for who drives the queue.
    pub fn channels(&self) -> &Channels {
        &self.parts.channels
    }

    /// The control ring's event channel, for who drives the queue.
    pub fn control(&self) -> Option<&dyn EventChannel> {
        self.parts.control.as_ref().map(Control::channel)
    }

    /// Where other queues leave what they read for this one, for who drives the queue.
    pub fn post(&self) -> Option<&Post> {
        self.parts.rx.post()
    }

    /// Whether a frame from the tap would be read now.
    pub fn wants_frames(&self) -> bool {
        self.parts.rx.wants_frames()
    }

    /// Does what can be done now, without waiting.
    ///
    /// # Errors
    /// When the queue must stop.
    pub fn turn(&mut self, now: Instant) -> Result<Progress, Broken> {
        self.follow_rate(now);
        let Parts { tx, rx, tap, channels, control, counters, resumed, .. } = &mut self.parts;
        let mut answered = 0;
        if let Some(control) = control {
            let tell;
            (answered, tell) = control.turn().map_err(control_broken)?;
            if tell {
                control.channel().notify().map_err(channel_failed)?;
            }
        }
        let (sent, tell_sent) = tx.turn(tap, now)?;
        let (received, tell_received) = rx.turn(tap, now)?;
        let owed = std::mem::take(resumed);
        let events = channels.notify(tell_sent | owed, tell_received | owed).map_err(channel_failed)?;
        counters.notifications.add(events);
        if let Some(pages) = rx.pages(now) {
            self.carry(pages)?;
        }
        Ok(Progress { sent, received, answered })
    }

    fn follow_rate(&mut self, now: Instant) {
        let generation = self.parts.live.limit.generation();
        if generation != self.generation {
            self.generation = generation;
            self.parts.tx.rate_changed(now);
        }
    }

    /// The carrier is there as long as the guest has pages for every queue.
    fn carry(&mut self, pages: Pages) -> Result<(), Broken> {
        let stalled = &self.parts.live.stalled;
        let (change, on) = match pages {
            Pages::Ready => (stalled.fetch_sub(1, Ordering::AcqRel) == 1, true),
            Pages::Stalled => (stalled.fetch_add(1, Ordering::AcqRel) == 0, false),
        };
        if !change {
            return Ok(());
        }
        if let Some(unsaid) = self.log.admit() {
            let what = if on { "guest is ready to receive: carrier on" } else { "guest receives nothing: carrier off" };
            tracing::info!(unsaid, "{what}");
        }
        let failed = |error: crate::tap::TapError| Broken::Host { what: error.what, source: error.source };
        self.parts.tap.set_carrier(on).map_err(failed)
    }

    /// Whether [`turn`](Self::turn) would find something that the guest did.
    ///
    /// # Errors
    /// When the guest broke a ring.
    #[inline]
    pub fn has_work(&mut self) -> Result<bool, Broken> {
        Ok(self.parts.tx.pending()? > 0 || self.parts.rx.has_pages()?)
    }

    /// Asks the guest to notify us. True when there is work already, and sleeping would be wrong.
    ///
    /// # Errors
    /// When the guest broke a ring.
    pub fn rearm(&mut self) -> Result<bool, Broken> {
        let control = match &mut self.parts.control {
            Some(control) => control.rearm().map_err(control_broken)?,
            None => false,
        };
        Ok(self.parts.tx.rearm()? | self.parts.rx.rearm()? | control)
    }

    /// When something has to be done even if nothing happens.
    pub fn deadline(&self) -> Option<Instant> {
        match (self.parts.tx.held_until(), self.parts.rx.deadline()) {
            (Some(tx), Some(rx)) => Some(tx.min(rx)),
            (tx, rx) => tx.or(rx),
        }
    }
}

fn channel_failed(source: io::Error) -> Broken {
    Broken::Host { what: "event channel", source }
}

fn control_broken(broken: ctrl::Broken) -> Broken {
    match broken {
        ctrl::Broken::Ring(source) => Broken::Ring { ring: "control", source },
        ctrl::Broken::Copy(error) => Broken::Copy(error),
    }
}
