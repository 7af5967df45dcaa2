//! One program at a time changes the network.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::Error;

/// The lock, held until dropped. The kernel takes it from a process that dies.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock, waiting at most `patience`; `say` is told once that somebody else has it.
    pub(super) fn take(dir: &Path, patience: Duration, say: fn(&str)) -> Result<Self, Error> {
        let path = dir.join("lock");
        let error = |source| Error::File { path: path.clone(), source };
        // Never truncated here and never removed: others may wait for it.
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let mut file = open.map_err(error)?;
        let begin = Instant::now();
        let mut pause = Duration::from_micros(200);
        let mut said = false;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(Errno::WOULDBLOCK | Errno::INTR) => (),
                Err(errno) => return Err(error(errno.into())),
            }
            if begin.elapsed() >= patience {
                return Err(Error::Busy { holder: holder(&path), seconds: patience.as_secs() });
            }
            if !said && begin.elapsed() >= Duration::from_millis(200) {
                said = true;
                say(&format!("waiting for another program ({}) that is changing the network", holder(&path)));
            }
            sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
        // Over the last holder's number and as wide: nobody finds the file empty.
        file.write_all(format!("{:<10}", std::process::id()).as_bytes()).map_err(error)?;
        Ok(Self { _file: file })
    }
}

/// Who has the lock, as well as can be told.
fn holder(path: &Path) -> String {
    let mut pid = String::new();
    let read = File::open(path).and_then(|mut file| file.read_to_string(&mut pid));
    match (read, pid.trim()) {
        (Ok(_), pid) if !pid.is_empty() => format!("process {pid}"),
        _ => "of unknown number".to_owned(),
    }
}
