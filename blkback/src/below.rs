//! What is under a queue: a file or device of this machine, or an NBD server.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use hypervisor::memory::IoList;

use crate::image::Image;
use crate::nbd::NbdStorage;
use crate::storage::{Done, Sleep, Storage, UringStorage};

/// Either of the two. One branch an operation; the queue's code is compiled once.
#[derive(Debug)]
pub enum Below {
    /// A file or block device.
    File(UringStorage),
    /// A server.
    Server(NbdStorage),
}

impl Below {
    /// The way to `image` for a queue with at most `entries` requests. `wakers` end its sleep when they are readable.
    ///
    /// # Errors
    /// When the kernel gives no io_uring.
    pub fn new(image: &Image, wakers: &[BorrowedFd<'_>], entries: u32) -> io::Result<Self> {
        match image.remote() {
            Some(client) => NbdStorage::new(Arc::clone(client), image.as_fd(), wakers).map(Self::Server),
            None => UringStorage::with_eraser(image.as_fd(), wakers, entries, image.erase.clone()).map(Self::File),
        }
    }
}

macro_rules! pass_on {
    ($($(#[$meta:meta])* fn $name:ident(&mut self $(, $argument:ident: $type:ty)*) $(-> $result:ty)?;)*) => {$(
        $(#[$meta])*
        fn $name(&mut self $(, $argument: $type)*) $(-> $result)? {
            match self {
                Self::File(storage) => storage.$name($($argument),*),
                Self::Server(storage) => storage.$name($($argument),*),
            }
        }
    )*};
}

impl Storage for Below {
    pass_on! {
        #[inline]
        fn read(&mut self, offset: u64, memory: IoList, token: u32);
        #[inline]
        fn write(&mut self, offset: u64, memory: IoList, token: u32);
        fn flush(&mut self, token: u32);
        fn discard(&mut self, offset: u64, len: u64, token: u32);
        fn erase(&mut self, offset: u64, len: u64, token: u32);
        #[inline]
        fn submit(&mut self) -> io::Result<()>;
        #[inline]
        fn next(&mut self) -> Option<Done>;
        #[inline]
        fn has_completions(&mut self) -> bool;
        fn give_up(&mut self);
    }
}

impl Sleep for Below {
    pass_on! {
        fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()>;
        fn ignore(&mut self, index: u32);
        fn take_rung(&mut self, index: u32) -> bool;
    }
}
