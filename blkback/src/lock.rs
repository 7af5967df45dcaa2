//! Who may write to an image: a lock on the open file, so that it counts for every name of the file and ends with
//! the last I/O of the process that held it.
//!
//! Locks on open file descriptions (fcntl(2), F_OFD_SETLK) on the bytes that QEMU uses (block/file-posix.c): byte
//! 100+n is locked by who holds permission n, byte 200+n by who does not want others to hold it. So QEMU, qemu-img and
//! qemu-nbd see us, and we see them. Permission 0 is to read data that stay consistent, 1 to write, 3 to resize.

use std::fs::File;

use nix::fcntl::{FcntlArg, fcntl};

use crate::host_users;
use crate::spec::Access;

const HOLDS: i64 = 100;
const DENIES: i64 = 200;
const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;
/// One byte that is ours alone: an exclusive lock on it decides a race between two writers for exactly one. QEMU does not
/// know it, so it keeps our other disks away while a guest's own device model has the image.
const OURS: i64 = 300;

/// Claims `file` for `access` until its last descriptor is closed.
///
/// # Errors
/// Who holds it, and what to do, in words.
pub fn claim(file: &File, access: Access) -> Result<(), String> {
    let (holds, denies) = permissions(access);
    if access == Access::Write {
        set(file, OURS, libc::F_WRLCK).map_err(|error| refusal(file, access, error))?;
    }
    for &permission in holds {
        set(file, HOLDS + permission, libc::F_RDLCK).map_err(|error| refusal(file, access, error))?;
    }
    for &permission in denies {
        set(file, DENIES + permission, libc::F_RDLCK).map_err(|error| refusal(file, access, error))?;
    }
    // Locked first and looked afterwards: of two that come at once, both see each other rather than neither.
    check(file, access)
}

/// Claims `file` for writing against all disks of ours, and against nobody else who takes locks: a guest's device model is
/// about to open it, or has (`expected` says whether it has). Others who have it already are refused.
///
/// # Errors
/// As [`claim`].
pub fn reserve(file: &File, expected: &dyn Fn() -> bool) -> Result<(), String> {
    let refused = |error| refusal(file, Access::Write, error);
    set(file, OURS, libc::F_WRLCK).map_err(refused)?;
    // Device models do not resize a raw image, qemu-img and its like may.
    set(file, DENIES + RESIZE, libc::F_RDLCK).map_err(refused)?;
    check_reserve(file, expected)
}

/// Whether [`reserve`] would succeed now.
///
/// # Errors
/// As [`claim`].
pub fn check_reserve(file: &File, expected: &dyn Fn() -> bool) -> Result<(), String> {
    if is_held(file, OURS) {
        return Err(refusal(file, Access::Write, nix::errno::Errno::EAGAIN));
    }
    check(file, Access::Write).or_else(|error| if expected() { Ok(()) } else { Err(error) })
}

/// Goes from [`reserve`] to [`claim`]: whoever had the file has let go of it.
///
/// # Errors
/// As [`claim`]; the reservation stays then.
pub fn claim_reserved(file: &File) -> Result<(), String> {
    // A lock that is tried while a device model opens the file would have that give up.
    check(file, Access::Write)?;
    claim(file, Access::Write).inspect_err(|_| give_way(file))
}

/// Whether anybody has it who is in the way of [`claim_reserved`]; asked by who has not reserved it himself.
pub fn is_used(file: &File) -> bool {
    [HOLDS + WRITE, DENIES + READ, DENIES + WRITE].iter().any(|&byte| is_held(file, byte))
}

/// Goes from [`claim`] for writing back to [`reserve`]: the guest's device model opens the file again.
pub fn give_way(file: &File) {
    for byte in [HOLDS + WRITE, DENIES + WRITE] {
        if let Err(error) = set(file, byte, libc::F_UNLCK) {
            tracing::error!(%error, "a lock cannot be given up");
        }
    }
}

/// Claims a part of what is in `file`: conflicts with who wants the whole of it alone, not with other parts.
///
/// # Errors
/// As [`claim`].
pub fn claim_part(file: &File, access: Access) -> Result<(), String> {
    let holds = permissions(access).0;
    for &permission in holds {
        set(file, HOLDS + permission, libc::F_RDLCK).map_err(|error| refusal(file, access, error))?;
    }
    check_part(file, access)
}

/// Whether [`claim_part`] would succeed now.
///
/// # Errors
/// As [`claim`].
pub fn check_part(file: &File, access: Access) -> Result<(), String> {
    let denied = permissions(access).0.iter().any(|permission| is_held(file, DENIES + permission));
    match denied || is_held(file, OURS) {
        true => Err(refusal(file, access, nix::errno::Errno::EAGAIN)),
        false => Ok(()),
    }
}

/// Whether some process other than this still has the file open, or this one has it open twice.
pub fn has_live_holder(file: &File) -> bool {
    !host_users::of(file).is_empty()
}

/// Whether [`claim`] would succeed now, without taking anything: a claim made only to look would be in the way of
/// whoever opens the file at this moment.
///
/// # Errors
/// As [`claim`].
pub fn check(file: &File, access: Access) -> Result<(), String> {
    let (holds, denies) = permissions(access);
    let in_the_way = is_held(file, OURS)
        || holds.iter().any(|permission| is_held(file, DENIES + permission))
        || denies.iter().any(|permission| is_held(file, HOLDS + permission));
    if in_the_way { Err(refusal(file, access, nix::errno::Errno::EAGAIN)) } else { Ok(()) }
}

/// What a user of the file holds, and what it denies others.
fn permissions(access: Access) -> (&'static [i64], &'static [i64]) {
    match access {
        Access::ReadOnly => (&[READ], &[WRITE, RESIZE]),
        Access::Write => (&[READ, WRITE], &[WRITE, RESIZE]),
        Access::SharedWrite => (&[READ, WRITE], &[RESIZE]),
    }
}

fn range(byte: i64, kind: i32) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: byte, l_len: 1, l_pid: 0 }
}

fn set(file: &File, byte: i64, kind: i32) -> Result<(), nix::errno::Errno> {
    fcntl(file, FcntlArg::F_OFD_SETLK(&range(byte, kind))).map(drop)
}

/// Whether another open file description has any lock on `byte`.
fn is_held(file: &File, byte: i64) -> bool {
    let mut probe = range(byte, libc::F_WRLCK);
    // An error would have shown when the locks were set.
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut probe)).is_ok() && probe.l_type != libc::F_UNLCK as i16
}

fn refusal(file: &File, access: Access, error: nix::errno::Errno) -> String {
    if error != nix::errno::Errno::EAGAIN && error != nix::errno::Errno::EACCES {
        return format!("cannot be locked: {}", error.desc());
    }
    let wish = match access {
        Access::ReadOnly => "read (r)",
        Access::Write => "written alone (w)",
        Access::SharedWrite => "written together with others (w!)",
    };
    let holders: Vec<_> = host_users::of(file).iter().map(ToString::to_string).collect();
    let who = if holders.is_empty() { "another process".to_owned() } else { holders.join(", ") };
    format!("cannot be {wish}: {who} has it open in a way that forbids it; detach it there first")
}
