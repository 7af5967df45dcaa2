//! A queue's event channels: one for both directions, or one for each.

use std::io;
use std::os::fd::BorrowedFd;

use hypervisor::EventChannel;

/// The event channels of one queue.
#[derive(Debug)]
pub enum Channels {
    /// One for both directions.
    Shared(Box<dyn EventChannel>),
    /// One each (`feature-split-event-channels`).
    Split {
        /// For what the guest sends.
        tx: Box<dyn EventChannel>,
        /// For what it receives.
        rx: Box<dyn EventChannel>,
    },
}

impl Channels {
    fn each(&self) -> impl Iterator<Item = &dyn EventChannel> {
        let (first, second) = match self {
            Self::Shared(both) => (both, None),
            Self::Split { tx, rx } => (tx, Some(rx)),
        };
        std::iter::once(&**first).chain(second.map(|channel| &**channel))
    }

    /// What becomes readable when the guest notifies.
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.each().map(EventChannel::fd)
    }

    /// Takes the events that wait. True if there were any.
    ///
    /// # Errors
    /// When a descriptor fails.
    pub fn take(&self) -> io::Result<bool> {
        self.each().try_fold(false, |rang, channel| Ok(channel.take()? | rang))
    }

    /// Writes the ports back.
    ///
    /// # Errors
    /// When a descriptor fails.
    pub fn unmask(&self) -> io::Result<()> {
        self.each().try_for_each(EventChannel::unmask)
    }

    /// Tells the guest that there are responses: to what it sent, or to what it receives. Returns how many events that
    /// took.
    ///
    /// # Errors
    /// When a descriptor fails.
    pub fn notify(&self, sent: bool, received: bool) -> io::Result<u64> {
        match self {
            Self::Shared(both) if sent || received => both.notify().map(|()| 1),
            Self::Shared(_) => Ok(0),
            Self::Split { tx, rx } => {
                if sent {
                    tx.notify()?;
                }
                if received {
                    rx.notify()?;
                }
                Ok(u64::from(sent) + u64::from(received))
            }
        }
    }
}
