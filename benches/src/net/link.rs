//! Interfaces, addresses and routes of the calling thread's namespace, by netlink: what an installer inside a guest does,
//! and what the cable between two machines is. dom0's own side is bridge-scripts' business.

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};

use rtnetlink::packet_route::link::{InfoData, InfoVeth};
use rtnetlink::{Handle, LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};

use super::netns::Namespace;
use crate::Failure;

/// Has one conversation with the kernel.
fn talk(
    what: impl std::fmt::Display,
    work: impl AsyncFnOnce(&Handle) -> Result<(), rtnetlink::Error>,
) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        let connection = tokio::spawn(connection);
        let outcome = work(&handle).await;
        connection.abort();
        outcome.map_err(|error| format!("{what}: {error}").into())
    })
}

fn index(name: &str) -> Result<u32, Failure> {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    Ok(rustix::net::netdevice::name_to_index(&socket, name).map_err(|error| format!("no interface {name}: {error}"))?)
}

/// Switches an interface on.
///
/// # Errors
/// When there is none, or the kernel refuses.
pub fn up(name: &str) -> Result<(), Failure> {
    talk(format_args!("switching {name} on"), async |handle| {
        handle.link().set(LinkUnspec::new_with_name(name).up().build()).execute().await
    })
}

/// Gives an interface, which must be down, its address and largest packet, and switches it on.
///
/// # Errors
/// When there is none, or the kernel refuses.
pub fn start(name: &str, mac: Option<[u8; 6]>, mtu: u32) -> Result<(), Failure> {
    talk(format_args!("configuring {name}"), async |handle| {
        let mut message = LinkUnspec::new_with_name(name).mtu(mtu);
        if let Some(mac) = mac {
            message = message.address(mac.to_vec());
        }
        handle.link().set(message.build()).execute().await?;
        handle.link().set(LinkUnspec::new_with_name(name).up().build()).execute().await
    })
}

/// Makes a cable: `name` here, `peer` in another namespace, both up.
///
/// # Errors
/// When the kernel refuses.
pub fn veth(name: &str, peer: &str, there: &Namespace, mtu: u32) -> Result<(), Failure> {
    talk(format_args!("making the pair {name} and {peer}"), async |handle| {
        let end = LinkMessageBuilder::<LinkUnspec>::new().name(peer).mtu(mtu);
        let end = end.setns_by_fd(there.as_fd().as_raw_fd()).build();
        let pair = LinkVeth::new(name, peer).set_info_data(InfoData::Veth(InfoVeth::Peer(end))).mtu(mtu).up().build();
        handle.link().add(pair).execute().await
    })?;
    there.run(|| up(peer))?
}

/// Makes a bridge and switches it on.
///
/// # Errors
/// When the kernel refuses.
pub fn bridge(name: &str) -> Result<(), Failure> {
    talk(format_args!("making the bridge {name}"), async |handle| {
        handle.link().add(LinkBridge::new(name).build()).execute().await
    })
}

/// Makes an interface a port of a bridge.
///
/// # Errors
/// When one of them is not there, or the kernel refuses.
pub fn enslave(name: &str, bridge: &str) -> Result<(), Failure> {
    let bridge_index = index(bridge)?;
    talk(format_args!("{name} into {bridge}"), async |handle| {
        handle.link().set(LinkUnspec::new_with_name(name).controller(bridge_index).build()).execute().await
    })
}

/// Gives an interface an IP address in a network of so many leading bits.
///
/// # Errors
/// When there is no such interface, or the kernel refuses.
pub fn address(name: &str, address: IpAddr, bits: u8) -> Result<(), Failure> {
    let index = index(name)?;
    talk(format_args!("address {address}/{bits} of {name}"), async |handle| {
        handle.address().add(index, address, bits).execute().await
    })
}

/// Sends what is for `to` (an address and leading bits) out of the interface `name`: straight, or through a gateway,
/// which need not be in one of the interface's networks.
///
/// # Errors
/// When there is no such interface, or the kernel refuses.
pub fn route(to: (IpAddr, u8), name: &str, gateway: Option<IpAddr>) -> Result<(), Failure> {
    let index = index(name)?;
    let failed = |error| format!("route to {}/{}: {error}", to.0, to.1);
    let mut route =
        RouteMessageBuilder::<IpAddr>::new().destination_prefix(to.0, to.1).map_err(failed)?.output_interface(index);
    route = match gateway {
        Some(gateway) => route.gateway(gateway).map_err(failed)?.onlink(),
        None => route.scope(rtnetlink::packet_route::route::RouteScope::Link),
    };
    let route = route.build();
    talk(format_args!("route to {}/{} through {name}", to.0, to.1), async |handle| {
        handle.route().add(route).execute().await
    })
}

/// Writes a setting of the calling thread's namespace, given as below /proc/sys/net.
///
/// # Errors
/// When there is none, or the kernel refuses.
pub fn sysctl(path: &str, value: &str) -> Result<(), Failure> {
    let path = format!("/proc/sys/net/{path}");
    Ok(std::fs::write(&path, value).map_err(|error| format!("{path}: {error}"))?)
}
