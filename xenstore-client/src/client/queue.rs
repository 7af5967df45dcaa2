//! Watch events between the reader thread and one watcher.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::connection::lock;
use crate::wake::Wake;
use crate::{Error, Result};

/// Most distinct paths that wait. A watched tree can hold any number of nodes, and guests write some of them.
const MOST_EVENTS: usize = 1024;

/// A watch that fired. An event says "look again", not what happened: several changes may have become one event.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct WatchEvent {
    /// The node that changed, in the form (absolute or relative) the watch was set; the watched path itself when more
    /// changes were under way than are kept apart: look at everything below.
    pub path: String,
    /// The token the watch was set with.
    pub token: String,
}

/// Events of one watcher: each (path, token) waits at most once, and at most [`MOST_EVENTS`] and one per watch wait at
/// all; still no change goes unreported, because a surplus event is reported as its whole watch.
#[derive(Debug)]
pub(super) struct Queue {
    state: Mutex<State>,
    changed: Condvar,
    wake: Wake,
}

#[derive(Debug, Default)]
struct State {
    events: VecDeque<WatchEvent>,
    waiting: HashSet<WatchEvent>,
    /// The paths watched with each token.
    watches: HashMap<String, HashSet<String>>,
    dead: bool,
}

impl Queue {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { state: Mutex::default(), changed: Condvar::new(), wake: Wake::new()? })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Notes a watch before it is set, so that its first event finds it. `false`: it is set already.
    pub(super) fn register(&self, path: &str, token: &str) -> bool {
        lock(&self.state).watches.entry(token.to_owned()).or_default().insert(path.to_owned())
    }

    /// Forgets a watch and its events. `false`: there is no such watch.
    pub(super) fn unregister(&self, path: &str, token: &str) -> bool {
        let mut state = lock(&self.state);
        let Some(paths) = state.watches.get_mut(token) else { return false };
        if !paths.remove(path) {
            return false;
        }
        if paths.is_empty() {
            state.watches.remove(token);
        }
        let State { events, waiting, watches, .. } = &mut *state;
        events.retain(|event| {
            let wanted = watch_of(watches, &event.path, &event.token).is_some();
            if !wanted {
                waiting.remove(event);
            }
            wanted
        });
        self.settle(&state);
        true
    }

    pub(super) fn watches(&self) -> Vec<(String, String)> {
        let state = lock(&self.state);
        let pairs = state.watches.iter().flat_map(|(token, paths)| paths.iter().map(|p| (p.clone(), token.clone())));
        pairs.collect()
    }

    pub(super) fn forget_all(&self) {
        let mut state = lock(&self.state);
        let dead = state.dead;
        *state = State { dead, ..State::default() };
        self.settle(&state);
    }

    pub(super) fn push(&self, path: &str, token: &str) {
        let mut state = lock(&self.state);
        // An event that was on its way while its watch was removed.
        let Some(watch) = watch_of(&state.watches, path, token) else { return };
        let path = if state.events.len() < MOST_EVENTS { path } else { watch };
        let event = WatchEvent { path: path.to_owned(), token: token.to_owned() };
        if state.waiting.insert(event.clone()) {
            state.events.push_back(event);
            self.wake.set();
            self.changed.notify_all();
        }
    }

    pub(super) fn die(&self) {
        lock(&self.state).dead = true;
        self.wake.set();
        self.changed.notify_all();
    }

    pub(super) fn next(&self) -> Result<Option<WatchEvent>> {
        self.pop(&mut lock(&self.state))
    }

    pub(super) fn wait(&self, timeout: Duration) -> Result<Option<WatchEvent>> {
        let deadline = Instant::now().checked_add(timeout);
        let mut state = lock(&self.state);
        loop {
            if let Some(event) = self.pop(&mut state)? {
                return Ok(Some(event));
            }
            // A timeout beyond the clock's end is no timeout; an hour at a time will do.
            let left = deadline.map_or(Duration::from_secs(3600), |end| end.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return Ok(None);
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// What already arrived comes before the news that nothing more will.
    fn pop(&self, state: &mut State) -> Result<Option<WatchEvent>> {
        let event = state.events.pop_front();
        if let Some(event) = &event {
            state.waiting.remove(event);
        }
        self.settle(state);
        match event {
            None if state.dead => Err(Error::Disconnected),
            event => Ok(event),
        }
    }

    /// Keeps the fd readable exactly while `next` has something to say.
    fn settle(&self, state: &State) {
        if state.events.is_empty() && !state.dead {
            self.wake.clear();
        }
    }
}

/// The watched path that `path` lies at or below.
fn watch_of<'a>(watches: &'a HashMap<String, HashSet<String>>, path: &str, token: &str) -> Option<&'a str> {
    let below = |watch: &&String| {
        watch.as_str() == "/"
            || path.strip_prefix(watch.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    watches.get(token)?.iter().find(below).map(String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_storm_is_bounded_and_nothing_is_lost() -> Result<(), Box<dyn std::error::Error>> {
        let queue = Queue::new()?;
        assert!(queue.register("/a", "t"));
        for round in 0..3 {
            for i in 0..5000 {
                queue.push(&format!("/a/{i}"), "t");
                queue.push(&format!("/b/{i}"), "t");
            }
            assert_eq!(lock(&queue.state).events.len(), MOST_EVENTS + 1, "round {round}");
        }
        let mut whole = false;
        while let Some(event) = queue.next()? {
            whole |= event.path == "/a";
        }
        assert!(whole, "the surplus is reported as the whole watch");
        queue.push("/a/1", "t");
        assert!(queue.unregister("/a", "t"));
        assert_eq!(queue.next()?, None);
        queue.die();
        assert!(matches!(queue.next(), Err(Error::Disconnected)));
        Ok(())
    }
}
