//! Reading the machine's network while somebody else changes it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::net::IpAddr;
use std::process::Command;

use bridge_scripts::link::Link;
use bridge_scripts::state::What;
use common::World;

/// RTPROT_KERNEL.
const KERNEL: u8 = 2;

/// The kernel makes a route for every address; nobody else does here. A route that was read without its address would be
/// taken for somebody's own, and be moved to a bridge without it.
#[test]
fn a_route_of_the_kernels_is_read_with_its_address() {
    let Some(world) = World::new("reading while addresses come") else { return };
    world.card("eth0", &[], &[]);
    world.settle();
    let mut batch = String::new();
    for number in 0..3000 {
        writeln!(batch, "addr add fd00:{number:x}::1/64 dev eth0 nodad").unwrap();
    }
    let file = world.run.path().join("batch");
    fs::write(&file, batch).unwrap();
    let mut link = Link::open().unwrap();
    let what = What { addresses: true, routes: true, ..What::links(["eth0"]) };
    let mut adding = Command::new("ip").arg("-batch").arg(&file).spawn().unwrap();
    let (mut reads, mut last) = (0, false);
    while !last {
        last = adding.try_wait().unwrap().is_some();
        let state = link.read(&what).unwrap();
        let networks: BTreeSet<u128> = state.addresses.iter().filter_map(|address| network(address.local)).collect();
        for route in state.routes.iter().filter(|route| route.protocol == KERNEL) {
            let known = network(route.to.unwrap().0).is_none_or(|network| networks.contains(&network));
            assert!(known, "{route} was read without an address, in read {reads}");
        }
        reads += 1;
    }
    assert!(adding.wait().unwrap().success());
    assert!(reads > 3, "only {reads} reads while addresses came");
}

/// The first half of an IPv6 address: all networks here are /64.
fn network(address: IpAddr) -> Option<u128> {
    let IpAddr::V6(address) = address else { return None };
    Some(address.to_bits() >> 64)
}
