//! Both halves of a ring against the simplest model there is, with indices that start anywhere, above all near 2^32.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::VecDeque;
use std::sync::Arc;

use hypervisor::PAGE_SIZE;
use hypervisor::memory::Mapping;
use proptest::prelude::*;
use ring::{BackRing, FrontRing, Layout, Overflow};

#[derive(Debug, Clone)]
enum Step {
    Request,
    PublishRequests,
    Consume,
    Respond,
    PublishResponses,
    Take,
    RearmBack,
    RearmFront,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    use Step::*;
    let step = prop_oneof![
        4 => Just(Request), 2 => Just(PublishRequests), 4 => Just(Consume), 4 => Just(Respond),
        2 => Just(PublishResponses), 4 => Just(Take), 1 => Just(RearmBack), 1 => Just(RearmFront)
    ];
    prop::collection::vec(step, 1..600)
}

fn starts() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0), (u32::MAX - 600)..=u32::MAX, any::<u32>()]
}

proptest! {
    #[test]
    fn the_ring_is_a_pair_of_queues(start in starts(), stride in prop_oneof![Just(108usize), Just(112), Just(8), Just(12)],
                                    pages in 1usize..=4, steps in steps()) {
        let layout = Layout::new(stride, pages);
        let memory = Arc::new(Mapping::anonymous(pages * PAGE_SIZE).unwrap());
        let mut front = FrontRing::init_at(Arc::clone(&memory), layout, start);
        let mut back = BackRing::attach(Arc::clone(&memory), layout, start);

        let (mut written, mut visible, mut taken) = (VecDeque::new(), VecDeque::new(), VecDeque::new());
        let (mut answered, mut answers) = (VecDeque::new(), VecDeque::new());
        let (mut back_sleeps, mut front_sleeps) = (true, true);
        let mut number = 0u64;
        for step in steps {
            match step {
                Step::Request => {
                    let outstanding = written.len() + visible.len() + taken.len() + answered.len() + answers.len();
                    prop_assert_eq!(front.free() as usize, layout.entries() as usize - outstanding);
                    if front.free() > 0 {
                        front.request(&number.to_le_bytes());
                        written.push_back(number);
                        number += 1;
                    }
                }
                Step::PublishRequests => {
                    let news = !written.is_empty();
                    let notify = front.publish();
                    if back_sleeps && news {
                        prop_assert!(notify, "the backend sleeps and was not woken");
                    }
                    if notify {
                        back_sleeps = false;
                    }
                    visible.append(&mut written);
                }
                Step::Consume => {
                    let mut record = [0; 8];
                    prop_assert_eq!(back.pending().unwrap() as usize, visible.len());
                    let got = back.consume(&mut record).then(|| u64::from_le_bytes(record));
                    let expected = visible.pop_front();
                    prop_assert_eq!(got, expected);
                    taken.extend(expected);
                }
                Step::Respond => {
                    if let Some(number) = taken.pop_front() {
                        back.respond(&(!number).to_le_bytes());
                        answered.push_back(!number);
                    }
                    prop_assert_eq!(back.outstanding() as usize, taken.len());
                }
                Step::PublishResponses => {
                    let news = !answered.is_empty();
                    let notify = back.publish();
                    if front_sleeps && news {
                        prop_assert!(notify, "the frontend sleeps and was not woken");
                    }
                    if notify {
                        front_sleeps = false;
                    }
                    answers.append(&mut answered);
                }
                Step::Take => {
                    let mut record = [0; 8];
                    prop_assert_eq!(front.pending().unwrap() as usize, answers.len());
                    let got = front.consume(&mut record).then(|| u64::from_le_bytes(record));
                    prop_assert_eq!(got, answers.pop_front());
                }
                Step::RearmBack => back_sleeps = back.rearm().unwrap() == 0,
                Step::RearmFront => front_sleeps = front.rearm().unwrap() == 0,
            }
        }
    }

    #[test]
    fn an_impossible_request_producer_is_an_overflow(start in starts(), jump in 33u32..=u32::MAX) {
        let memory = Arc::new(Mapping::anonymous(PAGE_SIZE).unwrap());
        let layout = Layout::new(112, 1);
        let _front = FrontRing::init_at(Arc::clone(&memory), layout, start);
        let mut back = BackRing::attach(Arc::clone(&memory), layout, start);
        memory.write_record(ring::layout::REQ_PROD, &start.wrapping_add(jump).to_le_bytes());
        let expected = Overflow { name: "req_prod", index: start.wrapping_add(jump), base: start, size: 32 };
        prop_assert_eq!(back.pending(), Err(expected));
        prop_assert_eq!(back.rearm(), Err(expected));
        prop_assert!(!back.consume(&mut [0; 8]), "nothing of a broken ring is taken");
    }

    #[test]
    fn an_impossible_response_producer_is_an_overflow(start in starts(), asked in 0u32..=32, jump in any::<u32>()) {
        let memory = Arc::new(Mapping::anonymous(PAGE_SIZE).unwrap());
        let mut front = FrontRing::init_at(Arc::clone(&memory), Layout::new(112, 1), start);
        for _ in 0..asked {
            front.request(&[0; 8]);
        }
        let _ = front.publish();
        memory.write_record(ring::layout::RSP_PROD, &start.wrapping_add(jump).to_le_bytes());
        prop_assert_eq!(front.pending().is_err(), jump > asked);
    }
}

/// A producer that goes back by one after its request was taken: seen from rsp_prod it is still in range.
#[test]
fn a_producer_cannot_take_back_what_was_consumed() {
    let memory = Arc::new(Mapping::anonymous(PAGE_SIZE).unwrap());
    let layout = Layout::new(112, 1);
    let mut front = FrontRing::init(Arc::clone(&memory), layout);
    let mut back = BackRing::attach(Arc::clone(&memory), layout, 0);
    front.request(&[0; 8]);
    front.request(&[0; 8]);
    assert!(front.publish());
    assert_eq!(back.pending(), Ok(2));
    assert!(back.consume(&mut [0; 8]) && back.consume(&mut [0; 8]));
    memory.write_record(ring::layout::REQ_PROD, &1u32.to_le_bytes());
    assert!(back.pending().is_err());
}

#[test]
#[should_panic(expected = "a response without a request")]
fn answering_twice_panics() {
    let memory = Arc::new(Mapping::anonymous(PAGE_SIZE).unwrap());
    let layout = Layout::new(112, 1);
    let mut front = FrontRing::init(Arc::clone(&memory), layout);
    let mut back = BackRing::attach(Arc::clone(&memory), layout, 0);
    front.request(&[0; 8]);
    assert!(front.publish());
    back.pending().unwrap();
    assert!(back.consume(&mut [0; 8]));
    back.respond(&[0; 8]);
    back.respond(&[0; 8]);
}
