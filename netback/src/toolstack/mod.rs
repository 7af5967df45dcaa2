//! What a toolstack does to interfaces: attach, detach, list, with libxl's keys in libxl's order
//! (`tools/libs/light/libxl_nic.c`). On real Xen `xl` does this; on the emulated machine nobody else would.

mod list;
pub mod script;

#[cfg(test)]
mod tests;

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use xenstore_client::xenbus::{State, toolstack};
use xenstore_client::{Client, DomId, ErrorCode, Store};

use crate::spec::{self, Mac, SpecError, VifSpec};
use script::{Event, Script};

pub use list::list;

pub use xenstore_client::xenbus::toolstack::ToolError as Error;

fn refused<T>(text: impl Into<String>) -> Result<T, Error> {
    Error::refuse(text)
}

/// The MTU of an interface that says nothing about it, in bytes (`LIBXL_DEVICE_NIC_MTU_DEFAULT`).
const MTU: u32 = 1500;
/// How long the backend may take to close what could not be attached.
const CLEAR_TIMEOUT: Duration = Duration::from_secs(1);

/// The interfaces of one backend's domain.
#[derive(Clone, Copy)]
pub struct Toolstack<'a> {
    /// The machine's XenStore.
    pub store: &'a Client,
    /// The domain that serves.
    pub backend: DomId,
    /// Does the work of vif-bridge, vif-route and vif-nat.
    pub builtin: script::Builtin<'a>,
}

impl fmt::Debug for Toolstack<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Toolstack").field("backend", &self.backend).finish_non_exhaustive()
    }
}

/// An interface that was attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attached {
    /// Its number.
    pub devid: u32,
    /// Its address.
    pub mac: Mac,
    /// Whether the guest uses it; otherwise its driver has not come yet.
    pub connected: bool,
}

/// An interface of a domain, as `network-detach` takes it: a number, or an address, which has colons.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// By number.
    Devid(u32),
    /// By address.
    Mac(Mac),
}

impl FromStr for Which {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.contains(':') {
            return spec::mac(text).map(Self::Mac).map_err(|error: SpecError| error.to_string());
        }
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        let devid = if digits { text.parse().ok() } else { None };
        devid.map(Self::Devid).ok_or_else(|| {
            format!("{text:?} is no interface: write its number, such as 0, or its address, such as 00:16:3e:3f:a9:06")
        })
    }
}

impl Toolstack<'_> {
    fn device(&self, frontend: DomId, devid: u32) -> toolstack::DeviceAddress<'static> {
        toolstack::DeviceAddress { kind: "vif", frontend_kind: "vif", backend: self.backend, frontend, devid }
    }

    /// Attaches an interface to a domain, and waits up to `wait` for the guest to connect.
    ///
    /// # Errors
    /// When the interface cannot be served, exists, no backend answers, or the hotplug program fails; nothing is left
    /// behind then.
    pub fn attach(&self, frontend: DomId, spec: &VifSpec, wait: Duration) -> Result<Attached, Error> {
        let store = self.store;
        if store.directory_opt(&frontend.home())?.is_none() {
            // Its error says which domains there are.
            toolstack::find_domain(store, &frontend.to_string())?;
            return refused(format!("no domain {frontend}, though one of that name"));
        }
        self.check_backend(spec)?;
        let script = Script::new(spec.script.as_deref());
        // Looked at before anything is written.
        script.check().map_err(Error::Refused)?;
        let mac = match spec.mac {
            Some(mac) => mac,
            None => spec::random_mac().map_err(|error| Error::Refused(format!("a random address: {error}")))?,
        };
        let device = self.write_keys(frontend, spec, mac, &script)?;
        let mut online = false;
        match self.finish_attach(&device, &script, &mut online, wait) {
            Ok(connected) => Ok(Attached { devid: device.devid, mac, connected }),
            Err(error) => {
                // What remains after a failure is ours to clear away; if that fails too, both are said.
                let offline = || {
                    // Offline finds less than online was to make, and libxl ignores what it says, too.
                    let _ = if online { script.run(self, &device, Event::Offline) } else { Ok(()) };
                    Ok(())
                };
                match toolstack::remove_device(store, &device, CLEAR_TIMEOUT, true, offline) {
                    Ok(()) => Err(error),
                    Err(second) => refused(format!("{error}\nand what is left could not be cleared away: {second}")),
                }
            }
        }
    }

    fn check_backend(&self, spec: &VifSpec) -> Result<(), Error> {
        let Some(name) = &spec.backend else { return Ok(()) };
        let named = toolstack::find_domain(self.store, name)?;
        if named == self.backend {
            return Ok(());
        }
        refused(format!(
            "backend={name} is not the domain this backend runs in ({}): attach the interface there",
            self.backend
        ))
    }

    /// Writes both directories, at the number that was asked for or at the lowest one that is free.
    fn write_keys(
        &self,
        frontend: DomId,
        spec: &VifSpec,
        mac: Mac,
        script: &Script,
    ) -> Result<toolstack::DeviceAddress<'static>, Error> {
        loop {
            let taken = self.devids(frontend)?;
            let devid = match spec.devid {
                Some(devid) if taken.contains(&devid) => {
                    return refused(format!("domain {frontend} has an interface {devid} already; detach it first"));
                }
                Some(devid) => devid,
                None => (0..).find(|devid| !taken.contains(devid)).unwrap_or_default(),
            };
            let device = self.device(frontend, devid);
            let (back, front) = keys(spec, devid, mac, script);
            let (back, front) = (borrowed(&back), borrowed(&front));
            match toolstack::add_device(self.store, &device, &back, &front) {
                Ok(()) => return Ok(device),
                // Somebody else took the number since we looked.
                Err(error) if error.code() == Some(&ErrorCode::Exists) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The numbers in use on either side: an interface may be another backend's.
    fn devids(&self, frontend: DomId) -> Result<Vec<u32>, Error> {
        let front = format!("{}/device/vif", frontend.home());
        let mut devids = Vec::new();
        for directory in [front, self.backend_directory(frontend)] {
            let names = self.store.directory_opt(&directory)?.unwrap_or_default();
            devids.extend(names.iter().filter_map(|name| name.parse::<u32>().ok()));
        }
        Ok(devids)
    }

    fn backend_directory(&self, frontend: DomId) -> String {
        format!("{}/backend/vif/{frontend}", self.backend.home())
    }

    /// The part after the keys are written: state 2, the hotplug program, and the guest. True when it is connected.
    fn finish_attach(
        &self,
        device: &toolstack::DeviceAddress<'_>,
        script: &Script,
        online: &mut bool,
        wait: Duration,
    ) -> Result<bool, Error> {
        let store = self.store;
        let backend = device.backend_path();
        let state = format!("{backend}/state");
        let ready = [State::InitWait, State::Closing, State::Closed];
        match toolstack::wait_state(store, &state, &ready, toolstack::INIT_TIMEOUT) {
            Ok(State::InitWait) => {}
            Ok(_) => return refused(toolstack::backend_error(store, &backend)?),
            Err(error @ xenstore_client::Error::Timeout { .. }) => {
                return refused(format!("no backend took the interface up ({error}); is netback serve running?"));
            }
            Err(error) => return Err(error.into()),
        }
        *online = true;
        script.run(self, device, Event::Online).map_err(Error::Refused)?;
        let began = Instant::now();
        match toolstack::wait_state(store, &state, &[State::Connected, State::Closing, State::Closed], wait) {
            Ok(State::Connected) => Ok(true),
            Ok(_) => refused(toolstack::backend_error(store, &backend)?),
            Err(_) if began.elapsed() >= wait => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Detaches an interface: as `xl network-detach`, or with `force` even if the guest does not let go. What the hotplug
    /// program complained about is returned with the interface's number: the interface is gone nevertheless, as with
    /// libxl.
    ///
    /// # Errors
    /// When there is no such interface, or the guest does not let go of it in time.
    pub fn detach(&self, frontend: DomId, which: Which, force: bool) -> Result<(u32, Option<String>), Error> {
        self.detach_within(toolstack::DESTROY_TIMEOUT, frontend, which, force)
    }

    fn detach_within(
        &self,
        limit: Duration,
        frontend: DomId,
        which: Which,
        force: bool,
    ) -> Result<(u32, Option<String>), Error> {
        let devid = self.find(frontend, which)?;
        let device = self.device(frontend, devid);
        let path = self.store.read_opt(&format!("{}/script", device.backend_path()))?;
        let script = Script::new(path.as_deref());
        // The backend of an interface that the guest has left still keeps its link.
        toolstack::ask_to_let_go(self.store, &device)?;
        let mut complaint = None;
        let offline = || {
            complaint = script.run(self, &device, Event::Offline).err();
            Ok(())
        };
        match toolstack::remove_device(self.store, &device, limit, force, offline) {
            Ok(()) => Ok((devid, complaint)),
            Err(xenstore_client::Error::Timeout { .. }) => refused(format!(
                "the guest did not let go of interface {devid} within {} s; --force takes it away",
                limit.as_secs()
            )),
            Err(error) => Err(error.into()),
        }
    }

    /// The number of an interface that this backend has for the domain.
    fn find(&self, frontend: DomId, which: Which) -> Result<u32, Error> {
        let directory = self.backend_directory(frontend);
        let mut known = Vec::new();
        for name in self.store.directory_opt(&directory)?.unwrap_or_default() {
            let Ok(devid) = name.parse::<u32>() else { continue };
            let mac = self.store.read_opt(&format!("{directory}/{name}/mac"))?.unwrap_or_default();
            known.push((devid, mac));
        }
        let found: Vec<u32> = known
            .iter()
            .filter(|(devid, mac)| match which {
                Which::Devid(wanted) => *devid == wanted,
                Which::Mac(wanted) => spec::mac(mac) == Ok(wanted),
            })
            .map(|(devid, _)| *devid)
            .collect();
        let wanted = match which {
            Which::Devid(devid) => devid.to_string(),
            Which::Mac(mac) => mac.to_string(),
        };
        match found.as_slice() {
            [devid] => Ok(*devid),
            [] if known.is_empty() => refused(format!("domain {frontend} has no interface {wanted}, nor any other")),
            [] => {
                let known: Vec<String> = known.iter().map(|(devid, mac)| format!("{devid} ({mac})")).collect();
                refused(format!("domain {frontend} has no interface {wanted}; it has {}", known.join(", ")))
            }
            several => {
                let several: Vec<String> = several.iter().map(u32::to_string).collect();
                refused(format!("{wanted} is the address of interfaces {}: name one by number", several.join(" and ")))
            }
        }
    }
}

type Pairs = Vec<(&'static str, String)>;

fn borrowed(pairs: &Pairs) -> Vec<(&str, &str)> {
    pairs.iter().map(|(key, value)| (*key, value.as_str())).collect()
}

/// The keys of both directories, in libxl's order (`libxl__set_xenstore_nic`).
fn keys(spec: &VifSpec, devid: u32, mac: Mac, script: &Script) -> (Pairs, Pairs) {
    let addresses: Vec<String> = spec.ip.iter().map(ToString::to_string).collect();
    let handle = devid.to_string();
    let flag = |on: bool| if on { "1" } else { "0" }.to_owned();
    let optional = [
        ("script", Some(script.path().to_owned())),
        ("vifname", spec.vifname.clone()),
        ("mac", Some(mac.to_string())),
        // The scripts split it at blanks.
        ("ip", (!addresses.is_empty()).then(|| addresses.join(" "))),
        ("gatewaydev", spec.gatewaydev.clone()),
        ("rate", spec.rate.map(spec::Rate::key)),
        // Absent, the hotplug program takes the bridge's. libxl, which cannot tell 1500 from nothing, leaves 1500 out.
        ("mtu", spec.mtu.map(|mtu| mtu.to_string())),
        ("vlan", spec.vlan.clone()),
        ("bridge", Some(spec.bridge.clone().unwrap_or_else(|| "xenbr0".to_owned()))),
        ("handle", Some(handle.clone())),
        // Never vif_ioemu: the emulated card beside it would be the device model's, which this does not start.
        ("type", Some("vif".to_owned())),
        // Not of libxl: for our own hotplug programs.
        ("antispoof", spec.antispoof.map(|on| if on { "on" } else { "off" }.to_owned())),
        // There from the start, so that the backend waits for the hotplug program.
        ("hotplug-status", Some(String::new())),
    ];
    let back = optional.into_iter().filter_map(|(key, value)| Some((key, value?))).collect();
    let front = vec![
        ("handle", handle),
        ("mac", mac.to_string()),
        ("mtu", spec.mtu.unwrap_or(MTU).to_string()),
        ("trusted", flag(spec.trusted.unwrap_or(true))),
    ];
    (back, front)
}
