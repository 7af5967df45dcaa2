//! Domains, grants and event channels: the least a Xen backend needs from a hypervisor, with two sides.
//!
//! * The [vocabulary](grant) is Xen's own: a domain grants pages by [`GrantRef`], its peer maps or copies them; both
//!   ends of an event channel hold a [`Port`].
//! * [`Backend`] is what a backend domain may do to its peers; [`Guest`] is what a frontend's domain does.
//! * [`emu`] is a machine made of memfds and eventfds that enforces Xen's rules on any Linux.
//! * [`xen`] is the real one, from dom0 or a driver domain.
//! * [`memory`] is the only place that touches bytes another domain can change.
//! * [`program`] is what the programs of backends have in common.

mod claim;
pub mod emu;
pub mod event;
pub mod grant;
pub mod kernel;
pub mod memory;
pub mod program;
pub mod xen;

use std::fmt::Debug;
use std::path::PathBuf;

pub use claim::Claim;
pub use event::{EventChannel, Port};
pub use grant::{CopyDirection, CopyOp, GrantAccess, GrantRef, GrantStatus};
use memory::Mapping;
pub use xenstore_client::DomId;

/// Bytes in a page. Xen's interfaces count in 4 KiB pages on every architecture (xen/include/public/arch-*.h).
pub const PAGE_SIZE: usize = 4096;

/// Why the hypervisor did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A grant operation was refused as a whole.
    #[error("{operation} of grant {gref} of domain {domain}: {status}")]
    Grant {
        /// "map", "copy", "end", …
        operation: &'static str,
        /// Whose grant table.
        domain: DomId,
        /// The first reference that was refused.
        gref: GrantRef,
        /// Why.
        status: GrantStatus,
    },
    /// An event channel operation was refused.
    #[error("{operation} of event channel port {port} of domain {domain}: {reason}")]
    Port {
        /// "bind", "close", …
        operation: &'static str,
        /// Whose port.
        domain: DomId,
        /// Which port.
        port: Port,
        /// Why, in words.
        reason: String,
    },
    /// The caller asked for something that no hypervisor does; a fault of ours, not of the peer.
    #[error("{0}")]
    Invalid(String),
    /// A device, socket or memory operation of the machine under us failed.
    #[error("{context}: {source}")]
    Io {
        /// What was being done, with the path or ioctl.
        context: String,
        /// The operating system's answer.
        #[source]
        source: std::io::Error,
    },
    /// XenStore refused or was lost.
    #[error(transparent)]
    Store(#[from] xenstore_client::Error),
}

impl Error {
    /// Wraps an I/O error with what was being done.
    pub fn io(context: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        Self::Io { context: context.into(), source: source.into() }
    }
}

/// Short for this crate's results.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a backend's domain may do: the half of the hypervisor that blkback and netback use.
///
/// One value serves all devices and threads of a process.
pub trait Backend: Debug + Send + Sync {
    /// The domain we are: 0, or a driver domain's id.
    fn domid(&self) -> DomId;

    /// A new connection to XenStore, speaking as our domain.
    ///
    /// # Errors
    /// When XenStore cannot be reached.
    fn store(&self) -> Result<xenstore_client::Client>;

    /// Maps pages that `peer` granted, side by side in the order of `refs`; dropping the mapping unmaps them.
    ///
    /// All or nothing, as gntdev does it: one bad reference and nothing is mapped. Who must know which reference was
    /// bad maps them one at a time.
    ///
    /// # Errors
    /// [`Error::Grant`] with the first reference that was refused.
    fn map(&self, peer: DomId, refs: &[GrantRef], access: GrantAccess) -> Result<Mapping>;

    /// Copies between `peer`'s granted pages and `local`, one batch for all of `ops`.
    ///
    /// Each operation gets a status of its own; a bad one does not stop the others.
    ///
    /// # Errors
    /// Only when the batch as a whole could not be carried out; the statuses say nothing then.
    fn copy(&self, peer: DomId, local: &Mapping, ops: &mut [CopyOp]) -> Result<()>;

    /// Binds a new local port to `remote`, which `peer` offered to us. Closed when dropped.
    ///
    /// As on Xen the new port is pending at once: the caller sees one event that means nothing.
    ///
    /// # Errors
    /// [`Error::Port`] when the port does not exist, is bound already, or was offered to another domain.
    fn bind(&self, peer: DomId, remote: Port) -> Result<Box<dyn EventChannel>>;
}

/// What a frontend's domain does: the guest's half.
pub trait Guest: Debug + Send + Sync {
    /// The domain we are.
    fn domid(&self) -> DomId;

    /// A new connection to XenStore, speaking as our domain.
    ///
    /// # Errors
    /// When XenStore cannot be reached.
    fn store(&self) -> Result<xenstore_client::Client>;

    /// Takes `pages` zeroed pages, side by side in our memory, and grants each to `peer`.
    ///
    /// # Errors
    /// When the domain has no free pages or grant entries left.
    fn share(&self, peer: DomId, pages: usize, access: GrantAccess) -> Result<Shared>;

    /// Revokes the grants of `shared` and frees its pages.
    ///
    /// # Errors
    /// [`Error::Grant`] with [`GrantStatus::Busy`] while the peer still maps one of them; then nothing changed and
    /// the pages are still granted: they come back with the error so that the caller can try again.
    #[allow(clippy::result_large_err)]
    fn unshare(&self, shared: Shared) -> std::result::Result<(), (Shared, Error)>;

    /// Allocates a port that `peer` may bind to. Closed when dropped.
    ///
    /// # Errors
    /// When the domain has no free ports left.
    fn alloc_unbound(&self, peer: DomId) -> Result<Box<dyn EventChannel>>;
}

/// Pages of a guest's memory that it granted to a peer.
#[derive(Debug)]
pub struct Shared {
    /// The pages, side by side.
    pub memory: Mapping,
    /// One reference a page, in order.
    pub refs: Vec<GrantRef>,
}

/// Which machine to run on, as `--hypervisor` names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Machine {
    /// An emulated machine kept by `emu-xen serve --dir DIR`.
    Emulated(PathBuf),
    /// The real one under this kernel.
    Xen,
}

impl std::str::FromStr for Machine {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("emu", dir)) if !dir.is_empty() => Ok(Self::Emulated(dir.into())),
            None if text == "xen" => Ok(Self::Xen),
            _ => Err(format!("{text:?} is no hypervisor: xen, or emu:DIR where emu-xen serve --dir DIR runs")),
        }
    }
}

impl Machine {
    /// The machine to use where none was named: real Xen, if this kernel runs on it.
    pub fn find() -> Option<Self> {
        xen::is_here().then_some(Self::Xen)
    }

    /// A connection to the machine's XenStore, speaking as this domain, or as dom0 of an emulated machine.
    ///
    /// # Errors
    /// When the machine is not there, or refuses.
    pub fn store(&self) -> Result<xenstore_client::Client> {
        match self {
            Self::Emulated(dir) => emu::Member::join(dir, DomId::DOM0)?.store(),
            Self::Xen => xen::connect(),
        }
    }

    /// Joins the machine as a backend domain. Real Xen knows which domain we are; on an emulated machine we are `domid`.
    ///
    /// # Errors
    /// When the machine is not there, or refuses.
    pub fn join_backend(&self, domid: DomId) -> Result<std::sync::Arc<dyn Backend>> {
        match self {
            Self::Emulated(dir) => Ok(std::sync::Arc::new(emu::Member::join(dir, domid)?)),
            Self::Xen => Ok(std::sync::Arc::new(xen::Xen::open()?)),
        }
    }
}
