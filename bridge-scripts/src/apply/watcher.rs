//! A thread that looks at what the kernel tells, until somebody says that it is enough.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// The thread. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Watcher {
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    /// Starts `body`, which is to wait by [`Stop::wait`].
    pub(super) fn start(name: &str, body: impl FnOnce(&Stop) + Send + 'static) -> io::Result<Self> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC)?;
        let stopped = Stop { fd: stop.try_clone()?, what: name.to_owned() };
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || body(&stopped))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // The counter of an eventfd takes far more than one.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // A panic has been printed, and there is nothing to clean up after it.
            let _ = thread.join();
        }
    }
}

/// How a watcher's thread learns that it is enough.
pub(super) struct Stop {
    fd: OwnedFd,
    what: String,
}

impl Stop {
    /// Waits until there is something to read, or for so long. Whether to go on.
    pub(super) fn wait(&self, told: BorrowedFd<'_>, most: Option<Duration>) -> bool {
        let stop = self.fd.as_fd();
        let mut fds = [PollFd::from_borrowed_fd(told, PollFlags::IN), PollFd::new(&stop, PollFlags::IN)];
        let timeout = most.and_then(|most| Timespec::try_from(most).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => fds[1].revents().is_empty(),
            Err(rustix::io::Errno::INTR) => true,
            Err(error) => {
                tracing::error!(%error, "{}: nothing is watched any more", self.what);
                false
            }
        }
    }
}
