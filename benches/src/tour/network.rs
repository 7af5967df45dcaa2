//! The tour's network: two guests on a bridge, a third behind NAT.

use std::time::Duration;

use netback::front::Options;
use xenstore_client::Store;

use super::Steps;
use crate::Failure;
use crate::machine::{Machine, NETBACK};
use crate::net::measure;
use crate::net::netns::Namespace;
use crate::net::plan::{DOM0, OUTSIDE, Topology, UPLINK};
use crate::net::scene::Scene;
use crate::net::traffic::{self, Until};
use crate::net::vif_guest::VifGuest;
use crate::table::{Table, grouped};

/// Bytes of each stream.
const STREAM: u64 = 32 << 20;
/// Streams each way between the guests on the bridge, and to the outside.
const STREAMS: usize = 2;

/// Whether there can be one here. `apart` is whether this process could leave the host's network.
pub(super) fn possible(apart: Result<(), Failure>) -> Result<(), Failure> {
    apart?;
    let tun = "/dev/net/tun";
    std::fs::File::options()
        .read(true)
        .write(true)
        .open(tun)
        .map_err(|error| format!("{tun}: {error} (elsewhere it is open to everybody: chmod 666)"))?;
    Ok(())
}

/// Has three guests talk to each other and to the outside, and checks every byte.
///
/// # Errors
/// When anything is not as it should be.
pub(super) fn run(steps: &Steps, machine: &mut Machine) -> Result<(), Failure> {
    machine.serve(NETBACK, &[])?;
    let mut scene = Scene::new(Namespace::current()?, &[Topology::Bridge, Topology::Nat], 1500)?;
    machine.start_nat(UPLINK)?;
    steps.say("netback runs too, in a network namespace that is dom0's: a bridge, and an uplink to a machine outside");
    let before = machine.counters();
    let options = Options { queues: 2, ..Options::default() };
    let mut guests = Vec::new();
    for topology in [Topology::Bridge, Topology::Bridge, Topology::Nat] {
        guests.push(VifGuest::plug(machine, &mut scene, topology, &options)?.0);
    }
    steps.say("two guests on the bridge and one behind NAT, attached as xl would do it; all are connected");
    show_keys(machine, &guests[0])?;

    let bridged = traffic::tcp(&[scene.between(0, 1), scene.between(1, 0)], STREAMS, 65536, Until::Bytes(STREAM))?;
    steps.say(format!(
        "{} MiB between the guests on the bridge, both ways at once: every byte is right",
        mib(bridged.bytes)
    ));
    let out = traffic::tcp(&[scene.out(2)], STREAMS, 65536, Until::Bytes(STREAM))?;
    let seen = scene.seen_outside(2)?;
    if seen != DOM0 {
        return Err(format!("{OUTSIDE} outside sees the guest behind NAT as {seen} instead of {DOM0}").into());
    }
    steps.say(format!(
        "{} MiB from the guest behind NAT to the outside: every byte is right, and it comes from dom0's address {seen}",
        mib(out.bytes)
    ));
    let datagrams = traffic::udp(&[scene.between(0, 1)], 1000, Duration::from_millis(200))?;
    let counted = machine.counters().since(&before);
    for guest in guests {
        guest.unplug(machine)?;
    }
    steps.say("detached");

    let mut table = Table::new(["what happened", ""]);
    table
        .row(["bytes sent between guests and to the outside, and compared".into(), grouped(bridged.bytes + out.bytes)]);
    table.row(["datagrams that arrived, and were compared".into(), grouped(datagrams.packets)]);
    table.row(["grant copies".into(), grouped(counted.copies)]);
    table.row(["pages mapped, all of them rings".into(), grouped(counted.maps)]);
    table.row(["notifications, both ways".into(), grouped(counted.notifications)]);
    table.row(["grants refused".into(), grouped(counted.refused_grants())]);
    table.row(["pages still mapped after the detach".into(), grouped(machine.still_mapped()?)]);
    println!("\n{table}");
    Ok(())
}

fn mib(bytes: u64) -> u64 {
    bytes >> 20
}

fn show_keys(machine: &Machine, guest: &VifGuest) -> Result<(), Failure> {
    let mut table = Table::new(["XenStore key", "value"]);
    let domid = guest.domid();
    let backend = format!("/local/domain/0/backend/vif/{domid}/0");
    let frontend = format!("{}/device/vif/0", domid.home());
    for (path, keys) in [
        (&backend, &["state", "script", "bridge", "mac", "hotplug-status", "multi-queue-max-queues"][..]),
        (&frontend, &["state", "multi-queue-num-queues", "queue-0/tx-ring-ref", "feature-gso-tcpv4"][..]),
    ] {
        for key in keys {
            let path = format!("{path}/{key}");
            let value = machine.store().read_opt(&path)?.unwrap_or_else(|| "-".into());
            table.row([path, value]);
        }
    }
    println!("\n{table}");
    Ok(())
}

/// Measures two guests on a bridge, beside the kernel's own.
///
/// # Errors
/// When anything is not as it should be.
pub(super) fn measure(steps: &Steps) -> Result<(), Failure> {
    steps.say("measuring: two guests on a bridge, through netback and over plain veth, by turns\n");
    println!("{}", measure::brief(Duration::from_millis(900))?);
    Ok(())
}
