//! A backend dies between any two of its steps, and another one takes over its rings: a queue stepped by hand.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod rig;

use std::time::Instant;

use hypervisor::GrantRef;
use netback::abi::{Extra, GsoType, RxResponse, TxRequest, TxResponse, rx_flag, status, tx_flag};
use netback::broken::{Broken, Fatal};
use netback::negotiate::Receives;
use rig::Rig;
use ring::{Field, RingMemory as _};

const RECEIVES: Receives = Receives {
    sg: true,
    gso4: netback::negotiate::Gso::Extra,
    gso6: netback::negotiate::Gso::No,
    checksum4: true,
    checksum6: false,
    notifies: true,
};

fn rig() -> Rig {
    let rig = Rig::without_backend(RECEIVES, None);
    for page in 0..64 {
        rig.pages.memory.copy_in(page * 4096, &[page as u8; 4096]);
    }
    rig
}

/// A request of `size` bytes from the pool's page `page`; what its pages hold is their number.
fn request(rig: &Rig, page: usize, id: u16, flags: u16, size: u16) -> TxRequest {
    TxRequest { gref: rig.pages.refs[page], offset: 0, flags, id, size }
}

fn answer(rig: &Rig, index: u32, id: u16, status: i16) {
    rig.tx.write(index, &TxResponse { id, status }.encode());
}

/// Frames as (the page they came from, how long they are); none is a mixture.
fn origins(rig: &Rig) -> Vec<(u8, usize)> {
    let frames = rig.frames();
    assert!(frames.iter().all(|frame| frame.iter().all(|&byte| byte == frame[0])), "a frame of several");
    frames.iter().map(|frame| (frame[0], frame.len())).collect()
}

#[test]
fn requests_that_were_not_answered_are_taken_again() {
    let mut rig = rig();
    rig.begin(false).unwrap();
    for page in 0..4 {
        let request = request(&rig, page, 100 + page as u16, 0, 60);
        rig.tx.front.request(&request.encode());
    }
    let _ = rig.tx.front.publish();
    rig.turn(Instant::now());
    assert_eq!(rig.sent().len(), 4);
    rig.die();
    // They come while nobody is there.
    for page in 4..6 {
        let request = request(&rig, page, 100 + page as u16, 0, 60);
        rig.tx.front.request(&request.encode());
    }
    let _ = rig.tx.front.publish();
    rig.channel().take().unwrap();
    rig.begin(true).unwrap();
    rig.turn(Instant::now());
    assert_eq!(origins(&rig), [(4, 60), (5, 60)]);
    assert_eq!(rig.sent(), [(104, status::OKAY), (105, status::OKAY)]);
    rig.channel().unmask().unwrap();
    assert!(rig.channel().take().unwrap(), "the guest may have been owed a notification");
}

/// The answers to some packets were written and not shown: what was there is a grant no more.
#[test]
fn answers_that_were_not_shown_are_shown_and_not_taken_for_requests() {
    let gso = Extra::Gso { size: 1448, kind: GsoType::TcpV4 };
    // How many of the first packet's slots were answered, of four: data, extra, data, data.
    for answered in 0..=4_u32 {
        let mut rig = rig();
        let flags = tx_flag::MORE_DATA | tx_flag::EXTRA_INFO;
        let slots = [
            request(&rig, 1, 1011, flags, 300).encode().to_vec(),
            gso.encode(false).to_vec(),
            request(&rig, 1, 1012, tx_flag::MORE_DATA, 100).encode().to_vec(),
            request(&rig, 1, 1013, 0, 100).encode().to_vec(),
            request(&rig, 2, 1014, 0, 60).encode().to_vec(),
        ];
        slots.iter().for_each(|slot| rig.tx.front.request(slot));
        let _ = rig.tx.front.publish();
        let ids = [1011, u16::from_le_bytes([slots[1][0], slots[1][1]]), 1012, 1013];
        for index in 0..answered {
            let status = if index == 1 { status::NULL } else { status::DROPPED };
            answer(&rig, index, ids[index as usize], status);
        }
        rig.begin(true).unwrap();
        rig.turn(Instant::now());
        // Not TCP at all, so that it is refused where it is taken again.
        assert_eq!(origins(&rig), [(2, 60)], "{answered} answered");
        let first = if answered == 0 { status::ERROR } else { status::DROPPED };
        let expected = [(1011, first), (ids[1], status::NULL), (1012, first), (1013, first), (1014, status::OKAY)];
        assert_eq!(rig.sent(), expected, "{answered} answered");
    }
}

/// Without looking, this would send the page that grant 3 names.
#[test]
fn no_other_page_of_the_guests_is_sent() {
    let mut rig = rig();
    let id = rig.pages.refs[7].0 as u16;
    let slot = request(&rig, 1, id, 0, 60).encode();
    rig.tx.front.request(&slot);
    let _ = rig.tx.front.publish();
    answer(&rig, 0, id, status::OKAY);
    rig.begin(true).unwrap();
    rig.turn(Instant::now());
    assert!(origins(&rig).is_empty());
    assert_eq!(rig.sent(), [(id, status::OKAY)]);
}

#[test]
fn pages_are_used_again_and_only_pages() {
    let mut rig = rig();
    rig.post(6);
    // A frame of two slots and an extra, of which nothing was shown; the extra looks like a page of grant 1.
    let flags = rx_flag::MORE_DATA | rx_flag::EXTRA_INFO;
    rig.rx.write(0, &RxResponse { id: 0, offset: 0, flags, status: 4096 }.encode());
    rig.rx.write(1, &Extra::Gso { size: 1448, kind: GsoType::TcpV4 }.encode(false));
    rig.rx.write(2, &RxResponse { id: 2, offset: 0, flags: 0, status: 1 }.encode());
    rig.begin(true).unwrap();
    rig.frame(5000, 0xaa);
    rig.turn(Instant::now());
    let responses = rig.responses();
    let ids: Vec<u16> = responses.iter().map(|response| response.id).collect();
    let statuses: Vec<i16> = responses.iter().map(|response| response.status).collect();
    assert_eq!(ids, [0, 1, 2, 3, 4]);
    assert!(rig.queue().wants_frames(), "a guest that has pages has stalled");
    assert_eq!(statuses, [status::ERROR, status::ERROR, status::ERROR, 4096, 904]);
    let mut page = [0; 4096];
    for (at, expected) in [(0, 0), (1, 1), (2, 2), (3, 0xaa), (5, 5), (63, 63)] {
        rig.pages.memory.copy_out(at * 4096, &mut page);
        assert!(page.iter().all(|&byte| byte == expected), "page {at}");
    }
    assert_eq!(rig.counters.rx_errors.get(), 0, "{:?}", GrantRef(1));
}

/// Whatever stands in the rings, another guest's business it is not.
#[test]
fn indices_out_of_reach_close_the_interface() {
    for (answered, asked) in [(7, 3), (0, 300), (u32::MAX, 256)] {
        let mut rig = rig();
        rig.tx.memory.store(Field::RspProd, answered);
        rig.tx.memory.store(Field::ReqProd, asked);
        assert!(matches!(rig.begin(true), Err(Broken::Ring { .. })), "{answered} {asked}");
    }
    // A packet that goes on beyond what was shown.
    let mut rig = rig();
    rig.tx.front.request(&request(&rig, 1, 1000, tx_flag::MORE_DATA, 60).encode());
    let _ = rig.tx.front.publish();
    answer(&rig, 0, 1000, status::OKAY);
    assert!(matches!(rig.begin(true), Err(Broken::Packet(Fatal::Unfinished))));
}
