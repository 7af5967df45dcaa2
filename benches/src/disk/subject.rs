//! The disk that is measured.

use std::path::{Path, PathBuf};

use blkback::image::Image;
use blkback::spec::{Access, DiskSpec};

use super::{Arguments, bar};
use crate::Failure;

/// A measured disk: the file, and how the backend opens it.
#[derive(Debug)]
pub(super) struct Subject {
    /// As the toolstack gets it.
    pub(super) spec: DiskSpec,
    /// The file or device.
    pub(super) path: PathBuf,
    /// Its size.
    pub(super) bytes: u64,
    /// Whether the backend leaves out the page cache.
    pub(super) direct: bool,
    /// Deleted at the end, if it is ours.
    _own: Option<tempfile::TempPath>,
}

/// Finds, or makes, the disk to measure.
///
/// # Errors
/// When it cannot be served, or would be overwritten without leave.
pub(super) fn find(arguments: &Arguments) -> Result<Subject, Failure> {
    let access = if arguments.rw.writes() { "w" } else { "r" };
    let (text, own) = match &arguments.disk {
        Some(text) if text.contains(',') => (text.clone(), None),
        Some(path) => (format!("{path},raw,xvda,{access}"), None),
        None => {
            let path = filled_file(Path::new("/dev/shm"), arguments.size)?;
            (format!("{},raw,xvda,{access}", path.display()), Some(path))
        }
    };
    let spec: DiskSpec = text.parse()?;
    if own.is_none() && arguments.rw.writes() && !arguments.destroy {
        return Err(format!("--rw {} overwrites {text}; say --destroy if that is meant", arguments.rw).into());
    }
    if arguments.rw.writes() && spec.access == Access::ReadOnly {
        return Err(format!("--rw {} needs a disk with access w", arguments.rw).into());
    }
    let path = std::path::absolute(spec.target.as_deref().unwrap_or_default())?;
    let image = Image::open(&path, spec.access)?;
    let (bytes, direct) = (image.sectors() * 512, image.direct);
    Ok(Subject { spec, path, bytes, direct, _own: own })
}

/// A file of data: holes would read faster than any disk.
///
/// # Errors
/// When there is no room for it.
pub fn filled_file(folder: &Path, bytes: u64) -> Result<tempfile::TempPath, Failure> {
    use std::io::Write;

    let bytes = bytes / 4096 * 4096;
    if bytes == 0 {
        return Err("a disk of less than 4096 bytes measures nothing".into());
    }
    let mut file = tempfile::Builder::new()
        .prefix("dom0-bench-")
        .suffix(".img")
        .tempfile_in(folder)
        .map_err(|error| format!("{}: {error}; name a disk with --disk", folder.display()))?;
    let bar = bar("filling a file with data", bytes);
    let mut state = 1u64;
    let mut chunk = vec![0; 1 << 20];
    let mut left = bytes;
    while left > 0 {
        for word in chunk.chunks_exact_mut(8) {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            word.copy_from_slice(&state.to_le_bytes());
        }
        let part = left.min(chunk.len() as u64);
        file.write_all(&chunk[..part as usize])
            .map_err(|error| format!("filling {}: {error}; --size makes it smaller", file.path().display()))?;
        left -= part;
        bar.inc(part);
    }
    bar.finish_and_clear();
    Ok(file.into_temp_path())
}
