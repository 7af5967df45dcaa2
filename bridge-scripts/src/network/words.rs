//! The words after a network program's name: an action, `key=value` in any order as in xend's days, and a few options.

use std::collections::BTreeMap;
use std::fmt;

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Make it so.
    Start,
    /// Put everything back.
    Stop,
    /// Say how things are.
    Status,
    /// Keep what was applied with a time limit.
    Confirm,
}

/// What was typed, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Words {
    line: Line,
    /// What is to be done.
    pub action: Action,
    /// `--plan`: only say what would be done.
    pub plan: bool,
    /// `--confirm SECONDS`: take it back after that time unless confirmed.
    pub confirm: Option<u32>,
    /// The values, each with the place of its word.
    values: BTreeMap<String, (usize, String)>,
}

/// The line as typed, to point at a word of it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Line {
    program: String,
    words: Vec<String>,
}

/// A word that means nothing, with the place to point at.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Unclear {
    line: String,
    at: usize,
    length: usize,
    message: String,
}

impl fmt::Display for Unclear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (at, carets) = (self.at, "^".repeat(self.length.max(1)));
        write!(f, "{}\n  {}\n  {:at$}{carets}", self.message, self.line, "")
    }
}

impl Line {
    /// Points at a part of a word, or behind the last one.
    fn unclear(&self, word: usize, from: usize, length: usize, message: String) -> Unclear {
        let shown = |word: &String| word.chars().map(|char| if char.is_control() { '?' } else { char }).collect();
        let shown: Vec<String> = self.words.iter().map(shown).collect();
        let before: usize = shown.iter().take(word).map(|word| word.chars().count() + 1).sum();
        let line = format!("{} {}", self.program, shown.join(" "));
        Unclear { line, at: self.program.chars().count() + 1 + before + from, length, message }
    }
}

impl Words {
    /// Takes the words apart. `known` are the keys of this program, `actions` what it can do.
    ///
    /// A key that comes twice has its last value: a wrapper's own `"$@"` comes first and is overridden.
    ///
    /// # Errors
    ///
    /// An unknown word, or an action that is missing.
    pub fn parse(program: &str, words: &[String], actions: &[Action], known: &[&str]) -> Result<Self, Unclear> {
        let line = Line { program: program.to_owned(), words: words.to_vec() };
        let (mut action, mut plan, mut confirm, mut values) = (None, false, None, BTreeMap::new());
        let mut index = 0;
        while let Some(word) = words.get(index) {
            let length = word.chars().count();
            if word == "--plan" {
                plan = true;
            } else if word == "--confirm" || word.starts_with("--confirm=") {
                let (at, from, text) = match word.split_once('=') {
                    Some((option, text)) => (index, option.len() + 1, text),
                    None => (index + 1, 0, words.get(index + 1).map_or("", String::as_str)),
                };
                index = at;
                let seconds = text.parse().ok().filter(|seconds| (1..=86400).contains(seconds));
                let message = || "--confirm wants a number of seconds, 1 to 86400".to_owned();
                let unclear = || line.unclear(at, from, text.chars().count(), message());
                confirm = Some(seconds.ok_or_else(unclear)?);
            } else if let Some((key, value)) = word.split_once('=') {
                if !known.contains(&key) {
                    let message = format!("{} knows no {key:?}; it knows: {}", program, known.join(", "));
                    return Err(line.unclear(index, 0, key.chars().count(), message));
                }
                values.insert(key.to_owned(), (index, value.to_owned()));
            } else if let Some(found) = actions.iter().find(|action| action.name() == word) {
                if action.is_some_and(|action| action != *found) {
                    return Err(line.unclear(index, 0, length, "one action at a time".to_owned()));
                }
                action = Some(*found);
            } else {
                let message = format!("{word:?} means nothing to {program}: {} are meant", usage(actions, known));
                return Err(line.unclear(index, 0, length, message));
            }
            index += 1;
        }
        let missing = || line.unclear(words.len(), 0, 1, format!("what is to be done? {}", usage(actions, known)));
        let action = action.ok_or_else(missing)?;
        if confirm.is_some() && action != Action::Start && action != Action::Stop {
            let at = words.iter().position(|word| word.starts_with("--confirm")).unwrap_or(0);
            let message = "--confirm belongs to start and stop".to_owned();
            return Err(line.unclear(at, 0, "--confirm".len(), message));
        }
        Ok(Self { line, action, plan, confirm, values })
    }

    /// A value; an empty one counts as not said, as in xend's scripts.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.values.get(key).map(|(_, value)| value.as_str()).filter(|value| !value.is_empty())
    }

    /// A value that must be a name for a network device.
    ///
    /// # Errors
    ///
    /// When the kernel would not have it as a name.
    pub fn name(&self, key: &str) -> Result<Option<String>, Unclear> {
        let Some(name) = self.get(key) else { return Ok(None) };
        match bad_name(name) {
            Some(message) => Err(self.unclear(key, message)),
            None => Ok(Some(name.to_owned())),
        }
    }

    /// A value that is yes or no; xend's scripts take nothing else.
    ///
    /// # Errors
    ///
    /// When it is neither.
    pub fn yes_or_no(&self, key: &str) -> Result<Option<bool>, Unclear> {
        match self.get(key) {
            None => Ok(None),
            Some("yes" | "on" | "true" | "1") => Ok(Some(true)),
            Some("no" | "off" | "false" | "0") => Ok(Some(false)),
            Some(other) => Err(self.unclear(key, format!("{key} is yes or no, not {other:?}"))),
        }
    }

    /// A value that is a number.
    ///
    /// # Errors
    ///
    /// When it is none in the range.
    pub fn number(&self, key: &str, range: std::ops::RangeInclusive<u32>) -> Result<Option<u32>, Unclear> {
        let Some(text) = self.get(key) else { return Ok(None) };
        let number = text.parse().ok().filter(|number| range.contains(number));
        let message = || format!("{key} is a number from {} to {}, not {text:?}", range.start(), range.end());
        number.map(Some).ok_or_else(|| self.unclear(key, message()))
    }

    /// An error that points at a key's value, or behind the line if the key was not said.
    pub fn unclear(&self, key: &str, message: impl Into<String>) -> Unclear {
        match self.values.get(key) {
            Some((word, value)) => self.line.unclear(*word, key.len() + 1, value.chars().count(), message.into()),
            None => self.line.unclear(self.line.words.len(), 0, 1, message.into()),
        }
    }
}

impl Action {
    /// Everything a network program can be told.
    pub const ALL: [Self; 4] = [Self::Start, Self::Stop, Self::Status, Self::Confirm];

    /// The word for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Status => "status",
            Self::Confirm => "confirm",
        }
    }
}

fn usage(actions: &[Action], known: &[&str]) -> String {
    let actions: Vec<&str> = actions.iter().map(|action| action.name()).collect();
    let known: Vec<String> = known.iter().map(|key| format!("[{key}=...]")).collect();
    format!("{} {} [--plan] [--confirm SECONDS]", actions.join("|"), known.join(" "))
}

/// Why the kernel would not have this as a device's name (dev_valid_name of net/core/dev.c), if it would not. A colon would
/// be taken for an alias.
pub fn bad_name(name: &str) -> Option<String> {
    if name.len() > 15 {
        return Some(format!(
            "{name:?} is too long for a network device: 15 characters at most, these are {}",
            name.len()
        ));
    }
    let bad = |byte: u8| byte.is_ascii_whitespace() || matches!(byte, b'/' | b':' | b'%') || !byte.is_ascii_graphic();
    if name.is_empty() || name == "." || name == ".." || name.bytes().any(bad) {
        return Some(format!("{name:?} is no name for a network device"));
    }
    None
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::*;

    fn parse(line: &str) -> Result<Words, Unclear> {
        let words: Vec<String> = line.split(' ').filter(|word| !word.is_empty()).map(str::to_owned).collect();
        Words::parse("network-bridge", &words, &Action::ALL, &["netdev", "bridge", "vifnum", "antispoof"])
    }

    #[test]
    fn words_come_in_any_order_and_the_last_value_counts() {
        for line in [
            "start netdev=eth1 bridge=xenbr1",
            "netdev=eth0 start netdev=eth1 bridge=xenbr1",
            "bridge=xenbr1 netdev=eth1 start start",
        ] {
            let words = parse(line).unwrap();
            assert_eq!(words.action, Action::Start, "{line}");
            assert_eq!((words.get("netdev"), words.get("bridge")), (Some("eth1"), Some("xenbr1")), "{line}");
        }
        let words = parse("start --plan --confirm 30 vifnum=").unwrap();
        assert_eq!((words.plan, words.confirm, words.get("vifnum")), (true, Some(30), None));
        assert_eq!(parse("stop --confirm=5").unwrap().confirm, Some(5));
    }

    #[test]
    fn errors_point_at_the_word() {
        let pointed = |line: &str| {
            let error = parse(line).unwrap_err();
            let under: String = error.line.chars().skip(error.at).take(error.length).collect();
            (under, error.message)
        };
        for (line, under, said) in [
            ("start brige=xenbr0", "brige", "knows no \"brige\""),
            ("start netdev=eth0 now", "now", "means nothing"),
            ("netdev=eth0", "", "what is to be done?"),
            ("start stop", "stop", "one action"),
            ("start --confirm soon", "soon", "number of seconds"),
            ("start --confirm", "", "number of seconds"),
            ("start --confirm=0", "0", "1 to 86400"),
            ("status --confirm 5", "--confirm", "belongs to start"),
        ] {
            let (found, message) = pointed(line);
            assert_eq!(found, under, "{line}");
            assert!(message.contains(said), "{line}: {message}");
        }
        let words = parse("start bridge=a-name-that-is-too-long netdev=et/h0 antispoof=maybe vifnum=-1").unwrap();
        assert!(words.name("bridge").unwrap_err().message.contains("15 characters"));
        assert!(words.name("netdev").unwrap_err().message.contains("no name"));
        assert!(words.yes_or_no("antispoof").unwrap_err().message.contains("yes or no"));
        assert!(words.number("vifnum", 0..=99).unwrap_err().message.contains("from 0 to 99"));
        let shown = words.name("bridge").unwrap_err().to_string();
        let lines: Vec<&str> = shown.lines().collect();
        assert_eq!(lines[1].find("a-name"), lines[2].find('^'), "{shown}");
    }
}
