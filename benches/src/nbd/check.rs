//! Which requests are let through, and what the others are told (proto.md, Request types and Error values).

use super::disk::Geometry;
use super::protocol::*;

/// A request that may go to the disk. The payload of a write is still in the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plan {
    Read,
    Write { fua: bool },
    Flush,
    Trim { fua: bool },
    WriteZeroes { fua: bool, may_punch: bool },
}

/// What the client may use, told once in the handshake (proto.md, Transmission flags).
pub(super) fn transmission_flags(geometry: &Geometry) -> u16 {
    let mut flags = NBD_FLAG_HAS_FLAGS | NBD_FLAG_CAN_MULTI_CONN;
    if geometry.flush {
        flags |= NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA;
    }
    if geometry.read_only {
        return flags | NBD_FLAG_READ_ONLY;
    }
    if geometry.trim {
        flags |= NBD_FLAG_SEND_TRIM;
    }
    flags | NBD_FLAG_SEND_WRITE_ZEROES
}

/// Checks a request, other than `NBD_CMD_DISC`, against what the client was told. The error is the one to answer with.
pub(super) fn plan(request: &Request, geometry: &Geometry) -> Result<Plan, u32> {
    // FUA is valid on every command once offered, even where it means nothing ("existing clients are known to").
    let mut allowed = if geometry.flush { NBD_CMD_FLAG_FUA } else { 0 };
    if request.command == NBD_CMD_WRITE_ZEROES {
        allowed |= NBD_CMD_FLAG_NO_HOLE;
    }
    if request.flags & !allowed != 0 {
        return Err(NBD_EINVAL);
    }
    let fua = request.flags & NBD_CMD_FLAG_FUA != 0;
    match request.command {
        NBD_CMD_READ => {
            range(request, geometry, NBD_EINVAL)?;
            payload(request, geometry)?;
            Ok(Plan::Read)
        }
        NBD_CMD_WRITE => {
            writable(geometry)?;
            range(request, geometry, NBD_ENOSPC)?;
            payload(request, geometry)?;
            Ok(Plan::Write { fua })
        }
        NBD_CMD_FLUSH if geometry.flush && request.offset == 0 && request.length == 0 => Ok(Plan::Flush),
        NBD_CMD_TRIM => {
            writable(geometry)?;
            range(request, geometry, NBD_EINVAL)?;
            if geometry.trim { Ok(Plan::Trim { fua }) } else { Err(NBD_EINVAL) }
        }
        NBD_CMD_WRITE_ZEROES => {
            writable(geometry)?;
            range(request, geometry, NBD_ENOSPC)?;
            Ok(Plan::WriteZeroes { fua, may_punch: request.flags & NBD_CMD_FLAG_NO_HOLE == 0 })
        }
        _ => Err(NBD_EINVAL),
    }
}

fn writable(geometry: &Geometry) -> Result<(), u32> {
    if geometry.read_only { Err(NBD_EPERM) } else { Ok(()) }
}

/// `beyond` is the error of a range that leaves the disk: ENOSPC for writes, EINVAL for the rest.
fn range(request: &Request, geometry: &Geometry, beyond: u32) -> Result<(), u32> {
    let (offset, length, block) = (request.offset, u64::from(request.length), u64::from(geometry.block));
    // "The behavior on a length of 0 is unspecified, although the server SHOULD NOT disconnect."
    if length == 0 || !offset.is_multiple_of(block) || !length.is_multiple_of(block) {
        return Err(NBD_EINVAL);
    }
    // offset + length can overflow, this cannot.
    if offset > geometry.size_bytes || length > geometry.size_bytes - offset { Err(beyond) } else { Ok(()) }
}

/// EOVERFLOW would be the wrong answer here: it belongs to commands without a payload.
fn payload(request: &Request, geometry: &Geometry) -> Result<(), u32> {
    if request.length > geometry.max_payload { Err(NBD_EINVAL) } else { Ok(()) }
}

/// A disk's errno as one of the few NBD knows (proto.md, Error values). `payload` tells whether the command carries data
/// in either direction: EOVERFLOW is reserved for those that do not.
pub(super) fn error_of(errno: i32, payload: bool) -> u32 {
    match errno {
        libc::EPERM | libc::EACCES | libc::EROFS => NBD_EPERM,
        libc::ENOMEM => NBD_ENOMEM,
        // ENOTSUP is reserved for fast zeroes, which are not offered.
        libc::EINVAL | libc::EOPNOTSUPP => NBD_EINVAL,
        libc::ENOSPC | libc::EDQUOT | libc::EFBIG => NBD_ENOSPC,
        libc::EOVERFLOW if payload => NBD_EINVAL,
        libc::EOVERFLOW => NBD_EOVERFLOW,
        libc::ESHUTDOWN => NBD_ESHUTDOWN,
        // 0 among them: a failure must not look like success.
        _ => NBD_EIO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 20;

    fn ask(command: u16, flags: u16, offset: u64, length: u32) -> Request {
        Request { flags, command, cookie: 0, offset, length }
    }

    fn check(command: u16, flags: u16, offset: u64, length: u32) -> Result<Plan, u32> {
        plan(&ask(command, flags, offset, length), &Geometry::writable(SIZE))
    }

    #[test]
    fn the_good() {
        assert_eq!(check(NBD_CMD_READ, 0, 0, 512), Ok(Plan::Read));
        assert_eq!(check(NBD_CMD_READ, NBD_CMD_FLAG_FUA, SIZE - 512, 512), Ok(Plan::Read));
        assert_eq!(check(NBD_CMD_WRITE, 0, 0, SIZE as u32), Ok(Plan::Write { fua: false }));
        assert_eq!(check(NBD_CMD_WRITE, NBD_CMD_FLAG_FUA, 0, 512), Ok(Plan::Write { fua: true }));
        assert_eq!(check(NBD_CMD_FLUSH, NBD_CMD_FLAG_FUA, 0, 0), Ok(Plan::Flush));
        assert_eq!(check(NBD_CMD_TRIM, NBD_CMD_FLAG_FUA, 512, 512), Ok(Plan::Trim { fua: true }));
        let zeroes = |fua, may_punch| Ok(Plan::WriteZeroes { fua, may_punch });
        assert_eq!(check(NBD_CMD_WRITE_ZEROES, 0, 0, 512), zeroes(false, true));
        assert_eq!(check(NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FUA, 0, 512), zeroes(true, false));
    }

    #[test]
    fn out_of_bounds() {
        for (offset, length) in [(SIZE, 512), (SIZE - 512, 1024), (u64::MAX - 511, 512), (u64::MAX - 511, 0xffff_fe00)]
        {
            assert_eq!(check(NBD_CMD_READ, 0, offset, length), Err(NBD_EINVAL));
            assert_eq!(check(NBD_CMD_WRITE, 0, offset, length), Err(NBD_ENOSPC));
            assert_eq!(check(NBD_CMD_TRIM, 0, offset, length), Err(NBD_EINVAL));
            assert_eq!(check(NBD_CMD_WRITE_ZEROES, 0, offset, length), Err(NBD_ENOSPC));
        }
    }

    #[test]
    fn misaligned_empty_or_odd() {
        for command in [NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES] {
            for (offset, length) in [(1, 512), (0, 511), (0, 0), (0, u32::MAX), (256, 256)] {
                assert_eq!(check(command, 0, offset, length), Err(NBD_EINVAL));
            }
            assert_eq!(check(command, 1 << 15, 0, 512), Err(NBD_EINVAL));
            assert_eq!(check(command, 1 << 4, 0, 512), Err(NBD_EINVAL), "fast zeroes and the like are not offered");
        }
        assert_eq!(check(NBD_CMD_WRITE, NBD_CMD_FLAG_NO_HOLE, 0, 512), Err(NBD_EINVAL));
        assert_eq!(check(NBD_CMD_FLUSH, 0, 512, 0), Err(NBD_EINVAL));
        assert_eq!(check(5, 0, 0, 512), Err(NBD_EINVAL));
        assert_eq!(check(7, 0, 0, 512), Err(NBD_EINVAL));
        assert_eq!(check(0xffff, 0, 0, 0), Err(NBD_EINVAL));
    }

    #[test]
    fn only_what_moves_data_is_bound_by_the_payload() {
        let geometry = Geometry { max_payload: 4096, ..Geometry::writable(SIZE) };
        assert_eq!(plan(&ask(NBD_CMD_READ, 0, 0, 8192), &geometry), Err(NBD_EINVAL));
        assert_eq!(plan(&ask(NBD_CMD_WRITE, 0, 0, 8192), &geometry), Err(NBD_EINVAL));
        assert!(plan(&ask(NBD_CMD_TRIM, 0, 0, 8192), &geometry).is_ok());
        assert!(plan(&ask(NBD_CMD_WRITE_ZEROES, 0, 0, 8192), &geometry).is_ok());
    }

    #[test]
    fn what_was_not_offered_is_refused() {
        let bare = Geometry { flush: false, trim: false, ..Geometry::writable(SIZE) };
        assert_eq!(
            transmission_flags(&bare),
            NBD_FLAG_HAS_FLAGS | NBD_FLAG_CAN_MULTI_CONN | NBD_FLAG_SEND_WRITE_ZEROES
        );
        assert_eq!(plan(&ask(NBD_CMD_FLUSH, 0, 0, 0), &bare), Err(NBD_EINVAL));
        assert_eq!(plan(&ask(NBD_CMD_TRIM, 0, 0, 512), &bare), Err(NBD_EINVAL));
        assert_eq!(plan(&ask(NBD_CMD_WRITE, NBD_CMD_FLAG_FUA, 0, 512), &bare), Err(NBD_EINVAL));

        let read_only = Geometry { read_only: true, ..Geometry::writable(SIZE) };
        assert_eq!(transmission_flags(&read_only), 0b1_0000_1111);
        for command in [NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES] {
            assert_eq!(plan(&ask(command, 0, 0, 512), &read_only), Err(NBD_EPERM));
        }
        assert_eq!(transmission_flags(&Geometry::writable(SIZE)), 0b1_0110_1101);
    }

    #[test]
    fn errnos() {
        assert_eq!(error_of(libc::EROFS, true), NBD_EPERM);
        assert_eq!(error_of(libc::EDQUOT, true), NBD_ENOSPC);
        assert_eq!(error_of(libc::EOVERFLOW, false), NBD_EOVERFLOW);
        assert_eq!(error_of(libc::EOVERFLOW, true), NBD_EINVAL);
        for nonsense in [0, -5, i32::MIN, i32::MAX, libc::ETIMEDOUT] {
            assert_eq!(error_of(nonsense, true), NBD_EIO);
        }
    }
}
