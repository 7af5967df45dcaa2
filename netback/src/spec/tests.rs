use super::*;
use proptest::prelude::*;

fn parse(text: &str) -> VifSpec {
    text.parse().unwrap_or_else(|e| panic!("{text}\n{e}"))
}

fn mac(text: &str) -> Option<Mac> {
    Some(super::mac(text).unwrap_or_else(|e| panic!("{e}")))
}

fn on(bridge: &str) -> VifSpec {
    VifSpec { bridge: Some(bridge.to_owned()), ..VifSpec::default() }
}

#[test]
fn the_handbook() {
    let with = |address: &str, bridge: &str| VifSpec { mac: mac(address), ..on(bridge) };
    for (line, vifs) in [
        ("vif = [ 'mac=00:16:3e:3f:a9:06, bridge=xenbr0', ]", vec![with("00:16:3e:3f:a9:06", "xenbr0")]),
        (
            "vif = [ 'mac=00:16:3e:5f:77:fd, bridge=xenbr0', 'mac=00:16:3e:5f:77:fc, \\\nbridge=xenbr1', ]",
            vec![with("00:16:3e:5f:77:fd", "xenbr0"), with("00:16:3e:5f:77:fc", "xenbr1")],
        ),
        ("vif = ['bridge=xenbr0']", vec![on("xenbr0")]),
        ("vif = [ 'bridge=xenbr0','bridge=xenbr1' ]", vec![on("xenbr0"), on("xenbr1")]),
        (
            "vif = [ 'type=ioemu,mac=00:16:3e:00:15:01,bridge=eth0' ]",
            vec![VifSpec { nic_type: Some(NicType::Ioemu), ..with("00:16:3e:00:15:01", "eth0") }],
        ),
        (
            "vif = [ 'mac=00:16:3e:00:15:01,bridge=eth0,model=ne2k_pci' ]",
            vec![VifSpec { model: Some("ne2k_pci".to_owned()), ..with("00:16:3e:00:15:01", "eth0") }],
        ),
        ("vif=['mac=00:16:3e:5f:77:fd, bridge=eth2.2']", vec![with("00:16:3e:5f:77:fd", "eth2.2")]),
    ] {
        assert_eq!(parse_list(line).unwrap_or_else(|e| panic!("{e}")), vifs, "{line}");
    }
    // xm network-attach 62 bridge=xenbr2
    assert_eq!(parse_words(&["bridge=xenbr2"]), Ok(on("xenbr2")));
}

/// The examples of xl-network-configuration(5).
#[test]
fn the_manual() {
    let with = |address: &str| VifSpec { mac: mac(address), ..VifSpec::default() };
    assert_eq!(
        parse("mac=00:16:3E:74:3d:76,model=rtl8139,bridge=xenbr0"),
        VifSpec { model: Some("rtl8139".to_owned()), bridge: Some("xenbr0".to_owned()), ..with("00:16:3e:74:3d:76") }
    );
    assert_eq!(parse(""), VifSpec::default());
    let line = "vif = [ 'mac=00:16:3E:74:34:32', 'mac=00:16:3e:5f:48:e4,bridge=xenbr1' ]";
    assert_eq!(
        parse_list(line),
        Ok(vec![with("00:16:3e:74:34:32"), VifSpec { bridge: Some("xenbr1".to_owned()), ..with("00:16:3e:5f:48:e4") }])
    );
    for text in ["vlan=10", "vlan=10p/20", "vlan=10p/100+10x4", "vlan=10u/20p/30-40u/4094"] {
        assert_eq!(parse(text).vlan.as_deref(), text.strip_prefix("vlan="));
    }
}

#[test]
fn every_parameter() {
    let spec = parse(
        "type=vif, mac=00:16:3e:00:00:01, bridge=br0, gatewaydev=eth0, ip=10.0.0.1 2001:db8::/64, \
         script=vif-route, backend=net, vifname=web0, model=e1000, rate=10Mb/s, devid=3, mtu=9000, vlan=10, \
         antispoof=off, untrusted",
    );
    assert_eq!(spec.nic_type, Some(NicType::Vif));
    assert_eq!(spec.mac.map(|mac| mac.0), Some([0, 0x16, 0x3e, 0, 0, 1]));
    assert_eq!(spec.ip.iter().map(Network::to_string).collect::<Vec<_>>(), ["10.0.0.1", "2001:db8::/64"]);
    assert_eq!((spec.gatewaydev.as_deref(), spec.script.as_deref()), (Some("eth0"), Some("vif-route")));
    assert_eq!((spec.backend.as_deref(), spec.vifname.as_deref()), (Some("net"), Some("web0")));
    assert_eq!(spec.rate.map(Rate::key).as_deref(), Some("62500,50000"));
    assert_eq!((spec.devid, spec.mtu, spec.trusted, spec.antispoof), (Some(3), Some(9000), Some(false), Some(false)));
    assert_eq!(parse(&spec.to_string()), spec);
    assert_eq!(parse_words(&["ip=10.0.0.1", "ip=10.0.0.2"]), Ok(parse(" , ip = 10.0.0.1  10.0.0.2 ,,")));
    assert_eq!(parse("bridge=ovsbr0.10:20:30,script=vif-openvswitch").bridge.as_deref(), Some("ovsbr0.10:20:30"));
}

/// The cases of Xen's own test (`tools/xl/check-xl-vif-parse`), and of its code beyond.
#[test]
fn rates() {
    for (text, key) in [
        ("16000000b/s", "100000,50000"),
        ("16000000b/s@50ms", "100000,50000"),
        ("2000000B/s", "100000,50000"),
        ("2000000B/s@50ms", "100000,50000"),
        ("16Kb/s", "100,50000"),
        ("16Kb/s@50ms", "100,50000"),
        ("2KB/s", "100,50000"),
        ("2KB/s@50ms", "100,50000"),
        ("16Mb/s", "100000,50000"),
        ("16Mb/s@50ms", "100000,50000"),
        ("2MB/s", "100000,50000"),
        ("2MB/s@50ms", "100000,50000"),
        ("8Gb/s", "50000000,50000"),
        ("8Gb/s@50ms", "50000000,50000"),
        ("1GB/s", "50000000,50000"),
        ("1GB/s@50ms", "50000000,50000"),
        ("80Mb/s@1s", "10000000,1000000"),
        ("10MB/s@1s", "10000000,1000000"),
        ("10Mb/s", "62500,50000"),
        ("10MB/s", "500000,50000"),
        ("250KB/s", "12500,50000"),
        ("1B/s@1s", "1,1000000"),
        ("1MB/s@20ms", "20000,20000"),
        ("1MB/s@20m", "20000,20000"),
        ("1MB/s@20u", "20,20"),
        ("1MB/s@20us", "20,20"),
        ("1MB/s@2", "2000000,2000000"),
        ("4294967295GB/s@4us", "17179869180000,4"),
        ("1GB/s@4294967295us", "4294967295000,4294967295"),
        ("8b/s@1s", "1,1000000"),
        ("15b/s@1s", "1,1000000"),
        ("4294967295Kb/s@1s", "536870911875,1000000"),
    ] {
        let rate: Rate = text.parse().unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(rate.key(), key, "{text}");
        assert_eq!(rate.to_string().parse(), Ok(rate), "{text} → {rate}");
    }
    for (text, offset, len, word) in [
        ("", 0, 0, "no rate"),
        ("@20ms", 0, 0, "no rate"),
        ("10", 2, 0, "no unit"),
        ("10MB", 2, 2, "unknown unit"),
        ("10mb/s", 2, 4, "unknown unit"),
        ("10 MB/s", 2, 5, "unknown unit"),
        ("MB/s", 0, 1, "unexpected"),
        ("-1B/s", 0, 1, "unexpected"),
        ("0B/s", 0, 1, "no limit"),
        ("010B/s", 0, 3, "octal"),
        ("4294967296B/s", 0, 10, "too large"),
        ("99999999999999999999B/s", 0, 20, "too large"),
        ("1B/s", 0, 4, "less than one byte"),
        ("7b/s@1s", 0, 7, "less than one byte"),
        ("1MB/s@", 6, 0, "missing"),
        ("1MB/s@x", 6, 1, "unexpected"),
        ("1MB/s@5min", 7, 3, "unknown unit"),
        ("1MB/s@0ms", 6, 1, "0 is no limit"),
        ("1MB/s@4295s", 6, 5, "too long"),
        ("1MB/s@4294967296us", 6, 10, "too large"),
        ("4294967295GB/s@5us", 0, 18, "too large for its interval"),
        ("4296MB/s@4294s", 0, 14, "too large for its interval"),
        ("foo", 0, 1, "unexpected"),
        ("10MB/m", 2, 4, "unknown unit"),
        ("10ZB/s", 2, 4, "unknown unit"),
        ("4294967296Kb/s", 0, 10, "too large"),
        ("10Mb/s@foo", 7, 1, "unexpected"),
        ("10MB/s@10h", 9, 1, "unknown unit"),
        ("1B/s@4294968ms", 5, 9, "too long"),
        ("@", 0, 0, "no rate"),
    ] {
        let e = text.parse::<Rate>().expect_err(text);
        assert_eq!((e.offset, e.len), (offset, len), "{text:?}\n{e}");
        assert!(e.to_string().contains(word), "{text:?}: no {word:?} in\n{e}");
    }
}

#[test]
fn what_is_refused_and_where() {
    for (text, offset, len, word) in [
        ("mac=", 4, 0, "no value"),
        ("mac", 0, 3, "no value"),
        ("mac=00:16:3e:3f:a9", 18, 0, "missing"),
        ("mac=00:16:3e:3f:a9:0", 20, 0, "missing"),
        ("mac=00:16:3e:3f:a9:06:07", 21, 3, "follows"),
        ("mac=00:16:3g:3f:a9:06", 11, 1, "'g'"),
        ("mac=0:16:3e:3f:a9:06", 5, 1, "':'"),
        ("mac=00-16-3e-3f-a9-06", 6, 1, "'-'"),
        ("mac=0x0016", 5, 1, "'x'"),
        ("mac=00:16:3é:00:00:00", 11, 2, "'é'"),
        ("mac=00:00:00:00:00:00", 4, 17, "zero"),
        ("mac=ff:ff:ff:ff:ff:ff", 4, 2, "group"),
        ("mac=01:00:5e:00:00:01", 4, 2, "even, as in"),
        ("mac=fe:ff:ff:ff:ff:ff", 4, 17, "backend's end"),
        ("bridge=xenbr0,mac=00:16:3e:00:00:01,mac=00:16:3e:00:00:02", 40, 17, "given twice"),
        ("bridge=xen br0", 10, 1, "' '"),
        ("bridge=", 7, 0, "no value"),
        ("bridge=a/b", 8, 1, "'/'"),
        ("bridge=ovsbr0.10:20", 16, 1, "':'"),
        ("bridge=abcdefghijklmnop", 7, 16, "no name of a device"),
        ("bridge=br0,script=/etc/xen/scripts/vif-route,bridge=br1", 52, 3, "given twice"),
        ("gatewaydev=eth0,netdev=eth1", 23, 4, "given twice"),
        ("netdev=", 7, 0, "no value"),
        ("vifname=a/b", 9, 1, "'/'"),
        ("vifname=a b", 9, 1, "' '"),
        ("vifname=abcdefghijklmnop", 8, 16, "1 to 15"),
        ("vifname=vif3.0", 8, 6, "another form"),
        ("vifname=..", 8, 2, "no name"),
        ("vifname=web%d", 11, 1, "'%'"),
        ("vifname=é", 8, 2, "'é'"),
        ("ip=10.0.0", 3, 6, "no IP address"),
        ("ip=10.0.0.1 10.0.0.300", 12, 10, "no IP address"),
        ("ip=10.0.0.1/33", 12, 2, "prefix"),
        ("ip=10.0.0.1/", 12, 0, "prefix"),
        ("ip=10.0.0.1/+8", 12, 2, "prefix"),
        ("ip=2001:db8::1/129", 15, 3, "1 to 128"),
        ("ip=0.0.0.0", 3, 7, "no address"),
        ("ip=224.0.0.1", 3, 9, "group"),
        ("ip=127.0.0.1", 3, 9, "never leaves"),
        ("ip=::ffff:10.0.0.1", 3, 15, "disguise"),
        ("ip=255.255.255.255", 3, 15, "everybody"),
        ("ip=10.0.0.1,ip=10.0.0.1", 15, 8, "given twice"),
        ("rate=10", 7, 0, "no unit"),
        ("rate=1MB/s@20h", 13, 1, "unknown unit"),
        ("mtu=67", 4, 2, "68 to 65517"),
        ("mtu=65518", 4, 5, "68 to 65517"),
        ("mtu=0x5dc", 4, 5, "no MTU"),
        ("mtu=+1500", 4, 5, "no MTU"),
        ("devid=-1", 6, 2, "decimal"),
        ("devid=1000000", 6, 7, "999999"),
        ("devid=1,devid=2", 14, 1, "given twice"),
        ("vlan=0", 5, 1, "no VLAN 0"),
        ("vlan=4095", 5, 4, "no VLAN 4095"),
        ("vlan=99999999999", 5, 11, "no VLAN"),
        ("vlan=10/20", 5, 5, "marked p"),
        ("vlan=10u", 5, 3, "marked p"),
        ("vlan=10-20", 5, 5, "marked p"),
        ("vlan=10p/20p", 9, 3, "second"),
        ("vlan=10p/20-10", 9, 5, "10-20"),
        ("vlan=10-20p", 10, 1, "range"),
        ("vlan=10p/", 9, 0, "missing"),
        ("vlan=10p//20", 9, 0, "missing"),
        ("vlan=10p/100+10", 15, 0, "missing"),
        ("vlan=10p/100+10y4", 15, 1, "'y'"),
        ("vlan=10p/4000+10x10", 9, 10, "beyond"),
        ("vlan=10p/1+4294967295x4294967295", 11, 10, "no VLAN"),
        ("vlan=10q", 7, 1, "'q'"),
        ("type=e1000", 5, 5, "vif or ioemu"),
        ("antispoof=no", 10, 2, "on or off"),
        ("trusted=1", 0, 7, "stands alone"),
        ("trusted,untrusted", 8, 9, "given twice"),
        ("forwarddev=eth1", 0, 10, "COLO"),
        ("colo_sock_mirror_id=1", 0, 19, "COLO"),
        ("brigde=xenbr0", 0, 6, "mean bridge?"),
        ("Mac=00:16:3e:00:00:01", 0, 3, "mean mac?"),
        ("colour=red", 0, 6, "the parameters are"),
        ("xenbr0", 0, 6, "key=value"),
        ("trustd", 0, 6, "mean trusted?"),
        ("=xenbr0", 0, 0, "unknown parameter"),
        ("bridge=xen\0br", 10, 1, "control"),
        ("script=a\nb", 8, 1, "control"),
    ] {
        let e = text.parse::<VifSpec>().expect_err(text);
        assert_eq!((e.offset, e.len), (offset, len), "{text:?}\n{e}");
        assert!(e.to_string().contains(word), "{text:?}: no {word:?} in\n{e}");
        assert!(!e.help.is_empty() && e.input == text);
    }
}

#[test]
fn lists() {
    let two = vec![on("a"), on("b")];
    for text in [
        "vif = [ 'bridge=a', \"bridge=b\" ]",
        "vif=['bridge=a','bridge=b',];",
        "# two\nvif = [ # here\n  'bridge=a', # one\n  'bridge=b'\n]\n",
        "vif = [ 'bridge=a', \\\n 'bridge=b', \\\r\n]",
        "vif = [ 'bridge=\\\na', 'bridge=b' ]",
        "['bridge=a','bridge=b']",
        "'bridge=a', 'bridge=b'",
    ] {
        assert_eq!(parse_list(text).unwrap_or_else(|e| panic!("{e}")), two, "{text}");
    }
    assert_eq!(parse_list("vif = [ ]"), Ok(vec![]));
    assert_eq!(parse_list("vif = [ '', '' ]"), Ok(vec![VifSpec::default(); 2]));
    assert_eq!(parse_list("bridge=a\n"), Ok(vec![on("a")]));
    assert_eq!(parse_list("vifname=a"), Ok(vec![VifSpec { vifname: Some("a".to_owned()), ..VifSpec::default() }]));
    for (text, offset, len, word) in [
        ("vif = 'bridge=a'", 6, 1, "not given as a list"),
        ("vif = [ 'bridge=a'", 18, 0, "not closed"),
        ("vif = [ 'bridge=a ]", 8, 1, "quote is not closed"),
        ("vif = [ 'bridge=a' 'bridge=b' ]", 19, 1, "comma"),
        ("vif = [ 'bridge=a' ] disk = [ ]", 21, 10, "follows the list"),
        ("vif = [ bridge=a ]", 8, 8, "write vif = ["),
        ("vif = [ 'bridge=a',\n  'brdge=b' ]", 23, 5, "mean bridge?"),
        ("vif = [ 'mac=00:16:3e:00:00:01, \\\nbridge=a:b' ]", 42, 1, "':'"),
        ("vif = [ 'devid=1', 'bridge=a,devid=1' ]", 35, 1, "two interfaces have the number 1"),
        ("vif = [ 'vifname=a', 'vifname=a' ]", 30, 1, "two interfaces are called a"),
    ] {
        let e = parse_list(text).expect_err(text);
        assert_eq!((e.offset, e.len), (offset, len), "{text:?}\n{e}");
        assert!(e.to_string().contains(word), "{text:?}: no {word:?} in\n{e}");
    }
}

#[test]
fn words_of_network_attach() {
    let both = VifSpec { mac: mac("00:16:3e:00:00:01"), ..on("xenbr2") };
    for words in [
        &["bridge=xenbr2", "mac=00:16:3e:00:00:01"][..],
        &["mac=00:16:3e:00:00:01,bridge=xenbr2"],
        &["mac=00:16:3e:00:00:01,", "bridge=xenbr2"],
        &["mac=00:16:3e:00:00:01,", "", "bridge=xenbr2"],
    ] {
        assert_eq!(parse_words(words).unwrap_or_else(|e| panic!("{e}")), both, "{words:?}");
    }
    assert_eq!(parse_words(&[]), Ok(VifSpec::default()));
    let e = parse_words(&["bridge=xenbr2", "mac=1"]).expect_err("no address");
    assert_eq!((e.input.as_str(), e.span()), ("bridge=xenbr2 mac=1", 19..19));
    let e = parse_words(&["bridge=xenbr2", "bridge=xenbr3"]).expect_err("twice");
    assert_eq!(e.span(), 21..27);
}

#[test]
fn an_error_shows_the_place() {
    let e = "mac=00:16:3e:00:00:01,brigde=xenbr0".parse::<VifSpec>().expect_err("no such key");
    assert_eq!(
        e.to_string(),
        "unknown parameter `brigde`\n  mac=00:16:3e:00:00:01,brigde=xenbr0\n  \
         \u{20}                     ^^^^^^\nhelp: did you mean bridge?"
    );
}

#[test]
fn what_has_no_effect_is_noted() {
    for (text, words) in [
        ("bridge=xenbr0", &[][..]),
        ("type=vif", &[]),
        ("antispoof=on", &[]),
        ("type=ioemu,model=e1000", &["device model's", "model="]),
        ("netdev=eth0", &["gatewaydev="]),
        ("uuid=1,accel=x,security_label=y", &["uuid= is ignored", "accel= is ignored", "security_label= is ignored"]),
        ("policy=a,label=b,accel=", &["policy=", "label=", "accel="]),
        ("antispoof=off", &["in the name of others"]),
    ] {
        let notes = parse(text).notes;
        assert_eq!(notes.len(), words.len(), "{text}: {notes:?}");
        for word in words {
            assert!(notes.iter().any(|n| n.contains(word) && n.ends_with('.')), "{text}: no {word} in {notes:?}");
        }
    }
    let line = "vif = [ 'mac=00:16:3e:00:00:01', '', 'mac=00:16:3e:00:00:01' ]";
    let specs = parse_list(line).unwrap_or_else(|e| panic!("{e}"));
    assert!(specs[0].notes.is_empty() && specs[2].notes[0].contains("interfaces 0 and 2"), "{:?}", specs[2].notes);
}

#[test]
fn random_addresses_are_xens() {
    let addresses: Vec<Mac> = (0..8).map(|_| random_mac().unwrap()).collect();
    for address in &addresses {
        assert_eq!(address.0[..3], [0x00, 0x16, 0x3e]);
        assert!(address.0[3] < 0x80);
        assert_eq!(super::mac(&address.to_string()), Ok(*address));
    }
    assert!(addresses.iter().any(|address| *address != addresses[0]));
}

/// Texts made of the grammar's own words, which reach further into the parser than arbitrary characters do.
fn almost() -> impl Strategy<Value = String> {
    let words = [
        "mac=",
        "00:16:3e:00:00:01",
        "bridge=",
        "xenbr0",
        "ip=",
        "10.0.0.1",
        "2001:db8::1",
        "/24",
        "script=",
        "vif-route",
        "/etc/xen/scripts/x",
        "vifname=",
        "web0",
        "rate=",
        "10Mb/s",
        "@20ms",
        "5",
        "KB/s",
        "mtu=",
        "1500",
        "vlan=",
        "10p",
        "/",
        "20-30u",
        "1+2x3",
        "devid=",
        "gatewaydev=",
        "netdev=",
        "type=",
        "ioemu",
        "model=",
        "trusted",
        "untrusted",
        "antispoof=",
        "on",
        "off",
        "backend=",
        "colo_",
        "accel=",
        ",",
        ",",
        ",",
        "=",
        " ",
        "\t",
        "\n",
        "\0",
        "é",
        "'",
        "\"",
        "[",
        "]",
        "vif = [",
        "\\",
        "\\\n",
        "#",
        ";",
        ":",
    ];
    proptest::collection::vec(proptest::sample::select(words.to_vec()), 0..12).prop_map(|w| w.concat())
}

fn valid() -> impl Strategy<Value = VifSpec> {
    let link = || proptest::option::of("[-a-zA-Z0-9_.]{0,9}[a-z]");
    let text = || proptest::option::of("[-a-zA-Z0-9_./é:=][-a-zA-Z0-9_./é:= ]{0,8}[-a-zA-Z0-9_./é:=]");
    let address =
        (any::<[u8; 16]>(), proptest::option::of(1..=32_u8)).prop_filter_map("an address", |(bytes, prefix)| {
            let ip = match bytes[0] % 2 {
                0 => std::net::Ipv4Addr::new(bytes[1], bytes[2], bytes[3], bytes[4]).to_string(),
                _ => std::net::Ipv6Addr::from(bytes).to_string(),
            };
            let text = prefix.map_or(ip.clone(), |prefix| format!("{ip}/{prefix}"));
            words::addresses(&text).ok().and_then(|mut addresses| addresses.pop())
        });
    let rate = (1..=u32::MAX, 0..8_usize, 1..=u32::MAX).prop_filter_map("a rate", |(number, unit, usecs)| {
        let unit = ["B", "KB", "MB", "GB", "b", "Kb", "Mb", "Gb"][unit];
        format!("{number}{unit}/s@{usecs}us").parse::<Rate>().ok()
    });
    let vlan = proptest::sample::select(vec!["1", "4094", "10p", "10p/20", "10u/20p", "10p/100-120u/200+10x4"]);
    let mac = any::<[u8; 6]>().prop_filter_map("an address", |[a, b, c, d, e, f]| {
        super::mac(&format!("{a:02X}:{b:02x}:{c:02X}:{d:02x}:{e:02X}:{f:02x}")).ok()
    });
    let first = (
        proptest::option::of(mac),
        link(),
        link(),
        proptest::collection::vec(address, 0..3),
        text(),
        text(),
        link(),
        proptest::option::of(rate),
    );
    let second = (
        proptest::option::of(0..1_000_000_u32),
        proptest::option::of(68..=65_517_u32),
        proptest::option::of(vlan),
        any::<Option<bool>>(),
        text(),
        any::<Option<bool>>(),
        any::<Option<bool>>(),
    );
    (first, second).prop_map(|(first, second)| {
        let (mac, bridge, gatewaydev, mut ip, script, backend, vifname, rate) = first;
        ip.dedup();
        let (devid, mtu, vlan, ioemu, model, trusted, antispoof) = second;
        VifSpec {
            mac,
            bridge,
            gatewaydev,
            ip,
            script,
            backend,
            vifname,
            rate,
            devid,
            mtu,
            vlan: vlan.map(str::to_owned),
            nic_type: ioemu.map(|ioemu| if ioemu { NicType::Ioemu } else { NicType::Vif }),
            model,
            trusted,
            antispoof,
            notes: Vec::new(),
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn the_canonical_form_returns(spec in valid()) {
        let text = spec.to_string();
        let same = |got: Result<VifSpec, SpecError>| match got {
            Ok(got) if got == spec => Ok(()),
            Ok(got) => Err(TestCaseError::fail(format!("{text} became {got:?}"))),
            Err(e) => Err(TestCaseError::fail(e.to_string())),
        };
        same(text.parse())?;
        same(parse_words(&text.split(',').collect::<Vec<_>>()))?;
        same(parse_list(&format!("vif = [ '{text}', ]")).map(|mut specs| specs.remove(0)))?;
    }

    #[test]
    fn nothing_panics(text in prop_oneof![almost(), ".*", "[ -~]*"]) {
        let words: Vec<&str> = text.split(' ').collect();
        let specs = text.parse::<VifSpec>().map(|s| vec![s]);
        for outcome in [specs, parse_list(&text), parse_words(&words).map(|s| vec![s])] {
            match outcome {
                Ok(specs) => {
                    for spec in specs {
                        let returned = spec.to_string().parse::<VifSpec>();
                        prop_assert_eq!(returned.map_err(|e| TestCaseError::fail(e.to_string()))?, spec);
                    }
                }
                Err(e) => {
                    prop_assert_eq!(&e.input, &text);
                    prop_assert!(text.get(e.span()).is_some(), "{:?} in {:?}", e.span(), text);
                    prop_assert!(!e.message.is_empty() && !e.help.is_empty() && e.to_string().lines().count() >= 4);
                }
            }
        }
    }
}
