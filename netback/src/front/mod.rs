//! netfront: the guest's half, for emulated guests, tests and benchmarks.
//!
//! [`Frontend::connect`] walks through the handshake of a Linux guest's netfront; [`Queue`] is one pair of rings with
//! pools of granted pages. Unlike netfront's, the pools are granted once and used again and again. [`TapGuest`] puts a
//! tap in the place of the guest's network stack: what a namespace sends through that tap is what the guest sends.

mod control;
mod queue;
mod rx;
mod tap;
mod tx;

use std::sync::Arc;
use std::time::Duration;

use hypervisor::memory::Mapping;
use hypervisor::{DomId, GrantAccess, GrantRef, Guest, Shared};
use ring::Overflow;
use xenstore_client::xenbus::{State, toolstack};
use xenstore_client::{Client, ErrorCode, Store};

use crate::abi::{Extra, GsoType};
use crate::multicast::Mac;

pub use control::ControlRing;
pub use queue::Queue;
pub use rx::{Frame, Piece, Rx};
pub use tap::{Progress, TapGuest, features};
pub use tx::{Room, Sent, Tx};

/// How long the backend may take for each step of the handshake.
const PATIENCE: Duration = Duration::from_secs(10);

/// What went wrong at the guest's side.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The hypervisor refused.
    #[error(transparent)]
    Xen(#[from] hypervisor::Error),
    /// XenStore refused.
    #[error(transparent)]
    Store(#[from] xenstore_client::Error),
    /// The backend did not do its part.
    #[error("{0}")]
    Backend(String),
}

/// What the guest asks for, and what it says it copes with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Queues, at most what the backend offers.
    pub queues: u32,
    /// An event channel for each direction, where the backend offers that.
    pub split_channels: bool,
    /// `request-rx-copy`, without which a backend must refuse: its value, or none for no such key.
    pub rx_copy: Option<u32>,
    /// `feature-rx-notify`: the backend is told of new receive requests.
    pub rx_notify: bool,
    /// `feature-sg`: packets of several slots may come.
    pub sg: bool,
    /// `feature-gso-tcpv4`: they may be TCP over IPv4 that is not cut yet.
    pub gso_v4: bool,
    /// `feature-gso-tcpv6`: the same over IPv6.
    pub gso_v6: bool,
    /// Blank checksums may come over IPv4; else `feature-no-csum-offload`.
    pub csum_v4: bool,
    /// `feature-ipv6-csum-offload`: they may come over IPv6.
    pub csum_v6: bool,
    /// `request-multicast-control`.
    pub multicast: bool,
    /// Whether there is a control ring, where the backend offers that.
    pub control: bool,
    /// `xdp-headroom`: bytes to be left free before each packet; none for no such key.
    pub headroom: Option<u16>,
}

impl Default for Options {
    /// What Linux says.
    fn default() -> Self {
        Self {
            queues: 1,
            split_channels: true,
            rx_copy: Some(1),
            rx_notify: true,
            sg: true,
            gso_v4: true,
            gso_v6: true,
            csum_v4: true,
            csum_v6: true,
            multicast: false,
            control: false,
            headroom: None,
        }
    }
}

/// What the backend says it copes with, and so what may be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offered {
    /// Most queues.
    pub queues: u32,
    /// Whether each direction may have an event channel.
    pub split_channels: bool,
    /// Whether a packet may have several slots.
    pub sg: bool,
    /// Whether TCP over IPv4 may be left to be cut.
    pub gso_v4: bool,
    /// The same over IPv6.
    pub gso_v6: bool,
    /// Whether checksums may be left blank over IPv6; over IPv4 they always may.
    pub csum_v6: bool,
    /// Whether groups can be named.
    pub multicast: bool,
    /// Whether there can be a control ring.
    pub control: bool,
    /// Whether room can be left before packets.
    pub headroom: bool,
}

/// What is known of a checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Checksum {
    /// It stands in the frame, and nobody has looked.
    #[default]
    Unchecked,
    /// It was found right, or the frame never left this machine.
    Validated,
    /// The pseudo header's sum stands in its place.
    Blank,
}

/// What goes with a frame's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Meta {
    /// Its checksum.
    pub checksum: Checksum,
    /// How it is to be cut, and into segments of how many bytes of payload.
    pub gso: Option<(GsoType, u16)>,
    /// Its hash, an [`Extra::Hash`]; only on receipt.
    pub hash: Option<Extra>,
    /// Bytes left free before it; only on receipt.
    pub headroom: Option<u16>,
}

/// A connected interface.
#[derive(Debug)]
pub struct Frontend {
    store: Client,
    guest: Arc<dyn Guest>,
    path: String,
    backend_path: String,
    offered: Offered,
    queues: Vec<Queue>,
    control: Option<ControlRing>,
}

impl Frontend {
    /// Connects device `devid`, which the toolstack has attached to our domain; also one that was closed before.
    ///
    /// # Errors
    /// When the backend does not answer in time, or refuses; its `error` node is part of the message.
    pub fn connect(guest: Arc<dyn Guest>, devid: u32, options: &Options) -> Result<Self, Error> {
        let store = guest.store()?;
        let path = format!("{}/device/vif/{devid}", guest.domid().home());
        let backend_path = store.read_str(&format!("{path}/backend"))?;
        let backend = store.read_str(&format!("{path}/backend-id"))?;
        let backend: DomId = backend.parse().map_err(|_| Error::Backend(format!("backend-id is {backend:?}")))?;
        let offered = Offered::default();
        let mut front = Self { store, guest, path, backend_path, offered, queues: Vec::new(), control: None };
        // Brings a backend back that was left.
        front.switch(State::Initialising)?;
        front.wait(&[State::InitWait], &[])?;
        front.offered = front.read_offer()?;
        let options = &Options {
            queues: options.queues.clamp(1, front.offered.queues),
            split_channels: options.split_channels && front.offered.split_channels,
            control: options.control && front.offered.control,
            ..*options
        };
        for _ in 0..options.queues {
            let queue = Queue::new(&*front.guest, backend, options)?;
            front.queues.push(queue);
        }
        if options.control {
            front.control = Some(ControlRing::new(&*front.guest, backend)?);
        }
        front.publish(options)?;
        // From 1 to 4 without 3, as Linux does.
        front.switch(State::Connected)?;
        front.wait(&[State::Connected], &[State::Closing, State::Closed])?;
        for queue in &mut front.queues {
            queue.fill()?;
        }
        Ok(front)
    }

    fn read_offer(&self) -> Result<Offered, Error> {
        let yes = |key: &str| Ok::<_, Error>(self.backend_number(key)?.is_some_and(|value| value != 0));
        Ok(Offered {
            queues: self.backend_number("multi-queue-max-queues")?.unwrap_or(1).max(1),
            split_channels: yes("feature-split-event-channels")?,
            sg: yes("feature-sg")?,
            gso_v4: yes("feature-gso-tcpv4")?,
            gso_v6: yes("feature-gso-tcpv6")?,
            csum_v6: yes("feature-ipv6-csum-offload")?,
            multicast: yes("feature-multicast-control")?,
            control: yes("feature-ctrl-ring")?,
            headroom: yes("feature-xdp-headroom")?,
        })
    }

    /// Writes all keys but the state.
    fn publish(&self, options: &Options) -> Result<(), Error> {
        let mut keys: Vec<(String, String)> = Vec::new();
        if options.queues > 1 {
            keys.push(("multi-queue-num-queues".into(), options.queues.to_string()));
        }
        for (index, queue) in self.queues.iter().enumerate() {
            let prefix = if options.queues > 1 { format!("queue-{index}/") } else { String::new() };
            keys.extend(queue.keys().map(|(key, value)| (format!("{prefix}{key}"), value)));
        }
        if let Some(control) = &self.control {
            keys.extend(control.keys());
        }
        let mut say = |key: &str, value: u32| keys.push((key.into(), value.to_string()));
        if let Some(value) = options.rx_copy {
            say("request-rx-copy", value);
        }
        say("feature-rx-notify", options.rx_notify.into());
        say("feature-sg", options.sg.into());
        say("feature-gso-tcpv4", options.gso_v4.into());
        say("feature-gso-tcpv6", options.gso_v6.into());
        if !options.csum_v4 {
            say("feature-no-csum-offload", 1);
        }
        say("feature-ipv6-csum-offload", options.csum_v6.into());
        if options.multicast {
            say("request-multicast-control", 1);
        }
        if let Some(headroom) = options.headroom {
            say("xdp-headroom", headroom.into());
        }
        self.store.transaction(|tx| {
            // What another driver before this one left would be read with ours.
            let left = tx.directory_opt(&self.path)?.unwrap_or_default();
            let of_drivers = |name: &&String| DRIVERS_KEYS.iter().any(|key| name.starts_with(key));
            left.iter().filter(of_drivers).try_for_each(|name| tx.rm_if_exists(&format!("{}/{name}", self.path)))?;
            keys.iter().try_for_each(|(key, value)| tx.write(&format!("{}/{key}", self.path), value))
        })?;
        Ok(())
    }

    fn backend_number(&self, key: &str) -> Result<Option<u32>, Error> {
        let text = self.store.read_opt(&format!("{}/{key}", self.backend_path))?;
        text.map(|text| text.parse().map_err(|_| Error::Backend(format!("{key} is {text:?}")))).transpose()
    }

    /// Waits until the backend is in a state that is `wanted`, or has given up; it may have said why.
    fn wait(&self, wanted: &[State], given_up: &[State]) -> Result<(), Error> {
        let path = format!("{}/state", self.backend_path);
        let failure = match toolstack::wait_state(&self.store, &path, &[wanted, given_up].concat(), PATIENCE) {
            Ok(state) if wanted.contains(&state) => return Ok(()),
            Ok(state) => format!("the backend went to state {state}"),
            Err(error @ xenstore_client::Error::Timeout { .. }) => error.to_string(),
            Err(error) => return Err(error.into()),
        };
        let reason = self.store.read_opt(&format!("{}/error", self.backend_path))?;
        Err(Error::Backend(format!("{failure}: {}", reason.as_deref().unwrap_or("it does not say why"))))
    }

    fn switch(&self, state: State) -> Result<(), Error> {
        Ok(self.store.write(&format!("{}/state", self.path), &state.to_string())?)
    }

    /// What the backend offers.
    pub fn offered(&self) -> Offered {
        self.offered
    }

    /// The address that the toolstack gave the interface.
    ///
    /// # Errors
    /// When there is none.
    pub fn mac(&self) -> Result<Mac, Error> {
        let text = self.store.read_str(&format!("{}/mac", self.path))?;
        parse_mac(&text).ok_or_else(|| Error::Backend(format!("mac is {text:?}")))
    }

    /// The MTU in bytes: 1500 unless the toolstack says otherwise.
    ///
    /// # Errors
    /// When XenStore refuses, or it is no number.
    pub fn mtu(&self) -> Result<u32, Error> {
        let text = self.store.read_opt(&format!("{}/mtu", self.path))?;
        let Some(text) = text else { return Ok(1500) };
        text.parse().map_err(|_| Error::Backend(format!("mtu is {text:?}")))
    }

    /// The queues, to be driven by one thread each.
    pub fn take_queues(&mut self) -> Vec<Queue> {
        std::mem::take(&mut self.queues)
    }

    /// The control ring, if there is one.
    pub fn take_control(&mut self) -> Option<ControlRing> {
        self.control.take()
    }

    /// Asks for `headroom` free bytes before each packet while connected, as Linux does when an XDP program is loaded:
    /// Reconfiguring, only then the key, wait for the backend's Reconfigured, Connected. A backend that reads the key as
    /// soon as it sees the state may read the old one; it has to look at it when it changes.
    ///
    /// # Errors
    /// When the backend does not follow in time.
    pub fn set_headroom(&self, headroom: u16) -> Result<(), Error> {
        self.switch(State::Reconfiguring)?;
        self.store.write(&format!("{}/xdp-headroom", self.path), &headroom.to_string())?;
        self.wait(&[State::Reconfigured], &[State::Closing, State::Closed])?;
        self.switch(State::Connected)?;
        // Linux does not wait for this; the next call would take this Reconfigured for its own.
        self.wait(&[State::Connected], &[State::Closing, State::Closed])
    }

    /// Turns multicast filtering on or off while connected (`feature-dynamic-multicast-control`).
    ///
    /// # Errors
    /// When XenStore refuses.
    pub fn set_multicast(&self, on: bool) -> Result<(), Error> {
        Ok(self.store.write(&format!("{}/request-multicast-control", self.path), &u32::from(on).to_string())?)
    }

    /// Disconnects as a guest does that unloads its driver: Closing, wait for the backend, Closed, and only then the
    /// pages are taken back. `queues` and `control` are what was taken.
    ///
    /// # Errors
    /// When the backend does not follow in time, or still maps a page afterwards.
    pub fn close(mut self, queues: Vec<Queue>, control: Option<ControlRing>) -> Result<(), Error> {
        self.queues.extend(queues);
        self.control = self.control.take().or(control);
        let state = format!("{}/state", self.backend_path);
        self.leave(State::Closing)?;
        let closing = [State::Closing, State::Closed];
        toolstack::wait_state(&self.store, &state, &closing, PATIENCE)?;
        self.leave(State::Closed)?;
        let closed = [State::Closed, State::InitWait, State::Unknown];
        toolstack::wait_state(&self.store, &state, &closed, PATIENCE)?;
        for queue in self.queues.drain(..) {
            queue.release(&*self.guest)?;
        }
        self.control.take().map_or(Ok(()), |control| control.release(&*self.guest))
    }

    /// As [`switch`](Self::switch), on the way out: a toolstack that saw the backend's 6 does not wait for ours, so the
    /// directory may be gone.
    fn leave(&self, state: State) -> Result<(), Error> {
        match self.switch(state) {
            Err(Error::Store(error)) if matches!(error.code(), Some(ErrorCode::Access | ErrorCode::NotFound)) => Ok(()),
            outcome => outcome,
        }
    }

    /// Where the backend's half is in XenStore.
    pub fn backend_path(&self) -> &str {
        &self.backend_path
    }

    /// Where the device is in XenStore.
    pub fn path(&self) -> &str {
        &self.path
    }
}

/// How the keys begin that drivers write; others are the toolstack's.
const DRIVERS_KEYS: &[&str] = &[
    "multi-queue-num-queues",
    "queue-",
    "tx-ring-ref",
    "rx-ring-ref",
    "event-channel",
    "ctrl-ring-ref",
    "request-",
    "feature-",
    "xdp-headroom",
];

fn parse_mac(text: &str) -> Option<Mac> {
    let mut mac = [0; 6];
    let mut bytes = text.split(':');
    for byte in &mut mac {
        *byte = u8::from_str_radix(bytes.next().filter(|digits| digits.len() == 2)?, 16).ok()?;
    }
    bytes.next().is_none().then_some(mac)
}

fn broken(overflow: Overflow) -> Error {
    Error::Backend(format!("the backend broke the ring: {overflow}"))
}

/// One granted page with a ring in it.
fn share_ring(guest: &dyn Guest, backend: DomId) -> Result<(Arc<Mapping>, GrantRef), Error> {
    let Shared { memory, refs } = guest.share(backend, 1, GrantAccess::ReadWrite)?;
    Ok((Arc::new(memory), refs[0]))
}

/// Takes pages back that were shared.
fn unshare(guest: &dyn Guest, memory: Arc<Mapping>, refs: Vec<GrantRef>) -> Result<(), Error> {
    let memory =
        Arc::try_unwrap(memory).map_err(|_| Error::Backend("pages are still in use by this process".to_owned()))?;
    guest.unshare(Shared { memory, refs }).map_err(|(_, error)| error.into())
}
