//! What an xend-config.sxp says about the network, in today's commands (`bridge-scripts from-xend FILE`).
//!
//! Files are only read: nothing is run, and what a wrapper script decides while it runs cannot be known.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::network::Program;

/// A file cannot be read, or is no s-expression.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
    /// Its parentheses or quotes do not match.
    #[error("{}, line {line}: {message}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        message: &'static str,
    },
}

/// An entry at the top of the file: `(network-script network-bridge)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The line it begins in, from 1.
    pub line: usize,
    /// Its words, the quotes taken off. What is in parentheses inside it is left out.
    pub words: Vec<String>,
}

/// Reads the entries of an s-expression file, as xend's `sxp.py` does: `#` begins a comment, words may be in single or
/// double quotes with backslashes.
///
/// # Errors
///
/// The line, and what is wrong with it.
pub fn entries(text: &str) -> Result<Vec<Entry>, (usize, &'static str)> {
    let (mut entries, mut open): (Vec<Entry>, Vec<usize>) = (Vec::new(), Vec::new());
    let mut line = 1;
    let mut chars = text.chars().peekable();
    while let Some(char) = chars.next() {
        let mut word = None;
        match char {
            '\n' => line += 1,
            '#' => while chars.next_if(|next| *next != '\n').is_some() {},
            '(' => {
                if open.is_empty() {
                    entries.push(Entry { line, words: Vec::new() });
                }
                open.push(line);
            }
            ')' if open.pop().is_none() => return Err((line, "there is a ) too many")),
            '"' | '\'' => {
                let (begin, mut text) = (line, String::new());
                loop {
                    match chars.next() {
                        None => return Err((begin, "the quote that begins here has no end")),
                        Some(end) if end == char => break,
                        Some('\\') => text.extend(chars.next()),
                        Some(other) => {
                            line += usize::from(other == '\n');
                            text.push(other);
                        }
                    }
                }
                word = Some(text);
            }
            _ if char.is_whitespace() || char == ')' => (),
            _ => {
                let mut text = String::from(char);
                let inside = |next: &char| !next.is_whitespace() && !matches!(next, '(' | ')' | '"' | '\'');
                while let Some(next) = chars.next_if(inside) {
                    text.push(next);
                }
                word = Some(text);
            }
        }
        if let (Some(word), [_], Some(entry)) = (word, open.as_slice(), entries.last_mut()) {
            entry.words.push(word);
        }
    }
    match open.first() {
        Some(line) => Err((*line, "the ( that begins here has no )")),
        None => Ok(entries),
    }
}

/// Says what a configuration means now, a command a line, with comments for a shell.
///
/// # Errors
///
/// When the file cannot be read. A wrapper script that cannot be read is said in the text.
pub fn explain(path: &Path) -> Result<String, Error> {
    let text = fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    let entries = entries(&text).map_err(|(line, message)| Error::Syntax { path: path.to_owned(), line, message })?;
    let scripts = path.parent().unwrap_or(Path::new("/etc/xen")).join("scripts");
    Ok(explain_entries(&entries, &|name| read_wrapper(&scripts, name)))
}

/// A wrapper's path and text, or why it cannot be read.
type Wrapper = Result<(PathBuf, String), String>;

fn read_wrapper(scripts: &Path, name: &str) -> Wrapper {
    // An absolute name replaces the directory.
    let path = scripts.join(name);
    match fs::read_to_string(&path) {
        Ok(text) => Ok((path, text)),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

fn explain_entries(entries: &[Entry], wrapper: &dyn Fn(&str) -> Wrapper) -> String {
    let value = |entry: &Entry| entry.words[1..].join(" ");
    let named = |name: &'static str| move |entry: &&Entry| entry.words.first().is_some_and(|word| word == name);
    let antispoof = entries.iter().rfind(named("vif-antispoof")).map(value);
    let mut text = String::new();
    let mut found = false;
    for entry in entries {
        let (Some(key), false) = (entry.words.first(), entry.words.len() < 2) else { continue };
        let said = value(entry);
        let here = format!("\n# line {}: ({key} {said})\n", entry.line);
        match key.as_str() {
            "network-script" => text += &(here + &network_script(&said, antispoof.as_deref(), wrapper)),
            "vif-script" => text += &(here + &vif_script(&said)),
            "vif-antispoof" => text += &(here + antispoof_means(&said)),
            _ => continue,
        }
        found = true;
    }
    if !found {
        text +=
            "# There is no network-script, vif-script or vif-antispoof in it: xend then did nothing to the network.\n";
    }
    text.trim_start_matches('\n').to_owned()
}

fn antispoof_means(value: &str) -> &'static str {
    match value {
        "yes" => "# Guests' interfaces are filtered by default now; antispoof=yes above says so.\n",
        "no" => {
            "# Guests' interfaces are filtered by default now. antispoof=no above keeps xend's way, which is not recommended:\n\
             # leave it out unless guests really need addresses of others.\n"
        }
        _ => "# xend knew yes and no here.\n",
    }
}

fn network_script(said: &str, antispoof: Option<&str>, wrapper: &dyn Fn(&str) -> Wrapper) -> String {
    let words = shell_words(said);
    let Some((name, rest)) = words.split_first() else { return String::new() };
    let antispoof = antispoof.filter(|value| matches!(*value, "yes" | "no"));
    let mut text = String::new();
    if let Some(program) = program(name) {
        text += &command(program, &[], rest, antispoof);
        return text + &remark(program);
    }
    match wrapper(name) {
        Err(error) => format!("# a script of this machine's, which cannot be read: {error}\n"),
        Ok((path, script)) => {
            let calls = calls(&script);
            if calls.is_empty() {
                return format!(
                    "# {} calls none of the network programs: what it does has to be seen by hand.\n",
                    path.display()
                );
            }
            text += &format!("# {} calls:\n", path.display());
            for call in &calls {
                // What xend gave to the wrapper stands where its "$@" stands.
                let given = if call.passes_on { rest } else { &[] };
                text += &command(call.program, given, &call.words, antispoof);
                for word in &call.unknown {
                    text += &format!("# ... and {word}, whose value only shows when the script runs\n");
                }
            }
            let mut programs: Vec<Program> = calls.iter().map(|call| call.program).collect();
            programs.dedup();
            programs.into_iter().for_each(|program| text += &remark(program));
            text
        }
    }
}

/// One command, `start` put in where xend said it.
fn command(program: Program, given: &[String], words: &[String], antispoof: Option<&str>) -> String {
    let mut line = format!("{} start", program.name());
    let mut unknown = Vec::new();
    let says_antispoof = given.iter().chain(words).any(|word| word.starts_with("antispoof="));
    for word in given.iter().chain(words).filter(|word| !matches!(word.as_str(), "start" | "stop" | "status")) {
        match word.split_once('=') {
            Some((key, _)) if program.keys().contains(&key) => line += &format!(" {word}"),
            _ => unknown.push(word.as_str()),
        }
    }
    if let (Some(value), false, Program::Bridge) = (antispoof, says_antispoof, program) {
        line += &format!(" antispoof={value}");
    }
    line.push('\n');
    for word in unknown {
        line += &format!("# left out: {word}, which {} does not know\n", program.name());
    }
    line
}

fn remark(program: Program) -> String {
    match program {
        Program::Bridge => {
            "# Add layout=xen3 for the names of those days (peth0, vif0.0); without it the bridge gets the addresses.\n"
        }
        Program::Dummy => "# It does nothing, then as now: the system's own configuration makes the bridges.\n",
        Program::Nat => "# Guests' interfaces need script=vif-nat.\n",
        Program::Route => "# Guests' interfaces need script=vif-route.\n",
        Program::Vlan => "",
    }
    .to_owned()
}

fn vif_script(said: &str) -> String {
    let words = shell_words(said);
    let Some((name, rest)) = words.split_first() else { return String::new() };
    let file = Path::new(name).file_name().map_or_else(|| name.clone(), |file| file.to_string_lossy().into_owned());
    let mut text = match file.as_str() {
        "vif-bridge" | "vif-route" | "vif-nat" => {
            format!("# in /etc/xen/xl.conf, or as script={file} in a guest's vif:\n# vif.default.script=\"{file}\"\n")
        }
        _ => format!(
            "# {name} is a script of this machine's: it can stay in use (vif.default.script=\"{name}\" in /etc/xen/xl.conf).\n"
        ),
    };
    for word in rest {
        match word.split_once('=') {
            Some(("bridge", bridge)) => text += &format!("# vif.default.bridge=\"{bridge}\"\n"),
            Some(("netdev", dev)) => text += &format!("# vif.default.gatewaydev=\"{dev}\"\n"),
            Some(("dhcp", "yes")) => text += "# dhcp=yes belongs to network-nat now: network-nat start dhcp=yes\n",
            _ => text += &format!("# left out: {word}\n"),
        }
    }
    text
}

/// One call of a network program in a script.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Call {
    program: Program,
    words: Vec<String>,
    /// Whether the script's own arguments are handed on.
    passes_on: bool,
    /// Words with variables or commands in them.
    unknown: Vec<String>,
}

/// The calls of network programs in a shell script, as far as they can be seen without running it.
fn calls(script: &str) -> Vec<Call> {
    let joined = script.replace("\\\n", " ");
    joined.lines().flat_map(commands).filter_map(|words| call(&words)).collect()
}

fn call(words: &[String]) -> Option<Call> {
    let (at, program) = words.iter().enumerate().find_map(|(at, word)| Some((at, program(word)?)))?;
    // Only what stands where commands stand: not `echo network-bridge`, nor a case's label.
    let before = &words[..at];
    let prefix = |word: &String| {
        matches!(
            word.as_str(),
            "exec" | "sh" | "bash" | "/bin/sh" | "/bin/bash" | "-e" | "-x" | "then" | "do" | "else" | "if" | "!" | "{"
        ) || word.contains('=')
    };
    if !before.iter().all(prefix) {
        return None;
    }
    let mut call = Call { program, words: Vec::new(), passes_on: false, unknown: Vec::new() };
    for word in &words[at + 1..] {
        match word.as_str() {
            "$@" | "$*" | "${1+$@}" => call.passes_on = true,
            "$1" => (),
            _ if word.starts_with('>') || word.starts_with("2>") => break,
            _ if word.contains(['$', '`']) => call.unknown.push(word.clone()),
            _ => call.words.push(word.clone()),
        }
    }
    Some(call)
}

/// The network program a word names, whatever directory stands before it.
fn program(word: &str) -> Option<Program> {
    Program::by_name(word.rsplit('/').next().unwrap_or(word))
}

/// The words of a line of shell, as one command.
fn shell_words(line: &str) -> Vec<String> {
    commands(line).into_iter().next().unwrap_or_default()
}

/// The simple commands of a line of shell: words with their quotes taken off, separated by `;`, `&&`, `||`, `|`.
fn commands(line: &str) -> Vec<Vec<String>> {
    let (mut commands, mut words, mut word): (Vec<Vec<String>>, Vec<String>, Option<String>) = Default::default();
    let mut chars = line.chars();
    while let Some(char) = chars.next() {
        match char {
            '#' if word.is_none() => break,
            '\'' => {
                let text = word.get_or_insert_default();
                text.extend(chars.by_ref().take_while(|char| *char != '\''));
            }
            '"' => {
                let text = word.get_or_insert_default();
                while let Some(char) = chars.next().filter(|char| *char != '"') {
                    text.extend(if char == '\\' { chars.next() } else { Some(char) });
                }
            }
            '\\' => word.get_or_insert_default().extend(chars.next()),
            ';' | '&' | '|' => {
                words.extend(word.take());
                commands.push(std::mem::take(&mut words));
            }
            _ if char.is_whitespace() => words.extend(word.take()),
            _ => word.get_or_insert_default().push(char),
        }
    }
    words.extend(word);
    commands.push(words);
    commands.retain(|words| !words.is_empty());
    commands
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::*;

    fn explained(config: &str, script: &str) -> Vec<String> {
        let entries = entries(config).unwrap();
        let wrapper = |name: &str| match name {
            "my-network-script" => Ok((PathBuf::from("/etc/xen/scripts/my-network-script"), script.to_owned())),
            _ => Err(format!("{name}: No such file")),
        };
        let text = explain_entries(&entries, &wrapper);
        text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).map(str::to_owned).collect()
    }

    #[test]
    fn every_way_to_name_a_network_script() {
        for (config, command) in [
            ("(network-script network-bridge)", "network-bridge start"),
            (
                "(network-script 'network-bridge netdev=eth1 bridge=xenbr1')",
                "network-bridge start netdev=eth1 bridge=xenbr1",
            ),
            ("( network-script\n\"network-bridge vifnum=1\" )", "network-bridge start vifnum=1"),
            ("# (network-script network-nat)\n(network-script network-route)", "network-route start"),
            ("(network-script 'network-nat dhcp=yes')", "network-nat start dhcp=yes"),
            ("(network-script network-dummy)", "network-dummy start"),
            (
                "(network-script /etc/xen/scripts/network-bridge)(vif-antispoof yes)",
                "network-bridge start antispoof=yes",
            ),
            (
                "(vif-antispoof no)\n(network-script 'network-bridge antispoof=yes')",
                "network-bridge start antispoof=yes",
            ),
            ("(network-script 'network-bridge colour=red')", "network-bridge start"),
        ] {
            assert_eq!(explained(config, ""), [command], "{config}");
        }
        assert!(explained("(xend-unix-server yes)(vif-script vif-bridge)", "").is_empty());
    }

    #[test]
    fn the_wrapper_of_the_handbooks() {
        let script = "#!/bin/sh\ndir=$(dirname \"$0\")\n\
            \"$dir/network-bridge\" \"$@\" vifnum=0 netdev=eth0 bridge=xenbr0\n\
            \"$dir/network-bridge\" \"$@\" vifnum=1 netdev=eth1 bridge=xenbr1\n";
        assert_eq!(
            explained("(network-script my-network-script)", script),
            [
                "network-bridge start vifnum=0 netdev=eth0 bridge=xenbr0",
                "network-bridge start vifnum=1 netdev=eth1 bridge=xenbr1"
            ]
        );
    }

    #[test]
    fn other_wrappers() {
        let script = "vconfig add eth0 411; /etc/xen/scripts/network-bridge $* netdev=eth0.411 \\\n  bridge=xenbr411 # one\n\
            echo network-bridge start\n# network-bridge start vifnum=9\n\
            if sh network-route $1 netdev=$DEV; then exec network-bridge 'start' vifnum=2 >/dev/null; fi\n";
        assert_eq!(
            explained("(network-script 'my-network-script antispoof=no')", script),
            [
                "network-bridge start antispoof=no netdev=eth0.411 bridge=xenbr411",
                "network-route start",
                "network-bridge start vifnum=2"
            ]
        );
    }

    #[test]
    fn broken_files_say_where() {
        assert_eq!(entries("(a\n(b)"), Err((1, "the ( that begins here has no )")));
        assert_eq!(entries("(a)\n)"), Err((2, "there is a ) too many")));
        assert_eq!(entries("(a)\n(b 'c\n"), Err((2, "the quote that begins here has no end")));
        let nested = entries("(a b (c d) e)").unwrap();
        assert_eq!(nested[0].words, ["a", "b", "e"]);
    }
}
