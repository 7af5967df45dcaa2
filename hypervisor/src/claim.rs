//! One server at a time: two that answered the same rings would each give half an answer.

use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use xenstore_client::DomId;

use crate::{Error, Machine, Result};

/// The right to serve, held until it is dropped. A lock of the kernel's: it goes with its process, however that ends.
#[derive(Debug)]
pub struct Claim {
    _lock: std::fs::File,
}

impl Machine {
    /// Where `program` in the backend domain `domid` keeps what the next process of its kind must find, and a reboot must not
    /// leave.
    pub fn folder(&self, program: &str, domid: DomId) -> PathBuf {
        match self {
            Self::Emulated(dir) => dir.join(format!("{program}-{domid}")),
            Self::Xen => Path::new("/run").join(program),
        }
    }

    /// Whether a process has the right to be `program` in the backend domain `domid` at this moment.
    ///
    /// # Errors
    /// When that cannot be found out.
    pub fn is_claimed(&self, program: &str, domid: DomId) -> Result<bool> {
        let path = self.lock(program, domid);
        let failed = |error: std::io::Error| Error::io(format!("locking {}", path.display()), error);
        let lock = match std::fs::File::open(&path) {
            Ok(lock) => lock,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(failed(error)),
        };
        // Given back at once; who wants to serve tries for longer than that.
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(false),
            Err(Errno::WOULDBLOCK) => Ok(true),
            Err(error) => Err(failed(error.into())),
        }
    }

    fn lock(&self, program: &str, domid: DomId) -> PathBuf {
        match self {
            Self::Emulated(dir) => dir.join(format!("{program}-{domid}.lock")),
            Self::Xen => PathBuf::from(format!("/run/{program}.lock")),
        }
    }

    /// Takes the right to be `program` in the backend domain `domid` of this machine. On real Xen the lock is
    /// `/run/PROGRAM.lock`, on an emulated machine a file of its directory. A predecessor that is about to end gets
    /// `patience` for it.
    ///
    /// # Errors
    /// [`Error::Invalid`], with the process, when another keeps it; else when the file cannot be opened.
    pub fn claim(&self, program: &str, domid: DomId, patience: Duration) -> Result<Claim> {
        let path = self.lock(program, domid);
        let failed = |error: std::io::Error| Error::io(format!("locking {}", path.display()), error);
        let mut open = std::fs::OpenOptions::new();
        let mut lock =
            open.read(true).write(true).create(true).truncate(false).mode(0o600).open(&path).map_err(failed)?;
        let mut patience = Patience::of(patience);
        while let Err(error) = rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            if error != Errno::WOULDBLOCK {
                return Err(failed(error.into()));
            }
            patience.wait(&mut lock, program)?;
        }
        lock.set_len(0)
            .and_then(|()| lock.rewind())
            .and_then(|()| writeln!(lock, "{}", std::process::id()))
            .map_err(failed)?;
        Ok(Claim { _lock: lock })
    }
}

/// The time a predecessor has left.
struct Patience {
    until: Instant,
    said: bool,
}

impl Patience {
    fn of(time: Duration) -> Self {
        Self { until: Instant::now() + time, said: false }
    }

    fn wait(&mut self, lock: &mut std::fs::File, program: &str) -> Result<()> {
        let mut pid = String::new();
        // Only for the messages, which can do without.
        let _ = lock.rewind().and_then(|()| lock.read_to_string(&mut pid));
        let pid = pid.trim();
        if Instant::now() >= self.until {
            let said = format!("another {program} serves this domain already (process {pid}): stop it first");
            return Err(Error::Invalid(said));
        }
        if !self.said {
            tracing::info!(process = pid, "another {program} serves this domain: waiting for its end");
            self.said = true;
        }
        std::thread::sleep(Duration::from_millis(20));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::*;

    #[test]
    fn one_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let machine = Machine::Emulated(dir.path().into());
        let claim = |program, domid, patience| machine.claim(program, DomId(domid), Duration::from_secs(patience));
        assert!(!machine.is_claimed("blkback", DomId(0)).unwrap());
        let first = claim("blkback", 0, 0).unwrap();
        assert!(machine.is_claimed("blkback", DomId(0)).unwrap());
        let refused = claim("blkback", 0, 0).unwrap_err().to_string();
        assert!(refused.contains(&format!("(process {})", std::process::id())), "{refused}");
        let _others = [claim("blkback", 5, 0).unwrap(), claim("netback", 0, 0).unwrap()];
        std::thread::scope(|scope| {
            let next = scope.spawn(|| claim("blkback", 0, 60).map(drop));
            std::thread::sleep(Duration::from_millis(100));
            assert!(!next.is_finished());
            drop(first);
            next.join().unwrap().unwrap();
        });
    }
}
