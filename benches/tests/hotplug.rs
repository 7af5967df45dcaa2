//! `dom0-bench hotplug`: that it measures what it says, with scripts that only pretend to be Xen's.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::{Command, Output};

const PROGRAM: &str = env!("CARGO_BIN_EXE_dom0-bench");

/// Runs it; none, said loudly, where the machine forbids network namespaces.
fn hotplug(words: &[&str]) -> Option<Output> {
    let output = Command::new(PROGRAM).args(["hotplug", "--rounds", "1"]).args(words).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("nothing can be measured") {
        println!("NOT TESTED: dom0-bench hotplug: {said}");
        return None;
    }
    Some(output)
}

fn figures(output: &Output, json: &Path) -> serde_json::Value {
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&fs::read(json).unwrap()).unwrap()
}

fn script(folder: &Path, text: &str) {
    let path = folder.join("vif-bridge");
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn without_stock_scripts_it_measures_ours_and_says_what_it_left_out() {
    let folder = tempfile::tempdir().unwrap();
    for topology in ["bridge", "route", "nat"] {
        let json = folder.path().join("figures.json");
        let Some(output) = hotplug(&["--topology", topology, "--json", json.to_str().unwrap()]) else { return };
        let figures = figures(&output, &json);
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(said.contains("NOT MEASURED: the stock scripts: "), "{said}");
        let rows = figures["rows"].as_array().unwrap();
        assert_eq!(rows.len(), 2, "{said}");
        for row in rows {
            let time = |key: &str| row[key]["median"].as_f64().unwrap();
            assert!(time("hotplug_ms") > 0.0 && time("connected_ms") > time("hotplug_ms"), "{said}");
            assert!(row["connected_ratio"].is_null());
        }
        // Where processes can be counted at all, a program is at least one; threads count too, of the toolstack's own as
        // well.
        if let Some(executed) = rows[1]["processes"].as_u64() {
            assert!(executed > 0, "{said}");
        }
    }
}

#[test]
fn a_stock_script_is_executed_where_it_finds_xenstore() {
    let folder = tempfile::tempdir().unwrap();
    let (log, json) = (folder.path().join("log"), folder.path().join("figures.json"));
    // It takes our own program to answer in XenStore; the name tells it what to do.
    let ours = folder.path().join("ours");
    fs::create_dir(&ours).unwrap();
    symlink(PROGRAM, ours.join("vif-bridge")).unwrap();
    let text = format!(
        "test -S /run/xenstored/socket || exit 1\n\
         test $1 = offline || test -d /sys/class/net/$vif || exit 1\n\
         echo \"$0 $* $XENBUS_PATH\" >>{}\nexec {}/vif-bridge \"$@\"",
        log.display(),
        ours.display()
    );
    script(folder.path(), &text);
    let stock = folder.path().to_str().unwrap();
    let Some(output) = hotplug(&["--stock", stock, "--json", json.to_str().unwrap()]) else { return };
    let figures = figures(&output, &json);
    assert_eq!(figures["rows"].as_array().unwrap().len(), 3);
    assert!(figures["rows"][1]["connected_ratio"]["median"].as_f64().unwrap() > 0.0);
    assert!(!String::from_utf8_lossy(&output.stdout).contains("NOT MEASURED"));
    let log = fs::read_to_string(&log).unwrap();
    let lines: Vec<&str> = log.lines().collect();
    let called = |event: &str, devid: u32| format!("/run/stock/vif-bridge {event} type_if=vif backend/vif/1/{devid}");
    // Once to count its processes, once to measure.
    assert_eq!(lines, [called("online", 1), called("offline", 1), called("online", 0), called("offline", 0)]);
}

#[test]
fn a_stock_script_that_fails_is_no_figure() {
    let folder = tempfile::tempdir().unwrap();
    script(folder.path(), "echo a cable is missing >>/var/log/xen/xen-hotplug.log; exit 1");
    let Some(output) = hotplug(&["--stock", folder.path().to_str().unwrap()]) else { return };
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
    assert!(said.contains("online failed") && said.contains("a cable is missing"), "{said}");
    // What it wrote stayed inside.
    let log = fs::read_to_string("/var/log/xen/xen-hotplug.log").unwrap_or_default();
    assert!(!log.contains("a cable is missing"));
}

#[test]
fn a_folder_without_scripts_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(PROGRAM).args(["hotplug", "--stock"]).arg(folder.path()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("no vif-bridge there"), "{said}");
}
