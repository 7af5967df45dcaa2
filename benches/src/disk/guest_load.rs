//! The guest's side of a measurement.

use std::time::{Duration, Instant};

use blkback::abi::op;
use blkback::front::{Piece, Queue};
use blkback::patience::Patience;

use super::measured::{Measured, Round};
use crate::Failure;
use crate::load::Requests;
use crate::placement;

/// Runs `requests` through `queue` on the calling thread, for the round's time.
///
/// # Errors
/// When the backend breaks the protocol, or a request fails.
pub(super) fn run(queue: &mut Queue, requests: &mut Requests, round: &Round) -> Result<Measured, Failure> {
    let pages = (round.block as usize).div_ceil(4096) as u32;
    let pieces: Vec<Vec<Piece>> = (0..round.depth)
        .map(|slot| {
            (0..pages)
                .map(|page| {
                    let sectors = (round.block / 512 - u64::from(page) * 8).min(8) as u8;
                    Piece { page: slot * pages + page, first: 0, last: sectors - 1 }
                })
                .collect()
        })
        .collect();
    let mut started = vec![Instant::now(); round.depth as usize];
    let mut ready: Vec<u32> = (0..round.depth).collect();
    let mut in_flight = 0;
    let mut patience = Patience::default();
    let mut measured = Measured::default();
    let (began, cpu) = (Instant::now(), placement::thread_time());
    let mut now = began;
    loop {
        let over = now.duration_since(began) >= round.time;
        for slot in ready.drain(..) {
            if over {
                continue;
            }
            let request = requests.next_request();
            let operation = if request.write { op::WRITE } else { op::READ };
            started[slot as usize] = now;
            queue.submit(operation, request.offset / 512, &pieces[slot as usize], slot.into());
            in_flight += 1;
        }
        if in_flight == 0 {
            break;
        }
        queue.publish()?;
        wait(queue, &mut patience)?;
        now = Instant::now();
        while let Some(outcome) = queue.outcome()? {
            if outcome.status != 0 {
                return Err(format!("a request failed with status {}", outcome.status).into());
            }
            let slot = outcome.tag as u32;
            measured.record(now.duration_since(started[slot as usize]), round.block);
            ready.push(slot);
            in_flight -= 1;
        }
        round.show(&measured, now.duration_since(began));
    }
    measured.elapsed = began.elapsed();
    measured.cpu = placement::thread_time().saturating_sub(cpu);
    Ok(measured)
}

/// Looks for an answer for a while, then sleeps.
fn wait(queue: &mut Queue, patience: &mut Patience) -> Result<(), Failure> {
    let longest = patience.look();
    if !longest.is_zero() {
        let began = Instant::now();
        while began.elapsed() < longest {
            for _ in 0..16 {
                if queue.has_outcome()? {
                    patience.found();
                    return Ok(());
                }
                std::hint::spin_loop();
            }
        }
        patience.found_nothing();
    }
    let began = Instant::now();
    while !queue.wait(None, Duration::from_secs(1))? {}
    patience.slept(began.elapsed());
    Ok(())
}
