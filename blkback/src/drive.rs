//! Changing the disk in a guest's drive, and telling the backend that a disk has grown: commands of ours, because no
//! toolstack of Xen does either for a PV guest. They write keys of the backend's directory, which the backend watches.

use std::path::Path;
use std::time::{Duration, Instant};

use xenstore_client::{Client, DomId, Store};

use crate::device::{KINDS, MEDIUM_STATUS, RESIZE, RESIZE_STATUS};
use crate::hotplug;
use crate::nbd::Export;
use crate::spec::written_here;
use crate::takeover;
use crate::toolstack::Error;
use crate::vdev::Vdev;

/// How long the backend may take: it finishes what is in flight first.
const PATIENCE: Duration = Duration::from_secs(30);

fn refused<T>(text: impl Into<String>) -> Result<T, Error> {
    Err(Error::Refused(text.into()))
}

/// The directory of a disk of ours. Looked for where only the toolstack writes, not in the guest's own directory.
fn find(store: &Client, backend: DomId, frontend: DomId, vdev: Vdev) -> Result<String, Error> {
    for kind in KINDS {
        let path = format!("{}/backend/{kind}/{frontend}/{}", backend.home(), vdev.number());
        if store.read_opt(&format!("{path}/state"))?.is_some() {
            return Ok(path);
        }
    }
    refused(format!("domain {frontend} has no disk {}", vdev.name()))
}

/// Waits until a key has a value that `is_it` wants.
fn wait(store: &Client, path: &str, longest: Duration, is_it: impl Fn(&str) -> bool) -> Result<Option<String>, Error> {
    let watcher = store.watcher()?;
    watcher.add(path, "wait")?;
    let began = Instant::now();
    loop {
        if let Some(value) = store.read_opt(path)?.filter(|value| is_it(value)) {
            return Ok(Some(value));
        }
        let left = longest.saturating_sub(began.elapsed());
        if left.is_zero() {
            return Ok(None);
        }
        watcher.wait(left)?;
    }
}

/// Has the backend look whether a disk has grown. Returns its size before and after, in sectors of 512 bytes.
///
/// # Errors
/// When there is no such disk, it is not open, or it does not have the size that the guest knows.
pub fn resize(store: &Client, backend: DomId, frontend: DomId, vdev: Vdev) -> Result<(u64, u64), Error> {
    let path = find(store, backend, frontend, vdev)?;
    let key = format!("{path}/sectors");
    let Some(before) = store.read_opt(&key)? else {
        return refused(format!("{} is not open yet; its backend reads the size when it opens it", vdev.name()));
    };
    let before = before.parse().map_err(|_| Error::Refused(format!("{key} is {before:?}, no number")))?;
    let status = format!("{path}/{RESIZE_STATUS}");
    store.transaction(|tx| {
        tx.rm_if_exists(&status)?;
        tx.write(&format!("{path}/{RESIZE}"), "1")
    })?;
    let Some(said) = wait(store, &status, PATIENCE, |_| true)? else {
        return refused("the backend did not look in time; is blkback serve running? See its log");
    };
    let Ok(after) = said.parse::<u64>() else { return refused(said) };
    // All queues are told first, and then the guest.
    match wait(store, &key, PATIENCE, |value| value == after.to_string())? {
        Some(_) => Ok((before, after)),
        None => refused(format!("the disk has {after} sectors, but its queues do not take that up; see the log")),
    }
}

/// Puts another disk into a drive, or (`None`) takes the one in it out.
///
/// # Errors
/// When there is no such drive, the disk in it is a fixed one, or the new one cannot be served.
pub fn change(store: &Client, backend: DomId, frontend: DomId, vdev: Vdev, target: Option<&str>) -> Result<(), Error> {
    let path = find(store, backend, frontend, vdev)?;
    let key = |name: &str| store.read_opt(&format!("{path}/{name}"));
    if key("device-type")?.as_deref() != Some("cdrom") && key("removable")?.as_deref() != Some("1") {
        return refused(format!("{} is a fixed disk, not a drive; attach a drive with …,xvdd:cdrom,r", vdev.name()));
    }
    if let Some(help) = target.filter(|target| !Export::is_one(target)).and_then(written_here) {
        return refused(format!(
            "{}: this is another program's spelling, and no file or device here; {help}",
            target.unwrap_or_default()
        ));
    }
    let absolute = match target {
        None => String::new(),
        Some(export) if Export::is_one(export) => export.to_owned(),
        Some(target) => std::path::absolute(target)
            .map_err(|error| Error::Refused(format!("{target}: {error}")))?
            .into_os_string()
            .into_string()
            .map_err(|path| Error::Refused(format!("{}: XenStore takes paths in UTF-8 only", path.display())))?,
    };
    if target.is_some() {
        let access = hotplug::access(&key("mode")?.unwrap_or_default(), key("device-type")?.as_deref());
        takeover::look(store, backend, None, Path::new(&absolute), access)?
            .map_err(|refusal| Error::Refused(refusal.to_string()))?;
    }
    store.transaction(|tx| {
        tx.rm_if_exists(&format!("{path}/{MEDIUM_STATUS}"))?;
        // The hotplug program's, of the disk that goes.
        tx.rm_if_exists(&format!("{path}/physical-device-path"))?;
        tx.rm_if_exists(&format!("{path}/physical-device"))?;
        tx.write(&format!("{path}/params"), &absolute)
    })?;
    match wait(store, &format!("{path}/{MEDIUM_STATUS}"), PATIENCE, |_| true)?.as_deref() {
        Some("inserted" | "empty") => Ok(()),
        Some(error) => refused(error),
        None => refused("the backend did not change the disk in time; is blkback serve running? See its log"),
    }
}
