//! The table of `xl network-list` (`main_networklist` in `tools/xl/xl_nic.c`).

use std::fmt::Write as _;

use xenstore_client::{Client, DomId, Store};

use super::Error;

/// The interfaces of domains, in the columns of `xl network-list`; one that failed has a line with the reason below it.
/// -1 stands for what the guest has not published, or published queue by queue.
///
/// # Errors
/// When XenStore refuses.
pub fn list(store: &Client, domains: &[DomId]) -> Result<String, Error> {
    let mut text = String::new();
    // Writing to a String cannot fail, here and below.
    let _ = writeln!(
        text,
        "{:<3} {:<2} {:<17} {:<6} {:<5} {:<6} {:>5}/{:<5} {:<30}",
        "Idx", "BE", "Mac Addr.", "handle", "state", "evt-ch", "tx-", "rx-ring-ref", "BE-path"
    );
    for frontend in domains {
        let devices = format!("{}/device/vif", frontend.home());
        let names = store.directory_opt(&devices)?.unwrap_or_default();
        let mut devids: Vec<u32> = names.iter().filter_map(|name| name.parse().ok()).collect();
        devids.sort_unstable();
        for devid in devids {
            row(store, *frontend, devid, &format!("{devices}/{devid}"), &mut text)?;
        }
    }
    Ok(text)
}

fn row(store: &Client, frontend: DomId, devid: u32, front: &str, text: &mut String) -> Result<(), Error> {
    // The directory is the guest's: whatever else it may have written there, only numbers are shown.
    let number = |key: &str| -> Result<i64, Error> {
        let value = store.read_bytes_opt(&format!("{front}/{key}"))?;
        let value = value.and_then(|value| String::from_utf8(value).ok());
        Ok(value.and_then(|value| value.parse::<u32>().ok()).map_or(-1, i64::from))
    };
    let named = store.read_bytes_opt(&format!("{front}/backend"))?.and_then(|path| String::from_utf8(path).ok());
    let (backend, path) = match named.as_deref().and_then(|path| Some((backend_of(path, frontend, devid)?, path))) {
        Some((backend, path)) => (backend.to_string(), path.to_owned()),
        None => ("-1".to_owned(), "(the guest has overwritten it)".to_owned()),
    };
    let key = |key: &str| store.read_opt(&format!("{path}/{key}"));
    let known = path.starts_with('/');
    let mac = if known { key("mac")? } else { None }.unwrap_or_else(|| "00:00:00:00:00:00".to_owned());
    let (state, port) = (number("state")?, number("event-channel")?);
    let (tx, rx) = (number("tx-ring-ref")?, number("rx-ring-ref")?);
    let _ = writeln!(text, "{devid:<3} {backend:<2} {mac}{devid:>6} {state:>5} {port:>6} {tx:>5}/{rx:<11} {path:<30}");
    if let Some(error) = if known { key("error")? } else { None } {
        let _ = writeln!(text, "    vif{frontend}.{devid}: {error}");
    }
    Ok(())
}

/// The backend's domain, if this is the directory that the toolstack names for the device.
fn backend_of(path: &str, frontend: DomId, devid: u32) -> Option<DomId> {
    let (domain, rest) = path.strip_prefix("/local/domain/")?.split_once('/')?;
    (rest == format!("backend/vif/{frontend}/{devid}")).then(|| domain.parse().ok())?
}
