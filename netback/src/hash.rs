//! Hashing what goes to the guest, as the guest wants it (xen/include/public/io/netif.h, "Hash types" and "Hash
//! algorithms"): Microsoft's receive side scaling over the control ring.
//!
//! [`HashSettings`] is what a guest has chosen, a value that is never changed once others can see it. [`HashState`] is
//! where the control ring puts a new one, and [`HashReader`] is how a queue looks at it: one load as long as nothing
//! has changed.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::abi::hash_type;

/// Bytes of the longest key (Linux: XEN_NETBK_MAX_HASH_KEY_SIZE).
pub const KEY_MAX: usize = 40;
/// Entries of the largest table (Linux: XEN_NETBK_MAX_HASH_MAPPING_SIZE).
pub const MAPPING_MAX: usize = 128;
/// All types of hash there are: bits of [`hash_type`].
pub const ALL_TYPES: u32 = hash_type::IPV4 | hash_type::IPV4_TCP | hash_type::IPV6 | hash_type::IPV6_TCP;

/// Bytes of the longest input: two addresses of IPv6 and two ports.
const INPUT_MAX: usize = 36;
const NIBBLES: usize = 2 * INPUT_MAX;

/// XEN_NETIF_CTRL_HASH_ALGORITHM_*.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Algorithm {
    /// No hashing.
    #[default]
    None,
    /// Toeplitz.
    Toeplitz,
}

impl Algorithm {
    /// The algorithm for the number of a control request.
    pub fn parse(number: u32) -> Option<Self> {
        match number {
            0 => Some(Self::None),
            1 => Some(Self::Toeplitz),
            _ => None,
        }
    }

    /// The number that stands in an extra.
    pub fn number(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Toeplitz => 1,
        }
    }
}

/// Where a packet comes from and where it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Addresses {
    /// IPv4.
    V4 {
        /// From.
        source: Ipv4Addr,
        /// To.
        destination: Ipv4Addr,
    },
    /// IPv6.
    V6 {
        /// From.
        source: Ipv6Addr,
        /// To.
        destination: Ipv6Addr,
    },
}

/// What of a packet is hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    /// The addresses.
    pub addresses: Addresses,
    /// Source and destination port of a TCP segment that is no fragment; none for anything else.
    pub tcp_ports: Option<(u16, u16)>,
}

/// A packet's hash, as the extra carries it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PacketHash {
    /// What was hashed: the number of a bit of [`hash_type`] (_XEN_NETIF_CTRL_HASH_TYPE_*), not the bit.
    pub kind: u8,
    /// The value.
    pub value: u32,
}

/// A Toeplitz key, laid out so that four bits of input cost one look into a table.
#[derive(Clone)]
struct Key {
    bytes: [u8; KEY_MAX],
    /// By place and value of a nibble of the input: what it adds to the hash.
    table: Box<[[u32; 16]; NIBBLES]>,
}

impl Key {
    fn new(bytes: [u8; KEY_MAX]) -> Self {
        let mut table = Box::new([[0; 16]; NIBBLES]);
        for (place, row) in table.iter_mut().enumerate() {
            for (value, sum) in row.iter_mut().enumerate() {
                for bit in (0..4).filter(|bit| value & (8 >> bit) != 0) {
                    *sum ^= window(&bytes, 4 * place + bit);
                }
            }
        }
        Self { bytes, table }
    }

    fn hash(&self, input: &[u8]) -> u32 {
        input
            .iter()
            .zip(self.table.chunks_exact(2))
            .fold(0, |hash, (&byte, rows)| hash ^ rows[0][usize::from(byte >> 4)] ^ rows[1][usize::from(byte & 15)])
    }
}

/// 32 bits of the key from bit `at` on, the leftmost being bit 0. Behind its end a key is zero.
fn window(key: &[u8; KEY_MAX], at: usize) -> u32 {
    let byte = |index: usize| u64::from(key.get(index).copied().unwrap_or(0));
    let first = at / 8;
    let five = (first..first + 5).fold(0, |word, index| word << 8 | byte(index));
    // 40 bits, of which the first `at % 8` and the last are cut off.
    (five >> (8 - at % 8)) as u32
}

/// What a guest has chosen. At first nothing is hashed.
#[derive(Clone)]
pub struct HashSettings {
    algorithm: Algorithm,
    types: u32,
    key: Key,
    mapping: Vec<u32>,
}

impl std::fmt::Debug for HashSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The key's table is derived, and long.
        f.debug_struct("HashSettings")
            .field("algorithm", &self.algorithm)
            .field("types", &self.types)
            .field("key", &self.key.bytes)
            .field("mapping", &self.mapping)
            .finish_non_exhaustive()
    }
}

impl Default for HashSettings {
    fn default() -> Self {
        Self { algorithm: Algorithm::None, types: 0, key: Key::new([0; KEY_MAX]), mapping: Vec::new() }
    }
}

impl HashSettings {
    /// How is hashed.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// What is hashed: bits of [`hash_type`].
    pub fn types(&self) -> u32 {
        self.types
    }

    /// The key, with zeros behind its end.
    pub fn key(&self) -> &[u8; KEY_MAX] {
        &self.key.bytes
    }

    /// Queue numbers by hash; empty where the hash modulo the number of queues decides.
    pub fn mapping(&self) -> &[u32] {
        &self.mapping
    }

    /// Sets the algorithm.
    pub fn set_algorithm(&mut self, algorithm: Algorithm) {
        self.algorithm = algorithm;
    }

    /// Sets what is hashed. False, and nothing happens, when a bit is unknown.
    #[must_use]
    pub fn set_types(&mut self, types: u32) -> bool {
        let known = types & !ALL_TYPES == 0;
        if known {
            self.types = types;
        }
        known
    }

    /// Sets the key; what is not given of it is zero.
    ///
    /// # Panics
    /// When it is longer than [`KEY_MAX`].
    pub fn set_key(&mut self, key: &[u8]) {
        let mut bytes = [0; KEY_MAX];
        bytes[..key.len()].copy_from_slice(key);
        self.key = Key::new(bytes);
    }

    /// A new table of `entries` entries, all of them queue 0. False, and nothing happens, when it is too large.
    #[must_use]
    pub fn set_mapping_size(&mut self, entries: u32) -> bool {
        let fits = usize::try_from(entries).ok().filter(|&entries| entries <= MAPPING_MAX);
        if let Some(entries) = fits {
            self.mapping = vec![0; entries];
        }
        fits.is_some()
    }

    /// Sets some entries of the table. False, and nothing happens, when they do not lie in it or name a queue that is
    /// not below `queues`.
    #[must_use]
    pub fn set_mapping(&mut self, offset: u32, entries: &[u32], queues: u32) -> bool {
        let Ok(offset) = usize::try_from(offset) else { return false };
        let end = offset.checked_add(entries.len());
        let Some(part) = end.and_then(|end| self.mapping.get_mut(offset..end)) else { return false };
        let good = entries.iter().all(|&queue| queue < queues);
        if good {
            part.copy_from_slice(entries);
        }
        good
    }

    /// The hash of a packet; none where its kind is not to be hashed.
    #[inline]
    pub fn hash(&self, flow: &Flow) -> Option<PacketHash> {
        if self.algorithm == Algorithm::None || self.types == 0 {
            return None;
        }
        let (addresses_only, with_ports) = match flow.addresses {
            Addresses::V4 { .. } => (hash_type::IPV4, hash_type::IPV4_TCP),
            Addresses::V6 { .. } => (hash_type::IPV6, hash_type::IPV6_TCP),
        };
        // The most that can be hashed always is.
        let ports = flow.tcp_ports.filter(|_| self.types & with_ports != 0);
        let kind = if ports.is_some() { with_ports } else { addresses_only };
        if self.types & kind == 0 {
            return None;
        }
        let mut input = [0; INPUT_MAX];
        let mut len = match flow.addresses {
            Addresses::V4 { source, destination } => {
                input[..4].copy_from_slice(&source.octets());
                input[4..8].copy_from_slice(&destination.octets());
                8
            }
            Addresses::V6 { source, destination } => {
                input[..16].copy_from_slice(&source.octets());
                input[16..32].copy_from_slice(&destination.octets());
                32
            }
        };
        if let Some((source, destination)) = ports {
            input[len..len + 2].copy_from_slice(&source.to_be_bytes());
            input[len + 2..len + 4].copy_from_slice(&destination.to_be_bytes());
            len += 4;
        }
        Some(PacketHash { kind: kind.trailing_zeros() as u8, value: self.key.hash(&input[..len]) })
    }

    /// The queue that a packet with this hash is to go to, of `queues`.
    ///
    /// # Panics
    /// When there are no queues.
    pub fn queue(&self, hash: u32, queues: u32) -> u32 {
        match self.mapping.len() {
            0 => hash % queues,
            // The table was checked when there were as many queues; never trust that it still fits.
            entries => self.mapping[hash as usize % entries] % queues,
        }
    }
}

/// The settings of one vif, shared by its control ring, which changes them, and its queues.
#[derive(Debug, Default)]
pub struct HashState {
    /// Counts changes.
    generation: AtomicU64,
    settings: Mutex<Arc<HashSettings>>,
}

impl HashState {
    fn lock(&self) -> MutexGuard<'_, Arc<HashSettings>> {
        // The settings are replaced whole, so a panic elsewhere cannot have left them half changed.
        self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The settings now.
    pub fn settings(&self) -> Arc<HashSettings> {
        Arc::clone(&self.lock())
    }

    /// Replaces the settings; readers see them at their next look.
    pub fn replace(&self, settings: HashSettings) {
        *self.lock() = Arc::new(settings);
        self.generation.fetch_add(1, Ordering::Release);
    }
}

/// A queue's view of a [`HashState`].
#[derive(Debug, Clone)]
pub struct HashReader {
    state: Arc<HashState>,
    generation: u64,
    settings: Arc<HashSettings>,
}

impl HashReader {
    /// A view of `state`.
    pub fn new(state: Arc<HashState>) -> Self {
        // The generation first: settings that are newer than it are only looked at once more.
        let generation = state.generation.load(Ordering::Acquire);
        let settings = state.settings();
        Self { state, generation, settings }
    }

    /// The settings now. Takes a lock only when they have changed since the last look.
    #[inline]
    pub fn settings(&mut self) -> &HashSettings {
        let generation = self.state.generation.load(Ordering::Acquire);
        if generation != self.generation {
            self.generation = generation;
            self.settings = self.state.settings();
        }
        &self.settings
    }
}

#[cfg(test)]
mod tests;
