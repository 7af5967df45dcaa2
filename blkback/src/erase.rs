//! Erasing for good, on storage that can (secure discard).
//!
//! io_uring has no such operation, and the kernel's own call (ioctl(2), BLKSECDISCARD) returns when the device is done,
//! which can take seconds. So a thread makes the calls, one after the other, and rings when one has ended. It begins with
//! the first of them: most disks never see one.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crossbeam::channel::{self, Receiver, Sender};
use ring::uring::erase::{can_erase, secure_erase};
use rustix::event::{EventfdFlags, eventfd};

/// Storage that can erase.
pub trait Erase: Debug + Send + Sync {
    /// Erases exactly these bytes, copies that the storage may have made of them included. Waits until it is done.
    ///
    /// # Errors
    /// When they are not erased, or not all of them: units in which the storage erases that are only partly inside the
    /// range are the storage's to refuse.
    fn erase(&self, offset: u64, len: u64) -> io::Result<()>;
}

/// A block device that can.
#[derive(Debug)]
struct Device(File);

impl Erase for Device {
    fn erase(&self, offset: u64, len: u64) -> io::Result<()> {
        secure_erase(self.0.as_fd(), offset, len)
    }
}

/// How a block device that is open for writing erases, if it can.
///
/// # Errors
/// When the machine is out of descriptors.
pub fn of_device(device: &File) -> io::Result<Option<Arc<dyn Erase>>> {
    if !can_erase(device.as_fd()) {
        return Ok(None);
    }
    // The same open file: its claim lasts until what is being erased is erased.
    Ok(Some(Arc::new(Device(device.try_clone()?))))
}

#[derive(Debug)]
struct Job {
    offset: u64,
    len: u64,
    token: u32,
}

type Ended = (u32, io::Result<()>);

/// The thread of a queue that erases.
#[derive(Debug)]
pub struct Eraser {
    storage: Arc<dyn Erase>,
    bell: Arc<OwnedFd>,
    /// The thread's inbox, when there is one. It ends with the last job after this is dropped.
    jobs: Option<Sender<Job>>,
    ended: (Sender<Ended>, Receiver<Ended>),
}

impl Eraser {
    /// No thread yet.
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn new(storage: Arc<dyn Erase>) -> io::Result<Self> {
        let bell = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        Ok(Self { storage, bell, jobs: None, ended: channel::unbounded() })
    }

    /// Readable when something has ended.
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// Whether [`take`](Self::take) has something.
    pub fn has_ended(&self) -> bool {
        !self.ended.1.is_empty()
    }

    /// What has ended: its token, and how.
    pub fn take(&mut self) -> Option<Ended> {
        let ended = self.ended.1.try_recv().ok();
        if ended.is_some() {
            // Empty is as good: what else has ended is found without a bell.
            let _ = rustix::io::read(&self.bell, &mut [0; 8]);
        }
        ended
    }

    /// Has a range erased.
    pub fn ask(&mut self, offset: u64, len: u64, token: u32) {
        let jobs = match &self.jobs {
            Some(jobs) => Ok(jobs),
            None => self.start().map(|jobs| &*self.jobs.insert(jobs)),
        };
        let asked = jobs.and_then(|jobs| {
            jobs.send(Job { offset, len, token }).map_err(|_| io::Error::other("the thread that erases has panicked"))
        });
        if let Err(error) = asked {
            report(&self.ended.0, &self.bell, (token, Err(error)));
        }
    }

    fn start(&self) -> io::Result<Sender<Job>> {
        let (jobs, inbox) = channel::unbounded::<Job>();
        let (storage, bell, ended) = (Arc::clone(&self.storage), Arc::clone(&self.bell), self.ended.0.clone());
        std::thread::Builder::new().name("erase".to_owned()).spawn(move || {
            for Job { offset, len, token } in inbox {
                let result = loop {
                    match storage.erase(offset, len) {
                        Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {}
                        result => break result,
                    }
                };
                report(&ended, &bell, (token, result));
            }
        })?;
        Ok(jobs)
    }
}

fn report(ended: &Sender<Ended>, bell: &OwnedFd, outcome: Ended) {
    // The queue is gone: nobody is left to be told.
    let _ = ended.send(outcome);
    if let Err(error) = rustix::io::write(bell, &1u64.to_ne_bytes()) {
        tracing::error!(%error, "cannot wake a queue for what was erased");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::Duration;

    use super::*;
    use crate::storage::{Done, Sleep, Storage, UringStorage};

    /// Fails at sector 7, and is interrupted once.
    #[derive(Debug, Default)]
    struct Slow(Mutex<Vec<(u64, u64)>>);

    impl Erase for Slow {
        fn erase(&self, offset: u64, len: u64) -> io::Result<()> {
            std::thread::sleep(Duration::from_millis(20));
            let mut seen = self.0.lock().unwrap();
            seen.push((offset, len));
            match offset {
                _ if seen.len() == 1 => Err(io::Error::from_raw_os_error(libc::EINTR)),
                3584 => Err(io::Error::from_raw_os_error(libc::EIO)),
                _ => Ok(()),
            }
        }
    }

    #[test]
    fn the_queue_does_not_wait_and_is_woken() {
        let file: File = tempfile::tempfile().unwrap();
        let slow = Arc::new(Slow::default());
        let erase: Arc<dyn Erase> = slow.clone();
        let mut storage = UringStorage::with_eraser(file.as_fd(), &[], 8, Some(erase)).unwrap();
        storage.erase(0, 512, 1);
        storage.erase(3584, 512, 2);
        storage.submit().unwrap();
        // Meanwhile others go on.
        storage.flush(3);
        let mut ended = Vec::new();
        while ended.len() < 3 {
            match storage.next() {
                Some(Done { token, result, .. }) => ended.push((token, result.map_err(|error| error.raw_os_error()))),
                // For ever, if nobody rings.
                None => storage.wait(None).unwrap(),
            }
        }
        assert_eq!(ended, [(3, Ok(())), (1, Ok(())), (2, Err(Some(libc::EIO)))]);
        assert_eq!(*slow.0.lock().unwrap(), [(0, 512), (0, 512), (3584, 512)]);
    }
}
