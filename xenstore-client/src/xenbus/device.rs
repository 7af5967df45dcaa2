//! What a backend crate implements.

use super::{Fault, Keys, Notifier};
use crate::DomId;

/// Which device this is, and where it lives in the store.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DeviceId {
    /// The kind's name in paths, such as `vbd`.
    pub kind: String,
    /// The domain that uses the device.
    pub frontend_id: DomId,
    /// The device's number within that domain and kind.
    pub devid: u32,
    /// `/local/domain/<backend>/backend/<kind>/<frontend-id>/<devid>`.
    pub backend_path: String,
    /// `/local/domain/<frontend-id>/…`, checked to lie below that prefix.
    pub frontend_path: String,
}

/// A kind of device, such as `vbd` or `vif`. Called on the driver's thread only.
pub trait Kind {
    /// One device of this kind.
    type Device: Device;

    /// The name in `backend/<name>`.
    fn name(&self) -> &str;

    /// The keys of the frontend's directory that [`Device::connect`] wants to see; everything else there is never
    /// read. A `#` stands for a decimal number of at most four digits: `queue-#/ring-ref#`.
    fn frontend_keys(&self) -> &[&str];

    /// Makes a device from what the toolstack wrote into `backend`. Nothing is opened yet: the hotplug program has
    /// not run.
    ///
    /// # Errors
    /// A fault goes to the error node and the device to Closed.
    fn create(&mut self, id: &DeviceId, backend: &Keys, notifier: Notifier) -> Result<Self::Device, Fault>;
}

/// What was done at once, or will be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress<T> {
    /// It is done.
    Done(T),
    /// It is being done elsewhere, and a [`Notifier`] tells when it is.
    Later,
}

/// One device. Called on the driver's thread only, one call at a time; a call holds up all devices of its driver: what can
/// hang, such as storage, belongs elsewhere.
///
/// Order of calls: `features`, `open` once hotplug-status is `connected`, `connect` when the frontend is ready,
/// `disconnect` (answered by [`Notifier::disconnected`]), perhaps `features` and `connect` again, at last `release`.
/// `open` is not repeated on a reconnect, because the medium stays open until `release`; only if it failed is it tried
/// again when the frontend comes back. For a device found in state 4 (the process that served it died) the order is
/// `reopen`, `reattach`.
pub trait Device {
    /// What is published before state 2.
    ///
    /// # Errors
    /// A fault goes to the error node and the device to Closing.
    fn features(&mut self) -> Result<Vec<(String, String)>, Fault>;

    /// Opens the medium. `backend` is read anew, with what the hotplug program added. The keys returned are published
    /// at once: they are the sign that the medium could be had. If it is done later, [`Notifier::answered`] tells, and
    /// [`Device::answered`] returns them; [`release`](Self::release) may come before.
    ///
    /// # Errors
    /// As [`Device::features`].
    fn open(&mut self, backend: &Keys) -> Result<Progress<Vec<(String, String)>>, Fault>;

    /// What the device does elsewhere has come to an end. Returns the result if that was [`open`](Self::open) or
    /// [`reopen`](Self::reopen), and once.
    fn answered(&mut self) -> Option<Result<Vec<(String, String)>, Fault>> {
        None
    }

    /// As [`open`](Self::open), for a device found in state 4, before [`reattach`](Self::reattach).
    ///
    /// # Errors
    /// As [`Device::features`].
    fn reopen(&mut self, backend: &Keys) -> Result<Progress<Vec<(String, String)>>, Fault> {
        self.open(backend)
    }

    /// Whether [`connect`](Self::connect) may be called now. If not, the frontend is left waiting at its state until
    /// [`Notifier::retry`], or until it starts over. Asked before each `connect`.
    ///
    /// # Errors
    /// As [`Device::features`].
    fn may_connect(&mut self) -> Result<bool, Fault> {
        Ok(true)
    }

    /// Maps the rings and starts to serve. The keys returned are published in one transaction with state 4. If that
    /// transaction finds that the device was taken away meanwhile, `disconnect` follows.
    ///
    /// # Errors
    /// As [`Device::features`]. Nothing may stay mapped then; `disconnect` is not called.
    fn connect(&mut self, frontend: &Keys) -> Result<Vec<(String, String)>, Fault>;

    /// Takes over from a backend process that died while Connected: same rings, same event channels, state stays 4.
    ///
    /// # Errors
    /// As [`Device::connect`]. The default cannot do it and lets the frontend reconnect.
    fn reattach(&mut self, frontend: &Keys) -> Result<(), Fault> {
        let _ = frontend;
        Err(Fault::host(32, "the backend process that served this device has died; the device has to reconnect"))
    }

    /// Keys of the frontend's directory that stay watched while connected. They are names without a slash.
    fn watched_keys(&self) -> &[&str] {
        &[]
    }

    /// A watched key was written (`None`: removed, or longer than 256 bytes). Also called once after `connect`.
    fn frontend_changed(&mut self, key: &str, value: Option<&str>) {
        let _ = (key, value);
    }

    /// Keys of our own directory that stay watched from the device's making until its release. They are names without a
    /// slash.
    fn watched_backend_keys(&self) -> &[&str] {
        &[]
    }

    /// A key of [`watched_backend_keys`](Self::watched_backend_keys) was written: by the toolstack, or by us (`None`:
    /// removed, longer than 4096 bytes, or not text).
    fn backend_changed(&mut self, key: &str, value: Option<&str>) {
        let _ = (key, value);
    }

    /// The frontend went from Connected to Reconfiguring: its keys were read anew. State Reconfigured follows.
    ///
    /// # Errors
    /// A fault goes to the error node and the device to Closing.
    fn reconfigure(&mut self, frontend: &Keys) -> Result<(), Fault> {
        let _ = frontend;
        Ok(())
    }

    /// Stops consuming requests, lets those in flight finish, unmaps; then calls [`Notifier::disconnected`], from any
    /// thread, perhaps at once. Must not block on the I/O in flight.
    fn disconnect(&mut self);

    /// Closes the medium, or gives up opening it; nothing is held afterwards. Only called when disconnected, and the last
    /// call: if it is done later, [`Notifier::released`] tells.
    fn release(&mut self) -> Progress<()>;
}
