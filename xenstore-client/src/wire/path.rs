//! Which paths the store accepts.

/// Most bytes of an absolute path (`XENSTORE_ABS_PATH_MAX`).
pub const ABS_PATH_MAX: usize = 3072;
/// Most bytes of a relative path (`XENSTORE_REL_PATH_MAX`).
pub const REL_PATH_MAX: usize = 2048;

/// Checks a path that names a node, absolute or relative (`docs/misc/xenstore.txt`: alphanumeric and `-/_@`, no empty
/// component, no trailing slash except for `/` itself). A node named `@…` is special and not one of these.
///
/// # Errors
/// Says which rule is broken.
pub fn check_path(path: &str) -> Result<(), &'static str> {
    if path.starts_with('@') {
        return Err("a special path names no node");
    }
    check_chars(path)
}

/// Checks a path that may be watched: a node, or a special one such as `@releaseDomain` or `@releaseDomain/5`.
///
/// # Errors
/// Says which rule is broken.
pub fn check_watch_path(path: &str) -> Result<(), &'static str> {
    check_chars(path)
}

fn check_chars(path: &str) -> Result<(), &'static str> {
    let max = if path.starts_with('/') { ABS_PATH_MAX } else { REL_PATH_MAX };
    if path.is_empty() {
        return Err("the path is empty");
    }
    if path.len() > max {
        return Err("the path is too long");
    }
    if path != "/" && path.ends_with('/') {
        return Err("the path ends with a slash");
    }
    if path.contains("//") {
        return Err("the path has an empty component");
    }
    if !path.bytes().all(|b| b.is_ascii_alphanumeric() || b"-/_@".contains(&b)) {
        return Err("the path has a character other than a-z A-Z 0-9 - / _ @");
    }
    Ok(())
}
