use super::*;

/// The key of Microsoft's "Verifying the RSS Hash Calculation".
const KEY: [u8; 40] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0, 0xd0, 0xca, 0x2b,
    0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c, 0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac,
    0x01, 0xfa,
];

fn toeplitz(types: u32) -> HashSettings {
    let mut settings = HashSettings::default();
    settings.set_algorithm(Algorithm::Toeplitz);
    assert!(settings.set_types(types));
    settings.set_key(&KEY);
    settings
}

fn v4(source: &str, source_port: u16, destination: &str, destination_port: u16) -> Flow {
    Flow {
        addresses: Addresses::V4 { source: source.parse().unwrap(), destination: destination.parse().unwrap() },
        tcp_ports: Some((source_port, destination_port)),
    }
}

fn v6(source: &str, source_port: u16, destination: &str, destination_port: u16) -> Flow {
    Flow {
        addresses: Addresses::V6 { source: source.parse().unwrap(), destination: destination.parse().unwrap() },
        tcp_ports: Some((source_port, destination_port)),
    }
}

#[test]
fn microsofts_vectors() {
    // Flow, hash of the addresses, hash with the ports.
    let v4s = [
        (v4("66.9.149.187", 2794, "161.142.100.80", 1766), 0x323e_8fc2, 0x51cc_c178),
        (v4("199.92.111.2", 14230, "65.69.140.83", 4739), 0xd718_262a, 0xc626_b0ea),
        (v4("24.19.198.95", 12898, "12.22.207.184", 38024), 0xd2d0_a5de, 0x5c2b_394a),
        (v4("38.27.205.30", 48228, "209.142.163.6", 2217), 0x8298_9176, 0xafc7_327f),
        (v4("153.39.163.191", 44251, "202.188.127.2", 1303), 0x5d18_09c5, 0x10e8_28a2),
    ];
    let v6s = [
        (v6("3ffe:2501:200:1fff::7", 2794, "3ffe:2501:200:3::1", 1766), 0x2cc1_8cd5, 0x4020_7d3d),
        (v6("3ffe:501:8::260:97ff:fe40:efab", 14230, "ff02::1", 4739), 0x0f0c_461c, 0xdde5_1bbf),
        (v6("3ffe:1900:4545:3:200:f8ff:fe21:67cf", 44251, "fe80::200:f8ff:fe21:67cf", 38024), 0x4b61_e985, 0x02d1_feef),
    ];
    let all = toeplitz(ALL_TYPES);
    let addresses = toeplitz(hash_type::IPV4 | hash_type::IPV6);
    for (vectors, kinds) in [(&v4s[..], (0, 1)), (&v6s[..], (2, 3))] {
        for &(flow, without, with) in vectors {
            assert_eq!(addresses.hash(&flow), Some(PacketHash { kind: kinds.0, value: without }), "{flow:?}");
            assert_eq!(all.hash(&flow), Some(PacketHash { kind: kinds.1, value: with }), "{flow:?}");
            let no_tcp = Flow { tcp_ports: None, ..flow };
            assert_eq!(all.hash(&no_tcp), Some(PacketHash { kind: kinds.0, value: without }), "{flow:?}");
        }
    }
}

#[test]
fn what_was_not_asked_for_is_not_hashed() {
    let v4 = v4("1.2.3.4", 5, "6.7.8.9", 10);
    let v6 = v6("::1", 5, "::2", 10);
    let no_tcp = |flow: Flow| Flow { tcp_ports: None, ..flow };
    assert_eq!(HashSettings::default().hash(&v4), None);
    assert_eq!(toeplitz(0).hash(&v4), None);
    let tcp = toeplitz(hash_type::IPV4_TCP);
    assert!(tcp.hash(&v4).is_some() && tcp.hash(&no_tcp(v4)).is_none() && tcp.hash(&v6).is_none());
    let six = toeplitz(hash_type::IPV6);
    assert!(six.hash(&v4).is_none() && six.hash(&v6) == six.hash(&no_tcp(v6)));
    let mut off = toeplitz(ALL_TYPES);
    off.set_algorithm(Algorithm::None);
    assert_eq!(off.hash(&v4), None);
}

/// The header's own definition, bit by bit: keys of every length, inputs of all four lengths.
#[test]
fn the_table_says_what_the_definition_says() {
    let by_definition = |key: &[u8], input: &[u8]| {
        let bit = |at: usize| key.get(at / 8).is_some_and(|byte| byte & (0x80 >> (at % 8)) != 0);
        let mut value = 0u32;
        for at in (0..8 * input.len()).filter(|at| input[at / 8] & (0x80 >> (at % 8)) != 0) {
            value ^= (0..32).fold(0, |word, next| word << 1 | u32::from(bit(at + next)));
        }
        value
    };
    let mut random = 0x2545_f491_4f6c_dd1du64;
    let mut byte = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random >> 24) as u8
    };
    for len in 0..=KEY_MAX {
        let mut key = [0; KEY_MAX];
        key[..len].iter_mut().for_each(|at| *at = byte());
        let table = Key::new(key);
        for input_len in [8, 12, 32, 36] {
            let input: Vec<u8> = (0..input_len).map(|_| byte()).collect();
            assert_eq!(table.hash(&input), by_definition(&key[..len], &input), "key of {len} bytes");
        }
    }
}

#[test]
fn a_shorter_key_leaves_nothing_of_the_longer_one() {
    let mut settings = toeplitz(ALL_TYPES);
    settings.set_key(&KEY[..4]);
    assert!(settings.key()[..4] == KEY[..4] && settings.key()[4..] == [0; 36]);
    settings.set_key(&[]);
    assert_eq!(settings.hash(&v4("1.2.3.4", 5, "6.7.8.9", 10)).map(|hash| hash.value), Some(0));
}

#[test]
fn types_and_tables_are_checked() {
    let mut settings = HashSettings::default();
    for types in [16, u32::MAX, 1 << 31 | 1] {
        assert!(!settings.set_types(types) && settings.types() == 0);
    }
    assert!(!settings.set_mapping_size(129) && !settings.set_mapping_size(u32::MAX));
    assert!(settings.set_mapping_size(128) && settings.mapping() == [0; 128]);
    assert!(settings.set_mapping(126, &[3, 1], 4));
    assert_eq!(settings.mapping()[125..], [0, 3, 1]);
    // XSA-270: the sum of offset and length, which may not even fit.
    for offset in [127, 128, u32::MAX, u32::MAX - 1] {
        assert!(!settings.set_mapping(offset, &[1, 1], 4), "{offset}");
    }
    assert!(settings.set_mapping(128, &[], 4) && !settings.set_mapping(129, &[], 4));
    // No such queue; and then none of the entries is taken.
    assert!(!settings.set_mapping(0, &[1, 4], 4) && settings.mapping()[0] == 0);
    assert!(settings.set_mapping_size(2) && settings.mapping() == [0; 2]);
}

#[test]
fn queues_by_table_or_by_remainder() {
    let mut settings = toeplitz(ALL_TYPES);
    assert_eq!((settings.queue(7, 4), settings.queue(u32::MAX, 4)), (3, 3));
    assert!(settings.set_mapping_size(3) && settings.set_mapping(0, &[2, 0, 1], 3));
    assert_eq!([0, 1, 2, 3, 4].map(|hash| settings.queue(hash, 3)), [2, 0, 1, 2, 0]);
    assert!(settings.queue(0, 1) < 1, "a table for more queues than there are");
}

#[test]
fn readers_see_changes() {
    let state = Arc::new(HashState::default());
    let mut reader = HashReader::new(Arc::clone(&state));
    assert_eq!(reader.settings().types(), 0);
    state.replace(toeplitz(ALL_TYPES));
    assert_eq!(reader.settings().types(), ALL_TYPES);
    state.replace(HashSettings::default());
    assert_eq!(reader.settings().algorithm(), Algorithm::None);
}
