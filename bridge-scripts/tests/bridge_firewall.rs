//! br_netfilter hands what bridges forward to the machine's firewall, and that drops: bridged guests are not cut off, or it
//! is said what to add.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod vif_common;

use std::time::{Duration, Instant};

use bridge_scripts::network;
use vif_common::cable::{Beside, Cable, has};
use vif_common::frames::{Mac, ether, ip4, udp};
use vif_common::{Scene, alone, have, nft_reads, sh};

const GUEST: Mac = [0x00, 0x16, 0x3e, 0, 0, 1];
const STATION: Mac = [0x00, 0x50, 0x56, 0, 0, 9];

/// What iptables-nft makes of `iptables -P FORWARD DROP`, as Docker and ufw want it.
const IPTABLES: &str = "table ip filter {\n\tchain FORWARD {\n\t\ttype filter hook forward priority filter; policy drop;\n\
    \t\tiifname \"docker0\" counter accept\n\t}\n}\n";

struct Stage {
    scene: Scene,
    guest: Cable,
    outside: Cable,
    _beside: Beside,
}

/// One guest's interface that is not yet online; none where the kernel has no br_netfilter.
fn stage(test: &str) -> Option<Stage> {
    sh("ip link add xenbr0 type bridge mcast_snooping 0");
    let Ok(on) = std::fs::read_to_string("/proc/sys/net/bridge/bridge-nf-call-iptables") else {
        println!("NOT TESTED: {test}: this kernel has no br_netfilter");
        return None;
    };
    assert_eq!(on.trim(), "1");
    sh("ip link set xenbr0 up");
    let (scene, beside) = (Scene::new(), Beside::new());
    let (guest, outside) = (beside.pair("vif1.0", "guest1"), beside.pair("eth0", "outside"));
    sh("ip link set eth0 master xenbr0 up");
    scene.describe(1, 0, "00:16:3e:00:00:01", &[("bridge", "xenbr0"), ("ip", "10.0.0.1")]);
    Some(Stage { scene, guest, outside, _beside: beside })
}

impl Stage {
    fn online(&self) -> String {
        let before = self.scene.log().len();
        assert!(self.scene.program("vif-bridge", 1, 0, &["online", "type_if=vif"]));
        self.scene.log()[before..].to_owned()
    }

    /// Whether IPv4 passes from the guest to the outside and back. What is no IP passes in any case, and shows that the
    /// ports forward.
    #[track_caller]
    fn passes(&self) -> [bool; 2] {
        let packet = |from: [u8; 4], to: [u8; 4]| ip4(from.into(), to.into(), 17, 0, &udp(1, 2, b"datagram"));
        let ways = [
            (&self.guest, &self.outside, ether(STATION, GUEST, 0x0800, &packet([10, 0, 0, 1], [10, 0, 0, 9])), true),
            (&self.outside, &self.guest, ether(GUEST, STATION, 0x0800, &packet([10, 0, 0, 9], [10, 0, 0, 1])), false),
        ];
        ways.map(|(from, to, datagram, own)| {
            let arp = vif_common::frames::Arp::new(
                1,
                if own { (GUEST, [10, 0, 0, 1].into()) } else { (STATION, [10, 0, 0, 9].into()) },
                [10, 0, 0, 77].into(),
            );
            let question = ether([0xff; 6], if own { GUEST } else { STATION }, 0x0806, &arp.bytes());
            let begin = Instant::now();
            let (mut arrived, mut behind) = (false, false);
            to.received();
            while !behind {
                assert!(begin.elapsed() < Duration::from_secs(30), "nothing is forwarded: {}", sh("bridge link"));
                // In this order: where the second arrives, the first has been decided on.
                from.send(&datagram);
                from.send(&question);
                std::thread::sleep(Duration::from_millis(1));
                for frame in to.received() {
                    arrived |= has(&frame, b"datagram");
                    behind |= has(&frame, &arp.bytes());
                }
            }
            arrived
        })
    }
}

#[test]
fn a_forward_policy_of_drop_does_not_cut_guests_off() {
    if !have("nft", "a firewall that drops") {
        return;
    }
    alone("a_forward_policy_of_drop_does_not_cut_guests_off", || {
        let Some(stage) = stage("a firewall that drops") else { return };
        stage.online();
        assert_eq!(stage.passes(), [true; 2]);
        nft_reads(IPTABLES).unwrap();
        assert_eq!(stage.passes(), [false; 2], "br_netfilter is at work");
        let before = sh("nft -s list table ip filter");
        stage.online();
        assert_eq!(stage.passes(), [true; 2]);
        let rules = sh("nft -s list table ip filter");
        let first =
            rules.find("iifname \"xenbr0\" oifname \"xenbr0\" counter accept").unwrap_or_else(|| panic!("{rules}"));
        assert!(first < rules.find("docker0").unwrap(), "{rules}");
        // Once.
        let all = sh("nft -a list ruleset");
        stage.online();
        assert_eq!(sh("nft -a list ruleset"), all);
        // The rule stays as long as a guest is there, and goes with the last one.
        stage.scene.vif(2, 0, "00:16:3e:00:00:02", &[("bridge", "xenbr0")]);
        stage.scene.online("vif-bridge", 2, 0).unwrap();
        assert_eq!(sh("nft -s list table ip filter"), rules);
        stage.scene.offline("vif-bridge", 1, 0).unwrap();
        assert_eq!(sh("nft -s list table ip filter"), rules);
        stage.scene.offline("vif-bridge", 2, 0).unwrap();
        assert_eq!(sh("nft -s list table ip filter"), before);
        stage.scene.nothing_left();
    });
}

#[test]
fn what_to_add_to_others_chains_is_said() {
    if !have("nft", "firewalls of others") {
        return;
    }
    alone("what_to_add_to_others_chains_is_said", || {
        let Some(stage) = stage("firewalls of others") else { return };
        for (table, chain, rest) in [
            ("inet mine", "forward", "policy drop;"),
            ("ip mine", "forward", "policy drop;"),
            (
                "inet firewalld",
                "filter_FORWARD",
                "policy accept; ct state established accept; reject with icmpx admin-prohibited",
            ),
        ] {
            nft_reads(&format!(
                "table {table} {{\n\tchain {chain} {{\n\t\ttype filter hook forward priority filter + 10; {rest}\n\t}}\n}}\n"
            ))
            .unwrap();
            let said = stage.online();
            assert!(said.contains("WARNING: guests on xenbr0 are cut off"), "{said}");
            assert!(said.contains(&format!("{table} {chain} drops that")), "{said}");
            assert_eq!(stage.passes(), [false; 2]);
            let mut status = String::new();
            let words = ["status".to_owned()];
            let mut print = |line: &str| status = format!("{status}{line}\n");
            network::run(network::Program::Bridge, &words, stage.scene.options.clone(), &mut print).unwrap();
            assert!(status.contains(said.trim().trim_start_matches("vif-bridge: ")), "{status}\n{said}");
            // What was said is enough.
            if !table.contains("firewalld") {
                let add = said.split("Add: ").nth(1).unwrap().split(" (or").next().unwrap();
                sh(add);
                assert_eq!(stage.passes(), [true; 2]);
                assert_eq!(stage.online(), "");
            }
            sh(&format!("nft delete table {table}"));
        }
        // Without br_netfilter nobody is in the way, and nothing is said or done.
        nft_reads(IPTABLES).unwrap();
        nft_reads(
            "table inet mine {\n\tchain forward {\n\t\ttype filter hook forward priority 0; policy drop;\n\t}\n}\n",
        )
        .unwrap();
        for version in ["", "6"] {
            std::fs::write(format!("/proc/sys/net/bridge/bridge-nf-call-ip{version}tables"), "0").unwrap();
        }
        assert_eq!(stage.online(), "");
        assert_eq!(stage.passes(), [true; 2]);
        assert!(!sh("nft list ruleset").contains("xenbr0"));
    });
}
