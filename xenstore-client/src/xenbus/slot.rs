//! One device of a driver: the machine, the device, and what actions mean in the store.

use std::collections::VecDeque;

use super::machine::{Action, Front, Input, Machine, step};
use super::{Blame, Device, DeviceId, Fault, Keys, Kind, Note, Notifier, Progress, State, frontend};
use crate::{Client, DomId, Error, LogGate, Result, Store, Watcher};

/// What all devices of a driver share.
pub(super) struct Context<'a, K: Kind> {
    pub(super) client: &'a Client,
    pub(super) watcher: &'a Watcher,
    pub(super) notifier: &'a Notifier,
    pub(super) log: &'a mut LogGate,
    pub(super) home: &'a str,
    pub(super) kind: &'a mut K,
}

pub(super) struct Slot<D> {
    id: DeviceId,
    /// Never used twice: what tells a device from its predecessor of the same number.
    serial: u64,
    machine: Machine,
    device: Option<D>,
    /// Whether the toolstack's `frontend` may be followed.
    frontend: Result<(), Fault>,
    watched_keys: Vec<String>,
    /// Our `state` node no longer says what the toolstack created it with. A 1 there from now on means that the
    /// directory was removed and made anew.
    said: bool,
    /// For lines that a guest can cause by connecting again and again.
    log: LogGate,
    /// The machine has forgotten the device: the slot can go.
    pub(super) forgotten: bool,
}

enum Written {
    Done,
    /// The directory is gone, or is another one.
    Gone,
    /// The toolstack wants the device closed.
    AskedToClose,
}

impl<D: Device> Slot<D> {
    /// Takes in the device whose directory is `path`, with the state it is found in; `None` if there is none.
    pub(super) fn new<K: Kind<Device = D>>(
        ctx: &mut Context<'_, K>,
        serial: u64,
        path: String,
        dom: DomId,
        devid: u32,
    ) -> Result<Option<(Self, State)>> {
        // State and links come from one snapshot: the directory may be replaced while we look.
        let keys = frontend::read_backend(ctx.client, &path)?;
        let Some(text) = keys.get("state") else { return Ok(None) };
        let Some(found) = State::parse(text) else {
            tracing::warn!("{path}/state is {text:?}; not taken in");
            return Ok(None);
        };
        let frontend_path = keys.get("frontend").unwrap_or_default().to_owned();
        let good = match keys.get("frontend-id").map(str::parse::<DomId>) {
            Some(Ok(id)) if id == dom => frontend::check_path(&frontend_path, dom),
            _ => Err(keys.fault(22, "frontend-id is missing or not the domain in the path; correct the toolstack")),
        };
        let kind = ctx.kind.name().to_owned();
        // Faults of a predecessor are not this device's.
        if let Err(error) = ctx.client.rm_if_exists(&format!("{}/error/backend/{kind}/{dom}/{devid}", ctx.home)) {
            tracing::debug!("{error}");
        }
        let id = DeviceId { kind, frontend_id: dom, devid, backend_path: path, frontend_path };
        let said = found != State::Initialising;
        let slot = Self {
            id,
            serial,
            machine: Machine::new(),
            device: None,
            frontend: good,
            watched_keys: Vec::new(),
            said,
            log: LogGate::default(),
            forgotten: false,
        };
        if slot.frontend.is_ok() {
            ctx.watcher.add(&slot.state_path(), &format!("state {serial}"))?;
        }
        Ok(Some((slot, found)))
    }

    /// Starts the machine at the state the device was found in.
    pub(super) fn begin<K: Kind<Device = D>>(&mut self, ctx: &mut Context<'_, K>, found: State) -> Result<()> {
        tracing::info!(device = %self.id.backend_path, "found at state {found}");
        let looked = self.read_frontend(ctx).and_then(|()| self.refresh(ctx));
        if let Err(Error::Disconnected) = looked {
            return looked;
        }
        self.feed(ctx, Input::Start(found))?;
        // Only a machine that was started can report that it could not be told everything.
        looked
    }

    pub(super) fn serial(&self) -> u64 {
        self.serial
    }

    pub(super) fn is_idle(&self) -> bool {
        self.machine.is_idle()
    }

    /// Idle but for a medium that is being closed.
    pub(super) fn is_let_go(&self) -> bool {
        self.machine.is_let_go()
    }

    pub(super) fn path(&self) -> &str {
        &self.id.backend_path
    }

    /// Whether a directory with this `state` is still the one this slot was made for.
    fn is_ours(&self, state: Option<&str>) -> bool {
        state.is_some_and(|state| !self.said || State::parse(state) != Some(State::Initialising))
    }

    fn state_path(&self) -> String {
        format!("{}/state", self.id.frontend_path)
    }

    /// Looks at our own directory.
    pub(super) fn refresh<K: Kind<Device = D>>(&mut self, ctx: &mut Context<'_, K>) -> Result<()> {
        let dir = self.id.backend_path.clone();
        let state = ctx.client.read_opt(&format!("{dir}/state"))?;
        if !self.is_ours(state.as_deref()) {
            return self.feed(ctx, Input::Removed);
        }
        let state = state.and_then(|state| State::parse(&state));
        let online = ctx.client.read_opt(&format!("{dir}/online"))?.as_deref() == Some("1");
        self.feed(ctx, Input::Toolstack { online, closing: state == Some(State::Closing) })?;
        let hotplug = ctx.client.read_opt(&format!("{dir}/hotplug-status"))?;
        self.feed(ctx, Input::Hotplug(hotplug.as_deref() == Some("connected")))
    }

    /// Looks at the frontend's state.
    pub(super) fn read_frontend<K: Kind<Device = D>>(&mut self, ctx: &mut Context<'_, K>) -> Result<()> {
        let front =
            if self.frontend.is_ok() { frontend::read_state(ctx.client, &self.id.frontend_path)? } else { Front::Gone };
        self.feed(ctx, Input::Frontend(front))
    }

    /// A key that the device asked to have watched was written.
    pub(super) fn key_changed<K: Kind<Device = D>>(&mut self, ctx: &mut Context<'_, K>, path: &str) -> Result<()> {
        let key = path.rsplit('/').next().unwrap_or(path);
        if !self.watched_keys.iter().any(|watched| watched == key) {
            return Ok(());
        }
        let value = ctx.client.read_bytes_opt(path)?.filter(|bytes| bytes.len() <= frontend::VALUE_MAX);
        let value = value.and_then(|bytes| String::from_utf8(bytes).ok());
        if let Some(device) = &mut self.device {
            device.frontend_changed(key, value.as_deref());
        }
        Ok(())
    }

    /// A key of our own directory was written.
    pub(super) fn own_key_changed<K: Kind<Device = D>>(&mut self, ctx: &mut Context<'_, K>, key: &str) -> Result<()> {
        let Some(device) = &mut self.device else { return Ok(()) };
        if !device.watched_backend_keys().contains(&key) {
            return Ok(());
        }
        let value = ctx.client.read_bytes_opt(&format!("{}/{key}", self.id.backend_path))?;
        let value = value.filter(|bytes| bytes.len() <= 4096).and_then(|bytes| String::from_utf8(bytes).ok());
        device.backend_changed(key, value.as_deref());
        Ok(())
    }

    /// What the device reports.
    pub(super) fn note<K: Kind<Device = D>>(&mut self, ctx: &mut Context<'_, K>, note: Note) -> Result<()> {
        match note {
            Note::Disconnected => self.feed(ctx, Input::Disconnected),
            Note::Fault(fault) => self.feed(ctx, Input::Fault(fault)),
            Note::Publish(keys) if self.machine.own() == State::Connected => {
                match self.write_state(ctx.client, State::Connected, &keys)? {
                    Written::Done => Ok(()),
                    // The watch on our directory brings the rest.
                    Written::Gone | Written::AskedToClose => Ok(()),
                }
            }
            Note::Publish(_) => Ok(()),
            Note::Tell(key, value) => self.tell(ctx.client, &key, value.as_deref()),
            Note::Retry => self.feed(ctx, Input::Retry),
            Note::Answered => {
                // A device that was given up has no answer any more, and neither has its successor.
                let Some(answer) = self.device.as_mut().and_then(Device::answered) else { return Ok(()) };
                for input in self.opened(ctx, answer)? {
                    self.feed(ctx, input)?;
                }
                Ok(())
            }
            Note::Released => self.feed(ctx, Input::Released),
        }
    }

    /// Writes or removes one of our keys, if the directory is still ours.
    fn tell(&self, client: &Client, key: &str, value: Option<&str>) -> Result<()> {
        let dir = &self.id.backend_path;
        client.transaction(|tx| {
            if !self.is_ours(tx.read_opt(&format!("{dir}/state"))?.as_deref()) {
                return Ok(());
            }
            let path = format!("{dir}/{key}");
            match value {
                Some(value) => tx.write(&path, value),
                None => tx.rm_if_exists(&path),
            }
        })
    }

    /// Lets the machine know, and does what it says, until nothing is left to do.
    pub(super) fn feed<K: Kind<Device = D>>(&mut self, ctx: &mut Context<'_, K>, input: Input) -> Result<()> {
        let mut inputs = VecDeque::from([input]);
        while let Some(input) = inputs.pop_front() {
            let before = (self.machine.own(), self.machine.front());
            let (machine, actions) = step(self.machine.clone(), input);
            self.machine = machine;
            let after = (self.machine.own(), self.machine.front());
            if before != after {
                tracing::debug!(device = %self.id.backend_path, ?before, ?after, "step");
            }
            let (mut failed, mut skipped) = (false, false);
            for action in actions {
                if failed && action.is_void_after_failure() {
                    skipped |= action.is_question();
                    continue;
                }
                let question = action.is_question();
                let more = match self.act(ctx, action) {
                    Ok(more) => more,
                    Err(Error::Disconnected) => return Err(Error::Disconnected),
                    // A store that refuses, say for a quota, ends one device and not the driver.
                    Err(error) => {
                        skipped |= question;
                        vec![Input::Fault(Fault::from(error))]
                    }
                };
                failed |= more.iter().any(|input| !matches!(input, Input::Opened | Input::Connected | Input::Released));
                inputs.extend(more);
            }
            if skipped {
                inputs.push_back(Input::Skipped);
            }
        }
        Ok(())
    }

    fn act<K: Kind<Device = D>>(&mut self, ctx: &mut Context<'_, K>, action: Action) -> Result<Vec<Input>> {
        match action {
            Action::PublishFeatures => match self.features(ctx)? {
                Ok(keys) => {
                    let there = self.publish(ctx.client, &keys)?;
                    Ok(if there { Vec::new() } else { vec![Input::Removed] })
                }
                Err(input) => Ok(vec![input]),
            },
            Action::SetState(state) => {
                if let Some(unsaid) = self.log.admit() {
                    tracing::info!(device = %self.id.backend_path, unsaid, "state {state}");
                }
                let written = self.write_state(ctx.client, state, &[])?;
                self.after(ctx, written)
            }
            Action::Open => {
                // After a process that died in state 4 there is no device yet.
                if let Err(input) = self.create(ctx)? {
                    return Ok(vec![input, Input::Skipped]);
                }
                let keys = frontend::read_backend(ctx.client, &self.id.backend_path)?;
                // What the machine knows may be out of date: the directory may be another device's by now.
                let failure = if !self.is_ours(keys.get("state")) {
                    Some(Input::Removed)
                } else if self.machine.own() == State::InitWait && keys.get("hotplug-status") != Some("connected") {
                    Some(Input::Hotplug(false))
                } else {
                    None
                };
                if let Some(failure) = failure {
                    return Ok(vec![failure, Input::Skipped]);
                }
                let found_serving = self.machine.own() != State::InitWait;
                let opened = self.device.as_mut().map(|device| match found_serving {
                    true => device.reopen(&keys),
                    false => device.open(&keys),
                });
                match opened {
                    Some(Ok(Progress::Done(keys))) => self.opened(ctx, Ok(keys)),
                    Some(Ok(Progress::Later)) => Ok(Vec::new()),
                    Some(Err(fault)) => self.opened(ctx, Err(fault)),
                    None => self.opened(ctx, Err(Fault::host(5, "there is no device to open"))),
                }
            }
            Action::Connect => self.connect(ctx, false),
            Action::Reattach => self.connect(ctx, true),
            Action::Reconfigure => {
                let keys = match frontend::snapshot(ctx.client, &self.id.frontend_path, ctx.kind.frontend_keys())? {
                    Ok((_, keys)) => keys,
                    Err(fault) => return Ok(vec![Input::Fault(fault)]),
                };
                let outcome = self.device.as_mut().map_or(Ok(()), |device| device.reconfigure(&keys));
                Ok(outcome.map_or_else(|fault| vec![Input::Fault(fault)], |()| Vec::new()))
            }
            Action::BeginDisconnect => {
                if let Some(device) = &mut self.device {
                    device.disconnect();
                }
                self.unwatch_keys(ctx)?;
                Ok(Vec::new())
            }
            Action::ReportFault(fault) => {
                self.report(ctx, &fault);
                Ok(Vec::new())
            }
            Action::Release => {
                let released = self.device.take().map_or(Progress::Done(()), |mut device| device.release());
                tracing::info!(device = %self.id.backend_path, "released");
                Ok(if released == Progress::Later { Vec::new() } else { vec![Input::Released] })
            }
            Action::Forget => {
                self.forgotten = true;
                // Domain numbers only grow: what was said of devices that are gone would pile up.
                if ctx.client.read_opt(&format!("{}/state", self.id.backend_path))?.is_none() {
                    self.clear_faults(ctx)?;
                }
                if self.frontend.is_ok() {
                    ctx.watcher.remove(&self.state_path(), &format!("state {}", self.serial))?;
                }
                Ok(Vec::new())
            }
        }
    }

    /// What the machine is told about the end of an opening; the device's keys are published.
    fn opened<K: Kind<Device = D>>(
        &mut self,
        ctx: &mut Context<'_, K>,
        outcome: Result<Vec<(String, String)>, Fault>,
    ) -> Result<Vec<Input>> {
        let keys = match outcome {
            Ok(keys) => keys,
            Err(fault) => return Ok(vec![Input::OpenFailed(fault)]),
        };
        // It is open, whatever the store says: Opened comes first, trouble second.
        let mut inputs = vec![Input::Opened];
        match self.publish(ctx.client, &keys) {
            Ok(true) => {}
            Ok(false) => inputs.push(Input::Removed),
            Err(Error::Disconnected) => return Err(Error::Disconnected),
            Err(error) => inputs.push(Input::Fault(error.into())),
        }
        Ok(inputs)
    }

    /// Makes the device if there is none. The inner result is what has to be told to the machine if that fails.
    fn create<K: Kind<Device = D>>(&mut self, ctx: &mut Context<'_, K>) -> Result<Result<(), Input>> {
        if self.device.is_some() {
            return Ok(Ok(()));
        }
        if let Err(fault) = &self.frontend {
            return Ok(Err(Input::Fault(fault.clone())));
        }
        let keys = frontend::read_backend(ctx.client, &self.id.backend_path)?;
        if !self.is_ours(keys.get("state")) {
            return Ok(Err(Input::Removed));
        }
        let made = ctx.kind.create(&self.id, &keys, ctx.notifier.for_device(self.serial));
        Ok(made.map(|device| self.device = Some(device)).map_err(Input::Fault))
    }

    fn features<K: Kind<Device = D>>(
        &mut self,
        ctx: &mut Context<'_, K>,
    ) -> Result<Result<Vec<(String, String)>, Input>> {
        let created = self.create(ctx)?;
        Ok(created.and_then(|()| match &mut self.device {
            Some(device) => device.features().map_err(Input::Fault),
            None => Ok(Vec::new()),
        }))
    }

    fn connect<K: Kind<Device = D>>(&mut self, ctx: &mut Context<'_, K>, reattach: bool) -> Result<Vec<Input>> {
        let Some(device) = &mut self.device else {
            return Ok(vec![Input::ConnectFailed(Fault::host(5, "there is no device to connect"))]);
        };
        let (front, keys): (Front, Keys) =
            match frontend::snapshot(ctx.client, &self.id.frontend_path, ctx.kind.frontend_keys()) {
                Ok(Ok(taken)) => taken,
                Ok(Err(fault)) => return Ok(vec![Input::ConnectFailed(fault)]),
                Err(Error::Disconnected) => return Err(Error::Disconnected),
                Err(error) => return Ok(vec![Input::ConnectFailed(error.into())]),
            };
        let still = if reattach { front.is_serving() } else { front.is_ready() };
        if !still {
            return Ok(vec![Input::Frontend(front), Input::Skipped]);
        }
        if !reattach {
            match device.may_connect() {
                Ok(true) => {}
                Ok(false) => return Ok(vec![Input::Postponed]),
                Err(fault) => return Ok(vec![Input::ConnectFailed(fault)]),
            }
        }
        let connected = if reattach { device.reattach(&keys).map(|()| Vec::new()) } else { device.connect(&keys) };
        let published = match connected {
            Ok(published) => published,
            Err(fault) => return Ok(vec![Input::ConnectFailed(fault)]),
        };
        // From here on rings are mapped, whatever the store says: Connected comes first, trouble second.
        let mut inputs = vec![Input::Connected];
        let rest =
            if reattach { Ok(Written::Done) } else { self.write_state(ctx.client, State::Connected, &published) };
        match rest.and_then(|written| self.after(ctx, written)) {
            Ok(more) if more.is_empty() => {
                if let Some(unsaid) = self.log.admit() {
                    tracing::info!(device = %self.id.backend_path, unsaid, "connected");
                }
                match self.watch_keys(ctx) {
                    Ok(()) => {}
                    Err(Error::Disconnected) => return Err(Error::Disconnected),
                    Err(error) => inputs.push(Input::Fault(error.into())),
                }
            }
            Ok(more) => inputs.extend(more),
            Err(Error::Disconnected) => return Err(Error::Disconnected),
            Err(error) => inputs.push(Input::Fault(error.into())),
        }
        Ok(inputs)
    }

    fn watch_keys<K: Kind<Device = D>>(&mut self, ctx: &mut Context<'_, K>) -> Result<()> {
        let keys: Vec<String> =
            self.device.iter().flat_map(|d| d.watched_keys().iter().map(|&k| k.to_owned())).collect();
        for key in keys {
            ctx.watcher.add(&format!("{}/{key}", self.id.frontend_path), &format!("key {}", self.serial))?;
            self.watched_keys.push(key);
        }
        Ok(())
    }

    fn unwatch_keys<K: Kind<Device = D>>(&mut self, ctx: &mut Context<'_, K>) -> Result<()> {
        for key in std::mem::take(&mut self.watched_keys) {
            ctx.watcher.remove(&format!("{}/{key}", self.id.frontend_path), &format!("key {}", self.serial))?;
        }
        Ok(())
    }

    /// Writes keys; false if the directory is gone, which must not come back by our writing into it.
    fn publish(&self, client: &Client, keys: &[(String, String)]) -> Result<bool> {
        let dir = &self.id.backend_path;
        client.transaction(|tx| {
            let there = self.is_ours(tx.read_opt(&format!("{dir}/state"))?.as_deref());
            for (key, value) in keys.iter().filter(|_| there) {
                tx.write(&format!("{dir}/{key}"), value)?;
            }
            Ok(there)
        })
    }

    /// Writes keys and state in one transaction, unless the directory is not ours any more, or the toolstack asked for
    /// the end and this would overwrite its wish.
    fn write_state(&mut self, client: &Client, state: State, keys: &[(String, String)]) -> Result<Written> {
        let dir = &self.id.backend_path;
        let node = format!("{dir}/state");
        let written = client.transaction(|tx| {
            let now = tx.read_opt(&node)?;
            if !self.is_ours(now.as_deref()) {
                return Ok(Written::Gone);
            }
            let closing = now.and_then(|now| State::parse(&now)) == Some(State::Closing);
            if closing && !matches!(state, State::Closing | State::Closed) {
                return Ok(Written::AskedToClose);
            }
            for (key, value) in keys {
                tx.write(&format!("{dir}/{key}"), value)?;
            }
            tx.write(&node, &state.to_string())?;
            Ok(Written::Done)
        })?;
        if matches!(written, Written::Done) {
            self.said = true;
        }
        Ok(written)
    }

    fn after<K: Kind<Device = D>>(&self, ctx: &mut Context<'_, K>, written: Written) -> Result<Vec<Input>> {
        Ok(match written {
            Written::Done => Vec::new(),
            Written::Gone => vec![Input::Removed],
            Written::AskedToClose => {
                let online = ctx.client.read_opt(&format!("{}/online", self.id.backend_path))?.as_deref() == Some("1");
                vec![Input::Toolstack { online, closing: true }]
            }
        })
    }

    /// Removes the error node, and the folders above it that it leaves empty.
    fn clear_faults<K: Kind<Device = D>>(&self, ctx: &mut Context<'_, K>) -> Result<()> {
        let DeviceId { kind, frontend_id, devid, .. } = &self.id;
        let top = format!("{}/error", ctx.home);
        let mut path = format!("{top}/backend/{kind}/{frontend_id}/{devid}");
        ctx.client.transaction(|tx| tx.rm_if_exists(&path))?;
        while let Some((folder, _)) = path.rsplit_once('/') {
            path.truncate(folder.len());
            let empty = ctx.client.directory_opt(&path)?.is_some_and(|children| children.is_empty());
            if path.len() <= top.len() || !empty {
                break;
            }
            ctx.client.rm_if_exists(&path)?;
        }
        Ok(())
    }

    /// Log, the node that `xl` users know from the kernel's backends, and `error` in our own directory.
    fn report<K: Kind<Device = D>>(&self, ctx: &mut Context<'_, K>, fault: &Fault) {
        match fault.blame {
            Blame::Host => tracing::error!(device = %self.id.backend_path, "{fault}"),
            Blame::Guest => {
                if let Some(unsaid) = ctx.log.admit() {
                    tracing::warn!(device = %self.id.backend_path, unsaid, "{fault}");
                }
            }
        }
        let DeviceId { kind, frontend_id, devid, backend_path: dir, .. } = &self.id;
        let node = format!("{}/error/backend/{kind}/{frontend_id}/{devid}/error", ctx.home);
        // Faults quote what guests wrote; a value of some thousand bytes would not fit and need not be read.
        let text: String = fault.to_string().chars().take(512).collect();
        let told = ctx.client.write(&node, &text).and_then(|()| {
            ctx.client.transaction(|tx| {
                let ours = self.is_ours(tx.read_opt(&format!("{dir}/state"))?.as_deref());
                if ours { tx.write(&format!("{dir}/error"), &text) } else { Ok(()) }
            })
        });
        if let Err(error) = told {
            tracing::warn!(device = %dir, "cannot write the error node: {error}");
        }
    }
}
