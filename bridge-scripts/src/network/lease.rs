//! Addresses that somebody else has to keep alive. A DHCP client that runs on a card hears nothing once the card is a
//! bridge's port: the address would go when its lease ends, long after `--confirm`. So a card with such an owner is refused,
//! with what to write so that the owner makes the bridge itself. What a router advertises is the kernel's to keep, on the
//! bridge as well. Pure: from a [`State`] and [`Owners`] to a sentence.

use std::net::{IpAddr, Ipv6Addr};

use super::bridge::Pair;
use super::owners::{Client, Owners};
use crate::state::{FOREVER, Mac, State};

/// Why this card's addresses would not last on the bridge, and what to do instead.
pub(super) fn objection(state: &State, owners: &Owners, pair: &Pair) -> Option<String> {
    let Pair { netdev, bridge } = pair;
    let mac = state.links.get(netdev).and_then(|card| card.mac);
    let hint = format!(
        "\nOr say force=yes: {bridge} takes the addresses as they are, and {netdev}'s keeper has to be told by you"
    );
    let advice = network_manager(state, owners, netdev, bridge, mac)
        .or_else(|| networkd(owners, netdev, bridge, mac))
        .or_else(|| dhcp_client(state, owners, netdev, bridge))
        .or_else(|| autoconfigured(state, netdev, bridge, mac));
    advice.map(|advice| advice + &hint)
}

fn key<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.trim().strip_prefix(name)?.trim_start().strip_prefix('=')).map(str::trim)
}

fn network_manager(state: &State, owners: &Owners, netdev: &str, bridge: &str, mac: Option<Mac>) -> Option<String> {
    let text = owners.network_manager.get(netdev)?;
    if key(text, "managed") != Some("true") {
        return None;
    }
    let old = key(text, "connection-uuid")
        .map_or_else(String::new, |uuid| format!("    nmcli connection modify {uuid} connection.autoconnect no\n"));
    let ethernet = mac.map_or_else(String::new, |mac| format!(" bridge.mac-address {mac}"));
    let token = same_suffix(state, netdev, mac).unwrap_or_default();
    Some(format!(
        "NetworkManager looks after {netdev}, and would go on configuring the card instead of {bridge}. Let it make the \
         bridge:\n\
         {old}    nmcli connection add type bridge ifname {bridge} con-name {bridge} bridge.stp no{ethernet}{token} \
         connection.autoconnect-slaves 1\n\
         \x20   nmcli connection add type bridge-slave ifname {netdev} con-name {bridge}-{netdev} master {bridge}\n\
         \x20   nmcli connection up {bridge}\n\
         (addresses that were set by hand: nmcli connection modify {bridge} ipv4.method manual ipv4.addresses ...)"
    ))
}

/// What tells NetworkManager to end the bridge's IPv6 addresses as the card's end: by itself it makes them from a secret
/// and the link's name.
fn same_suffix(state: &State, netdev: &str, mac: Option<Mac>) -> Option<String> {
    let advertised: Vec<Ipv6Addr> = state
        .addresses_of(netdev)
        .filter(|address| address.valid != FOREVER && address.prefix == 64)
        .filter_map(|address| match address.local {
            IpAddr::V6(local) if !local.is_unicast_link_local() => Some(local),
            _ => None,
        })
        .collect();
    if advertised.iter().any(|local| mac.is_some_and(|mac| made_from(*local, mac))) {
        return Some(" ipv6.addr-gen-mode eui64".to_owned());
    }
    // Of several it is not clear which one is to stay: some are temporary.
    let [only] = advertised.as_slice() else { return None };
    Some(format!(" ipv6.addr-gen-mode eui64 ipv6.token {}", suffix(*only)))
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
    // The first file that matches a link counts.
    let base = file.rsplit('/').next().unwrap_or(file);
    let before =
        ["05", "00", "-"].into_iter().find(|before| format!("{before}-{bridge}").as_str() < base).unwrap_or("-");
    Some(format!(
        "systemd-networkd looks after {netdev} ({file}), and would go on configuring the card instead of {bridge}. Let it \
         make the bridge with these files in /etc/systemd/network, then networkctl reload:\n\
         {bridge}.netdev:\n    [NetDev]\n    Name={bridge}\n    Kind=bridge\n{mac}\
         {before}-{bridge}-port.network:\n    [Match]\n    Name={netdev}\n    [Network]\n    Bridge={bridge}\n\
         {before}-{bridge}.network (instead of DHCP=yes, what {file} says of addresses):\n    [Match]\n    Name={bridge}\n    \
         [Network]\n    DHCP=yes"
    ))
}

fn dhcp_client(state: &State, owners: &Owners, netdev: &str, bridge: &str) -> Option<String> {
    // dhcpcd gives what a router advertises too, with the network's prefix; DHCPv6 leases single addresses.
    let leased: Vec<String> = state
        .addresses_of(netdev)
        .filter(|address| address.valid != FOREVER && (address.local.is_ipv4() || address.prefix == 128))
        .map(|address| format!("{}/{}", address.local, address.prefix))
        .collect();
    // One for IPv4 and one for IPv6, perhaps.
    let clients: Vec<&Client> = owners.clients.iter().filter(|client| holds(client, netdev, state)).collect();
    let client = clients.first()?;
    let what = if leased.is_empty() { "its address".to_owned() } else { leased.join(", ") };
    let begin = format!(
        "{netdev} has {what} by DHCP: {} (process {}) would go on looking after {netdev} instead of {bridge}, and the host \
         would lose its address when the lease ends.",
        client.name(),
        client.pid
    );
    let kill = clients.iter().map(|client| format!("kill {}; ", client.pid)).collect::<String>();
    if let Some(ifupdown) = ifupdown(owners, netdev, bridge) {
        let leases: String = clients.iter().filter_map(|client| client.leases_for(netdev, bridge)).collect();
        return Some(format!("{begin} {ifupdown} in one line:\n    {kill}ifdown {netdev}; {leases}ifup {bridge}"));
    }
    let start = format!("network-bridge start netdev={netdev} bridge={bridge} force=yes");
    if client.name() == "dhcpcd" {
        let (configure, end, begin_again) = client.dhcpcd(netdev, bridge);
        return Some(format!("{begin} {configure} in one line:\n    {end}; {start}; {begin_again}"));
    }
    let there: Vec<String> = clients.iter().map(|client| client.on(netdev, bridge)).collect();
    Some(format!("{begin} Hand it over, in one line:\n    {kill}{start}; {}", there.join("; ")))
}

/// What to write so that ifupdown makes the bridge, if a DHCP client of this card is its.
fn ifupdown(owners: &Owners, netdev: &str, bridge: &str) -> Option<String> {
    let stanzas = |text: &str| stanzas(text, netdev);
    let methods: Vec<(String, String)> = owners.interfaces.iter().flat_map(|(_, text)| stanzas(text)).collect();
    let (file, _) =
        owners.interfaces.iter().find(|(_, text)| stanzas(text).iter().any(|(_, method)| method == "dhcp"))?;
    let first = methods.iter().find(|(_, method)| method != "manual").map(|(family, _)| family);
    let own = methods.iter().map(|(family, method)| {
        let ports = format!("        bridge_ports {netdev}\n        bridge_stp off\n        bridge_fd 0\n");
        format!("    iface {bridge} {family} {method}\n{}", if first == Some(family) { &ports } else { "" })
    });
    Some(format!(
        "Let ifupdown make the bridge: in {file} write, in the place of {netdev}'s lines,\n\
         \x20   iface {netdev} inet manual\n    auto {bridge}\n{}(package bridge-utils), then,",
        own.collect::<String>()
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
        // All cards, but for those that its configuration excludes; what it gives has a lifetime.
        ("dhcpcd", true) => {
            state.addresses_of(netdev).any(|address| address.valid != FOREVER && !address.is_advertised())
        }
        (_, true) => true,
    }
}

impl Client {
    fn name(&self) -> &str {
        let base = |index: usize| self.words.get(index).and_then(|word| word.rsplit('/').next()).unwrap_or_default();
        if base(0) == "busybox" { base(1) } else { base(0) }
    }

    /// The step that gives the bridge's client the leases of the card's, so that it asks for the same address: ifupdown's
    /// clients have a file for each link, with the identifier that the server knows them by.
    fn leases_for(&self, netdev: &str, bridge: &str) -> Option<String> {
        let at = self.words.iter().position(|word| word == "-lf")?;
        let file = self.words.get(at + 1).filter(|file| file.contains(netdev))?;
        Some(format!("sed s/{netdev}/{bridge}/ {file} > {}; ", file.replacen(netdev, bridge, 1)))
    }

    /// What to write, how dhcpcd ends and how it begins on another link. What it shows is no command line: its links and
    /// families, or that it is the manager of all links.
    fn dhcpcd(&self, netdev: &str, bridge: &str) -> (String, String, String) {
        let shows = |word: &str| self.words.iter().any(|shown| shown == word);
        // `dhcpcd -x` waits for its end, which may take addresses along.
        if shows("[manager]") || shows("[master]") {
            let lines = format!(
                "Write at the end of /etc/dhcpcd.conf\n    denyinterfaces {netdev} vif*\n    interface {bridge}\nand then,"
            );
            return (lines, "dhcpcd -x".to_owned(), "dhcpcd".to_owned());
        }
        let family = match (shows("[ip4]"), shows("[ip6]")) {
            (true, false) => "-4 ",
            (false, true) => "-6 ",
            _ => "",
        };
        ("Hand it over,".to_owned(), format!("dhcpcd -x {family}{netdev}"), format!("dhcpcd {family}{bridge}"))
    }

    /// Its command line for another link.
    fn on(&self, from: &str, to: &str) -> String {
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
        address.is_advertised() && mac.is_none_or(|mac| !made_from(local, mac))
    })?;
    let IpAddr::V6(local) = secret.local else { return None };
    let token = suffix(local);
    Some(format!(
        "{netdev} has {local}/{} by a router's advertisement and a secret (addr_gen_mode {mode}): on {bridge} the kernel would \
         make another address. Give {bridge} this one:\n    network-bridge start netdev={netdev} bridge={bridge} \
         force=yes; ip token set {token} dev {bridge}",
        secret.prefix
    ))
}

/// The last 64 bits, which a link adds to a router's prefix.
fn suffix(address: Ipv6Addr) -> Ipv6Addr {
    Ipv6Addr::from(address.to_bits() & u128::from(u64::MAX))
}

/// Whether the last 64 bits are those that RFC 4291 makes of an Ethernet address.
fn made_from(address: Ipv6Addr, mac: Mac) -> bool {
    let [a, b, c, d, e, f] = mac.0;
    address.octets()[8..] == [a ^ 2, b, c, 0xff, 0xfe, d, e, f]
}

#[cfg(test)]
mod tests;
