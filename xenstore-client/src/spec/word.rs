//! A piece of text that remembers where in the input it came from.

use std::ops::Range;

/// A mistake and its place in the input (not in the word: words of a list may have lost escapes).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The bytes of the input that are wrong; empty where something is missing.
    pub span: Range<usize>,
    /// What is wrong, in one clause.
    pub message: String,
    /// What to write or do instead.
    pub help: String,
}

impl Fault {
    /// A fault at `span`.
    pub fn new(span: Range<usize>, message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { span, message: message.into(), help: help.into() }
    }
}

#[derive(Debug)]
enum Place {
    /// The text stands in the input as it is, from this offset on.
    From(usize),
    /// For each byte of the text, and for its end, the offset in the input.
    Table(Vec<usize>),
}

/// One specification, or one of the words it was given in.
#[derive(Debug)]
pub struct Word<'a> {
    /// What it says, without the quotes and escapes it may have had.
    pub text: &'a str,
    place: Place,
}

impl<'a> Word<'a> {
    /// Text that stands in the input from `offset` on.
    #[must_use]
    pub fn at(text: &'a str, offset: usize) -> Self {
        Self { text, place: Place::From(offset) }
    }

    /// Text whose bytes stand in the input at `offsets`, which has one entry more, for the end.
    #[must_use]
    pub fn mapped(text: &'a str, offsets: Vec<usize>) -> Self {
        debug_assert_eq!(offsets.len(), text.len() + 1);
        Self { text, place: Place::Table(offsets) }
    }

    /// Where these bytes of the text stand in the input.
    ///
    /// # Panics
    /// If `local` reaches beyond the text.
    #[must_use]
    pub fn span(&self, local: Range<usize>) -> Range<usize> {
        match &self.place {
            Place::From(offset) => offset + local.start..offset + local.end,
            Place::Table(offsets) => offsets[local.start]..offsets[local.end],
        }
    }

    /// Where the text ends in the input.
    #[must_use]
    pub fn end(&self) -> usize {
        self.span(self.text.len()..self.text.len()).end
    }

    /// The next parameter from `from` on: its bytes, without the white space before it. `None` at the end.
    #[must_use]
    pub fn skip_blank(&self, from: usize) -> Option<usize> {
        let rest = self.text[from..].trim_start_matches(BLANK);
        (!rest.is_empty()).then_some(self.text.len() - rest.len())
    }
}

/// What `xl` skips before a parameter (and nowhere else).
pub const BLANK: [char; 3] = [' ', '\t', '\n'];
