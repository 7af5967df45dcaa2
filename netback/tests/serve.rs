//! netback and its guests in one process: frames of every kind, both ways.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use common::frames::{GUEST_MAC, PEER_MAC, TCP, ethernet, pattern, plain, pseudo4, pseudo6, sum, tcp4, tcp6, udp4};
use common::slots::{Slot, ask};
use common::taps::End;
use common::{Dom0, PATIENCE, QUEUES, close, receive, until};
use hypervisor::{DomId, Guest};
use netback::abi::{GsoType, TxRequest, status, tx_flag};
use netback::front::{Checksum, Meta, Options, Queue};
use netback::vnet::{Offload, Partial};
use xenstore_client::Store;
use xenstore_client::xenbus::{State, toolstack};

fn send(queue: &mut Queue, frame: &[u8], meta: &Meta) {
    until("room in the ring", || {
        queue.tx.reap().unwrap();
        queue.tx.send_bytes(&[frame], meta)
    });
    queue.publish().unwrap();
}

/// Nothing more has come: a frame sent afterwards is the next.
fn nothing_else(queue: &mut Queue, end: &End) {
    let last = plain(99, 77);
    end.send(&last);
    assert!(receive(queue).0 == last, "something else came");
}

fn round_trip(queue: &mut Queue, end: &End, len: usize, seed: u8) {
    let frame = plain(len, seed);
    send(queue, &frame, &Meta::default());
    let (offload, got) = end.packet();
    assert!(got == frame, "{len} bytes from the guest, {} at the tap", got.len());
    assert_eq!((offload.partial, offload.gso), (None, None));
    assert!(usize::from(offload.headers) <= len);
    end.send(&frame);
    let (got, meta) = receive(queue);
    assert!(got == frame, "{len} bytes for the guest, {} came", got.len());
    assert_eq!(meta.checksum, Checksum::Unchecked);
}

const SIZES: [usize; 15] = [15, 60, 127, 128, 129, 1514, 4082, 4096, 4097, 8192, 9014, 16384, 32767, 65534, 65535];

/// netif.h, "Link state".
#[test]
fn a_connected_interface_has_a_carrier() {
    let dom0 = Dom0::start();
    let vif = dom0.connected("guest", &Options::default());
    let carrier = dom0.store.read_opt(&format!("{}/carrier", vif.front.backend_path())).unwrap();
    assert_eq!(carrier.as_deref(), Some("1"));
    close(&dom0, vif);
}

/// Every size through every shape of queues and event channels.
#[test]
fn frames_of_every_size_through_every_shape() {
    let dom0 = Dom0::start();
    for split_channels in [true, false] {
        for (queues, rx_notify) in [(1, true), (2, true), (QUEUES, true), (1, false)] {
            let options = Options { queues, split_channels, rx_notify, ..Options::default() };
            let mut vif = dom0.connected("guest", &options);
            assert_eq!(vif.queues.len(), queues as usize);
            for number in 0..vif.queues.len() {
                let end = vif.end_of(number as u32);
                let queue = &mut vif.queues[number];
                for (seed, len) in SIZES.into_iter().enumerate() {
                    round_trip(queue, &end, len, seed as u8);
                }
                // More than the ring has slots, so that its indices wrap.
                for round in 0..300 {
                    round_trip(queue, &end, 60 + round % 1400, round as u8);
                }
                assert_eq!((queue.tx.sent().error, queue.tx.sent().dropped, queue.rx.errors()), (0, 0, 0));
            }
            close(&dom0, vif);
        }
    }
}

/// A packet in any number of slots, cut anywhere.
#[test]
fn chained_slots() {
    let dom0 = Dom0::start();
    let mut vif = dom0.connected("guest", &Options::default());
    let end = vif.end();
    let queue = vif.queue();
    for slots in 2..=19 {
        let first = 14 + slots;
        let sizes: Vec<usize> = (0..slots).map(|at| if at == 0 { first } else { at * 7 % 50 }).collect();
        let total: usize = sizes.iter().sum();
        let frame = plain(total, slots as u8);
        let mut at = 0;
        let mut requests = Vec::new();
        for (number, &size) in sizes.iter().enumerate() {
            let offset = 4096 - size;
            queue.tx.pool().copy_in(number * 4096 + offset, &frame[at..at + size]);
            at += size;
            let more = if number + 1 < slots { tx_flag::MORE_DATA } else { 0 };
            requests.push(Slot::Data(TxRequest {
                gref: queue.tx.refs()[number],
                offset: offset as u16,
                flags: more,
                id: number as u16,
                size: if number == 0 { total } else { size } as u16,
            }));
        }
        ask(queue, &requests, status::OKAY);
        assert!(end.frame() == frame, "{slots} slots");
    }
    close(&dom0, vif);
}

fn large(kind: GsoType) -> Vec<u8> {
    match kind {
        GsoType::TcpV4 => tcp4(60_000),
        _ => tcp6(60_000),
    }
}

#[test]
fn the_guest_leaves_sums_and_cuts_to_the_kernel() {
    let dom0 = Dom0::start();
    let mut vif = dom0.connected("guest", &Options::default());
    let end = vif.end();
    let queue = vif.queue();
    for (kind, transport) in [(GsoType::TcpV4, 34), (GsoType::TcpV6, 54)] {
        let frame = large(kind);
        let meta = Meta { checksum: Checksum::Blank, gso: Some((kind, 1448)), ..Meta::default() };
        send(queue, &frame, &meta);
        let (offload, got) = end.packet();
        assert!(got == frame);
        assert_eq!(offload.gso, Some((kind, 1448)));
        assert_eq!(offload.partial, Some(Partial { start: transport, offset: 16 }));
        assert!(offload.headers >= transport + 20);

        // As buggy frontends do it: with a sum, which has to become a partial one.
        let mut summed = frame.clone();
        let place = usize::from(transport) + 16;
        summed[place..place + 2].copy_from_slice(&[0xab, 0xcd]);
        send(queue, &summed, &Meta { checksum: Checksum::Unchecked, ..meta });
        let (offload, got) = end.packet();
        assert!(got == frame, "the pseudo header's sum is not in its place");
        assert_eq!(offload.partial, Some(Partial { start: transport, offset: 16 }));
    }
    let frame = udp4(100);
    send(queue, &frame, &Meta { checksum: Checksum::Blank, ..Meta::default() });
    let (offload, got) = end.packet();
    assert!(got == frame);
    assert_eq!(offload.partial, Some(Partial { start: 34, offset: 6 }));
    send(queue, &frame, &Meta { checksum: Checksum::Validated, ..Meta::default() });
    let (offload, _) = end.packet();
    assert_eq!((offload.partial, offload.validated), (None, true));
    // None of them, nor an ordinary frame, was refused.
    until("answers", || {
        queue.tx.reap().unwrap();
        queue.tx.outstanding() == 0
    });
    assert_eq!(queue.tx.sent().error, 0);
    close(&dom0, vif);
}

fn gso(kind: GsoType) -> Offload {
    let start = if kind == GsoType::TcpV4 { 34 } else { 54 };
    Offload {
        partial: Some(Partial { start, offset: 16 }),
        validated: false,
        gso: Some((kind, 1400)),
        headers: start + 20,
    }
}

#[test]
fn a_guest_that_copes_gets_large_frames_whole() {
    let dom0 = Dom0::start();
    let mut vif = dom0.connected("guest", &Options::default());
    let end = vif.end();
    for kind in [GsoType::TcpV4, GsoType::TcpV6] {
        let frame = large(kind);
        for _ in 0..20 {
            end.send_as(&gso(kind), &frame);
            let (got, meta) = receive(vif.queue());
            assert!(got == frame);
            assert_eq!((meta.gso, meta.checksum), (Some((kind, 1400)), Checksum::Blank));
        }
    }
    close(&dom0, vif);
}

/// The sum of a whole TCP segment, which must come out as all ones.
fn tcp_sum(frame: &[u8]) -> u16 {
    let v4 = frame[12] == 8;
    let segment = &frame[if v4 { 34 } else { 54 }..];
    let pseudo = if v4 { pseudo4(TCP, segment.len()) } else { pseudo6(TCP, segment.len()) };
    sum(&[&pseudo.to_be_bytes(), segment])
}

/// Frames that were read before the kernel knew what the guest copes with, or that it does not cut: done here.
#[test]
fn what_a_guest_does_not_cope_with_is_done_for_it() {
    let dom0 = Dom0::start();
    let options = Options { gso_v4: false, gso_v6: false, csum_v4: false, csum_v6: false, ..Options::default() };
    let mut vif = dom0.connected("guest", &options);
    let end = vif.end();
    for kind in [GsoType::TcpV4, GsoType::TcpV6] {
        let frame = large(kind);
        let headers = if kind == GsoType::TcpV4 { 54 } else { 74 };
        end.send_as(&gso(kind), &frame);
        let mut data = Vec::new();
        while data.len() < 60_000 {
            let (segment, meta) = receive(vif.queue());
            assert!(segment.len() <= headers + 1400);
            assert_eq!((meta.gso, meta.checksum, tcp_sum(&segment)), (None, Checksum::Validated, 0xffff));
            data.extend_from_slice(&segment[headers..]);
        }
        assert!(data == frame[headers..]);
        // A sum alone.
        let small = if kind == GsoType::TcpV4 { tcp4(501) } else { tcp6(501) };
        end.send_as(&Offload { gso: None, ..gso(kind) }, &small);
        let (got, meta) = receive(vif.queue());
        assert_eq!((got.len(), meta.checksum, tcp_sum(&got)), (small.len(), Checksum::Validated, 0xffff));
    }
    close(&dom0, vif);
}

/// A packet has at most 65535 bytes where Xen counts them; a frame around the largest IP packet has more.
#[test]
fn frames_longer_than_a_packet_are_cut() {
    let dom0 = Dom0::start();
    let mut vif = dom0.connected("guest", &Options::default());
    let end = vif.end();
    for (kind, headers, data) in [(GsoType::TcpV4, 54, 65_495), (GsoType::TcpV6, 74, 65_515)] {
        let frame = if kind == GsoType::TcpV4 { tcp4(data) } else { tcp6(data) };
        assert!(frame.len() > 65_535);
        end.send_as(&gso(kind), &frame);
        let mut got = Vec::new();
        while got.len() < data {
            let (segment, meta) = receive(vif.queue());
            assert_eq!((meta.gso, tcp_sum(&segment)), (None, 0xffff));
            got.extend_from_slice(&segment[headers..]);
        }
        assert!(got == frame[headers..]);
    }
    // Nor can it be told of one that is not to be cut.
    end.send(&plain(65_536, 1));
    nothing_else(vif.queue(), &end);
    close(&dom0, vif);
}

/// A checksum that no driver of a guest's finds, behind a VLAN tag, is finished although the guest takes partial ones.
#[test]
fn tagged_frames() {
    let dom0 = Dom0::start();
    let mut vif = dom0.connected("guest", &Options::default());
    let end = vif.end();
    let whole = tcp4(500);
    let tagged = [&whole[..12], &[0x81, 0, 0, 5], &whole[12..]].concat();
    let offload = Offload { partial: Some(Partial { start: 38, offset: 16 }), ..Offload::NONE };
    end.send_as(&offload, &tagged);
    let (got, meta) = receive(vif.queue());
    assert_eq!((got.len(), meta.checksum), (tagged.len(), Checksum::Validated));
    let untagged = [&got[..12], &got[16..]].concat();
    assert_eq!(tcp_sum(&untagged), 0xffff);
    close(&dom0, vif);
}

#[test]
fn without_sg_only_what_fits_a_page() {
    let dom0 = Dom0::start();
    let mut vif = dom0.connected("guest", &Options { sg: false, ..Options::default() });
    let end = vif.end();
    let queue = vif.queue();
    for len in [60, 1514, 4096] {
        let frame = plain(len, 3);
        end.send(&frame);
        assert!(receive(queue).0 == frame);
    }
    end.send(&plain(4097, 4));
    nothing_else(queue, &end);
    close(&dom0, vif);
}

#[test]
fn headroom_now_and_changed_while_connected() {
    let dom0 = Dom0::start();
    let mut vif = dom0.connected("guest", &Options { headroom: Some(256), ..Options::default() });
    let end = vif.end();
    let frame = plain(9000, 5);
    end.send(&frame);
    let (got, meta) = receive(vif.queue());
    assert!(got == frame);
    assert_eq!(meta.headroom, Some(256));
    for headroom in [0, 512] {
        vif.front.set_headroom(headroom).unwrap();
        let state = format!("{}/state", vif.front.backend_path());
        toolstack::wait_state(&dom0.store, &state, &[State::Connected], PATIENCE).unwrap();
        end.send(&frame);
        let (got, meta) = receive(vif.queue());
        assert!(got == frame);
        assert_eq!(meta.headroom, (headroom > 0).then_some(headroom));
    }
    close(&dom0, vif);
}

#[test]
fn only_groups_that_were_joined_are_heard() {
    let dom0 = Dom0::start();
    let mut vif = dom0.connected("guest", &Options { multicast: true, ..Options::default() });
    let end = vif.end();
    let to = |mac: [u8; 6]| ethernet(mac, PEER_MAC, 0x88b5, &pattern(60, 1));
    let (group, other) = ([1, 0, 0x5e, 0, 0, 9], [1, 0, 0x5e, 0, 0, 10]);
    let queue = vif.queue();
    for mac in [GUEST_MAC, [0xff; 6]] {
        end.send(&to(mac));
        assert!(receive(queue).0 == to(mac));
    }
    end.send(&to(group));
    nothing_else(queue, &end);
    assert!(queue.tx.send_group(group, true));
    queue.publish().unwrap();
    until("the answer", || {
        queue.tx.reap().unwrap();
        queue.tx.outstanding() == 0
    });
    end.send(&to(other));
    end.send(&to(group));
    assert!(receive(queue).0 == to(group));
    // Dynamic: the filter goes and comes while connected.
    vif.front.set_multicast(false).unwrap();
    let queue = &mut vif.queues[0];
    let mut frame = Vec::new();
    until("a frame to any group", || {
        end.send(&to(other));
        queue.pump().unwrap();
        queue.rx.receive_bytes(&mut frame).unwrap().is_some()
    });
    close(&dom0, vif);
}

/// The rate is a matter of bytes here, not of time: the next chunk comes in an hour.
#[test]
fn a_rate_holds_and_changes_at_once() {
    let dom0 = Dom0::start();
    let guest = dom0.guest("guest");
    dom0.attach(&guest, 0, &[("rate", "5000,3600000000")]);
    let mut vif = dom0.connect(&guest, 0, &Options { queues: 2, ..Options::default() });
    let end = vif.end();
    let queue = vif.queue();
    for seed in 0..20 {
        send(queue, &plain(1000, seed), &Meta::default());
    }
    for seed in 0..5 {
        assert!(end.frame() == plain(1000, seed));
    }
    assert!(end.next(Duration::from_millis(100)).is_none(), "more than the rate");
    // The rate is the interface's, not the queue's.
    send(&mut vif.queues[1], &plain(1000, 99), &Meta::default());
    let other = vif.end_of(1);
    assert!(other.next(Duration::from_millis(100)).is_none(), "another rate for another queue");
    let rate = format!("{}/rate", vif.front.backend_path());
    dom0.store.write(&rate, "1000000,1000").unwrap();
    for seed in 5..20 {
        assert!(end.frame() == plain(1000, seed));
    }
    assert!(other.frame() == plain(1000, 99));
    dom0.store.rm(&rate).unwrap();
    vif.works();
    // One that is none is refused.
    dom0.store.write(&rate, "10Mb/s").unwrap();
    let state = format!("{}/state", vif.front.backend_path());
    toolstack::wait_state(&dom0.store, &state, &[State::Closing, State::Closed], PATIENCE).unwrap();
    let error = dom0.store.read_str(&format!("{}/error", vif.front.backend_path())).unwrap();
    assert!(error.contains("10Mb/s") && error.contains("BYTES,MICROSECONDS"), "{error}");
}

#[test]
fn a_rate_or_a_mac_that_is_none_is_refused_at_once() {
    let dom0 = Dom0::start();
    for (key, value) in [("rate", "fast"), ("mac", "00:16:3e:00:00")] {
        let guest = dom0.guest("guest");
        dom0.attach(&guest, 0, &[(key, value)]);
        let path = format!("/local/domain/0/backend/vif/{}/0", Guest::domid(&*guest));
        until("the error", || dom0.store.read_opt(&format!("{path}/error")).unwrap().is_some());
        let error = dom0.store.read_str(&format!("{path}/error")).unwrap();
        assert!(error.contains(value), "{error}");
    }
}

#[test]
fn a_guest_reconnects() {
    let dom0 = Dom0::start();
    let guest = dom0.guest("guest");
    dom0.attach(&guest, 0, &[]);
    for round in 0..6 {
        // The next driver may want something else.
        let options = Options { queues: 1 + round % 3, split_channels: round % 2 == 0, ..Options::default() };
        let mut vif = dom0.connect(&guest, 0, &options);
        vif.works();
        vif.close();
        assert_eq!(dom0.mapped(Guest::domid(&*guest)), 0);
    }
    // A kernel that was started over the old one: from 4 to 1 without a goodbye.
    let mut first = dom0.connect(&guest, 0, &Options::default());
    first.works();
    let mut second = dom0.connect(&guest, 0, &Options { queues: 2, ..Options::default() });
    second.works();
    second.close();
    dom0.detach(&guest, 0);
}

#[test]
fn a_guest_dies_and_another_does_not_notice() {
    let dom0 = Dom0::start();
    let mut other = dom0.connected("other", &Options::default());
    for _ in 0..5 {
        let mut vif = dom0.connected("guest", &Options { queues: 2, ..Options::default() });
        vif.works();
        let domid = Guest::domid(&*vif.guest);
        // What was sent last stays unanswered.
        vif.queue().tx.send_bytes(&[&plain(60_000, 1)], &Meta::default());
        vif.queue().publish().unwrap();
        dom0.machine.destroy(domid).unwrap();
        until("the end of the guest", || dom0.machine.domains().iter().all(|domain| domain.domid != domid));
        other.works();
    }
    close(&dom0, other);
}

#[test]
fn the_backend_stops() {
    let dom0 = Dom0::start();
    let mut vif = dom0.connected("guest", &Options { queues: 2, control: true, ..Options::default() });
    vif.works();
    let (store, machine) = (dom0.machine.store(DomId(0)).unwrap(), dom0.machine.clone());
    let path = vif.front.backend_path().to_owned();
    drop(dom0);
    let error = store.read_str(&format!("{path}/error")).unwrap();
    assert!(error.contains("told to stop"), "{error}");
    assert_eq!(store.read_str(&format!("{path}/state")).unwrap(), "6");
    assert_eq!(machine.domains().iter().map(|domain| domain.mapped).sum::<u32>(), 0);
}

/// Frames on their way to the guest, at most: fewer bytes than netback keeps for one that is slow, which it would drop.
const WINDOW: u32 = 64;

/// Both directions at once, from several threads, without a loss.
#[test]
fn a_storm_of_frames_both_ways() {
    let dom0 = Dom0::start();
    let mut vif = dom0.connected("guest", &Options { queues: 2, ..Options::default() });
    let frames = 3000u32;
    let numbered = |number: u32| {
        let len = 64 + number as usize * 37 % 5000;
        let mut frame = plain(len, number as u8);
        frame[20..24].copy_from_slice(&number.to_be_bytes());
        frame
    };
    let ends: HashMap<usize, _> = (0..2).map(|queue| (queue, vif.end_of(queue as u32))).collect();
    let seen = [const { AtomicU32::new(0) }; 2];
    std::thread::scope(|scope| {
        for (index, queue) in vif.queues.iter_mut().enumerate() {
            let (from, to) = (ends[&index].clone(), ends[&index].clone());
            let seen = &seen[index];
            scope.spawn(move || {
                for number in 0..frames {
                    until("the guest has room", || number < seen.load(Ordering::Acquire) + WINDOW);
                    from.send(&numbered(number));
                }
            });
            scope.spawn(move || {
                let mut wanted = 0;
                while wanted < frames {
                    let got = to.frame();
                    let number = u32::from_be_bytes(got[20..24].try_into().unwrap());
                    // A pair of sockets has less room than a tap: what had none was dropped, the rest is in order.
                    assert!(number >= wanted && got == numbered(number), "{number} after {wanted}");
                    wanted = number + 1;
                }
            });
            scope.spawn(move || {
                let (mut sent, mut received, mut frame) = (0, 0, Vec::new());
                while sent < frames || received < frames {
                    queue.pump().unwrap();
                    while sent < frames && queue.tx.send_bytes(&[&numbered(sent)], &Meta::default()) {
                        sent += 1;
                    }
                    queue.publish().unwrap();
                    while queue.rx.receive_bytes(&mut frame).unwrap().is_some() {
                        assert!(frame == numbered(received), "frame {received}");
                        received += 1;
                        seen.store(received, Ordering::Release);
                    }
                    // The last one must not be among those that had no room.
                    if sent == frames && queue.tx.sent().dropped > 0 && received == frames {
                        queue.tx.send_bytes(&[&numbered(frames - 1)], &Meta::default());
                    }
                    queue.wait(None, Duration::from_millis(1)).unwrap();
                }
                // Until the reader has seen the last one.
                for _ in 0..3 {
                    std::thread::sleep(Duration::from_millis(20));
                    queue.pump().unwrap();
                    queue.tx.send_bytes(&[&numbered(frames - 1)], &Meta::default());
                    queue.publish().unwrap();
                }
            });
        }
    });
}
