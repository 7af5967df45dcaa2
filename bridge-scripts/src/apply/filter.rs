//! Filters of interfaces: what they should be, which is kept in the run directory, and what the kernel has.

use std::path::{Path, PathBuf};

use super::error::Fault;
use super::session::{names, read_optional, remove_optional, write_whole};
use super::{Error, Options};
use crate::antispoof::{self, Rules};
use crate::filter::Classifier;
use crate::link::{Link, placed};
use crate::nft::{Change, Family, Nft};

/// There where the kernel has no rates for classifiers, until the machine starts again or the module comes.
const NO_RATES: &str = "no-act_police";
/// Where a kernel shows that it has loaded the module.
const POLICE: &str = "/sys/module/act_police";
const PREFIX: &str = "filter-";
const SUFFIX: &str = ".json";

fn file(run: &Path, link: &str) -> PathBuf {
    run.join(format!("{PREFIX}{link}{SUFFIX}"))
}

/// The links that should have a filter.
pub(crate) fn filtered(run: &Path) -> Result<Vec<String>, Error> {
    let names = names(run)?.into_iter();
    Ok(names.filter_map(|name| Some(name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?.to_owned())).collect())
}

/// What a link's filter should be.
pub(super) fn kept(run: &Path, link: &str) -> Result<Option<Rules>, Error> {
    Ok(read_optional(&file(run, link))?.and_then(|text| serde_json::from_str(&text).ok()))
}

/// Keeps what a link's filter should be, or that it should have none.
pub(super) fn keep(run: &Path, link: &str, rules: Option<&Rules>) -> Result<(), Fault> {
    let path = file(run, link);
    let Some(rules) = rules else { return remove_optional(&path) };
    let text =
        serde_json::to_string(rules).map_err(|error| Fault::File { path: path.clone(), source: error.into() })?;
    write_whole(&path, &text)
}

/// Forgets filters of interfaces that are gone, whatever they were called.
pub(super) fn forget_gone(run: &Path, link: &Link) -> Result<(), Error> {
    for name in filtered(run)? {
        if !link.exists(&name).map_err(|error| Error::Read(Box::new(error.into())))? {
            keep(run, &name, None).map_err(|error| Error::Read(Box::new(error)))?;
        }
    }
    Ok(())
}

/// Forgets the filters of an interface that is gone, and what a former version has left of it in nftables.
///
/// # Errors
/// When the run directory or nftables refuse.
pub fn forget_filters(options: &Options, links: &[String]) -> Result<(), Error> {
    let run = &options.run;
    let forget = |link: &String| {
        let (family, table) = (Family::Netdev, format!("xen-{link}"));
        let copy = super::session::table_file(run, family, &table);
        if copy.exists() {
            Nft::open()?.apply(&[Change::Delete(family, table)])?;
            remove_optional(&copy)?;
        }
        Ok(())
    };
    links.iter().try_for_each(forget).map_err(|error: Fault| Error::Read(Box::new(error)))?;
    forget_gone(run, &Link::open().map_err(|error| Error::Read(Box::new(error.into())))?)
}

fn classifiers(rules: &Rules) -> Result<Vec<Classifier>, Fault> {
    Ok(antispoof::filter(rules).classifiers()?)
}

fn lacks_rates(run: &Path) -> bool {
    run.join(NO_RATES).exists() && !Path::new(POLICE).exists()
}

/// What the kernel has of a link's filter, compared with what it should be: nothing if there is none and should be none,
/// else the rules where the kernel has exactly what they make.
pub(super) fn look(run: &Path, link: &mut Link, name: &str) -> Result<Option<Option<Rules>>, Error> {
    let wrong = |error: Fault| Error::Read(Box::new(error));
    let there = link.filter(name).map_err(|error| wrong(error.into()))?;
    let kept = kept(run, name)?;
    let Some(rules) = kept else { return Ok((!there.is_empty()).then_some(None)) };
    let wanted = placed(&classifiers(&rules).map_err(wrong)?, !lacks_rates(run));
    Ok(Some((there == wanted).then_some(rules)))
}

/// Makes the kernel have this filter at a link, and sees that it has.
pub(super) fn put(run: &Path, link: &mut Link, name: &str, rules: &Rules, say: fn(&str)) -> Result<(), Fault> {
    let classifiers = classifiers(rules)?;
    let mut wanted = placed(&classifiers, !lacks_rates(run));
    if let Some(error) = link.set_filter(name, &wanted)? {
        wanted = placed(&classifiers, false);
        say(&format!(
            "this kernel cannot limit how many ARP, neighbour discovery and group frames a guest sends a second ({error}): it \
             needs the module act_police. All else is filtered"
        ));
        write_whole(&run.join(NO_RATES), &error.to_string())?;
    }
    if link.filter(name)? == wanted {
        return Ok(());
    }
    Err(Fault::OtherFilter(name.to_owned()))
}
