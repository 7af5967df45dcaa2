//! A set of watches with its own queue.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use super::WatchEvent;
use super::connection::Connection;
use super::queue::Queue;
use crate::wire::{MessageType, check_watch_path};
use crate::{Error, ErrorCode, Result};

/// A set of watches with a queue and an fd of its own, independent of other watchers of the same [`Client`]. Dropping
/// it removes its watches.
///
/// A new watch fires once at once, whether the path exists or not; afterwards for every change at or below the path.
///
/// [`Client`]: crate::Client
#[derive(Debug)]
pub struct Watcher {
    connection: Arc<Connection>,
    queue: Arc<Queue>,
    number: u64,
}

impl Watcher {
    pub(super) fn new(connection: Arc<Connection>) -> Result<Self> {
        let queue = Arc::new(Queue::new().map_err(|e| Error::io("eventfd", e))?);
        let number = connection.add_queue(queue.clone())?;
        Ok(Self { connection, queue, number })
    }

    /// Watches a path (or `@introduceDomain`, `@releaseDomain`). `token` comes back in the events.
    ///
    /// # Errors
    /// EEXIST if the same path and token are watched already, E2BIG if a guest has too many watches.
    pub fn add(&self, path: &str, token: &str) -> Result<()> {
        check_watch_path(path).map_err(|reason| Error::Invalid { path: path.to_owned(), reason })?;
        if token.contains('\0') {
            return Err(Error::Invalid { path: path.to_owned(), reason: "the token contains NUL" });
        }
        if !self.queue.register(path, token) {
            return Err(Error::Store { op: MessageType::Watch, path: path.to_owned(), code: ErrorCode::Exists });
        }
        self.request(MessageType::Watch, path, token).inspect_err(|_| {
            self.queue.unregister(path, token);
        })
    }

    /// Removes a watch. No event of it comes out of the queue afterwards.
    ///
    /// # Errors
    /// ENOENT if there is no such watch.
    pub fn remove(&self, path: &str, token: &str) -> Result<()> {
        if !self.queue.unregister(path, token) {
            return Err(Error::Store { op: MessageType::Unwatch, path: path.to_owned(), code: ErrorCode::NotFound });
        }
        self.request(MessageType::Unwatch, path, token)
    }

    /// Readable (poll) while [`Watcher::next`] has something to say: an event, or that the connection is lost.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.queue.fd()
    }

    /// The next event, if there is one.
    ///
    /// # Errors
    /// [`Error::Disconnected`] once the connection is lost and all events before that are taken.
    pub fn next(&self) -> Result<Option<WatchEvent>> {
        self.queue.next()
    }

    /// Waits for the next event; `None` after `timeout`.
    ///
    /// # Errors
    /// As [`Watcher::next`].
    pub fn wait(&self, timeout: Duration) -> Result<Option<WatchEvent>> {
        self.queue.wait(timeout)
    }

    fn request(&self, kind: MessageType, path: &str, token: &str) -> Result<()> {
        // The number leads the reader thread to this queue.
        let token = format!("{}:{token}\0", self.number);
        self.connection.request(kind, 0, path, &[path.as_bytes(), b"\0", token.as_bytes()]).map(drop)
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.connection.remove_queue(self.number);
        for (path, token) in self.queue.watches() {
            match self.request(MessageType::Unwatch, &path, &token) {
                Ok(()) => {}
                // With the connection, the store has dropped the watches by itself.
                Err(Error::Disconnected) => break,
                Err(error) => tracing::debug!("leftover watch: {error}"),
            }
        }
    }
}
