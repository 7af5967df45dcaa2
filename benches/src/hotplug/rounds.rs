//! The process that attaches: the toolstack's side, each kind of hotplug program by turns, and the guest's driver.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hypervisor::emu::{GuestOptions, GuestSeat, Member};
use hypervisor::{Backend as _, DomId, Guest};
use netback::front::{Frontend, Options};
use xenstore_client::xenbus::State;
use xenstore_client::{Client, Store};

use super::Arguments;
use super::report::{Report, Times};
use super::subject::{Kind, PATIENCE, Place, Subject, USED};
use crate::Failure;
use crate::disk::bar;
use crate::guest::wait_for;
use crate::net::card::QUEUE_PAGES;
use crate::net::plan::{BRIDGE, Topology, UPLINK, guest_address};

/// What [`super::run`] adds to what was typed.
#[derive(Debug, clap::Parser)]
pub struct Inner {
    /// Where the machine is.
    #[arg(long)]
    dir: PathBuf,
    /// Our script, by a path that is none of the usual ones.
    #[arg(long)]
    script: PathBuf,
    /// The processor of the toolstack and the hotplug programs, and that of everything else.
    #[arg(long, value_delimiter = ',')]
    cpus: Vec<usize>,
    #[command(flatten)]
    arguments: Arguments,
}

/// An interface that nobody drives, for counting processes: a driver's threads would be among them.
const UNUSED: u32 = USED + 1;
/// Between two attaches. What a deleted table leaves to the kernel is done by then.
const PAUSE: Duration = Duration::from_millis(50);

/// Measures, and prints what it finds.
///
/// # Errors
/// A sentence for whoever typed the command.
pub fn run(inner: &Inner) -> Result<(), Failure> {
    let arguments = &inner.arguments;
    let &[toolstack_cpu, others_cpu] = &*inner.cpus else { return Err("--cpus takes two".into()) };
    let dom0 = Member::join(&inner.dir, DomId::DOM0)?;
    let options =
        GuestOptions { name: "hotplug".into(), memory_pages: QUEUE_PAGES as u32 + 64, ..GuestOptions::default() };
    let guest = Arc::new(GuestSeat::join(&inner.dir, options)?);
    let domid = Guest::domid(&*guest);
    let name = format!("vif-{}", arguments.topology);
    let spec = interface(arguments.topology);
    let start = |kind, script: String, place: Option<Place>| {
        Subject::start(kind, script, domid, &spec, dom0.store()?, place, toolstack_cpu)
    };
    let mut subjects =
        vec![start(Kind::Built, name.clone(), None)?, start(Kind::Executed, inner.script.display().to_string(), None)?];
    if let Some(stock) = &arguments.stock {
        let folder = inner.dir.with_file_name("stock");
        std::fs::create_dir(&folder)?;
        let place = Place { stock: stock.clone(), socket: inner.dir.join("xenstored.sock"), folder };
        subjects.push(start(Kind::Stock, stock.path(&name), Some(place))?);
    }
    let stop = Arc::new(AtomicBool::new(false));
    let driver = {
        let (guest, stop) = (Arc::clone(&guest), Arc::clone(&stop));
        std::thread::Builder::new().name("guest".into()).spawn(move || drive(&guest, &stop))?
    };
    let measured = measure(&subjects, &dom0.store()?, domid, arguments.rounds);
    stop.store(true, Ordering::Release);
    let driven = driver.join().map_err(|_| "the guest's thread panicked")?;
    // What the guest met comes first: the toolstack only saw that nothing came.
    driven?;
    let measured = measured?;
    let report = Report::new(arguments, &inner.script, (toolstack_cpu, others_cpu), &measured);
    print!("{report}");
    if let Some(file) = &arguments.json {
        std::fs::write(file, serde_json::to_string_pretty(&report)? + "\n")
            .map_err(|error| format!("{}: {error}", file.display()))?;
    }
    Ok(())
}

/// The interface as in xl.cfg, without its script. What is not said, such as the MTU, each script finds out by itself.
fn interface(topology: Topology) -> String {
    let mac = "mac=00:16:3e:00:00:01";
    match topology {
        Topology::Bridge => format!("{mac},bridge={BRIDGE}"),
        Topology::Route | Topology::Nat => format!("{mac},ip={},gatewaydev={UPLINK}", guest_address(0)),
    }
}

/// The guest's driver: connects whenever the interface comes, and lets go of it when it is asked to.
fn drive(guest: &Arc<GuestSeat>, stop: &AtomicBool) -> Result<(), Failure> {
    let store = Guest::store(&**guest)?;
    let state = format!("{}/device/vif/{USED}/state", Guest::domid(&**guest).home());
    while wait_for(&store, &state, &[State::Initialising], stop)? {
        let mut front = Frontend::connect(Arc::<GuestSeat>::clone(guest), USED, &Options::default())?;
        let queues = front.take_queues();
        let backend = format!("{}/state", front.backend_path());
        wait_for(&store, &backend, &[State::Closing, State::Closed], stop)?;
        front.close(queues, None)?;
    }
    Ok(())
}

/// What was found of one kind.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) kind: Kind,
    pub(super) processes: Option<u32>,
    pub(super) rounds: Vec<Times>,
}

fn measure(subjects: &[Subject], store: &Client, guest: DomId, rounds: u32) -> Result<Vec<Found>, Failure> {
    let bar = bar("attaching", u64::from(rounds + 1) * subjects.len() as u64);
    let mut found = Vec::new();
    for subject in subjects {
        // The round that does not count is good for counting.
        subject.attach(UNUSED, Duration::ZERO);
        let attach = subject.attached().map_err(|error| format!("{}: {error}", subject.script))?;
        subject.detach(UNUSED)?;
        found.push(Found { kind: subject.kind, processes: attach.processes, rounds: Vec::new() });
        bar.inc(1);
    }
    for _ in 0..rounds {
        for (subject, found) in subjects.iter().zip(&mut found) {
            std::thread::sleep(PAUSE);
            let times = round(subject, store, guest).map_err(|error| format!("{}: {error}", subject.script))?;
            found.rounds.push(times);
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    Ok(found)
}

fn round(subject: &Subject, store: &Client, guest: DomId) -> Result<Times, Failure> {
    let backend = format!("{}/backend/vif/{guest}/{USED}", DomId::DOM0.home());
    let (state, status) = (format!("{backend}/state"), format!("{backend}/hotplug-status"));
    let watcher = store.watcher()?;
    watcher.add(&state, "state")?;
    watcher.add(&status, "hotplug-status")?;
    subject.attach(USED, PATIENCE);
    let (mut ready, mut done, mut connected) = (None, None, None);
    let began = Instant::now();
    while connected.is_none() && began.elapsed() < PATIENCE {
        let Some(event) = watcher.wait(Duration::from_millis(200))? else {
            // A failure is not waited for.
            if done.is_none() && store.read_opt(&status)?.as_deref() == Some("error") {
                break;
            }
            continue;
        };
        let now = Instant::now();
        let value = store.read_opt(&event.path)?.unwrap_or_default();
        match (event.token.as_str(), value.as_str()) {
            ("state", "2") => ready = ready.or(Some(now)),
            ("state", "4") => connected = Some(now),
            ("hotplug-status", "connected") => done = done.or(Some(now)),
            _ => {}
        }
    }
    let attach = subject.attached()?;
    subject.detach(USED)?;
    let (Some(ready), Some(done), Some(connected)) = (ready, done, connected) else {
        return Err("the backend's states went by unseen".into());
    };
    Ok(Times {
        connected: connected.duration_since(attach.began),
        hotplug: done.duration_since(ready),
        work: attach.work,
    })
}
