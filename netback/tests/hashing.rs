//! A guest that has its frames hashed, and says by their hashes which queue they are to come to.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::frames::{pattern, plain, tcp4, udp4};
use common::{Dom0, QUEUES, Vif, close, receive, until};
use netback::abi::{Extra, GsoType};
use netback::front::Options;
use netback::hash::{Algorithm, HashSettings};
use netback::packet;
use netback::vnet::{Offload, Partial};

/// What goes with a TCP packet over IPv4 that is to be cut.
const GSO: Offload = Offload {
    partial: Some(Partial { start: 34, offset: 16 }),
    validated: false,
    gso: Some((GsoType::TcpV4, 1400)),
    headers: 54,
};

/// A guest that hashes over `queues` queues, and what it has asked for.
fn hashing(dom0: &Dom0, queues: u32) -> (Vif, HashSettings) {
    use netback::abi::{ctrl_status, ctrl_type, hash_type};
    let mut vif = dom0.connected("guest", &Options { control: true, queues, ..Options::default() });
    let control = vif.control.as_mut().unwrap();
    let types = hash_type::IPV4 | hash_type::IPV4_TCP;
    let mut tell = |kind, data| assert_eq!(control.ask(kind, data).unwrap().status, ctrl_status::SUCCESS);
    tell(ctrl_type::SET_HASH_ALGORITHM, [1, 0, 0]);
    tell(ctrl_type::SET_HASH_FLAGS, [types, 0, 0]);
    assert_eq!(control.set_key(&pattern(40, 1)).unwrap().status, ctrl_status::SUCCESS);
    let mut settings = HashSettings::default();
    settings.set_algorithm(Algorithm::Toeplitz);
    assert!(settings.set_types(types));
    settings.set_key(&pattern(40, 1));
    (vif, settings)
}

/// The queue that a frame is for.
fn place(settings: &HashSettings, frame: &[u8], queues: u32) -> usize {
    let hash = packet::flow(frame).and_then(|flow| settings.hash(&flow));
    settings.queue(hash.map_or(0, |hash| hash.value), queues) as usize
}

#[test]
fn hashes_come_along_once_they_are_asked_for() {
    let dom0 = Dom0::start();
    let (mut vif, settings) = hashing(&dom0, 2);
    for queue in 0..2 {
        let end = vif.end_of(queue);
        let mut through = |offload: &Offload, frame: &[u8]| {
            end.send_as(offload, frame);
            let (got, meta) = receive(&mut vif.queues[place(&settings, frame, 2)]);
            assert!(got == frame);
            meta
        };
        let meta = through(&Offload::NONE, &tcp4(100));
        assert!(matches!(meta.hash, Some(Extra::Hash { kind: 1, algorithm: 1, .. })), "{meta:?}");
        let large = through(&GSO, &tcp4(20_000));
        assert_eq!(large.hash, meta.hash, "the flow is the same");
        assert!(large.gso.is_some());
        assert!(matches!(through(&Offload::NONE, &udp4(10)).hash, Some(Extra::Hash { kind: 0, .. })));
        assert_eq!(through(&Offload::NONE, &plain(100, 1)).hash, None);
    }
    close(&dom0, vif);
}

/// Whichever queue of the tap a frame comes to: the guest's table says where it goes.
#[test]
fn the_guests_table_chooses_the_queue() {
    use netback::abi::{ctrl_status, ctrl_type};
    let dom0 = Dom0::start();
    let (mut vif, mut settings) = hashing(&dom0, QUEUES);
    let flow = |port: u16| {
        let mut frame = tcp4(200);
        frame[34..36].copy_from_slice(&port.to_be_bytes());
        frame
    };
    let tables: [&[u32]; 4] = [&[], &[3], &[1, 2], &[0, 3, 3, 2, 1, 0, 2]];
    for table in tables {
        let control = vif.control.as_mut().unwrap();
        let size = table.len() as u32;
        assert_eq!(control.ask(ctrl_type::SET_HASH_MAPPING_SIZE, [size, 0, 0]).unwrap().status, ctrl_status::SUCCESS);
        assert_eq!(control.set_mapping(0, table).unwrap().status, ctrl_status::SUCCESS);
        assert!(settings.set_mapping_size(size) && settings.set_mapping(0, table, QUEUES));
        let mut seen = [0; QUEUES as usize];
        for port in 0..40 {
            let frame = flow(1000 + 7 * port);
            vif.end_of(u32::from(port) % QUEUES).send(&frame);
            let queue = place(&settings, &frame, QUEUES);
            assert!(receive(&mut vif.queues[queue]).0 == frame);
            seen[queue] += 1;
        }
        let named = |queue: &u32| table.is_empty() || table.contains(queue);
        assert!((0..QUEUES).filter(named).all(|queue| seen[queue as usize] > 0), "{table:?}: {seen:?}");
    }
    // One queue of a flow keeps its order, whatever comes between.
    let frames: Vec<_> = (0..100)
        .map(|at| {
            let mut frame = flow(9);
            frame[54] = at;
            frame
        })
        .collect();
    let queue = place(&settings, &frames[0], QUEUES);
    let end = vif.end_of((queue as u32 + 1) % QUEUES);
    for frame in &frames {
        end.send(frame);
        assert!(receive(&mut vif.queues[queue]).0 == *frame);
    }
    close(&dom0, vif);
}

/// Nobody looks at queue 3, to which everything is to go: it is dropped, and the others go on.
#[test]
fn a_queue_without_pages_does_not_hold_up_the_others() {
    use netback::abi::{ctrl_status, ctrl_type};
    let dom0 = Dom0::start();
    let (mut vif, _) = hashing(&dom0, QUEUES);
    let control = vif.control.as_mut().unwrap();
    let mut map = |queue| {
        assert_eq!(control.ask(ctrl_type::SET_HASH_MAPPING_SIZE, [1, 0, 0]).unwrap().status, ctrl_status::SUCCESS);
        assert_eq!(control.set_mapping(0, &[queue]).unwrap().status, ctrl_status::SUCCESS);
    };
    map(3);
    let end = vif.end_of(0);
    for _ in 0..2000 {
        end.send(&tcp4(100));
    }
    // All of them have left the tap's queue when the next one comes through.
    let control = vif.control.as_mut().unwrap();
    assert_eq!(control.set_mapping(0, &[0]).unwrap().status, ctrl_status::SUCCESS);
    let last = plain(99, 77);
    end.send(&last);
    until("the frame for queue 0", || receive(vif.queue()).0 == last);
    close(&dom0, vif);
}
