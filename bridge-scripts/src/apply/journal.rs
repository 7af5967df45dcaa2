//! What a run is about to do, and how to take it back, written before it does it: so that the next run can, if this one is
//! killed.
//!
//! The file's first line is the header with the undo of every step. Then each step adds a line before it is done
//! (`do 3`), and each undo before it is tried (`undo 3`). The directory is in memory (/run), and the fear is a killed
//! process and not a power cut, after which there is nothing to undo: nothing is synced.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::Error;
use crate::step::Step;

/// A run's first line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Journal {
    /// What the run is for.
    pub title: String,
    /// Its process.
    pub pid: u32,
    /// Its network namespace.
    pub namespace: String,
    /// The machine's boot.
    pub boot: String,
    /// What takes back each step.
    pub undo: Vec<Vec<Step>>,
    /// When it is to be taken back unless confirmed, in seconds since boot.
    pub deadline: Option<u64>,
}

/// An open journal.
#[derive(Debug)]
pub(super) struct Open {
    path: PathBuf,
    file: File,
}

/// A journal that was found.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) journal: Journal,
    /// The first step, from the end, that may have to be taken back; none if no step had begun.
    pub(super) last: Option<usize>,
}

impl Journal {
    /// A journal of this process.
    pub(super) fn new(title: &str, undo: Vec<Vec<Step>>, deadline: Option<u64>) -> Self {
        let (pid, title) = (std::process::id(), title.to_owned());
        Self { title, pid, namespace: namespace(), boot: boot(), undo, deadline }
    }
}

impl Open {
    /// Writes a new journal; afterwards it is there as a whole.
    pub(super) fn create(path: &Path, journal: &Journal) -> Result<Self, Error> {
        let error = |source| Error::File { path: path.to_owned(), source };
        let mut line = serde_json::to_vec(journal).map_err(|source| error(source.into()))?;
        line.push(b'\n');
        let draft = path.with_extension("new");
        let mut file = File::create(&draft).map_err(error)?;
        file.write_all(&line).map_err(error)?;
        fs::rename(&draft, path).map_err(error)?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Opens a journal that is there, to go on with it.
    pub(super) fn reopen(path: &Path) -> Result<Self, Error> {
        let open = OpenOptions::new().append(true).open(path);
        let file = open.map_err(|source| Error::File { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Writes that a step is about to be done.
    pub(super) fn doing(&mut self, index: usize) -> Result<(), Error> {
        self.line(&format!("do {index}\n"))
    }

    /// Writes that a step is about to be taken back.
    pub(super) fn undoing(&mut self, index: usize) -> Result<(), Error> {
        self.line(&format!("undo {index}\n"))
    }

    /// Everything is done, or taken back.
    pub(super) fn close(self) -> Result<(), Error> {
        fs::remove_file(&self.path).map_err(|source| Error::File { path: self.path.clone(), source })
    }

    /// Everything is done, and the journal is kept under another name.
    pub(super) fn keep_as(self, path: &Path) -> Result<(), Error> {
        fs::rename(&self.path, path).map_err(|source| Error::File { path: self.path.clone(), source })
    }

    fn line(&mut self, line: &str) -> Result<(), Error> {
        self.file.write_all(line.as_bytes()).map_err(|source| Error::File { path: self.path.clone(), source })
    }
}

/// Looks for a journal. One from before the machine's last boot is removed: nothing of it is left in the kernel.
pub(super) fn find(path: &Path) -> Result<Option<Found>, Error> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(Error::File { path: path.to_owned(), source }),
    };
    let mut lines = text.lines();
    let journal: Journal = serde_json::from_str(lines.next().unwrap_or_default())
        .map_err(|error| Error::Journal { path: path.to_owned(), reason: error.to_string() })?;
    if journal.boot != boot() {
        fs::remove_file(path).map_err(|source| Error::File { path: path.to_owned(), source })?;
        return Ok(None);
    }
    let ours = namespace();
    if journal.namespace != ours {
        let (title, theirs) = (journal.title, journal.namespace);
        return Err(Error::OtherNamespace { path: path.to_owned(), title, theirs, ours });
    }
    let last = lines.filter_map(|line| line.split_once(' ')?.1.parse().ok()).next_back();
    let last = last.filter(|last| *last < journal.undo.len());
    Ok(Some(Found { journal, last }))
}

/// Seconds since boot, sleep included.
pub(super) fn now() -> u64 {
    u64::try_from(clock_gettime(ClockId::Boottime).tv_sec).unwrap_or(0)
}

/// The network namespace of this thread: `net:[4026531840]`.
fn namespace() -> String {
    fs::read_link("/proc/thread-self/ns/net").map_or_else(|_| "unknown".to_owned(), |path| path.display().to_string())
}

fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim_end().to_owned()
}
