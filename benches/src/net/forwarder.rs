//! A program between two taps that reads each frame from one and writes it to the other: the least that a backend in
//! user space does, without rings, grants and checks.

use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use hypervisor::memory::{IoList, Mapping};
use netback::tap::{Features, Tap};
use netback::vnet::Offload;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::Failure;

/// Threads of forwarders have names that begin like this.
pub const THREADS: &str = "forwarder";
/// Bytes of the largest frame with its header.
const FRAME: usize = Offload::SIZE + 14 + 65536;
/// Frames in one direction before the other has its turn.
const TURN: u32 = 64;

/// A running forwarder. It ends when this is dropped, and its taps with it.
#[derive(Debug)]
pub struct Forwarder {
    stop: Arc<OwnedFd>,
    lost: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Forwarder {
    /// Joins two taps. With `offload` frames are handed on unfinished, checksums and segments left to whoever needs them;
    /// without, the kernel finishes each before it is read.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn start(taps: [Tap; 2], offload: bool) -> Result<Self, Failure> {
        for tap in &taps {
            tap.set_features(Features { checksum: offload, tso4: offload, tso6: offload })?;
            tap.set_carrier(true)?;
        }
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let lost = Arc::new(AtomicU64::new(0));
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&lost));
        let thread = std::thread::Builder::new().name(THREADS.into()).spawn(move || {
            if let Err(error) = forward(&taps, &stopped, &counted) {
                eprintln!("dom0-bench: the forwarder ended: {error}");
            }
        })?;
        Ok(Self { stop, lost, thread: Some(thread) })
    }

    /// Frames that the other tap did not take.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        // Only a full counter refuses, and then it has been told.
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            eprintln!("dom0-bench: the forwarder panicked");
        }
    }
}

fn forward(taps: &[Tap; 2], stop: &OwnedFd, lost: &AtomicU64) -> std::io::Result<()> {
    let memory = Rc::new(Mapping::anonymous(FRAME.next_multiple_of(4096))?);
    let mut room = IoList::with_capacity(1);
    room.push(&memory, 0, FRAME);
    let mut frame = IoList::with_capacity(1);
    loop {
        let mut busy = false;
        for (from, to) in [(&taps[0], &taps[1]), (&taps[1], &taps[0])] {
            for _ in 0..TURN {
                let len = match from.read(&room) {
                    Ok(len) => len,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                };
                busy = true;
                frame.clear();
                frame.push(&memory, 0, len);
                if to.write(&frame).is_err() {
                    lost.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        if !busy {
            let mut waits =
                [taps[0].as_fd(), taps[1].as_fd(), stop.as_fd()].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
            poll(&mut waits, None)?;
            if !waits[2].revents().is_empty() {
                return Ok(());
            }
        } else {
            // Under load it never sleeps, and must hear of its end nevertheless.
            let mut told = [PollFd::new(stop, PollFlags::IN)];
            if poll(&mut told, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 }))? > 0 {
                return Ok(());
            }
        }
    }
}
