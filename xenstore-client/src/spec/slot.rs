//! A value that may be given once.

use super::Fault;
use std::ops::Range;

/// A value that may be given once, and where it was. An empty one takes a positional field but may still be given by
/// name: the manual of disks allows that for the target, and xl for most others.
#[derive(Debug)]
pub struct Slot<T> {
    /// Whether it was given, be it empty.
    pub taken: bool,
    /// What was given.
    pub value: Option<T>,
    /// Where.
    pub span: Range<usize>,
}

impl<T> Default for Slot<T> {
    fn default() -> Self {
        Self { taken: false, value: None, span: 0..0 }
    }
}

impl<T> Slot<T> {
    /// Takes a value; `what` is its name for a message, such as "the access".
    ///
    /// # Errors
    /// When there is one already.
    pub fn fill(&mut self, what: &str, value: Option<T>, span: Range<usize>) -> Result<(), Fault> {
        if self.value.is_some() {
            return Err(Fault::new(span, format!("{what} is given twice"), "leave one of the two out"));
        }
        *self = Self { taken: true, value, span };
        Ok(())
    }
}
