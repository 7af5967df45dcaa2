//! What was applied with a time limit and not confirmed yet, and the process that takes it back.
//!
//! The file is the finished run's journal under another name. The process is this same program under a hidden command;
//! it leaves the terminal's session, so that the end of an ssh connection does not end it. If it is killed, the next
//! program that opens a [`Session`](super::Session) finds that the time is over.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

use super::journal::{self, now};
use super::{Error, Journal};

/// The name of the file in the run directory.
pub(super) const FILE: &str = "pending.json";
/// The hidden command of the process that waits.
pub(crate) const COMMAND: &str = "revert-when-due";

/// A change that waits for its confirmation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pending {
    /// What it was.
    pub title: String,
    /// Seconds left.
    pub seconds: u64,
}

impl Pending {
    /// What waits in a run directory.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn find(dir: &Path) -> Result<Option<Self>, Error> {
        let found = journal::find(&dir.join(FILE))?;
        Ok(found.map(|found| Self { seconds: left(&found.journal), title: found.journal.title }))
    }
}

/// Seconds until a journal's deadline; 0 if it has none.
pub(super) fn left(journal: &Journal) -> u64 {
    journal.deadline.unwrap_or(0).saturating_sub(now())
}

/// Keeps what was applied.
pub(super) fn confirm(dir: &Path) -> Result<Pending, Error> {
    let pending = Pending::find(dir)?.ok_or(Error::NothingToConfirm)?;
    let path = dir.join(FILE);
    fs::remove_file(&path).map_err(|source| Error::File { path, source })?;
    Ok(pending)
}

/// Starts the process that waits, and returns when it has left the terminal.
pub(super) fn start_waiter(program: &Path, dir: &Path, deadline: u64) -> Result<(), Error> {
    let mut child = Command::new(program)
        .arg(COMMAND)
        .arg(deadline.to_string())
        .env(super::session::RUN_VARIABLE, dir)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(Error::Waiter)?;
    let mut word = [0; READY.len()];
    let mut stdout = child.stdout.take().ok_or_else(|| Error::Waiter(io::Error::other("no pipe")))?;
    match stdout.read_exact(&mut word) {
        Ok(()) if word == READY.as_bytes() => Ok(()),
        _ => Err(Error::Waiter(io::Error::other("it ended at once"))),
    }
}

/// What the waiting process says when it can be left alone.
const READY: &str = "waiting\n";

/// In the waiting process: leaves the terminal's session, so that its end is not ours, and says so to who started us.
pub(crate) fn leave_terminal(dir: &Path) {
    // Refused only to the leader of a process group, as which nobody starts us; then we wait all the same.
    let _ = rustix::process::setsid();
    let mut stdout = io::stdout();
    // Nobody may be listening any more, which changes nothing.
    let _ = stdout.write_all(READY.as_bytes()).and_then(|()| stdout.flush());
    tracing::debug!("waiting for {}", dir.display());
}

/// In the waiting process: whether there is still something to wait for. False when the time is over, and when it was
/// confirmed in the meantime.
pub(crate) fn is_due_later(dir: &Path, deadline: u64) -> bool {
    let waits = |file: &str| match journal::find(&dir.join(file)) {
        Ok(found) => found.is_some_and(|found| found.journal.deadline == Some(deadline)),
        // Unreadable now does not mean confirmed.
        Err(_) => true,
    };
    now() < deadline && (waits(FILE) || waits(super::session::JOURNAL) || waits(FILE))
}
