//! Filters that somebody else has deleted come back.
//!
//! Whoever may configure the network may delete a qdisc or a classifier. A [`FilterGuard`] listens to what the kernel tells
//! of that (RTNLGRP_TC), and puts back what the run directory says should be there. At an interface that is switched on it
//! does not wait for the lock: until the filter is there again, the guest may send anything. Programs of ours write the
//! record before they change a filter, so that both come to the same; and what was put back by an older record is told of,
//! looked at again, and corrected. At an interface that is off nothing passes, and most likely a program of ours is about to
//! filter it: there the guard waits for its turn.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd as _;
use std::time::Duration;

use super::watcher::{Stop, Watcher};
use super::{Error, Options, Session, filter};
use crate::link::{FiltersTold, Link, Mode, Touched};
use crate::step::Step;

/// How long to wait before the next try, when the kernel or the run directory could not be read, or it was not our turn.
const PAUSE: Duration = Duration::from_secs(1);
/// How often a filter is put back that changes again under way, before its interface is switched off.
const TRIES: usize = 3;

/// A thread that keeps our filters in the kernel, until this is dropped.
#[derive(Debug)]
pub struct FilterGuard {
    _watcher: Watcher,
}

impl FilterGuard {
    /// Puts back what is missing now, and from now on what goes missing, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// When the kernel gives no socket, or there can be no thread.
    pub fn start(options: Options) -> io::Result<Self> {
        let told = FiltersTold::watch()?;
        let watcher = Watcher::start("filter-guard", move |stop| keep(&options, &told, stop))?;
        Ok(Self { _watcher: watcher })
    }
}

fn keep(options: &Options, told: &FiltersTold, stop: &Stop) {
    // All of them, at first: whatever happened while nobody listened.
    let mut touched = Touched::All;
    let mut later = BTreeSet::new();
    loop {
        let read = restore(options, &touched, &mut later);
        if let Err(error) = &read {
            tracing::error!(%error, "filters of guests' interfaces cannot be looked at");
        }
        let again = read.is_err() || !later.is_empty();
        if !stop.wait(told.as_fd(), again.then_some(PAUSE)) {
            return;
        }
        let next = told.read();
        touched = if read.is_err() { Touched::All } else { next };
    }
}

/// `later` are those that have to be looked at again.
fn restore(options: &Options, touched: &Touched, later: &mut BTreeSet<String>) -> Result<(), Error> {
    let mut names = std::mem::take(later);
    if names.is_empty() && *touched == Touched::Links(BTreeSet::new()) {
        return Ok(());
    }
    let wrong = |error: crate::link::Error| Error::Read(Box::new(error.into()));
    let mut link = Link::open().map_err(wrong)?;
    match touched {
        Touched::All => names.extend(filter::filtered(&options.run)?),
        Touched::Links(indices) => {
            for index in indices {
                names.extend(link.name(*index).map_err(wrong)?);
            }
        }
    }
    for name in names {
        if is_missing(options, &mut link, &name)? {
            if link.is_up(&name).map_err(wrong)? {
                put_back(options, &mut link, &name)?;
            } else if !in_turn(options, &mut link, &name)? {
                later.insert(name);
            }
        }
    }
    Ok(())
}

fn is_missing(options: &Options, link: &mut Link, name: &str) -> Result<bool, Error> {
    let there = link.exists(name).map_err(|error| Error::Read(Box::new(error.into())))?;
    Ok(there && filter::look(&options.run, link, name)? == Some(None))
}

/// Puts a filter back while nobody else of ours changes the network; whether that is so.
fn in_turn(options: &Options, link: &mut Link, name: &str) -> Result<bool, Error> {
    match Session::open(Options { patience: Duration::ZERO, ..options.clone() }) {
        Ok(_alone) => put_back(options, link, name).map(|()| true),
        Err(Error::Busy { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

fn put_back(options: &Options, link: &mut Link, name: &str) -> Result<(), Error> {
    let wrong = |error: crate::link::Error| Error::Read(Box::new(error.into()));
    for attempt in 1.. {
        if !is_missing(options, link, name)? {
            return Ok(());
        }
        // A filter without a record is none that should be there; nobody has to put it back.
        let Some(rules) = filter::kept(&options.run, name)? else { return Ok(()) };
        match filter::put(&options.run, link, name, &rules, options.say) {
            Ok(()) => {
                tracing::warn!(interface = name, "its filter was changed or deleted by somebody else (tc?): put back");
                return Ok(());
            }
            Err(_) if attempt < TRIES => {}
            Err(error) => {
                tracing::error!(
                    interface = name, %error,
                    "its filter was changed or deleted by somebody else, and cannot be put back: it is switched off until \
                     it comes online again"
                );
                let off = Step::SetUp { link: name.to_owned(), up: false };
                return link.take(&off, Mode::Undo).map_err(wrong);
            }
        }
    }
    Ok(())
}
