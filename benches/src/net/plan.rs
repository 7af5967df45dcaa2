//! Which machines a network has, and their addresses.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use bridge_scripts::nft::{
    Action, Chain, Change, Family, Field, Hook, HookKind, HookPoint, Match, Nft, Policy, Rule, Table, Value,
};

use super::link;
use crate::Failure;

/// dom0's bridge.
pub const BRIDGE: &str = "xenbr0";
/// dom0's interface to the outside.
pub const UPLINK: &str = "uplink";
/// A guest's interface.
pub const ETH0: &str = "eth0";
/// Most guests: their addresses end in 1 to 100, and behind NAT their gateways in 128 to 227.
pub const MOST_GUESTS: usize = 100;

/// How guests' packets find their way through dom0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Topology {
    /// All on one bridge.
    Bridge,
    /// dom0 routes between them.
    Route,
    /// dom0 routes, and lends them its own address on the way out.
    Nat,
}

impl FromStr for Topology {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "bridge" => Ok(Self::Bridge),
            "route" => Ok(Self::Route),
            "nat" => Ok(Self::Nat),
            _ => Err(format!("{text:?} is no topology: write bridge, route or nat")),
        }
    }
}

impl fmt::Display for Topology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bridge => "bridge",
            Self::Route => "route",
            Self::Nat => "nat",
        })
    }
}

/// dom0's address.
pub const DOM0: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
/// The machine outside.
pub const OUTSIDE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));

/// The address of guest `number`, from 0.
pub fn guest_address(number: usize) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, 0, 0, number as u8 + 1))
}

/// dom0's end of the cable to guest `number`, where it routes: its own address, or behind NAT one that vif-nat makes from
/// the guest's.
fn gateway(topology: Topology, number: usize) -> IpAddr {
    match topology {
        Topology::Nat => IpAddr::V4(Ipv4Addr::new(10, 0, 0, number as u8 + 128)),
        Topology::Bridge | Topology::Route => DOM0,
    }
}

/// The MAC of guest `number`, from Xen's range.
pub fn guest_mac(number: usize) -> [u8; 6] {
    [0x00, 0x16, 0x3e, 0, 0, number as u8 + 1]
}

/// What dom0 needs before the first guest comes, in the calling thread's namespace; for [`Topology::Nat`] not all of it.
///
/// # Errors
/// When the kernel refuses.
pub fn prepare_dom0(topology: Topology) -> Result<(), Failure> {
    match topology {
        Topology::Bridge => link::bridge(BRIDGE),
        Topology::Route | Topology::Nat => link::sysctl("ipv4/ip_forward", "1"),
    }
}

/// What lends dom0's address to guests behind NAT, in the calling thread's namespace, plainly: for cables that are no
/// vifs.
///
/// # Errors
/// When the kernel refuses.
pub fn masquerade() -> Result<(), Failure> {
    let hook = Hook {
        kind: HookKind::Nat,
        point: HookPoint::Postrouting,
        // NF_IP_PRI_NAT_SRC
        priority: 100,
        policy: Policy::Accept,
    };
    let leaves = Match::is(Field::Oifname, Value::Name(UPLINK.to_owned()));
    let chain =
        Chain { name: "out".to_owned(), hook: Some(hook), rules: vec![Rule::new([leaves], Action::Masquerade)] };
    let table = Table { family: Family::Ip, name: "nat".to_owned(), sets: Vec::new(), chains: vec![chain] };
    Ok(Nft::open()?.apply(&[Change::Replace(table)])?)
}

/// What is done inside a guest whose interface has appeared and is up.
///
/// # Errors
/// When the kernel refuses.
pub fn configure_guest(topology: Topology, number: usize) -> Result<(), Failure> {
    match topology {
        Topology::Bridge => link::address(ETH0, guest_address(number), 24),
        Topology::Route | Topology::Nat => {
            link::address(ETH0, guest_address(number), 32)?;
            link::route((Ipv4Addr::UNSPECIFIED.into(), 0), ETH0, Some(gateway(topology, number)))
        }
    }
}

/// What the vif's script would do in dom0, done plainly: for cables that are no vifs.
///
/// # Errors
/// When the kernel refuses.
pub fn wire(topology: Topology, number: usize, vif: &str) -> Result<(), Failure> {
    match topology {
        Topology::Bridge => link::enslave(vif, BRIDGE),
        Topology::Route | Topology::Nat => {
            link::address(vif, gateway(topology, number), 32)?;
            link::route((guest_address(number), 32), vif, None)
        }
    }
}
