//! A piece of text that remembers where in the input it came from.

use std::ops::Range;

/// A mistake and its place in the input (not in the word: words of a list may have lost escapes).
#[derive(Debug)]
pub(super) struct Fault {
    pub(super) span: Range<usize>,
    pub(super) message: String,
    pub(super) help: String,
}

impl Fault {
    pub(super) fn new(span: Range<usize>, message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { span, message: message.into(), help: help.into() }
    }
}

enum Place {
    /// The text stands in the input as it is, from this offset on.
    From(usize),
    /// For each byte of the text, and for its end, the offset in the input.
    Table(Vec<usize>),
}

/// One specification, or one of the words it was given in.
pub(super) struct Word<'a> {
    pub(super) text: &'a str,
    place: Place,
}

impl<'a> Word<'a> {
    pub(super) fn at(text: &'a str, offset: usize) -> Self {
        Self { text, place: Place::From(offset) }
    }

    /// `offsets` has one entry more than `text` has bytes.
    pub(super) fn mapped(text: &'a str, offsets: Vec<usize>) -> Self {
        debug_assert_eq!(offsets.len(), text.len() + 1);
        Self { text, place: Place::Table(offsets) }
    }

    /// Where these bytes of the text stand in the input.
    pub(super) fn span(&self, local: Range<usize>) -> Range<usize> {
        match &self.place {
            Place::From(offset) => offset + local.start..offset + local.end,
            Place::Table(offsets) => offsets[local.start]..offsets[local.end],
        }
    }

    pub(super) fn end(&self) -> usize {
        self.span(self.text.len()..self.text.len()).end
    }

    /// The next parameter from `from` on: its bytes, without the white space before it. `None` at the end.
    pub(super) fn skip_blank(&self, from: usize) -> Option<usize> {
        let rest = self.text[from..].trim_start_matches(BLANK);
        (!rest.is_empty()).then_some(self.text.len() - rest.len())
    }
}

/// What `xl` skips before a parameter (and nowhere else).
pub(super) const BLANK: [char; 3] = [' ', '\t', '\n'];
