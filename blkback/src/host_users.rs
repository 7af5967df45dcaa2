//! Which processes have a file open, as /proc shows them (proc(5)). A lock on an open file description names nobody.

use std::fs::{self, File, Metadata};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// A process that has a file open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostUser {
    /// Its number.
    pub pid: u32,
    /// Its program's name, as far as the kernel keeps it.
    pub name: String,
}

impl std::fmt::Display for HostUser {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "process {} ({})", self.pid, self.name)
    }
}

/// What is looked for: a file, or a block device whatever node it is opened by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    dev: u64,
    ino: u64,
    device: Option<u64>,
}

impl Target {
    /// The file or device that was asked for this.
    pub fn of(metadata: &Metadata) -> Self {
        let device = metadata.file_type().is_block_device().then(|| metadata.rdev());
        Self { dev: metadata.dev(), ino: metadata.ino(), device }
    }

    /// Whether this is it too.
    pub fn is(self, metadata: &Metadata) -> bool {
        let other = Self::of(metadata);
        match self.device {
            Some(_) => other.device == self.device,
            None => (other.dev, other.ino) == (self.dev, self.ino),
        }
    }

    /// Whether a descriptor may be of it. stat(2) of another process's descriptor waits for the storage of that file; so
    /// the kernel's own notes come first.
    fn may_be(self, process: &Path, descriptor: &str) -> bool {
        if self.device.is_some() {
            return fs::read_link(process.join("fd").join(descriptor)).is_ok_and(|path| path.starts_with("/dev"));
        }
        let noted = fs::read_to_string(process.join("fdinfo").join(descriptor)).unwrap_or_default();
        noted.lines().filter_map(|line| line.strip_prefix("ino:")).any(|ino| ino.trim().parse() == Ok(self.ino))
    }

    /// Whether a process has it open, by another descriptor than `except`.
    fn is_open_in(self, process: &Path, except: Option<i32>) -> bool {
        let Ok(descriptors) = fs::read_dir(process.join("fd")) else { return false };
        descriptors.flatten().filter_map(|entry| entry.file_name().into_string().ok()).any(|descriptor| {
            except.is_none_or(|own| descriptor != own.to_string())
                && self.may_be(process, &descriptor)
                && fs::metadata(process.join("fd").join(&descriptor)).is_ok_and(|metadata| self.is(&metadata))
        })
    }

    /// The process with this number, if it has it open.
    pub fn user(self, pid: u32) -> Option<HostUser> {
        let process = PathBuf::from(format!("/proc/{pid}"));
        self.is_open_in(&process, None).then(|| host_user(pid, &process))
    }
}

fn host_user(pid: u32, process: &Path) -> HostUser {
    let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
    HostUser { pid, name: name.trim().to_owned() }
}

/// Folders in /proc of all processes that can be looked into.
pub fn processes() -> impl Iterator<Item = (u32, PathBuf)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())))
}

/// Processes that have `file` open, not counting `file` itself.
pub fn of(file: &File) -> Vec<HostUser> {
    let Ok(metadata) = file.metadata() else { return Vec::new() };
    let target = Target::of(&metadata);
    processes()
        .filter(|(pid, process)| {
            let own = (*pid == std::process::id()).then(|| file.as_raw_fd());
            target.is_open_in(process, own)
        })
        .map(|(pid, process)| host_user(pid, &process))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_descriptor_is_found_and_the_first_is_not() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(of(file.as_file()), []);
        let target = Target::of(&file.as_file().metadata().unwrap());
        let second = File::open(file.path()).unwrap();
        let found = of(file.as_file());
        assert_eq!(found.iter().map(|user| user.pid).collect::<Vec<_>>(), [std::process::id()]);
        assert_eq!(target.user(std::process::id()).as_ref(), found.first());
        drop(second);
        assert_eq!(of(file.as_file()), []);
        let other = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(Target::of(&other.as_file().metadata().unwrap()).user(1), None);
    }
}
