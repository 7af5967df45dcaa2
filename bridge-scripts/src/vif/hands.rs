//! Whose addresses change hands, so that the connections the kernel tracks have to be forgotten: whoever has an address
//! next is not to get answers meant for another guest, nor the other way round. A guest that keeps its addresses keeps its
//! connections: a backend that comes back after its end must not cost them.

use std::net::IpAddr;

use super::plan::{record_name, sources};
use super::settings::Settings;
use crate::state::State;

/// Networks whose connections end with this event: for an interface that goes those it had, for one that comes those that
/// it did not have before, or has no more.
pub(super) fn changing(settings: &Settings, comes: bool, before: &State) -> Vec<(IpAddr, u8)> {
    let now = sources(settings).0;
    if !comes {
        return now;
    }
    let kept = before.records.get(&record_name(&settings.vif));
    let kept = kept.and_then(|text| serde_json::from_str::<Settings>(text).ok());
    let had = kept.as_ref().map(|kept| sources(kept).0).unwrap_or_default();
    let same = kept.is_some_and(|kept| {
        (kept.domid, kept.handle, kept.mac, kept.script)
            == (settings.domid, settings.handle, settings.mac, settings.script)
    });
    // An interface with the same address may have come since.
    let elsewhere = |network: &(IpAddr, u8)| {
        let devices = before.routes.iter().filter(|route| route.to == Some(*network)).map(|route| route.dev.as_ref());
        devices.flatten().any(|device| *device != settings.name && *device != settings.vif)
    };
    let gained = now.iter().filter(|network| !same || !had.contains(network) || elsewhere(network));
    let lost = had.iter().filter(|network| !now.contains(network));
    gained.chain(lost).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{Mac, Route};
    use crate::vif::Script;

    fn guest(script: Script, domid: u16, addresses: &[&str]) -> Settings {
        let addresses = addresses.iter().map(|text| crate::vif::words::addresses(text).unwrap()).collect::<Vec<_>>();
        let vif = format!("vif{domid}.0");
        Settings { domid, addresses: addresses.concat(), ..Settings::new(script, &vif, Mac::XEN) }
    }

    fn after(settings: &Settings) -> State {
        let record = (record_name(&settings.vif), serde_json::to_string(settings).unwrap());
        State { records: [record].into(), ..State::default() }
    }

    fn host(text: &str) -> (IpAddr, u8) {
        (text.parse().unwrap(), 32)
    }

    #[test]
    fn only_what_changes_hands() {
        let (one, two) = (host("10.0.0.1"), host("10.0.0.2"));
        for script in [Script::Route, Script::Nat] {
            let before = guest(script, 1, &["10.0.0.1", "10.0.0.2"]);
            let check = |now: &Settings, comes, state: &State, wanted: &[(IpAddr, u8)]| {
                assert_eq!(changing(now, comes, state), wanted, "{now:?}");
            };
            check(&before, true, &State::default(), &[one, two]);
            check(&before, true, &after(&before), &[]);
            check(&before, false, &after(&before), &[one, two]);
            check(&guest(script, 1, &["10.0.0.1"]), true, &after(&before), &[two]);
            check(&before, true, &after(&guest(script, 1, &["10.0.0.1"])), &[two]);
            check(&guest(script, 2, &["10.0.0.1"]), true, &after(&before), &[one]);
            check(&Settings { mac: Mac([2, 0, 0, 0, 0, 1]), ..before.clone() }, true, &after(&before), &[one, two]);
            // Another interface has taken the address.
            let route = Route::new(Some(one), false, "vif7.0");
            let mut state = after(&before);
            state.routes.push(route);
            check(&before, true, &state, &[one]);
            state.routes[0].dev = Some("vif1.0".to_owned());
            check(&before, true, &state, &[]);
        }
    }
}
