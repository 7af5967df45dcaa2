//! What vif-bridge, vif-route and vif-nat do: the hotplug programs of guests' network interfaces.
//!
//! libxl runs `SCRIPT online type_if=vif` once the backend is in state 2, and `SCRIPT offline type_if=vif` after it is
//! gone; for a guest that also has an emulated card, `SCRIPT add type_if=tap` and `remove` for its tap. The environment
//! has `vif` or `INTERFACE` with the device's name and XENBUS_PATH with the backend's directory
//! (libxl_linux.c, get_hotplug_env). [`hotplug`] is the same for a backend that does without the program.
//!
//! The answer is in `hotplug-status`, `connected` or `error`, and `hotplug-error` says why; the guest is told its MTU.
//! Nothing of an interface is left half done: see [`crate::apply`].

mod dnsmasq;
pub(crate) mod forward;
mod hands;
mod nat;
mod pair;
mod plan;
mod program;
mod route;
mod settings;
pub mod vlan;
pub mod words;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use xenstore_client::spec::SpecError;
use xenstore_client::{Client, Store};

pub use plan::{bridge_of, offline, online};
pub use program::main;
pub use settings::Settings;

use crate::apply::{self, Options, Session};
use crate::plan::Plan;
use crate::state::{State, What};
use plan::{MACHINE_SYSCTLS, SYSCTLS, record_name};
use settings::Words;

/// How an interface is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Script {
    /// A port of a bridge.
    Bridge,
    /// Routed.
    Route,
    /// Routed behind dom0's address.
    Nat,
}

impl Script {
    /// The script of this name or path.
    pub fn of(script: &str) -> Option<Self> {
        match script.rsplit('/').next()? {
            "vif-bridge" => Some(Self::Bridge),
            "vif-route" => Some(Self::Route),
            "vif-nat" => Some(Self::Nat),
            _ => None,
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bridge => "vif-bridge",
            Self::Route => "vif-route",
            Self::Nat => "vif-nat",
        }
    }
}

/// What happened to an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A guest's interface is there.
    Online,
    /// It goes, or is gone.
    Offline,
    /// The tap of an emulated card is there.
    Add,
    /// It goes, or is gone.
    Remove,
}

impl Event {
    fn comes(self) -> bool {
        matches!(self, Self::Online | Self::Add)
    }

    fn is_tap(self) -> bool {
        matches!(self, Self::Add | Self::Remove)
    }
}

/// Why an interface is not connected.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// XenStore does not answer.
    #[error("XenStore: {0}")]
    Store(#[from] xenstore_client::Error),
    /// A key that must be there is not.
    #[error("{backend} has no key {key}: it is no directory of a vif's backend, or not yet complete")]
    Missing {
        /// The key.
        key: &'static str,
        /// The backend's directory.
        backend: String,
    },
    /// A key that is to be a number is none.
    #[error("the key {key} is {value:?}, and not a number that fits")]
    Number {
        /// The key.
        key: &'static str,
        /// What it says.
        value: String,
    },
    /// A key says something that makes no sense.
    #[error("{key}: {source}")]
    Key {
        /// The key.
        key: &'static str,
        /// What is wrong with it, and where.
        source: Box<SpecError>,
    },
    /// A line of the machine's settings makes no sense.
    #[error("{}:{line}: {reason}", path.display())]
    Settings {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// A file cannot be read.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// No script of ours.
    #[error("{0:?} is none of vif-bridge, vif-route and vif-nat")]
    NoScript(String),
    /// The interface is not there.
    #[error("there is no network device {0:?}: the backend did not make it, or it is gone again")]
    NoVif(String),
    /// Another device has the name.
    #[error("cannot rename {vif} to {name}: there is a device of that name already; choose another vifname=")]
    Taken {
        /// The interface.
        vif: String,
        /// The name it was to have.
        name: String,
    },
    /// No bridge is named, and there is none.
    #[error(
        "there is no bridge on this machine, and none is named: make one (network-bridge start), and name it with bridge="
    )]
    NoBridge,
    /// The bridge that is named is not there.
    #[error("there is no bridge {0:?}: make it (network-bridge start bridge={0}), or name another one with bridge=")]
    BridgeMissing(String),
    /// The bridge that is named is something else.
    #[error("{name} is no bridge of the kernel ({kind}); for Open vSwitch use the script vif-openvswitch")]
    NotABridge {
        /// Its name.
        name: String,
        /// What it is.
        kind: String,
    },
    /// What is asked cannot be done here.
    #[error("{0}")]
    Refused(String),
    /// The plan was not carried out.
    #[error(transparent)]
    Apply(#[from] apply::Error),
}

/// Handles an event of the interface `vif`, whose backend's directory is `backend_path`. `script` is a name or path that
/// ends in vif-bridge, vif-route or vif-nat. What comes of it is in `hotplug-status` too.
///
/// # Errors
/// Why the interface is not connected; nothing was changed then, and it is off.
pub fn hotplug(store: &Client, backend_path: &str, script: &str, event: Event, vif: &str) -> Result<(), Error> {
    hotplug_with(Options::default(), store, backend_path, script, event, vif)
}

/// [`hotplug`] with another run directory, or faults, for tests.
///
/// # Errors
/// As [`hotplug`].
pub fn hotplug_with(
    options: Options,
    store: &Client,
    backend_path: &str,
    script: &str,
    event: Event,
    vif: &str,
) -> Result<(), Error> {
    let request = Request { backend: backend_path, event, vif, options, words: &|_| None };
    let outcome = match Script::of(script) {
        Some(script) => request.run(store, script),
        None => Err(Error::NoScript(script.to_owned())),
    };
    request.tell(store, &outcome)?;
    let notes = outcome?;
    notes.iter().for_each(|note| tracing::warn!("{vif}: {note}"));
    Ok(())
}

/// One event.
struct Request<'a> {
    backend: &'a str,
    event: Event,
    vif: &'a str,
    options: Options,
    words: Words<'a>,
}

impl Request<'_> {
    /// Does what the event asks for, and returns what the administrator should know.
    fn run(&self, store: &Client, script: Script) -> Result<Vec<String>, Error> {
        let mut session = Session::open(self.options.clone())?;
        let (mut plan, before, settings) = self.plan(store, script, &mut session)?;
        session.apply(&plan, &before)?;
        if !self.event.comes() {
            session.forget_gone_filters()?;
        }
        if settings.script != Script::Bridge && !plan.is_empty() {
            let of = hands::changing(&settings, self.event.comes(), &before);
            if let Err(error) = crate::link::forget_connections(&of) {
                plan.notes.push(format!("connections of {} are not forgotten: {error}", settings.vif));
            }
        }
        if settings.script == Script::Nat {
            plan.notes.extend(dnsmasq::reread(&self.options.run));
        }
        drop(session);
        if self.event == Event::Online {
            self.tell_mtu(store, &settings, &plan.outcome(&before))?;
        }
        Ok(plan.notes)
    }

    fn plan(&self, store: &Client, script: Script, session: &mut Session) -> Result<(Plan, State, Settings), Error> {
        let tap = self.event.is_tap();
        let asked = settings::read(store, self.backend, script, self.vif, tap, self.words);
        if self.event.comes() {
            let mut asked = asked?;
            let mut before = read(session, &asked.settings)?;
            if script == Script::Bridge {
                let named = &asked.settings;
                let bridge = match bridge_of(named, &before) {
                    // Not among what was read, which is what was named.
                    Err(Error::NoBridge | Error::BridgeMissing(_)) => {
                        bridge_of(named, &session.read(&What::default())?)?
                    }
                    other => other?,
                };
                if asked.settings.bridge.as_ref() != Some(&bridge) {
                    asked.settings.bridge = Some(bridge);
                    before = read(session, &asked.settings)?;
                }
            }
            let (settings, unfiltered) = asked.decide(&self.options.run)?;
            let mut plan = online(&settings, &before)?;
            plan.notes.extend(unfiltered);
            return Ok((plan, before, settings));
        }
        // What was done is more to the point than what XenStore says now, if it says anything.
        let record = record_name(self.vif);
        let kept = session.read(&What { records: vec![record.clone()], ..What::links::<&str>([]) })?;
        let kept = kept.records.get(&record).and_then(|text| serde_json::from_str::<Settings>(text).ok());
        let settings = match (kept, asked) {
            (Some(settings), _) => settings,
            // It never came online here, so that a device of its other name would be somebody else's.
            (None, Ok(asked)) => Settings { name: asked.settings.vif.clone(), ..asked.settings },
            (None, Err(_)) => Settings::new(script, self.vif, crate::state::Mac::XEN),
        };
        let before = read(session, &settings)?;
        Ok((offline(&settings, &before), before, settings))
    }

    /// The MTU is the guest's to know (vif-common's set_mtu).
    fn tell_mtu(&self, store: &Client, settings: &Settings, after: &State) -> Result<(), Error> {
        let Some(link) = after.links.get(&settings.name) else { return Ok(()) };
        if settings.script != Script::Bridge && settings.mtu.is_none() {
            return Ok(());
        }
        let frontend = store.read_opt(&format!("{}/frontend", self.backend))?;
        let home = format!("/local/domain/{}/", settings.domid);
        // The key is the toolstack's; a directory elsewhere is none of this guest's.
        if let Some(frontend) = frontend.filter(|path| path.starts_with(&home)) {
            store.write(&format!("{frontend}/mtu"), &link.mtu.to_string())?;
        }
        Ok(())
    }

    /// Says in XenStore what came of it.
    fn tell(&self, store: &Client, outcome: &Result<Vec<String>, Error>) -> Result<(), Error> {
        let path = |key: &str| format!("{}/{key}", self.backend);
        match outcome {
            Ok(_) if self.event == Event::Online => store.write(&path("hotplug-status"), "connected")?,
            Ok(_) => {}
            // Offline there is nobody to read it, and the directory must not come back.
            Err(_) if !self.event.comes() => {}
            Err(error) => store.transaction(|tx| {
                tx.write(&path("hotplug-error"), &error.to_string())?;
                tx.write(&path("hotplug-status"), "error")
            })?,
        }
        Ok(())
    }
}

/// What plans for an interface look at.
fn read(session: &mut Session, settings: &Settings) -> Result<State, Error> {
    let mut names = vec![settings.vif.clone(), settings.name.clone()];
    if settings.script == Script::Bridge {
        names.extend(pair::other_names(settings));
        names.sort_unstable();
    }
    names.dedup();
    // Whether others need what is made for all guests of a bridge.
    let records = match settings.script {
        Script::Bridge => session.record_names("vif-")?,
        Script::Route | Script::Nat => Vec::new(),
    };
    let mut what = What {
        addresses: true,
        fdb: settings.script == Script::Bridge,
        neighbours: settings.script != Script::Bridge,
        routes: settings.script != Script::Bridge,
        tables: true,
        filters: vec![settings.vif.clone(), settings.name.clone()],
        vlans: settings.vlans.is_some(),
        records: vec![record_name(&settings.vif), dnsmasq::HOSTS.to_owned(), dnsmasq::CONF.to_owned()],
        ..What::default()
    };
    what.records.extend(records);
    what.records.sort_unstable();
    what.records.dedup();
    for name in &names {
        what.sysctls.extend(SYSCTLS.iter().map(|(of, leaf)| format!("{of}/{name}/{leaf}")));
    }
    if settings.script == Script::Bridge {
        names.extend(settings.bridge.clone());
        // Whose ports there are, only all links tell.
        what.links = if settings.vlans.is_some() { None } else { Some(names) };
    } else {
        what.sysctls.extend(MACHINE_SYSCTLS.map(str::to_owned));
        let mut state = session.read(&What { routes: true, ..What::default() })?;
        state.links.retain(|name, _| names.contains(name));
        if let Some(gateway) = route::gateway(settings, &state) {
            what.sysctls.push(format!("net/ipv6/conf/{gateway}/proxy_ndp"));
            names.push(gateway);
        }
        // The default route is not the interface's, and tells the gateway device.
        names.dedup();
        what.links = Some(names);
    }
    Ok(session.read(&what)?)
}
