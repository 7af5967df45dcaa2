//! What has to follow when a machine's addresses move from one link to another.

use std::net::IpAddr;

use crate::plan::Plan;
use crate::state::{Address, Neighbour, Route, State};
use crate::step::Step;

/// IFA_F_NOPREFIXROUTE of linux/if_addr.h: the kernel makes no route to the address's network.
const NO_PREFIX_ROUTE: u32 = 0x200;
/// RTPROT_KERNEL.
const KERNEL: u8 = 2;
/// RTA_NH_ID of linux/rtnetlink.h.
const NEXTHOP_OBJECT: u16 = 30;

/// The addresses, routes and static neighbours of a link.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Luggage {
    pub(super) addresses: Vec<Address>,
    /// In the order in which they can be added: gateways are reached through what comes before.
    pub(super) routes: Vec<Route>,
    pub(super) neighbours: Vec<Neighbour>,
}

impl Luggage {
    /// All that is on a link, and the routes through other links that are sent from its addresses: the kernel removes
    /// them together with the address.
    pub(super) fn of(state: &State, dev: &str) -> Self {
        // In the order in which they were added: the kernel lists IPv4's so, and of IPv6's the newest first.
        let v4 = state.addresses_of(dev).filter(|address| address.local.is_ipv4());
        let v6 = state.addresses_of(dev).rev().filter(|address| address.local.is_ipv6());
        let addresses: Vec<Address> = v4.chain(v6).cloned().collect();
        let from_here = |route: &Route| addresses.iter().any(|address| Some(address.local) == route.source);
        let mut routes: Vec<Route> = state
            .routes
            .iter()
            .filter(|route| route.uses(dev) || from_here(route))
            .filter(|route| !is_automatic(route, state))
            .cloned()
            .collect();
        routes.sort_by_key(|route| route.gateway.is_some() || route.ways.iter().any(|way| way.gateway.is_some()));
        let neighbours = state.neighbours.iter().filter(|neighbour| neighbour.dev == dev).cloned().collect();
        Self { addresses, routes, neighbours }
    }

    /// Whether there is nothing to move.
    pub(super) fn is_empty(&self) -> bool {
        self.addresses.is_empty() && self.routes.is_empty() && self.neighbours.is_empty()
    }

    /// Whether there is an IPv6 link-local address.
    pub(super) fn has_link_local(&self) -> bool {
        self.addresses.iter().any(|address| matches!(address.local, IpAddr::V6(local) if local.is_unicast_link_local()))
    }

    /// A route through a nexthop object (`ip nexthop`), which cannot follow: the object belongs to its link.
    pub(super) fn stuck(&self) -> Option<&Route> {
        self.routes.iter().find(|route| route.rest.iter().any(|(kind, _)| *kind == NEXTHOP_OBJECT))
    }

    /// Takes everything off its link.
    pub(super) fn unload(&self, plan: &mut Plan) {
        self.routes.iter().rev().for_each(|route| plan.steps.push(Step::RemoveRoute(route.clone())));
        self.neighbours.iter().for_each(|neighbour| plan.steps.push(Step::RemoveNeighbour(neighbour.clone())));
        // Backwards: with a network's first address the kernel may remove the others.
        self.addresses.iter().rev().for_each(|address| plan.steps.push(Step::RemoveAddress(address.clone())));
    }

    /// Puts everything on a link.
    pub(super) fn load(&self, plan: &mut Plan) {
        self.addresses.iter().for_each(|address| plan.steps.push(Step::AddAddress(address.clone())));
        self.neighbours.iter().for_each(|neighbour| plan.steps.push(Step::AddNeighbour(neighbour.clone())));
        self.routes.iter().for_each(|route| plan.steps.push(Step::AddRoute(route.by_hand())));
    }

    /// The same without the addresses that are there already.
    pub(super) fn lacking(mut self, state: &State) -> Self {
        let there = |address: &Address| {
            let same = |other: &Address| (other.local, other.prefix) == (address.local, address.prefix);
            state.addresses_of(&address.dev).any(same)
        };
        self.addresses.retain(|address| !there(address));
        self
    }

    /// The same for another link.
    pub(super) fn onto(mut self, from: &str, to: &str) -> Self {
        let change = |name: &mut String| {
            if name == from {
                to.clone_into(name);
            }
        };
        for address in &mut self.addresses {
            change(&mut address.dev);
            // eth0:1 becomes xenbr0:1, if that still is a name.
            let suffix = address.label.as_deref().and_then(|label| label.strip_prefix(from));
            let label = suffix.filter(|suffix| suffix.starts_with(':')).map(|suffix| format!("{to}{suffix}"));
            if let Some(label) = label.filter(|label| label.len() <= 15) {
                address.label = Some(label);
            }
        }
        for route in &mut self.routes {
            route.dev.as_mut().map(change);
            route.ways.iter_mut().for_each(|way| change(&mut way.dev));
        }
        self.neighbours.iter_mut().for_each(|neighbour| change(&mut neighbour.dev));
        self
    }
}

/// Whether the kernel makes this route by itself together with an address.
fn is_automatic(route: &Route, state: &State) -> bool {
    let (Some((to, prefix)), Some(dev)) = (route.to, &route.dev) else { return false };
    if route.protocol != KERNEL || route.gateway.is_some() {
        return false;
    }
    state.addresses_of(dev).any(|address| {
        let usual = if route.v6 { Some(256) } else { None };
        let metric = address.metric.or(usual);
        address.flags & NO_PREFIX_ROUTE == 0
            && address.prefix == prefix
            && network(address.peer.unwrap_or(address.local), prefix) == to
            && (route.metric == metric || route.metric.unwrap_or(0) == 0)
    })
}

/// An address without its host part.
pub(super) fn network(address: IpAddr, prefix: u8) -> IpAddr {
    match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0);
            IpAddr::V4((address.to_bits() & mask).into())
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(prefix.min(128))).unwrap_or(0);
            IpAddr::V6((address.to_bits() & mask).into())
        }
    }
}
