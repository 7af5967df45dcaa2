//! The io_uring room: the only place where the kernel is told to touch memory.
//!
//! An operation owns its [`IoList`], and with it the mappings the kernel will read or fill, from the submission to
//! the completion; dropping the ring waits for what is still in flight. So memory is never unmapped, unpinned or
//! reused under a running operation.
//!
//! The ring is created disabled, restricted to the opcodes below on registered files, and only then enabled: even a
//! hijacked queue thread can do nothing else with it (seccomp does not see what an io_uring does).

#![allow(unsafe_code)]

pub mod erase;
pub mod keeper;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use hypervisor::memory::IoList;
use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fixed, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode};

/// Which of the files given to [`Uring::new`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileSlot(pub u32);

/// What an operation does with its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Fill the memory from the file at this byte offset.
    Read(u64),
    /// Write the memory to the file at this byte offset.
    Write(u64),
    /// Put everything written and completed so far on stable storage, and the size with it (fdatasync(2)).
    Datasync,
    /// Free this range of bytes; it reads as zeros afterwards (fallocate(2), punch hole and keep size).
    Punch {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Wait until the file is readable (poll(2)).
    Poll,
}

/// A finished operation.
#[derive(Debug)]
pub struct Completion<T> {
    /// What the submitter gave along.
    pub token: T,
    /// What was asked.
    pub operation: Operation,
    /// The memory is the submitter's again.
    pub memory: IoList,
    /// Bytes moved, or 0 for operations that move none; or why not.
    pub result: io::Result<u32>,
}

/// An operation in flight.
#[derive(Debug)]
struct Flight<T> {
    token: T,
    operation: Operation,
    memory: IoList,
}

/// An io_uring of one thread.
pub struct Uring<T> {
    ring: IoUring,
    flights: Vec<Option<Flight<T>>>,
    /// Indices of free places in `flights`.
    free: Vec<u32>,
    /// Operations that found the submission queue full.
    waiting: VecDeque<(u32, Entry)>,
}

impl<T> std::fmt::Debug for Uring<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring").field("in_flight", &self.in_flight()).finish_non_exhaustive()
    }
}

/// `user_data` of the cancellations that drop submits; no flight has it.
const CANCEL: u64 = u64::MAX;

/// IORING_UNREGISTER_FILES, which io-uring keeps to itself.
const UNREGISTER_FILES: u8 = 3;

/// Linux does not move more in one call (MAX_RW_COUNT, rounded down to a page).
const MOST_BYTES: usize = 0x7fff_f000;

impl<T> Uring<T> {
    /// A ring for at most `capacity` operations at a time on `files`, for use by the calling thread alone.
    ///
    /// # Errors
    /// When the kernel has no io_uring, forbids it (kernel.io_uring_disabled), or is older than Linux 6.1.
    pub fn new(capacity: u32, files: &[BorrowedFd<'_>]) -> io::Result<Self> {
        let ring = build(capacity)?;
        // Behind the caller's files one that no operation uses: it tells when the ring is gone.
        let raw: Vec<RawFd> = files.iter().copied().chain(keeper::in_flight()).map(|file| file.as_raw_fd()).collect();
        ring.submitter().register_files(&raw)?;
        let allowed = [
            opcode::Read::CODE,
            opcode::Write::CODE,
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
            opcode::PollAdd::CODE,
            opcode::AsyncCancel::CODE,
        ];
        let mut restrictions: Vec<_> = allowed.into_iter().map(Restriction::sqe_op).collect();
        restrictions.push(Restriction::sqe_flags_allowed(Flags::FIXED_FILE.bits()));
        restrictions.push(Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()));
        restrictions.push(Restriction::register_op(UNREGISTER_FILES));
        ring.submitter().register_restrictions(&mut restrictions)?;
        ring.submitter().register_enable_rings()?;
        Ok(Self {
            ring,
            flights: (0..capacity).map(|_| None).collect(),
            free: (0..capacity).rev().collect(),
            waiting: VecDeque::new(),
        })
    }

    /// Operations started and not yet reaped.
    #[inline]
    pub fn in_flight(&self) -> usize {
        self.flights.len() - self.free.len()
    }

    /// Prepares an operation; the kernel sees it at the next [`submit`](Self::submit) or [`wait`](Self::wait).
    ///
    /// # Panics
    /// When more than `capacity` operations would be in flight, or a read is to fill read-only memory.
    #[inline]
    pub fn push(&mut self, file: FileSlot, operation: Operation, memory: IoList, token: T) {
        if matches!(operation, Operation::Read(_)) {
            assert!(memory.is_writable(), "a read into read-only memory");
        }
        let Some(place) = self.free.pop() else { panic!("more operations than the ring was made for") };
        let entry = entry(file, operation, &memory).user_data(u64::from(place));
        self.flights[place as usize] = Some(Flight { token, operation, memory });
        if !self.waiting.is_empty() || !self.try_queue(&entry) {
            self.waiting.push_back((place, entry));
        }
    }

    #[inline]
    fn try_queue(&mut self, entry: &Entry) -> bool {
        // SAFETY: the addresses in the entry belong to the Flight stored under its user_data: the iovec array and
        // the memory behind it stay put (moving an IoList moves neither) until the completion is reaped, or until
        // drop has waited for it.
        unsafe { self.ring.submission().push(entry).is_ok() }
    }

    fn queue_waiting(&mut self) {
        while let Some((_, entry)) = self.waiting.front() {
            let entry = entry.clone();
            if !self.try_queue(&entry) {
                break;
            }
            self.waiting.pop_front();
        }
    }

    /// Hands what was prepared to the kernel, and lets it post completions that are ready. Does not wait.
    ///
    /// # Errors
    /// When the kernel refuses the call; nothing is lost, and the call can be made again.
    #[inline]
    pub fn submit(&mut self) -> io::Result<()> {
        loop {
            if !self.waiting.is_empty() {
                self.queue_waiting();
            }
            let prepared = self.ring.submission().len();
            // With deferred task work the kernel finishes operations only inside a call that asks for events; the
            // flag says when one waits for that.
            let ready = self.ring.submission().taskrun();
            if prepared == 0 && !ready {
                return Ok(());
            }
            const GETEVENTS: u32 = 1;
            // SAFETY: no argument is passed; the entries counted by `prepared` are valid, see try_queue.
            let entered = unsafe { self.ring.submitter().enter::<()>(prepared as u32, 0, GETEVENTS, None) };
            match entered {
                Ok(_) if self.waiting.is_empty() => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // EBUSY: completions must be reaped first; what is prepared stays prepared.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    /// Hands what was prepared to the kernel and waits until one operation at least has finished, or for `timeout`.
    ///
    /// # Errors
    /// As [`submit`](Self::submit).
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.queue_waiting();
        if !self.ring.completion().is_empty() {
            return self.submit();
        }
        let spec = timeout.map(Timespec::from);
        let mut args = SubmitArgs::new();
        if let Some(spec) = &spec {
            args = args.timespec(spec);
        }
        match self.ring.submitter().submit_with_args(1, &args) {
            Ok(_) => Ok(()),
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN)) =>
            {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Takes the next finished operation, if there is one.
    #[inline]
    pub fn reap(&mut self) -> Option<Completion<T>> {
        loop {
            let event = self.ring.completion().next()?;
            if event.user_data() == CANCEL {
                continue;
            }
            let place = event.user_data() as u32;
            let Some(flight) = self.flights.get_mut(place as usize).and_then(Option::take) else {
                tracing::error!(place, "the kernel completed an operation that is not in flight");
                continue;
            };
            self.free.push(place);
            let result = match event.result() {
                error if error < 0 => Err(io::Error::from_raw_os_error(-error)),
                moved => Ok(moved as u32),
            };
            return Some(Completion {
                token: flight.token,
                operation: flight.operation,
                memory: flight.memory,
                result,
            });
        }
    }

    /// Whether [`reap`](Self::reap) would find something without a call into the kernel.
    #[inline]
    pub fn has_completions(&mut self) -> bool {
        !self.ring.completion().is_empty() || self.ring.submission().taskrun()
    }

    fn cancel_polls(&mut self) {
        for place in 0..self.flights.len() {
            if self.flights[place].as_ref().is_some_and(|flight| flight.operation == Operation::Poll) {
                // It names no file, but the restriction asks for the flag of all.
                let cancel = opcode::AsyncCancel::new(place as u64).build().flags(Flags::FIXED_FILE).user_data(CANCEL);
                self.waiting.push_back((place as u32, cancel));
            }
        }
    }
}

impl<T> Drop for Uring<T> {
    /// Waits for every operation in flight. Closing the descriptor would not cancel what has begun, and the memory
    /// must not go before the kernel is done with it.
    fn drop(&mut self) {
        self.cancel_polls();
        let mut waited = 0;
        while self.in_flight() > 0 {
            if let Err(error) = self.wait(Some(Duration::from_secs(5))) {
                tracing::error!(%error, in_flight = self.in_flight(), "cannot wait for the kernel; leaking its memory");
                self.flights.drain(..).for_each(std::mem::forget);
                return;
            }
            while self.reap().is_some() {}
            waited += 5;
            if self.in_flight() > 0 && waited % 30 == 0 {
                tracing::warn!(in_flight = self.in_flight(), "still waiting for the kernel to finish operations");
            }
        }
        // The kernel tears a closed ring down at its leisure and holds the files, and locks on them, until then.
        if let Err(error) = self.ring.submitter().unregister_files() {
            tracing::warn!(%error, "the kernel keeps the files of a closed io_uring for a while");
        }
    }
}

fn entry(file: FileSlot, operation: Operation, memory: &IoList) -> Entry {
    let file = Fixed(file.0);
    let pieces = memory.for_kernel();
    let count = pieces.len() as u32;
    match (operation, pieces) {
        // The kernel takes a single buffer without copying an iovec array in.
        (Operation::Read(offset), [piece]) if piece.iov_len <= MOST_BYTES => {
            opcode::Read::new(file, piece.iov_base.cast(), piece.iov_len as u32).offset(offset).build()
        }
        (Operation::Write(offset), [piece]) if piece.iov_len <= MOST_BYTES => {
            opcode::Write::new(file, piece.iov_base.cast(), piece.iov_len as u32).offset(offset).build()
        }
        (Operation::Read(offset), _) => opcode::Readv::new(file, pieces.as_ptr(), count).offset(offset).build(),
        (Operation::Write(offset), _) => opcode::Writev::new(file, pieces.as_ptr(), count).offset(offset).build(),
        (Operation::Datasync, _) => opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build(),
        (Operation::Punch { offset, len }, _) => opcode::Fallocate::new(file, len)
            .offset(offset)
            .mode(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)
            .build(),
        (Operation::Poll, _) => opcode::PollAdd::new(file, libc::POLLIN as u32).build(),
    }
}

/// Linux 6.1 knows all flags but the last, which saves an indirection from 6.6 on.
fn build(capacity: u32) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_r_disabled()
        .setup_submit_all()
        .setup_cqsize((2 * capacity + 16).next_power_of_two())
        .dontfork();
    let entries = (capacity + 8).next_power_of_two();
    let plain = builder.clone();
    match builder.setup_no_sqarray().build(entries) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => plain.build(entries),
        built => built,
    }
}

#[cfg(test)]
mod tests;
