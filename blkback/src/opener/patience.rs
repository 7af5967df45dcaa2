//! Looking at storage from a command, which has to end.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

/// How long storage may take. The last writes of a process that was killed may take 20 s of it; libxl gives its hotplug
/// program 40 s.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Storage that has not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "opening {} has not answered for {seconds} s: its storage hangs (see dmesg, dmsetup info, the file server)",
    path.display()
)]
pub struct Hung {
    /// What was to be opened.
    pub path: PathBuf,
    /// How long it has taken.
    pub seconds: u64,
}

/// Looks at the storage of `path` on a thread of its own, for `longest`. A thread that still hangs then is left behind.
///
/// # Errors
/// When there is no answer.
///
/// # Panics
/// When `look` does.
pub fn ask<T: Send + 'static>(
    path: &Path,
    longest: Duration,
    look: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Hung> {
    let (looks, over) = channel::<()>();
    let thread = std::thread::spawn(move || {
        let _looks = looks;
        look()
    });
    // Nothing is ever sent.
    if over.recv_timeout(longest) == Err(RecvTimeoutError::Disconnected) {
        return thread.join().or_else(|panic| std::panic::resume_unwind(panic));
    }
    Err(Hung { path: path.to_owned(), seconds: longest.as_secs() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_answer_is_left_behind_with_a_sentence() {
        let (keep, hangs) = channel::<()>();
        let longest = Duration::from_millis(20);
        let hung = ask(Path::new("/dev/vg/x"), longest, move || hangs.recv().is_ok()).unwrap_err();
        assert!(hung.to_string().starts_with("opening /dev/vg/x has not answered for 0 s"), "{hung}");
        drop(keep);
        assert_eq!(ask(Path::new("/dev/vg/x"), PATIENCE, || 7), Ok(7));
    }
}
