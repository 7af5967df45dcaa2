//! What a hostile guest can do with the packets it leaves to be cut, or whose checksums it leaves to be finished.
//!
//! Rows of the checklist:
//!
//! | row | test |
//! |---|---|
//! | 50 GSO that does not fit its packet | `gso_that_contradicts_the_packet` |
//! | 51 checksums where none can be | `blank_checksums_where_there_is_none`, `blank_checksums_behind_any_headers`, `xsa_423_headers_split_at_every_byte` |
//!
//! Advisories: 423 by name.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::frames::{
    GUEST_MAC, PEER_MAC, TCP, UDP, ethernet, ipv4, ipv4_with, ipv6, pattern, plain, pseudo4, pseudo6, tcp, tcp4, tcp6,
    udp, udp4,
};
use common::slots::{BLANK, ask, chain, ends, gso, submit};
use common::{Scene, works};
use netback::abi::{GsoType, status};
use netback::front::Options;
use netback::vnet::Partial;
use status::{ERROR, OKAY};

#[test]
fn gso_that_contradicts_the_packet() {
    for (size, kind) in [(0, GsoType::TcpV4), (0, GsoType::TcpV6), (1000, GsoType::None), (0, GsoType::None)] {
        ends("GSO with segments of no size or of no kind", |queue| {
            let slots = chain(queue, &tcp4(3000), &[3054], BLANK, &[gso(size, kind)]);
            submit(queue, &slots);
        });
    }
    let (scene, mut vif) = Scene::connected(&Options::default());
    let end = vif.end();
    let queue = vif.queue();
    let (v4, v6) = (GsoType::TcpV4, GsoType::TcpV6);
    let no_tcp_header = ethernet(PEER_MAC, GUEST_MAC, 0x0800, &ipv4(TCP, &[1; 19]));
    let mut bad_offset = tcp4(500);
    bad_offset[14 + 20 + 12] = 0xf0;
    bad_offset.truncate(14 + 20 + 30);
    let mut fragment = tcp4(500);
    fragment[14 + 6..14 + 8].copy_from_slice(&[0x20, 0x10]);
    for (frame, kind) in [
        (tcp4(3000), v6),
        (tcp6(3000), v4),
        (udp4(3000), v4),
        (plain(3000, 1), v4),
        (plain(3000, 1), v6),
        (no_tcp_header, v4),
        (bad_offset, v4),
        (fragment, v4),
    ] {
        for flags in [0, BLANK] {
            let slots = chain(queue, &frame, &[frame.len()], flags, &[gso(1000, kind)]);
            ask(queue, &slots, ERROR);
            assert!(end.is_quiet(), "{kind:?} {flags} {:?}", &frame[..40]);
        }
    }
    // Segments larger than the packet are one segment; and smaller than is sensible is the network's to judge.
    for size in [1, 3000, 65535] {
        let frame = tcp4(3000);
        let slots = chain(queue, &frame, &[1000, 2054], BLANK, &[gso(size, v4)]);
        ask(queue, &slots, OKAY);
        let (offload, bytes) = end.packet();
        assert_eq!((offload.gso, offload.partial), (Some((v4, size)), Some(Partial { start: 34, offset: 16 })));
        assert_eq!(bytes, frame);
    }
    // Without csum_blank the checksum is made what cutting needs: the pseudo header's sum.
    for (frame, kind, place, sum) in
        [(tcp4(3000), v4, 50, pseudo4(TCP, 3020)), (tcp6(3000), v6, 70, pseudo6(TCP, 3020))]
    {
        let mut full = frame.clone();
        full[place..place + 2].copy_from_slice(&[0xde, 0xad]);
        let slots = chain(queue, &full, &[full.len()], 0, &[gso(1000, kind)]);
        ask(queue, &slots, OKAY);
        let (offload, bytes) = end.packet();
        assert_eq!(offload.gso, Some((kind, 1000)));
        assert_eq!(offload.partial.map(|partial| usize::from(partial.start + partial.offset)), Some(place));
        assert_eq!(bytes[place..place + 2], sum.to_be_bytes());
        assert_eq!(bytes, frame);
    }
    works(queue, &end);
    scene.close(vif);
}

/// Frames whose checksum is said to be blank and that have no place for one.
fn without_checksum() -> Vec<(&'static str, Vec<u8>)> {
    let ip4 = |payload: Vec<u8>| ethernet(PEER_MAC, GUEST_MAC, 0x0800, &payload);
    let ip6 = |payload: Vec<u8>| ethernet(PEER_MAC, GUEST_MAC, 0x86dd, &payload);
    let with = |mut frame: Vec<u8>, at: usize, byte: u8| {
        frame[at] = byte;
        frame
    };
    let cut = |frame: Vec<u8>, len: usize| frame[..len].to_vec();
    let hops = |count: usize| {
        // Hop-by-hop options, each of 8 bytes, the last before UDP.
        let mut chain = Vec::new();
        for at in 0..count {
            chain.extend([if at + 1 < count { 0 } else { UDP }, 0, 1, 4, 0, 0, 0, 0]);
        }
        chain.extend(udp(0, &[0; 20]));
        ipv6(0, &chain)
    };
    vec![
        ("no IP", plain(100, 1)),
        ("ARP", ethernet([0xff; 6], GUEST_MAC, 0x0806, &[0; 46])),
        ("nothing after Ethernet", cut(tcp4(10), 14)),
        ("a truncated IPv4 header", cut(tcp4(10), 33)),
        ("IPv4 and nothing behind", cut(tcp4(10), 34)),
        ("a truncated TCP header", cut(tcp4(10), 51)),
        ("a truncated UDP header", cut(udp4(10), 41)),
        ("IPv4 with ihl 4", with(tcp4(100), 14, 0x44)),
        ("IPv4 with ihl 0", with(tcp4(100), 14, 0x40)),
        ("IPv4 with ihl 15 and no room", cut(with(tcp4(20), 14, 0x4f), 74)),
        ("IPv4 of version 6", with(tcp4(100), 14, 0x65)),
        ("ICMP", with(tcp4(100), 14 + 9, 1)),
        ("a fragment", with(udp4(100), 14 + 7, 1)),
        ("a first fragment", with(udp4(100), 14 + 6, 0x20)),
        ("a truncated IPv6 header", cut(tcp6(10), 53)),
        ("IPv6 and nothing behind", cut(tcp6(10), 54)),
        ("IPv6 of version 4", with(tcp6(100), 14, 0x40)),
        ("an IPv6 chain without end", ip6(hops(60))),
        ("an IPv6 extension beyond the frame", ip6(ipv6(0, &[UDP, 255, 0, 0, 0, 0, 0, 0]))),
        ("an IPv6 fragment", ip6(ipv6(44, &[&[UDP, 0, 0, 9, 0, 0, 0, 1][..], &udp(0, &[0; 40])].concat()))),
        ("IPv6 without next header", ip6(ipv6(59, &[0; 40]))),
        ("IPv4 where IPv6 should be", ip6(ipv4(UDP, &udp(0, &[0; 40])))),
        ("three tags", {
            let tag = [0x81, 0, 0, 5];
            [&tcp4(10)[..12], &tag, &tag, &tag, &tcp4(10)[12..]].concat()
        }),
        ("nothing but tags", [&tcp4(10)[..12], &[0x81, 0, 0, 5].repeat(200)].concat()),
        ("options to the very end", ip4(ipv4_with(&[1; 40], UDP, &[]))),
    ]
}

#[test]
fn blank_checksums_where_there_is_none() {
    let (mut scene, mut vif) = Scene::connected(&Options::default());
    let end = vif.end();
    let queue = vif.queue();
    for (what, frame) in without_checksum() {
        let slots = chain(queue, &frame, &[frame.len()], BLANK, &[]);
        ask(queue, &slots, ERROR);
        assert!(end.is_quiet(), "{what}");
        // Without the promise it is just a frame.
        let slots = chain(queue, &frame, &[frame.len()], 0, &[]);
        ask(queue, &slots, OKAY);
        let (offload, bytes) = end.packet();
        assert_eq!((offload.partial, offload.gso, bytes), (None, None, frame), "{what}");
    }
    works(queue, &end);
    scene.neighbour_works();
    scene.close(vif);
}

#[test]
fn blank_checksums_behind_any_headers() {
    let (scene, mut vif) = Scene::connected(&Options::default());
    let end = vif.end();
    let queue = vif.queue();
    let hop = [UDP, 1, 5, 2, 0, 0, 1, 10, 0, 0, 0, 0, 0, 0, 0, 0];
    let tagged = |tags: &[u8], frame: &[u8]| [&frame[..12], tags, &frame[12..]].concat();
    let (vlan, qinq) = ([0x81, 0, 0x0f, 0xff], [0x88, 0xa8, 0, 1]);
    let options = ethernet(PEER_MAC, GUEST_MAC, 0x0800, &ipv4_with(&[1; 40], TCP, &tcp(7, &[9; 30])));
    let extension = ethernet(PEER_MAC, GUEST_MAC, 0x86dd, &ipv6(0, &[&hop[..], &udp(7, &[9; 30])].concat()));
    for (frame, start, offset) in [
        (tcp4(0), 34, 16),
        (tcp4(1460), 34, 16),
        (udp4(0), 34, 6),
        (tcp6(0), 54, 16),
        (options, 74, 16),
        (extension, 70, 6),
        (tagged(&vlan, &tcp4(100)), 38, 16),
        (tagged(&[&qinq[..], &vlan].concat(), &udp4(100)), 42, 6),
        (tagged(&[&vlan[..], &vlan].concat(), &tcp6(100)), 62, 16),
    ] {
        let slots = chain(queue, &frame, &[frame.len()], BLANK, &[]);
        ask(queue, &slots, OKAY);
        let (offload, bytes) = end.packet();
        assert_eq!(offload.partial, Some(Partial { start, offset }), "{:?}", &frame[..40]);
        assert_eq!(bytes, frame);
    }
    works(queue, &end);
    scene.close(vif);
}

/// The headers of a packet lie in two slots, split at every place of its first 128 bytes; the kernel gets them in one
/// piece all the same, because the header before them names as many bytes as must be linear.
#[test]
fn xsa_423_headers_split_at_every_byte() {
    let (scene, mut vif) = Scene::connected(&Options::default());
    let end = vif.end();
    let queue = vif.queue();
    let options = ethernet(PEER_MAC, GUEST_MAC, 0x0800, &ipv4_with(&[1; 40], TCP, &tcp(7, &pattern(300, 2))));
    for (frame, partial, extras) in [
        (tcp4(2000), Partial { start: 34, offset: 16 }, vec![gso(1000, GsoType::TcpV4)]),
        (tcp6(2000), Partial { start: 54, offset: 16 }, vec![gso(1000, GsoType::TcpV6)]),
        (udp4(300), Partial { start: 34, offset: 6 }, vec![]),
        (options, Partial { start: 74, offset: 16 }, vec![]),
    ] {
        for split in 14..=128 {
            let slots = chain(queue, &frame, &[split, frame.len() - split], BLANK, &extras);
            ask(queue, &slots, OKAY);
            let (offload, bytes) = end.packet();
            assert_eq!(bytes, frame, "split at {split}");
            assert_eq!(offload.partial, Some(partial), "split at {split}");
            let headers = usize::from(offload.headers);
            assert!(headers >= 128.min(frame.len()) && headers <= frame.len(), "{headers} linear bytes");
        }
        // Byte by byte, as far as slots go.
        let lens: Vec<usize> = [14].into_iter().chain([1; 17]).chain([frame.len() - 31]).collect();
        let slots = chain(queue, &frame, &lens, BLANK, &extras);
        ask(queue, &slots, OKAY);
        assert_eq!(end.frame(), frame);
        // Fewer than Ethernet's own header are refused, as Linux does.
        for split in 1..14 {
            let slots = chain(queue, &frame, &[split, frame.len() - split], BLANK, &extras);
            ask(queue, &slots, ERROR);
            assert!(end.is_quiet(), "split at {split}");
        }
    }
    works(queue, &end);
    scene.close(vif);
}
