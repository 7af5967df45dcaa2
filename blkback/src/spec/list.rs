//! The `disk = [ … ]` of a domain configuration.

use super::{DiskSpec, one};
use crate::vdev::Vdev;
use std::collections::HashSet;
use xenstore_client::spec::{Fault, strings};

pub(super) fn parse(text: &str) -> Result<Vec<DiskSpec>, Fault> {
    let mut specs = Vec::new();
    let mut seen: HashSet<Vdev> = HashSet::new();
    for item in strings("disk", text)? {
        let (spec, span) = one(&item.word())?;
        if !seen.insert(spec.vdev) {
            let message = format!("two disks are called {}", spec.vdev);
            return Err(Fault::new(span, message, "give each disk a virtual device of its own"));
        }
        specs.push(spec);
    }
    Ok(specs)
}
