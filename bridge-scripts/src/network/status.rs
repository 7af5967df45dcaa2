//! What `status` prints.

use std::fmt::Write as _;

use super::forwarding;
use super::nat;
use super::record::{Layout, Record};
use crate::state::{LinkState, State};

/// A table: one line a bridge, with its card, ports, addresses, and how its guests are filtered.
pub fn bridges(state: &State, only: Option<&str>) -> String {
    let header = ["bridge", "card", "layout", "addresses", "ports", "filters"].map(str::to_owned);
    let mut rows = vec![header.to_vec()];
    for (name, link) in
        state.links.iter().filter(|(name, link)| link.is_bridge() && only.is_none_or(|only| only == *name))
    {
        rows.push(row(state, name, link));
    }
    if rows.len() == 1 {
        return match only {
            Some(name) => format!("there is no bridge {name}\n"),
            None => "there is no bridge\n".to_owned(),
        };
    }
    let mut text = table(&rows);
    for row in rows.iter().skip(1) {
        for line in crate::vif::forward::advice(state, row[0].trim_end_matches(" (down)")) {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{line}");
        }
    }
    text
}

fn row(state: &State, name: &str, link: &LinkState) -> Vec<String> {
    let record = Record::find(state, name);
    let card = record.as_ref().and_then(Record::port);
    let layout = match &record {
        Some(Record { layout: Layout::Xen3, .. }) => "xen3",
        Some(Record { netdev: None, .. }) => "host-only",
        Some(_) => "bridge",
        None => "not ours",
    };
    // In Xen 3's layout dom0's addresses are on the interface named as the card was.
    let holder = match &record {
        Some(Record { layout: Layout::Xen3, netdev: Some(netdev), .. }) => netdev.as_str(),
        _ => name,
    };
    let mut addresses: Vec<String> = Vec::new();
    for address in state.addresses_of(holder).filter(|address| address.scope == 0) {
        addresses.push(format!("{}/{}", address.local, address.prefix));
    }
    let ports: Vec<&str> = state.ports_of(name).filter(|port| Some(*port) != card.as_deref()).collect();
    let guests = ports.iter().filter(|port| is_filtered(state, port)).count();
    let own = record.as_ref().and_then(|record| record.own_port.as_ref());
    let all = ports.iter().filter(|port| own.is_none_or(|own| own != *port)).count();
    let said = match record.as_ref().and_then(|record| record.antispoof) {
        Some(true) => ", antispoof=yes",
        Some(false) => ", antispoof=no",
        None => "",
    };
    let list = |list: &[String]| if list.is_empty() { "-".to_owned() } else { list.join(" ") };
    let ports: Vec<String> = ports.into_iter().map(str::to_owned).collect();
    vec![
        if link.up { name.to_owned() } else { format!("{name} (down)") },
        card.unwrap_or_else(|| "-".to_owned()),
        layout.to_owned(),
        list(&addresses),
        list(&ports),
        format!("{guests} of {all} ports{said}"),
    ]
}

/// Whether the kernel has the filter of a port as we made it.
fn is_filtered(state: &State, port: &str) -> bool {
    state.filters.get(port).is_some_and(Option::is_some)
}

/// Columns as wide as they need.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            // Writing to a String cannot fail.
            let _ = write!(line, "{cell:width$}  ");
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

/// What network-route has to say.
pub fn routing(state: &State, netdev: &str) -> String {
    let value = |path: &str| state.sysctls.get(path).map_or("unknown", |value| if value == "0" { "off" } else { "on" });
    let started = if forwarding::has(state, &format!("route {netdev}")) { "started" } else { "not started" };
    format!(
        "network-route on {netdev}: {started}\nIPv4 forwarding {}, IPv6 forwarding {}, proxy ARP on {netdev} {}\n",
        value("net/ipv4/ip_forward"),
        value("net/ipv6/conf/all/forwarding"),
        value(&format!("net/ipv4/conf/{netdev}/proxy_arp")),
    )
}

/// What network-nat has to say.
pub fn translation(state: &State) -> String {
    let table = state.tables.iter().find(|table| table.name == nat::TABLE);
    let mut text = match table {
        Some(table) => match &table.content {
            Some(content) => format!("network-nat: started\n{content}"),
            None => {
                format!("network-nat: the table inet {} is there, and is not as network-nat makes it\n", nat::TABLE)
            }
        },
        None => "network-nat: not started\n".to_owned(),
    };
    if let Some(conf) = state.records.get(nat::DNSMASQ) {
        text += &format!("for dnsmasq:\n{conf}");
    }
    text
}
