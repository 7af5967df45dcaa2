//! What the documents say of tests is true: each one named exists.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// The source that a test's name `FILE::FUNCTION` points to.
fn source(file: &str) -> Option<String> {
    let folders = ["blkback/tests", "tests/tests", "blkback/src"];
    folders.iter().find_map(|folder| std::fs::read_to_string(root().join(folder).join(format!("{file}.rs"))).ok())
}

fn has_test(text: &str, function: &str) -> bool {
    let Some(at) = text.find(&format!("fn {function}(")) else { return false };
    // Attributes and, inside proptest!, comments stand between.
    text[..at].rsplit("\n\n").next().is_some_and(|before| before.contains("#[test]"))
}

#[test]
fn the_table_of_tested_promises() {
    let text = std::fs::read_to_string(root().join("docs/block.md")).unwrap();
    let table = text.split("<!-- tested:begin -->").nth(1).unwrap().split("<!-- tested:end -->").next().unwrap();
    let rows: Vec<Vec<&str>> = table
        .lines()
        .filter(|line| line.starts_with('|'))
        .skip(2)
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
        .collect();
    let mut wrong = Vec::new();
    for row in &rows {
        let [id, what, emulated, lab] = row[..] else { panic!("{row:?} has not four columns") };
        for name in emulated.split(", ").filter(|name| !name.is_empty()) {
            let (file, function) = name.split_once("::").unwrap_or((name, ""));
            if !source(file).is_some_and(|text| has_test(&text, function)) {
                wrong.push(format!("{id} {what}: there is no test {name}"));
            }
        }
        for name in lab.split(", ").filter(|name| !name.is_empty()) {
            if !root().join(format!("tests/xen-lab/scenarios/{name}.py")).exists() {
                wrong.push(format!("{id} {what}: the lab has no scenario {name}"));
            }
        }
        if emulated.is_empty() && lab.is_empty() {
            wrong.push(format!("{id} {what}: tested nowhere"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let ids: Vec<&str> = rows.iter().map(|row| row[0]).collect();
    // The three that need no test are named below the table.
    for number in (10..=26).filter(|number| *number != 24) {
        assert!(ids.contains(&format!("B{number}").as_str()), "B{number} is missing");
    }
}
