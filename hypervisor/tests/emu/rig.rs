//! A machine to test on, inside this process or served to it through the broker.

use std::os::fd::BorrowedFd;

use hypervisor::emu::{GuestOptions, GuestSeat, Limits, Machine, Member, Running};
use hypervisor::{CopyDirection, CopyOp, DomId, Error, GrantRef, GrantStatus, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

pub(crate) struct Rig {
    pub(crate) dom0: Member,
    place: Place,
}

enum Place {
    Here(Machine),
    There(Running, tempfile::TempDir),
}

/// Small limits, so that they are reached soon.
pub(crate) const LIMITS: Limits =
    Limits { grants: 1024, maptrack: 300, ports: 16, memory_pages: 64, memory_pages_max: 1024 };

impl Rig {
    pub(crate) fn local() -> Self {
        let machine = Machine::new(LIMITS).unwrap();
        Self { dom0: Member::local(&machine, DomId::DOM0).unwrap(), place: Place::Here(machine) }
    }

    pub(crate) fn served() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let running = Machine::start(dir.path(), LIMITS).unwrap();
        Self { dom0: Member::join(dir.path(), DomId::DOM0).unwrap(), place: Place::There(running, dir) }
    }

    pub(crate) fn machine(&self) -> &Machine {
        match &self.place {
            Place::Here(machine) => machine,
            Place::There(running, _) => running.machine(),
        }
    }

    pub(crate) fn dir(&self) -> &std::path::Path {
        match &self.place {
            Place::Here(_) => panic!("a machine of this process has no directory"),
            Place::There(_, dir) => dir.path(),
        }
    }

    pub(crate) fn guest(&self) -> GuestSeat {
        self.dom0.create_guest(GuestOptions::default()).unwrap()
    }

    /// A backend's seat in another domain.
    pub(crate) fn driver(&self, domid: u16) -> Result<Member> {
        match &self.place {
            Place::Here(machine) => Member::local(machine, DomId(domid)),
            Place::There(_, dir) => Member::join(dir.path(), DomId(domid)),
        }
    }
}

/// Runs a test on a machine of this process, and on one behind a broker.
pub(crate) fn everywhere(test: impl Fn(&Rig)) {
    test(&Rig::local());
    test(&Rig::served());
}

pub(crate) fn status<T: std::fmt::Debug>(result: Result<T>) -> GrantStatus {
    match result.unwrap_err() {
        Error::Grant { status, .. } => status,
        other => panic!("{other}"),
    }
}

pub(crate) fn reason<T: std::fmt::Debug>(result: Result<T>) -> String {
    result.unwrap_err().to_string()
}

pub(crate) fn op(gref: GrantRef, direction: CopyDirection) -> CopyOp {
    CopyOp { gref, offset: 0, len: 4096, direction, local: 0, status: GrantStatus::Okay }
}

pub(crate) fn readable(fd: BorrowedFd<'_>) -> bool {
    wait(fd, 0)
}

/// Whether the descriptor becomes readable within so many seconds.
pub(crate) fn wait(fd: BorrowedFd<'_>, seconds: i64) -> bool {
    let timeout = Timespec { tv_sec: seconds, tv_nsec: 0 };
    poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&timeout)).unwrap() == 1
}

/// Waits for what another process or thread is about to bring about.
pub(crate) fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..3000 {
        if done() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("{what} did not happen in 30 seconds");
}
