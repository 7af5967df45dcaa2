//! A part of a word: a parameter, its name, its value.

use super::SpecError;
use super::word::{BLANK, Fault, Word};
use std::ops::Range;

/// A part of a word, and where in the word it begins.
#[derive(Debug, Clone, Copy)]
pub struct Param<'a> {
    word: &'a Word<'a>,
    /// What it says.
    pub text: &'a str,
    at: usize,
}

impl<'a> Param<'a> {
    /// These bytes of a word.
    ///
    /// # Panics
    /// If they are not the word's.
    #[must_use]
    pub fn new(word: &'a Word<'a>, range: Range<usize>) -> Self {
        Self { word, text: &word.text[range.clone()], at: range.start }
    }

    /// These bytes of this part.
    ///
    /// # Panics
    /// If they are not this part's.
    #[must_use]
    pub fn part(self, range: Range<usize>) -> Self {
        Self { word: self.word, text: &self.text[range.clone()], at: self.at + range.start }
    }

    /// Where it stands in the input.
    #[must_use]
    pub fn span(self) -> Range<usize> {
        self.word.span(self.at..self.at + self.text.len())
    }

    /// A fault about all of it.
    pub fn fault(self, message: impl Into<String>, help: impl Into<String>) -> Fault {
        Fault::new(self.span(), message, help)
    }

    /// A fault about the character at `at`, or about its absence at the end.
    ///
    /// # Panics
    /// If no character begins there.
    pub fn unexpected(self, at: usize, help: impl Into<String>) -> Fault {
        match self.text[at..].chars().next() {
            Some(c) => self.part(at..at + c.len_utf8()).fault(format!("unexpected {c:?}"), help),
            None => self.part(at..at).fault("something is missing here", help),
        }
    }

    /// What somebody else's reader of such a value says about this one, with its fault in our place.
    ///
    /// # Errors
    /// The reader's.
    pub fn read<T>(self, reader: impl FnOnce(&str) -> Result<T, SpecError>) -> Result<T, Fault> {
        reader(self.text).map_err(|error| self.part(error.span()).fault(error.message, error.help))
    }

    /// The text, unless it is empty.
    #[must_use]
    pub fn given(self) -> Option<String> {
        (!self.text.is_empty()).then(|| self.text.to_owned())
    }

    /// Without the white space at both ends.
    #[must_use]
    pub fn trimmed(self) -> Self {
        let start = self.text.len() - self.text.trim_start_matches(BLANK).len();
        self.part(start..start.max(self.text.trim_end_matches(BLANK).len()))
    }

    /// xl takes white space after a value for a part of it, and then does not know the value.
    ///
    /// # Errors
    /// A fault at the white space.
    pub fn no_blank_after(self) -> Result<(), Fault> {
        let kept = self.text.trim_end_matches(BLANK).len();
        if kept == self.text.len() {
            return Ok(());
        }
        let help = "remove it: spaces are skipped only before a field";
        Err(self.part(kept..self.text.len()).fault("white space after a field", help))
    }

    /// Refuses control characters in the specification of `what` ("a disk").
    ///
    /// # Errors
    /// A fault at the first.
    pub fn no_control(self, what: &str) -> Result<(), Fault> {
        match self.text.char_indices().find(|(_, c)| c.is_control() && *c != '\t') {
            Some((i, c)) => {
                let message = format!("{c:?} cannot be part of {what} specification");
                Err(self.part(i..i + c.len_utf8()).fault(message, "remove the control character"))
            }
            None => Ok(()),
        }
    }
}
