//! The yardstick: the same load by io_uring straight on the file, as fast as this machine does it.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use hypervisor::memory::{IoList, Mapping};
use ring::uring::{FileSlot, Operation, Uring};
use rustix::fs::OFlags;

use crate::Failure;
use crate::disk::{Measured, Round};
use crate::load::Requests;
use crate::placement;

/// Runs `requests` of `block` bytes at `depth` on the calling thread, for the round's time.
///
/// # Errors
/// When the file cannot be opened like the backend opens it, or a request fails.
pub fn run(path: &Path, direct: bool, requests: &mut Requests, round: &Round) -> Result<Measured, Failure> {
    let direct = if direct { OFlags::DIRECT } else { OFlags::empty() };
    let file = File::options()
        .read(true)
        .write(round.pattern.writes())
        .custom_flags((OFlags::NONBLOCK | direct).bits().cast_signed())
        .open(path)?;
    let block = round.block as usize;
    let memory = Rc::new(Mapping::anonymous(round.depth as usize * block)?);
    let mut ring: Uring<u32> = Uring::new(round.depth, &[file.as_fd()])?;
    let mut lists: Vec<IoList> = (0..round.depth).map(|_| IoList::with_capacity(1)).collect();
    let mut started = vec![Instant::now(); round.depth as usize];
    let mut ready: Vec<u32> = (0..round.depth).collect();
    let mut measured = Measured::default();
    let (began, cpu) = (Instant::now(), placement::thread_time());
    let mut now = began;
    while measured.requests < u64::MAX {
        let over = now.duration_since(began) >= round.time;
        for slot in ready.drain(..) {
            if over {
                continue;
            }
            let request = requests.next_request();
            let mut list = std::mem::take(&mut lists[slot as usize]);
            list.clear();
            list.push(&memory, slot as usize * block, block);
            let operation =
                if request.write { Operation::Write(request.offset) } else { Operation::Read(request.offset) };
            started[slot as usize] = now;
            ring.push(FileSlot(0), operation, list, slot);
        }
        if ring.in_flight() == 0 {
            break;
        }
        ring.submit()?;
        if !ring.has_completions() {
            ring.wait(Some(Duration::from_secs(1)))?;
        }
        now = Instant::now();
        while let Some(done) = ring.reap() {
            let moved = done.result?;
            if u64::from(moved) != round.block {
                return Err(format!("a request moved {moved} of {} bytes", round.block).into());
            }
            lists[done.token as usize] = done.memory;
            measured.record(now.duration_since(started[done.token as usize]), round.block);
            ready.push(done.token);
        }
        round.show(&measured, now.duration_since(began));
    }
    measured.elapsed = began.elapsed();
    measured.cpu = placement::thread_time().saturating_sub(cpu);
    Ok(measured)
}
