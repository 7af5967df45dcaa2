//! Runs all devices of one kind on one thread.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::machine::Input;
use super::slot::{Context, Slot};
use super::{Kind, Notes, Notifier};
use crate::wake::Wake;
use crate::{Client, DomId, Error, LogGate, Result, Store, WatchEvent, Watcher};

/// How long [`Driver::run`] waits for I/O in flight after a stop.
const STOP_PATIENCE: Duration = Duration::from_secs(30);
/// How long it waits then for storage that is only being closed: the process's end closes it, too.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);

/// Stops a driver from another thread (or from a signal, by way of a thread that waits for it). Clones are the same
/// handle.
#[derive(Debug, Clone)]
pub struct StopHandle {
    inner: Arc<(AtomicBool, Wake)>,
}

impl StopHandle {
    /// A handle that is not stopped.
    ///
    /// # Errors
    /// [`Error::Io`] if no eventfd can be made.
    pub fn new() -> Result<Self> {
        let wake = Wake::new().map_err(|e| Error::io("eventfd", e))?;
        Ok(Self { inner: Arc::new((AtomicBool::new(false), wake)) })
    }

    /// Stops, for good.
    pub fn stop(&self) {
        self.inner.0.store(true, Ordering::Release);
        self.inner.1.set();
    }

    /// Whether [`StopHandle::stop`] was called.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.inner.0.load(Ordering::Acquire)
    }

    /// Readable (poll) once stopped.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.inner.1.as_fd()
    }
}

type Key = (DomId, u32);

/// All devices of one kind that our domain serves.
pub struct Driver<K: Kind> {
    client: Client,
    watcher: Watcher,
    notifier: Notifier,
    notes: Notes,
    kind: K,
    home: String,
    base: String,
    slots: BTreeMap<Key, Slot<K::Device>>,
    next_serial: u64,
    log: LogGate,
    stopping: bool,
}

/// What the events of one round ask to look at.
#[derive(Debug, Default)]
struct Work {
    /// Look through the whole of `backend/<kind>`.
    scan: bool,
    dirs: BTreeSet<Key>,
    states: BTreeSet<u64>,
    keys: BTreeSet<(u64, String)>,
    /// Keys of our own directories.
    own_keys: BTreeSet<(Key, String)>,
}

impl<K: Kind> Driver<K> {
    /// A driver for `/local/domain/<my_domid>/backend/<kind>`. Nothing happens before [`Driver::run`].
    ///
    /// # Errors
    /// [`Error::Disconnected`], [`Error::Io`].
    pub fn new(client: Client, my_domid: DomId, kind: K) -> Result<Self> {
        let watcher = client.watcher()?;
        let (notifier, notes) = Notifier::channel().map_err(|e| Error::io("eventfd", e))?;
        let home = my_domid.home();
        let base = format!("{home}/backend/{}", kind.name());
        Ok(Self {
            client,
            watcher,
            notifier,
            notes,
            kind,
            home,
            base,
            slots: BTreeMap::new(),
            next_serial: 1,
            log: LogGate::default(),
            stopping: false,
        })
    }

    /// The kind.
    pub fn kind(&self) -> &K {
        &self.kind
    }

    /// Serves until `stop`. Then every connected device gets an error node and goes through Closing to Closed, every
    /// other one is released at the state it has, and the call returns when all I/O in flight has ended. A driver that
    /// was stopped is done; to serve again, make a new one.
    ///
    /// # Errors
    /// [`Error::Disconnected`] when the store is lost: devices go on serving until this driver is dropped, but nobody
    /// can manage them any more. [`Error::Timeout`] if I/O is still in flight 30 s after a stop.
    pub fn run(&mut self, stop: &StopHandle) -> Result<()> {
        self.watcher.add(&self.base, "backend")?;
        let result = self.serve(stop);
        match self.watcher.remove(&self.base, "backend") {
            // Everything is in order here, but nobody can know in the store.
            Err(Error::Disconnected) => result.and(Err(Error::Disconnected)),
            Err(error) => {
                tracing::warn!("{error}");
                result
            }
            Ok(()) => result,
        }
    }

    fn serve(&mut self, stop: &StopHandle) -> Result<()> {
        let mut stopped = None;
        loop {
            if stop.is_stopped() && stopped.is_none() {
                stopped = Some(Instant::now());
                self.stopping = true;
                for key in self.keys() {
                    self.with(key, |slot, ctx| slot.feed(ctx, Input::Stop))?;
                }
            }
            let mut longest = None;
            if let Some(stopped) = stopped {
                let Some(busy) = self.slots.values().find(|slot| !slot.is_idle()) else { return Ok(()) };
                let closing = self.slots.values().all(Slot::is_let_go);
                let patience = if closing { CLOSE_PATIENCE } else { STOP_PATIENCE };
                let left = patience.saturating_sub(stopped.elapsed());
                if left.is_zero() && closing {
                    tracing::warn!(device = %busy.path(), "its storage does not answer while it is closed");
                    return Ok(());
                }
                if left.is_zero() {
                    let what = format!("{} to finish its I/O", busy.path());
                    return Err(Error::Timeout { what, seconds: STOP_PATIENCE.as_secs() });
                }
                longest = Some(left);
            }
            self.sleep(stop, longest)?;
            while let Some((serial, note)) = self.notes.take_tagged() {
                if let Some(key) = self.key_of(serial) {
                    self.with(key, |slot, ctx| slot.note(ctx, note))?;
                }
            }
            let work = self.collect()?;
            self.work(work)?;
        }
    }

    fn sleep(&self, stop: &StopHandle, longest: Option<Duration>) -> Result<()> {
        let watcher = self.watcher.fd();
        let notes = self.notes.fd();
        let stop = stop.fd();
        let mut fds = vec![PollFd::new(&watcher, PollFlags::IN), PollFd::new(&notes, PollFlags::IN)];
        // A stop that was seen stays readable for ever.
        let timeout = match longest {
            Some(longest) => Timespec::try_from(longest + Duration::from_millis(1)).ok(),
            None => {
                fds.push(PollFd::new(&stop, PollFlags::IN));
                None
            }
        };
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(Error::io("poll", error)),
        }
    }

    /// Takes all events there are and notes each place to look at once.
    fn collect(&self) -> Result<Work> {
        let mut work = Work::default();
        // Bounded, so that a guest that writes without pause cannot keep us from working.
        for _ in 0..4096 {
            let Some(WatchEvent { path, token }) = self.watcher.next()? else { break };
            match token.split_once(' ') {
                Some(("state", serial)) => work.states.extend(serial.parse::<u64>().ok()),
                Some(("key", serial)) => work.keys.extend(serial.parse().ok().map(|serial| (serial, path))),
                _ => self.collect_backend(&path, &mut work),
            }
        }
        Ok(work)
    }

    fn collect_backend(&self, path: &str, work: &mut Work) {
        let rest = path.strip_prefix(&self.base).unwrap_or_default().trim_start_matches('/');
        let mut parts = rest.splitn(3, '/');
        let dom = parts.next().map(str::parse);
        let devid = parts.next().map(str::parse);
        match (dom, devid, parts.next()) {
            (Some(Ok(dom)), Some(Ok(devid)), None | Some("state" | "online" | "hotplug-status")) => {
                work.dirs.insert((dom, devid));
            }
            // Most are our own writes; some a device may want to hear of.
            (Some(Ok(dom)), Some(Ok(devid)), Some(key)) => {
                work.own_keys.insert(((dom, devid), key.to_owned()));
            }
            (_, _, Some(_)) => {}
            _ => work.scan = true,
        }
    }

    fn work(&mut self, work: Work) -> Result<()> {
        let mut dirs = work.dirs;
        if work.scan {
            dirs.extend(self.keys());
            dirs.extend(self.scan()?);
        }
        for serial in work.states {
            if let Some(key) = self.key_of(serial) {
                self.with(key, |slot, ctx| slot.read_frontend(ctx))?;
            }
        }
        for (serial, path) in work.keys {
            if let Some(key) = self.key_of(serial) {
                self.with(key, |slot, ctx| slot.key_changed(ctx, &path))?;
            }
        }
        for (key, name) in work.own_keys {
            self.with(key, |slot, ctx| slot.own_key_changed(ctx, &name))?;
        }
        for key in dirs {
            self.with(key, |slot, ctx| slot.refresh(ctx))?;
            self.adopt(key)?;
        }
        Ok(())
    }

    fn scan(&self) -> Result<Vec<Key>> {
        let mut found = Vec::new();
        for dom in self.client.directory_opt(&self.base)?.unwrap_or_default() {
            let Ok(frontend) = dom.parse::<DomId>() else { continue };
            let devices = self.client.directory_opt(&format!("{}/{dom}", self.base))?.unwrap_or_default();
            found.extend(devices.iter().filter_map(|devid| Some((frontend, devid.parse().ok()?))));
        }
        Ok(found)
    }

    /// Takes in the device at `key` if there is one and none is known.
    fn adopt(&mut self, (dom, devid): Key) -> Result<()> {
        // "07" and "+7" would lead to the same number as "7" but not to the same directory; this path is the true one.
        let path = format!("{}/{dom}/{devid}", self.base);
        if self.stopping || self.slots.contains_key(&(dom, devid)) {
            return Ok(());
        }
        let serial = self.next_serial;
        self.next_serial += 1;
        let mut ctx = Context {
            client: &self.client,
            watcher: &self.watcher,
            notifier: &self.notifier,
            log: &mut self.log,
            home: &self.home,
            kind: &mut self.kind,
        };
        let (slot, found) = match Slot::new(&mut ctx, serial, path, dom, devid) {
            Ok(Some(taken)) => taken,
            Ok(None) => return Ok(()),
            Err(Error::Disconnected) => return Err(Error::Disconnected),
            Err(error) => {
                tracing::error!("device {dom}/{devid} is not taken in: {error}");
                return Ok(());
            }
        };
        self.slots.insert((dom, devid), slot);
        self.with((dom, devid), |slot, ctx| slot.begin(ctx, found))
    }

    /// Does something with a device, and buries it if that was its end. Only the loss of the store comes back as an
    /// error: nothing that concerns one device may stop the others.
    fn with(
        &mut self,
        key: Key,
        action: impl FnOnce(&mut Slot<K::Device>, &mut Context<'_, K>) -> Result<()>,
    ) -> Result<()> {
        let Some(slot) = self.slots.get_mut(&key) else { return Ok(()) };
        let mut ctx = Context {
            client: &self.client,
            watcher: &self.watcher,
            notifier: &self.notifier,
            log: &mut self.log,
            home: &self.home,
            kind: &mut self.kind,
        };
        match action(slot, &mut ctx) {
            Ok(()) => {}
            Err(Error::Disconnected) => return Err(Error::Disconnected),
            Err(error) => slot.feed(&mut ctx, Input::Fault(error.into()))?,
        }
        if slot.forgotten {
            self.slots.remove(&key);
            // Its successor may have been waiting for the old device's I/O to end.
            self.adopt(key)?;
        }
        Ok(())
    }

    fn keys(&self) -> Vec<Key> {
        self.slots.keys().copied().collect()
    }

    fn key_of(&self, serial: u64) -> Option<Key> {
        self.slots.iter().find(|(_, slot)| slot.serial() == serial).map(|(key, _)| *key)
    }
}

impl<K: Kind + std::fmt::Debug> std::fmt::Debug for Driver<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Driver").field("kind", &self.kind).field("base", &self.base).finish_non_exhaustive()
    }
}
