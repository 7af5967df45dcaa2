//! One pair of rings and what wakes their driver.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use hypervisor::{DomId, EventChannel, Guest};
use rustix::event::{PollFd, PollFlags};

use super::{Error, Options, Rx, Tx};
use crate::abi::RING_SLOTS;

/// Both rings of a queue, and their event channels. A plain struct: whoever has it drives it.
#[derive(Debug)]
pub struct Queue {
    /// What is sent.
    pub tx: Tx,
    /// What is received.
    pub rx: Rx,
    /// For both directions, or for sending alone.
    channel: Box<dyn EventChannel>,
    /// For receiving, where each direction has one.
    rx_channel: Option<Box<dyn EventChannel>>,
    /// Whether the backend is to be told of receive requests.
    rx_notify: bool,
}

impl Queue {
    pub(super) fn new(guest: &dyn Guest, backend: DomId, options: &Options) -> Result<Self, Error> {
        let second = options.split_channels.then(|| guest.alloc_unbound(backend)).transpose()?;
        Ok(Self {
            tx: Tx::new(guest, backend)?,
            rx: Rx::new(guest, backend)?,
            channel: guest.alloc_unbound(backend)?,
            rx_channel: second,
            rx_notify: options.rx_notify,
        })
    }

    /// Its keys in XenStore.
    pub(super) fn keys(&self) -> impl Iterator<Item = (&'static str, String)> {
        let names = if self.rx_channel.is_some() { "event-channel-tx" } else { "event-channel" };
        let rx = self.rx_channel.as_ref().map(|channel| ("event-channel-rx", channel.port().to_string()));
        [
            ("tx-ring-ref", self.tx.ring_ref().to_string()),
            ("rx-ring-ref", self.rx.ring_ref().to_string()),
            (names, self.channel.port().to_string()),
        ]
        .into_iter()
        .chain(rx)
    }

    /// Offers all pages to receive into.
    pub(super) fn fill(&mut self) -> Result<(), Error> {
        self.rx.refill(usize::MAX);
        self.publish()
    }

    /// The event channel of the transmit ring.
    pub fn tx_channel(&self) -> &dyn EventChannel {
        &*self.channel
    }

    /// The event channel of the receive ring; perhaps the same.
    pub fn rx_channel(&self) -> &dyn EventChannel {
        self.rx_channel.as_deref().unwrap_or(&*self.channel)
    }

    /// Shows what was put into both rings to the backend, and notifies it where it asked for that.
    ///
    /// # Errors
    /// When an event channel fails.
    #[inline]
    pub fn publish(&mut self) -> Result<(), Error> {
        let tx = self.tx.publish();
        let rx = self.rx.publish() && self.rx_notify;
        let failed = |error| hypervisor::Error::io("notify", error);
        if tx || (rx && self.rx_channel.is_none()) {
            self.channel.notify().map_err(failed)?;
        }
        if rx && let Some(channel) = &self.rx_channel {
            channel.notify().map_err(failed)?;
        }
        Ok(())
    }

    /// Takes back what was sent, offers again what was received, and shows it all to the backend.
    ///
    /// # Errors
    /// When the backend broke a ring, or an event channel fails.
    pub fn pump(&mut self) -> Result<(), Error> {
        self.tx.reap()?;
        self.rx.refill(usize::MAX);
        self.publish()
    }

    /// Whether something waits to be taken from the rings.
    ///
    /// # Errors
    /// When the backend broke a ring.
    #[inline]
    pub fn has_work(&mut self) -> Result<bool, Error> {
        Ok(self.rx.has_response()? || self.tx.has_response()?)
    }

    /// Sleeps until a frame was received, something that was sent is answered while much of the ring waits for that,
    /// `other` becomes readable, or `timeout` is over. True when something waits to be taken from the rings.
    ///
    /// # Errors
    /// When the backend broke a ring, or waiting fails.
    pub fn wait(&mut self, other: Option<BorrowedFd<'_>>, timeout: Duration) -> Result<bool, Error> {
        // Answers to what was sent are only waited for when pages run short; they can be taken any time.
        let short = self.tx.free() < RING_SLOTS / 2;
        self.wait_for(short, other, timeout)
    }

    /// As [`wait`](Self::wait), and every answer to what was sent counts.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn wait_any(&mut self, timeout: Duration) -> Result<bool, Error> {
        self.wait_for(true, None, timeout)
    }

    fn wait_for(&mut self, sent: bool, other: Option<BorrowedFd<'_>>, timeout: Duration) -> Result<bool, Error> {
        if self.rx.rearm()? || (sent && self.tx.rearm()?) {
            return Ok(true);
        }
        let failed = |error| hypervisor::Error::io("event channel", error);
        let channels = [Some(&self.channel), self.rx_channel.as_ref()];
        for channel in channels.into_iter().flatten() {
            channel.unmask().map_err(failed)?;
        }
        let polled = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let mut fds =
            [polled(self.channel.fd()), polled(self.rx_channel().fd()), polled(other.unwrap_or(self.channel.fd()))];
        let limit = rustix::event::Timespec::try_from(timeout).ok();
        match rustix::event::poll(&mut fds, limit.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(failed(error.into()).into()),
        }
        for channel in channels.into_iter().flatten() {
            channel.take().map_err(failed)?;
        }
        self.has_work()
    }

    /// Takes the pages back.
    pub(super) fn release(self, guest: &dyn Guest) -> Result<(), Error> {
        let Self { tx, rx, channel, rx_channel, .. } = self;
        drop((channel, rx_channel));
        tx.release(guest)?;
        rx.release(guest)
    }
}
