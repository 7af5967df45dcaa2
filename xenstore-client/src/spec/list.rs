//! The `disk = [ … ]` or `vif = [ … ]` of a domain configuration: xl's list of quoted strings, with what xm's Python
//! files add to it.

use super::word::{Fault, Word};

type Result<T> = std::result::Result<T, Fault>;

/// A string of a list, its escapes resolved, and where each of its bytes stood.
#[derive(Debug, Default)]
pub struct Quoted {
    text: String,
    offsets: Vec<usize>,
}

struct Scanner<'a> {
    /// What the list is called.
    name: &'a str,
    text: &'a str,
    at: usize,
}

/// The strings in what a domain configuration has after `name =`. The assignment itself may stand in front, as may
/// comments; the list may run over several lines, break them with a backslash (as xm's files do, inside the quotes
/// even), and end in a comma. Text that begins with no bracket and no quote is taken for a list of one.
///
/// # Errors
/// A fault in the list itself. What the strings say is the caller's to read.
pub fn strings(name: &str, text: &str) -> Result<Vec<Quoted>> {
    let mut scanner = Scanner { name, text, at: 0 };
    match scanner.opening()? {
        Opening::Bare => {
            let mut bare = Quoted::default();
            for (offset, c) in scanner.rest().trim_end_matches(['\n', '\r']).char_indices() {
                bare.push(c, scanner.at + offset);
            }
            bare.offsets.push(scanner.at + bare.text.len());
            Ok(vec![bare])
        }
        Opening::List { bracketed } => scanner.items(bracketed),
    }
}

enum Opening {
    Bare,
    List { bracketed: bool },
}

impl Scanner<'_> {
    fn rest(&self) -> &str {
        &self.text[self.at..]
    }

    fn fault(&self, len: usize, message: impl Into<String>, help: impl Into<String>) -> Fault {
        Fault::new(self.at..self.at + len, message, help)
    }

    fn example(&self) -> String {
        format!("write {} = [ 'SPEC', 'SPEC' ]", self.name)
    }

    /// Skips white space, comments and backslashes at a line's end.
    fn blank(&mut self) {
        loop {
            let rest = self.rest();
            let skipped = if rest.starts_with('#') {
                rest.find('\n').unwrap_or(rest.len())
            } else if rest.starts_with(['\n', '\r', ' ', '\t']) {
                1
            } else {
                line_break(rest)
            };
            if skipped == 0 {
                return;
            }
            self.at += skipped;
        }
    }

    fn eat(&mut self, token: &str) -> bool {
        let found = self.rest().starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    /// Everything up to the first string: `disk = [`, `[`, or nothing.
    fn opening(&mut self) -> Result<Opening> {
        self.blank();
        let start = self.at;
        if self.eat(self.name) {
            self.blank();
            if self.eat("+=") || self.eat("=") {
                self.blank();
                if self.eat("[") {
                    return Ok(Opening::List { bracketed: true });
                }
                let here = self.rest().chars().next().map_or(0, char::len_utf8);
                let message = format!("{} is not given as a list", self.name);
                return Err(self.fault(here, message, self.example()));
            }
            self.at = start;
        }
        if self.eat("[") {
            Ok(Opening::List { bracketed: true })
        } else if self.rest().starts_with(['\'', '"']) {
            Ok(Opening::List { bracketed: false })
        } else {
            Ok(Opening::Bare)
        }
    }

    /// The strings up to the closing bracket, or up to the end where there was no opening one.
    fn items(&mut self, bracketed: bool) -> Result<Vec<Quoted>> {
        let mut items = Vec::new();
        loop {
            self.blank();
            if self.closed(bracketed)? {
                return Ok(items);
            }
            items.push(self.quoted()?);
            self.blank();
            if !self.eat(",") {
                return if self.closed(bracketed)? {
                    Ok(items)
                } else {
                    let here = self.rest().chars().next().map_or(0, char::len_utf8);
                    Err(self.fault(
                        here,
                        "no comma after a specification",
                        "put a comma between two, and ] after the last",
                    ))
                };
            }
        }
    }

    /// Whether the list ends here; then nothing but a comment may follow.
    fn closed(&mut self, bracketed: bool) -> Result<bool> {
        if !bracketed {
            return Ok(self.rest().is_empty());
        }
        if self.rest().is_empty() {
            return Err(self.fault(0, "the list is not closed", "put a ] after the last specification"));
        }
        if !self.eat("]") {
            return Ok(false);
        }
        self.blank();
        self.eat(";");
        self.blank();
        if self.rest().is_empty() {
            return Ok(true);
        }
        let len = self.rest().split('\n').next().unwrap_or_default().len();
        Err(self.fault(len, "something follows the list", format!("give the {} list alone", self.name)))
    }

    fn quoted(&mut self) -> Result<Quoted> {
        let opening = self.at;
        let Some(quote) = self.rest().chars().next().filter(|c| matches!(c, '\'' | '"')) else {
            let len = self.rest().find([',', ']', '\n', ' ']).unwrap_or(self.rest().len()).max(1);
            // At a stray multi-byte character `find` cannot stop inside it, and `max` only matters before an ASCII one.
            return Err(self.fault(len, "a specification in a list stands in quotes", self.example()));
        };
        self.at += 1;
        let mut quoted = Quoted::default();
        loop {
            let rest = self.rest();
            let here = self.at;
            let broken = line_break(rest);
            let Some(c) = rest.chars().next() else {
                let help = format!("close it with {quote}");
                return Err(Fault::new(opening..opening + 1, "this quote is not closed", help));
            };
            self.at += if broken > 0 { broken } else { c.len_utf8() };
            match c {
                _ if broken > 0 => {}
                '\n' => {
                    let help = format!("close the quote with {quote}, or end the line with a backslash");
                    return Err(Fault::new(here..here, "the line ends inside quotes", help));
                }
                '\\' => {
                    let escaped = self.escape(here)?;
                    quoted.push(escaped, here);
                }
                c if c == quote => {
                    quoted.offsets.push(here);
                    return Ok(quoted);
                }
                c => quoted.push(c, here),
            }
        }
    }

    /// The character after a backslash; the numeric escapes of xl's files are not worth their surprises in a path.
    fn escape(&mut self, backslash: usize) -> Result<char> {
        let next = self.rest().chars().next();
        self.at += next.map_or(0, char::len_utf8);
        match next {
            Some(c @ ('\\' | '\'' | '"')) => Ok(c),
            Some('t') => Ok('\t'),
            Some('n') => Ok('\n'),
            _ => Err(Fault::new(
                backslash..self.at,
                "unknown escape in quotes",
                "a backslash itself is written \\\\; for other characters write the character",
            )),
        }
    }
}

impl Quoted {
    /// What the string says.
    #[must_use]
    pub fn word(&self) -> Word<'_> {
        Word::mapped(&self.text, self.offsets.clone())
    }

    fn push(&mut self, c: char, offset: usize) {
        self.text.push(c);
        self.offsets.extend((0..c.len_utf8()).map(|i| offset + i));
    }
}

/// How long the backslash and the line's end are that this text begins with; 0 if it does not.
fn line_break(text: &str) -> usize {
    ["\\\n", "\\\r\n"].iter().find(|b| text.starts_with(**b)).map_or(0, |b| b.len())
}
