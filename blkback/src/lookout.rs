//! A thread that looks whether something has come that a disk waits for.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{CreateFlags, WatchFlags, add_watch, init};

/// How often it looks.
const OFTEN: Duration = Duration::from_millis(250);
/// The same where it is rung for.
const SELDOM: Duration = Duration::from_secs(1);

/// A thread that looks whether something has come. Dropped, it says nothing any more, and ends.
#[derive(Debug)]
pub struct Lookout {
    over: Arc<AtomicBool>,
    thread: Thread,
}

impl Lookout {
    /// Calls `ready` on a thread of its own when `has_come` says so. It is asked four times a second; or each second, and
    /// when somebody who had `closed` open closes it.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn new(
        closed: Option<&Path>,
        mut has_come: impl FnMut() -> bool + Send + 'static,
        ready: impl FnOnce() + Send + 'static,
    ) -> std::io::Result<Self> {
        let over = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&over);
        // Where there is no inotify, looking often has to do.
        let bell = closed.and_then(bell);
        let thread = std::thread::Builder::new().name("lookout".to_owned()).spawn(move || {
            while !has_come() {
                sleep(bell.as_ref());
                if told.load(Ordering::Acquire) {
                    return;
                }
            }
            if !told.load(Ordering::Acquire) {
                ready();
            }
        })?;
        Ok(Self { over, thread: thread.thread().clone() })
    }
}

impl Drop for Lookout {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

/// Rings when a file is closed.
fn bell(path: &Path) -> Option<OwnedFd> {
    let bell = init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).ok()?;
    add_watch(&bell, path, WatchFlags::CLOSE_WRITE | WatchFlags::CLOSE_NOWRITE).ok()?;
    Some(bell)
}

fn sleep(bell: Option<&OwnedFd>) {
    let Some(bell) = bell else { return std::thread::park_timeout(OFTEN) };
    let longest = Timespec { tv_sec: SELDOM.as_secs().cast_signed(), tv_nsec: 0 };
    if poll(&mut [PollFd::new(&bell.as_fd(), PollFlags::IN)], Some(&longest)).is_ok_and(|rung| rung > 0) {
        let mut events = [0; 4096];
        while rustix::io::read(bell, &mut events).is_ok_and(|bytes| bytes > 0) {}
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    #[test]
    fn it_looks_when_a_file_is_closed_and_says_so_once() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (told, ready) = std::sync::mpsc::channel();
        let looks = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&looks);
        let _lookout = Lookout::new(
            Some(file.path()),
            move || counted.fetch_add(1, Ordering::AcqRel) > 0,
            move || told.send(()).unwrap(),
        )
        .unwrap();
        drop(std::fs::File::open(file.path()).unwrap());
        ready.recv().unwrap();
        assert!(looks.load(Ordering::Acquire) > 1);
        ready.recv().expect_err("once");
    }

    #[test]
    fn a_dropped_one_is_silent() {
        let (told, ready) = std::sync::mpsc::channel::<()>();
        drop(Lookout::new(None, || false, move || told.send(()).unwrap()).unwrap());
        ready.recv().expect_err("its thread has ended");
    }
}
