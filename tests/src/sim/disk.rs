//! A disk with a volatile cache that keeps no order: what is on its medium, what is only in its cache, and what may be
//! left of both when the power goes. Pure: no time, no I/O, no chance.

use super::stamp::{Bytes, Content, SECTOR, Stamp};

/// Sectors of the disk: few, so that operations meet.
pub const SECTORS: u64 = 64;

/// Content that a sector had at some time: an index into the disk's store of contents.
pub type Version = u32;

/// The version of a sector given up.
pub const ZEROS: Version = SECTORS as Version;

/// In the cache only.
#[derive(Debug, Clone, Copy)]
struct Cached {
    version: Version,
    /// When it was put there.
    at: u32,
    /// A flush that should have written it failed: no later one will (fsync(2) reports a lost write once).
    lost: bool,
}

#[derive(Debug, Clone)]
struct Place {
    medium: Version,
    /// Oldest first.
    cache: Vec<Cached>,
}

/// The disk.
#[derive(Debug)]
pub struct Disk {
    bytes: Vec<Bytes>,
    contents: Vec<Content>,
    places: Vec<Place>,
    /// Sectors that do not hold what they first held, one bit each.
    touched: u64,
    /// Counts what was put into the cache.
    clock: u32,
}

impl Default for Disk {
    fn default() -> Self {
        let mut bytes = vec![[0; SECTOR]; SECTORS as usize + 1];
        for (lba, sector) in bytes[..SECTORS as usize].iter_mut().enumerate() {
            Stamp { lba: lba as u64, writer: 0, generation: 0 }.fill(sector);
        }
        let contents = bytes.iter().map(Content::of).collect();
        let places = (0..SECTORS as Version).map(|medium| Place { medium, cache: Vec::new() }).collect();
        Self { bytes, contents, places, touched: 0, clock: 0 }
    }
}

impl Disk {
    /// Every sector holds what it first held.
    pub fn reset(&mut self) {
        for sector in self.touched_sectors() {
            let place = &mut self.places[sector as usize];
            place.medium = sector as Version;
            place.cache.clear();
        }
        self.touched = 0;
        self.clock = 0;
        self.bytes.truncate(SECTORS as usize + 1);
        self.contents.truncate(SECTORS as usize + 1);
    }

    /// Remembers content.
    pub fn remember(&mut self, bytes: &Bytes) -> Version {
        self.bytes.push(*bytes);
        self.contents.push(Content::of(bytes));
        (self.bytes.len() - 1) as Version
    }

    /// A version's bytes.
    pub fn bytes(&self, version: Version) -> &Bytes {
        &self.bytes[version as usize]
    }

    /// What a version's bytes say.
    pub fn content(&self, version: Version) -> Content {
        self.contents[version as usize]
    }

    /// Sectors that were ever written or given up.
    pub fn touched_sectors(&self) -> impl Iterator<Item = u64> + use<> {
        let touched = self.touched;
        (0..SECTORS).filter(move |sector| touched & (1 << sector) != 0)
    }

    /// One sector is written, or given up: into the cache.
    pub fn put(&mut self, sector: u64, version: Version) {
        self.clock += 1;
        self.touched |= 1 << sector;
        self.places[sector as usize].cache.push(Cached { version, at: self.clock, lost: false });
    }

    /// One sector is erased for good: on the medium, and whatever of it is in the cache.
    pub fn erase(&mut self, sector: u64) {
        self.clock += 1;
        self.touched |= 1 << sector;
        let place = &mut self.places[sector as usize];
        place.medium = ZEROS;
        place.cache.clear();
    }

    /// What a reader sees.
    pub fn seen(&self, sector: u64) -> Version {
        let place = &self.places[sector as usize];
        place.cache.last().map_or(place.medium, |cached| cached.version)
    }

    /// A mark that a flush takes when it begins: it covers what is in the cache by then.
    pub fn mark(&self) -> u32 {
        self.clock
    }

    /// A flush that began at `mark` is done.
    pub fn flushed(&mut self, mark: u32) {
        for sector in self.touched_sectors() {
            let place = &mut self.places[sector as usize];
            if let Some(last) = place.cache.iter().rposition(|cached| cached.at <= mark && !cached.lost) {
                place.medium = place.cache[last].version;
                place.cache.drain(..=last);
            }
        }
    }

    /// A flush that began at `mark` failed. What it should have written of the sectors that `loses` names is never
    /// written, although readers go on seeing it.
    pub fn flush_failed(&mut self, mark: u32, mut loses: impl FnMut(u64) -> bool) {
        for sector in self.touched_sectors() {
            if loses(sector) {
                self.places[sector as usize]
                    .cache
                    .iter_mut()
                    .filter(|cached| cached.at <= mark)
                    .for_each(|c| c.lost = true);
            }
        }
    }

    /// Everything that may stand in a sector when the power goes: what is on the medium, and each version that the
    /// cache may or may not have written back, in any order.
    pub fn survivors(&self, sector: u64) -> impl Iterator<Item = Version> + '_ {
        let place = &self.places[sector as usize];
        std::iter::once(place.medium).chain(place.cache.iter().map(|cached| cached.version))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(disk: &mut Disk, generation: u64) -> Version {
        let mut bytes = [0; SECTOR];
        Stamp { lba: 5, writer: 1, generation }.fill(&mut bytes);
        disk.remember(&bytes)
    }

    fn survivors(disk: &Disk) -> Vec<Version> {
        disk.survivors(5).collect()
    }

    #[test]
    fn a_flush_covers_what_came_before_it_began() {
        let mut disk = Disk::default();
        let [one, two, three] = [1, 2, 3].map(|generation| version(&mut disk, generation));
        disk.put(5, one);
        disk.put(5, two);
        assert_eq!(survivors(&disk), [5, one, two]);
        let mark = disk.mark();
        disk.put(5, three);
        disk.flushed(mark);
        assert_eq!((survivors(&disk), disk.seen(5)), (vec![two, three], three));
        disk.reset();
        assert_eq!((survivors(&disk), disk.seen(5)), (vec![5], 5));
    }

    #[test]
    fn what_a_failed_flush_lost_stays_lost() {
        let mut disk = Disk::default();
        let [one, two] = [1, 2].map(|generation| version(&mut disk, generation));
        disk.put(5, one);
        disk.flush_failed(disk.mark(), |_| true);
        disk.flushed(disk.mark());
        assert_eq!((survivors(&disk), disk.seen(5)), (vec![5, one], one));
        disk.put(5, two);
        disk.flushed(disk.mark());
        assert_eq!(survivors(&disk), [two]);
    }
}
