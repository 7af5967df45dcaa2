//! The tap behind a device, and its place in the network.

use std::rc::Rc;

use bridge_scripts::{apply, vif};
use hypervisor::PAGE_SIZE;
use hypervisor::memory::{IoList, Mapping};
use xenstore_client::xenbus::Fault;

use super::Vif;
use crate::tap::{Features, Tap, TapError};
use crate::toolstack::script::is_builtin;

impl Vif {
    pub(super) fn name(&self) -> String {
        format!("vif{}.{}", self.id.frontend_id, self.id.devid)
    }

    pub(super) fn tap(&self) -> Result<&Tap, Fault> {
        self.tap.as_ref().ok_or_else(|| Fault::host(libc::ENODEV, "there is no tap"))
    }

    /// The tap's queues for the connection's; the tap may have been renamed meanwhile.
    pub(super) fn tap_queues(&self, count: usize) -> Result<Vec<Tap>, Fault> {
        let tap = self.tap()?;
        let first =
            tap.try_clone().map_err(|error| Fault::host(libc::EMFILE, format!("the tap's descriptor: {error}")))?;
        let name = tap.name().map_err(|error| tap_fault(&error))?.unwrap_or_else(|| self.name());
        let others = (1..count).map(|queue| self.config.taps.open(&name, queue as u32));
        std::iter::once(Ok(first)).chain(others).collect::<Result<_, _>>().map_err(|error| tap_fault(&error))
    }

    /// Forgets the filter of an interface that is gone. libxl's hotplug program does so too, but nobody runs it when a
    /// domain and its toolstack vanish together.
    pub(super) fn forget_filter(&self, interface: &str) {
        let names = [interface.to_owned(), self.name()];
        if let Err(error) = apply::forget_filters(&apply::Options::default(), &names) {
            tracing::debug!(device = %self.id.backend_path, %error, "the filter cannot be forgotten");
        }
    }

    /// Makes the tap, and puts it where the last one was if a hotplug program has done that before.
    pub(super) fn make_tap(&mut self) -> Result<(), Fault> {
        if self.tap.is_some() {
            return Ok(());
        }
        let tap = self.config.taps.open(&self.name(), 0).map_err(|error| tap_fault(&error))?;
        tap.set_features(Features::default()).map_err(|error| tap_fault(&error))?;
        (self.tap, self.mtu_before) = (Some(tap), None);
        let Some(script) = self.plugged.take() else { return Ok(()) };
        let (device, interface) = (&self.id.backend_path, self.name());
        if !is_builtin(&script) {
            let program = if script.is_empty() { "its hotplug program" } else { &script };
            let text = format!(
                "{interface} was made anew after its backend had ended, and {program} has run for the last one: it is in \
                 no network until you put it there, or detach and attach it"
            );
            tracing::error!(%device, "{text}");
            self.notifier.tell("error", Some(text));
            return Ok(());
        }
        let wired = self.xen.store().map_err(|error| error.to_string()).and_then(|store| {
            let online = vif::Event::Online;
            vif::hotplug(&store, device, &script, online, &interface).map_err(|error| error.to_string())
        });
        if let Err(error) = wired {
            self.tap = None;
            self.plugged = Some(script);
            return Err(Fault::host(
                libc::EIO,
                format!("{interface} was made anew after its backend had ended: {error}"),
            ));
        }
        tracing::info!(%device, %interface, %script, "made anew and joined to its network");
        Ok(())
    }
}

/// Reads and forgets what is in a tap's queue.
pub(super) fn drop_frames(tap: &Tap) -> Result<(), Fault> {
    let failed = |error| Fault::host(libc::ENOMEM, format!("memory for frames: {error}"));
    let memory = Rc::new(Mapping::anonymous(PAGE_SIZE).map_err(failed)?);
    let mut list = IoList::with_capacity(1);
    list.push(&memory, 0, PAGE_SIZE);
    // More than any tap's queue holds: somebody who sends without pause does not keep us here.
    for _ in 0..65_536 {
        if tap.read(&list).is_err() {
            // There are none; or what is wrong will be found when the queue reads.
            break;
        }
    }
    Ok(())
}

pub(super) fn tap_fault(error: &TapError) -> Fault {
    Fault::host(error.source.raw_os_error().unwrap_or(libc::EIO), error.to_string())
}
