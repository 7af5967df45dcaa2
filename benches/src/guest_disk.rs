//! A connected disk of an emulated guest, as an NBD server wants it: commands of any size go in, requests of the
//! block protocol go over the rings, a thread for each.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use blkback::abi::op;
use blkback::front::{self, Piece, Queue};
use crossbeam::channel::{Receiver, Sender, unbounded};
use rustix::event::{EventfdFlags, eventfd};

use crate::Failure;
use crate::nbd::{Command, Completion, Disk, Geometry};

/// Most bytes of one NBD read or write.
const MAX_PAYLOAD: u32 = 32 << 20;
const PAGE: usize = 4096;
/// How long answers are waited for when the disk goes.
const LAST_ANSWERS: Duration = Duration::from_secs(5);

/// The disk.
#[derive(Debug)]
pub struct GuestDisk {
    geometry: Geometry,
    /// Bytes; a disk may grow.
    size: AtomicU64,
    lanes: Vec<Lane>,
    next: AtomicUsize,
}

/// The way to a queue's thread.
#[derive(Debug)]
struct Lane {
    sender: Sender<(Command, Completion)>,
    wake: Arc<OwnedFd>,
    stop: Arc<AtomicBool>,
}

impl Lane {
    fn ring(&self) {
        // Full means that the thread has been told often enough.
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
    }
}

/// The queues' threads, which give the queues back.
#[derive(Debug)]
pub struct Threads(Vec<JoinHandle<Queue>>);

impl GuestDisk {
    /// Starts a thread for each of `queues`.
    ///
    /// # Errors
    /// When the machine is out of threads or descriptors.
    pub fn start(disk: &front::Disk, queues: Vec<Queue>) -> Result<(Arc<Self>, Threads), Failure> {
        let geometry = Geometry {
            block: disk.sector_size,
            read_only: disk.read_only(),
            flush: disk.flush,
            trim: disk.discard,
            max_payload: MAX_PAYLOAD,
            ..Geometry::writable(disk.sectors * 512)
        };
        let (mut lanes, mut threads) = (Vec::new(), Vec::new());
        for (number, queue) in queues.into_iter().enumerate() {
            let (sender, commands) = unbounded();
            let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
            let stop = Arc::new(AtomicBool::new(false));
            let runner = Runner::new(queue, commands, Arc::clone(&wake), Arc::clone(&stop));
            threads.push(std::thread::Builder::new().name(format!("blkfront-{number}")).spawn(|| runner.run())?);
            lanes.push(Lane { sender, wake, stop });
        }
        let size = AtomicU64::new(geometry.size_bytes);
        Ok((Arc::new(Self { geometry, size, lanes, next: AtomicUsize::new(0) }), Threads(threads)))
    }

    /// The backend says that the disk has `sectors` units of 512 bytes now. NBD clients that connect from now on see it.
    pub fn resize(&self, sectors: u64) {
        self.size.store(sectors.saturating_mul(512), Ordering::Release);
    }

    /// Lets the threads finish what they have, and returns the queues. Commands that come later fail.
    ///
    /// # Errors
    /// When a thread panicked.
    pub fn stop(&self, threads: Threads) -> Result<Vec<Queue>, Failure> {
        for lane in &self.lanes {
            lane.stop.store(true, Ordering::Release);
            lane.ring();
        }
        threads.0.into_iter().map(|thread| thread.join().map_err(|_| "a queue's thread panicked".into())).collect()
    }
}

impl Disk for GuestDisk {
    fn geometry(&self) -> Geometry {
        Geometry { size_bytes: self.size.load(Ordering::Acquire), ..self.geometry }
    }

    fn submit(&self, command: Command, done: Completion) {
        let lane = &self.lanes[self.next.fetch_add(1, Ordering::Relaxed) % self.lanes.len()];
        if let Err(unsent) = lane.sender.send((command, done)) {
            unsent.into_inner().1.fail(libc::ESHUTDOWN);
            return;
        }
        lane.ring();
    }
}

/// What is left to be done of a command.
struct Job {
    done: Option<Completion>,
    kind: Kind,
    /// Byte on the disk of the next request, and bytes behind it.
    offset: u64,
    left: u64,
    /// Where the next request's data are in `data`.
    at: usize,
    /// Of a write, or of a read as it comes in.
    data: Vec<u8>,
    /// Requests in the ring.
    in_flight: u32,
    flush_after: bool,
    failed: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Zero,
    Discard,
    Flush,
}

impl Job {
    fn new(command: Command, done: Completion) -> Self {
        let (kind, offset, left, data, flush_after) = match command {
            Command::Read { offset, len } => (Kind::Read, offset, len.into(), vec![0; len as usize], false),
            Command::Write { offset, data, fua } => (Kind::Write, offset, data.len() as u64, data, fua),
            // The protocol cannot say "write zeros", and a discard promises none, so zeros are written.
            Command::WriteZeroes { offset, len, fua, .. } => (Kind::Zero, offset, len.into(), Vec::new(), fua),
            Command::Trim { offset, len } => (Kind::Discard, offset, len.into(), Vec::new(), false),
            Command::Flush => (Kind::Flush, 0, 0, Vec::new(), true),
        };
        Self { done: Some(done), kind, offset, left, at: 0, data, in_flight: 0, flush_after, failed: false }
    }
}

/// A request in the ring.
struct Request {
    job: usize,
    /// Pages of the pool that it uses.
    pages: Vec<u32>,
    /// Which bytes of the job's data.
    at: usize,
    len: usize,
}

/// A queue's thread.
struct Runner {
    queue: Queue,
    commands: Receiver<(Command, Completion)>,
    wake: Arc<OwnedFd>,
    stop: Arc<AtomicBool>,
    stopping_since: Option<Instant>,
    jobs: Vec<Option<Job>>,
    /// Jobs that have requests to make, in the order they came.
    ready: VecDeque<usize>,
    requests: Vec<Option<Request>>,
    free_pages: Vec<u32>,
}

impl Runner {
    fn new(queue: Queue, commands: Receiver<(Command, Completion)>, wake: Arc<OwnedFd>, stop: Arc<AtomicBool>) -> Self {
        let pages = queue.data_refs().len() as u32;
        let requests = (0..queue.slots()).map(|_| None).collect();
        Self {
            queue,
            commands,
            wake,
            stop,
            stopping_since: None,
            jobs: Vec::new(),
            ready: VecDeque::new(),
            requests,
            free_pages: (0..pages).rev().collect(),
        }
    }

    fn run(mut self) -> Queue {
        if let Err(error) = self.serve() {
            tracing::error!(%error, "the guest's disk is gone");
            for job in self.jobs.iter_mut().flatten() {
                if let Some(done) = job.done.take() {
                    done.fail(libc::EIO);
                }
            }
        }
        for (_, done) in self.commands.try_iter() {
            done.fail(libc::ESHUTDOWN);
        }
        self.queue
    }

    fn serve(&mut self) -> Result<(), front::Error> {
        loop {
            while let Ok((command, done)) = self.commands.try_recv() {
                let job = place(&mut self.jobs, Job::new(command, done));
                self.ready.push_back(job);
            }
            self.make_requests();
            self.queue.publish()?;
            let mut finished = false;
            while let Some(outcome) = self.queue.outcome()? {
                self.finish(outcome.tag as usize, outcome.status);
                finished = true;
            }
            let idle = self.jobs.iter().all(Option::is_none);
            if self.stop.load(Ordering::Acquire) {
                if idle && self.commands.is_empty() {
                    return Ok(());
                }
                // A backend that lost its medium never answers what it cannot answer truthfully.
                if self.stopping_since.get_or_insert_with(Instant::now).elapsed() > LAST_ANSWERS {
                    return Err(front::Error::Backend("requests stayed without an answer".to_owned()));
                }
            }
            if !finished && self.commands.is_empty() {
                self.queue.wait(Some(self.wake.as_fd()), Duration::from_secs(1))?;
                // Empty is as good: what counts is that it is empty before the commands are looked at again.
                let _ = rustix::io::read(&*self.wake, &mut [0; 8]);
            }
        }
    }

    /// Puts as many requests into the ring as there is room for, oldest job first.
    fn make_requests(&mut self) {
        while let Some(&number) = self.ready.front() {
            // Before anything is popped: a job that waits for room for its flush would be put back, for ever.
            if self.queue.free() == 0 {
                return;
            }
            let Some(job) = self.jobs[number].as_mut() else {
                self.ready.pop_front();
                continue;
            };
            if job.left == 0 || job.failed {
                self.ready.pop_front();
                self.end_if_done(number);
                continue;
            }
            match job.kind {
                Kind::Discard => {
                    let (sector, sectors) = (job.offset / 512, job.left / 512);
                    job.left = 0;
                    job.in_flight += 1;
                    let tag = place(&mut self.requests, Request { job: number, pages: Vec::new(), at: 0, len: 0 });
                    self.queue.submit_discard(sector, sectors, tag as u64);
                }
                // Only reads, writes and zeros are left: a flush has no bytes.
                _ if self.free_pages.is_empty() => return,
                _ => self.transfer(number),
            }
        }
    }

    /// Makes one request for as much of a job as fits into it.
    fn transfer(&mut self, number: usize) {
        let Some(job) = self.jobs[number].as_mut() else { return };
        let most = self.queue.max_pieces().min(self.free_pages.len()) * PAGE;
        let len = usize::try_from(job.left).unwrap_or(usize::MAX).min(most);
        let pages = self.free_pages.split_off(self.free_pages.len() - len.div_ceil(PAGE));
        let mut pieces = Vec::with_capacity(pages.len());
        for (index, &page) in pages.iter().enumerate() {
            let (from, part) = (index * PAGE, (len - index * PAGE).min(PAGE));
            pieces.push(Piece { page, first: 0, last: (part / 512 - 1) as u8 });
            let memory = page as usize * PAGE;
            match job.kind {
                Kind::Write => {
                    self.queue.data().copy_in(memory, &job.data[job.at + from..job.at + from + part]);
                }
                Kind::Zero => self.queue.data().zero(memory, part),
                _ => {}
            }
        }
        let operation = if job.kind == Kind::Read { op::READ } else { op::WRITE };
        let tag = place(&mut self.requests, Request { job: number, pages, at: job.at, len });
        self.queue.submit(operation, job.offset / 512, &pieces, tag as u64);
        job.offset += len as u64;
        job.left -= len as u64;
        job.at += len;
        job.in_flight += 1;
    }

    /// Takes in an answer.
    fn finish(&mut self, tag: usize, status: i16) {
        let Some(Request { job: number, pages, at, len }) = self.requests[tag].take() else { return };
        if let Some(job) = self.jobs[number].as_mut() {
            job.in_flight -= 1;
            job.failed |= status != 0;
            if job.kind == Kind::Read && status == 0 {
                for (index, &page) in pages.iter().enumerate() {
                    let from = index * PAGE;
                    let part = (len - from).min(PAGE);
                    let data = &mut job.data[at + from..at + from + part];
                    self.queue.data().copy_out(page as usize * PAGE, data);
                }
            }
        }
        self.free_pages.extend(pages);
        self.end_if_done(number);
    }

    /// Answers a job that has nothing left to do, after the flush it may have asked for.
    fn end_if_done(&mut self, number: usize) {
        let Some(job) = self.jobs[number].as_mut() else { return };
        if job.in_flight > 0 || (job.left > 0 && !job.failed) {
            return;
        }
        if job.flush_after && !job.failed {
            if self.queue.free() == 0 {
                self.ready.push_back(number);
                return;
            }
            job.flush_after = false;
            job.in_flight = 1;
            let tag = place(&mut self.requests, Request { job: number, pages: Vec::new(), at: 0, len: 0 });
            self.queue.submit(op::FLUSH_DISKCACHE, 0, &[], tag as u64);
            return;
        }
        let Some(mut job) = self.jobs[number].take() else { return };
        let Some(done) = job.done.take() else { return };
        match job.failed {
            true => done.fail(libc::EIO),
            false => done.succeed(if job.kind == Kind::Read { job.data } else { Vec::new() }),
        }
    }
}

/// Puts something into the first free place.
fn place<T>(places: &mut Vec<Option<T>>, thing: T) -> usize {
    let free = places.iter().position(Option::is_none).unwrap_or(places.len());
    if free == places.len() {
        places.push(Some(thing));
    } else {
        places[free] = Some(thing);
    }
    free
}
