//! Addresses that somebody else has to keep alive. A DHCP client that runs on a card hears nothing once the card is a
//! bridge's port: the address would go when its lease ends, long after `--confirm`. So a card with such an owner is refused,
//! with what to write so that the owner makes the bridge itself. What a router advertises is the kernel's to keep, on the
//! bridge as well. Pure: from a [`State`] and [`Owners`] to a sentence.

use std::net::{IpAddr, Ipv6Addr};

use super::bridge::Pair;
use super::owners::{Client, Owners};
use crate::state::{Address, FOREVER, Mac, State};

/// Why this card's addresses would not last on the bridge, and what to do instead.
pub(super) fn objection(state: &State, owners: &Owners, pair: &Pair) -> Option<String> {
    let Pair { netdev, bridge } = pair;
    let mac = state.links.get(netdev).and_then(|card| card.mac);
    let hint = format!(
        "\nOr say force=yes: {bridge} takes the addresses as they are, and {netdev}'s keeper has to be told by you"
    );
    let advice = network_manager(owners, netdev, bridge, mac)
        .or_else(|| networkd(owners, netdev, bridge, mac))
        .or_else(|| dhcp_client(state, owners, netdev, bridge))
        .or_else(|| autoconfigured(state, netdev, bridge, mac));
    advice.map(|advice| advice + &hint)
}

fn key<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.trim().strip_prefix(name)?.trim_start().strip_prefix('=')).map(str::trim)
}

fn network_manager(owners: &Owners, netdev: &str, bridge: &str, mac: Option<Mac>) -> Option<String> {
    let text = owners.network_manager.get(netdev)?;
    if key(text, "managed") != Some("true") {
        return None;
    }
    let old = key(text, "connection-uuid")
        .map_or_else(String::new, |uuid| format!("    nmcli connection modify {uuid} connection.autoconnect no\n"));
    let mac = mac.map_or_else(String::new, |mac| format!(" bridge.mac-address {mac}"));
    Some(format!(
        "NetworkManager looks after {netdev}, and would go on configuring the card instead of {bridge}. Let it make the \
         bridge:\n\
         {old}    nmcli connection add type bridge ifname {bridge} con-name {bridge} bridge.stp no{mac} \
         connection.autoconnect-slaves 1\n\
         \x20   nmcli connection add type bridge-slave ifname {netdev} con-name {bridge}-{netdev} master {bridge}\n\
         \x20   nmcli connection up {bridge}\n\
         (addresses that were set by hand: nmcli connection modify {bridge} ipv4.method manual ipv4.addresses ...)"
    ))
}

fn networkd(owners: &Owners, netdev: &str, bridge: &str, mac: Option<Mac>) -> Option<String> {
    let text = owners.networkd.get(netdev)?;
    if matches!(key(text, "ADMIN_STATE"), None | Some("unmanaged" | "pending" | "failed" | "linger")) {
        return None;
    }
    let file = key(text, "NETWORK_FILE")?;
    if file.rsplit('/').next().is_some_and(|name| name.contains("-netplan-")) {
        let mac = mac.map_or_else(String::new, |mac| format!("          macaddress: {mac}\n"));
        return Some(format!(
            "netplan and systemd-networkd look after {netdev}, and would go on configuring the card instead of {bridge}. \
             Write in /etc/netplan (what {netdev} has there, addresses or dhcp4, goes to the bridge), then netplan try:\n\
             \x20   network:\n      ethernets:\n        {netdev}: {{}}\n      bridges:\n        {bridge}:\n          \
             interfaces: [{netdev}]\n{mac}          dhcp4: true"
        ));
    }
    let mac = mac.map_or_else(String::new, |mac| format!("    MACAddress={mac}\n"));
    Some(format!(
        "systemd-networkd looks after {netdev} ({file}), and would go on configuring the card instead of {bridge}. Let it \
         make the bridge with these files in /etc/systemd/network, then networkctl reload:\n\
         {bridge}.netdev:\n    [NetDev]\n    Name={bridge}\n    Kind=bridge\n{mac}\
         05-{bridge}-port.network:\n    [Match]\n    Name={netdev}\n    [Network]\n    Bridge={bridge}\n\
         {bridge}.network (instead of DHCP=yes, what {file} says of addresses):\n    [Match]\n    Name={bridge}\n    \
         [Network]\n    DHCP=yes"
    ))
}

fn dhcp_client(state: &State, owners: &Owners, netdev: &str, bridge: &str) -> Option<String> {
    let client = owners.clients.iter().find(|client| holds(client, netdev, state))?;
    let leased: Vec<String> = state
        .addresses_of(netdev)
        .filter(|address| address.valid != FOREVER)
        .map(|address| format!("{}/{}", address.local, address.prefix))
        .collect();
    let what = if leased.is_empty() { "its address".to_owned() } else { leased.join(", ") };
    let begin = format!(
        "{netdev} has {what} by DHCP: its client ({}, process {}) would not hear the server any more once {netdev} is a \
         port of {bridge}, and the host would lose its address when the lease ends.",
        client.name(),
        client.pid
    );
    let methods = stanzas(&owners.interfaces, netdev);
    if methods.iter().any(|(_, method)| method == "dhcp") {
        let own = methods.iter().map(|(family, method)| {
            let ports = "        bridge_ports NETDEV\n        bridge_stp off\n        bridge_fd 0\n";
            let first = methods.iter().find(|(_, method)| method != "manual").map(|(family, _)| family);
            let ports = if first == Some(family) { ports.replace("NETDEV", netdev) } else { String::new() };
            format!("    iface {bridge} {family} {method}\n{ports}")
        });
        return Some(format!(
            "{begin} Let ifupdown make the bridge: in /etc/network/interfaces write, in the place of {netdev}'s lines,\n\
             \x20   iface {netdev} inet manual\n    auto {bridge}\n{}(package bridge-utils), then: ifdown {netdev}; ifup \
             {bridge}",
            own.collect::<String>()
        ));
    }
    Some(format!(
        "{begin} Hand it over, in one line:\n    kill {}; network-bridge start netdev={netdev} bridge={bridge} force=yes; {}",
        client.pid,
        client.on(netdev, bridge)
    ))
}

/// What ifupdown is to do with this card: families and methods.
fn stanzas(interfaces: &str, netdev: &str) -> Vec<(String, String)> {
    let lines = interfaces.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let mut found: Vec<(String, String)> = Vec::new();
    for line in lines {
        if let ["iface", name, family @ ("inet" | "inet6"), method, ..] = line.as_slice()
            && *name == netdev
        {
            found.push(((*family).to_owned(), (*method).to_owned()));
        }
    }
    found
}

/// Whether a client looks after this card: it names it, or none at all.
fn holds(client: &Client, netdev: &str, state: &State) -> bool {
    let given = |word: &str| word.rsplit('=').next().unwrap_or(word).trim_start_matches("-i").to_owned();
    let named: Vec<String> =
        client.words.iter().map(|word| given(word)).filter(|word| state.links.contains_key(word)).collect();
    match (client.name(), named.is_empty()) {
        (_, false) => named.iter().any(|name| name == netdev),
        // What it takes when nothing is said.
        ("udhcpc", true) => netdev == "eth0",
        (_, true) => true,
    }
}

impl Client {
    fn name(&self) -> &str {
        let base = |index: usize| self.words.get(index).and_then(|word| word.rsplit('/').next()).unwrap_or_default();
        if base(0) == "busybox" { base(1) } else { base(0) }
    }

    /// Its command line for another link.
    fn on(&self, from: &str, to: &str) -> String {
        if self.name() == "dhcpcd" {
            // What it shows is no command line.
            return format!("dhcpcd {to}");
        }
        let mut words: Vec<String> = Vec::new();
        for word in &self.words {
            let (head, last) = word.split_at(word.rfind(['=']).map_or(0, |at| at + 1));
            words.push(match last {
                last if last == from => format!("{head}{to}"),
                last if last.strip_prefix("-i") == Some(from) => format!("-i{to}"),
                _ => word.clone(),
            });
        }
        if words == self.words {
            words.extend(if self.name() == "udhcpc" {
                vec!["-i".to_owned(), to.to_owned()]
            } else {
                vec![to.to_owned()]
            });
        }
        words.join(" ")
    }
}

/// An address that the kernel made from a router's advertisement, of which it would make another one on the bridge: the
/// bridge has the card's Ethernet address, but not its secret.
fn autoconfigured(state: &State, netdev: &str, bridge: &str, mac: Option<Mac>) -> Option<String> {
    let mode = state.sysctls.get(&format!("net/ipv6/conf/{netdev}/addr_gen_mode"))?;
    // 2 and 3: by a secret, IN6_ADDR_GEN_MODE_STABLE_PRIVACY and _RANDOM of linux/if_link.h.
    if mode != "2" && mode != "3" {
        return None;
    }
    let secret = state.addresses_of(netdev).find(|address| {
        let IpAddr::V6(local) = address.local else { return false };
        is_advertised(address) && mac.is_none_or(|mac| !made_from(local, mac))
    })?;
    let IpAddr::V6(local) = secret.local else { return None };
    let token = Ipv6Addr::from(local.to_bits() & u128::from(u64::MAX));
    Some(format!(
        "{netdev} has {local}/{} by a router's advertisement and a secret (addr_gen_mode {mode}): on {bridge} the kernel would \
         make another address. Give {bridge} this one:\n    network-bridge start netdev={netdev} bridge={bridge} \
         force=yes; ip token set {token} dev {bridge}",
        secret.prefix
    ))
}

/// Whether the kernel made an address from a router's advertisement (IFAPROT_KERNEL_RA of linux/if_addr.h), for a time.
pub(super) fn is_advertised(address: &Address) -> bool {
    address.valid != FOREVER && address.protocol == Some(2)
}

/// Whether the last 64 bits are those that RFC 4291 makes of an Ethernet address.
fn made_from(address: Ipv6Addr, mac: Mac) -> bool {
    let [a, b, c, d, e, f] = mac.0;
    address.octets()[8..] == [a ^ 2, b, c, 0xff, 0xfe, d, e, f]
}

#[cfg(test)]
mod tests;
