//! The toolstack's side: what libxl writes and waits for, for tools of our own and for tests.

use std::time::{Duration, Instant};

use super::State;
use crate::wire::{Access, MessageType, Perm};
use crate::{Client, DomId, Error, ErrorCode, Result, Store};

/// How long libxl waits for a backend's state 2 before it runs the hotplug program (`LIBXL_INIT_TIMEOUT`).
pub const INIT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long libxl waits for a backend's state 6 when a device is removed (`LIBXL_DESTROY_TIMEOUT`).
pub const DESTROY_TIMEOUT: Duration = Duration::from_secs(10);

/// What a toolstack could not do, in words for an administrator.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// The request makes no sense, or the machine is not as it should be.
    #[error("{0}")]
    Refused(String),
    /// XenStore refused.
    #[error(transparent)]
    Store(#[from] Error),
}

impl ToolError {
    /// A refusal, as the result of a function.
    ///
    /// # Errors
    /// Always.
    pub fn refuse<T>(text: impl Into<String>) -> Result<T, Self> {
        Err(Self::Refused(text.into()))
    }
}

/// A device as the toolstack sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceAddress<'a> {
    /// The kind's name under the backend domain's `backend/`, such as `vbd` or `vbd3`.
    pub kind: &'a str,
    /// The kind's name under the frontend domain's `device/`: `vbd` also for `vbd3`.
    pub frontend_kind: &'a str,
    /// The domain that serves.
    pub backend: DomId,
    /// The domain that uses.
    pub frontend: DomId,
    /// The number within domain and kind.
    pub devid: u32,
}

impl DeviceAddress<'_> {
    /// The backend's directory.
    #[must_use]
    pub fn backend_path(&self) -> String {
        format!("{}/backend/{}/{}/{}", self.backend.home(), self.kind, self.frontend, self.devid)
    }

    /// The frontend's directory.
    #[must_use]
    pub fn frontend_path(&self) -> String {
        format!("{}/device/{}/{}", self.frontend.home(), self.frontend_kind, self.devid)
    }
}

/// The domain that `name` stands for: a number, or a name in XenStore.
///
/// # Errors
/// [`Error::NoDomain`], the store's refusal.
pub fn find_domain(client: &Client, name: &str) -> Result<DomId> {
    let mut known = Vec::new();
    for id in client.directory_opt("/local/domain")?.unwrap_or_default() {
        let Ok(domid) = id.parse::<DomId>() else { continue };
        let its_name = client.read_opt(&format!("{}/name", domid.home()))?.unwrap_or_default();
        if id == name || its_name == name {
            return Ok(domid);
        }
        known.push(if its_name.is_empty() { id } else { format!("{id} ({its_name})") });
    }
    let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
    Err(Error::NoDomain { name: name.to_owned(), known })
}

/// The same for whom devices of a kind are to be taken away from: also a domain that is gone, by its number. What the
/// toolstack that destroyed it did not know of is still there.
///
/// # Errors
/// As [`find_domain`].
pub fn find_past_domain(client: &Client, name: &str, backend: DomId, kind: &str) -> Result<DomId> {
    let absent = match find_domain(client, name) {
        Err(Error::NoDomain { name, known }) => Error::NoDomain { name, known },
        found => return found,
    };
    match name.parse::<DomId>() {
        Ok(gone) if client.directory_opt(&format!("{}/backend/{kind}/{gone}", backend.home()))?.is_some() => Ok(gone),
        _ => Err(absent),
    }
}

/// Writes both directories in one transaction, as libxl does (`libxl__device_generic_add`): the frontend's belongs to
/// the guest and may be read by the backend's domain, the backend's the other way round. `frontend`, `frontend-id`,
/// `online=1`, `state=1` and `backend`, `backend-id`, `state=1` are added to the keys given. What was in these
/// directories before is removed.
///
/// # Errors
/// The store's refusal; EEXIST if there is a backend directory that has not been closed.
pub fn add_device(
    client: &Client,
    device: &DeviceAddress<'_>,
    backend_keys: &[(&str, &str)],
    frontend_keys: &[(&str, &str)],
) -> Result<()> {
    let (back, front) = (device.backend_path(), device.frontend_path());
    let back_perms = [Perm::new(Access::None, device.backend), Perm::new(Access::Read, device.frontend)];
    let front_perms = [Perm::new(Access::None, device.frontend), Perm::new(Access::Read, device.backend)];
    let (back_id, front_id) = (device.backend.to_string(), device.frontend.to_string());
    client.transaction(|tx| {
        if tx.read_opt(&format!("{back}/state"))?.is_some_and(|state| State::parse(&state) != Some(State::Closed)) {
            return Err(Error::Store { op: MessageType::Mkdir, path: back.clone(), code: ErrorCode::Exists });
        }
        let ends = [
            (&front, &front_perms, frontend_keys, [("backend", &back), ("backend-id", &back_id)]),
            (&back, &back_perms, backend_keys, [("frontend", &front), ("frontend-id", &front_id)]),
        ];
        for (dir, perms, keys, links) in ends {
            tx.rm_if_exists(dir)?;
            tx.mkdir(dir)?;
            // Before the keys, which inherit them.
            tx.set_perms(dir, perms)?;
            for (key, value) in links {
                tx.write(&format!("{dir}/{key}"), value)?;
            }
            for (key, value) in keys {
                tx.write(&format!("{dir}/{key}"), value)?;
            }
            tx.write(&format!("{dir}/state"), "1")?;
        }
        tx.write(&format!("{back}/online"), "1")
    })
}

/// Waits until the `state` node at `path` reads one of `wanted`, by a watch. A node that does not exist counts as
/// [`State::Closed`], and so does one that may no longer be read, which is how a guest sees that its device's other half
/// was removed; text that is no state as [`State::Unknown`].
///
/// # Errors
/// [`Error::Timeout`] which says what the state was instead.
pub fn wait_state(client: &Client, path: &str, wanted: &[State], timeout: Duration) -> Result<State> {
    let watcher = client.watcher()?;
    watcher.add(path, "wait")?;
    let start = Instant::now();
    loop {
        let state = match client.read_opt(path) {
            Ok(None) => State::Closed,
            Ok(Some(text)) => State::parse(&text).unwrap_or(State::Unknown),
            Err(error) if error.code() == Some(&ErrorCode::Access) => State::Closed,
            Err(error) => return Err(error),
        };
        if wanted.contains(&state) {
            return Ok(state);
        }
        let left = timeout.saturating_sub(start.elapsed());
        if left.is_zero() {
            let wanted: Vec<String> = wanted.iter().map(State::to_string).collect();
            let what = format!("{path} to become {} (it is {state})", wanted.join(" or "));
            return Err(Error::Timeout { what, seconds: timeout.as_secs() });
        }
        // Whatever wakes us, the state is read again above.
        watcher.wait(left)?;
    }
}

/// What the backend wrote about its fault into the device's directory `backend`; a sentence that it wrote nothing, where
/// it did not.
///
/// # Errors
/// The store's refusal.
pub fn backend_error(client: &Client, backend: &str) -> Result<String> {
    let error = client.read_opt(&format!("{backend}/error"))?;
    Ok(error.unwrap_or_else(|| "the backend closed the device without saying why; see its log".to_owned()))
}

/// Asks a backend that is at state 6 already, because the guest has left by itself, to close once more. It keeps the
/// medium for the guest's return until then, and says 6 again when it has let go of it: whoever removes the device after
/// this may use the medium at once.
///
/// # Errors
/// The store's refusal.
pub fn ask_to_let_go(client: &Client, device: &DeviceAddress<'_>) -> Result<()> {
    let back = device.backend_path();
    let state = format!("{back}/state");
    client.transaction(|tx| match tx.read_opt(&state)?.as_deref().and_then(State::parse) {
        Some(State::Closed) => {
            tx.write(&format!("{back}/online"), "0")?;
            tx.write(&state, &State::Closing.to_string())
        }
        _ => Ok(()),
    })
}

/// Detaches a device as libxl does: asks the backend to close, waits for its state 6, runs `hotplug` (what the hotplug
/// program's `remove` does; it comes before the directories go because it reads them), removes both directories. If the
/// guest does not let go in time, the directories stay and the error says so; `force` removes them nevertheless, which
/// the backend answers by unmapping everything.
///
/// # Errors
/// [`Error::Timeout`] without `force`, `hotplug`'s error, the store's refusal.
pub fn remove_device(
    client: &Client,
    device: &DeviceAddress<'_>,
    timeout: Duration,
    force: bool,
    hotplug: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let (back, front) = (device.backend_path(), device.frontend_path());
    let state = format!("{back}/state");
    client.transaction(|tx| {
        let Some(now) = tx.read_opt(&state)? else { return Ok(()) };
        tx.write(&format!("{back}/online"), "0")?;
        if State::parse(&now) == Some(State::Closed) { Ok(()) } else { tx.write(&state, "5") }
    })?;
    match wait_state(client, &state, &[State::Closed], timeout) {
        Ok(_) => {}
        Err(Error::Timeout { .. }) if force => tracing::warn!("{back} did not close in time; removed by force"),
        Err(error) => return Err(error),
    }
    hotplug()?;
    client.transaction(|tx| {
        tx.rm_if_exists(&front)?;
        tx.rm_if_exists(&back)?;
        // The directory of all of this guest's devices of the kind, when it was the last (as libxl tidies up).
        let above = back.rsplit_once('/').map_or("", |(above, _)| above);
        match tx.directory_opt(above)? {
            Some(names) if names.is_empty() => tx.rm_if_exists(above),
            _ => Ok(()),
        }
    })
}

/// Creates the home of a domain as libxl does (`libxl__domain_make`): it is dom0's and the domain may read it; the
/// domain itself owns `data`, `error` (where a backend in it reports faults), `drivers`, `feature` and `attr`, and, so
/// that it may serve devices, `backend`.
///
/// # Errors
/// The store's refusal.
pub fn create_domain(client: &Client, dom: DomId, name: &str) -> Result<()> {
    let home = dom.home();
    let read_only = [Perm::new(Access::None, DomId::DOM0), Perm::new(Access::Read, dom)];
    let own = [Perm::new(Access::None, dom)];
    client.transaction(|tx| {
        tx.rm_if_exists(&home)?;
        tx.mkdir(&home)?;
        tx.set_perms(&home, &read_only)?;
        tx.write(&format!("{home}/name"), name)?;
        tx.write(&format!("{home}/domid"), &dom.to_string())?;
        for key in ["cpu", "memory", "device", "control"] {
            tx.mkdir(&format!("{home}/{key}"))?;
            tx.set_perms(&format!("{home}/{key}"), &read_only)?;
        }
        for key in ["control/shutdown", "data", "error", "drivers", "feature", "attr", "backend"] {
            tx.mkdir(&format!("{home}/{key}"))?;
            tx.set_perms(&format!("{home}/{key}"), &own)?;
        }
        Ok(())
    })
}

/// Removes the home of a domain, and what backends in `backends` hold for it (by force: the guest is gone).
///
/// # Errors
/// The store's refusal.
pub fn destroy_domain(client: &Client, dom: DomId, backends: &[DomId]) -> Result<()> {
    client.transaction(|tx| {
        for backend in backends {
            let base = format!("{}/backend", backend.home());
            for kind in tx.directory_opt(&base)?.unwrap_or_default() {
                tx.rm_if_exists(&format!("{base}/{kind}/{dom}"))?;
            }
        }
        tx.rm_if_exists(&dom.home())
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::*;
    use crate::server::Server;

    #[test]
    fn a_domain_that_is_gone_is_found_by_what_it_left() {
        let server = Server::new().unwrap();
        let store = server.connect(DomId::DOM0).unwrap();
        create_domain(&store, DomId(7), "web").unwrap();
        store.mkdir("/local/domain/0/backend/vbd/5/51712").unwrap();
        let find = |name, kind| find_past_domain(&store, name, DomId::DOM0, kind).ok();
        assert_eq!((find("web", "vbd"), find("7", "vbd")), (Some(DomId(7)), Some(DomId(7))));
        assert_eq!((find("5", "vbd"), find("5", "vif"), find("6", "vbd")), (Some(DomId(5)), None, None));
        assert!(find_domain(&store, "5").is_err());
    }
}
