use proptest::prelude::*;

use super::*;
use crate::DomId;

/// One message of every type, with the bytes `xs_wire.h` gives it.
fn golden() -> Vec<(Packet, Vec<u8>)> {
    use MessageType as M;
    let rows: &[(M, u8, &[u8])] = &[
        (M::Control, 0, b"print\0hello\0"),
        (M::Directory, 1, b"/local\0"),
        (M::Read, 2, b"/local/domain/0/name\0"),
        (M::GetPerms, 3, b"/local\0"),
        (M::Watch, 4, b"@releaseDomain\0token\0"),
        (M::Unwatch, 5, b"@releaseDomain\0token\0"),
        (M::TransactionStart, 6, b"\0"),
        (M::TransactionEnd, 7, b"T\0"),
        (M::Introduce, 8, b"5\x004096\x003\0"),
        (M::Release, 9, b"5\0"),
        (M::GetDomainPath, 10, b"5\0"),
        (M::Write, 11, b"/a\0value without end"),
        (M::Mkdir, 12, b"/a\0"),
        (M::Rm, 13, b"/a\0"),
        (M::SetPerms, 14, b"/a\0n0\0r5\0"),
        (M::WatchEvent, 15, b"/a/b\0token\0"),
        (M::Error, 16, b"ENOENT\0"),
        (M::IsDomainIntroduced, 17, b"5\0"),
        (M::Resume, 18, b"5\0"),
        (M::SetTarget, 19, b"5\x006\0"),
        (M::Unknown(20), 20, b""),
        (M::ResetWatches, 21, b"\0"),
        (M::DirectoryPart, 22, b"/a\x004000\0"),
        (M::GetFeature, 23, b"\0"),
        (M::SetFeature, 24, b"5\x001\0"),
        (M::GetQuota, 25, b"\0"),
        (M::SetQuota, 26, b"nodes\x001000\0"),
        (M::Unknown(0xDEAD_BEEF), 0, b""),
    ];
    let bytes_of = |kind: M, number: u8, payload: &[u8]| {
        let mut bytes = vec![number, 0, 0, 0];
        if kind == M::Unknown(0xDEAD_BEEF) {
            bytes = vec![0xEF, 0xBE, 0xAD, 0xDE];
        }
        bytes.extend_from_slice(&[0x78, 0x56, 0x34, 0x12, 0x02, 0x01, 0, 0]);
        bytes.extend_from_slice(&[payload.len() as u8, 0, 0, 0]);
        bytes.extend_from_slice(payload);
        bytes
    };
    rows.iter()
        .map(|&(kind, number, payload)| {
            let packet = Packet { kind, req_id: 0x1234_5678, tx_id: 0x0102, payload: payload.to_vec() };
            (packet, bytes_of(kind, number, payload))
        })
        .collect()
}

#[test]
fn every_type_has_its_bytes() {
    let golden = golden();
    for kind in MessageType::ALL {
        assert!(golden.iter().any(|(packet, _)| packet.kind == *kind), "{kind} has no golden bytes");
        assert_eq!(MessageType::from_number(kind.number()), *kind);
    }
    for (packet, bytes) in golden {
        assert_eq!(packet.encode().as_ref(), Some(&bytes), "{}", packet.kind);
    }
}

proptest! {
    #[test]
    fn any_chopping_yields_the_same_packets(cuts in prop::collection::vec(1usize..40, 1..200)) {
        let golden = golden();
        let stream: Vec<u8> = golden.iter().flat_map(|(_, bytes)| bytes.clone()).collect();
        let mut decoder = Decoder::new();
        let mut rest = stream.as_slice();
        let mut cuts = cuts.iter().cycle();
        let mut got = Vec::new();
        while !rest.is_empty() {
            let (head, tail) = rest.split_at(rest.len().min(*cuts.next().unwrap_or(&1)));
            decoder.push(head);
            rest = tail;
            loop {
                match decoder.next_packet() {
                    Decoded::Packet(packet) => got.push(packet),
                    Decoded::NeedMore(more) => { prop_assert!(more > 0); break }
                    Decoded::Failed(reason) => panic!("{reason}"),
                }
            }
        }
        prop_assert_eq!(got, golden.into_iter().map(|(packet, _)| packet).collect::<Vec<_>>());
        prop_assert_eq!(decoder.next_packet(), Decoded::NeedMore(HEADER_LEN));
    }

    #[test]
    fn garbage_never_panics_or_piles_up(chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..30)) {
        let mut decoder = Decoder::new();
        for chunk in chunks {
            decoder.push(&chunk);
            while let Decoded::Packet(packet) = decoder.next_packet() {
                prop_assert!(packet.payload.len() <= PAYLOAD_MAX);
            }
        }
    }
}

#[test]
fn a_long_payload_fails_for_good() {
    let long = Header { kind: MessageType::Read, req_id: 1, tx_id: 0, len: 4097 };
    let mut decoder = Decoder::new();
    decoder.push(&long.to_bytes());
    assert!(matches!(decoder.next_packet(), Decoded::Failed(_)));
    decoder.push(&golden()[0].1);
    assert!(matches!(decoder.next_packet(), Decoded::Failed(_)));
    let packet = |len| Packet { kind: MessageType::Write, req_id: 1, tx_id: 0, payload: vec![0; len] };
    assert_eq!(packet(4096).encode().map(|bytes| bytes.len()), Some(4112));
    assert_eq!(packet(4097).encode(), None);
}

#[test]
fn paths() {
    let longest = format!("/{}", "a".repeat(3071));
    for good in ["/", "/a", "a/b", "/local/domain/0/backend/vbd/5/51712", "A-b_c@9", longest.as_str()] {
        assert_eq!(check_path(good), Ok(()), "{good:?}");
    }
    let too_long = format!("/{}", "a".repeat(3072));
    let relative = "a".repeat(2049);
    for wrong in ["", "//", "/a/", "a//b", "/a b", "/ä", "/a\0", "@releaseDomain", "/a.b", "/*", &too_long, &relative]
    {
        assert!(check_path(wrong).is_err(), "{wrong:?}");
    }
    assert_eq!(check_watch_path("@releaseDomain/5"), Ok(()));
}

#[test]
fn permissions() {
    let perms = [Perm::new(Access::None, DomId(0)), Perm::new(Access::Both, DomId(65535))];
    assert_eq!(perms_to_bytes(&perms), b"n0\0b65535\0");
    assert_eq!(parse_perms(b"n0\0b65535\0"), Some(perms.to_vec()));
    for wrong in [&b""[..], b"n0", b"x0\0", b"n\0", b"n65536\0", b"n0\0\0", b"n-1\0", b"r0\0\xff\0"] {
        assert_eq!(parse_perms(wrong), None, "{wrong:?}");
    }
}
