//! A guest that takes a disk over from its own former self.
//!
//! `xl migrate` attaches the disks of the arriving domain when its memory has come, and destroys the departing one only
//! when the arriving one runs (libxl_create.c, domcreate_rebuild_done; xl_migrate.c). In between both domains have the
//! disk: on one machine, or on two that share a file. The departing one is suspended, but the backend is not told so, and
//! it may yet be resumed, if the migration fails. So its lock stays, and the arriving guest waits for it: its disk
//! connects, and nothing of it is read or written before the lock is ours. Nothing can be written by both, however the
//! migration ends. Anybody else is refused at once.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use xenstore_client::{Client, DomId, Result, Store};

use crate::image::{self, Image, ImageError, Problem};
use crate::spec::Access;

/// How often the departing one's lock is looked at.
const OFTEN: Duration = Duration::from_millis(250);
/// How long a disk may take to be free whose last device has just gone: the backend hears of that by XenStore.
const MOMENT: Duration = Duration::from_millis(500);
/// What xl adds to the name of a domain that is arriving.
const INCOMING: &str = "--incoming";

/// Whether `frontend` can be given a disk, now or ([`may_wait`]) when it is let go of. Returns the device number of a block
/// device, or what is wrong with the disk.
///
/// # Errors
/// When XenStore refuses.
pub fn check(store: &Client, frontend: DomId, image: &Path, access: Access) -> Result<Checked> {
    if let Err(error) = Image::check_now(image, access)
        && may_wait(store, frontend, &error)?
    {
        return Ok(Ok(image::device_at(image)));
    }
    let began = Instant::now();
    loop {
        let checked = Image::check(image, access);
        let taken = matches!(checked, Err(ImageError { problem: Problem::Locked(_), .. }));
        if !taken || began.elapsed() > MOMENT {
            return Ok(checked);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

type Checked = std::result::Result<Option<(u32, u32)>, ImageError>;

/// Whether `frontend` may wait for a disk that cannot be had for this reason.
///
/// # Errors
/// When XenStore refuses.
pub fn may_wait(store: &Client, frontend: DomId, error: &ImageError) -> Result<bool> {
    Ok(matches!(error.problem, Problem::Locked(_)) && is_arriving(store, frontend)?)
}

/// Whether a domain is arriving: xl calls it so, or it has the identity (`vm`) of another domain of this machine.
fn is_arriving(store: &Client, domain: DomId) -> Result<bool> {
    let value = |domain: &str, key: &str| store.read_opt(&format!("/local/domain/{domain}/{key}"));
    let own = domain.to_string();
    if value(&own, "name")?.is_some_and(|name| name.ends_with(INCOMING)) {
        return Ok(true);
    }
    let Some(vm) = value(&own, "vm")?.filter(|vm| !vm.is_empty()) else { return Ok(false) };
    for other in store.directory_opt("/local/domain")?.unwrap_or_default() {
        if other != own && value(&other, "vm")?.as_ref() == Some(&vm) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A thread that looks whether a disk can be had. Dropped, it says nothing any more.
#[derive(Debug)]
pub struct Lookout {
    over: Arc<AtomicBool>,
}

impl Lookout {
    /// Calls `ready` on a thread of its own when nobody has `image` any more (a lock lasts until its holder's last write
    /// has landed, also if that was killed); or when something else is wrong with it.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn new(image: PathBuf, access: Access, ready: impl FnOnce() + Send + 'static) -> std::io::Result<Self> {
        let over = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&over);
        std::thread::Builder::new().name("lookout".to_owned()).spawn(move || {
            while is_held(&image, access) {
                std::thread::sleep(OFTEN);
                if told.load(Ordering::Acquire) {
                    return;
                }
            }
            if !told.load(Ordering::Acquire) {
                ready();
            }
        })?;
        Ok(Self { over })
    }
}

impl Drop for Lookout {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
    }
}

fn is_held(image: &Path, access: Access) -> bool {
    matches!(Image::check_now(image, access), Err(ImageError { problem: Problem::Locked(_), .. }))
}
