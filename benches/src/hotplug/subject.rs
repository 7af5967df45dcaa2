//! One kind of hotplug program, and the thread that attaches with it: what it executes is where the thread is.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use bridge_scripts::vif;
use hypervisor::DomId;
use netback::spec::{self, VifSpec};
use netback::toolstack::script::{Call, Event};
use netback::toolstack::{Toolstack, Which};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;
use xenstore_client::Client;

use super::stage::{LOG, Stock};
use crate::Failure;
use crate::placement;

/// How long an interface may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// The interface of the guest that its driver uses. Another one just stays there.
pub(super) const USED: u32 = 0;

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Our script's work, done by the toolstack's process.
    Built,
    /// Our script, executed.
    Executed,
    /// Xen's script, executed.
    Stock,
}

/// Where the stock scripts are, and what their thread needs to get there.
#[derive(Debug, Clone)]
pub(super) struct Place {
    /// They.
    pub(super) stock: Stock,
    /// XenStore's socket.
    pub(super) socket: PathBuf,
    /// An empty folder of ours.
    pub(super) folder: PathBuf,
}

/// What the thread is to do.
#[derive(Debug, Clone, Copy)]
enum Job {
    /// Attach interface `devid`, and wait that long for the guest.
    Attach { devid: u32, wait: Duration },
    /// Detach it.
    Detach { devid: u32 },
}

/// What an attach was.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attach {
    /// When it began.
    pub(super) began: Instant,
    /// Processor time of the toolstack's thread, and of what it executed.
    pub(super) work: Duration,
    /// How many processes were started, where that can be told.
    pub(super) processes: Option<u32>,
}

/// One kind, ready to attach.
#[derive(Debug)]
pub(super) struct Subject {
    /// Which.
    pub(super) kind: Kind,
    /// The `script=` that is written.
    pub(super) script: String,
    jobs: Sender<Job>,
    done: Receiver<Result<Attach, String>>,
}

impl Subject {
    /// Starts the thread, on processor `cpu`. `spec` is the interface without its script.
    ///
    /// # Errors
    /// When it cannot be started, or the stock scripts cannot be reached.
    pub(super) fn start(
        kind: Kind,
        script: String,
        guest: DomId,
        spec: &str,
        store: Client,
        place: Option<Place>,
        cpu: usize,
    ) -> Result<Self, Failure> {
        let spec = spec::parse_words(&[spec, &format!("script={script}")])?;
        let (jobs, orders) = channel();
        let (answers, done) = channel();
        std::thread::Builder::new().name("toolstack".into()).spawn(move || {
            placement::pin(cpu);
            if let Some(place) = &place
                && let Err(error) = place.stock.enter(&place.socket, &place.folder)
            {
                // Whoever is gone waits for no answer.
                let _ = answers.send(Err(error.to_string()));
                return;
            }
            for job in orders {
                let outcome = work(job, guest, &spec, &store).map_err(|error| explain(error, place.is_some()));
                if answers.send(outcome).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { kind, script, jobs, done })
    }

    /// Begins to attach interface `devid`, waiting that long for the guest.
    pub(super) fn attach(&self, devid: u32, wait: Duration) {
        // If the thread is gone, the answer says why.
        let _ = self.jobs.send(Job::Attach { devid, wait });
    }

    /// How attaching went.
    ///
    /// # Errors
    /// What the toolstack said.
    pub(super) fn attached(&self) -> Result<Attach, Failure> {
        Ok(self.done.recv_timeout(PATIENCE).map_err(|_| "the toolstack's thread is stuck, or gone")??)
    }

    /// Detaches interface `devid`.
    ///
    /// # Errors
    /// What the toolstack said.
    pub(super) fn detach(&self, devid: u32) -> Result<(), Failure> {
        // As above.
        let _ = self.jobs.send(Job::Detach { devid });
        self.attached().map(drop)
    }
}

fn work(job: Job, guest: DomId, spec: &VifSpec, store: &Client) -> Result<Attach, String> {
    let toolstack = Toolstack { store, backend: DomId::DOM0, builtin: &built_in };
    let (processes, used) = (last_process(), used());
    let began = Instant::now();
    match job {
        Job::Attach { devid, wait } => {
            let spec = VifSpec { devid: Some(devid), ..spec.clone() };
            let attached = toolstack.attach(guest, &spec, wait).map_err(|error| error.to_string())?;
            if devid == USED && !attached.connected {
                return Err(format!("the guest did not connect within {} s", wait.as_secs()));
            }
        }
        Job::Detach { devid } => {
            let (_, complaint) =
                toolstack.detach(guest, Which::Devid(devid), false).map_err(|error| error.to_string())?;
            complaint.map_or(Ok(()), Err)?;
        }
    }
    let processes = last_process().zip(processes).map(|(after, before)| after.saturating_sub(before));
    Ok(Attach { began, work: used_since(used), processes })
}

/// As `netback attach` has it.
fn built_in(store: &Client, call: Call<'_>) -> Result<(), String> {
    let event = match call.event {
        Event::Online => vif::Event::Online,
        Event::Offline => vif::Event::Offline,
    };
    vif::hotplug(store, call.backend_path, call.script, event, call.vif).map_err(|error| error.to_string())
}

/// With the last that stock scripts wrote: they say little in XenStore.
fn explain(error: String, stock: bool) -> String {
    let log = if stock { std::fs::read_to_string(LOG).unwrap_or_default() } else { String::new() };
    let lines: Vec<&str> = log.lines().collect();
    let last = lines[lines.len().saturating_sub(5)..].join("\n  ");
    if last.is_empty() { error } else { format!("{error}\n{LOG} ends with:\n  {last}") }
}

/// The number of the process or thread that was started last in this process namespace (proc_sys_kernel(5),
/// `ns_last_pid`).
fn last_process() -> Option<u32> {
    std::fs::read_to_string("/proc/sys/kernel/ns_last_pid").ok()?.trim().parse().ok()
}

/// Processor time of this thread, and of the children that have ended and been waited for, with theirs.
fn used() -> Option<(Duration, Duration)> {
    let children = getrusage(UsageWho::RUSAGE_CHILDREN).ok()?;
    let time = |time: TimeVal| Duration::from_micros((time.tv_sec() * 1_000_000 + time.tv_usec()).unsigned_abs());
    Some((placement::thread_time(), time(children.user_time()) + time(children.system_time())))
}

fn used_since(before: Option<(Duration, Duration)>) -> Duration {
    let Some(((thread, children), (thread_before, children_before))) = used().zip(before) else {
        return Duration::ZERO;
    };
    thread.saturating_sub(thread_before) + children.saturating_sub(children_before)
}
