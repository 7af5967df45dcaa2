//! network-bridge on real links: there and back, with connections alive, again, undone, and refused.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{Line, World, ok, wait_until};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

const LAYOUTS: [&str; 2] = ["layout=bridge", "layout=xen3"];

#[test]
fn start_and_stop_leave_everything_as_it_was() {
    for layout in LAYOUTS {
        let Some(world) = World::new("network-bridge there and back") else { return };
        world.rich_card("eth0");
        let before = world.shown();
        println!("{}", world.does(&format!("network-bridge start {layout} --plan")));
        world.is_as(&before, "after --plan");
        world.does(&format!("network-bridge start {layout}"));
        let started = world.shown();
        let holder = if layout == "layout=bridge" { "xenbr0" } else { "eth0" };
        let addresses = world.ip(&format!("addr show dev {holder}"));
        for address in ["10.1.0.2/24", "10.1.0.3/24", "10.7.0.2/16", "fd00:1::2/64", "fd00:7::2/64", "fe80:"] {
            assert!(addresses.contains(address), "{address} is not on {holder}: {addresses}");
        }
        assert!(addresses.contains(&format!("{holder}:1")), "the label moved: {addresses}");
        assert_eq!(world.does(&format!("network-bridge {layout} start")).trim(), "nothing to do");
        assert_eq!(world.does(&format!("network-bridge {layout} start --plan")).trim(), "nothing to do");
        world.is_as(&started, "after the second start");
        let status = world.does("network-bridge status");
        assert!(status.contains("xenbr0") && status.contains("10.1.0.2/24"), "{status}");
        world.does(&format!("network-bridge stop {layout}"));
        world.is_as(&before, layout);
        assert_eq!(world.does("network-bridge stop").trim(), "nothing to do");
    }
}

#[test]
fn connections_live_through_start_and_stop() {
    for layout in LAYOUTS {
        let Some(world) = World::new("TCP connections across network-bridge") else { return };
        world.rich_card("eth0");
        let mut lines = [Line::open(world.echo("10.1.0.1:0")), Line::open(world.echo("[fd00:1::1]:0"))];
        for round in 0..3 {
            lines.iter_mut().for_each(|line| line.says("before"));
            world.does(&format!("network-bridge start {layout}"));
            lines.iter_mut().for_each(|line| line.says(&format!("started {round}")));
            world.does("network-bridge stop");
            lines.iter_mut().for_each(|line| line.says(&format!("stopped {round}")));
        }
    }
}

#[test]
fn xen_3s_names_are_as_in_the_handbooks() {
    let Some(world) = World::new("layout=xen3") else { return };
    world.rich_card("eth0");
    let mac = world.ip("-o link show eth0").split("link/ether ").nth(1).unwrap()[..17].to_owned();
    world.does("network-bridge start layout=xen3");
    let links = |name: &str| world.ip(&format!("-o -d link show {name}"));
    for (name, says) in [
        ("peth0", "link/ether fe:ff:ff:ff:ff:ff"),
        ("peth0", "NOARP"),
        ("peth0", "master xenbr0"),
        ("vif0.0", "link/ether fe:ff:ff:ff:ff:ff"),
        ("vif0.0", "master xenbr0"),
        ("xenbr0", "8000.fe:ff:ff:ff:ff:ff"),
        ("xenbr0", "stp_state 0"),
        ("xenbr0", "NOARP"),
        ("eth0", mac.as_str()),
    ] {
        assert!(links(name).contains(says), "{name} without {says}: {}", links(name));
    }
    assert_eq!(world.ip("-o addr show dev xenbr0"), "");
    assert_eq!(world.ip("-o addr show dev peth0"), "");
    // Whoever asks for dom0's address hears one answer, and it is eth0's.
    for _ in 0..5 {
        world.outside("ip neigh flush all");
        let mut line = Line::open(world.echo("10.1.0.1:0"));
        line.says("after a question by ARP");
        let heard = world.outside("ip neigh show 10.1.0.2");
        assert!(heard.contains(&mac), "{heard}");
    }
}

#[test]
fn two_bridges_by_the_wrapper_of_the_handbooks() {
    for layout in LAYOUTS {
        let Some(world) = World::new("two bridges") else { return };
        world.card("eth0", &["10.1.0.2/24"], &["10.1.0.1/24"]);
        world.card("eth1", &["10.2.0.2/24"], &["10.2.0.1/24"]);
        world.settle();
        let before = world.shown();
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_bridge-scripts"), dir.path().join("network-bridge")).unwrap();
        let wrapper = dir.path().join("my-network-script");
        fs::write(
            &wrapper,
            format!(
                "#!/bin/sh\ndir=$(dirname \"$0\")\n\
                 \"$dir/network-bridge\" \"$@\" vifnum=0 netdev=eth0 bridge=xenbr0 {layout} &&\n\
                 \"$dir/network-bridge\" \"$@\" vifnum=1 {layout}\n"
            ),
        )
        .unwrap();
        fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).unwrap();
        let call = |word: &str| ok(Command::new(&wrapper).arg(word).env("BRIDGE_SCRIPTS_RUN", world.run.path()));
        call("start");
        for (bridge, port) in [("xenbr0", "eth0"), ("xenbr1", "eth1")] {
            let ports = world.ip(&format!("-o link show master {bridge}"));
            assert!(ports.contains(port), "{ports}");
        }
        let status = world.does("network-bridge status");
        assert!(status.contains("xenbr1"), "{status}");
        call("stop");
        world.is_as(&before, layout);
    }
}

/// Two cards in one IPv6 network have routes to the same places, of the same metric: the kernel's own to fe80::/64, those of
/// the router's advertisements, and static ones.
#[test]
fn two_cards_in_one_network_become_two_bridges() {
    for layout in LAYOUTS {
        let Some(world) = World::new("two cards in one IPv6 network") else { return };
        for (name, number) in [("eth0", 2), ("eth1", 3)] {
            world.card(name, &[&format!("10.1.{number}.2/24")], &[]);
            fs::write(format!("/proc/sys/net/ipv6/conf/{name}/accept_ra"), "2").unwrap();
            world.ip(&format!("addr add fd00:1::{number}/64 dev {name} nodad noprefixroute"));
        }
        world.ip("-6 route add fd00:1::/64 dev eth0 metric 100");
        world.ip("-6 route append fd00:1::/64 dev eth1 metric 100");
        world.settle();
        ["o-eth0", "o-eth1"].iter().for_each(|card| world.advertise(card, "fd00:5::"));
        let routes = || world.ip("-6 route show default");
        let defaults = |dev: &str| routes().matches(&format!("dev {dev} ")).count();
        wait_until(|| defaults("eth0") + defaults("eth1") == 2);
        world.settle();
        assert_eq!((defaults("eth0"), defaults("eth1")), (1, 1), "{}", routes());
        let held = |name: &str| {
            let text = world.ip(&format!("-6 -o addr show dev {name}"));
            let mut held: Vec<String> =
                text.lines().filter_map(|line| line.split_whitespace().nth(3)).map(String::from).collect();
            held.sort();
            held
        };
        let before = [held("eth0"), held("eth1")];
        assert_eq!(before[1].len(), 3, "fd00:1::3, one from the prefix, one of the kernel's: {before:?}");
        for bridge in ["0", "1"] {
            world.does(&format!("network-bridge start {layout} netdev=eth{bridge} bridge=xenbr{bridge}"));
        }
        let holders = if layout == "layout=bridge" { ["xenbr0", "xenbr1"] } else { ["eth0", "eth1"] };
        for (holder, before) in holders.iter().zip(&before) {
            assert_eq!(held(holder), *before, "{layout}");
            assert_eq!(defaults(holder), 1, "{layout}: {}", routes());
            let links = world.ip(&format!("-6 route show dev {holder}"));
            for to in ["fe80::/64", "fd00:1::/64", "fd00:5::/64"] {
                assert!(links.contains(to), "{layout}: no {to} on {holder}: {links}");
            }
        }
        for bridge in ["0", "1"] {
            world.does(&format!("network-bridge stop bridge=xenbr{bridge}"));
        }
        assert_eq!([held("eth0"), held("eth1")], before, "{layout}");
        assert_eq!((defaults("eth0"), defaults("eth1")), (1, 1), "{layout}: {}", routes());
    }
}

/// A card that has just got its carrier has no link-local address yet. The kernel would have made one; now it makes one
/// for the link that takes the card's place.
#[test]
fn a_link_local_address_that_had_not_come_yet_comes_afterwards() {
    for (layout, holder) in LAYOUTS.into_iter().zip(["xenbr0", "eth0"]) {
        for (mode, expected) in [("0", true), ("1", false)] {
            let Some(world) = World::new("a card without a link-local address") else { return };
            world.card("eth0", &["10.1.0.2/24"], &[]);
            world.settle();
            world.ip("-6 addr flush dev eth0 scope link");
            fs::write("/proc/sys/net/ipv6/conf/eth0/addr_gen_mode", mode).unwrap();
            world.does(&format!("network-bridge start {layout} netdev=eth0"));
            world.settle();
            let held = world.ip(&format!("-6 addr show dev {holder} scope link"));
            assert_eq!(held.contains("fe80:"), expected, "{layout}, addr_gen_mode {mode}: {held}");
        }
    }
}

#[test]
fn each_step_that_fails_takes_everything_back() {
    for layout in LAYOUTS {
        let Some(world) = World::new("failing steps") else { return };
        world.rich_card("eth0");
        let before = world.shown();
        let steps = |words: &str| {
            let plan = world.does(&format!("{words} --plan"));
            plan.lines().filter(|line| line.trim_start().starts_with(|char: char| char.is_ascii_digit())).count()
        };
        let fail_all = |words: &str, wanted: &std::collections::BTreeMap<&'static str, serde_json::Value>| {
            let count = steps(words);
            assert!(count > 10, "{words}: only {count} steps");
            for step in 0..count {
                for fault in ["fail-before", "fail-after"] {
                    let output =
                        world.command(words).env("BRIDGE_SCRIPTS_FAULT", format!("{fault}={step}")).output().unwrap();
                    let said = common::text(&output.stderr);
                    assert!(said.contains("everything was put back"), "{words} {fault}={step}: {said}");
                    world.is_as(wanted, &format!("{words} {fault}={step}"));
                }
            }
        };
        let start = format!("network-bridge start {layout}");
        fail_all(&start, &before);
        world.does(&start);
        world.settle();
        let started = world.shown_without_indices();
        let stop = "network-bridge stop";
        let count = steps(stop);
        for step in 0..count {
            for fault in ["fail-before", "fail-after"] {
                let output =
                    world.command(stop).env("BRIDGE_SCRIPTS_FAULT", format!("{fault}={step}")).output().unwrap();
                let said = common::text(&output.stderr);
                assert!(said.contains("everything was put back"), "{stop} {fault}={step}: {said}");
                world.is_like(&started, &format!("{layout} {stop} {fault}={step}"));
            }
        }
        world.does(stop);
        world.is_as(&before, layout);
    }
}

#[test]
fn what_cannot_be_done_is_refused_with_advice() {
    let Some(world) = World::new("refusals") else { return };
    world.card("eth0", &["10.1.0.2/24"], &[]);
    world.card("eth1", &[], &[]);
    world.ip("link add br9 type bridge");
    world.ip("link set eth1 master br9");
    world.settle();
    let before = world.shown();
    for (words, says) in [
        ("network-bridge start", "no default route"),
        ("network-bridge start netdev=eth7", "no network device \"eth7\"; there are: br9, eth0, eth1"),
        ("network-bridge start vifnum=1", "eth1 is in br9 already"),
        ("network-bridge start netdev=eth0 bridge=eth1", "eth1 exists and is no bridge"),
        ("network-bridge start netdev=br9", "br9 is a bridge itself"),
        ("network-bridge start netdev=lo", "loopback"),
        ("network-bridge start netdev=eth0 bridge=eth0", "cannot both be named"),
        ("network-bridge start netdev=eth0 brige=xenbr0", "^^^^^"),
        ("network-bridge start netdev=eth0 bridge=a-much-too-long-name", "15 characters"),
        ("network-bridge start netdev=eth0 layout=xen4", "bridge or xen3"),
        ("network-bridge stop bridge=br9", "not made by network-bridge"),
        ("network-bridge confirm", "nothing waits"),
        ("network-bridge start netdev=eth0.9999", "1 to 4094"),
        ("network-vlan start netdev=eth0 vlan=0", "no VLAN"),
        ("network-vlan start netdev=eth0", "which VLANs"),
        ("network-route start netdev=eth7", "no network device"),
        ("network-nat start netdev=eth0 network=10.0.0.0", "address with a prefix"),
        ("network-dummy start address=10.0.0.1/8", "which bridge"),
        ("network-nothing start", "no program"),
    ] {
        let said = world.fails(words);
        assert!(said.contains(says), "{words}: {said}");
    }
    world.is_as(&before, "after refusals");
}

#[test]
fn a_bridge_in_use_is_not_stopped_unless_forced() {
    let Some(world) = World::new("a bridge in use") else { return };
    world.card("eth0", &["10.1.0.2/24"], &[]);
    world.settle();
    let before = world.shown();
    world.does("network-bridge start netdev=eth0 antispoof=no");
    assert_eq!(bridge_scripts::network::antispoof(world.run.path(), "xenbr0"), Some(false));
    world.ip("link add vif1.0 type veth peer name guest");
    world.ip("link set vif1.0 master xenbr0");
    let said = world.fails("network-bridge stop");
    assert!(said.contains("in use by vif1.0"), "{said}");
    world.does("network-bridge stop force=yes");
    world.ip("link del vif1.0");
    world.is_as(&before, "after a forced stop");
}

#[test]
fn vlans_and_host_only_networks() {
    let Some(world) = World::new("VLANs and host-only networks") else { return };
    world.card("eth0", &["10.1.0.2/24"], &[]);
    world.settle();
    let before = world.shown();
    assert_eq!(world.does("network-dummy start"), "");
    world.is_as(&before, "after network-dummy");
    world.does("network-dummy start bridge=xenbr5 address=192.168.17.254/24");
    assert!(world.ip("addr show dev xenbr5").contains("192.168.17.254/24"));
    assert_eq!(world.does("network-dummy start bridge=xenbr5 address=192.168.17.254/24").trim(), "nothing to do");
    world.does("network-dummy stop bridge=xenbr5");
    world.is_as(&before, "after network-dummy stop");

    let plan = world.does("network-vlan start netdev=eth0 vlan=411,412 --plan");
    for line in ["make eth0.411, VLAN 411 of eth0", "make the bridge xenbr412", "put eth0.412 into xenbr412"] {
        assert!(plan.contains(line), "{plan}");
    }
    let probe = Command::new("ip").args("link add link eth0 name probe type vlan id 9".split(' ')).output().unwrap();
    if !probe.status.success() {
        println!("NOT TESTED: network-vlan: this kernel has no VLANs ({})", common::text(&probe.stderr).trim());
        let said = world.fails("network-vlan start netdev=eth0 vlan=411");
        assert!(said.contains("everything was put back"), "{said}");
        world.is_as(&before, "after network-vlan failed");
        return;
    }
    world.ip("link del probe");
    world.does("network-vlan start netdev=eth0 vlan=411,412");
    assert!(world.ip("-o link show master xenbr411").contains("eth0.411"));
    world.does("network-vlan stop netdev=eth0");
    world.is_as(&before, "after network-vlan stop");
}
