//! One kind of network to measure, and what was found.

use std::time::Duration;

use hdrhistogram::Histogram;

use super::Arguments;
use crate::Failure;
use crate::machine::{Machine, NETBACK};
use crate::net::netns::Namespace;
use crate::net::plan::{Topology, UPLINK};
use crate::net::scene::{Cable, Scene};
use crate::net::traffic::{self, Arrived, Until};
use crate::net::vif_guest::VifGuest;
use crate::net::{card, forwarder};
use crate::placement;

/// What is measured: a network, and who works for it besides the kernel.
#[derive(Debug)]
pub(super) struct Subject {
    pub(super) name: &'static str,
    scene: Scene,
    /// Who carries the guests' frames, where it is netback.
    vifs: Option<Vifs>,
    pub(super) found: Found,
}

#[derive(Debug)]
struct Vifs {
    guests: Vec<VifGuest>,
    machine: Machine,
}

/// What all rounds found.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) tcp: Arrived,
    pub(super) udp: Arrived,
    pub(super) turns: Histogram<u64>,
    /// Of TCP's Gbit/s, of packets a second, round by round.
    pub(super) tcp_rounds: Vec<f64>,
    pub(super) udp_rounds: Vec<f64>,
    pub(super) cpu: Cpu,
}

/// Processor time used while TCP ran.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Cpu {
    /// By everything on this machine, the kernel included.
    pub(super) machine: Duration,
    /// By netback's process, or the copying programs' threads.
    pub(super) backend: Duration,
    /// By the threads that are the guests' network cards.
    pub(super) guests: Duration,
}

impl Cpu {
    fn now(vifs: Option<&Vifs>) -> Self {
        let (backend, guests) = match vifs {
            Some(vifs) => (placement::process_time(vifs.machine.pid(NETBACK)), placement::threads_time(card::THREADS)),
            None => (placement::threads_time(forwarder::THREADS), Duration::ZERO),
        };
        Self { machine: placement::machine_time(), backend, guests }
    }

    fn add_since(&mut self, before: Self, now: Self) {
        self.machine += now.machine.saturating_sub(before.machine);
        self.backend += now.backend.saturating_sub(before.backend);
        self.guests += now.guests.saturating_sub(before.guests);
    }
}

impl Found {
    fn new() -> Result<Self, Failure> {
        Ok(Self {
            tcp: Arrived::default(),
            udp: Arrived::default(),
            turns: Histogram::new_with_bounds(1, 60_000_000_000, 3)?,
            tcp_rounds: Vec::new(),
            udp_rounds: Vec::new(),
            cpu: Cpu::default(),
        })
    }
}

impl Subject {
    /// Guests at the ends of cables, in namespaces of their own.
    pub(super) fn plain(name: &'static str, arguments: &Arguments, cable: Cable) -> Result<Self, Failure> {
        let topology = arguments.topology;
        let mut scene = Scene::new(Namespace::new()?, &[topology], arguments.mtu)?;
        if topology == Topology::Nat {
            scene.masquerade()?;
        }
        for _ in 0..arguments.guests {
            scene.plug(topology, cable)?;
        }
        Ok(Self { name, scene, vifs: None, found: Found::new()? })
    }

    /// Guests of an emulated machine whose dom0 is the calling thread's namespace.
    pub(super) fn netback(arguments: &Arguments) -> Result<Self, Failure> {
        let topology = arguments.topology;
        let mut machine = Machine::bare()?;
        machine.serve(NETBACK, &[])?;
        let mut scene = Scene::new(Namespace::current()?, &[topology], arguments.mtu)?;
        if topology == Topology::Nat {
            machine.start_nat(UPLINK)?;
        }
        let options = arguments.front_options();
        let plugged = (0..arguments.guests).map(|_| VifGuest::plug(&machine, &mut scene, topology, &options));
        let guests = plugged.map(|guest| Ok(guest?.0)).collect::<Result<_, Failure>>()?;
        Ok(Self { name: "netback", scene, vifs: Some(Vifs { guests, machine }), found: Found::new()? })
    }

    /// Runs all loads once; `time` is that of TCP.
    pub(super) fn round(&mut self, arguments: &Arguments, time: Duration, counts: bool) -> Result<(), Failure> {
        let failed = |error: Failure| format!("{}: {error}", self.name);
        let ways = self.scene.ways();
        let before = Cpu::now(self.vifs.as_ref());
        let tcp = traffic::tcp(&ways, arguments.streams as usize, arguments.size as usize, Until::Time(time))
            .map_err(failed)?;
        let after = Cpu::now(self.vifs.as_ref());
        let udp = traffic::udp(&ways, arguments.datagram as usize, time / 2).map_err(failed)?;
        let turns = traffic::round_trips(&ways[0], time / 2).map_err(failed)?;
        if counts {
            let found = &mut self.found;
            found.cpu.add_since(before, after);
            found.tcp.add(&tcp);
            found.udp.add(&udp);
            found.turns.add(&turns)?;
            found.tcp_rounds.push(tcp.gigabits());
            found.udp_rounds.push(udp.packet_rate());
        }
        Ok(())
    }

    /// Takes it down in order.
    pub(super) fn end(self) -> Result<Found, Failure> {
        if let Some(Vifs { guests, machine }) = self.vifs {
            guests.into_iter().try_for_each(|guest| guest.unplug(&machine))?;
        }
        Ok(self.found)
    }
}
