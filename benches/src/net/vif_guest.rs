//! A guest of the emulated machine, with a vif of netback's: what joins it to a [scene](Scene) is the whole way that a
//! real guest's packets go.

use std::sync::Arc;

use hypervisor::emu::GuestSeat;
use hypervisor::{DomId, Guest};
use netback::front::Options;

use super::card::{self, Card};
use super::plan::{self, BRIDGE, ETH0, Topology, UPLINK};
use super::scene::Scene;
use crate::Failure;
use crate::machine::Machine;

/// The guest. It has to be [unplugged](Self::unplug) to be gone in order.
#[derive(Debug)]
pub struct VifGuest {
    card: Card,
    // A guest's seat is its domain, and outlives its card.
    seat: Arc<GuestSeat>,
}

/// The interface of guest `number` as in xl.cfg. Filters against forged addresses are on, as they are by default.
pub fn spec(topology: Topology, number: usize, mtu: u32) -> String {
    let mac = plan::guest_mac(number).map(|byte| format!("{byte:02x}")).join(":");
    let address = plan::guest_address(number);
    match topology {
        Topology::Bridge => format!("mac={mac},bridge={BRIDGE},mtu={mtu}"),
        Topology::Route => format!("mac={mac},script=vif-route,ip={address},gatewaydev={UPLINK},mtu={mtu}"),
        Topology::Nat => format!("mac={mac},script=vif-nat,ip={address},gatewaydev={UPLINK},mtu={mtu}"),
    }
}

impl VifGuest {
    /// Adds a guest to a machine and to a scene, whose dom0 must be the calling thread's namespace. Returns its number in
    /// the scene too.
    ///
    /// # Errors
    /// When one of the parts refuses.
    pub fn plug(
        machine: &Machine,
        scene: &mut Scene,
        topology: Topology,
        options: &Options,
    ) -> Result<(Self, usize), Failure> {
        let number = scene.next_guest(topology)?;
        let name = format!("guest{}", number + 1);
        let seat = Arc::new(machine.join_guest(&name, (card::QUEUE_PAGES * options.queues as usize + 64) as u32)?);
        machine.netback(&["attach", &name, &spec(topology, number, scene.mtu()), "--wait", "0"])?;
        let card = Card::plug(seat.clone(), 0, options, scene.guest(number), ETH0)?;
        scene.configure(number)?;
        Ok((Self { card, seat }, number))
    }

    /// Its domain.
    pub fn domid(&self) -> DomId {
        Guest::domid(&*self.seat)
    }

    /// What its interface is, in words.
    pub fn describe(&self) -> String {
        self.card.describe()
    }

    /// Disconnects it, detaches its vif and ends the domain.
    ///
    /// # Errors
    /// When a part does not follow.
    pub fn unplug(self, machine: &Machine) -> Result<(), Failure> {
        let domid = self.domid().to_string();
        self.card.unplug()?;
        machine.netback(&["detach", &domid, "0"])?;
        drop(self.seat);
        Ok(())
    }
}
