//! What a toolstack does to disks: attach, detach, list, with libxl's keys in libxl's order
//! (tools/libs/light/libxl_disk.c). On real Xen `xl` does this; on the emulated machine nobody else would.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use xenstore_client::xenbus::{State, toolstack};
use xenstore_client::{Client, DomId, Store};

use crate::device::{KINDS, ON_HOLD, OPENING, RESIZE_STATUS, hung};
use crate::hotplug;
use crate::medium::SECTOR_SIZE;
use crate::spec::{Access, DiskSpec, Format, TargetKind, written_here};
use crate::takeover;
use crate::vdev::Vdev;

pub use xenstore_client::xenbus::toolstack::ToolError as Error;

fn refused<T>(text: impl Into<String>) -> Result<T, Error> {
    Error::refuse(text)
}

fn device(backend: DomId, frontend: DomId, vdev: Vdev) -> toolstack::DeviceAddress<'static> {
    toolstack::DeviceAddress { kind: "vbd", frontend_kind: "vbd", backend, frontend, devid: vdev.number() }
}

/// What an attached disk is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attached {
    /// The guest uses it.
    Connected,
    /// The guest's driver has not come yet.
    Waiting,
}

/// Attaches a disk to a domain, and waits up to `wait` for the guest to connect.
///
/// # Errors
/// When the disk cannot be served, the device exists, or no backend answers; nothing is left behind then.
pub fn attach(
    store: &Client,
    backend: DomId,
    frontend: DomId,
    spec: &DiskSpec,
    wait: Duration,
) -> Result<Attached, Error> {
    if store.directory_opt(&frontend.home())?.is_none() {
        // Its error says which domains there are.
        toolstack::find_domain(store, &frontend.to_string())?;
        return refused(format!("no domain {frontend}, though one of that name"));
    }
    let path = target(spec, backend)?;
    // Looked at before anything is written: whoever types the command is to see what is wrong, not only the log.
    takeover::look(store, backend, Some(frontend), Path::new(&path), spec.access)?
        .map_err(|refusal| Error::Refused(refusal.to_string()))?;
    let device = device(backend, frontend, spec.vdev);
    if store.read_opt(&format!("{}/state", device.backend_path()))?.is_some() {
        return refused(format!("domain {frontend} has a disk {} already; detach it first", spec.vdev.name()));
    }
    let number = spec.vdev.number().to_string();
    let name = spec.vdev.name();
    let device_type = if spec.cdrom { "cdrom" } else { "disk" };
    let mode = match spec.access {
        Access::ReadOnly => "r",
        Access::Write => "w",
        Access::SharedWrite => "w!",
    };
    let flag = |on: bool| if on { "1" } else { "0" };
    let mut backend_keys = vec![
        ("params", path.as_str()),
        ("script", "block"),
        ("removable", flag(spec.cdrom)),
        ("bootable", "1"),
        ("dev", name.as_str()),
        ("type", "phy"),
        ("mode", mode),
        ("device-type", device_type),
        ("discard-enable", flag(spec.discard)),
        ("specification", "xen"),
    ];
    if spec.direct_io_safe {
        backend_keys.push(("direct-io-safe", "1"));
    }
    let sector_size = spec.sector_size.map(|bytes| bytes.to_string());
    if let Some(bytes) = &sector_size {
        backend_keys.push((SECTOR_SIZE, bytes));
    }
    let trusted = flag(spec.trusted.unwrap_or(true));
    let frontend_keys = [("virtual-device", number.as_str()), ("device-type", device_type), ("trusted", trusted)];
    toolstack::add_device(store, &device, &backend_keys, &frontend_keys)?;
    let finished = finish_attach(store, &device, wait);
    if finished.is_err() {
        // What remains after a failure is ours to clear away; if that fails too, the first error matters more.
        if let Err(error) = toolstack::remove_device(store, &device, Duration::from_secs(1), true, || Ok(())) {
            tracing::warn!(%error, "clearing away what is left of the disk");
        }
    }
    finished
}

/// The part after the keys are written: state 2, the hotplug program's keys, and the guest.
fn finish_attach(store: &Client, device: &toolstack::DeviceAddress<'_>, wait: Duration) -> Result<Attached, Error> {
    let backend = device.backend_path();
    let state = format!("{backend}/state");
    match toolstack::wait_state(
        store,
        &state,
        &[State::InitWait, State::Closing, State::Closed],
        toolstack::INIT_TIMEOUT,
    ) {
        Ok(State::InitWait) => {}
        Ok(_) => return refused(toolstack::backend_error(store, &backend)?),
        Err(error) => {
            return refused(format!("no backend took the disk up ({error}); is blkback serve running?"));
        }
    }
    hotplug::run(store, &backend, hotplug::Event::Add).map_err(Error::Refused)?;
    wait_open(store, &backend)?;
    let began = Instant::now();
    match toolstack::wait_state(store, &state, &[State::Connected, State::Closing, State::Closed], wait) {
        Ok(State::Connected) => Ok(Attached::Connected),
        Ok(_) => refused(toolstack::backend_error(store, &backend)?),
        Err(_) if began.elapsed() >= wait => Ok(Attached::Waiting),
        Err(error) => Err(error.into()),
    }
}

/// Waits until the backend has opened the disk, which it shows by publishing its size.
fn wait_open(store: &Client, backend: &str) -> Result<(), Error> {
    let watcher = store.watcher()?;
    watcher.add(backend, "open")?;
    let began = Instant::now();
    loop {
        if store.read_opt(&format!("{backend}/sectors"))?.is_some() {
            return Ok(());
        }
        let state = store.read_opt(&format!("{backend}/state"))?;
        if matches!(state.as_deref().and_then(State::parse), None | Some(State::Closing | State::Closed)) {
            return refused(toolstack::backend_error(store, backend)?);
        }
        let left = toolstack::INIT_TIMEOUT.saturating_sub(began.elapsed());
        if left.is_zero() {
            let opening = store.read_opt(&format!("{backend}/{OPENING}"))?;
            return refused(match opening.and_then(|opening| hung(&opening, SystemTime::now())) {
                Some(hung) => format!("{hung}; attach the disk again when it answers"),
                None => "the backend did not open the disk in time; see its log".to_owned(),
            });
        }
        watcher.wait(left)?;
    }
}

/// The absolute path of a disk that this backend can serve.
fn target(spec: &DiskSpec, backend: DomId) -> Result<String, Error> {
    if let Some(reason) = spec.unsupported() {
        return refused(reason);
    }
    if let Some(script) = &spec.script {
        let help = script.strip_prefix("block-").and_then(|name| written_here(&format!("{name}:")));
        let help = help.unwrap_or("set the device up first and attach it as phy:/dev/…");
        return refused(format!("script={script} is not run by this command: {help}"));
    }
    if let Some(other) = spec.backend.as_ref().filter(|other| **other != backend.to_string()) {
        return refused(format!(
            "backend={other} is not the domain this backend runs in ({backend}): attach the disk there"
        ));
    }
    let target = match &spec.target {
        Some(target) if spec.format == Format::Raw => target,
        _ => return refused("an empty drive cannot be served: name an image"),
    };
    if spec.kind == TargetKind::Nbd {
        return Ok(target.clone());
    }
    let path = std::path::absolute(target).map_err(|error| Error::Refused(format!("{target}: {error}")))?;
    match path.into_os_string().into_string() {
        Ok(path) => Ok(path),
        Err(path) => refused(format!("{}: XenStore takes paths in UTF-8 only", path.display())),
    }
}

/// Detaches a disk: as `xl block-detach`, or with `force` as its `--force`.
///
/// # Errors
/// When there is no such disk, or the guest does not let go of it in time.
pub fn detach(store: &Client, backend: DomId, frontend: DomId, vdev: Vdev, force: bool) -> Result<(), Error> {
    let device = device(backend, frontend, vdev);
    if store.read_opt(&format!("{}/state", device.backend_path()))?.is_none() {
        return refused(format!("domain {frontend} has no disk {}", vdev.name()));
    }
    // A disk that the guest has left is still open for its return.
    toolstack::ask_to_let_go(store, &device)?;
    match toolstack::remove_device(store, &device, toolstack::DESTROY_TIMEOUT, force, || Ok(())) {
        Ok(()) => Ok(()),
        Err(xenstore_client::Error::Timeout { .. }) => refused(format!(
            "{0} is not let go of after {1} s: the guest has it mounted, or its storage does not answer. It was asked to, and \
             lets go when it can: run this again then. --force takes it away now",
            vdev.name(),
            toolstack::DESTROY_TIMEOUT.as_secs()
        )),
        Err(error) => Err(error.into()),
    }
}

/// A domain's disks, in the columns of `xl block-list`; a disk that failed, whose writes wait for room, whose storage does
/// not answer or has lost its size, or that was let go of after its detachment was given up, has a line that says so below
/// it. So has one that its guest uses and nobody serves: `unserved` is
/// the backend domain that has no server, if that is so.
///
/// # Errors
/// When XenStore refuses.
pub fn list(store: &Client, frontend: DomId, unserved: Option<DomId>) -> Result<String, Error> {
    use std::fmt::Write as _;

    let mut text = String::from("Vdev  BE  handle state evt-ch ring-ref BE-path\n");
    let devices = format!("{}/device/vbd", frontend.home());
    let mut numbers: Vec<u32> =
        store.directory_opt(&devices)?.unwrap_or_default().iter().filter_map(|name| name.parse().ok()).collect();
    numbers.sort_unstable();
    for number in numbers {
        let front = format!("{devices}/{number}");
        let value = |key: &str| store.read_opt(&format!("{front}/{key}"));
        let shown = |value: Option<String>| value.unwrap_or_else(|| "-1".to_owned());
        let backend = value("backend")?.unwrap_or_default();
        let (backend_id, state) = (shown(value("backend-id")?), shown(value("state")?));
        let (port, ring) = (shown(value("event-channel")?), shown(value("ring-ref")?));
        // Writing to a String cannot fail.
        let _ =
            writeln!(text, "{number:<5} {backend_id:<3} {frontend:<6} {state:<5} {port:<6} {ring:<8} {backend:<30}");
        if unserved.is_some_and(|domid| is_served_by_nobody(&backend, domid)) && is_connected(store, &backend)? {
            let _ = writeln!(text, "      {}: {NO_SERVER}", Vdev::from_number(number).name());
        }
        let name = Vdev::from_number(number).name();
        let opening = store.read_opt(&format!("{backend}/{OPENING}"))?;
        if let Some(hung) = opening.and_then(|opening| hung(&opening, SystemTime::now())) {
            let _ = writeln!(text, "      {name}: {hung}; the disk goes on when it answers, and can be detached");
        }
        if is_let_go(store, &backend)? {
            let _ = writeln!(text, "      {name}: {LET_GO}");
        }
        for key in ["error", ON_HOLD, RESIZE_STATUS] {
            // A number is the size of a disk with which all is well.
            let said = store.read_opt(&format!("{backend}/{key}"))?.filter(|said| said.parse::<u64>().is_err());
            if let Some(said) = said {
                let _ = writeln!(text, "      {name}: {said}");
            }
        }
    }
    Ok(text)
}

/// What `list` says of a disk in state 4 without a server.
const NO_SERVER: &str = "no server: blkback was killed, or stopped without an end, while the guest used this disk, and the \
                         guest waits; start it again (blkback serve): the disk then ends with I/O errors in the guest";

/// What `list` says of a disk whose detachment was given up before the guest, or the storage, let go of it.
const LET_GO: &str = "let go of by the guest: detach it (again) to clear it away";

/// Whether a disk was asked to go, and has.
fn is_let_go(store: &Client, backend: &str) -> Result<bool, Error> {
    let state = store.read_opt(&format!("{backend}/state"))?;
    let online = store.read_opt(&format!("{backend}/online"))?;
    Ok(state.as_deref().and_then(State::parse) == Some(State::Closed) && online.as_deref() == Some("0"))
}

/// Whether a backend's directory is one of ours, below `domid`.
fn is_served_by_nobody(backend: &str, domid: DomId) -> bool {
    KINDS.iter().any(|kind| backend.starts_with(&format!("{}/backend/{kind}/", domid.home())))
}

fn is_connected(store: &Client, backend: &str) -> Result<bool, Error> {
    let state = store.read_opt(&format!("{backend}/state"))?;
    Ok(state.as_deref().and_then(State::parse) == Some(State::Connected))
}
