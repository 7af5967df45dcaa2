//! Routed guests' addresses are theirs alone: nobody else sends from them, and no connection outlives them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod vif_common;

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use vif_common::cable::{Beside, Cable, has};
use vif_common::frames::{Mac, ether, ip4, udp};
use vif_common::{PATIENCE, Scene, alone, have, sh};

const GUEST: Mac = [0x00, 0x16, 0x3e, 0, 0, 1];
const DOM0: Mac = [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff];
const FAR: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);

fn tracked() -> usize {
    std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count").unwrap().trim().parse().unwrap()
}

/// dom0 with two cards, behind the first of which is [`FAR`].
fn dom0(beside: &Beside) -> (Cable, Cable) {
    let cards = (beside.pair("eth0", "o-eth0"), beside.pair("eth1", "o-eth1"));
    sh("ip link set lo up");
    for (card, network) in [("eth0", "198.51.100"), ("eth1", "203.0.113")] {
        sh(&format!("ip addr add {network}.1/24 dev {card}"));
        sh(&format!("ip link set {card} up"));
        // The kernel's own check is off here: it is network-route's, and others may want it off.
        sh(&format!("sysctl -qw net/ipv4/conf/{card}/rp_filter=0"));
    }
    sh("sysctl -qw net/ipv4/conf/all/rp_filter=0");
    sh("ip neigh add 198.51.100.7 lladdr 02:00:00:00:00:07 dev eth0 nud permanent");
    sh("ip route add default via 198.51.100.7");
    cards
}

/// Sends the frame until one with this text arrives, and returns what came. The first ones may be lost: a cable whose
/// other end was just switched on needs a moment.
fn until(from: &Cable, to: &Cable, frame: &[u8], text: &[u8]) -> Option<Vec<Vec<u8>>> {
    let begin = Instant::now();
    let mut got: Vec<Vec<u8>> = Vec::new();
    while begin.elapsed() < PATIENCE {
        from.send(frame);
        std::thread::sleep(Duration::from_millis(20));
        got.extend(to.received());
        if got.iter().any(|frame| has(frame, text)) {
            return Some(got);
        }
    }
    None
}

fn mac_of(device: &str) -> Mac {
    let line = sh(&format!("ip -o link show {device}"));
    let mac = line.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap().to_owned();
    let bytes: Vec<u8> = mac.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    bytes.try_into().unwrap()
}

#[test]
fn nobody_else_sends_from_a_guests_address() {
    alone("nobody_else_sends_from_a_guests_address", || {
        if !have("nft", "a guest's address from elsewhere") {
            return;
        }
        for (script, ip, own) in
            [("vif-route", "192.168.17.1/24", [192, 168, 17, 1]), ("vif-nat", "10.0.62.1", [10, 0, 62, 1])]
        {
            let (beside, scene) = (Beside::new(), Scene::new());
            let (far, elsewhere) = dom0(&beside);
            let guest = beside.pair("vif1.0", "guest");
            scene.describe(1, 0, "00:16:3e:00:00:01", &[("ip", ip)]);
            scene.online(script, 1, 0).unwrap();
            let eth1 = mac_of("eth1");
            let from_elsewhere = |from: Ipv4Addr, text: &[u8]| {
                ether(eth1, [2, 0, 0, 0, 0, 9], 0x0800, &ip4(from, FAR, 17, 0, &udp(1, 2, text)))
            };
            let itself = |text: &[u8]| from_elsewhere([203, 0, 113, 9].into(), text);
            assert!(until(&elsewhere, &far, &itself(b"as itself"), b"as itself").is_some(), "{script}");
            elsewhere.send(&from_elsewhere(own.into(), b"as the guest"));
            let got = until(&elsewhere, &far, &itself(b"later"), b"later").expect(script);
            assert!(!got.iter().any(|frame| has(frame, b"as the guest")), "{script}: a forged address arrives");
            let rules = sh("nft list table inet xen-own-vif1.0");
            assert!(rules.contains("counter packets 1"), "{rules}");
            // The guest itself may.
            let frame = ether(DOM0, GUEST, 0x0800, &ip4(own.into(), FAR, 17, 0, &udp(1, 2, b"from the guest")));
            assert!(until(&guest, &far, &frame, b"from the guest").is_some(), "{script}");
            // dom0 reaches its own end.
            if script == "vif-route" {
                sh("ping -c 1 -W 5 -I 192.168.17.254 192.168.17.254");
            }
            scene.offline(script, 1, 0).unwrap();
            scene.nothing_left();
            drop(beside);
            for device in ["eth0", "eth1", "vif1.0"] {
                // Gone with the other end's namespace, sooner or later.
                let _ = vif_common::try_sh(&format!("ip link del {device}"));
            }
        }
    });
}

#[test]
fn connections_end_with_the_guest() {
    alone("connections_end_with_the_guest", || {
        if !have("nft", "connections of a guest's address") {
            return;
        }
        let (beside, scene) = (Beside::new(), Scene::new());
        let (far, _elsewhere) = dom0(&beside);
        let cables = (beside.pair("vif1.0", "guest1"), beside.pair("vif2.0", "guest2"));
        scene.describe(1, 0, "00:16:3e:00:00:01", &[]);
        scene.describe(2, 0, "00:16:3e:00:00:02", &[]);
        scene.online("vif-nat", 1, 0).unwrap();
        scene.online("vif-nat", 2, 0).unwrap();
        let send = |cable: &Cable, mac: Mac, own: Ipv4Addr, port, text: &[u8]| {
            let frame = ether(DOM0, mac, 0x0800, &ip4(own, FAR, 17, 0, &udp(port, 53, text)));
            assert!(until(cable, &far, &frame, text).is_some(), "{port}");
        };
        let one: Ipv4Addr = [10, 0, 1, 1].into();
        for port in [1000, 1001, 1002] {
            send(&cables.0, GUEST, one, port, format!("one {port}").as_bytes());
        }
        send(&cables.1, [0x00, 0x16, 0x3e, 0, 0, 2], [10, 0, 2, 1].into(), 1000, b"two");
        assert_eq!(tracked(), 4);
        scene.offline("vif-nat", 1, 0).unwrap();
        assert_eq!(tracked(), 1, "the other guest's stays");
        // A reboot: another domain with the same address begins without connections of the last.
        scene.describe(3, 0, "00:16:3e:00:00:01", &[("ip", "10.0.2.1")]);
        sh("ip link set vif1.0 name vif3.0");
        scene.online("vif-nat", 3, 0).unwrap();
        assert_eq!(tracked(), 0);
    });
}

/// A backend that ends and comes back makes the tap anew: a guest that keeps its addresses keeps its connections through
/// NAT, both ways. What changes hands is forgotten.
#[test]
fn connections_stay_with_a_guest_that_stays() {
    alone("connections_stay_with_a_guest_that_stays", || {
        if !have("nft", "connections of a guest that stays") {
            return;
        }
        let (beside, scene) = (Beside::new(), Scene::new());
        let (far, _elsewhere) = dom0(&beside);
        let (one, mac) = (Ipv4Addr::from([10, 0, 62, 1]), "00:16:3e:00:00:01");
        let outside = Ipv4Addr::new(198, 51, 100, 1);
        let (eth0, far_mac) = (mac_of("eth0"), [2, 0, 0, 0, 0, 7]);
        let question = |text: &[u8]| ether(DOM0, GUEST, 0x0800, &ip4(one, FAR, 17, 0, &udp(1000, 53, text)));
        let answer = |text: &[u8]| ether(eth0, far_mac, 0x0800, &ip4(FAR, outside, 17, 0, &udp(53, 1000, text)));
        let mut guest = beside.pair("vif1.0", "guest");
        scene.describe(1, 0, mac, &[("ip", "10.0.62.1,10.0.62.2")]);
        scene.online("vif-nat", 1, 0).unwrap();
        assert!(until(&guest, &far, &question(b"question"), b"question").is_some());
        assert_eq!(tracked(), 1);
        for round in 0..2 {
            drop(guest);
            sh("ip link del vif1.0");
            guest = beside.pair("vif1.0", &format!("guest-{round}"));
            scene.online("vif-nat", 1, 0).unwrap();
            assert_eq!(tracked(), 1, "the connection is forgotten");
            // Nobody has sent through the new device: only what is tracked leads the answer to it.
            let text = format!("answer {round}");
            assert!(until(&far, &guest, &answer(text.as_bytes()), text.as_bytes()).is_some(), "{text}");
        }
        // Online again, as after `xl` has tried once more.
        scene.online("vif-nat", 1, 0).unwrap();
        assert_eq!(tracked(), 1);
        // One of its addresses goes, but not this one.
        scene.set(1, 0, "ip", "10.0.62.1");
        scene.online("vif-nat", 1, 0).unwrap();
        assert_eq!(tracked(), 1);
        scene.set(1, 0, "ip", "10.0.62.3");
        scene.online("vif-nat", 1, 0).unwrap();
        assert_eq!(tracked(), 0, "the address is nobody's, and its connection stays");
        // An address that another guest takes.
        scene.set(1, 0, "ip", "10.0.62.1");
        scene.online("vif-nat", 1, 0).unwrap();
        assert!(until(&guest, &far, &question(b"again"), b"again").is_some());
        assert_eq!(tracked(), 1);
        drop(guest);
        sh("ip link del vif1.0");
        let _other = beside.pair("vif2.0", "other");
        scene.describe(2, 0, "00:16:3e:00:00:02", &[("ip", "10.0.62.1")]);
        scene.online("vif-nat", 2, 0).unwrap();
        assert_eq!(tracked(), 0, "another guest has the first one's connection");
    });
}
