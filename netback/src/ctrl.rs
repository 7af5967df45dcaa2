//! The control ring: how a guest says what is to be hashed (xen/include/public/io/netif.h, "Control requests").
//!
//! A plain struct without a thread: [`Control::turn`] answers what is in the ring. Each request is copied out once;
//! keys and tables are grant copies into memory of ours and are checked there. Linux' netback answers the same way
//! except where it reads past its table (XSA-270), checks the old entries instead of the new ones, or follows a
//! producer index that is too far ahead.

use std::sync::Arc;

use hypervisor::memory::Mapping;
use hypervisor::{Backend, CopyDirection, CopyOp, DomId, EventChannel, GrantRef, GrantStatus, PAGE_SIZE};
use ring::{BackRing, Layout, Overflow};

use crate::abi::{CTRL_SLOT, CtrlRequest, CtrlResponse, ctrl_status, ctrl_type};
use crate::hash::{ALL_TYPES, Algorithm, HashSettings, HashState, KEY_MAX, MAPPING_MAX};

/// Why the ring cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// The guest broke it.
    #[error("control ring: {0}")]
    Ring(#[from] Overflow),
    /// Copies do not work at all.
    #[error("copying for the control ring: {0}")]
    Copy(#[source] hypervisor::Error),
}

/// What a control ring is made of.
#[derive(Debug)]
pub struct Parts {
    /// The page with the ring.
    pub ring: Mapping,
    /// The event channel.
    pub channel: Box<dyn EventChannel>,
    /// The hypervisor.
    pub xen: Arc<dyn Backend>,
    /// The guest.
    pub peer: DomId,
    /// Queues the guest has: its table may name no others.
    pub queues: u32,
    /// Where the settings go.
    pub hash: Arc<HashState>,
}

/// One vif's control ring.
#[derive(Debug)]
pub struct Control {
    ring: BackRing<Mapping>,
    channel: Box<dyn EventChannel>,
    xen: Arc<dyn Backend>,
    peer: DomId,
    queues: u32,
    hash: Arc<HashState>,
    /// The settings as they are, to be changed and then shown to the queues.
    settings: HashSettings,
    /// Where keys and tables are copied to.
    page: Mapping,
}

/// How a request ends: a number that was asked for, or one of [`ctrl_status`].
type Outcome = Result<u32, u32>;

/// The layout of a control ring.
pub fn layout() -> Layout {
    Layout::new(CTRL_SLOT, 1)
}

impl Control {
    /// A new ring, of a frontend that has just connected: nothing is hashed.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn new(parts: Parts) -> std::io::Result<Self> {
        let Parts { ring, channel, xen, peer, queues, hash } = parts;
        let settings = HashSettings::default();
        hash.replace(settings.clone());
        Ok(Self {
            ring: BackRing::attach(ring, layout(), 0),
            channel,
            xen,
            peer,
            queues,
            hash,
            settings,
            page: Mapping::anonymous(PAGE_SIZE)?,
        })
    }

    /// The event channel: to be waited for, to be written back after the work, and to be notified when
    /// [`turn`](Self::turn) says so.
    pub fn channel(&self) -> &dyn EventChannel {
        &*self.channel
    }

    /// Answers all requests that are in the ring, at most as many as it has slots. Returns how many those were, and
    /// whether the guest wants to be notified.
    ///
    /// # Errors
    /// When the ring is broken, or copies fail as a whole.
    pub fn turn(&mut self) -> Result<(u32, bool), Broken> {
        self.ring.pending()?;
        let mut slot = [0; CTRL_SLOT];
        let mut answered = 0;
        while self.ring.consume(&mut slot) {
            let request = CtrlRequest::decode(&slot);
            let (status, data) = match self.carry_out(&request)? {
                Ok(data) => (ctrl_status::SUCCESS, data),
                Err(status) => (status, 0),
            };
            self.ring.respond(&CtrlResponse { id: request.id, kind: request.kind, status, data }.encode());
            answered += 1;
        }
        Ok((answered, self.ring.publish()))
    }

    /// Asks to be woken by the next request. True when one waits already, and sleeping would be wrong.
    ///
    /// # Errors
    /// When the ring is broken.
    pub fn rearm(&mut self) -> Result<bool, Broken> {
        Ok(self.ring.rearm()? > 0)
    }

    fn carry_out(&mut self, request: &CtrlRequest) -> Result<Outcome, Broken> {
        let [first, second, third] = request.data;
        let outcome = match request.kind {
            ctrl_type::SET_HASH_ALGORITHM => self.set_algorithm(first),
            // Both want an algorithm to have been chosen.
            ctrl_type::GET_HASH_FLAGS if self.hashes() => Ok(ALL_TYPES),
            ctrl_type::SET_HASH_FLAGS if self.hashes() => self.change(|settings| settings.set_types(first)),
            ctrl_type::SET_HASH_FLAGS => Err(ctrl_status::INVALID_PARAMETER),
            ctrl_type::SET_HASH_KEY => return self.set_key(GrantRef(first), second),
            // MAPPING_MAX is a small constant.
            ctrl_type::GET_HASH_MAPPING_SIZE => Ok(MAPPING_MAX as u32),
            ctrl_type::SET_HASH_MAPPING_SIZE => self.change(|settings| settings.set_mapping_size(first)),
            ctrl_type::SET_HASH_MAPPING => return self.set_mapping(GrantRef(first), second, third),
            // Grants that stay mapped (8 to 10) buy nothing here: payload is copied either way. And what nobody knows.
            _ => Err(ctrl_status::NOT_SUPPORTED),
        };
        Ok(outcome)
    }

    fn hashes(&self) -> bool {
        self.settings.algorithm() != Algorithm::None
    }

    /// Changes the settings, or refuses to, and shows them to the queues.
    fn change(&mut self, change: impl FnOnce(&mut HashSettings) -> bool) -> Outcome {
        if !change(&mut self.settings) {
            return Err(ctrl_status::INVALID_PARAMETER);
        }
        self.hash.replace(self.settings.clone());
        Ok(0)
    }

    fn set_algorithm(&mut self, number: u32) -> Outcome {
        let algorithm = Algorithm::parse(number).ok_or(ctrl_status::INVALID_PARAMETER)?;
        self.change(|settings| {
            settings.set_algorithm(algorithm);
            true
        })
    }

    fn set_key(&mut self, gref: GrantRef, len: u32) -> Result<Outcome, Broken> {
        let Some(len) = usize::try_from(len).ok().filter(|&len| len <= KEY_MAX) else {
            return Ok(Err(ctrl_status::BUFFER_OVERFLOW));
        };
        let mut key = [0; KEY_MAX];
        if !self.fetch(gref, &mut key[..len])? {
            return Ok(Err(ctrl_status::INVALID_PARAMETER));
        }
        Ok(self.change(|settings| {
            settings.set_key(&key[..len]);
            true
        }))
    }

    fn set_mapping(&mut self, gref: GrantRef, len: u32, offset: u32) -> Result<Outcome, Broken> {
        let Some(len) = usize::try_from(len).ok().filter(|&len| len <= MAPPING_MAX) else {
            return Ok(Err(ctrl_status::BUFFER_OVERFLOW));
        };
        let mut bytes = [0; 4 * MAPPING_MAX];
        if !self.fetch(gref, &mut bytes[..4 * len])? {
            return Ok(Err(ctrl_status::INVALID_PARAMETER));
        }
        let (words, _) = bytes[..4 * len].as_chunks::<4>();
        let entries: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
        let queues = self.queues;
        Ok(self.change(|settings| settings.set_mapping(offset, &entries, queues)))
    }

    /// Copies the beginning of a granted page, at most a page of it. False when the grant does not allow it. Nothing
    /// is copied, and the grant not looked at, where nothing is wanted: an empty key comes without a page.
    fn fetch(&self, gref: GrantRef, into: &mut [u8]) -> Result<bool, Broken> {
        let Ok(len) = u16::try_from(into.len()) else { return Ok(false) };
        if len == 0 {
            return Ok(true);
        }
        let mut ops = [CopyOp {
            gref,
            offset: 0,
            len,
            direction: CopyDirection::FromGuest,
            local: 0,
            status: GrantStatus::GeneralError,
        }];
        self.xen.copy(self.peer, &self.page, &mut ops).map_err(Broken::Copy)?;
        let copied = ops[0].status == GrantStatus::Okay;
        if copied {
            self.page.copy_out(0, into);
        }
        Ok(copied)
    }
}

#[cfg(test)]
mod tests;
