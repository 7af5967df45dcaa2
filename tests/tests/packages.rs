//! tests/packages.txt is whole: each program that a test calls is in it.
//!
//! A machine that has everything hides what tests/run forgets to install. So the calls are looked for in the source.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Functions whose first argument names a program: alone, or as the first word of a command line.
const RUST: &[&str] = &[
    "Command::new",
    "have",
    "tool",
    "run",
    "must",
    "sh",
    "try_sh",
    "outside",
    ".command",
    "Self::start",
    "Process::start",
    "Undo",
];

/// The same in Python. `machine.run` and `guest.run` are not among them: they call what dom0 and guests have.
const PYTHON: &[&str] = &["subprocess.run", "subprocess.Popen", "subprocess.check_output", "shutil.which", "quiet"];

/// The shell's own commands, and its words before a command.
const BUILTINS: &[&str] = &["echo", "cd", "test", "[", "done", "fi", "exit"];
const BEFORE_A_COMMAND: &[&str] = &["exec", "until", "while", "do", "if", "then", "else", "!"];

/// Names that are ours: programs, the names under which toolstacks call bridge-scripts, and what builds them.
const OURS: &[&str] = &["rustc", "blkback", "netback", "bridge-scripts", "emu-xen", "dom0-bench", "network-", "vif-"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Each program of the table, and its group.
fn table() -> Vec<(String, String)> {
    let text = std::fs::read_to_string(root().join("tests/packages.txt")).unwrap();
    let mut table = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let (columns, users) = line.split_once('#').unwrap_or_else(|| panic!("who uses it? {line}"));
        assert!(!users.trim().is_empty(), "who uses it? {line}");
        let [group, _package, programs @ ..] = &columns.split_whitespace().collect::<Vec<_>>()[..] else {
            panic!("a group, a package, programs: {line}")
        };
        assert!(["tests", "lab", "unpacked"].contains(group), "there is no group {group}");
        assert!(!programs.is_empty(), "a package without a program cannot be checked: {line}");
        table.extend(programs.iter().map(|program| ((*program).to_owned(), (*group).to_owned())));
    }
    table
}

/// Files with this ending below the root, except what cargo and labs build.
fn files(ending: &str) -> Vec<PathBuf> {
    let (mut found, mut folders) = (Vec::new(), vec![root()]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let (path, name) = entry.map(|entry| (entry.path(), entry.file_name())).unwrap();
            let hidden = name.to_string_lossy().starts_with('.');
            // dom0/ runs inside of the lab's machine.
            if path.is_dir() && !hidden && name != "target" && name != "dom0" {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == ending) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// A source text without its comments, whole lines of them.
fn code(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| if line.trim_start().starts_with(['/', '#']) { "" } else { line })
        .collect::<Vec<_>>()
        .join("\n")
}

/// A string literal at the beginning of `text`, after what may stand before one: a format of Rust, a list of Python.
fn literal(text: &str) -> Option<&str> {
    let mut text = text.trim_start();
    for before in ["&format!(", "[", "f"] {
        text = text.strip_prefix(before).unwrap_or(text).trim_start();
    }
    let text = text.strip_prefix('"')?;
    // No program's name has a quotation mark.
    Some(&text[..text.find('"')?])
}

/// Every call of `function`, each with its arguments and all that follows.
fn calls<'a>(text: &'a str, function: &str) -> impl Iterator<Item = (usize, &'a str)> {
    let call = format!("{function}(");
    let starts: Vec<usize> = text.match_indices(&call).map(|(at, _)| at).collect();
    let word = |letter: char| letter.is_alphanumeric() || letter == '_';
    let whole = move |at: &usize| !function.starts_with(word) || !text[..*at].ends_with(word);
    let length = call.len();
    starts.into_iter().filter(whole).map(move |at| (at, &text[at + length..])).collect::<Vec<_>>().into_iter()
}

/// What a shell script calls.
fn shell(script: &str) -> impl Iterator<Item = &str> {
    let commands = script.split(['|', ';', '&', '\n']);
    let first = commands.filter_map(|words| words.split_whitespace().find(|word| !BEFORE_A_COMMAND.contains(word)));
    first.filter(|word| !BUILTINS.contains(word))
}

/// The programs that a source text calls.
fn called(text: &str, functions: &[&str]) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for function in functions {
        for (_, arguments) in calls(text, function) {
            found.extend(literal(arguments).and_then(|line| line.split_whitespace().next()).map(str::to_owned));
        }
    }
    for (at, _) in text.match_indices(r#""sh", "-c","#) {
        found.extend(literal(&text[at + r#""sh", "-c","#.len()..]).into_iter().flat_map(shell).map(str::to_owned));
    }
    found.retain(|name| !name.starts_with('{') && !name.contains("{}"));
    found
}

/// The function, or the closure with a name, that a place of a Rust text is in; with its text up to there.
fn enclosing(text: &str, at: usize) -> (&str, &str) {
    let before = &text[..at];
    let function = before.rfind("fn ").map(|start| (start, &before[start + 3..]));
    let closure = before.rfind(" = |").map(|end| {
        let start = before[..end].rfind("let ").unwrap();
        (start, &before[start + 4..])
    });
    let (_, body) = function.into_iter().chain(closure).max().unwrap();
    (&body[..body.find(|end: char| !end.is_alphanumeric() && end != '_').unwrap()], body)
}

fn ours(name: &str) -> bool {
    OURS.iter().any(|ours| name.starts_with(ours))
}

#[test]
fn every_program_that_tests_call_is_in_the_table() {
    let table = table();
    let known =
        |name: &str| table.iter().any(|(program, _)| program == name || program.rsplit('/').next() == Some(name));
    let mut wrong = Vec::new();
    for (ending, functions) in [("rs", RUST), ("py", PYTHON)] {
        for path in files(ending).iter().filter(|path| !path.ends_with(file!().rsplit('/').next().unwrap())) {
            let called = called(&code(path), functions);
            for name in called.iter().filter(|name| !known(name.rsplit('/').next().unwrap()) && !ours(name)) {
                wrong.push(format!("{} calls {name}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "in no line of tests/packages.txt:\n{}", wrong.join("\n"));
}

/// The labs' own tests run every time, without the labs: a program that they call is for every run too.
#[test]
fn the_labs_own_tests_call_what_every_run_installs() {
    let table = table();
    let mut wrong = Vec::new();
    for path in files("py").iter().filter(|path| path.file_name().unwrap().to_string_lossy().starts_with("test_")) {
        for name in called(&code(path), PYTHON) {
            if table.iter().any(|(program, group)| *program == name && group != "tests") {
                wrong.push(format!("{} calls {name}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "in tests/packages.txt, but not of the group `tests`:\n{}", wrong.join("\n"));
}

/// A function that runs whatever program it is given must be known here, or its callers are not seen.
#[test]
fn every_function_that_takes_a_programs_name_is_known_here() {
    let mut wrong = Vec::new();
    let tests = |path: &&PathBuf| path.components().any(|folder| folder.as_os_str() == "tests");
    for path in files("rs").iter().filter(tests).filter(|path| !path.ends_with("packages.rs")) {
        let text = code(path);
        for (at, argument) in calls(&text, "Command::new") {
            let argument = argument.split([')', '.']).next().unwrap().trim_start_matches('&');
            let (function, body) = enclosing(&text, at);
            // The first of some words, or what the function was given.
            let given = argument == "words" || body.contains(&format!("{argument}: "));
            if given && !RUST.iter().any(|known| known.rsplit(['.', ':']).next() == Some(function)) {
                wrong.push(format!("{}: {function}: Command::new({argument})", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "functions that take a program's name, for RUST in this file:\n{}", wrong.join("\n"));
}

#[test]
fn the_scan_sees_calls() {
    let rust = r#"
        run(Command::new("qemu-img").args(["convert"])); if !have("fio", "load") {}
        let listed = self.run(&format!("ip link add {name}")); overrun("no", 1);
        unshare.args(["--net", "sh", "-c", "ip link set lo up && echo ready && exec cat"]);
        let place = |program: &str| std::process::Command::new(program);
    "#;
    assert_eq!(Vec::from_iter(called(rust, RUST)), ["cat", "fio", "ip", "qemu-img"]);
    let python =
        r#"subprocess.run(["chroot", str(root)], text=True); packages.quiet(["depmod", "-b"]); guest.run("lsblk")"#;
    assert_eq!(Vec::from_iter(called(python, PYTHON)), ["chroot", "depmod"]);
    assert_eq!(enclosing(rust, rust.rfind("Command").unwrap()).0, "place");
}
