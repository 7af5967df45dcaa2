//! blkback's queue over the simulated disk: nothing is lost, and the checker finds what is planted.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use system_tests::quick;
use system_tests::sim::checker::Class;
use system_tests::sim::explore::{Explorer, Failure};
use system_tests::sim::matrix::{FAILURES, ROWS, Real, expected, simulated};
use system_tests::sim::plant::{Bug, both_get_the_lock};

/// Crashes within which each planted bug must show: seconds' worth.
const ENOUGH: u64 = 200_000;

fn fail(failure: &Failure) -> ! {
    let trace = Explorer::replay(None, &failure.id).unwrap_or_else(|problem| problem);
    panic!("{}: {}\n{trace}\nsimdisk --replay {}", failure.finding.class, failure.finding.text, failure.id);
}

#[test]
fn short_histories_lose_nothing_in_any_order() {
    let mut explorer = Explorer::default();
    let longest = 2;
    for length in 1..=longest {
        explorer.enumerate(length, true, u64::MAX).unwrap_or_else(|failure| fail(&failure));
        explorer.enumerate(length, false, 20).unwrap_or_else(|failure| fail(&failure));
    }
    println!("{}", explorer.totals);
    assert!(explorer.totals.sequences >= 2 * (8 + 128));
}

#[test]
fn random_histories_lose_nothing() {
    let mut explorer = Explorer::default();
    let crashes = if quick() { 20_000 } else { 200_000 };
    for seed in 0.. {
        explorer.seed(seed).unwrap_or_else(|failure| fail(&failure));
        if explorer.totals.all_crashes() >= crashes {
            break;
        }
    }
    println!("{}", explorer.totals);
    assert!(explorer.totals.faulty.1 > 0, "flushes fail in some of them");
}

/// Plays until a bug shows as `class`, and returns after how many crashes.
fn caught(bug: Bug, class: Class) -> u64 {
    let mut explorer = Explorer::new(Some(bug));
    for seed in 0.. {
        if let Err(failure) = explorer.seed(seed)
            && failure.finding.class == class
        {
            let trace = Explorer::replay(Some(bug), &failure.id).unwrap();
            assert!(trace.contains(&format!("FOUND {class}")), "the seed replays it: {trace}");
            break;
        }
        assert!(explorer.totals.all_crashes() < ENOUGH, "{bug:?} does not show as {class}");
    }
    explorer.totals.all_crashes()
}

#[test]
fn planted_bugs_are_caught() {
    let bugs = [
        (Bug::FlushDoesNothing, Class::LostFlushed),
        (Bug::FlushAnsweredEarly, Class::LostFlushed),
        (Bug::WriteAnsweredEarly, Class::LostAcknowledged),
        (Bug::BarrierPerQueue, Class::Reordered),
        (Bug::RetryAfterError, Class::LostFlushed),
        (Bug::DiscardRoundedOutward, Class::Misdirected),
        (Bug::LockOnPath, Class::Foreign),
        (Bug::AnswerTwice, Class::AnsweredTwice),
    ];
    assert_eq!(bugs.map(|(bug, _)| bug), Bug::ALL);
    for (bug, class) in bugs {
        println!("{:<24} caught as {class:<18} after {:>7} crashes", bug.name(), caught(bug, class));
    }
}

/// The same two guests, and blkback's own lock between them.
#[test]
fn the_real_lock_lets_one_guest_in() {
    assert!(both_get_the_lock(true).unwrap() && !both_get_the_lock(false).unwrap());
    let mut explorer = Explorer::with_real_lock().unwrap();
    for seed in 0..200 {
        explorer.seed(seed).unwrap_or_else(|failure| fail(&failure));
    }
}

/// Never OK for data that are not there; no write and no flush OK after a failed flush.
#[test]
fn every_failure_at_every_step() {
    let mut cells = 0;
    let mut real_cells = 0;
    let header: String = FAILURES.iter().map(|(name, _)| format!("{name:<11}")).collect();
    println!("{:<26}{:<11}{header}", "fails in", "on");
    for row in &ROWS {
        let (mut simulated_line, mut real_line) = (String::new(), String::new());
        for (name, errno) in FAILURES {
            let Some(expected) = expected(row, errno) else {
                simulated_line += "-          ";
                real_line += "-          ";
                continue;
            };
            let verdict = simulated(row, errno, if quick() { 10 } else { 50 });
            let verdict =
                verdict.unwrap_or_else(|found| panic!("{}, {name}: {}: {}", row.name, found.class, found.text));
            assert_eq!(verdict, expected, "{}, {name}", row.name);
            simulated_line += &format!("{verdict:<11}");
            cells += 1;
            // Of its own thread: it gets a mount namespace of its own.
            let row = *row;
            let real = std::thread::spawn(move || match Real::new() {
                Ok(mut real) => {
                    let verdict = real.play(&row, errno);
                    Some(verdict.unwrap_or_else(|f| panic!("{}, {name}, real: {}: {}", row.name, f.class, f.text)))
                }
                Err(error) => {
                    println!("NOT TESTED: {} with {name} from a real kernel: {error}", row.name);
                    None
                }
            });
            match real.join().unwrap() {
                Some(verdict) => {
                    assert_eq!(verdict, expected, "{}, {name}, real", row.name);
                    real_line += &format!("{verdict:<11}");
                    real_cells += 1;
                }
                None => real_line += "?          ",
            }
        }
        println!("{:<26}{:<11}{}", row.name, "simulated", simulated_line.trim_end());
        println!("{:<26}{:<11}{}", "", "a file", real_line.trim_end());
    }
    println!("{cells} cells simulated, {real_cells} on a file that fails (FUSE) through io_uring");
    assert!(cells >= 35);
}
