//! blkback's queue over the simulated disk: nothing is lost, and the checker finds what is planted.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::time::Duration;

use blkback::abi::op;
use blkback::doubt;
use hypervisor::DomId;
use system_tests::quick;
use system_tests::sim::bench::What;
use system_tests::sim::checker::Class;
use system_tests::sim::explore::{Explorer, Failure};
use system_tests::sim::fuse::Failure as Fails;
use system_tests::sim::matrix::{FAILURES, ROWS, Real, expected, simulated};
use system_tests::sim::plant::{Bug, both_get_the_lock};
use system_tests::sim::served::Served;
use system_tests::sim::size;

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

/// A disk's size that cannot be found out, or is nonsense, when it may have grown and when another one is inserted: the
/// guest keeps what it has, the administrator is told, and the next good answer is taken.
#[test]
fn every_wrong_size() {
    let header: String = size::ANSWERS.iter().map(|(name, _)| format!("{name:<11}")).collect();
    println!("{:<26}{:<11}{header}", "fails in", "on");
    let mut cells = 0;
    for (row, asked) in size::ROWS {
        let mut line = String::new();
        for (name, answer) in size::ANSWERS {
            // Of its own thread: it gets a mount namespace of its own.
            match std::thread::spawn(move || size::play(asked, answer)).join().unwrap() {
                Ok(verdict) => {
                    assert_eq!(verdict, size::expected(asked, answer), "{row}, {name}");
                    line += &format!("{verdict:<11}");
                    cells += 1;
                }
                Err(None) => line += "?          ",
                Err(Some(text)) => panic!("{row}, {name}: {text}"),
            }
        }
        println!("{row:<26}{:<11}{}", "a file", line.trim_end());
    }
    println!("{cells} cells on a file that fails (FUSE)");
}

/// A flush fails, the disk is detached, the backend is started anew: nobody gets to write to the disk before somebody has
/// said that it was checked. The kernel alone would say that all is well.
#[test]
fn a_failed_flush_is_remembered() {
    // Of its own thread: it gets a mount namespace of its own.
    std::thread::spawn(|| {
        let mut served = match Served::new(64 << 10) {
            Ok(served) => served,
            Err(error) => return println!("NOT TESTED: a failed flush that is remembered: {error}"),
        };
        let (image, guest) = (served.mounted.path(), served.guest("guest").unwrap());
        let mut disk = served.connect(&guest, &image, "xvda", ",w").unwrap();
        assert_eq!(disk.write(8, 5), Ok(0));
        served.mounted.medium().failure = Some(Fails { what: What::Flush, after: 0, errno: Some(libc::EIO), times: 1 });
        assert_eq!(disk.ask(op::FLUSH_DISKCACHE, 0, Duration::from_millis(200)), Ok(None), "no answer is given");
        disk.wait("error", |error| error.is_some_and(|error| error.contains("flush failed"))).unwrap();
        assert!(served.list(&guest).unwrap().contains("flush failed"));
        let vdev = disk.vdev;
        drop(disk);
        served.detach(&guest, vdev).unwrap();
        for restarted in [false, true] {
            if restarted {
                served.restart().unwrap();
            }
            let error = served.attach(&guest, &image, "xvda,w").unwrap_err();
            assert!(error.contains("flush failed") && error.contains("blkback checked"), "{error}");
            // To look at it is how one finds out.
            let mut look = served.connect(&guest, &image, "xvda", ",r").unwrap();
            assert_eq!(look.read(8), Ok(Ok(5)));
            look.close().unwrap();
            served.detach(&guest, vdev).unwrap();
        }
        assert_eq!(doubt::all(&served.store, DomId::DOM0).unwrap().len(), 1);
        assert!(doubt::checked(&served.store, DomId::DOM0, &image).unwrap());
        let mut disk = served.connect(&guest, &image, "xvda", ",w").unwrap();
        assert_eq!((disk.write(8, 6), disk.read(8)), (Ok(0), Ok(Ok(6))));
        disk.close().unwrap();
    })
    .join()
    .unwrap();
}
