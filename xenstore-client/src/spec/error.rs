//! A mistake in what somebody typed, shown where it stands.

use super::word::Fault;
use std::fmt;
use std::ops::Range;

/// Why a specification was not understood.
///
/// `Display` prints the message, the line it is about with carets under the place, and what to do:
/// ```text
/// unknown access `q`
///   phy:/dev/vg/x,xvda,q
///                      ^
/// help: write r, w or, for a disk that several guests share knowingly, w!
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct SpecError {
    /// Everything that was typed, as it was typed; several lines for a list broken over lines.
    pub input: String,
    /// Where the trouble begins, in bytes from the start of the input; always on a character boundary.
    pub offset: usize,
    /// How many bytes it covers; 0 where something is missing.
    pub len: usize,
    /// What is wrong, in one clause.
    pub message: String,
    /// What to write or do instead.
    pub help: String,
}

impl SpecError {
    /// The fault, in the input its place counts from.
    #[must_use]
    pub fn new(input: &str, fault: Fault) -> Self {
        let Fault { span, message, help } = fault;
        Self { input: input.to_owned(), offset: span.start, len: span.len(), message, help }
    }

    /// The bytes of the input that are wrong; empty where something is missing.
    #[must_use]
    pub fn span(&self) -> Range<usize> {
        self.offset..self.offset + self.len
    }
}

impl fmt::Display for SpecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let before = self.input.get(..self.offset).unwrap_or(&self.input);
        let line_at = before.rfind('\n').map_or(0, |i| i + 1);
        let line = self.input[line_at..].split('\n').next().unwrap_or_default();
        // A control character from somebody's file must not reach the reader's terminal; one column stays one column.
        let shown: String = line.chars().map(|c| if c.is_control() && c != '\t' { '\u{fffd}' } else { c }).collect();
        let indent: String = before[line_at..].chars().map(|c| if c == '\t' { '\t' } else { ' ' }).collect();
        let marked = self.input.get(self.span()).unwrap_or_default().split('\n').next().unwrap_or_default();
        let carets = "^".repeat(marked.chars().count().max(1));
        write!(f, "{}\n  {shown}\n  {indent}{carets}\nhelp: {}", self.message, self.help)
    }
}
