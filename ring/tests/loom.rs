//! The notification race, in every order a weak memory allows: loom runs both halves of the ring against each other
//! and finds a schedule, if there is one, in which a side sleeps although there is work for it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use loom::sync::Notify;
use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
use loom::thread;
use std::sync::Arc;

use ring::{BackRing, Field, FrontRing, Layout, RingMemory};

/// A ring of one page as loom sees it: four indices, and one number a slot.
#[derive(Debug)]
struct Page {
    indices: [AtomicU32; 4],
    slots: [AtomicU32; 2],
    fenced: bool,
}

impl RingMemory for Page {
    fn load(&self, field: Field) -> u32 {
        self.indices[field as usize].load(Ordering::Acquire)
    }

    fn store(&self, field: Field, value: u32) {
        self.indices[field as usize].store(value, Ordering::Release);
    }

    fn fence(&self) {
        if self.fenced {
            fence(Ordering::SeqCst);
        }
    }

    fn read_slot(&self, offset: usize, record: &mut [u8]) {
        let value = self.slots[slot(offset)].load(Ordering::Relaxed);
        record.copy_from_slice(&value.to_ne_bytes());
    }

    fn write_slot(&self, offset: usize, record: &[u8]) {
        self.slots[slot(offset)].store(u32::from_ne_bytes(record.try_into().unwrap()), Ordering::Relaxed);
    }
}

/// Slots so far apart that one page holds two.
const LAYOUT: Layout = Layout::new(2000, 1);
const _: () = assert!(LAYOUT.entries() == 2);

fn slot(offset: usize) -> usize {
    (offset - 64) / LAYOUT.stride()
}

fn ring(fenced: bool) -> (FrontRing<Arc<Page>>, BackRing<Arc<Page>>) {
    let page = Arc::new(Page {
        indices: std::array::from_fn(|_| AtomicU32::new(0)),
        slots: std::array::from_fn(|_| AtomicU32::new(0)),
        fenced,
    });
    (FrontRing::init(Arc::clone(&page), LAYOUT), BackRing::attach(page, LAYOUT, 0))
}

/// All schedules with at most three preemptions: the lost wake-up needs one.
fn explore(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

const REQUESTS: u32 = 2;

/// Requests travel to a backend that sleeps whenever it finds nothing. A lost notification is a deadlock, which loom
/// reports.
fn requests_arrive(fenced: bool) {
    explore(move || {
        let (mut front, mut back) = ring(fenced);
        let bell = Arc::new(Notify::new());
        let backend = {
            let bell = Arc::clone(&bell);
            thread::spawn(move || {
                let mut record = [0; 4];
                let mut taken = 0;
                while taken < REQUESTS {
                    back.pending().unwrap();
                    if back.consume(&mut record) {
                        assert_eq!(u32::from_ne_bytes(record), 100 + taken, "a request seen before it was written");
                        taken += 1;
                    } else if back.rearm().unwrap() == 0 {
                        bell.wait();
                    }
                }
            })
        };
        for round in 0..REQUESTS {
            front.request(&(100 + round).to_ne_bytes());
            if front.publish() {
                bell.notify();
            }
        }
        backend.join().unwrap();
    });
}

/// The same the other way: answers travel to a frontend that sleeps.
fn answers_arrive(fenced: bool) {
    explore(move || {
        let (mut front, mut back) = ring(fenced);
        let bell = Arc::new(Notify::new());
        let mut record = [0; 4];
        for _ in 0..REQUESTS {
            front.request(&[0; 4]);
        }
        let _ = front.publish();
        back.pending().unwrap();
        for _ in 0..REQUESTS {
            assert!(back.consume(&mut record));
        }
        let frontend = {
            let bell = Arc::clone(&bell);
            thread::spawn(move || {
                let mut record = [0; 4];
                let mut taken = 0;
                while taken < REQUESTS {
                    front.pending().unwrap();
                    if front.consume(&mut record) {
                        assert_eq!(u32::from_ne_bytes(record), 200 + taken, "an answer seen before it was written");
                        taken += 1;
                    } else if front.rearm().unwrap() == 0 {
                        bell.wait();
                    }
                }
            })
        };
        for round in 0..REQUESTS {
            back.respond(&(200 + round).to_ne_bytes());
            if back.publish() {
                bell.notify();
            }
        }
        frontend.join().unwrap();
    });
}

#[test]
fn no_request_is_overslept() {
    requests_arrive(true);
}

#[test]
fn no_answer_is_overslept() {
    answers_arrive(true);
}

/// The proof that the tests above can fail: the same code on memory whose fence does nothing.
#[test]
fn without_the_fence_a_wake_up_is_lost() {
    for unfenced in [requests_arrive, answers_arrive] {
        let outcome = std::panic::catch_unwind(|| unfenced(false));
        assert!(outcome.is_err(), "loom did not find the lost wake-up");
    }
}

/// loom's own sanity: an acquire load that sees the flag sees what was written before it.
#[test]
fn loom_models_release_and_acquire() {
    loom::model(|| {
        let (flag, data) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let (flag2, data2) = (Arc::clone(&flag), Arc::clone(&data));
        let writer = thread::spawn(move || {
            data2.store(1, Ordering::Relaxed);
            flag2.store(true, Ordering::Release);
        });
        if flag.load(Ordering::Acquire) {
            assert_eq!(data.load(Ordering::Relaxed), 1);
        }
        writer.join().unwrap();
    });
}
