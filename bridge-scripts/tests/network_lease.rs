//! network-bridge on a card whose addresses somebody else keeps alive: a DHCP client, a router's advertisements.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use bridge_scripts::link::{Link, Mode};
use bridge_scripts::state::{Address, Route};
use bridge_scripts::step::Step;
use common::{Program, World, wait_until};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

/// What a DHCP client's script does in most distributions, and a word of it for the test.
const SCRIPT: &str = r#"#!/bin/sh
case $1 in
deconfig) ip -4 addr flush dev $interface; ip link set $interface up ;;
bound | renew) ip addr replace $ip/$mask dev $interface valid_lft $lease preferred_lft $lease ;;
esac
echo "$1 $interface $ip" >> EVENTS
"#;

/// A lease of seconds. `start` says who holds it and what to do, and does nothing; done as it says, the host keeps its
/// address when the lease has long ended.
#[test]
fn a_leased_address_outlives_its_lease_on_the_bridge() {
    let what = "a DHCP client on the card";
    let Some(world) = World::new(what) else { return };
    if Command::new("busybox").arg("udhcpd").arg("--help").output().is_err() {
        println!("NOT TESTED: {what}: there is no program busybox");
        return;
    }
    world.card("eth0", &[], &["10.1.0.1/24"]);
    world.settle();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let server = format!(
        "start 10.1.0.50\nend 10.1.0.50\ninterface o-eth0\nlease_file {}\npidfile {}\nmin_lease 5\n\
         option subnet 255.255.255.0\noption lease 16\n",
        path("leases"),
        path("pid")
    );
    fs::write(path("leases"), "").unwrap();
    fs::write(path("udhcpd.conf"), server).unwrap();
    fs::write(path("script"), SCRIPT.replace("EVENTS", &path("events"))).unwrap();
    fs::set_permissions(path("script"), fs::Permissions::from_mode(0o755)).unwrap();
    let _server = world.outside_program(&["busybox", "udhcpd", "-f", &path("udhcpd.conf")]);
    let events = |line: &str| fs::read_to_string(path("events")).unwrap_or_default().matches(line).count();
    let client =
        |link: &str| Program::start(Command::new("busybox").args(["udhcpc", "-f", "-i", link, "-s", &path("script")]));
    let first = client("eth0");
    wait_until(|| events("bound eth0 10.1.0.50") == 1);

    for layout in ["", "layout=xen3"] {
        let said = world.fails(&format!("network-bridge start netdev=eth0 {layout}"));
        let line = format!(
            "kill {0}; network-bridge start netdev=eth0 bridge=xenbr0 force=yes; busybox udhcpc -f -i xenbr0 -s {1}\n",
            first.pid(),
            path("script")
        );
        for part in ["eth0 has 10.1.0.50/24 by DHCP", "would lose its address", "force=yes", &line] {
            assert!(said.contains(part), "no {part:?} in {said}");
        }
    }
    assert!(!world.ip("-o link show").contains("xenbr0"), "something was done");

    drop(first);
    world.does("network-bridge start netdev=eth0 bridge=xenbr0 force=yes");
    assert!(world.ip("-o addr show dev xenbr0").contains("10.1.0.50/24"), "it goes on before the client is there");
    let _second = client("xenbr0");
    // A client asks anew in the middle of its lease: the third time the first lease is over.
    wait_until(|| events("renew xenbr0 10.1.0.50") >= 3);
    assert!(world.ip("-o addr show dev xenbr0").contains("10.1.0.50/24"), "{}", world.ip("-o addr"));
    assert!(!world.ip("-o -4 addr show dev eth0").contains("10.1"), "{}", world.ip("-o addr"));
}

/// What routers advertise needs nobody: on the bridge the kernel hears them, and the address's life begins anew.
#[test]
fn an_advertised_address_is_kept_alive_on_the_bridge() {
    for (layout, holder) in [("layout=bridge", "xenbr0"), ("layout=xen3", "eth0")] {
        let Some(world) = World::new("an advertised address") else { return };
        world.card("eth0", &["10.1.0.2/24"], &["10.1.0.1/24"]);
        world.settle();
        world.advertise("o-eth0", "fd00:5::");
        let advertised = |dev: &str| {
            let text = world.ip(&format!("-6 -o addr show dev {dev} scope global"));
            let line = text.lines().find(|line| line.contains("fd00:5:"))?;
            let words: Vec<&str> = line.split_whitespace().collect();
            let valid = words.iter().position(|word| *word == "valid_lft")?;
            Some((words[3].to_owned(), words[valid + 1].trim_end_matches("sec").parse::<u32>().ok()?))
        };
        wait_until(|| advertised("eth0").is_some());
        world.settle();
        let (address, _) = advertised("eth0").unwrap();
        // Its life is nearly over.
        world.ip(&format!("addr change {address} dev eth0 valid_lft 1000 preferred_lft 500"));
        world.does(&format!("network-bridge start {layout} netdev=eth0 bridge=xenbr0"));
        let (moved, valid) = advertised(holder).unwrap();
        assert!(moved == address && valid <= 1000, "{layout}: {moved}, {valid} s");
        wait_until(|| {
            world.advertise("o-eth0", "fd00:5::");
            advertised(holder).is_some_and(|(now, valid)| now == address && valid > 2000)
        });
        let all = world.ip(&format!("-6 -o addr show dev {holder} scope global"));
        assert_eq!(all.matches("fd00:5:").count(), 1, "{layout}: {all}");
        world.does("network-bridge stop");
    }
}

/// A router may be heard while the bridge is being made: what the kernel then does by itself is no fault.
#[test]
fn the_kernel_may_be_quicker_with_what_a_router_advertises() {
    let Some(world) = World::new("advertisements meanwhile") else { return };
    world.card("eth0", &[], &[]);
    let mut link = Link::open().unwrap();
    let mut take = |step: &Step| link.take(step, Mode::Do).map_err(|error| error.to_string());
    let advertised = Address {
        valid: 600,
        preferred: 600,
        protocol: Some(2),
        ..Address::new("eth0", "fd00:5::2".parse().unwrap(), 64)
    };
    let by_hand = Address { protocol: None, ..advertised.clone() };
    for (address, both) in [(advertised, true), (by_hand, false)] {
        take(&Step::AddAddress(address.clone())).unwrap();
        assert_eq!(take(&Step::AddAddress(address.clone())).is_ok(), both, "{address:?}");
        take(&Step::RemoveAddress(address)).unwrap();
    }
    let gateway = Some("fe80::1".parse().unwrap());
    let route = |protocol| Route { gateway, protocol, scope: 0, ..Route::new(None, true, "eth0") };
    for (protocol, gone_is_well) in [(9, true), (3, false)] {
        let removed = take(&Step::RemoveRoute(route(protocol)));
        assert_eq!(removed.is_ok(), gone_is_well, "protocol {protocol}: {removed:?}");
    }
}
