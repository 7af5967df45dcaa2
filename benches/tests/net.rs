//! Namespaces, cables and traffic, without netback: what measures must itself be right.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::net::IpAddr;
use std::time::Duration;

use dom0_bench::net::link;
use dom0_bench::net::netns::Namespace;
use dom0_bench::net::plan::{DOM0, ETH0, Topology};
use dom0_bench::net::scene::{Cable, Scene};
use dom0_bench::net::traffic::{self, Until, Way};

/// A namespace for dom0; none, said loudly, where the machine forbids it.
fn dom0() -> Option<Namespace> {
    match Namespace::new() {
        Ok(dom0) => Some(dom0),
        Err(error) => {
            println!("NOT TESTED: networks of the benchmark: {error}");
            None
        }
    }
}

const CABLES: [Cable; 3] = [Cable::Veth, Cable::Taps { offload: true }, Cable::Taps { offload: false }];

#[test]
fn every_topology_carries_every_kind_of_traffic_over_every_cable() {
    for topology in [Topology::Bridge, Topology::Route, Topology::Nat] {
        for cable in CABLES {
            let Some(dom0) = dom0() else { return };
            let mut scene = Scene::new(dom0, &[topology], 1500).unwrap();
            if topology == Topology::Nat {
                scene.masquerade().unwrap();
            }
            for _ in 0..4 {
                scene.plug(topology, cable).unwrap();
            }
            let ways = scene.ways();
            assert_eq!(ways.len(), if topology == Topology::Nat { 4 } else { 2 });
            let arrived = traffic::tcp(&ways, 2, 10_000, Until::Bytes(1_234_567)).unwrap();
            assert_eq!(arrived.bytes, ways.len() as u64 * 2 * 1_234_567, "{topology} {cable:?}");
            let arrived = traffic::udp(&ways, 1000, Duration::from_millis(50)).unwrap();
            assert!(arrived.packets > 0 && arrived.packets <= arrived.sent, "{arrived:?}");
            let turns = traffic::round_trips(&ways[0], Duration::from_millis(50)).unwrap();
            assert!(!turns.is_empty(), "no byte came back");
            if topology == Topology::Nat {
                assert_eq!(scene.seen_outside(3).unwrap(), DOM0);
            }
        }
    }
}

#[test]
fn large_packets_pass() {
    for cable in CABLES {
        let Some(dom0) = dom0() else { return };
        let mut scene = Scene::new(dom0, &[Topology::Bridge], 9000).unwrap();
        for _ in 0..2 {
            scene.plug(Topology::Bridge, cable).unwrap();
        }
        let arrived = traffic::udp(&scene.ways(), 8972, Duration::from_millis(50)).unwrap();
        assert!(arrived.packets > 0);
    }
}

/// A byte that is changed on the way must be found out, or all the other tests say nothing.
#[test]
fn a_wrong_byte_is_found() {
    use std::io::{Read, Write};

    let Some(here) = dom0() else { return };
    let Some(there) = dom0() else { return };
    here.run(|| link::veth("one", ETH0, &there, 1500).and_then(|()| link::address("one", ip(1), 24))).unwrap().unwrap();
    there.run(|| link::address(ETH0, ip(2), 24)).unwrap().unwrap();
    // Two streams with the same contents, joined by a program that changes one byte between them.
    let meddle = |change: bool| {
        let inner = there.run(|| std::net::TcpListener::bind((ip(2), 0))).unwrap().unwrap();
        let address = inner.local_addr().unwrap();
        std::thread::scope(|scope| {
            let receiver = scope.spawn(move || traffic::receive(inner.accept().unwrap().0, 1));
            let middle = here.run(|| std::net::TcpListener::bind((ip(1), 0))).unwrap().unwrap();
            let middle_address = middle.local_addr().unwrap();
            let there = &there;
            let sender = scope.spawn(move || {
                let socket = there.run(|| std::net::TcpStream::connect(middle_address)).unwrap().unwrap();
                traffic::send(socket, 1, 1000, Until::Bytes(200_000)).unwrap()
            });
            let mut from = middle.accept().unwrap().0;
            let mut to = here.run(|| std::net::TcpStream::connect(address)).unwrap().unwrap();
            let mut all = Vec::new();
            from.read_to_end(&mut all).unwrap();
            if change {
                all[150_000] ^= 1;
            }
            to.write_all(&all).unwrap();
            drop(to);
            assert_eq!(sender.join().unwrap(), 200_000);
            receiver.join().unwrap()
        })
    };
    assert_eq!(meddle(false).unwrap(), 200_000);
    assert!(meddle(true).unwrap_err().to_string().contains("byte 150000 "));
}

fn ip(last: u8) -> IpAddr {
    [192, 0, 2, last].into()
}

#[test]
fn what_cannot_be_reached_is_said() {
    let Some(here) = dom0() else { return };
    let Some(there) = dom0() else { return };
    there.run(|| link::address("lo", ip(2), 32)).unwrap().unwrap();
    let way = Way { from: &here, to: &there, address: ip(2) };
    let error = way.seen_from().unwrap_err().to_string();
    assert!(error.contains("connecting to 192.0.2.2"), "{error}");
}
