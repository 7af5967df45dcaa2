//! vif-nat: a guest behind dom0's address.
//!
//! Without `ip=` the guest's address follows from its numbers, as the stock script has it: 10.D.E.N for the domain
//! 256·D + E and its interface N − 1, and the gateway is 127 above in the last byte. dom0 tells neither to the guest; it
//! keeps a line for dnsmasq, `MAC,ADDRESS,NAME`, in the file dnsmasq-hosts of the run directory (`dhcp-hostsfile=`).
//!
//! Packets are masqueraded by the table `inet xen-nat` of network-nat. Where that is missing the interface brings a
//! table of its own, `inet xen-nat-VIF`.

use std::net::{IpAddr, Ipv4Addr};

use super::plan::Draft;
use super::settings::Settings;
use super::words::Network;
use super::{Error, route};
use crate::nft::{Action, Chain, Family, Field, Hook, HookKind, HookPoint, Match, Policy, Rule, Table};
use crate::step::Step;

/// The table of network-nat.
pub(super) const TABLE: &str = "xen-nat";
/// dnsmasq's file.
pub(super) const HOSTS: &str = "dnsmasq-hosts";

/// The guest's addresses: its own, or the one that follows from its numbers.
pub(super) fn addresses(settings: &Settings) -> Vec<Network> {
    let mut addresses = settings.addresses.clone();
    if !addresses.iter().any(|network| network.address.is_ipv4()) {
        let [high, low] = settings.domid.to_be_bytes();
        // Interfaces are few; the 256th would be the first again.
        let last = u8::try_from(settings.handle % 255).unwrap_or_default() + 1;
        addresses.insert(0, Network { address: Ipv4Addr::new(10, high, low, last).into(), prefix: 32 });
    }
    addresses
}

/// The guest's gateway: 127 above its address in the last byte, below it where that is too much.
pub(super) fn router(address: Ipv4Addr) -> Ipv4Addr {
    let [a, b, c, d] = address.octets();
    Ipv4Addr::new(a, b, c, if d < 128 { d + 127 } else { d - 127 })
}

/// What the guest may send from, and what not.
pub(super) fn sources(settings: &Settings) -> (Vec<(IpAddr, u8)>, Vec<IpAddr>) {
    let addresses = addresses(settings);
    let mut except: Vec<IpAddr> = addresses.iter().filter_map(|network| Some(router(v4(*network)?).into())).collect();
    except.extend(route::GATEWAY6.parse::<IpAddr>());
    (addresses.iter().map(|network| network.source()).collect(), except)
}

fn v4(network: Network) -> Option<Ipv4Addr> {
    match network.address {
        IpAddr::V4(address) => Some(address),
        IpAddr::V6(_) => None,
    }
}

fn own_table(vif: &str) -> String {
    format!("{TABLE}-{vif}")
}

pub(super) fn online(draft: &mut Draft<'_>) -> Result<(), Error> {
    let (settings, before) = (draft.settings, draft.before);
    let guests = addresses(settings);
    if let Some(network) = guests.iter().find(|network| !network.is_single() && !network.is_in_a_network()) {
        return Err(Error::Refused(format!(
            "vif-nat is for single addresses, and {network} is a network: use vif-route"
        )));
    }
    // A prefix tells the guest's netmask. The route is to the guest alone.
    let guests: Vec<Network> =
        guests.iter().map(|network| Network { prefix: network.source().1, ..*network }).collect();
    let routers: Vec<(IpAddr, u8)> =
        guests.iter().filter_map(|network| Some((router(v4(*network)?).into(), 32))).collect();
    let routes: Vec<_> = guests
        .iter()
        .map(|network| ((network.address, network.prefix), v4(*network).map(|address| router(address).into())))
        .collect();
    if before.table(Family::Inet, TABLE).is_none() {
        draft.table(masquerade(&settings.name, &guests, route::gateway(settings, before).as_deref()));
    }
    route::endpoint(draft, &routers, &routes, &guests);
    if let Some(address) = guests.iter().find_map(|network| v4(*network)) {
        let had = before.records.get(HOSTS).map_or("", String::as_str);
        let now = with_host(had, settings, Some(address));
        if now != had {
            draft.push(Step::Record { name: HOSTS.to_owned(), content: Some(now) });
        }
    }
    Ok(())
}

/// The table of an interface for which nobody has made one.
fn masquerade(vif: &str, guests: &[Network], out: Option<&str>) -> Table {
    let leaving = || match out {
        Some(device) => Match::is(Field::Oifname, device),
        None => Match::not(Field::Oifname, vif),
    };
    let rule = |network: &Network| {
        let field = if network.address.is_ipv4() { Field::IpSaddr } else { Field::Ip6Saddr };
        Rule::new(
            [Match::Is(field, crate::nft::Op::Eq, crate::nft::Value::Ip(network.address)), leaving()],
            Action::Masquerade,
        )
    };
    let hook = Hook {
        kind: HookKind::Nat,
        point: HookPoint::Postrouting,
        // NF_IP_PRI_NAT_SRC of linux/netfilter_ipv4.h.
        priority: 100,
        device: None,
        policy: Policy::Accept,
    };
    let rules = guests.iter().map(rule).collect();
    let chain = Chain { name: "postrouting".to_owned(), hook: Some(hook), rules };
    Table { family: Family::Inet, name: own_table(vif), sets: Vec::new(), chains: vec![chain] }
}

/// dnsmasq's lines with this guest's, or without.
fn with_host(lines: &str, settings: &Settings, address: Option<Ipv4Addr>) -> String {
    let own = format!("{},", settings.mac);
    let mut now: Vec<String> = lines.lines().filter(|line| !line.starts_with(&own)).map(str::to_owned).collect();
    if let Some(address) = address {
        let mut name = format!("dom{}", settings.domid);
        if settings.handle > 0 {
            name = format!("{name}-{}", settings.handle + 1);
        }
        now.push(format!("{own}{address},{name}"));
    }
    now.sort();
    now.into_iter().map(|line| line + "\n").collect()
}

/// What is left when the interface is gone.
pub(super) fn forget(draft: &mut Draft<'_>) {
    for name in [&draft.settings.name, &draft.settings.vif] {
        let table = own_table(name);
        if !draft.steps.contains(&Step::DropTable(Family::Inet, table.clone())) {
            draft.drop_table(Family::Inet, &table);
        }
    }
    if let Some(had) = draft.before.records.get(HOSTS) {
        let now = with_host(had, draft.settings, None);
        if now != *had {
            draft.push(Step::Record { name: HOSTS.to_owned(), content: Some(now) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Mac;
    use crate::vif::Script;

    #[test]
    fn addresses_follow_from_numbers() {
        let mut settings = Settings::new(Script::Nat, "vif1.0", Mac([0, 0x16, 0x3e, 0, 0, 1]));
        for (domid, handle, expected, gateway) in [
            (1, 0, "10.0.1.1", "10.0.1.128"),
            (62, 2, "10.0.62.3", "10.0.62.130"),
            (32751, 200, "10.127.239.201", "10.127.239.74"),
        ] {
            (settings.domid, settings.handle) = (domid, handle);
            let address = v4(addresses(&settings)[0]).unwrap();
            assert_eq!((address.to_string().as_str(), router(address).to_string().as_str()), (expected, gateway));
        }
    }

    #[test]
    fn lines_for_dnsmasq() {
        let mut one = Settings::new(Script::Nat, "vif1.0", Mac([0, 0x16, 0x3e, 0, 0, 1]));
        one.domid = 1;
        let two = Settings { mac: Mac([0, 0x16, 0x3e, 0, 0, 2]), handle: 1, ..one.clone() };
        let first = with_host("", &one, Some(Ipv4Addr::new(10, 0, 1, 1)));
        assert_eq!(first, "00:16:3e:00:00:01,10.0.1.1,dom1\n");
        let both = with_host(&first, &two, Some(Ipv4Addr::new(10, 0, 1, 2)));
        assert_eq!(both, format!("{first}00:16:3e:00:00:02,10.0.1.2,dom1-2\n"));
        assert_eq!(with_host(&both, &one, Some(Ipv4Addr::new(10, 0, 1, 1))), both);
        assert_eq!(with_host(&both, &two, None), first);
    }
}
