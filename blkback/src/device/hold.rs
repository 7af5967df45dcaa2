//! How far a disk is its guest's: when it may be read and written.
//!
//! A disk is claimed whole before the first request is served. Two cases make a claim come later than the disk's attachment,
//! or give it back for a while: a guest that migrates ([`takeover`]), and a guest whose device model uses the same image
//! ([`DeviceModel`]). All steps are on the driver's thread; a [`Lookout`] says when it is worth looking again.

use std::sync::PoisonError;

use xenstore_client::xenbus::Fault;
use xenstore_client::{Client, DomId, Store};

use super::opening::Purpose;
use super::{ON_HOLD, RESIZE_STATUS, TAKEOVER, Vbd, YIELD, YIELDED};
use crate::device_model::DeviceModel;
use crate::host_users::HostUser;
use crate::image::Image;
use crate::lookout::Lookout;
use crate::medium::{Medium, image_fault};
use crate::opener::Request;
use crate::worker::Order;

/// How far a disk is its guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Hold {
    /// The guest's former self has it; the medium is what it will be.
    Awaited,
    /// Kept from all other disks; the guest's device model has it, or may come for it.
    Reserved,
    /// Nobody else uses it in a way that the access forbids.
    #[default]
    Whole,
    /// As reserved, for the device model of the domain that this guest becomes. Nothing is read or written.
    Yielded(DomId),
}

const MOVING: &str = "EBUSY this guest moves to another domain, which has the disk: nothing is read or written here";

pub(super) fn host(error: impl std::fmt::Display) -> Fault {
    Fault::host(libc::EIO, error.to_string())
}

impl Vbd {
    pub(super) fn store(&self) -> Result<Client, Fault> {
        self.xen.store().map_err(host)
    }

    /// Has [`look_again`](Self::look_again) called when `has_come` says so.
    pub(super) fn look_out(&mut self, has_come: impl FnMut() -> bool + Send + 'static) -> Result<(), Fault> {
        self.look_out_for(false, has_come)
    }

    /// The same; `closed`: somebody closes the image when it is worth looking.
    fn look_out_for(&mut self, closed: bool, has_come: impl FnMut() -> bool + Send + 'static) -> Result<(), Fault> {
        let closed = self.medium.as_ref().filter(|_| closed).map(|medium| medium.image.path().to_owned());
        let notifier = self.notifier.clone();
        // Heard again as a change of our own key, on the driver's thread.
        let ready = move || notifier.tell(TAKEOVER, Some("ready".to_owned()));
        self.lookout = Some(Lookout::new(closed.as_deref(), has_come, ready).map_err(host)?);
        Ok(())
    }

    /// Looks for the moment when the device model has let go of a reserved image. `seen`: it has been seen with it.
    pub(super) fn look_for_unplug(&mut self, mut seen: bool) -> Result<(), Fault> {
        let (Hold::Reserved, Some(device_model), Some(medium)) = (self.hold, self.device_model.clone(), &self.medium)
        else {
            return Ok(());
        };
        // Not the image itself, which has to be closed when this device closes it.
        let target = medium.image.target();
        self.look_out_for(true, move || {
            let open = device_model.user(target).is_some();
            seen |= open;
            seen && !open
        })
    }

    /// Something has come that this disk waits for, perhaps.
    pub(super) fn look_again(&mut self) {
        if self.lookout.take().is_none() {
            return;
        }
        self.notifier.tell(TAKEOVER, None);
        let outcome = match self.hold {
            Hold::Awaited => self.take_over(),
            Hold::Reserved => self.take_from_device_model(),
            Hold::Yielded(domain) => self.take_back(domain),
            Hold::Whole => Ok(()),
        };
        if let Err(fault) = outcome {
            self.notifier.fault(fault);
        }
    }

    /// Whoever had the disk has let go.
    fn take_over(&mut self) -> Result<(), Fault> {
        let Some(keys) = self.opened_with.clone() else { return Ok(()) };
        self.begin_opening(Purpose::TakeOver, keys)
    }

    /// The same, and it was opened.
    pub(super) fn taken_over(&mut self, medium: Medium, request: &Request) -> Result<(), Fault> {
        self.hold_as(request)?;
        if self.hold != Hold::Awaited {
            tracing::info!(device = %self.id.backend_path, "the disk is this guest's now");
            self.notifier.tell(ON_HOLD, None);
            self.notifier.tell(RESIZE_STATUS, None);
            self.notifier.publish(medium.describe(&self.config.limits));
        }
        self.medium = Some(medium);
        match self.hold {
            Hold::Whole => self.serve_waiting(),
            // Its driver has come already: nothing more is to be expected of the device model.
            Hold::Reserved if self.waiting.is_some() => self.take_from_device_model(),
            Hold::Reserved => self.look_for_unplug(false),
            Hold::Awaited | Hold::Yielded(_) => Ok(()),
        }
    }

    /// Serves the guest that waits connected, if it does.
    fn serve_waiting(&mut self) -> Result<(), Fault> {
        match (self.waiting.take(), self.medium.clone()) {
            (Some(agreed), Some(medium)) => self.start_queues(&agreed, &medium),
            _ => Ok(()),
        }
    }

    /// The device model that has the image open, if it does.
    fn device_models_process(&self) -> Option<HostUser> {
        let (device_model, medium) = (self.device_model.as_ref()?, self.medium.as_ref()?);
        device_model.user(medium.image.target())
    }

    /// Claims a reserved disk whole.
    fn claim(&mut self) -> Result<(), Fault> {
        if let Some(medium) = &self.medium {
            medium.image.claim_reserved().map_err(|error| image_fault(&error))?;
        }
        self.hold = Hold::Whole;
        self.lookout = None;
        self.notifier.tell(ON_HOLD, None);
        tracing::info!(device = %self.id.backend_path, "the disk is this guest's alone now");
        Ok(())
    }

    /// The device model has let go of the image, or has never opened it.
    fn take_from_device_model(&mut self) -> Result<(), Fault> {
        if let Some(user) = self.device_models_process() {
            self.say_device_model(&user);
            return self.look_for_unplug(true);
        }
        match self.claim() {
            Ok(()) => {
                self.notifier.retry();
                self.serve_waiting()
            }
            // Somebody was quicker. The guest is told when its driver comes; until then it may be over.
            Err(fault) => {
                tracing::warn!(device = %self.id.backend_path, "{}", fault.text);
                self.notifier.tell(ON_HOLD, Some(format!("EBUSY {}", fault.text)));
                self.look_for_free()
            }
        }
    }

    /// Looks for the moment when nobody has a reserved image.
    fn look_for_free(&mut self) -> Result<(), Fault> {
        let Some(path) = self.medium.as_ref().map(|medium| medium.image.path().to_owned()) else { return Ok(()) };
        self.look_out(move || !Image::is_used(&path))
    }

    fn say_device_model(&self, user: &HostUser) -> String {
        let text = format!(
            "the guest's emulated disk is in use by its device model, {user}; the PV disk is connected when the guest \
             unplugs that (its kernel does by itself, without xen_emul_unplug=)"
        );
        self.notifier.tell(ON_HOLD, Some(format!("EBUSY {text}")));
        text
    }

    /// The guest's driver has come. Whether its rings may be connected now.
    pub(super) fn may_use(&mut self) -> Result<bool, Fault> {
        match self.hold {
            // An arriving guest is connected, and waits for its data.
            Hold::Awaited | Hold::Whole => return Ok(true),
            Hold::Yielded(_) => return Ok(false),
            Hold::Reserved => {}
        }
        let refused = match self.device_models_process() {
            Some(user) => user,
            None => match self.claim() {
                Ok(()) => return Ok(true),
                // Between the two looks, perhaps.
                Err(fault) => self.device_models_process().ok_or(fault)?,
            },
        };
        let text = self.say_device_model(&refused);
        if self.device_model.as_ref().is_some_and(|device_model| device_model.boots_by_uefi().unwrap_or(false)) {
            return Err(Fault::host(libc::EBUSY, text));
        }
        tracing::warn!(device = %self.id.backend_path, "{text}");
        self.look_for_unplug(true)?;
        Ok(false)
    }

    /// The hotplug program of the domain that this guest moves to asks for room for its device model.
    pub(super) fn yield_to(&mut self, domain: &str) {
        let Ok(to) = domain.parse::<DomId>() else { return };
        let asked = (domain.to_owned(), self.medium.as_ref().map(|medium| medium.image.clone()));
        let (domain, Some(image)) = asked else { return self.notifier.tell(YIELDED, Some(domain.to_owned())) };
        if matches!(self.hold, Hold::Awaited | Hold::Reserved) {
            // No lock of ours is in a device model's way.
            return self.notifier.tell(YIELDED, Some(domain));
        }
        tracing::info!(device = %self.id.backend_path, "makes way for the device model of domain {to}");
        self.hold = Hold::Yielded(to);
        self.running.lock().unwrap_or_else(PoisonError::into_inner).yields = Some((image, domain));
        self.order(&Order::Pause(true), Vec::new());
        self.notifier.tell(ON_HOLD, Some(MOVING.to_owned()));
        if let Err(fault) = self.look_for_the_mover(to) {
            self.notifier.fault(fault);
        }
    }

    /// Whether the disk of the domain that this guest was to become is gone.
    fn is_gone(store: &Client, path: &str) -> bool {
        // A store that does not answer says nothing.
        matches!(store.read_opt(&format!("{path}/state")), Ok(None))
    }

    fn path_of(&self, domain: DomId) -> String {
        let own = format!("/{}/{}", self.id.frontend_id, self.id.devid);
        let base = self.id.backend_path.strip_suffix(&own).unwrap_or(&self.id.backend_path);
        format!("{base}/{domain}/{}", self.id.devid)
    }

    /// Looks for the moment when the other domain's device model has let go of the image, or that domain's disk is gone.
    fn look_for_the_mover(&mut self, to: DomId) -> Result<(), Fault> {
        let (store, path, Some(medium)) = (self.store()?, self.path_of(to), &self.medium) else { return Ok(()) };
        let (device_model, target) = (DeviceModel::of(&store, to), medium.image.target());
        let mut seen = false;
        self.look_out_for(true, move || {
            let open = device_model.user(target).is_some();
            seen |= open;
            (seen && !open) || Self::is_gone(&store, &path)
        })
    }

    /// The device model that this disk made way for has let go, or its domain is gone. The locks are taken again. Requests
    /// are only served again when the domain is gone: then the migration has failed, and the guest is resumed here.
    fn take_back(&mut self, to: DomId) -> Result<(), Fault> {
        if self.running.lock().unwrap_or_else(PoisonError::into_inner).yields.is_some() {
            // What is in flight has not even ended yet.
            let mut first = true;
            return self.look_out(move || !std::mem::replace(&mut first, false));
        }
        let (store, path) = (self.store()?, self.path_of(to));
        if let Err(fault) = self.claim() {
            self.hold = Hold::Yielded(to);
            self.notifier.tell(ON_HOLD, Some(format!("EBUSY {}", fault.text)));
            return self.look_for_free();
        }
        if !Self::is_gone(&store, &path) {
            self.hold = Hold::Yielded(to);
            self.notifier.tell(ON_HOLD, Some(MOVING.to_owned()));
            return self.look_out(move || Self::is_gone(&store, &path));
        }
        tracing::info!(device = %self.id.backend_path, "goes on: domain {to} is gone");
        self.notifier.tell(YIELD, None);
        self.notifier.tell(YIELDED, None);
        self.order(&Order::Pause(false), Vec::new());
        self.notifier.retry();
        Ok(())
    }
}
