//! vif-nat: a guest behind dom0's address.
//!
//! Without `ip=` the guest's address follows from its numbers, as the stock script has it: 10.D.E.N for the domain
//! 256·D + E and its interface N − 1, and the gateway is 127 above in the last byte. dom0 tells neither to the guest:
//! that is left to dnsmasq, see [`super::dnsmasq`].
//!
//! Packets are masqueraded by the table `inet xen-nat` of network-nat. Where that is missing, or is for other networks, the
//! interface brings a table of its own, `inet xen-nat-VIF`.

use std::net::{IpAddr, Ipv4Addr};

use super::plan::Draft;
use super::settings::Settings;
use super::words::Network;
use super::{Error, dnsmasq, route};
use crate::network::nat::TABLE;
use crate::nft::{Action, Chain, Family, Field, Hook, HookKind, HookPoint, Match, Policy, Rule, Table};
use crate::step::Step;

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
    let theirs = before.table(Family::Inet, TABLE).and_then(|table| table.content.as_ref());
    let masqueraded = |guest: &Network| theirs.is_some_and(|table| masquerades(table, guest.address));
    if guests.iter().all(masqueraded) {
        draft.drop_table(Family::Inet, &own_table(&settings.name));
    } else {
        draft.table(masquerade(&settings.name, &guests, route::gateway(settings, before).as_deref()));
    }
    route::endpoint(draft, &routers, &routes, &guests);
    if let Some(address) = guests.iter().find_map(|network| v4(*network)) {
        dnsmasq::enter(draft, address);
    }
    Ok(())
}

/// Whether network-nat's table has a rule for this address.
fn masquerades(table: &Table, address: IpAddr) -> bool {
    let rules = table.chains.iter().flat_map(|chain| &chain.rules);
    rules.filter(|rule| rule.action == Action::Masquerade).any(|rule| {
        rule.matches.iter().all(|part| match part {
            Match::Network { field: Field::IpSaddr | Field::Ip6Saddr, network, prefix } => {
                let inside = |address| Network { address, prefix: *prefix }.network();
                network.is_ipv4() == address.is_ipv4() && inside(*network) == inside(address)
            }
            _ => true,
        })
    })
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
        policy: Policy::Accept,
    };
    let rules = guests.iter().map(rule).collect();
    let chain = Chain { name: "postrouting".to_owned(), hook: Some(hook), rules };
    Table { family: Family::Inet, name: own_table(vif), sets: Vec::new(), chains: vec![chain] }
}

/// What is left when the interface is gone.
pub(super) fn forget(draft: &mut Draft<'_>) {
    for name in [&draft.settings.name, &draft.settings.vif] {
        let table = own_table(name);
        if !draft.steps.contains(&Step::DropTable(Family::Inet, table.clone())) {
            draft.drop_table(Family::Inet, &table);
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
    fn whom_network_nat_masquerades() {
        let covered = |networks: &[(&str, u8)], address: &str| {
            let networks: Vec<_> = networks.iter().map(|(text, prefix)| (text.parse().unwrap(), *prefix)).collect();
            masquerades(&crate::network::nat::table("eth0", &networks), address.parse().unwrap())
        };
        assert!(covered(&[], "10.0.1.1") && covered(&[], "fd00::1"));
        assert!(covered(&[("10.0.0.0", 16)], "10.0.1.1") && !covered(&[("10.0.0.0", 16)], "10.1.1.1"));
        assert!(!covered(&[("10.0.0.0", 16)], "fd00::1") && covered(&[("10.0.0.0", 16), ("fd00::", 64)], "fd00::1"));
    }
}
