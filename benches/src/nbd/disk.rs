//! What the server wants from a disk: its shape, and commands that are answered whenever the disk is ready.

use super::protocol::MAX_PAYLOAD;

/// The shape of a disk, as it is told to the client (proto.md, Size constraints and Transmission flags).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes; a multiple of `block`.
    pub size_bytes: u64,
    /// Smallest unit in bytes; a power of two, 512 to 65536. Other offsets and lengths are refused with EINVAL.
    pub block: u32,
    /// Bytes from which requests are efficient; a power of two, at least `block`.
    pub preferred: u32,
    /// Most bytes of one read or write; at least `preferred`, at most 32 MiB. Trims and zeroes may be larger.
    pub max_payload: u32,
    /// Writes, trims and zeroes are refused with EPERM.
    pub read_only: bool,
    /// [`Command::Flush`] and `fua` can be honoured. Without it neither is offered.
    pub flush: bool,
    /// [`Command::Trim`] is worth sending.
    pub trim: bool,
}

/// A [`Geometry`] no client could be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// Not a power of two from 512 to 65536.
    #[error("block size {0} is not a power of two from 512 to 65536")]
    Block(u32),
    /// Not a power of two, or smaller than the block.
    #[error("preferred block size {0} is not a power of two of at least the block size")]
    Preferred(u32),
    /// Smaller than the preferred block or larger than 32 MiB.
    #[error("maximum payload {0} is not between the preferred block size and 32 MiB")]
    MaxPayload(u32),
    /// The last bytes would be out of reach.
    #[error("size {size} is not a multiple of the block size {block}")]
    Size {
        /// Size in bytes.
        size: u64,
        /// Block in bytes.
        block: u32,
    },
}

impl Geometry {
    /// A writable disk of `size_bytes` with 512-byte blocks that can flush and trim, and takes 32 MiB at once.
    pub fn writable(size_bytes: u64) -> Self {
        Self {
            size_bytes,
            block: 512,
            preferred: 4096,
            max_payload: MAX_PAYLOAD,
            read_only: false,
            flush: true,
            trim: true,
        }
    }

    /// Checks what the specification demands of the numbers (proto.md, Size constraints).
    pub fn check(&self) -> Result<(), GeometryError> {
        if !self.block.is_power_of_two() || !(512..=65536).contains(&self.block) {
            return Err(GeometryError::Block(self.block));
        }
        if !self.preferred.is_power_of_two() || self.preferred < self.block {
            return Err(GeometryError::Preferred(self.preferred));
        }
        if !(self.preferred..=MAX_PAYLOAD).contains(&self.max_payload) {
            return Err(GeometryError::MaxPayload(self.max_payload));
        }
        if !self.size_bytes.is_multiple_of(self.block.into()) {
            return Err(GeometryError::Size { size: self.size_bytes, block: self.block });
        }
        Ok(())
    }
}

/// One thing to be done. Offsets and lengths are bytes, within the disk, not zero, multiples of the block size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Answered with exactly `len` bytes.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes, at most `max_payload`.
        len: u32,
    },
    /// Write `data`.
    Write {
        /// First byte.
        offset: u64,
        /// What to write, at most `max_payload`.
        data: Vec<u8>,
        /// Answer only when it is durable.
        fua: bool,
    },
    /// Make durable everything answered so far, on whatever connection it came: the server promises
    /// `NBD_FLAG_CAN_MULTI_CONN`, and the disk keeps the promise.
    Flush,
    /// The contents are no longer needed.
    Trim {
        /// First byte.
        offset: u64,
        /// Bytes; may exceed `max_payload`.
        len: u32,
    },
    /// The range shall read as zeroes. How (a discard that zeroes, or written zeroes) is the disk's affair.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Bytes; may exceed `max_payload`.
        len: u32,
        /// Answer only when it is durable.
        fua: bool,
        /// The range may become a hole; false when the client wants it to stay allocated (`NBD_CMD_FLAG_NO_HOLE`).
        may_punch: bool,
    },
}

/// A disk under the server.
pub trait Disk: Send + Sync + 'static {
    /// The shape told to clients. Asked once per connection, which keeps the answer for its life.
    fn geometry(&self) -> Geometry;

    /// Takes a command; `done` may be spent at once or later, from any thread, in any order.
    ///
    /// Called from several threads. It may block while the disk's own queue is full, and holds up one connection with it;
    /// it must not block for good, or [`Server::stop`](super::Server::stop) waits with it.
    fn submit(&self, command: Command, done: Completion);
}

type Answer = Box<dyn FnOnce(Result<Vec<u8>, i32>) + Send>;

/// The right and the duty to answer one command, exactly once. Dropped unspent it answers EIO and says so in the log, so
/// that a disk that forgets a request fails its client and never hangs it.
#[must_use = "a command that is not answered fails with EIO"]
pub struct Completion(Option<Answer>);

impl Completion {
    /// A completion that hands the bytes read, or a positive Linux errno, to `answer`. `answer` must not block. The server
    /// makes these; tests that drive a [`Disk`] without a server make their own.
    pub fn new(answer: impl FnOnce(Result<Vec<u8>, i32>) + Send + 'static) -> Self {
        Self(Some(Box::new(answer)))
    }

    /// The command is done. `data` are the bytes of a read, exactly as many as were asked for (anything else is answered
    /// EIO), and empty for every other command.
    pub fn succeed(mut self, data: Vec<u8>) {
        self.answer(Ok(data));
    }

    /// The command failed with a positive Linux errno. NBD knows only a few; the server maps the rest (proto.md, Error
    /// values).
    pub fn fail(mut self, errno: i32) {
        self.answer(Err(errno));
    }

    fn answer(&mut self, result: Result<Vec<u8>, i32>) {
        if let Some(answer) = self.0.take() {
            answer(result);
        }
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        if self.0.is_some() {
            tracing::error!("the disk dropped a command without an answer; answering EIO for it");
            self.answer(Err(libc::EIO));
        }
    }
}

impl std::fmt::Debug for Completion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Completion").field("spent", &self.0.is_none()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn every_completion_answers_exactly_once() {
        let (answers, got) = mpsc::channel();
        let completion = || {
            let answers = answers.clone();
            Completion::new(move |result| answers.send(result).unwrap())
        };
        completion().succeed(vec![1]);
        completion().fail(28);
        drop(completion());
        assert_eq!(got.try_iter().collect::<Vec<_>>(), [Ok(vec![1]), Err(28), Err(libc::EIO)]);
    }

    #[test]
    fn geometries() {
        let good = Geometry::writable(1 << 20);
        assert_eq!(good.check(), Ok(()));
        assert_eq!(Geometry { size_bytes: 0, ..good }.check(), Ok(()));
        assert_eq!(Geometry { block: 256, ..good }.check(), Err(GeometryError::Block(256)));
        assert_eq!(Geometry { block: 1536, ..good }.check(), Err(GeometryError::Block(1536)));
        assert_eq!(Geometry { block: 1 << 17, ..good }.check(), Err(GeometryError::Block(1 << 17)));
        assert_eq!(Geometry { block: 4096, preferred: 512, ..good }.check(), Err(GeometryError::Preferred(512)));
        assert_eq!(Geometry { max_payload: 2048, ..good }.check(), Err(GeometryError::MaxPayload(2048)));
        assert_eq!(Geometry { max_payload: u32::MAX, ..good }.check(), Err(GeometryError::MaxPayload(u32::MAX)));
        assert_eq!(Geometry { size_bytes: 700, ..good }.check(), Err(GeometryError::Size { size: 700, block: 512 }));
    }
}
