//! A queue stepped by hand, with the clock in the test's hands: what happens to a guest that posts no pages.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod rig;

use std::time::{Duration, Instant};

use netback::abi::{CtrlRequest, TxRequest, status};
use netback::credit::Rate;
use netback::rx::{BACKLOG, DRAIN, DRAIN_UNTOLD, STALL};
use rig::Rig;

/// XSA-392: the guest keeps its ring almost, but not quite, full.
#[test]
fn a_frame_waits_for_enough_pages_and_is_dropped_in_the_end() {
    let mut rig = Rig::new(true, None);
    let start = Instant::now();
    rig.post(1);
    rig.turn(start);
    rig.frame(9000, 1);
    rig.frame(100, 2);
    rig.turn(start);
    // The first needs three pages; the second stays behind it, though it would fit.
    assert!(rig.received().is_empty());
    assert!(rig.queue().wants_frames(), "what comes meanwhile is not left to the kernel to keep");
    assert!(!rig.queue().rearm().unwrap(), "a page that is known already keeps us awake");
    let deadline = rig.queue().deadline().unwrap();
    assert!(deadline <= start + DRAIN && deadline > start + DRAIN / 2);
    // Two more, and it goes through.
    rig.post(2);
    assert!(rig.queue().has_work().unwrap());
    rig.turn(start + Duration::from_secs(9));
    assert_eq!(rig.received(), [4096, 4096, 808]);
    rig.post(1);
    rig.turn(start + Duration::from_secs(9));
    assert_eq!(rig.received(), [100]);
    // The next time nobody comes.
    rig.frame(9000, 3);
    rig.turn(start + Duration::from_secs(20));
    rig.frame(9000, 4);
    rig.turn(start + Duration::from_secs(29));
    assert_eq!(rig.counters.rx_dropped.get(), 0);
    rig.turn(start + Duration::from_secs(30));
    // And what came meanwhile goes with it: nobody wants old frames.
    assert_eq!(rig.counters.rx_dropped.get(), 2);
    rig.frame(9000, 5);
    rig.turn(start + Duration::from_secs(31));
    assert_eq!(rig.counters.rx_dropped.get(), 3);
    rig.post(3);
    rig.turn(start + Duration::from_secs(32));
    rig.frame(9000, 6);
    rig.turn(start + Duration::from_secs(32));
    assert_eq!(rig.received(), [4096, 4096, 808]);
}

/// Behind a frame that waits as many bytes are kept as Linux keeps, and in their order; the rest is dropped.
#[test]
fn half_a_mebibyte_is_kept_behind_a_frame_that_waits() {
    let mut rig = Rig::new(true, None);
    let start = Instant::now();
    rig.post(1);
    rig.turn(start);
    let sent = BACKLOG / 9000 + 20;
    for number in 0..sent {
        rig.frame(9000 - number, 1);
        rig.turn(start);
    }
    let dropped = rig.counters.rx_dropped.get() as usize;
    assert!((10..20).contains(&dropped), "{dropped} of {sent} were dropped");
    assert!(rig.received().is_empty());
    for number in 0..sent - dropped {
        rig.post(if number == 0 { 2 } else { 3 });
        rig.turn(start);
        assert_eq!(rig.received(), [4096, 4096, 808 - number as i16]);
    }
    assert_eq!(rig.counters.rx_dropped.get() as usize, dropped);
}

#[test]
fn a_guest_without_pages_stalls_and_gets_ready_again() {
    let mut rig = Rig::new(true, None);
    let start = Instant::now();
    // At first it has none: no frame is read, and its first page makes it ready.
    rig.frame(100, 1);
    rig.turn(start);
    assert!(!rig.queue().wants_frames());
    rig.post(1);
    assert!(rig.queue().rearm().unwrap(), "the first page is not waited for");
    rig.turn(start);
    rig.turn(start);
    assert_eq!(rig.received(), [100]);
    // It has used its page. After a minute it has stalled, once; then nothing is due any more.
    let deadline = rig.queue().deadline().unwrap();
    rig.turn(deadline - Duration::from_millis(1));
    assert!(rig.queue().wants_frames());
    rig.turn(start + STALL);
    assert!(!rig.queue().wants_frames() && rig.queue().deadline().is_none());
    rig.post(1);
    assert!(rig.queue().has_work().unwrap());
    rig.turn(start + STALL * 2);
    assert!(rig.queue().wants_frames());
    assert!(rig.queue().deadline().is_none(), "a guest with pages and nothing to receive has all the time");
}

#[test]
fn a_guest_that_does_not_tell_is_looked_at_often() {
    let mut rig = Rig::new(false, None);
    let start = Instant::now();
    rig.frame(100, 1);
    rig.turn(start);
    assert!(rig.queue().deadline().unwrap() < Instant::now() + DRAIN_UNTOLD);
    rig.post(1);
    rig.turn(start + DRAIN_UNTOLD / 2);
    assert_eq!(rig.received(), [100]);
    rig.frame(100, 2);
    rig.turn(start + Duration::from_secs(1));
    rig.turn(start + Duration::from_secs(1) + DRAIN_UNTOLD);
    assert_eq!(rig.counters.rx_dropped.get(), 1);
    assert!(rig.queue().wants_frames(), "it lost its carrier");
    rig.post(1);
    rig.frame(100, 3);
    rig.turn(start + Duration::from_secs(600));
    assert_eq!(rig.received(), [100]);
}

#[test]
fn a_rate_lets_packets_wait_in_the_ring() {
    let rate = Rate { bytes: 1000, interval: Duration::from_secs(1) };
    let mut rig = Rig::new(true, Some(rate));
    let start = Instant::now();
    for id in 0..5 {
        let request = TxRequest { gref: rig.pages.refs[0], offset: 0, flags: 0, id, size: 600 };
        rig.tx.front.request(&request.encode());
    }
    assert!(rig.tx.front.publish());
    let answered = |rig: &mut Rig, now| {
        rig.turn(now);
        let sent = rig.sent();
        assert!(sent.iter().all(|&(_, status)| status == status::OKAY), "{sent:?}");
        sent.len()
    };
    assert_eq!(answered(&mut rig, start), 1);
    assert!(!rig.queue().has_work().unwrap() && !rig.queue().rearm().unwrap(), "what has to wait keeps us awake");
    let until = rig.queue().deadline().unwrap();
    assert_eq!(answered(&mut rig, until - Duration::from_millis(1)), 0);
    assert_eq!(answered(&mut rig, until), 2);
    rig.live.set_rate(None);
    assert_eq!(answered(&mut rig, until), 2);
}

/// A guest that sets up its hashing asks again and again and sends nothing. Were that no work, its events would be taken
/// for a storm (XSA-332), and each of its requests would wait longer than the one before.
#[test]
fn an_answered_control_request_is_work() {
    let mut rig = Rig::new(true, None);
    let now = Instant::now();
    assert!(rig.queue().turn(now).unwrap().is_idle());
    for id in 0..2 {
        rig.control.front.request(&CtrlRequest { id, kind: 99, data: [0; 3] }.encode());
    }
    assert!(rig.control.front.publish());
    let progress = rig.queue().turn(now).unwrap();
    assert_eq!(progress.answered, 2);
    assert!(!progress.is_idle());
    assert!(rig.queue().turn(now).unwrap().is_idle());
}
