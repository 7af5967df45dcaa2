//! Interface specifications, as administrators have written them since xend: `mac=00:16:3e:3f:a9:06, bridge=xenbr0`.
//!
//! The grammar is that of xl-network-configuration(5) and of `parse_nic_config` in xl (`tools/xl/xl_parse.c`), with the
//! keys of xend's days. Beyond both, `ip=` takes several addresses, and `antispoof=off` is known. It is stricter in this:
//! values are checked (xl takes `mac=0x1:2`, and any text for an address), nothing is given twice, and nothing that is
//! not understood is passed over in silence. White space around names and values means nothing, as in xm.

mod grammar;
mod rate;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Read as _};
use std::str::FromStr;

use bridge_scripts::vif::words;
use grammar::{Draft, Places};
use xenstore_client::spec::{Fault, Param, Word, strings};

pub use bridge_scripts::state::Mac;
pub use bridge_scripts::vif::words::Network;
pub use rate::Rate;
pub use xenstore_client::spec::SpecError;

/// The hotplug programs that this project does itself.
pub const SCRIPTS: [&str; 3] = ["vif-bridge", "vif-route", "vif-nat"];

/// `type=`: what an HVM guest sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NicType {
    /// The paravirtual interface alone.
    Vif,
    /// Beside it a card that the device model emulates.
    Ioemu,
}

/// One interface. The default is what the empty specification says: everything is chosen when it is attached.
#[derive(Debug, Clone, Default)]
pub struct VifSpec {
    /// `mac=`: the guest's address. `None`: one at random.
    pub mac: Option<Mac>,
    /// `bridge=`; `None` is `xenbr0`.
    pub bridge: Option<String>,
    /// `gatewaydev=`, or `netdev=` of old: the interface whose address vif-route uses.
    pub gatewaydev: Option<String>,
    /// `ip=`: the only addresses the guest may use; empty for no limit.
    pub ip: Vec<Network>,
    /// `script=`: the hotplug program, a name in /etc/xen/scripts or a path. `None` is `vif-bridge`.
    pub script: Option<String>,
    /// `backend=`: the driver domain, by name or number. `None` is the one that is asked.
    pub backend: Option<String>,
    /// `vifname=`: what the interface is called in the backend's domain, instead of `vifDOMAIN.DEVICE`.
    pub vifname: Option<String>,
    /// `rate=`: how much the guest may send.
    pub rate: Option<Rate>,
    /// `devid=`: the device's number. `None`: the lowest one that is free.
    pub devid: Option<u32>,
    /// `mtu=`: bytes of an IP packet. `None`: the bridge's, or 1500.
    pub mtu: Option<u32>,
    /// `vlan=`: the VLANs of the bridge's port, as written.
    pub vlan: Option<String>,
    /// `type=`.
    pub nic_type: Option<NicType>,
    /// `model=`: which card the device model emulates.
    pub model: Option<String>,
    /// `trusted`, `untrusted`; `None` where nothing was said.
    pub trusted: Option<bool>,
    /// `antispoof=`: whether the guest is held to its own addresses; `None` where nothing was said, which means on.
    pub antispoof: Option<bool>,
    /// Sentences for who wrote it: which old spellings were accepted, and what has no effect.
    pub notes: Vec<String>,
}

impl PartialEq for VifSpec {
    /// The same interface; the notes do not count.
    fn eq(&self, other: &Self) -> bool {
        // Taken apart by name, so that a new field cannot be forgotten here.
        let Self {
            mac,
            bridge,
            gatewaydev,
            ip,
            script,
            backend,
            vifname,
            rate,
            devid,
            mtu,
            vlan,
            nic_type,
            model,
            trusted,
            antispoof,
            notes: _,
        } = self;
        *mac == other.mac
            && *bridge == other.bridge
            && *gatewaydev == other.gatewaydev
            && *ip == other.ip
            && *script == other.script
            && *backend == other.backend
            && *vifname == other.vifname
            && *rate == other.rate
            && *devid == other.devid
            && *mtu == other.mtu
            && *vlan == other.vlan
            && *nic_type == other.nic_type
            && *model == other.model
            && *trusted == other.trusted
            && *antispoof == other.antispoof
    }
}

impl Eq for VifSpec {}

impl FromStr for VifSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        one(&Word::at(text, 0)).map(|(spec, _)| spec).map_err(|fault| SpecError::new(text, fault))
    }
}

/// Reads one specification and tells where its parts were.
fn one(word: &Word<'_>) -> Result<(VifSpec, Places), Fault> {
    let mut draft = Draft::default();
    draft.feed(word)?;
    draft.finish()
}

/// Reads the address of a guest's interface: unicast, and neither zero nor the backend's own.
///
/// # Errors
/// With the place.
pub fn mac(text: &str) -> Result<Mac, SpecError> {
    let mac = words::mac(text)?;
    if mac == Mac::XEN {
        return whole(text, |value| {
            let help = "choose another one, or leave mac= out to get a random one";
            Err(value.fault("this address is what the backend's end of every interface has", help))
        });
    }
    Ok(mac)
}

/// An address of Xen's own range, 00:16:3e, with the rest at random; the highest bit of the fourth byte is 0, as libxl has
/// it (`libxl__device_nic_setdefault`).
///
/// # Errors
/// When the kernel's random numbers cannot be read.
pub fn random_mac() -> io::Result<Mac> {
    let mut tail = [0; 3];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut tail)?;
    Ok(Mac([0x00, 0x16, 0x3e, tail[0] & 0x7f, tail[1], tail[2]]))
}

/// Reads a value that stands alone, such as the argument of a command.
fn whole<T>(text: &str, read: impl FnOnce(Param<'_>) -> Result<T, Fault>) -> Result<T, SpecError> {
    let word = Word::at(text, 0);
    read(Param::new(&word, 0..text.len())).map_err(|fault| SpecError::new(text, fault))
}

/// Reads what a domain configuration has after `vif =`: a list of quoted specifications, in which the empty one is an
/// interface too. The assignment itself may stand in front, as may comments; the list may run over several lines, break
/// them with a backslash (as xm's files do, inside the quotes even), and end in a comma. A bare specification is taken
/// for a list of one.
///
/// # Errors
/// A mistake, with its place; also when two interfaces are to have the same number or name.
pub fn parse_list(text: &str) -> Result<Vec<VifSpec>, SpecError> {
    list(text).map_err(|fault| SpecError::new(text, fault))
}

fn list(text: &str) -> Result<Vec<VifSpec>, Fault> {
    let mut specs: Vec<VifSpec> = Vec::new();
    let mut macs: HashMap<Mac, usize> = HashMap::new();
    for item in strings("vif", text)? {
        let (mut spec, places) = one(&item.word())?;
        if let Some(devid) = spec.devid
            && specs.iter().any(|earlier| earlier.devid == Some(devid))
        {
            let message = format!("two interfaces have the number {devid}");
            return Err(Fault::new(places.devid, message, "give each a devid of its own, or leave devid= out"));
        }
        if let Some(name) = &spec.vifname
            && specs.iter().any(|earlier| earlier.vifname.as_ref() == Some(name))
        {
            let message = format!("two interfaces are called {name}");
            return Err(Fault::new(places.vifname, message, "give each a vifname of its own, or leave vifname= out"));
        }
        if let Some(mac) = spec.mac
            && let Some(earlier) = macs.insert(mac, specs.len())
        {
            spec.notes.push(format!(
                "{mac} is the address of interfaces {earlier} and {} of this list: on one network they disturb each other.",
                specs.len()
            ));
        }
        specs.push(spec);
    }
    Ok(specs)
}

/// Reads the words that follow the domain in `xl network-attach` and `xm network-attach`: parameters, in one word or in
/// several (`mac=00:16:3e:0:0:1 bridge=xenbr2`). No word at all is an interface of which everything is chosen. Errors
/// point into the words joined by single spaces.
///
/// # Errors
/// A mistake, with its place.
pub fn parse_words(words: &[&str]) -> Result<VifSpec, SpecError> {
    let input = words.join(" ");
    let mut draft = Draft::default();
    let mut offset = 0;
    for word in words {
        draft.feed(&Word::at(word, offset)).map_err(|fault| SpecError::new(&input, fault))?;
        offset += word.len() + 1;
    }
    draft.finish().map(|(spec, _)| spec).map_err(|fault| SpecError::new(&input, fault))
}

impl fmt::Display for VifSpec {
    /// The specification, canonically; empty where everything is to be chosen.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |value: &Option<String>| value.clone();
        let addresses: Vec<String> = self.ip.iter().map(Network::to_string).collect();
        let keys = [
            ("type", self.nic_type.map(|nic_type| nic_type.word().to_owned())),
            ("mac", self.mac.map(|mac| mac.to_string())),
            ("bridge", text(&self.bridge)),
            ("gatewaydev", text(&self.gatewaydev)),
            ("ip", (!addresses.is_empty()).then(|| addresses.join(" "))),
            ("script", text(&self.script)),
            ("backend", text(&self.backend)),
            ("vifname", text(&self.vifname)),
            ("model", text(&self.model)),
            ("rate", self.rate.map(|rate| rate.to_string())),
            ("devid", self.devid.map(|devid| devid.to_string())),
            ("mtu", self.mtu.map(|mtu| mtu.to_string())),
            ("vlan", text(&self.vlan)),
            ("antispoof", self.antispoof.map(|on| if on { "on" } else { "off" }.to_owned())),
        ];
        let mut written: Vec<String> =
            keys.into_iter().filter_map(|(key, value)| Some(format!("{key}={}", value?))).collect();
        written.extend(self.trusted.map(|trusted| if trusted { "trusted" } else { "untrusted" }.to_owned()));
        f.write_str(&written.join(","))
    }
}

impl NicType {
    fn word(self) -> &'static str {
        match self {
            Self::Vif => "vif",
            Self::Ioemu => "ioemu",
        }
    }
}
