//! Stores that do not answer, for a process that has to end all the same.

use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use super::connection::{Link, Shared, lock};

/// Every connection of this process. A list of all, because a process that is told to end has to leave whichever of
/// them it waits on: a server has one of its own, and its devices open others.
static CONNECTIONS: Mutex<Vec<(Weak<Link>, Weak<Shared>)>> = Mutex::new(Vec::new());

pub(super) fn note(link: &Arc<Link>, shared: &Arc<Shared>) {
    let mut all = lock(&CONNECTIONS);
    all.retain(|(_, shared)| shared.strong_count() > 0);
    all.push((Arc::downgrade(link), Arc::downgrade(shared)));
}

/// Breaks each connection of this process on which a request has waited for its reply for at least `limit`, and returns
/// those requests, which are also logged. Their callers, and all later ones on the same connection, get [`Error::Disconnected`].
///
/// For a process that was told to end: it may ask the store a few things on its way out, and a store that is hung must
/// not keep it for ever. One wait cannot be ended by this or by anything: a WATCH on `/dev/xen/xenbus`, during which the
/// kernel waits for the store without regard for signals, SIGKILL included.
///
/// [`Error::Disconnected`]: crate::Error::Disconnected
pub fn abandon_silent(limit: Duration) -> Vec<String> {
    let open: Vec<_> =
        lock(&CONNECTIONS).iter().filter_map(|(link, shared)| Some((link.upgrade()?, shared.upgrade()?))).collect();
    let mut abandoned = Vec::new();
    for (link, shared) in open {
        if let Some((since, request)) = shared.oldest()
            && since.elapsed() >= limit
        {
            // Said first: whoever waited may end the process at once.
            tracing::error!(
                "XenStore did not answer \"{request}\" for {} s: its connection is given up; is xenstored alive, and the \
                 domain that it runs in?",
                since.elapsed().as_secs()
            );
            shared.die();
            // A socket whose buffer is full holds the writer; the device has no such thing.
            if let Link::Socket(stream) = &*link
                && let Err(error) = stream.shutdown(std::net::Shutdown::Both)
            {
                tracing::debug!("shutting down the socket of a silent store: {error}");
            }
            abandoned.push(request);
        }
    }
    abandoned
}
