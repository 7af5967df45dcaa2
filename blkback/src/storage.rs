//! What a queue needs from the disk under it, and the io_uring that gives it.

mod again;

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hypervisor::memory::IoList;
use ring::uring::{Completion, FileSlot, Operation, Uring};
use rustix::fs::OFlags;

use again::Again;

use crate::erase::{Erase, Eraser};

/// A finished operation.
#[derive(Debug)]
pub struct Done {
    /// What the queue gave along.
    pub token: u32,
    /// The memory is the queue's again.
    pub memory: IoList,
    /// Whether all of it was done.
    pub result: io::Result<()>,
}

/// The disk as a queue sees it: operations go in, whole operations come out, in any order. Offsets and lengths are
/// bytes, already checked against the disk's end.
pub trait Storage {
    /// Fills `memory` from `offset`.
    fn read(&mut self, offset: u64, memory: IoList, token: u32);
    /// Writes `memory` at `offset`.
    fn write(&mut self, offset: u64, memory: IoList, token: u32);
    /// Makes durable every write that was done before this call.
    fn flush(&mut self, token: u32);
    /// Gives up a range. It reads as zeros afterwards, except on a device that does not promise that
    /// ([`Image::zeroes`](crate::image::Image::zeroes)).
    fn discard(&mut self, offset: u64, len: u64, token: u32);
    /// Erases a range so that nothing brings its content back; what it reads as afterwards is open. Asked for only where
    /// the disk has said that it can.
    fn erase(&mut self, offset: u64, len: u64, token: u32);
    /// Starts what was asked for since the last call.
    ///
    /// # Errors
    /// When the disk cannot be spoken to at all.
    fn submit(&mut self) -> io::Result<()>;
    /// The next finished operation.
    fn next(&mut self) -> Option<Done>;
    /// Whether [`next`](Self::next) has, or with one more [`submit`](Self::submit) would have, something.
    fn has_completions(&mut self) -> bool;
    /// The queue is being closed: what waits for something that may never come ends with an error.
    fn give_up(&mut self) {}
}

/// Where a queue's thread sleeps: in one place, for the disk and for everybody who may wake it.
pub trait Sleep {
    /// Sleeps until an operation has finished, a waker rings, or `timeout` is over.
    ///
    /// # Errors
    /// When the kernel refuses to wait.
    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()>;
    /// From now on waker `index` wakes nobody, or once more if it is being waited for.
    fn ignore(&mut self, index: u32);
    /// Whether waker `index` rang since this was last asked.
    fn take_rung(&mut self, index: u32) -> bool;
}

/// A file or block device through io_uring, together with the descriptors that wake the queue's thread: it blocks in
/// one place only.
#[derive(Debug)]
pub struct UringStorage {
    ring: Uring<u32>,
    /// Which wakers rang since the last look, one bit each.
    rung: u32,
    /// Which wakers are being waited for.
    armed: u32,
    /// Which wakers are not to be waited for any more.
    ignored: u32,
    wakers: u32,
    continued: u32,
    /// What the kernel wants to be asked again.
    again: Again,
    /// The image, whose flags can be changed.
    image: OwnedFd,
    /// What io_uring has no operation for.
    eraser: Option<Eraser>,
    /// What has ended without the kernel: erasures of an image that cannot erase, operations that are not tried again.
    ended: Vec<Done>,
}

/// Tokens of wakers count down from here; requests count up from 0.
const WAKER: u32 = u32::MAX - 8;
const IMAGE: FileSlot = FileSlot(0);

impl UringStorage {
    /// Storage on `image` for at most `capacity` operations at a time. `wakers` are watched for becoming readable.
    ///
    /// # Errors
    /// When the kernel gives no io_uring.
    pub fn new(image: BorrowedFd<'_>, wakers: &[BorrowedFd<'_>], capacity: u32) -> io::Result<Self> {
        Self::with_eraser(image, wakers, capacity, None)
    }

    /// As [`new`](Self::new), on an image that can also be erased, or that discards in its own way.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_eraser(
        image: BorrowedFd<'_>,
        wakers: &[BorrowedFd<'_>],
        capacity: u32,
        erase: Option<Arc<dyn Erase>>,
    ) -> io::Result<Self> {
        let eraser = erase.map(Eraser::new).transpose()?;
        let wakers: Vec<_> = wakers.iter().copied().chain(eraser.as_ref().map(Eraser::bell)).collect();
        assert!(wakers.len() <= 8);
        let files: Vec<_> = std::iter::once(image).chain(wakers.iter().copied()).collect();
        let wakers = wakers.len() as u32;
        let ring = Uring::new(capacity + wakers, &files)?;
        let image = image.try_clone_to_owned()?;
        Ok(Self {
            ring,
            rung: 0,
            armed: 0,
            ignored: 0,
            wakers,
            continued: 0,
            again: Again::default(),
            image,
            eraser,
            ended: Vec::new(),
        })
    }

    /// Operations that were short or interrupted and had to be continued.
    pub fn continued(&self) -> u32 {
        self.continued
    }

    /// The kernel could not do it now. What it cannot do without waiting it says of every operation on a file that is
    /// O_NONBLOCK: without that flag, which counts from the next submission on, it waits on a thread of its own. Any
    /// other reason has to pass by itself. The operation is over if it was asked for too often.
    fn try_again(&mut self, done: Completion<u32>, error: io::Error) -> Option<Done> {
        let Completion { token, operation, memory, .. } = done;
        self.continued = self.continued.wrapping_add(1);
        let nonblocking = rustix::fs::fcntl_getfl(&self.image).is_ok_and(|flags| flags.contains(OFlags::NONBLOCK));
        if error.raw_os_error() == Some(libc::EAGAIN) && nonblocking && self.wait_in_the_kernel() {
            self.ring.push(IMAGE, operation, memory, token);
            return None;
        }
        let memory = self.again.keep(operation, memory, token, Instant::now()).err()?;
        Some(Done { token, memory, result: Err(error) })
    }

    /// Takes O_NONBLOCK off the image's open file, for all queues.
    fn wait_in_the_kernel(&self) -> bool {
        let flags = rustix::fs::fcntl_getfl(&self.image);
        let cleared = flags.and_then(|flags| rustix::fs::fcntl_setfl(&self.image, flags - OFlags::NONBLOCK));
        match cleared {
            Ok(()) => tracing::info!("the storage cannot answer without waiting: O_NONBLOCK is off"),
            Err(error) => tracing::error!(%error, "cannot switch O_NONBLOCK off"),
        }
        cleared.is_ok()
    }
}

impl Sleep for UringStorage {
    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        for waker in 0..self.wakers {
            if (self.armed | self.ignored) & (1 << waker) == 0 {
                self.armed |= 1 << waker;
                self.ring.push(FileSlot(1 + waker), Operation::Poll, IoList::default(), WAKER + waker);
            }
        }
        let next_try = if self.again.is_quiet() { None } else { self.again.until(Instant::now()) };
        self.ring.wait(timeout.into_iter().chain(next_try).min())
    }

    fn ignore(&mut self, index: u32) {
        self.ignored |= 1 << index;
    }

    #[inline]
    fn take_rung(&mut self, index: u32) -> bool {
        let rang = self.rung & (1 << index) != 0;
        self.rung &= !(1 << index);
        rang
    }
}

impl Storage for UringStorage {
    #[inline]
    fn read(&mut self, offset: u64, memory: IoList, token: u32) {
        self.ring.push(IMAGE, Operation::Read(offset), memory, token);
    }

    #[inline]
    fn write(&mut self, offset: u64, memory: IoList, token: u32) {
        self.ring.push(IMAGE, Operation::Write(offset), memory, token);
    }

    fn flush(&mut self, token: u32) {
        self.ring.push(IMAGE, Operation::Datasync, IoList::default(), token);
    }

    fn discard(&mut self, offset: u64, len: u64, token: u32) {
        match &mut self.eraser {
            Some(eraser) if eraser.discards() => eraser.discard(offset, len, token),
            _ => self.ring.push(IMAGE, Operation::Punch { offset, len }, IoList::default(), token),
        }
    }

    fn erase(&mut self, offset: u64, len: u64, token: u32) {
        match &mut self.eraser {
            Some(eraser) => eraser.erase(offset, len, token),
            None => {
                let result = Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
                self.ended.push(Done { token, memory: IoList::default(), result });
            }
        }
    }

    #[inline]
    fn submit(&mut self) -> io::Result<()> {
        if !self.again.is_quiet() {
            let now = Instant::now();
            while let Some(due) = self.again.take_due(now) {
                self.ring.push(IMAGE, due.operation, due.memory, due.token);
            }
        }
        self.ring.submit()
    }

    #[inline]
    fn next(&mut self) -> Option<Done> {
        if let Some((token, result)) = self.eraser.as_mut().and_then(Eraser::take) {
            return Some(Done { token, memory: IoList::default(), result });
        }
        if let Some(done) = self.ended.pop() {
            return Some(done);
        }
        loop {
            let mut done = self.ring.reap()?;
            if done.token >= WAKER {
                let waker = 1 << (done.token - WAKER);
                self.armed &= !waker;
                self.rung |= waker;
                continue;
            }
            let left = done.memory.len();
            let moved = match &mut done.result {
                Ok(moved) => *moved as usize,
                Err(error) => {
                    let error = std::mem::replace(error, io::ErrorKind::Other.into());
                    if !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) {
                        return Some(Done { token: done.token, memory: done.memory, result: Err(error) });
                    }
                    match self.try_again(done, error) {
                        Some(failed) => return Some(failed),
                        None => continue,
                    }
                }
            };
            if !self.again.is_quiet() {
                self.again.forget(done.token);
            }
            let operation = match done.operation {
                // Nothing more to be had: the file is shorter than the disk it was when it was opened.
                Operation::Read(_) | Operation::Write(_) if left > 0 && moved == 0 => {
                    let result = Err(io::ErrorKind::UnexpectedEof.into());
                    return Some(Done { token: done.token, memory: done.memory, result });
                }
                Operation::Read(offset) if moved < left => Operation::Read(offset + moved as u64),
                Operation::Write(offset) if moved < left => Operation::Write(offset + moved as u64),
                _ => return Some(Done { token: done.token, memory: done.memory, result: Ok(()) }),
            };
            self.continued = self.continued.wrapping_add(1);
            done.memory.advance(moved);
            self.ring.push(IMAGE, operation, done.memory, done.token);
        }
    }

    #[inline]
    fn has_completions(&mut self) -> bool {
        self.eraser.as_ref().is_some_and(Eraser::has_ended)
            || !self.ended.is_empty()
            || !self.again.is_quiet() && self.again.until(Instant::now()).is_some_and(|left| left.is_zero())
            || self.ring.has_completions()
    }

    fn give_up(&mut self) {
        while let Some(waiting) = self.again.give_up() {
            self.ended.push(Done { token: waiting.token, memory: waiting.memory, result: Err(again()) });
        }
    }
}

fn again() -> io::Error {
    io::Error::from_raw_os_error(libc::EAGAIN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;
    use std::rc::Rc;

    use hypervisor::memory::Mapping;

    fn done(storage: &mut UringStorage) -> Done {
        loop {
            if let Some(done) = storage.next() {
                return done;
            }
            storage.wait(None).unwrap();
        }
    }

    #[test]
    fn a_file_that_shrank_gives_errors() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 1024], 0).unwrap();
        let mut storage = UringStorage::new(file.as_fd(), &[], 4).unwrap();
        let memory = Rc::new(Mapping::anonymous(4096).unwrap());
        let mut list = IoList::default();
        list.push(&memory, 0, 2048);
        storage.read(0, list, 1);
        let done = done(&mut storage);
        assert_eq!(done.result.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(storage.continued(), 1, "the first kilobyte was read");
    }

    /// A file that io_uring was told of before it became O_NONBLOCK is what a thin volume is to Linux 6.1: every read is
    /// answered with EAGAIN, however often it is made. This kernel does so for tmpfs, which does not know "no wait".
    #[test]
    fn storage_that_cannot_answer_at_once_is_asked_to_wait() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.write_all_at(&[7; 4096], 0).unwrap();
        let mut storage = UringStorage::new(file.as_fd(), &[], 4).unwrap();
        rustix::fs::fcntl_setfl(&file, OFlags::NONBLOCK).unwrap();
        let memory = Rc::new(Mapping::anonymous(4096).unwrap());
        let mut list = IoList::default();
        list.push(&memory, 0, 4096);
        storage.read(0, list, 1);
        done(&mut storage).result.unwrap();
        if storage.continued() == 0 {
            println!("NOT TESTED: EAGAIN from storage: this kernel reads a file on tmpfs at once");
            return;
        }
        assert_eq!(storage.continued(), 1);
        assert!(!rustix::fs::fcntl_getfl(&file).unwrap().contains(OFlags::NONBLOCK));
        storage.flush(2);
        done(&mut storage).result.unwrap();
        assert_eq!(storage.continued(), 1, "once is enough");
    }

    /// Files on tmpfs are read and written by the queue's own thread: io_uring's workers would halve the speed. So O_DIRECT
    /// and O_NONBLOCK have to stay together there.
    #[test]
    fn files_on_tmpfs_need_no_workers() {
        let workers = || {
            let own = format!("iou-wrk-{}", rustix::thread::gettid());
            let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
            tasks
                .filter(|task| std::fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.trim() == own))
                .count()
        };
        let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        file.as_file().write_all_at(&[7; 1 << 16], 0).unwrap();
        let memory = Rc::new(Mapping::anonymous(1 << 16).unwrap());
        let transfer = |fd: BorrowedFd<'_>| {
            let mut storage = UringStorage::new(fd, &[], 4).unwrap();
            for write in [false, true] {
                let mut list = IoList::default();
                list.push(&memory, 0, 1 << 16);
                if write {
                    storage.write(0, list, 1);
                } else {
                    storage.read(0, list, 1);
                }
                done(&mut storage).result.unwrap();
            }
            workers()
        };
        let image = crate::image::Image::open(file.path(), crate::spec::Access::Write).unwrap();
        let ours = transfer(image.as_fd());
        // The counting counts: a file without the flags needs some.
        if !image.direct || transfer(file.as_file().as_fd()) == 0 {
            println!(
                "NOT TESTED: tmpfs without io_uring's workers: this kernel has no direct I/O there, or needs none"
            );
            return;
        }
        assert_eq!(ours, 0, "io_uring handed an operation on");
    }

    #[test]
    fn what_waits_for_another_try_ends_with_the_queue() {
        let file = tempfile::tempfile().unwrap();
        let mut storage = UringStorage::new(file.as_fd(), &[], 4).unwrap();
        let busy =
            |token| Completion { token, operation: Operation::Datasync, memory: IoList::default(), result: Ok(0) };
        assert!(storage.try_again(busy(3), again()).is_none());
        storage.give_up();
        assert!(storage.has_completions());
        let done = storage.next().unwrap();
        assert_eq!((done.token, done.result.unwrap_err().raw_os_error()), (3, Some(libc::EAGAIN)));
        // One whose time has come is made again.
        assert!(storage.try_again(busy(4), again()).is_none());
        storage.wait(None).unwrap();
        assert!(storage.has_completions());
        storage.submit().unwrap();
        assert_eq!(self::done(&mut storage).token, 4);
        assert!(storage.again.is_quiet());
    }

    #[test]
    fn what_cannot_erase_says_so() {
        let file = tempfile::tempfile().unwrap();
        let mut storage = UringStorage::new(file.as_fd(), &[], 4).unwrap();
        storage.erase(0, 4096, 7);
        assert!(storage.has_completions());
        let done = storage.next().unwrap();
        assert_eq!((done.token, done.result.unwrap_err().raw_os_error()), (7, Some(libc::EOPNOTSUPP)));
        assert!(!storage.has_completions());
    }

    #[test]
    fn wakers_wake_and_stay_apart_from_requests() {
        let file = tempfile::tempfile().unwrap();
        let (reader, writer) = io::pipe().unwrap();
        let mut storage = UringStorage::new(file.as_fd(), &[reader.as_fd()], 4).unwrap();
        storage.wait(Some(Duration::from_millis(1))).unwrap();
        assert!(storage.next().is_none() && !storage.take_rung(0));
        io::Write::write_all(&mut &writer, b"!").unwrap();
        storage.wait(None).unwrap();
        assert!(storage.next().is_none());
        assert!(storage.take_rung(0) && !storage.take_rung(0));
        storage.ignore(0);
        storage.wait(Some(Duration::from_millis(1))).unwrap();
        assert!(storage.next().is_none() && !storage.take_rung(0), "it is still readable, and nobody cares");
        storage.flush(3);
        assert_eq!(done(&mut storage).token, 3);
    }
}
