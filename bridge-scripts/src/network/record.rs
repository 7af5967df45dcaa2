//! What network-bridge remembers about a bridge it made: a file `bridge-NAME.json` in the run directory.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::state::{Mac, State};
use crate::step::Step;

/// How the bridge and the card stand to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Layout {
    /// Today's: the card is a port of the bridge, the bridge has the machine's addresses.
    #[default]
    Bridge,
    /// Xen 3's: the card is renamed to peth0 and is a port; a pair stands in for netloop, one end named as the card was.
    Xen3,
}

/// A bridge as network-bridge made it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The bridge.
    pub bridge: String,
    /// The card, by the name it had; none for a host-only network.
    pub netdev: Option<String>,
    /// The layout.
    pub layout: Layout,
    /// dom0's own port in Xen 3's layout: `vif0.0`.
    pub own_port: Option<String>,
    /// Whether the bridge was made, and is to be deleted.
    pub made_bridge: bool,
    /// Whether the card was made too (a VLAN, a dummy device).
    pub made_netdev: bool,
    /// The card's address before.
    pub mac: Option<Mac>,
    /// Whether the card was up before.
    pub was_up: bool,
    /// The card's disable_ipv6 before.
    pub disable_ipv6: Option<String>,
    /// What the administrator said about filtering guests' interfaces of this bridge that say nothing themselves.
    pub antispoof: Option<bool>,
}

/// The beginning of the records' names.
pub const PREFIX: &str = "bridge-";

impl Record {
    /// The name of a bridge's record.
    pub fn name(bridge: &str) -> String {
        format!("{PREFIX}{bridge}.json")
    }

    /// The record of a bridge, where it was asked for and can be read.
    pub fn find(state: &State, bridge: &str) -> Option<Self> {
        state.records.get(&Self::name(bridge)).and_then(|text| serde_json::from_str(text).ok())
    }

    /// All records in a state.
    pub fn all(state: &State) -> Vec<Self> {
        let ours = state.records.iter().filter(|(name, _)| name.starts_with(PREFIX));
        ours.filter_map(|(_, text)| serde_json::from_str(text).ok()).collect()
    }

    /// The step that keeps it.
    pub(super) fn keep(&self) -> Step {
        // Strings, numbers and booleans: nothing that could fail.
        let content = serde_json::to_string(self).unwrap_or_default();
        Step::Record { name: Self::name(&self.bridge), content: Some(content) }
    }

    /// The step that forgets it.
    pub(super) fn forget(&self) -> Step {
        Step::Record { name: Self::name(&self.bridge), content: None }
    }
}

/// What was said on network-bridge about filtering guests' interfaces (`antispoof=`) of this bridge. `None` if nothing was,
/// or if the bridge is not one of ours; vif-bridge then filters.
pub fn antispoof(run: &Path, bridge: &str) -> Option<bool> {
    let text = std::fs::read_to_string(run.join(Record::name(bridge))).ok()?;
    serde_json::from_str::<Record>(&text).ok()?.antispoof
}
