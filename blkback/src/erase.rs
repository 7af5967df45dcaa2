//! Erasing for good, on storage that can (secure discard), and discards of devices that promise no zeros.
//!
//! io_uring has no such operations (of discards only since Linux 6.12), and the kernel's own calls (ioctl(2),
//! BLKSECDISCARD and BLKDISCARD) return when the device is done, which can take seconds. So a thread makes the calls, one
//! after the other, and rings when one has ended. It begins with the first of them: most disks never see one.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::{self, Receiver, Sender};
use ring::uring::erase::{can_erase, discard, secure_erase};
use rustix::event::{EventfdFlags, eventfd};

/// Storage that does what io_uring cannot.
pub trait Erase: Debug + Send + Sync {
    /// Erases exactly these bytes, copies that the storage may have made of them included. Waits until it is done.
    ///
    /// # Errors
    /// When they are not erased, or not all of them: units in which the storage erases that are only partly inside the
    /// range are the storage's to refuse. EOPNOTSUPP where it cannot erase.
    fn erase(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Whether discards are for [`discard`](Self::discard) too, instead of being holes in the storage.
    fn discards(&self) -> bool {
        false
    }

    /// Gives up these bytes, or those of the storage's units that lie whole inside of them. What they read as afterwards
    /// is open. Waits until it is done.
    ///
    /// # Errors
    /// The device's; EOPNOTSUPP where it cannot.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let _ = (offset, len);
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }
}

/// A block device that erases, or discards without a promise of zeros.
#[derive(Debug)]
struct Device {
    file: File,
    discards: bool,
}

impl Erase for Device {
    fn erase(&self, offset: u64, len: u64) -> io::Result<()> {
        secure_erase(self.file.as_fd(), offset, len)
    }

    fn discards(&self) -> bool {
        self.discards
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        discard(self.file.as_fd(), offset, len)
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
    Ok(Some(Arc::new(Device { file: device.try_clone()?, discards: false })))
}

/// How a block device that is open for writing discards, where holes cannot be made in it.
///
/// # Errors
/// When the machine is out of descriptors.
pub fn discards_of_device(device: &File) -> io::Result<Arc<dyn Erase>> {
    Ok(Arc::new(Device { file: device.try_clone()?, discards: true }))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    Erase,
    Discard,
}

#[derive(Debug)]
struct Job {
    call: Call,
    offset: u64,
    len: u64,
    token: u32,
}

impl Job {
    fn carry_out(&self, storage: &dyn Erase) -> io::Result<()> {
        let mut pauses = PAUSES.iter();
        loop {
            let result = match self.call {
                Call::Erase => storage.erase(self.offset, self.len),
                Call::Discard => storage.discard(self.offset, self.len),
            };
            match result {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => match pauses.next() {
                    Some(&pause) => std::thread::sleep(Duration::from_millis(pause)),
                    None => return Err(error),
                },
                result => return result,
            }
        }
    }
}

/// Milliseconds between tries of what the device cannot do now.
const PAUSES: [u64; 8] = [1, 4, 16, 64, 250, 1000, 1000, 1000];

type Ended = (u32, io::Result<()>);

/// The thread of a queue that makes these calls.
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

    /// Whether discards are to be asked for here.
    pub fn discards(&self) -> bool {
        self.storage.discards()
    }

    /// Has a range erased.
    pub fn erase(&mut self, offset: u64, len: u64, token: u32) {
        self.ask(Job { call: Call::Erase, offset, len, token });
    }

    /// Has a range discarded.
    pub fn discard(&mut self, offset: u64, len: u64, token: u32) {
        self.ask(Job { call: Call::Discard, offset, len, token });
    }

    fn ask(&mut self, job: Job) {
        let token = job.token;
        let jobs = match &self.jobs {
            Some(jobs) => Ok(jobs),
            None => self.start().map(|jobs| &*self.jobs.insert(jobs)),
        };
        let asked =
            jobs.and_then(|jobs| jobs.send(job).map_err(|_| io::Error::other("the thread that erases has panicked")));
        if let Err(error) = asked {
            report(&self.ended.0, &self.bell, (token, Err(error)));
        }
    }

    fn start(&self) -> io::Result<Sender<Job>> {
        let (jobs, inbox) = channel::unbounded::<Job>();
        let (storage, bell, ended) = (Arc::clone(&self.storage), Arc::clone(&self.bell), self.ended.0.clone());
        std::thread::Builder::new().name("erase".to_owned()).spawn(move || {
            for job in inbox {
                report(&ended, &bell, (job.token, job.carry_out(&*storage)));
            }
        })?;
        Ok(jobs)
    }
}

fn report(ended: &Sender<Ended>, bell: &OwnedFd, outcome: Ended) {
    // The queue is gone: nobody is left to be told.
    let _ = ended.send(outcome);
    if let Err(error) = rustix::io::write(bell, &1u64.to_ne_bytes()) {
        tracing::error!(%error, "cannot wake a queue for what was erased or discarded");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::Duration;

    use super::*;
    use crate::storage::{Done, Sleep, Storage, UringStorage};

    /// Fails at sector 7, is interrupted once, and is busy twice.
    #[derive(Debug, Default)]
    struct Slow(Mutex<Vec<(Call, u64, u64)>>);

    impl Slow {
        fn call(&self, call: Call, offset: u64, len: u64) -> io::Result<()> {
            std::thread::sleep(Duration::from_millis(20));
            let mut seen = self.0.lock().unwrap();
            seen.push((call, offset, len));
            match (seen.len(), offset) {
                (1, _) => Err(io::Error::from_raw_os_error(libc::EINTR)),
                (2 | 3, _) => Err(io::Error::from_raw_os_error(libc::EAGAIN)),
                (_, 3584) => Err(io::Error::from_raw_os_error(libc::EIO)),
                _ => Ok(()),
            }
        }
    }

    impl Erase for Slow {
        fn erase(&self, offset: u64, len: u64) -> io::Result<()> {
            self.call(Call::Erase, offset, len)
        }

        fn discards(&self) -> bool {
            true
        }

        fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
            self.call(Call::Discard, offset, len)
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
        storage.discard(4096, 8192, 4);
        storage.submit().unwrap();
        // Meanwhile others go on.
        storage.flush(3);
        let mut ended = Vec::new();
        while ended.len() < 4 {
            match storage.next() {
                Some(Done { token, result, .. }) => ended.push((token, result.map_err(|error| error.raw_os_error()))),
                // For ever, if nobody rings.
                None => storage.wait(None).unwrap(),
            }
        }
        assert_eq!(ended, [(3, Ok(())), (1, Ok(())), (2, Err(Some(libc::EIO))), (4, Ok(()))]);
        let first = (Call::Erase, 0, 512);
        let expected = [first, first, first, first, (Call::Erase, 3584, 512), (Call::Discard, 4096, 8192)];
        assert_eq!(*slow.0.lock().unwrap(), expected);
    }

    #[test]
    fn what_stays_busy_fails_in_the_end() {
        #[derive(Debug)]
        struct Busy;
        impl Erase for Busy {
            fn erase(&self, _: u64, _: u64) -> io::Result<()> {
                Err(io::Error::from_raw_os_error(libc::EAGAIN))
            }
        }
        let job = Job { call: Call::Erase, offset: 0, len: 512, token: 1 };
        assert_eq!(job.carry_out(&Busy).unwrap_err().raw_os_error(), Some(libc::EAGAIN));
    }
}
