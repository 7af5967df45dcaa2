//! A network: dom0, its guests, and a machine outside.

use std::net::IpAddr;

use netback::tap::Tap;

use super::forwarder::Forwarder;
use super::link;
use super::netns::Namespace;
use super::plan::{self, ETH0, Topology, UPLINK};
use super::traffic::Way;
use crate::Failure;

/// What joins a guest's eth0 and dom0's vif, besides netback.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cable {
    /// A pair of the kernel's own.
    Veth,
    /// Two taps and a program that copies between them; with or without leaving checksums and segments to the kernel.
    Taps {
        /// See [`Forwarder::start`].
        offload: bool,
    },
}

/// The machines. Guests come one by one.
#[derive(Debug)]
pub struct Scene {
    mtu: u32,
    forwarders: Vec<Forwarder>,
    guests: Vec<Guest>,
    outside: Namespace,
    dom0: Namespace,
}

#[derive(Debug)]
struct Guest {
    topology: Topology,
    namespace: Namespace,
}

impl Scene {
    /// dom0 in this namespace, ready for guests of these kinds, and the outside at the end of its uplink.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn new(dom0: Namespace, topologies: &[Topology], mtu: u32) -> Result<Self, Failure> {
        let outside = Namespace::new()?;
        dom0.run(|| {
            topologies.iter().try_for_each(|&topology| plan::prepare_dom0(topology))?;
            link::veth(UPLINK, ETH0, &outside, mtu)?;
            link::address(UPLINK, plan::DOM0, 24)
        })??;
        outside.run(|| link::address(ETH0, plan::OUTSIDE, 24))??;
        Ok(Self { mtu, forwarders: Vec::new(), guests: Vec::new(), outside, dom0 })
    }

    /// A namespace for the next guest, whose eth0 is still to come. Returns the guest's number.
    ///
    /// # Errors
    /// When the kernel makes none.
    pub fn next_guest(&mut self, topology: Topology) -> Result<usize, Failure> {
        self.guests.push(Guest { topology, namespace: Namespace::new()? });
        Ok(self.guests.len() - 1)
    }

    /// Gives guest `number`, whose eth0 is there, its address and routes.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn configure(&self, number: usize) -> Result<(), Failure> {
        let Guest { topology, namespace } = &self.guests[number];
        namespace.run(|| plan::configure_guest(*topology, number))?
    }

    /// Adds a guest at the end of a cable.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn plug(&mut self, topology: Topology, cable: Cable) -> Result<(), Failure> {
        let number = self.next_guest(topology)?;
        let vif = format!("vif{}.0", number + 1);
        let (guest, mac) = (&self.guests[number].namespace, plan::guest_mac(number));
        match cable {
            Cable::Veth => self.dom0.run(|| link::veth(&vif, ETH0, guest, self.mtu))??,
            Cable::Taps { offload } => {
                let tap = |name: &str, mac| {
                    let tap = Tap::create(name)?;
                    link::start(name, mac, self.mtu)?;
                    Ok::<_, Failure>(tap)
                };
                let ours = self.dom0.run(|| tap(&vif, None))??;
                let theirs = guest.run(|| tap(ETH0, Some(mac)))??;
                self.forwarders.push(Forwarder::start([ours, theirs], offload)?);
            }
        }
        self.dom0.run(|| plan::wire(topology, number, &vif))??;
        self.configure(number)
    }

    /// Lends dom0's address to guests on their way out, plainly.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn masquerade(&self) -> Result<(), Failure> {
        self.dom0.run(plan::masquerade)?
    }

    /// How many bytes the largest packet has.
    pub fn mtu(&self) -> u32 {
        self.mtu
    }

    /// dom0's namespace.
    pub fn dom0(&self) -> &Namespace {
        &self.dom0
    }

    /// The namespace of guest `number`.
    pub fn guest(&self, number: usize) -> &Namespace {
        &self.guests[number].namespace
    }

    /// From one guest to another.
    pub fn between(&self, from: usize, to: usize) -> Way<'_> {
        Way { from: self.guest(from), to: self.guest(to), address: plan::guest_address(to) }
    }

    /// From a guest to the outside.
    pub fn out(&self, from: usize) -> Way<'_> {
        Way { from: self.guest(from), to: &self.outside, address: plan::OUTSIDE }
    }

    /// The ways that traffic is measured on: guests 1 to 2, 3 to 4 and so on; behind NAT, from each to the outside.
    pub fn ways(&self) -> Vec<Way<'_>> {
        let behind_nat = |number: &usize| self.guests[*number].topology == Topology::Nat;
        let (outwards, inside): (Vec<usize>, Vec<usize>) = (0..self.guests.len()).partition(behind_nat);
        let pairs = inside.chunks_exact(2).map(|pair| self.between(pair[0], pair[1]));
        pairs.chain(outwards.iter().map(|&from| self.out(from))).collect()
    }

    /// From which address the outside sees a guest come.
    ///
    /// # Errors
    /// When there is no way.
    pub fn seen_outside(&self, from: usize) -> Result<IpAddr, Failure> {
        self.out(from).seen_from()
    }
}
