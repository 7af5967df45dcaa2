//! A disk in memory: what the server is tested on, and the baseline that costs next to nothing.

use super::disk::{Command, Completion, Disk, Geometry, GeometryError};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// How long an unruly disk waits for more commands to shuffle.
const GATHER: Duration = Duration::from_micros(200);

/// A disk in memory, served by a thread of its own. Memory is taken as it is written, as in a sparse file.
#[derive(Debug)]
pub struct RamDisk {
    geometry: Geometry,
    counters: Arc<Counters>,
    // Taken in `drop`, so that the thread sees the end.
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

/// How many commands a [`RamDisk`] was given, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Writes and zeroes that had to be durable when answered.
    pub fua: u64,
    /// Flushes.
    pub flushes: u64,
    /// Trims.
    pub trims: u64,
    /// Zeroes.
    pub zeroes: u64,
    /// Zeroes that had to stay allocated.
    pub no_hole: u64,
    /// Commands answered after a younger one.
    pub overtaken: u64,
}

#[derive(Debug, Default)]
struct Counters {
    reads: AtomicU64,
    writes: AtomicU64,
    fua: AtomicU64,
    flushes: AtomicU64,
    trims: AtomicU64,
    zeroes: AtomicU64,
    no_hole: AtomicU64,
    overtaken: AtomicU64,
}

struct Job {
    command: Command,
    done: Completion,
}

impl RamDisk {
    /// A disk that answers in order.
    pub fn new(geometry: Geometry) -> Result<Self, GeometryError> {
        Self::unruly(geometry, 1)
    }

    /// A disk that gathers up to `window` commands, and executes and answers them in arbitrary order.
    pub fn unruly(geometry: Geometry, window: usize) -> Result<Self, GeometryError> {
        geometry.check()?;
        let size = usize::try_from(geometry.size_bytes).unwrap_or(usize::MAX);
        let (jobs, queue) = mpsc::channel();
        let counters = Arc::new(Counters::default());
        let its_counters = Arc::clone(&counters);
        // `vec!` of zeroes is calloc: pages come with the first write.
        let thread = thread::spawn(move || work(&queue, vec![0; size], window, &its_counters));
        Ok(Self { geometry, counters, jobs: Some(jobs), thread: Some(thread) })
    }

    /// What was asked of the disk so far.
    pub fn counts(&self) -> Counts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let c = &self.counters;
        Counts {
            reads: get(&c.reads),
            writes: get(&c.writes),
            fua: get(&c.fua),
            flushes: get(&c.flushes),
            trims: get(&c.trims),
            zeroes: get(&c.zeroes),
            no_hole: get(&c.no_hole),
            overtaken: get(&c.overtaken),
        }
    }
}

impl Disk for RamDisk {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn submit(&self, command: Command, done: Completion) {
        self.counters.note(&command);
        // Without a thread to take it the job is dropped, and its completion answers EIO.
        if let Some(jobs) = &self.jobs {
            let _ = jobs.send(Job { command, done });
        }
    }
}

impl Drop for RamDisk {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Counters {
    fn note(&self, command: &Command) {
        let (kind, fua, no_hole) = match *command {
            Command::Read { .. } => (&self.reads, false, false),
            Command::Write { fua, .. } => (&self.writes, fua, false),
            Command::Flush => (&self.flushes, false, false),
            Command::Trim { .. } => (&self.trims, false, false),
            Command::WriteZeroes { fua, may_punch, .. } => (&self.zeroes, fua, !may_punch),
        };
        for (counter, counts) in [(kind, true), (&self.fua, fua), (&self.no_hole, no_hole)] {
            counter.fetch_add(counts.into(), Ordering::Relaxed);
        }
    }
}

fn work(queue: &mpsc::Receiver<Job>, mut memory: Vec<u8>, window: usize, counters: &Counters) {
    let mut pending: Vec<(u64, Job)> = Vec::new();
    let (mut arrived, mut youngest) = (0, 0);
    let mut dice = 0x9e37_79b9_7f4a_7c15_u64;
    loop {
        if pending.is_empty() {
            let Ok(job) = queue.recv() else { return };
            pending.push((arrived, job));
            arrived += 1;
        }
        while pending.len() < window
            && let Ok(job) = queue.recv_timeout(GATHER)
        {
            pending.push((arrived, job));
            arrived += 1;
        }
        // xorshift64: arbitrary, and the same in every run.
        dice ^= dice << 13;
        dice ^= dice >> 7;
        dice ^= dice << 17;
        let (number, job) = pending.swap_remove((dice % pending.len() as u64) as usize);
        if number < youngest {
            counters.overtaken.fetch_add(1, Ordering::Relaxed);
        }
        youngest = youngest.max(number);
        execute(&mut memory, job);
    }
}

fn execute(memory: &mut [u8], Job { command, done }: Job) {
    let place = |offset: u64, len: usize| offset as usize..(offset as usize).saturating_add(len);
    // A range outside the disk is somebody's error, and not worth a panic.
    let result = match command {
        Command::Read { offset, len } => memory.get(place(offset, len as usize)).map(<[u8]>::to_vec),
        Command::Write { offset, data, .. } => memory.get_mut(place(offset, data.len())).map(|to| {
            to.copy_from_slice(&data);
            Vec::new()
        }),
        Command::Flush => Some(Vec::new()),
        Command::Trim { offset, len } | Command::WriteZeroes { offset, len, .. } => {
            memory.get_mut(place(offset, len as usize)).map(|to| {
                to.fill(0);
                Vec::new()
            })
        }
    };
    match result {
        Some(data) => done.succeed(data),
        None => done.fail(libc::EINVAL),
    }
}
