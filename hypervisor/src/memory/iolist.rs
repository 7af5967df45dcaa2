//! The memory of one I/O operation: which bytes, in which order, and a hold on their mappings.

use std::rc::Rc;

use super::Mapping;

/// Pieces of mapped memory that the kernel is to read from or fill, in order.
///
/// While the list lives its mappings stay: that is what lets an io_uring submission own the memory the kernel may
/// touch. Reuse one list for many operations; it keeps its capacity and then never allocates.
#[derive(Debug, Default)]
pub struct IoList {
    pieces: Vec<libc::iovec>,
    /// The mappings behind `pieces`; one entry for a run of pieces from the same mapping.
    held: Vec<Rc<Mapping>>,
    /// Pieces before this one are done.
    first: usize,
    len: usize,
}

impl IoList {
    /// An empty list with room for `pieces`.
    pub fn with_capacity(pieces: usize) -> Self {
        Self { pieces: Vec::with_capacity(pieces), held: Vec::with_capacity(pieces), first: 0, len: 0 }
    }

    /// Adds `len` bytes at `offset` of `mapping`. Bytes that follow the last piece in memory lengthen that piece.
    ///
    /// # Panics
    /// When they are not inside the mapping.
    #[inline]
    #[track_caller]
    pub fn push(&mut self, mapping: &Rc<Mapping>, offset: usize, len: usize) {
        let address = mapping.address(offset, len).as_ptr();
        self.len += len;
        if !self.held.last().is_some_and(|held| Rc::ptr_eq(held, mapping)) {
            self.held.push(Rc::clone(mapping));
        }
        if let Some(last) = self.pieces.last_mut()
            && last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == address
        {
            last.iov_len += len;
            return;
        }
        self.pieces.push(libc::iovec { iov_base: address.cast(), iov_len: len });
    }

    /// Bytes that are still to be done.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is left to be done.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets everything but the capacity, and lets the mappings go.
    #[inline]
    pub fn clear(&mut self) {
        self.pieces.clear();
        self.held.clear();
        self.first = 0;
        self.len = 0;
    }

    /// Marks the first `done` bytes as done: what a short read or write leaves is then tried again.
    ///
    /// # Panics
    /// When more are done than the list has.
    pub fn advance(&mut self, mut done: usize) {
        assert!(done <= self.len, "{done} bytes done of {}", self.len);
        self.len -= done;
        while done > 0 {
            let piece = &mut self.pieces[self.first];
            let step = done.min(piece.iov_len);
            piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(step).cast();
            piece.iov_len -= step;
            done -= step;
            if piece.iov_len == 0 {
                self.first += 1;
            }
        }
    }

    /// Fills what is left to be done with zeros, in a mapping that is writable: the tail of a read past a file's end.
    ///
    /// # Panics
    /// When one of the mappings is read-only.
    pub fn zero_rest(&mut self) {
        assert!(self.is_writable(), "write to a read-only mapping");
        for piece in &self.pieces[self.first..] {
            // SAFETY: each piece lies inside a mapping that `held` keeps mapped: `push` checked it, and `advance`
            // only ever shrinks it. It is writable, as just checked.
            unsafe { piece.iov_base.cast::<u8>().write_bytes(0, piece.iov_len) };
        }
        self.advance(self.len);
    }

    /// Whether each piece that is left is a multiple of `unit` bytes, as direct I/O wants it.
    #[inline]
    pub fn is_multiple_of(&self, unit: usize) -> bool {
        self.pieces[self.first..].iter().all(|piece| piece.iov_len.is_multiple_of(unit))
    }

    /// Copies what is left to be done to `offset` of `target`.
    ///
    /// # Panics
    /// When it does not fit there, or the target is read-only.
    pub fn copy_to(&self, target: &Mapping, mut offset: usize) {
        for piece in &self.pieces[self.first..] {
            assert!(target.is_writable(), "write to a read-only mapping");
            let to = target.address(offset, piece.iov_len).as_ptr();
            // SAFETY: the piece lies inside a mapping that `held` keeps mapped (see `zero_rest`), the target's bytes
            // inside the target, as `address` just checked. The two may be the same memory: copy allows for that.
            unsafe { std::ptr::copy(piece.iov_base.cast::<u8>().cast_const(), to, piece.iov_len) };
            offset += piece.iov_len;
        }
    }

    /// Fills what is left to be done from `offset` of `source`, and marks it as done.
    ///
    /// # Panics
    /// When the source has not so much, or one of the mappings is read-only.
    pub fn fill_from(&mut self, source: &Mapping, mut offset: usize) {
        assert!(self.is_writable(), "write to a read-only mapping");
        for piece in &self.pieces[self.first..] {
            let from = source.address(offset, piece.iov_len).as_ptr();
            // SAFETY: as in `copy_to`, the other way round; the pieces are writable, as just checked.
            unsafe { std::ptr::copy(from.cast_const(), piece.iov_base.cast::<u8>(), piece.iov_len) };
            offset += piece.iov_len;
        }
        self.advance(self.len);
    }

    /// Copies what is left to be done out of the memory.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        let mut at = 0;
        for piece in &self.pieces[self.first..] {
            let to = &mut bytes[at..at + piece.iov_len];
            // SAFETY: as in `copy_to`; the target is private memory of the right length.
            unsafe { std::ptr::copy(piece.iov_base.cast::<u8>().cast_const(), to.as_mut_ptr(), piece.iov_len) };
            at += piece.iov_len;
        }
        bytes
    }

    /// Fills what is left to be done from `bytes`, and marks it as done.
    ///
    /// # Panics
    /// When there are too few or too many, or one of the mappings is read-only.
    pub fn fill(&mut self, bytes: &[u8]) {
        assert!(self.is_writable(), "write to a read-only mapping");
        assert_eq!(bytes.len(), self.len);
        let mut at = 0;
        for piece in &self.pieces[self.first..] {
            let from = &bytes[at..at + piece.iov_len];
            // SAFETY: as in `copy_to`, the other way round; the pieces are writable, as just checked.
            unsafe { std::ptr::copy(from.as_ptr(), piece.iov_base.cast::<u8>(), piece.iov_len) };
            at += piece.iov_len;
        }
        self.advance(self.len);
    }

    /// Whether every piece may be written to. What the kernel is to fill must be.
    #[inline]
    pub fn is_writable(&self) -> bool {
        self.held.iter().all(|mapping| mapping.is_writable())
    }

    /// The pieces still to be done, as the kernel wants them. The addresses are good while the list lives and is not
    /// changed; ring's io_uring room is the only user.
    #[inline]
    pub fn for_kernel(&self) -> &[libc::iovec] {
        &self.pieces[self.first..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_merge_and_short_transfers_continue() {
        let mapping = Rc::new(Mapping::anonymous(8192).unwrap());
        let mut list = IoList::default();
        list.push(&mapping, 0, 512);
        list.push(&mapping, 512, 512);
        list.push(&mapping, 4096, 100);
        assert_eq!(list.for_kernel().len(), 2);
        assert_eq!(list.len(), 1124);
        list.advance(1000);
        assert_eq!(list.for_kernel()[0].iov_len, 24);
        list.advance(24);
        assert_eq!(list.for_kernel().len(), 1);
        mapping.copy_in(4096, &[1; 100]);
        list.zero_rest();
        let mut tail = [1; 100];
        mapping.copy_out(4096, &mut tail);
        assert_eq!((list.len(), tail), (0, [0; 100]));
    }

    #[test]
    fn bytes_go_through_another_mapping_and_back() {
        let (ours, other) = (Rc::new(Mapping::anonymous(4096).unwrap()), Mapping::anonymous(4096).unwrap());
        let list = |pieces: [(usize, usize); 2]| {
            let mut list = IoList::default();
            pieces.iter().for_each(|&(offset, len)| list.push(&ours, offset, len));
            list
        };
        ours.copy_in(100, b"abc");
        ours.copy_in(200, b"defg");
        let from = list([(100, 3), (200, 4)]);
        assert!(from.is_multiple_of(1) && !from.is_multiple_of(2));
        from.copy_to(&other, 10);
        assert_eq!(from.to_vec(), b"abcdefg");
        list([(300, 2), (400, 5)]).fill(b"ABCDEFG");
        assert_eq!(list([(300, 2), (400, 5)]).to_vec(), b"ABCDEFG");
        let mut to = list([(300, 2), (400, 5)]);
        to.fill_from(&other, 10);
        assert!(to.is_empty());
        let (mut first, mut second) = ([0; 2], [0; 5]);
        ours.copy_out(300, &mut first);
        ours.copy_out(400, &mut second);
        assert_eq!((&first, &second), (b"ab", b"cdefg"));
    }

    #[test]
    fn the_list_keeps_its_mappings() {
        let mapping = Rc::new(Mapping::anonymous(4096).unwrap());
        let mut list = IoList::with_capacity(4);
        list.push(&mapping, 0, 10);
        list.push(&mapping, 100, 10);
        assert_eq!(Rc::strong_count(&mapping), 2);
        list.clear();
        assert_eq!(Rc::strong_count(&mapping), 1);
    }
}
