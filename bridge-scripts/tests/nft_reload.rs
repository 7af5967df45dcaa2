//! What `nft list ruleset` writes with our tables in it, `nft -f` reads: an administrator's firewall that was saved while
//! guests ran loads again, and ours with it; at the next boot too, when no interface is there yet.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod vif_common;

use bridge_scripts::network;
use vif_common::{Scene, alone_with_taps, have, nft_reads, sh};

/// The ruleset without what counts.
fn listed() -> String {
    sh("nft -s list ruleset")
}

fn same_rules(now: &str, before: &str, when: &str) {
    // A table that is made anew is listed last.
    let sorted = |text: &str| {
        let mut tables: Vec<String> = text.split("\n}\n").map(str::to_owned).collect();
        tables.sort_unstable();
        tables.join("\n}\n")
    };
    vif_common::same(&sorted(now), &sorted(before), when);
}

/// The administrator's own table, which must not be lost either.
const ADMIN: &str = "table inet admin {\n\tchain input {\n\t\ttype filter hook input priority filter; policy accept;\n\
    \t\ttcp dport 22 accept\n\t}\n}\n";

#[test]
fn a_saved_ruleset_loads_again() {
    if !have("nft", "saved rulesets") {
        return;
    }
    alone_with_taps("a_saved_ruleset_loads_again", || {
        println!("{}", sh("nft --version").trim());
        let scene = Scene::new();
        sh("ip link set lo up");
        sh("ip link add xenbr0 type bridge");
        sh("ip link set xenbr0 up");
        sh("ip link add eth0 type veth peer name outside");
        sh("ip addr add 198.51.100.1/24 dev eth0");
        sh("ip addr add 2001:db8::fe/64 dev eth0 nodad");
        sh("ip link set eth0 up");
        sh("ip link set outside up");
        sh("ip route add default via 198.51.100.254");
        let mut print = |_: &str| {};
        let words = ["start".to_owned(), "network=192.168.0.0/16,fd00::/64".to_owned()];
        network::run(network::Program::Nat, &words, scene.options.clone(), &mut print).unwrap();
        let two = "10.0.0.1 10.8.0.0/24 2001:db8::1 2001:db8:1::/64";
        let kinds: [(&str, &[(&str, &str)]); 9] = [
            ("vif-bridge", &[("bridge", "xenbr0")]),
            ("vif-bridge", &[("bridge", "xenbr0"), ("ip", two)]),
            ("vif-bridge", &[("bridge", "xenbr0"), ("ip", "10.0.0.7")]),
            ("vif-bridge", &[("bridge", "xenbr0"), ("ip", "2001:db8::7")]),
            ("vif-route", &[("ip", "192.168.17.1/24"), ("gatewaydev", "eth0")]),
            ("vif-route", &[("ip", two), ("gatewaydev", "eth0")]),
            ("vif-nat", &[]),
            ("vif-nat", &[("ip", "192.168.9.7/24")]),
            ("vif-nat", &[("ip", "192.168.9.8 fd00::8")]),
        ];
        let online = || {
            for (domid, (script, _)) in (1..).zip(&kinds) {
                scene.online(script, domid, 0).unwrap();
            }
        };
        for (domid, (_, keys)) in (1..).zip(&kinds) {
            scene.vif(domid, 0, &format!("00:16:3e:00:00:{domid:02x}"), keys);
        }
        online();
        nft_reads(ADMIN).unwrap();
        let before = listed();
        // NAT of all guests, own addresses of five guests, NAT of one of them, and the administrator's.
        assert_eq!(before.matches("table ").count(), 8, "{before}");
        for form in ["nft list ruleset", "nft -s list ruleset", "nft -nn list ruleset", "nft -a list ruleset"] {
            let saved = sh(form);
            // Debian's /etc/nftables.conf begins with this line.
            if let Err(error) = nft_reads(&format!("flush ruleset\n{saved}")) {
                panic!("{form}: {error}");
            }
            same_rules(&listed(), &before, form);
            // At the next boot. Before Linux 6.16 a ruleset that names a device that is not there is refused as a whole.
            assert!(!saved.contains("netdev") && !saved.contains(" device "), "{form}: {saved}");
            let at_boot = || {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
                nft_reads(&saved).map(|()| listed())
            };
            let loaded = std::thread::scope(|scope| scope.spawn(at_boot).join().unwrap());
            match loaded {
                Ok(loaded) => same_rules(&loaded, &before, "at the next boot"),
                Err(error) => panic!("{form}, without the interfaces: {error}"),
            }
        }
        // The programs go on as if nothing had happened.
        online();
        same_rules(&listed(), &before, "after the programs");
        online();
        same_rules(&listed(), &before, "after the programs, again");
        for (domid, (script, _)) in (1..).zip(&kinds) {
            scene.offline(script, domid, 0).unwrap();
        }
        assert!(listed().contains("tcp dport 22 accept"));
    });
}
