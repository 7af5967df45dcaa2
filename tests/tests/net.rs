//! Guests' networks from the administrator's command line to the outside, with real programs in the guests.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use system_tests::net::{Host, JUMBO, Network, Topology, exchange};
use system_tests::{PATIENCE, fails, have, quick, run};
use xenstore_client::Store;

/// Polls until something is so.
fn becomes(what: &str, so: impl Fn() -> bool) {
    let began = Instant::now();
    while !so() {
        assert!(began.elapsed() < PATIENCE, "did not happen: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn ping(from: &Host, to: &str, options: &str) -> String {
    from.run(&format!("ping -n -c 3 -i 0.05 -W 10 {options} {to}"))
}

/// A TCP load that would go on for longer than any test.
struct Load(Vec<std::process::Child>);

impl Load {
    fn start(from: &Host, to: &Host, address: &str) -> Self {
        let quiet = |command: &mut Command| {
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
        };
        let server = quiet(to.command("timeout").args(["120", "iperf3", "-s", "-1"]));
        becomes("iperf3 listens", || to.run("ss -Hltn sport = :5201").contains("5201"));
        let client = quiet(from.command("timeout").args(["120", "iperf3", "-t", "100", "-P", "2", "-c", address]));
        becomes("iperf3 sends", || to.run("ss -Htn state established sport = :5201").lines().count() >= 3);
        Self(vec![client, server])
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // timeout passes it on; iperf3 may have ended by itself.
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM);
            let _ = child.wait();
        }
    }
}

/// 4 GiB each way in all, unless in a hurry.
fn every_byte_arrives(topology: Topology) {
    if !have("python3", "sums of what guests send") {
        return;
    }
    let Some(network) = Network::start(topology) else { return };
    let bytes = if quick() { 4 << 20 } else { 352 << 20 };
    let mut number = 0;
    for mtu in [1500, JUMBO] {
        for further in [&["--vif-queues", "2"][..], &["--no-gso", "--no-csum", "--no-split"]] {
            let first = network.guest_with(number + 1, mtu, further);
            match topology {
                Topology::Bridge | Topology::Route => {
                    let second = network.guest_with(number + 2, mtu, further);
                    exchange(&second.host, &second.address(), &first.host, bytes);
                    exchange(&network.outside, network.outside_address(), &second.host, 1 << 20);
                    network.detach(&second);
                }
                Topology::Nat => exchange(&network.outside, network.outside_address(), &first.host, bytes),
            }
            network.detach(&first);
            number += 2;
        }
    }
}

#[test]
fn every_byte_arrives_over_a_bridge() {
    every_byte_arrives(Topology::Bridge);
}

#[test]
fn every_byte_arrives_when_routed() {
    every_byte_arrives(Topology::Route);
}

#[test]
fn every_byte_arrives_through_nat() {
    every_byte_arrives(Topology::Nat);
}

#[test]
fn guests_without_scatter_gather_have_a_network() {
    if !have("python3", "guests without scatter-gather") {
        return;
    }
    let Some(network) = Network::start(Topology::Bridge) else { return };
    let first = network.guest_with(1, 1500, &["--no-sg"]);
    let second = network.guest_with(2, 1500, &[]);
    exchange(&second.host, &second.address(), &first.host, 4 << 20);
}

#[test]
fn ping_of_all_sizes() {
    if !have("ping", "packets of all sizes") {
        return;
    }
    let Some(network) = Network::start(Topology::Bridge) else { return };
    let (first, second) = (network.guest_with(1, 1500, &[]), network.guest_with(2, 1500, &["--no-csum", "--no-gso"]));
    for to in [second.address(), network.outside_address().to_owned()] {
        for options in ["", "-s 0", "-s 1472 -M do", "-s 8000", "-s 60000"] {
            ping(&first.host, &to, options);
        }
    }
    fails(first.host.command("ping").args(["-c", "1", "-W", "1", "-s", "1473", "-M", "do", &second.address()]));
    let link_local = "fe80::216:3eff:fe00:2%eth0";
    becomes("IPv6 to the neighbour", || {
        let mut once = first.host.command("ping");
        once.args(["-6", "-n", "-c", "1", "-W", "1", link_local]).stdout(Stdio::null()).stderr(Stdio::null());
        once.status().unwrap().success()
    });
    ping(&first.host, link_local, "-6 -s 4000");
}

#[test]
fn iperf3_over_every_kind_of_stream() {
    if !have("iperf3", "iperf3 between guests") {
        return;
    }
    let Some(network) = Network::start(Topology::Bridge) else { return };
    let first = network.guest_with(1, 1500, &["--vif-queues", "2"]);
    let second = network.guest_with(2, 1500, &["--vif-queues", "2"]);
    for options in ["-P 4", "-P 4 -R", "-u -b 100M -l 1000", "-u -b 100M -l 20000", "-M 500"] {
        let mut server = second.host.command("timeout");
        server.args(["60", "iperf3", "-s", "-1"]);
        let mut server = server.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        becomes("iperf3 listens", || second.host.run("ss -Hltn sport = :5201").contains("5201"));
        let said = first.host.run(&format!("timeout 60 iperf3 -t 1 -c {} {options}", second.address()));
        assert!(said.contains("receiver"), "{said}");
        server.wait().unwrap();
    }
}

/// What the outside sees of a guest behind NAT, by tcpdump.
#[test]
fn the_outside_sees_the_address_of_dom0() {
    if !have("tcpdump", "what the outside sees of NAT") || !have("ping", "what the outside sees of NAT") {
        return;
    }
    if !nix::unistd::geteuid().is_root() {
        println!("NOT TESTED: what the outside sees of NAT: tcpdump wants to become another user, which only root can");
        return;
    }
    let Some(network) = Network::start(Topology::Nat) else { return };
    let guest = network.guest_with(1, 1500, &[]);
    let mut dump = network.outside.command("timeout");
    dump.args(["60", "tcpdump", "-n", "-l", "-i", "eth0", "-c", "1", "-Z", "root", "icmp[icmptype] == icmp-echo"]);
    let dump = dump.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    becomes("tcpdump listens", || network.outside.run("ss -H0an").lines().count() > 0);
    ping(&guest.host, network.outside_address(), "");
    let output = dump.wait_with_output().unwrap();
    let seen = String::from_utf8_lossy(&output.stdout);
    assert!(seen.contains("192.0.2.1 > 192.0.2.2"), "{seen}");
}

/// Interfaces go and come under load, and nothing of them stays.
#[test]
fn detach_under_load_and_attach_again() {
    if !have("iperf3", "detaching under load") {
        return;
    }
    let Some(network) = Network::start(Topology::Bridge) else { return };
    let first = network.guest_with(1, 1500, &["--vif-queues", "2"]);
    let second = network.guest_with(2, 1500, &[]);
    for _ in 0..if quick() { 2 } else { 8 } {
        for from in [&first, &second] {
            let _load = Load::start(&first.host, &second.host, &second.address());
            network.detach(from);
            // What the toolstack waits for comes a moment before.
            becomes("the tap goes", || !network.dom0.links().contains(&from.vif()));
            assert!(!network.kept().contains(&from.vif()), "{}", network.kept());
            assert!(!from.host.links().contains(&"eth0".to_owned()), "{:?}", from.host.links());
            network.attach(from, 1500);
        }
        ping(&first.host, &second.address(), "");
    }
}

/// A guest is killed in the middle of a load: the others do not notice, and what it had is taken back.
#[test]
fn a_guest_killed_under_load_leaves_nothing() {
    if !have("iperf3", "a guest killed under load") {
        return;
    }
    for topology in [Topology::Bridge, Topology::Route, Topology::Nat] {
        let Some(network) = Network::start(topology) else { return };
        let survivor = network.guest_with(200, 1500, &[]);
        // A link's state comes from a worker of the kernel's, and a port's and a route's from the link's.
        let settled =
            || !state(&network).iter().any(|part| part.contains("linkdown") || part.contains("state disabled"));
        becomes("all links are up", settled);
        let before = state(&network);
        for round in 0..if quick() { 1 } else { 3 } {
            let mut victim = network.guest_with(round + 1, 1500, &["--vif-queues", "2"]);
            let load = Load::start(&victim.host, &network.outside, network.outside_address());
            victim.process.signal(Signal::SIGKILL);
            drop(load);
            becomes("the tap goes", || !network.dom0.links().contains(&victim.vif()));
            network.destroyed(&victim);
            let began = Instant::now();
            while state(&network) != before && began.elapsed() < PATIENCE {
                std::thread::sleep(Duration::from_millis(20));
            }
            assert_eq!(state(&network), before, "{topology:?}, round {round}");
        }
        ping(&survivor.host, network.outside_address(), "");
    }
}

/// All that one interface leaves its traces in.
fn state(network: &Network) -> [String; 6] {
    let dom0 = |line: &str| network.dom0.run(line);
    let store = network.store().directory_opt("/local/domain/0/backend/vif").unwrap().unwrap_or_default();
    [
        network.dom0.links().join(" "),
        network.kept(),
        dom0("ip route show"),
        dom0("ip neighbour show proxy"),
        dom0("bridge link show"),
        store.join(" "),
    ]
}

/// netback is told to stop while guests use it, and another one takes over.
#[test]
fn netback_stops_in_order() {
    if !have("ping", "netback's end") {
        return;
    }
    let Some(mut network) = Network::start(Topology::Bridge) else { return };
    let (first, second) = (network.guest_with(1, 1500, &[]), network.guest_with(2, 1500, &[]));
    ping(&first.host, &second.address(), "");
    network.netback.signal(Signal::SIGTERM);
    for guest in [&first, &second] {
        guest.process.expect("eth0 is gone");
        assert!(!network.dom0.links().contains(&guest.vif()));
    }
    network.restart_netback();
    for guest in [&first, &second] {
        run(&mut network.netback(["detach", &guest.name, "0"]));
        network.attach(guest, 1500);
    }
    ping(&first.host, &second.address(), "");
}

#[test]
fn the_commands_say_what_they_did() {
    let Some(network) = Network::start(Topology::Bridge) else { return };
    let guest = network.guest(1, &[]);
    let said = run(&mut network.netback(["attach", &guest.name, &network.spec(&guest, 1500), "--wait", "60"]));
    assert!(said.contains("connected"), "{said}");
    guest.process.expect("eth0 is connected");
    assert!(network.dom0.run("ip -o link show master xenbr0").contains(&guest.vif()));
    assert!(guest.host.run("ip -o link show eth0").contains("00:16:3e:00:00:01"));
    let listed = run(&mut network.netback(["list", &guest.name]));
    let mut lines = listed.lines();
    assert!(lines.next().is_some_and(|head| head.starts_with("Idx BE")), "{listed}");
    let row: Vec<&str> = lines.next().expect("a row").split_whitespace().collect();
    assert_eq!((row[0], row[1], row[2]), ("0", "0", "00:16:3e:00:00:01"), "{listed}");
    assert!(listed.contains(&format!("/local/domain/0/backend/vif/{}/0", guest.domid)), "{listed}");
    run(&mut network.netback(["detach", &guest.domid, "00:16:3e:00:00:01"]));
    guest.process.expect("eth0 is gone");
    let said = fails(&mut network.netback(["attach", &guest.name, "bridge=nobridge"]));
    assert!(said.contains("nobridge"), "{said}");
    assert!(!network.dom0.links().contains(&guest.vif()), "a failed attach leaves nothing");
    assert!(!network.kept().contains(&guest.vif()), "a failed attach leaves nothing");
}
