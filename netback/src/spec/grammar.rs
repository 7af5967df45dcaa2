//! One specification: parameters in, a [`VifSpec`] out.
//!
//! A parameter is a `key=value` or a flag; empty ones between two commas are skipped, as xl's strtok(3) does.

use std::ops::Range;

use bridge_scripts::vif::{vlan, words};
use xenstore_client::spec::{Fault, Param, Slot, Word, nearest};

use super::{Mac, Network, NicType, Rate, VifSpec};

type Result<T> = std::result::Result<T, Fault>;

/// Keys and flags this parser does something with, for "did you mean".
const KEYS: [&str; 14] = [
    "mac",
    "bridge",
    "ip",
    "script",
    "vifname",
    "rate",
    "mtu",
    "vlan",
    "gatewaydev",
    "devid",
    "type",
    "model",
    "backend",
    "antispoof",
];
const FLAGS: [&str; 2] = ["trusted", "untrusted"];

/// Keys of xend and of its security modules that say nothing any more.
const IGNORED: [(&str, &str); 5] = [
    ("uuid", "libxl gives interfaces no uuid"),
    ("accel", "no driver for accelerated interfaces is left; xl ignores it too"),
    ("security_label", "xend's security modules are gone"),
    ("policy", "xend's security modules are gone"),
    ("label", "xend's security modules are gone"),
];

const EXAMPLE: &str = "parameters are written key=value, as in mac=00:16:3e:3f:a9:06,bridge=xenbr0";

/// The largest number of a device. With the largest domain, 32751, its name still fits the 15 bytes of a link's:
/// vif32751.999999.
const DEVID_MAX: u32 = 999_999;

/// A specification that is still being read, possibly over several words.
#[derive(Default)]
pub(super) struct Draft {
    nic_type: Slot<NicType>,
    mac: Slot<Mac>,
    bridge: Slot<String>,
    gatewaydev: Slot<String>,
    ip: Vec<Network>,
    script: Slot<String>,
    backend: Slot<String>,
    vifname: Slot<String>,
    model: Slot<String>,
    rate: Slot<Rate>,
    devid: Slot<u32>,
    mtu: Slot<u32>,
    vlan: Slot<String>,
    trusted: Slot<bool>,
    antispoof: Slot<bool>,
    notes: Vec<String>,
}

/// Where those parts of a specification stood that are compared with those of others.
pub(super) struct Places {
    pub(super) devid: Range<usize>,
    pub(super) vifname: Range<usize>,
}

impl Draft {
    /// Reads the parameters of one word.
    pub(super) fn feed(&mut self, word: &Word<'_>) -> Result<()> {
        let mut at = 0;
        for text in word.text.split(',') {
            let param = Param::new(word, at..at + text.len()).trimmed();
            at += text.len() + 1;
            if !param.text.is_empty() {
                self.param(param)?;
            }
        }
        Ok(())
    }

    fn param(&mut self, param: Param<'_>) -> Result<()> {
        param.no_control("an interface")?;
        let Some(equals) = param.text.find('=') else { return self.flag(param) };
        let (key, value) = (param.part(0..equals).trimmed(), param.part(equals + 1..param.text.len()).trimmed());
        if FLAGS.contains(&key.text) {
            return Err(key.fault(format!("{} stands alone, without a value", key.text), format!("write {}", key.text)));
        }
        if value.text.is_empty() && (KEYS.contains(&key.text) || key.text == "netdev") {
            let help = format!("write a value after the equals sign, or leave {} out", key.text);
            return Err(value.fault(format!("{} has no value", key.text), help));
        }
        self.named(key, value)
    }

    fn flag(&mut self, flag: Param<'_>) -> Result<()> {
        match flag.text {
            "trusted" | "untrusted" => self.trusted.fill("trust", Some(flag.text == "trusted"), flag.span()),
            known if KEYS.contains(&known) => {
                Err(flag.fault(format!("{known} has no value"), format!("write {known}=VALUE, or leave it out")))
            }
            other => {
                let help = match nearest(other, FLAGS) {
                    Some(near) => format!("did you mean {near}?"),
                    None => EXAMPLE.to_owned(),
                };
                Err(flag.fault(format!("`{other}` is no parameter"), help))
            }
        }
    }

    fn named(&mut self, key: Param<'_>, value: Param<'_>) -> Result<()> {
        let span = value.span();
        match key.text {
            "type" => {
                let nic_type = match value.text {
                    "vif" => NicType::Vif,
                    "ioemu" => NicType::Ioemu,
                    other => return Err(value.fault(format!("unknown type `{other}`"), "write vif or ioemu")),
                };
                if nic_type == NicType::Ioemu {
                    self.notes.push(
                        "type=ioemu: an emulated card is the device model's; this is the paravirtual interface beside \
                         it."
                        .to_owned(),
                    );
                }
                self.nic_type.fill("the type", Some(nic_type), span)
            }
            "mac" => self.mac.fill("the address", Some(value.read(super::mac)?), span),
            // What a bridge can be called is known when the script is.
            "bridge" => self.bridge.fill("the bridge", value.given(), span),
            "gatewaydev" | "netdev" => {
                if key.text == "netdev" {
                    self.notes.push("netdev= is an old name: write gatewaydev= now.".to_owned());
                }
                self.gatewaydev.fill("the gateway's device", Some(value.read(words::device)?), span)
            }
            "ip" => self.addresses(value),
            "script" => self.script.fill("the script", value.given(), span),
            "backend" => self.backend.fill("the backend domain", value.given(), span),
            "vifname" => self.vifname.fill("the interface's name", Some(vif_name(value)?), span),
            "model" => {
                self.notes
                    .push("model= is for a card that the device model emulates; it changes nothing here.".to_owned());
                self.model.fill("the model", value.given(), span)
            }
            "rate" => self.rate.fill("the rate", Some(Rate::read(value)?), span),
            "devid" => self.devid.fill("the device's number", Some(number(value, 0, DEVID_MAX)?), span),
            "mtu" => self.mtu.fill("the MTU", Some(value.read(words::mtu)?), span),
            "vlan" => {
                value.read(vlan::parse)?;
                self.vlan.fill("the VLANs", value.given(), span)
            }
            "antispoof" => {
                let on = match value.text {
                    "on" => true,
                    "off" => false,
                    other => return Err(value.fault(format!("unknown setting `{other}`"), "write on or off")),
                };
                if !on {
                    self.notes.push(
                        "antispoof=off: nothing keeps the guest from sending in the name of others on this network."
                            .to_owned(),
                    );
                }
                self.antispoof.fill("antispoof", Some(on), span)
            }
            other => self.unknown(key, other),
        }
    }

    /// Keys that are known to others, or to nobody.
    fn unknown(&mut self, key: Param<'_>, name: &str) -> Result<()> {
        if let Some((_, why)) = IGNORED.iter().find(|(ignored, _)| *ignored == name) {
            self.notes.push(format!("{name}= is ignored: {why}."));
            return Ok(());
        }
        if name == "forwarddev" || name.starts_with("colo_") || name.starts_with("colo-") {
            return Err(key.fault(
                format!("{name} belongs to COLO, which compares packets in QEMU"),
                "leave the COLO settings out: this backend does not serve them",
            ));
        }
        let help = match nearest(name, KEYS) {
            Some(near) => format!("did you mean {near}?"),
            None => format!("the parameters are {}; flags are {}", KEYS.join(", "), FLAGS.join(", ")),
        };
        Err(key.fault(format!("unknown parameter `{name}`"), help))
    }

    /// One address or several with blanks between, as the scripts read the key `ip`; and the parameter may come again.
    fn addresses(&mut self, value: Param<'_>) -> Result<()> {
        for network in value.read(words::addresses)? {
            if self.ip.contains(&network) {
                return Err(value.fault(format!("{network} is given twice"), "leave one of the two out"));
            }
            self.ip.push(network);
        }
        Ok(())
    }

    /// Puts the parts together.
    pub(super) fn finish(self) -> Result<(VifSpec, Places)> {
        if let Some(bridge) = &self.bridge.value
            && !is_foreign(self.script.value.as_deref())
        {
            let whole = self.bridge.span.clone();
            let word = Word::at(bridge, whole.start);
            Param::new(&word, 0..bridge.len()).read(words::device).map_err(|fault| {
                // With an escape in the name its bytes do not stand side by side.
                let span = if whole.len() == bridge.len() { fault.span.clone() } else { whole.clone() };
                Fault { span, ..fault }
            })?;
        }
        let spec = VifSpec {
            mac: self.mac.value,
            bridge: self.bridge.value,
            gatewaydev: self.gatewaydev.value,
            ip: self.ip,
            script: self.script.value,
            backend: self.backend.value,
            vifname: self.vifname.value,
            rate: self.rate.value,
            devid: self.devid.value,
            mtu: self.mtu.value,
            vlan: self.vlan.value,
            nic_type: self.nic_type.value,
            model: self.model.value,
            trusted: self.trusted.value,
            antispoof: self.antispoof.value,
            notes: self.notes,
        };
        Ok((spec, Places { devid: self.devid.span, vifname: self.vifname.span }))
    }
}

/// Whether the bridge is a matter between a script of somebody else's and the administrator: vif-openvswitch takes
/// `bridge=ovsbr0.10:20`.
fn is_foreign(script: Option<&str>) -> bool {
    let name = script.map(|script| script.rsplit('/').next().unwrap_or_default());
    name.is_some_and(|name| !super::SCRIPTS.contains(&name))
}

fn vif_name(value: Param<'_>) -> Result<String> {
    let name = value.read(words::device)?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let own = name.strip_prefix("vif").and_then(|rest| rest.split_once('.'));
    if own.is_some_and(|(domain, device)| digits(domain) && digits(device)) {
        let help = "choose a name of another form: another guest's interface may come to be called that";
        return Err(value.fault("names such as vif3.0 are what interfaces without vifname= have", help));
    }
    Ok(name)
}

/// A decimal number in a range.
fn number(value: Param<'_>, least: u32, most: u32) -> Result<u32> {
    let plain = value.text.bytes().all(|b| b.is_ascii_digit());
    let number = if plain { value.text.parse().ok() } else { None };
    number.filter(|number| (least..=most).contains(number)).ok_or_else(|| {
        let message = format!("`{}` is no number from {least} to {most}", value.text);
        value.fault(message, "write decimal digits and nothing else")
    })
}
