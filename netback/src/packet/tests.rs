use super::*;
use proptest::prelude::*;

pub(crate) fn ethernet(tags: &[u16], kind: u16) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    for tag in tags {
        frame.extend(tag.to_be_bytes());
        frame.extend([0, 7]);
    }
    frame.extend(kind.to_be_bytes());
    frame
}

pub(crate) fn v4(tags: &[u16], options: usize, protocol: u8, transport: &[u8]) -> Vec<u8> {
    let mut frame = ethernet(tags, ETHERTYPE_IPV4);
    let ihl = 5 + options as u8;
    let total = (usize::from(ihl) * 4 + transport.len()) as u16;
    let mut header = vec![0x40 | ihl, 0];
    header.extend(total.to_be_bytes());
    header.extend([0, 0, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    header.resize(usize::from(ihl) * 4, 1);
    frame.extend(header);
    frame.extend(transport);
    frame
}

pub(crate) fn v6(extensions: &[(u8, Vec<u8>)], protocol: u8, transport: &[u8]) -> Vec<u8> {
    let mut frame = ethernet(&[], ETHERTYPE_IPV6);
    let len = extensions.iter().map(|(_, body)| body.len()).sum::<usize>() + transport.len();
    frame.extend([0x60, 0, 0, 0]);
    frame.extend((len as u16).to_be_bytes());
    frame.extend([extensions.first().map_or(protocol, |(kind, _)| *kind), 64]);
    frame.extend([0xfd; 16]);
    frame.extend([0xfc; 16]);
    for (index, (_, body)) in extensions.iter().enumerate() {
        let mut body = body.clone();
        body[0] = extensions.get(index + 1).map_or(protocol, |(kind, _)| *kind);
        frame.extend(body);
    }
    frame.extend(transport);
    frame
}

pub(crate) fn tcp(payload: usize) -> Vec<u8> {
    let mut segment = vec![0; 20];
    segment[12] = 5 << 4;
    segment.extend((0..payload).map(|at| at as u8));
    segment
}

#[test]
fn layers_of_good_frames() {
    let layers = parse(&v4(&[], 0, 6, &tcp(5))).unwrap();
    assert_eq!((layers.network_at, layers.transport_at, layers.checksum_offset()), (14, 34, 16));
    assert_eq!(layers.headers_len(&v4(&[], 0, 6, &tcp(5))), Ok(54));
    let layers = parse(&v4(&[0x88a8, 0x8100], 10, 17, &[0; 8])).unwrap();
    assert_eq!((layers.network_at, layers.transport_at, layers.checksum_offset()), (22, 82, 6));
    assert!(layers.tagged);
    let chain = [(0, vec![0; 8]), (43, [vec![0, 1], vec![0; 14]].concat()), (51, [vec![0, 1], vec![0; 10]].concat())];
    let layers = parse(&v6(&chain, 6, &tcp(0))).unwrap();
    assert_eq!((layers.network, layers.transport_at), (Network::V6, 14 + 40 + 8 + 16 + 12));
    // A fragment header that says "all of it" is legal.
    assert!(parse(&v6(&[(44, vec![0; 8])], 17, &[0; 8])).is_ok());
}

#[test]
fn bad_frames() {
    use Malformed as M;
    let mut short_ihl = v4(&[], 0, 6, &tcp(0));
    short_ihl[14] = 0x44;
    let mut wrong_version = v4(&[], 0, 6, &tcp(0));
    wrong_version[14] = 0x65;
    let mut fragment = v4(&[], 0, 6, &tcp(0));
    fragment[20] = 0x20;
    let mut later = v4(&[], 0, 6, &tcp(0));
    later[21] = 1;
    let endless: Vec<_> = (0..40).map(|_| (60, vec![0; 8])).collect();
    let cases: Vec<(Vec<u8>, Malformed)> = vec![
        (vec![0; 13], M::Truncated),
        (ethernet(&[], 0x0806), M::NotIp),
        (ethernet(&[0x8100, 0x8100, 0x8100], 0x0800), M::NotIp),
        (ethernet(&[], 0x0800), M::Truncated),
        (v4(&[], 0, 6, &tcp(0))[..53].to_vec(), M::Truncated),
        (v4(&[], 10, 6, &[])[..50].to_vec(), M::Truncated),
        (v4(&[], 0, 17, &[0; 7]), M::Truncated),
        (v4(&[], 0, 1, &[0; 8]), M::NotTcpOrUdp),
        (short_ihl, M::BadHeader),
        (wrong_version, M::BadHeader),
        (fragment, M::Fragment),
        (later, M::Fragment),
        (v6(&[(44, vec![0, 0, 0, 1, 0, 0, 0, 0])], 17, &[0; 8]), M::Fragment),
        (v6(&endless, 6, &tcp(0)), M::BadHeader),
        (v6(&[(0, vec![0, 255])], 6, &[]), M::BadHeader),
        (v6(&[], 59, &[]), M::NotTcpOrUdp),
        (v6(&[], 6, &[0; 10]), M::Truncated),
    ];
    for (frame, expected) in cases {
        assert_eq!(parse(&frame), Err(expected), "{frame:x?}");
    }
    let mut bad_tcp = tcp(0);
    bad_tcp[12] = 4 << 4;
    let frame = v4(&[], 0, 6, &bad_tcp);
    assert_eq!(parse(&frame).unwrap().headers_len(&frame), Err(M::BadHeader));
    bad_tcp[12] = 15 << 4;
    let frame = v4(&[], 0, 6, &bad_tcp);
    assert_eq!(parse(&frame).unwrap().headers_len(&frame), Err(M::Truncated));
}

#[test]
fn the_example_of_rfc_1071() {
    let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
    let mut sum = Sum::default();
    sum.add(&bytes);
    assert_eq!(sum.folded(), 0xddf2);
}

proptest! {
    #[test]
    fn sums_do_not_depend_on_the_cuts(bytes in prop::collection::vec(any::<u8>(), 0..300), cut in 0usize..300) {
        let cut = cut.min(bytes.len());
        let mut whole = Sum::default();
        whole.add(&bytes);
        let mut parts = Sum::default();
        parts.add(&bytes[..cut]);
        parts.add(&bytes[cut..]);
        prop_assert_eq!(whole.folded(), parts.folded());
        let slow = bytes.chunks(2).map(|pair| u64::from(pair[0]) << 8 | u64::from(pair.get(1).copied().unwrap_or(0))).sum::<u64>();
        prop_assert_eq!(whole.folded() % 0xffff, (slow % 0xffff) as u16);
    }

    #[test]
    fn garbage_never_panics_and_offsets_are_inside(mut bytes in prop::collection::vec(any::<u8>(), 0..400), kind in 0usize..4) {
        if bytes.len() > 54 {
            match kind {
                0 => { bytes[12] = 8; bytes[13] = 0; bytes[14] = 0x45; bytes[20] = 0; bytes[21] = 0; bytes[23] = 6; }
                1 => { bytes[12] = 0x86; bytes[13] = 0xdd; bytes[14] = 0x60; bytes[20] = bytes[20] % 3 * 30; }
                2 => { bytes[12] = 0x81; bytes[13] = 0; bytes[16] = 8; bytes[17] = 0; }
                _ => {}
            }
        }
        if let Ok(layers) = parse(&bytes) {
            prop_assert!(layers.transport_at + layers.checksum_offset() + 2 <= bytes.len());
            prop_assert!(layers.transport_at <= HEADERS_MAX - 60);
            layers.pseudo_sum(&bytes, bytes.len());
            if let Ok(end) = layers.headers_len(&bytes) {
                prop_assert!(end <= bytes.len() && end <= HEADERS_MAX);
            }
        }
    }
}
