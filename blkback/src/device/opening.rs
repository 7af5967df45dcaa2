//! What a disk asks an opener for, and what it does with the answer. All of it is on the driver's thread, and nothing here
//! waits for storage.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use xenstore_client::xenbus::{Fault, Keys, Progress};

use super::hold::{Hold, host};
use super::{MEDIUM_STATUS, NOT_YET, ON_HOLD, PARAMS, RESIZE_STATUS, Vbd};
use crate::device_model::DeviceModel;
use crate::doubt;
use crate::image::{Image, Size};
use crate::lookout::Lookout;
use crate::medium::{self, Medium};
use crate::opener::{Claim, Hung, Job, Panicked, Place, Refusal, Request};
use crate::takeover;
use crate::worker::Order;

/// Our key that is there while the storage of a disk does not answer: since when (seconds of the epoch), and its path.
pub const OPENING: &str = "opening";
/// How long it may take before that is said.
const SLOW: Duration = Duration::from_secs(2);

/// What a disk is opened for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Purpose {
    /// The driver has asked for it.
    Attach,
    /// Its guest has come back to a disk that a dead process had.
    Return,
    /// Whoever had it has let go, perhaps.
    TakeOver,
    /// It is to be put into the drive.
    Change,
}

/// A disk that is being opened.
#[derive(Debug)]
pub(super) struct Opening {
    purpose: Purpose,
    request: Request,
    job: Job<Result<Medium, Refusal>>,
    began: Instant,
    /// Looks whether it takes long.
    _slow: Lookout,
    /// That it does was said.
    said: bool,
}

/// A disk whose size is being looked at.
#[derive(Debug)]
pub(super) struct Measuring {
    image: Arc<Image>,
    job: Job<Size>,
    /// Somebody has asked again meanwhile.
    again: bool,
}

/// Keys for the guest to see.
type Published = Vec<(String, String)>;

fn bug(error: Panicked) -> Fault {
    Fault::host(libc::EIO, error.to_string())
}

impl Opening {
    /// The value of `params` that the disk is to have.
    fn params(&self) -> Option<&str> {
        self.request.keys.get(PARAMS)
    }

    fn path(&self) -> PathBuf {
        medium::target(&self.request.keys).unwrap_or_default()
    }
}

impl Vbd {
    /// Opens what `keys` name; [`answered`](Self::opening_answered) goes on when it is open. What is being opened already is
    /// given up.
    pub(super) fn begin_opening(&mut self, purpose: Purpose, keys: Keys) -> Result<(), Fault> {
        let (access, path) = (medium::access(&keys)?, medium::target(&keys));
        let mut claim = Claim::Whole;
        if purpose != Purpose::Change {
            self.lookout = None;
            self.device_model = match &path {
                Some(path) => {
                    DeviceModel::expected(&self.store()?, self.xen.domid(), self.id.frontend_id, access, path)
                        .map_err(host)?
                }
                None => None,
            };
            claim = self.device_model.clone().map_or(Claim::Whole, Claim::Reserve);
        }
        if keys.get(OPENING).is_some() {
            // Of a process that ended meanwhile.
            self.notifier.tell(OPENING, None);
        }
        self.ask_opener(purpose, Request { keys, claim })
    }

    fn ask_opener(&mut self, purpose: Purpose, request: Request) -> Result<(), Fault> {
        self.give_up_opening();
        let place = Place::Image(medium::target(&request.keys).unwrap_or_default());
        let (work, notifier, slow) = (request.clone(), self.notifier.clone(), self.notifier.clone());
        let job = self.openers.begin(place, move || work.carry_out(), move || notifier.answered()).map_err(host)?;
        let began = Instant::now();
        let slow = Lookout::new(None, move || began.elapsed() >= SLOW, move || slow.answered()).map_err(host)?;
        self.opening = Some(Opening { purpose, request, job, began, _slow: slow, said: false });
        Ok(())
    }

    /// Whether a disk is being opened for this.
    pub(super) fn is_opening(&self, purpose: &Purpose) -> bool {
        self.opening.as_ref().is_some_and(|opening| opening.purpose == *purpose)
    }

    /// An opener has answered, or takes long. Returns what the driver waits for, if that has come.
    pub(super) fn opener_answered(&mut self) -> Option<Result<Published, Fault>> {
        self.measured();
        let outcome = match self.opening.as_mut()?.job.take() {
            Some(outcome) => outcome,
            None => {
                self.say_slow();
                return None;
            }
        };
        let Opening { purpose, request, began, said, .. } = self.opening.take()?;
        if said {
            self.notifier.tell(OPENING, None);
            let (path, seconds) = (medium::target(&request.keys).unwrap_or_default(), began.elapsed().as_secs());
            tracing::info!(device = %self.id.backend_path, image = %path.display(), seconds, "its storage has answered");
        }
        let opened = match outcome {
            Ok(Ok(medium)) => self.trust(medium),
            Ok(Err(refusal)) => match self.may_wait(&purpose, &request, &refusal) {
                Ok(false) => Err(refusal.fault),
                Ok(true) => {
                    let foresee = Request { keys: request.keys.clone(), claim: Claim::Foresee };
                    match self.ask_opener(purpose.clone(), foresee) {
                        Ok(()) => return None,
                        Err(fault) => Err(fault),
                    }
                }
                Err(fault) => Err(fault),
            },
            Err(error) => Err(bug(error)),
        };
        self.opening_ended(&purpose, &request, opened)
    }

    fn opening_ended(
        &mut self,
        purpose: &Purpose,
        request: &Request,
        opened: Result<Medium, Fault>,
    ) -> Option<Result<Published, Fault>> {
        match purpose {
            Purpose::Attach => Some(opened.and_then(|medium| self.have(medium, request))),
            Purpose::Return => {
                match opened.and_then(|medium| self.have(medium, request)) {
                    Ok(_) => self.notifier.retry(),
                    Err(fault) => self.notifier.fault(fault),
                }
                None
            }
            Purpose::TakeOver => {
                if let Err(fault) = opened.and_then(|medium| self.taken_over(medium, request)) {
                    self.notifier.fault(fault);
                }
                None
            }
            Purpose::Change => {
                match opened {
                    Ok(medium) => self.changed(medium, request),
                    Err(fault) => self.notifier.tell(MEDIUM_STATUS, Some(fault.text)),
                }
                None
            }
        }
    }

    /// Whether the guest may wait for a disk that cannot be had now.
    fn may_wait(&self, purpose: &Purpose, request: &Request, refusal: &Refusal) -> Result<bool, Fault> {
        let Some(error) = refusal.taken.as_ref().filter(|_| *purpose != Purpose::Change) else { return Ok(false) };
        let may = takeover::may_wait(&self.store()?, self.id.frontend_id, error).map_err(host)?;
        if may && self.hold != Hold::Awaited {
            let image = medium::target(&request.keys).unwrap_or_default();
            tracing::warn!(device = %self.id.backend_path, image = %image.display(), "{error}: this guest arrives, and waits for it");
        }
        Ok(may)
    }

    /// A medium, unless a flush of it has failed.
    fn trust(&self, medium: Medium) -> Result<Medium, Fault> {
        if medium.kind.read_only {
            return Ok(medium);
        }
        let image = &medium.image;
        let checked = self.store().and_then(|store| {
            doubt::check_writable(&store, self.xen.domid(), image.path(), image.identity())
                .map_err(|text| Fault::host(libc::EIO, text))
        });
        match checked {
            Ok(()) => Ok(medium),
            Err(fault) => {
                self.close(medium, || {});
                Err(fault)
            }
        }
    }

    /// How far an opened disk is the guest's. A foreseen one is looked out for.
    pub(super) fn hold_as(&mut self, request: &Request) -> Result<(), Fault> {
        self.hold = match request.claim {
            Claim::Whole => Hold::Whole,
            Claim::Reserve(_) => Hold::Reserved,
            Claim::Foresee => Hold::Awaited,
        };
        if self.hold == Hold::Awaited {
            let claim = self.device_model.clone().map_or(Claim::Whole, Claim::Reserve);
            if let Some(check) = (Request { keys: request.keys.clone(), claim }).check() {
                self.look_out(move || !check().is_err_and(|error| error.is_locked()))?;
            }
            self.notifier.tell(ON_HOLD, Some(NOT_YET.to_owned()));
        }
        Ok(())
    }

    /// The disk is open, for the first time.
    fn have(&mut self, medium: Medium, request: &Request) -> Result<Published, Fault> {
        let image = &medium.image;
        tracing::info!(
            device = %self.id.backend_path,
            image = %image.path().display(),
            sectors = image.sectors(),
            direct = image.direct,
            unit = image.unit,
            discard = medium.kind.discard,
            "opened"
        );
        for note in &image.notes {
            tracing::warn!(device = %self.id.backend_path, image = %image.path().display(), "{note}");
        }
        let keys = medium.describe(&self.config.limits);
        self.opened_with = Some(request.keys.clone());
        self.medium = Some(medium);
        self.hold_as(request)?;
        self.look_for_unplug(false)?;
        // What was written while it was opened.
        if let Some(params) = self.params_meanwhile.take()
            && !self.is_opened_with(Some(&params))
        {
            self.change_medium(&params);
        }
        Ok(keys)
    }

    /// That the storage takes long, for `blkback list` and the log.
    fn say_slow(&mut self) {
        let Some(opening) = self.opening.as_mut().filter(|opening| opening.began.elapsed() >= SLOW && !opening.said)
        else {
            return;
        };
        opening.said = true;
        let path = opening.path();
        let began = SystemTime::now() - opening.began.elapsed();
        let began = began.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        tracing::warn!(
            device = %self.id.backend_path,
            image = %path.display(),
            "opening it has not answered for {} s: its storage hangs; other disks go on, and this one when it answers",
            SLOW.as_secs()
        );
        self.notifier.tell(OPENING, Some(format!("{began} {}", path.display())));
    }

    /// Lets go of what is being opened.
    pub(super) fn give_up_opening(&mut self) {
        if self.opening.take().is_some_and(|opening| opening.said) {
            self.notifier.tell(OPENING, None);
        }
    }

    /// Closes an image where that keeps nobody waiting, and calls `closed` then.
    pub(super) fn close(&self, medium: Medium, closed: impl FnOnce() + Send + 'static) -> Progress<()> {
        let place = Place::Closing(self.id.backend_path.clone());
        let work = move || {
            drop(medium);
            closed();
        };
        match self.openers.run(&place, work) {
            Ok(()) => Progress::Later,
            Err(error) => {
                tracing::warn!(device = %self.id.backend_path, %error, "no thread to close its image on; closed here");
                Progress::Done(())
            }
        }
    }

    /// Another disk is put into the drive, or none.
    pub(super) fn change_medium(&mut self, params: &str) {
        let (Some(old), Some(keys)) = (&self.medium, &self.opened_with) else { return };
        if !(old.kind.cdrom || old.kind.removable) {
            let text =
                "EINVAL only a drive's disk can be changed (device-type cdrom, or removable); this is a fixed disk";
            self.notifier.tell(MEDIUM_STATUS, Some(text.to_owned()));
            return;
        }
        if self.opening.as_ref().is_some_and(|opening| opening.params() == Some(params)) {
            return;
        }
        let mut keys = keys.clone();
        keys.insert(PARAMS, params);
        // The hotplug program's, of the disk that goes.
        keys.insert("physical-device-path", "");
        if let Err(fault) = self.begin_opening(Purpose::Change, keys) {
            self.notifier.tell(MEDIUM_STATUS, Some(fault.text));
        }
    }

    /// Another disk is in the drive, or none.
    fn changed(&mut self, medium: Medium, request: &Request) {
        let image = request.keys.get(PARAMS).unwrap_or_default();
        tracing::info!(device = %self.id.backend_path, image, "the disk in the drive was changed");
        let order = Order::Disk(Arc::clone(&medium.image), medium.shape(&self.config.limits));
        self.order(&order, medium.describe(&self.config.limits));
        let old = self.medium.replace(medium);
        self.opened_with = Some(request.keys.clone());
        (self.hold, self.lookout) = (Hold::Whole, None);
        if let Some(old) = old {
            self.close(old, || {});
        }
        self.say_medium();
    }

    /// The file or device may have grown.
    pub(super) fn resize(&mut self) {
        let Some(image) = self.medium.as_ref().map(|medium| Arc::clone(&medium.image)) else { return };
        if let Some(measuring) = &mut self.measuring {
            measuring.again = true;
            return;
        }
        let (looked_at, notifier) = (Arc::clone(&image), self.notifier.clone());
        let place = Place::Image(image.path().to_owned());
        match self.openers.begin(place, move || looked_at.measure(), move || notifier.answered()) {
            Ok(job) => self.measuring = Some(Measuring { image, job, again: false }),
            Err(error) => {
                self.notifier.tell(RESIZE_STATUS, Some(format!("EAGAIN the size was not looked at: {error}")));
            }
        }
    }

    /// The size of the storage is known, if it is.
    fn measured(&mut self) {
        let Some(size) = self.measuring.as_mut().and_then(|measuring| measuring.job.take()) else { return };
        let Some(Measuring { image, again, .. }) = self.measuring.take() else { return };
        match (&self.medium, size) {
            (Some(medium), Ok(size)) if Arc::ptr_eq(&medium.image, &image) => self.say_size(size),
            (_, Err(error)) => self.notifier.tell(RESIZE_STATUS, Some(format!("EIO {error}"))),
            // Another disk was put into the drive meanwhile.
            (_, Ok(_)) => return self.resize(),
        }
        if again {
            self.resize();
        }
    }

    fn say_size(&self, size: Size) {
        let Some(medium) = &self.medium else { return };
        let image = &medium.image;
        let has = image.sectors();
        let said = match size {
            Size::Same if image.remote().is_some() => format!(
                "EOPNOTSUPP an NBD server says how large its export is when it is attached: the guest keeps its {has} \
                 sectors; detach it and attach it again for another size"
            ),
            Size::Same => has.to_string(),
            Size::Grown(sectors) => {
                tracing::info!(device = %self.id.backend_path, sectors, "the disk has grown");
                let keys = vec![("sectors".to_owned(), sectors.to_string())];
                self.order(&Order::Shape(medium.shape(&self.config.limits)), keys);
                sectors.to_string()
            }
            Size::Shrunk(sectors) => format!(
                "EFBIG the storage has {sectors} sectors now: the guest keeps its {has} sectors, and gets errors where \
                 nothing is; grow it again"
            ),
            Size::Unknown(errno) => {
                let error = std::io::Error::from_raw_os_error(errno);
                format!("EIO the size of the storage cannot be found out ({error}): the guest keeps its {has} sectors")
            }
        };
        if said.parse::<u64>().is_err() {
            tracing::warn!(device = %self.id.backend_path, image = %image.path().display(), "{said}");
        }
        self.notifier.tell(RESIZE_STATUS, Some(said));
    }
}

/// What [`OPENING`] says, `now`. `None` if it is none of ours.
pub fn hung(value: &str, now: SystemTime) -> Option<Hung> {
    let (since, path) = value.split_once(' ')?;
    let since = UNIX_EPOCH + Duration::from_secs(since.parse().ok()?);
    let seconds = now.duration_since(since).unwrap_or_default().as_secs();
    Some(Hung { path: path.into(), seconds })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_long_storage_has_not_answered() {
        let now = UNIX_EPOCH + Duration::from_secs(1000);
        assert_eq!(hung("963 /dev/vg/a b", now), Some(Hung { path: "/dev/vg/a b".into(), seconds: 37 }));
        // A clock that was put back.
        assert_eq!(hung("1001 /x", now).unwrap().seconds, 0);
        assert_eq!((hung("x /x", now), hung("", now)), (None, None));
    }
}
