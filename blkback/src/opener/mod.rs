//! Opening disks where they keep nobody else waiting.
//!
//! Whatever touches a guest's storage can hang for as long as it likes: a device-mapper device that is suspended, a file on
//! NFS whose server is gone, an NBD server that says nothing. So an image is opened, checked, measured and closed on a thread
//! of its own ([`Openers`]), and the driver's thread, which serves all disks, hears when it is done. What goes there is a
//! [`Request`], plain data; what comes back is a [`Medium`], values and descriptors, or a [`Refusal`]. XenStore is read and
//! written before and after, not there (but for the number of a device model's process). So a process can take the thread's
//! place.

mod patience;
mod threads;

use xenstore_client::xenbus::{Fault, Keys};

pub use patience::{Hung, PATIENCE, ask};
pub use threads::{Job, Openers, Panicked, Place};

use crate::device_model::DeviceModel;
use crate::image::{Image, ImageError};
use crate::medium::{self, Medium};

/// How far a disk is to be its guest's.
#[derive(Debug, Clone)]
pub enum Claim {
    /// Whole.
    Whole,
    /// Kept from everybody but the guest's device model.
    Reserve(DeviceModel),
    /// Not at all: only what it will be is looked at.
    Foresee,
}

/// A disk to be opened.
#[derive(Debug, Clone)]
pub struct Request {
    /// Our directory's keys: what it is, and how it is to be served.
    pub keys: Keys,
    /// How it is to be claimed.
    pub claim: Claim,
}

/// Why a disk was not opened.
#[derive(Debug)]
pub struct Refusal {
    /// What the administrator is told.
    pub fault: Fault,
    /// That somebody has it, if it is that: it can be waited for, perhaps.
    pub taken: Option<ImageError>,
}

impl Request {
    /// Opens it. May take as long as the storage likes.
    ///
    /// # Errors
    /// As [`Medium::open`].
    pub fn carry_out(&self) -> Result<Medium, Refusal> {
        match (self.open(), self.check()) {
            (Ok(medium), _) => Ok(medium),
            (Err(fault), Some(check)) if fault.errno == libc::EBUSY => match check() {
                // It was let go of meanwhile.
                Ok(()) => self.open().map_err(|fault| Refusal { fault, taken: None }),
                Err(error) => Err(Refusal { fault, taken: Some(error) }),
            },
            (Err(fault), _) => Err(Refusal { fault, taken: None }),
        }
    }

    fn open(&self) -> Result<Medium, Fault> {
        match &self.claim {
            Claim::Whole => Medium::open(&self.keys),
            Claim::Reserve(device_model) => Medium::reserve(&self.keys, device_model),
            Claim::Foresee => Medium::foresee(&self.keys),
        }
    }

    /// What tells whether the disk can be claimed in this way; `None` where nothing is claimed.
    pub fn check(&self) -> Option<impl Fn() -> Result<(), ImageError> + Send + 'static> {
        let (path, access) = (medium::target(&self.keys)?, medium::access(&self.keys).ok()?);
        let device_model = match &self.claim {
            Claim::Whole => None,
            Claim::Reserve(device_model) => Some(device_model.clone()),
            Claim::Foresee => return None,
        };
        Some(move || {
            let checked = match &device_model {
                Some(device_model) => Image::check_reserve(&path, device_model),
                None => Image::check_now(&path, access),
            };
            checked.map(drop)
        })
    }
}
