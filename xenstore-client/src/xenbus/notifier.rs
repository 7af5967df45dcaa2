//! How a device's threads speak to the driver's thread.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use crossbeam::channel::{Receiver, Sender, unbounded};

use super::Fault;
use crate::wake::Wake;

/// What a device reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Note {
    /// See [`Notifier::disconnected`].
    Disconnected,
    /// See [`Notifier::fault`].
    Fault(Fault),
    /// See [`Notifier::publish`].
    Publish(Vec<(String, String)>),
    /// See [`Notifier::tell`].
    Tell(String, Option<String>),
    /// See [`Notifier::retry`].
    Retry,
    /// See [`Notifier::answered`].
    Answered,
    /// See [`Notifier::released`].
    Released,
}

/// A device's voice towards the driver. Cheap to clone; usable from every thread; never blocks. What is said after the
/// device is forgotten is lost, and cannot reach a later device with the same number.
#[derive(Debug, Clone)]
pub struct Notifier {
    sender: Sender<(u64, Note)>,
    wake: Arc<Wake>,
    serial: u64,
}

impl Notifier {
    /// A notifier and its receiver, outside of any driver: for a device's own tests.
    ///
    /// # Errors
    /// If no eventfd can be made.
    pub fn channel() -> io::Result<(Self, Notes)> {
        let (sender, receiver) = unbounded();
        let wake = Arc::new(Wake::new()?);
        Ok((Self { sender, wake: wake.clone(), serial: 0 }, Notes { receiver, wake }))
    }

    /// The voice of another device, heard by the same receiver.
    pub(crate) fn for_device(&self, serial: u64) -> Self {
        Self { serial, ..self.clone() }
    }

    /// The answer to [`Device::disconnect`](super::Device::disconnect): nothing is in flight or mapped any more.
    pub fn disconnected(&self) {
        self.send(Note::Disconnected);
    }

    /// The device cannot go on. `disconnect` will follow. Further faults until then only reach the log.
    pub fn fault(&self, fault: Fault) {
        self.send(Note::Fault(fault));
    }

    /// Publishes changed keys (say `sectors` of a grown disk) together with the same state 4, in one transaction: a
    /// blkfront reads them again. Ignored while not connected.
    pub fn publish(&self, keys: Vec<(String, String)>) {
        self.send(Note::Publish(keys));
    }

    /// Writes a key of our own directory for administrators and tools to read, or removes it. The frontend is not to
    /// notice: the state is not written again.
    pub fn tell(&self, key: impl Into<String>, value: Option<String>) {
        self.send(Note::Tell(key.into(), value));
    }

    /// What [`Device::may_connect`](super::Device::may_connect) waited for has come: it is to be asked again.
    pub fn retry(&self) {
        self.send(Note::Retry);
    }

    /// What the device does elsewhere has come to an end: [`Device::answered`](super::Device::answered) is called.
    pub fn answered(&self) {
        self.send(Note::Answered);
    }

    /// The answer to [`Device::release`](super::Device::release), if that was not done at once.
    pub fn released(&self) {
        self.send(Note::Released);
    }

    fn send(&self, note: Note) {
        // An error means that the driver is gone, and everything it could be told with it.
        if self.sender.send((self.serial, note)).is_ok() {
            self.wake.set();
        }
    }
}

/// The receiving end of a [`Notifier`].
#[derive(Debug)]
pub struct Notes {
    receiver: Receiver<(u64, Note)>,
    wake: Arc<Wake>,
}

impl Notes {
    /// Readable (poll) while there may be something to take.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// The next note, if there is one.
    pub fn take(&self) -> Option<Note> {
        self.take_tagged().map(|(_, note)| note)
    }

    /// Waits for the next note; `None` after `timeout`.
    #[must_use]
    pub fn wait(&self, timeout: std::time::Duration) -> Option<Note> {
        self.receiver.recv_timeout(timeout).ok().map(|(_, note)| note)
    }

    pub(crate) fn take_tagged(&self) -> Option<(u64, Note)> {
        if let Ok(tagged) = self.receiver.try_recv() {
            return Some(tagged);
        }
        // Cleared only when empty, and looked at once more afterwards: a note sent in between is not overslept.
        self.wake.clear();
        self.receiver.try_recv().ok()
    }
}
