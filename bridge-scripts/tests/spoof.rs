//! What a guest must not send, and what it must be able to send, through vif-bridge, vif-route and vif-nat.
//!
//! A chain of nftables behind the filter at the interface's ingress counts what gets through; and in the bridged scene the other
//! guest, the card's network and dom0's own stack are looked at. The same frames without the filter must all get through,
//! or the test shows nothing.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod spoof_kinds;
mod vif_common;

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use spoof_kinds::{DOM0, GUEST, OTHER, OUTSIDE, World, forged, is, legal, six};
use vif_common::cable::{Beside, Cable, has};
use vif_common::frames::{Arp, EVERYBODY, Mac, ether, ip4, udp};
use vif_common::{PATIENCE, Scene, alone, have, nft_reads, sh};

struct Stage {
    scene: Scene,
    world: World,
    guest: Cable,
    other: Cable,
    outside: Cable,
    _beside: Beside,
}

/// Two guests' interfaces, connected by `script`, and a card.
fn stage(script: &str, ip: bool, antispoof: bool) -> Stage {
    let scene = Scene::new();
    let beside = Beside::new();
    let (guest, other) = (beside.pair("vif1.0", "guest1"), beside.pair("vif2.0", "guest2"));
    let outside = beside.pair("eth0", "outside");
    let bridged = script == "vif-bridge";
    let gateway = Ipv4Addr::new(10, 0, 0, 254);
    let own = if script == "vif-nat" && !ip { Ipv4Addr::new(10, 0, 1, 1) } else { Ipv4Addr::new(10, 0, 0, 11) };
    sh("ip link set lo up");
    let device = if bridged { "xenbr0" } else { "eth0" };
    if bridged {
        // Snooping would keep reports of groups, whose checksums are wrong here, from everybody but routers.
        sh("ip link add xenbr0 type bridge mcast_snooping 0");
        sh("ip link set eth0 master xenbr0 up");
    }
    sh(&format!("ip addr add 10.0.0.254/24 dev {device}"));
    sh(&format!("ip link set {device} up"));
    sh(&format!("ip route add default via 10.0.0.1 dev {device}"));
    sh(&format!("ip neigh add 10.0.0.1 lladdr 00:50:56:00:00:09 dev {device}"));
    let switch = if antispoof { "on" } else { "off" };
    for (domid, mac, address) in
        [(1, "00:16:3e:00:00:01", "10.0.0.11 2001:db8::11"), (2, "00:16:3e:00:00:02", "10.0.0.12 2001:db8::12")]
    {
        let mut keys = vec![("antispoof", switch)];
        if bridged {
            keys.push(("bridge", "xenbr0"));
        }
        if ip {
            keys.push(("ip", address));
        }
        scene.describe(domid, 0, mac, &keys);
        scene.online(script, domid, 0).unwrap();
    }
    nft_reads(
        "add table netdev probe\n\
         add chain netdev probe c { type filter hook ingress device \"vif1.0\" priority 100; }\n\
         add rule netdev probe c arp daddr ip 192.0.2.99 counter accept\n\
         add rule netdev probe c counter\n",
    )
    .unwrap();
    let world = World {
        own,
        own6: six("2001:db8::11"),
        own_link: six("fe80::216:3eff:fe00:1"),
        other: Ipv4Addr::new(10, 0, 0, 12),
        other6: six("2001:db8::12"),
        gateway: if script == "vif-nat" && !ip { Ipv4Addr::new(10, 0, 1, 128) } else { gateway },
        next: if bridged { OUTSIDE } else { DOM0 },
    };
    let stage = Stage { scene, world, guest, other, outside, _beside: beside };
    stage.settle();
    stage
}

/// What the second frame of each trial asks for, and nothing else does.
const MARK: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 99);

/// How many frames of the first guest got through: marks, and others.
fn through() -> (u64, u64) {
    let listed = sh("nft list table netdev probe");
    let counts: Vec<u64> =
        listed.split("packets ").skip(1).map(|text| text.split(' ').next().unwrap().parse().unwrap()).collect();
    (counts[0], counts[1])
}

impl Stage {
    fn mark(&self) {
        let mark = Arp::new(1, (GUEST, self.world.own), MARK);
        self.guest.send(&ether(EVERYBODY, GUEST, 0x0806, &mark.bytes()));
    }

    /// Waits until the interface carries frames, which is some time after it was switched on.
    fn settle(&self) {
        let begin = Instant::now();
        while through().0 == 0 {
            assert!(begin.elapsed() < PATIENCE, "the interface carries nothing");
            self.mark();
            std::thread::sleep(Duration::from_millis(20));
        }
        // Marks that are still on their way would be taken for later ones.
        let (mut last, mut same) = (through(), 0);
        while same < 5 {
            std::thread::sleep(Duration::from_millis(50));
            let now = through();
            same = if now == last { same + 1 } else { 0 };
            last = now;
        }
    }

    /// Sends the frame and, behind it, one that gets through; how many of the two did. They stay in order.
    fn send(&self, frame: &[u8]) -> u64 {
        let before = through();
        self.guest.send(frame);
        self.mark();
        let begin = Instant::now();
        loop {
            let now = through();
            if now.0 > before.0 {
                return 1 + now.1 - before.1;
            }
            if begin.elapsed() > PATIENCE {
                return now.1 - before.1;
            }
        }
    }
}

fn run(script: &str, ip: bool) {
    let told = if ip || script == "vif-nat" { "addresses known" } else { "addresses unknown" };
    println!("== {script}, {told}");
    let open = stage(script, ip, false);
    // Without the filter everything gets through: the frames are sent, and seen by the probe.
    let kinds = forged(&open.world);
    assert!(kinds.len() >= 60);
    for kind in &kinds {
        assert_eq!(open.send(&kind.frame), 2, "{script} without the filter: {} does not arrive", kind.name);
    }
    if script == "vif-bridge" {
        // And at the places that are looked at below.
        let mut seen = [open.other.received(), open.outside.received()].map(|frames| {
            let arrived = |number: &usize| frames.iter().any(|frame| is(frame, &kinds[*number].frame, *number));
            (0..kinds.len()).filter(arrived).count()
        });
        seen.sort_unstable();
        assert!(seen[0] > 50, "{seen:?} forged frames were seen without the filter");
    }
    for domid in [1, 2] {
        open.scene.offline(script, domid, 0).unwrap();
    }
    for device in ["vif1.0", "vif2.0", "eth0"] {
        sh(&format!("ip link del {device}"));
    }
    if script == "vif-bridge" {
        sh("ip link del xenbr0");
    }
    sh("nft delete table netdev probe");
    drop(open);

    let stage = stage(script, ip, true);
    let dom0 = (script == "vif-bridge").then(|| Cable::new("xenbr0"));
    let mut wrong = Vec::new();
    let known = ip || script == "vif-nat";
    let mut dropped = 0;
    for (number, kind) in forged(&stage.world).iter().enumerate() {
        let expected = if kind.by_address && !known { 2 } else { 1 };
        let count = stage.send(&kind.frame);
        let places =
            [("the other guest", Some(&stage.other)), ("outside", Some(&stage.outside)), ("dom0", dom0.as_ref())];
        let seen: Vec<&str> = places
            .iter()
            .filter(|(_, cable)| {
                cable.is_some_and(|cable| cable.received().iter().any(|got| is(got, &kind.frame, number)))
            })
            .map(|(name, _)| *name)
            .collect();
        let verdict = if count == 1 && seen.is_empty() { "dropped" } else { "arrives" };
        println!("{verdict:8} {} {}", kind.name, if kind.by_address { "(by address)" } else { "" });
        dropped += usize::from(verdict == "dropped");
        if count != expected || expected == 1 && !seen.is_empty() {
            wrong.push(format!("{script}, {told}: {}: {count} of 2 got through, seen by {seen:?}", kind.name));
        }
    }
    assert!(dropped >= 60, "{dropped}");
    for (index, (name, frame)) in legal(&stage.world).iter().enumerate() {
        // With `ip=` unset NAT derives an IPv4 address, and there is no global IPv6.
        if script == "vif-nat" && !ip && has(frame, &stage.world.own6.octets()) {
            continue;
        }
        let count = stage.send(frame);
        println!("{:8} {name} (legal)", if count == 2 { "arrives" } else { "dropped" });
        if count != 2 {
            wrong.push(format!("{script}, {told}: {name} is legal, and {count} of 2 got through"));
        } else if script == "vif-bridge" && !stage.outside.gets(|got| is(got, frame, 1000 + index)) {
            wrong.push(format!("{script}, {told}: {name} is legal, and does not arrive outside"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let unicast = |to: Mac, text: &[u8]| {
        ether(to, GUEST, 0x0800, &ip4(stage.world.own, stage.world.other, 17, 0, &udp(1, 2, text)))
    };
    if script == "vif-bridge" {
        stage.guest.send(&unicast(OTHER, b"between guests"));
        assert!(stage.other.gets(|frame| has(frame, b"between guests")), "guests cannot talk to each other");
        let from_outside = |to: Mac, text: &[u8]| {
            ether(to, OUTSIDE, 0x0800, &ip4([8, 8, 8, 8].into(), [10, 0, 0, 11].into(), 17, 0, &udp(1, 2, text)))
        };
        stage.guest.received();
        stage.outside.send(&from_outside([0x00, 0x16, 0x3e, 9, 9, 9], b"for a stranger"));
        stage.outside.send(&from_outside(GUEST, b"for the guest"));
        stage.outside.send(&from_outside(EVERYBODY, b"for everybody"));
        let mut got: Vec<Vec<u8>> = Vec::new();
        let begin = Instant::now();
        while !got.iter().any(|frame| has(frame, b"for everybody")) && begin.elapsed() < PATIENCE {
            got.extend(stage.guest.received());
        }
        assert!(got.iter().any(|frame| has(frame, b"for the guest")));
        assert!(got.iter().any(|frame| has(frame, b"for everybody")));
        assert!(!got.iter().any(|frame| has(frame, b"for a stranger")), "what is for others is sent to a guest");
        assert!(!stage.outside.received().iter().any(|frame| has(frame, b"between guests")));
    } else {
        // Forwarded by dom0, to the world and to the other guest.
        let far = ip4(stage.world.own, [198, 51, 100, 7].into(), 17, 0, &udp(1000, 2000, b"to the world"));
        stage.guest.send(&ether(DOM0, GUEST, 0x0800, &far));
        let begin = Instant::now();
        let mut got = None;
        while got.is_none() && begin.elapsed() < PATIENCE {
            got = stage.outside.received().into_iter().find(|frame| has(frame, b"to the world"));
        }
        let source: [u8; 4] = got.expect("forwarded")[26..30].try_into().unwrap();
        let expected = if script == "vif-nat" { Ipv4Addr::new(10, 0, 0, 254) } else { stage.world.own };
        assert_eq!(Ipv4Addr::from(source), expected, "who the world sees");
        if ip {
            stage.guest.send(&unicast(DOM0, b"between guests"));
            assert!(stage.other.gets(|frame| has(frame, b"between guests")), "guests cannot talk to each other");
        }
    }
    for domid in [1, 2] {
        stage.scene.offline(script, domid, 0).unwrap();
    }
    stage.scene.nothing_left();
}

fn spoof(test: &str, script: &'static str, ip: bool) {
    if have("nft", "forged frames") {
        alone(test, || run(script, ip));
    }
}

#[test]
fn bridged_with_addresses() {
    spoof("bridged_with_addresses", "vif-bridge", true);
}

#[test]
fn bridged_without_addresses() {
    spoof("bridged_without_addresses", "vif-bridge", false);
}

#[test]
fn routed_with_addresses() {
    spoof("routed_with_addresses", "vif-route", true);
}

#[test]
fn nat_with_addresses() {
    spoof("nat_with_addresses", "vif-nat", true);
}

#[test]
fn nat_with_an_address_that_follows() {
    spoof("nat_with_an_address_that_follows", "vif-nat", false);
}
