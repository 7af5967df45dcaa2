//! What is asked for one interface: keys of its backend's directory in XenStore, words of the command line, variables,
//! and for `antispoof` what was said of the bridge (`network-bridge start antispoof=`), then the machine's own settings,
//! in this order.
//!
//! The machine's settings are in /etc/xen/bridge-scripts.conf (for the programs, `BRIDGE_SCRIPTS_CONF` may name another
//! file), a line each, `#` begins a comment:
//!
//! ```text
//! antispoof = on                 # what holds where nothing else says; on without this line
//! xenbr7.antispoof = off         # for interfaces of this bridge
//! ```

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xenstore_client::spec::SpecError;
use xenstore_client::{Client, Store};

use super::vlan::{self, Vlans};
use super::words::{self, Network};
use super::{Error, Script};
use crate::state::Mac;

/// The machine's settings.
const CONF: &str = "/etc/xen/bridge-scripts.conf";

/// What is asked for one interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// How it is connected.
    pub script: Script,
    /// The device, as the backend named it.
    pub vif: String,
    /// The name it is to have; the same if none is asked for.
    pub name: String,
    /// The guest's domain.
    pub domid: u16,
    /// Which of the guest's interfaces it is.
    pub handle: u32,
    /// The guest's Ethernet address.
    pub mac: Mac,
    /// The guest's addresses.
    pub addresses: Vec<Network>,
    /// The bridge; the machine's first if none is named.
    pub bridge: Option<String>,
    /// The MTU; the bridge's if none is asked for.
    pub mtu: Option<u32>,
    /// The VLANs.
    pub vlans: Option<Vlans>,
    /// The device whose addresses dom0 uses towards the guest, and through which the guest is reached.
    pub gateway: Option<String>,
    /// Whether what the guest sends is filtered.
    pub antispoof: bool,
}

impl Settings {
    /// An interface of which only the name and address are known.
    pub fn new(script: Script, vif: &str, mac: Mac) -> Self {
        Self {
            script,
            vif: vif.to_owned(),
            name: vif.to_owned(),
            domid: 0,
            handle: 0,
            mac,
            addresses: Vec::new(),
            bridge: None,
            mtu: None,
            vlans: None,
            gateway: None,
            antispoof: true,
        }
    }
}

/// Where a setting that XenStore does not have may come from: words of the command line, then variables.
pub(super) type Words<'a> = &'a dyn Fn(&str) -> Option<String>;

fn key<T>(name: &'static str, read: Result<T, SpecError>) -> Result<T, Error> {
    read.map_err(|source| Error::Key { key: name, source: Box::new(source) })
}

/// Reads what is asked for the interface `vif`, whose backend's directory is `backend`.
///
/// # Errors
/// A key that is missing or says something that makes no sense, with the place.
pub(super) fn read(
    store: &Client,
    backend: &str,
    script: Script,
    vif: &str,
    tap: bool,
    words: Words<'_>,
) -> Result<Asked, Error> {
    // Most keys are not there, and asking for each takes a turn of XenStore's.
    let there = store.directory_opt(backend)?.unwrap_or_default();
    let stored = |name: &str| -> Result<Option<String>, Error> {
        if !there.iter().any(|key| key == name) {
            return Ok(None);
        }
        let value = store.read_opt(&format!("{backend}/{name}"))?;
        Ok(value.filter(|value| !value.is_empty()))
    };
    let given = |name: &str| -> Result<Option<String>, Error> {
        Ok(stored(name)?.or_else(|| words(name).filter(|value| !value.is_empty())))
    };
    let missing = |name: &'static str| Error::Missing { key: name, backend: backend.to_owned() };
    let number = |name: &'static str| -> Result<u32, Error> {
        let text = stored(name)?.ok_or_else(|| missing(name))?;
        text.parse().map_err(|_| Error::Number { key: name, value: text })
    };
    let mac = stored("mac")?.ok_or_else(|| missing("mac"))?;
    let domid = number("frontend-id")?;
    let domid = u16::try_from(domid).map_err(|_| Error::Number { key: "frontend-id", value: domid.to_string() })?;
    let name = match stored("vifname")? {
        Some(name) => key("vifname", words::device(&if tap { format!("{name}-emu") } else { name }))?,
        None => vif.to_owned(),
    };
    let bridge = given("bridge")?.map(|name| key("bridge", words::device(&name))).transpose()?;
    // libxl hands gatewaydev over as netdev too, which is also its name of old.
    let gateway = match stored("gatewaydev")? {
        Some(name) => Some(name),
        None => words("netdev").filter(|name| !name.is_empty()),
    };
    let said = given("antispoof")?.map(|word| key("antispoof", words::switch(&word))).transpose()?;
    let conf = words("BRIDGE_SCRIPTS_CONF").map_or_else(|| CONF.into(), PathBuf::from);
    let settings = Settings {
        script,
        vif: vif.to_owned(),
        name,
        domid,
        handle: number("handle")?,
        mac: key("mac", words::mac(&mac))?,
        addresses: given("ip")?.map_or_else(|| Ok(Vec::new()), |list| key("ip", words::addresses(&list)))?,
        bridge,
        mtu: stored("mtu")?.map(|text| key("mtu", words::mtu(&text))).transpose()?,
        vlans: stored("vlan")?.map(|text| key("vlan", vlan::parse(&text))).transpose()?,
        gateway: gateway.map(|name| key("gatewaydev", words::device(&name))).transpose()?,
        antispoof: true,
    };
    Ok(Asked { settings, said, conf })
}

/// What is asked, before the bridge is known.
#[derive(Debug)]
pub(super) struct Asked {
    /// All but whether there is a filter.
    pub(super) settings: Settings,
    /// What the interface itself says about its filter.
    said: Option<bool>,
    /// The file of the machine's settings.
    conf: PathBuf,
}

impl Asked {
    /// The settings, now that they name the bridge. `run` has the bridges' records. Where there is to be no filter, also
    /// who said so.
    ///
    /// # Errors
    /// The machine's settings make no sense.
    pub(super) fn decide(self, run: &Path) -> Result<(Settings, Option<String>), Error> {
        let bridge = self.settings.bridge.as_deref().filter(|_| self.settings.script == Script::Bridge);
        let (antispoof, who) = if let Some(said) = self.said {
            (said, "the interface's own settings say so".to_owned())
        } else if let Some((bridge, said)) = bridge.and_then(|name| Some((name, crate::network::antispoof(run, name)?)))
        {
            (said, format!("said of the bridge {bridge} (network-bridge start antispoof=no)"))
        } else {
            (machine_antispoof(&self.conf, bridge)?, format!("{} says so", self.conf.display()))
        };
        let who = (!antispoof).then(|| format!("antispoof=off: {who}"));
        Ok((Settings { antispoof, ..self.settings }, who))
    }
}

fn machine_antispoof(path: &Path, bridge: Option<&str>) -> Result<bool, Error> {
    match std::fs::read_to_string(path) {
        Ok(text) => antispoof_of(&text, path, bridge),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(true),
        Err(source) => Err(Error::File { path: path.to_owned(), source }),
    }
}

/// What a file of settings says about this bridge.
fn antispoof_of(text: &str, path: &Path, bridge: Option<&str>) -> Result<bool, Error> {
    let (mut all, mut own) = (true, None);
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        let wrong = |reason: String| Error::Settings { path: path.to_owned(), line: number, reason };
        let (key, value) = line.split_once('=').ok_or_else(|| wrong("a line is KEY = VALUE".to_owned()))?;
        let value = words::switch(value.trim()).map_err(|error| wrong(error.to_string()))?;
        match key.trim().rsplit_once('.') {
            None if key.trim() == "antispoof" => all = value,
            Some((name, "antispoof")) if bridge == Some(name) => own = Some(value),
            Some((_, "antispoof")) => {}
            _ => return Err(wrong(format!("unknown key {:?}: there are antispoof and BRIDGE.antispoof", key.trim()))),
        }
    }
    Ok(own.unwrap_or(all))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machines_settings() {
        let read = |text: &str, bridge| antispoof_of(text, Path::new("conf"), bridge);
        assert!(read("", None).unwrap());
        assert!(!read("antispoof = off # all\n", Some("xenbr0")).unwrap());
        let text = "\n# ours\nxenbr7.antispoof=off\neth0.411.antispoof = no\n";
        assert!(read(text, Some("xenbr0")).unwrap() && read(text, None).unwrap());
        assert!(!read(text, Some("xenbr7")).unwrap() && !read(text, Some("eth0.411")).unwrap());
        assert!(read("antispoof=off\nxenbr1.antispoof=on", Some("xenbr1")).unwrap());
        for (text, line) in [("antispof=on", 1), ("\nantispoof", 2), ("antispoof=perhaps", 1)] {
            let error = read(text, None).unwrap_err().to_string();
            assert!(error.starts_with(&format!("conf:{line}: ")), "{error}");
        }
    }
}
