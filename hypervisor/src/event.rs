//! Event channels: one bit from one domain to another (xen/include/public/event_channel.h).

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;

/// A domain's end of an event channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Port(pub u32);

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Our end of one event channel, bound or waiting to be bound. Dropping it closes the port; the peer's port then
/// goes back to unbound, reserved for us.
///
/// The life of an event is that of /dev/xen/evtchn: the peer notifies, [`fd`](Self::fd) becomes readable,
/// [`take`](Self::take) takes the event and leaves the port masked, the work is done, and only then
/// [`unmask`](Self::unmask) writes the port back. Events that arrive in between are remembered and make the
/// descriptor readable at the write-back. Not writing back before the work is done is what bounds an event storm
/// (XSA-332).
pub trait EventChannel: fmt::Debug + Send {
    /// Our port.
    fn port(&self) -> Port;

    /// Readable while an event waits to be taken. For poll only; never read it.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Takes the event that waits, if one does, and leaves the port masked.
    ///
    /// # Errors
    /// When the descriptor fails.
    fn take(&self) -> io::Result<bool>;

    /// Writes the port back: from now on events make [`fd`](Self::fd) readable again. Does nothing on a port that is
    /// not masked.
    ///
    /// # Errors
    /// When the descriptor fails.
    fn unmask(&self) -> io::Result<()>;

    /// Raises an event at the peer's end. On a port nobody is bound to the event is dropped, as on Xen.
    ///
    /// # Errors
    /// When the descriptor fails.
    fn notify(&self) -> io::Result<()>;
}
