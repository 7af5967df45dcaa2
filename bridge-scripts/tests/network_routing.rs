//! network-route and network-nat: what they switch on works, and goes back; other people's tables stay.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{Line, World, ok};
use std::process::{Command, Stdio};

/// What an administrator has in nftables already.
const THEIRS: &str = "table ip nat {
	chain postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr 172.16.0.0/12 oifname \"eth9\" masquerade
	}
}
table inet filter {
	set admins {
		type ipv4_addr
		elements = { 10.1.0.5 }
	}
	chain input {
		type filter hook input priority filter; policy accept;
		ip saddr @admins tcp dport 22 counter packets 0 bytes 0 accept
	}
}
";

fn load(rules: &str) {
    use std::io::Write as _;

    let mut nft = Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    nft.stdin.take().unwrap().write_all(rules.as_bytes()).unwrap();
    assert!(nft.wait().unwrap().success());
}

#[test]
fn network_route_switches_on_and_back() {
    let Some(world) = World::new("network-route") else { return };
    world.card("eth0", &["10.1.0.2/24"], &["10.1.0.1/24"]);
    world.card("eth1", &["10.2.0.2/24"], &[]);
    // Values that are not the usual ones, and that the switches overwrite.
    let paths = [
        ("ipv4/conf/eth1/forwarding", "1"),
        ("ipv4/conf/all/rp_filter", "2"),
        ("ipv4/conf/eth0/rp_filter", "2"),
        ("ipv6/conf/eth1/forwarding", "1"),
        ("ipv4/conf/eth0/proxy_arp", "0"),
        ("ipv4/conf/all/accept_redirects", "1"),
    ];
    for (path, value) in paths {
        std::fs::write(format!("/proc/sys/net/{path}"), value).unwrap();
    }
    world.settle();
    let before = world.shown();
    world.does("network-route start netdev=eth0");
    for (path, value) in [
        ("ipv4/ip_forward", "1"),
        ("ipv6/conf/all/forwarding", "1"),
        ("ipv4/conf/eth0/proxy_arp", "1"),
        ("ipv4/conf/eth0/rp_filter", "1"),
        ("ipv4/conf/all/rp_filter", "1"),
    ] {
        assert_eq!(world.sysctl(path), value, "{path}");
    }
    assert_eq!(world.does("network-route start netdev=eth0").trim(), "nothing to do");
    assert!(world.does("network-route status netdev=eth0").contains("eth0: started"));
    // Both need forwarding; the first to stop does not switch it off.
    world.does("network-nat start netdev=eth0");
    world.does("network-route stop netdev=eth0");
    assert_eq!((world.sysctl("ipv4/ip_forward"), world.sysctl("ipv4/conf/eth0/proxy_arp")), ("1".into(), "0".into()));
    world.does("network-nat stop netdev=eth0");
    world.is_as(&before, "after stop");
    for (path, value) in paths {
        assert_eq!(world.sysctl(path), value, "{path} after stop");
    }
    for step in 0..5 {
        let mut command = world.command("network-route start netdev=eth0");
        let output = command.env("BRIDGE_SCRIPTS_FAULT", format!("fail-after={step}")).output().unwrap();
        assert!(!output.status.success());
        for (path, value) in paths {
            assert_eq!(world.sysctl(path), value, "{path} after step {step} failed");
        }
    }
}

#[test]
fn network_nat_leaves_other_tables_alone() {
    let Some(world) = World::new("network-nat") else { return };
    world.card("eth0", &["10.1.0.2/24", "fd00:1::2/64"], &["10.1.0.1/24", "fd00:1::1/64"]);
    world.ip("route add default via 10.1.0.1");
    world.settle();
    load(THEIRS);
    let ruleset = || ok(Command::new("nft").args(["list", "ruleset"]));
    let (before, theirs) = (world.shown(), ruleset());
    let plan = world.does("network-nat start network=10.0.0.0/16,fd00:aa::/64 dhcp=yes --plan");
    assert!(plan.contains("inet xen-nat"), "{plan}");
    world.is_as(&before, "after --plan");
    let said = world.does("network-nat start network=10.0.0.0/16,fd00:aa::/64 dhcp=yes");
    assert!(said.contains("dnsmasq --conf-file="), "{said}");
    let with = ruleset();
    assert!(with.starts_with(&theirs), "other tables changed:\n{with}");
    for rule in
        ["oifname \"eth0\" ip saddr 10.0.0.0/16 masquerade", "oifname \"eth0\" ip6 saddr fd00:aa::/64 masquerade"]
    {
        assert!(with.contains(rule), "{rule} is not in\n{with}");
    }
    let conf = world.run.path().join("dnsmasq-xen-nat.conf");
    ok(Command::new("dnsmasq").arg("--test").arg(format!("--conf-file={}", conf.display())));
    assert_eq!(
        world.does("network-nat start network=10.0.0.0/16,fd00:aa::/64 dhcp=yes").trim().lines().next(),
        Some("nothing to do")
    );
    // Other words: the table is replaced, not doubled.
    world.does("network-nat start");
    assert!(!ruleset().contains("10.0.0.0/16"), "{}", ruleset());
    assert!(world.does("network-nat status").contains("masquerade"));
    world.does("network-nat stop");
    assert_eq!(ruleset(), theirs);
    world.is_as(&before, "after stop");
    assert!(!conf.exists());
}

#[test]
fn guests_behind_nat_reach_the_world() {
    let Some(world) = World::new("traffic through network-nat") else { return };
    world.card("eth0", &["10.1.0.2/24", "fd00:1::2/64"], &["10.1.0.1/24", "fd00:1::1/64"]);
    world.settle();
    world.does("network-nat start netdev=eth0");
    // The thread's own sockets stand for a guest's: what they send from the guests' network is masqueraded as well.
    world.ip("link add guests type bridge");
    world.ip("addr add 10.0.7.1/24 dev guests");
    world.ip("addr add fd00:aa::1/64 dev guests nodad");
    world.ip("link set guests up");
    for (server, from) in [("10.1.0.1:0", "10.0.7.1:0"), ("[fd00:1::1]:0", "[fd00:aa::1]:0")] {
        let server = world.echo(server);
        let mut line = Line::open_from(from.parse().unwrap(), server);
        line.says("hello");
    }
}
