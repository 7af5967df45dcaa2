//! The two ports of a guest that has an emulated card beside its paravirtual one (libxl's VIF_IOEMU, the default for HVM
//! guests), both with one Ethernet address: `vifX.Y`, and the device model's tap `vifX.Y-emu`. Until the guest unplugs the
//! emulated card that one is live, and then the tap vanishes without a word to anybody; a guest without drivers of its own
//! keeps it for ever, and its `vifX.Y` never gets a carrier.
//!
//! So the bridge has to find the live one by itself. The address's entry in the forwarding table stays at `vifX.Y`, and the
//! tap is that port's *backup*: while a port has no carrier, the bridge sends its frames to its backup. A backup that
//! vanishes is forgotten, and the entry is still where it belongs. It is *sticky*, because the tap learns: were `vifX.Y`
//! lost with a killed backend, the entry would go with it, and the emulated card has to be found again by what it sends
//! (the filter lets it send from its own address only).
//!
//! Where both are live at once, the paravirtual card gets the frames.

use super::settings::Settings;
use crate::state::{Fdb, State};

/// What libxl appends to the name of a device model's tap (TAP_DEVICE_SUFFIX).
const SUFFIX: &str = "-emu";

/// Whether these are the settings of an emulated card's tap.
pub(super) fn is_emulated(settings: &Settings) -> bool {
    settings.vif.ends_with(SUFFIX)
}

/// What the guest's other port may be called: by the backend or the device model, and by its `vifname=`.
pub(super) fn other_names(settings: &Settings) -> [String; 2] {
    let emulated = is_emulated(settings);
    [&settings.vif, &settings.name].map(|name| match name.strip_suffix(SUFFIX) {
        Some(paravirtual) if emulated => paravirtual.to_owned(),
        _ => format!("{name}{SUFFIX}"),
    })
}

/// The guest's other port, if it is one of this bridge.
pub(super) fn other(settings: &Settings, bridge: &str, before: &State) -> Option<String> {
    let in_bridge = |name: &String| before.links.get(name).is_some_and(|link| link.master.as_deref() == Some(bridge));
    other_names(settings).into_iter().find(in_bridge)
}

/// Whether the forwarding table has this entry. One that holds on more tightly is as good.
pub(super) fn has(before: &State, entry: &Fdb) -> bool {
    let good = |had: &Fdb| had.dev == entry.dev && had.same_place(entry) && (had.sticky || !entry.sticky);
    before.fdb.iter().any(good)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Mac;
    use crate::vif::Script;

    #[test]
    fn each_knows_the_other() {
        let names = |vif: &str, name: &str| {
            let settings = Settings { name: name.to_owned(), ..Settings::new(Script::Bridge, vif, Mac::XEN) };
            other_names(&settings)
        };
        assert_eq!(names("vif1.0", "vif1.0"), ["vif1.0-emu", "vif1.0-emu"]);
        assert_eq!(names("vif1.0-emu", "vif1.0-emu"), ["vif1.0", "vif1.0"]);
        assert_eq!(names("vif1.0", "web"), ["vif1.0-emu", "web-emu"]);
        assert_eq!(names("vif1.0-emu", "web-emu"), ["vif1.0", "web"]);
        // A paravirtual card whose name only looks like a tap's.
        assert_eq!(names("vif1.0", "my-emu"), ["vif1.0-emu", "my-emu-emu"]);
    }
}
