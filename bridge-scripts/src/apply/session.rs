//! A time alone with the machine's network.

use std::env;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::error::Fault as StepFault;
use super::journal::{self, Found, Open, now};
use super::lock::Lock;
use super::{Error, Journal, Pending, filter, pending};
use crate::antispoof::Rules;
use crate::link::{Link, Mode};
use crate::nft::{Change, Family, Nft, Table};
use crate::plan::Plan;
use crate::state::{OurTable, State, What};
use crate::step::Step;

/// The variable that names another run directory than /run/bridge-scripts.
pub(super) const RUN_VARIABLE: &str = "BRIDGE_SCRIPTS_RUN";
/// The variable by which tests let a program fail or die, see [`Fault`].
const FAULT_VARIABLE: &str = "BRIDGE_SCRIPTS_FAULT";
pub(super) const JOURNAL: &str = "journal.json";
/// The end of the names of files that are being written, and get their name when they are whole.
const DRAFT: &str = ".new";

/// Where a plan is to go wrong, for tests. Steps are counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The step fails without having done anything (`fail-before=N`).
    FailBefore(usize),
    /// The step is done and fails nevertheless (`fail-after=N`).
    FailAfter(usize),
    /// The process dies by SIGKILL before the step, which is in the journal already (`kill-before=N`).
    KillBefore(usize),
    /// The process dies by SIGKILL after the step (`kill-after=N`).
    KillAfter(usize),
    /// The process dies by SIGKILL while it takes back the step, when that is half done (`kill-undo=N`).
    KillUndo(usize),
}

impl Fault {
    /// Reads `fail-before=3`.
    pub fn parse(text: &str) -> Option<Self> {
        let (what, step) = text.split_once('=')?;
        let step = step.parse().ok()?;
        match what {
            "fail-before" => Some(Self::FailBefore(step)),
            "fail-after" => Some(Self::FailAfter(step)),
            "kill-before" => Some(Self::KillBefore(step)),
            "kill-after" => Some(Self::KillAfter(step)),
            "kill-undo" => Some(Self::KillUndo(step)),
            _ => None,
        }
    }
}

/// How a [`Session`] behaves.
#[derive(Debug, Clone)]
pub struct Options {
    /// The run directory: lock, journal, records.
    pub run: PathBuf,
    /// How long to wait for others.
    pub patience: Duration,
    /// Who is told what an administrator should see: waiting, repairs.
    pub say: fn(&str),
    /// For tests.
    pub fault: Option<Fault>,
    /// The program that waits for a confirmation: this one, unless said.
    pub waiter: Option<PathBuf>,
}

impl Default for Options {
    /// The run directory of the environment, 30 s of patience, messages into the log.
    fn default() -> Self {
        let run = env::var_os(RUN_VARIABLE).filter(|dir| !dir.is_empty());
        Self {
            run: run.map_or_else(|| PathBuf::from("/run/bridge-scripts"), PathBuf::from),
            patience: Duration::from_secs(30),
            say: |line| tracing::warn!("{line}"),
            fault: env::var(FAULT_VARIABLE).ok().as_deref().and_then(Fault::parse),
            waiter: None,
        }
    }
}

/// What a plan came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// How many steps were done; 0 if there was nothing to do.
    pub steps: usize,
}

/// What became of tables that were to be put back.
#[derive(Debug, Default)]
pub struct Restored {
    /// Those that were missing, and are there again.
    pub names: Vec<String>,
    /// Why one is not, the last of them.
    pub failed: Option<Error>,
}

/// A time alone with the machine's network: nobody else of ours changes it until this is dropped.
#[derive(Debug)]
pub struct Session {
    options: Options,
    link: Link,
    nft: Option<Nft>,
    _lock: Lock,
}

impl Session {
    /// Waits for the lock, takes back what a killed run left, and what was to be confirmed and was not.
    ///
    /// # Errors
    ///
    /// When the lock is held for too long, a repair fails, or the run directory cannot be used.
    pub fn open(options: Options) -> Result<Self, Error> {
        make_dir(&options.run)?;
        let lock = Lock::take(&options.run, options.patience, options.say)?;
        let link = Link::open().map_err(|error| Error::Read(Box::new(error.into())))?;
        let mut session = Self { options, link, nft: None, _lock: lock };
        // Of a run that was killed while it wrote a file. Nobody writes one without the lock.
        for name in names(&session.options.run)?.iter().filter(|name| name.ends_with(DRAFT)) {
            remove_optional(&session.file(name)).map_err(|error| Error::Read(Box::new(error)))?;
        }
        let path = session.file(JOURNAL);
        if let Some(found) = journal::find(&path)? {
            session.repair(&path, found, "was interrupted")?;
        }
        let path = session.file(pending::FILE);
        if let Some(found) = journal::find(&path)?.filter(|found| pending::left(&found.journal) == 0) {
            session.repair(&path, found, "was not confirmed")?;
        }
        Ok(session)
    }

    /// Reads the network's state, our tables' contents and records included.
    ///
    /// # Errors
    ///
    /// When the kernel or the run directory cannot be read.
    pub fn read(&mut self, what: &What) -> Result<State, Error> {
        if what.tables {
            self.nft().map_err(|error| Error::Read(Box::new(error)))?;
        }
        read(&self.options.run, &mut self.link, self.nft.as_mut(), what)
    }

    /// Puts back those of our tables that the kernel has lost, or has changed by somebody else; only those that are
    /// `wanted`.
    ///
    /// # Errors
    ///
    /// When the kernel cannot be asked at all. What was refused for one table is in the answer.
    pub fn restore_tables(&mut self, wanted: impl Fn(&str) -> bool) -> Result<Restored, Error> {
        let wrong = |error: StepFault| Error::Read(Box::new(error));
        let mut restored = Restored::default();
        let run = self.options.run.clone();
        for (family, name) in kept_tables(&run)?.into_iter().filter(|(_, name)| wanted(name)) {
            // What former versions filtered by is not put back, and goes with its interface.
            let table = kept(&table_file(&run, family, &name))?.filter(|_| family != Family::Netdev);
            let Some(table) = table else { continue };
            let nft = self.nft().map_err(wrong)?;
            if nft.holds(&table).map_err(|error| wrong(error.into()))? {
                continue;
            }
            match nft.apply(&[Change::Replace(table.clone())]) {
                Ok(()) => restored.names.push(format!("{} {}", table.family, table.name)),
                Err(error) => restored.failed = Some(wrong(error.into())),
            }
        }
        Ok(restored)
    }

    /// Lets our tables, in the kernel and in their copies, and the filter's record name a device `to` that they named
    /// `from`. Whether they did.
    ///
    /// # Errors
    ///
    /// When the kernel or the run directory refuses.
    pub fn rename_kept(&mut self, from: &str, to: &str) -> Result<bool, Error> {
        let wrong = |error: StepFault| Error::Read(Box::new(error));
        let run = self.options.run.clone();
        // Somebody else's may have the old name now.
        if self.link.exists(from).map_err(|error| wrong(error.into()))? {
            return Ok(false);
        }
        let mut renamed = false;
        if let Some(rules) = filter::kept(&run, from)? {
            filter::keep(&run, to, Some(&rules)).and_then(|()| filter::keep(&run, from, None)).map_err(wrong)?;
            renamed = true;
        }
        for file in names(&run)?.iter().filter(|name| is_table(name)) {
            let path = run.join(file);
            let Some(mut content) = content(&path)?.filter(|content| names_device(content, from)) else { continue };
            rename_device(&mut content, from, to);
            let Ok(table) = serde_json::from_value::<Table>(content.clone()) else { continue };
            let nft = self.nft().map_err(wrong)?;
            nft.apply(&[Change::Replace(table)]).map_err(|error| wrong(error.into()))?;
            write_whole(&path, &content.to_string()).map_err(wrong)?;
            renamed = true;
        }
        Ok(renamed)
    }

    /// Forgets what filters should be at links that are not there. A link that comes is given its filter anew.
    ///
    /// # Errors
    ///
    /// When the run directory or the kernel refuses.
    pub fn forget_gone_filters(&self) -> Result<(), Error> {
        filter::forget_gone(&self.options.run, &self.link)
    }

    /// The names of records that begin like this.
    ///
    /// # Errors
    ///
    /// When the run directory cannot be read.
    pub fn record_names(&self, prefix: &str) -> Result<Vec<String>, Error> {
        record_names(&self.options.run, prefix)
    }

    /// What was applied and waits for its confirmation.
    ///
    /// # Errors
    ///
    /// When the run directory cannot be read.
    pub fn pending(&self) -> Result<Option<Pending>, Error> {
        Pending::find(&self.options.run)
    }

    /// Keeps what was applied with a time limit.
    ///
    /// # Errors
    ///
    /// When nothing waits.
    pub fn confirm(&mut self) -> Result<Pending, Error> {
        pending::confirm(&self.options.run)
    }

    /// Carries out the plan, all of it or nothing. `before` is what [`Session::read`] told in this session, of everything
    /// that the plan changes.
    ///
    /// # Errors
    ///
    /// When a step fails; what was done before it has been taken back.
    pub fn apply(&mut self, plan: &Plan, before: &State) -> Result<Report, Error> {
        self.carry_out(plan, before, None)
    }

    /// The same, and takes it back after so many seconds unless [`Session::confirm`] comes before.
    ///
    /// # Errors
    ///
    /// As [`Session::apply`]; also if the process that waits cannot be started, and then nothing was done.
    pub fn apply_for(&mut self, plan: &Plan, before: &State, seconds: u32) -> Result<Report, Error> {
        self.carry_out(plan, before, Some(now() + u64::from(seconds)))
    }

    fn carry_out(&mut self, plan: &Plan, before: &State, deadline: Option<u64>) -> Result<Report, Error> {
        if plan.is_empty() {
            return Ok(Report { steps: 0 });
        }
        let undo = plan.undo(before);
        let mut journal = Open::create(&self.file(JOURNAL), &Journal::new(&plan.title, undo.clone(), deadline))?;
        if let Some(deadline) = deadline {
            // Before the first step: if this process dies on the way, the machine may be out of reach already.
            let program = match &self.options.waiter {
                Some(program) => program.clone(),
                None => env::current_exe().map_err(Error::Waiter)?,
            };
            if let Err(error) = pending::start_waiter(&program, &self.options.run, deadline) {
                journal.close()?;
                return Err(error);
            }
        }
        for (index, step) in plan.steps.iter().enumerate() {
            journal.doing(index)?;
            if let Err(source) = self.take_with_faults(index, step) {
                // What exists already is somebody else's, and not to be taken away.
                let theirs = matches!(&source, StepFault::Link(error) if error.errno() == Some(libc::EEXIST));
                let begun = if theirs { index.checked_sub(1) } else { Some(index) };
                let (step, source) = (step.to_string(), Box::new(source));
                let failed = begun.map_or(Ok(Vec::new()), |begun| self.take_back(&mut journal, &undo, begun))?;
                return Err(if failed.is_empty() {
                    journal.close()?;
                    Error::Step { index, step, source }
                } else {
                    journal.keep_as(&self.file("unrepaired.json"))?;
                    Error::Undo { index, step, source, undo: failed }
                });
            }
        }
        match deadline {
            Some(_) => journal.keep_as(&self.file(pending::FILE))?,
            None => journal.close()?,
        }
        Ok(Report { steps: plan.steps.len() })
    }

    /// Takes back steps from `last` to the first, and says what could not be.
    fn take_back(&mut self, journal: &mut Open, undo: &[Vec<Step>], last: usize) -> Result<Vec<String>, Error> {
        let mut failed = Vec::new();
        for index in (0..=last).rev() {
            journal.undoing(index)?;
            for (part, step) in undo[index].iter().enumerate() {
                if let Err(error) = self.take(step, Mode::Undo) {
                    failed.push(format!("{step}: {error}"));
                }
                if part == undo[index].len() / 2 && self.options.fault == Some(Fault::KillUndo(index)) {
                    die();
                }
            }
        }
        Ok(failed)
    }

    fn repair(&mut self, path: &Path, found: Found, why: &str) -> Result<(), Error> {
        let Found { journal, last } = found;
        let mut open = Open::reopen(path)?;
        let failed = match last {
            Some(last) => self.take_back(&mut open, &journal.undo, last)?,
            None => Vec::new(),
        };
        if !failed.is_empty() {
            let kept = self.file("unrepaired.json");
            open.keep_as(&kept)?;
            return Err(Error::Repair { title: journal.title, undo: failed, kept });
        }
        open.close()?;
        (self.options.say)(&format!("{:?} {why} (process {}): it has been taken back", journal.title, journal.pid));
        Ok(())
    }

    fn take_with_faults(&mut self, index: usize, step: &Step) -> Result<(), StepFault> {
        match self.options.fault {
            Some(Fault::FailBefore(at)) if at == index => return Err(StepFault::Test),
            Some(Fault::KillBefore(at)) if at == index => die(),
            _ => (),
        }
        self.take(step, Mode::Do)?;
        match self.options.fault {
            Some(Fault::FailAfter(at)) if at == index => Err(StepFault::Test),
            Some(Fault::KillAfter(at)) if at == index => die(),
            _ => Ok(()),
        }
    }

    fn take(&mut self, step: &Step, mode: Mode) -> Result<(), StepFault> {
        match step {
            Step::Table(table) => {
                self.nft()?.apply(&[Change::Replace(table.clone())])?;
                self.keep_table(table)
            }
            Step::DropTable(family, name) => {
                self.nft()?.apply(&[Change::Delete(*family, name.clone())])?;
                remove_optional(&self.table_file(*family, name))
            }
            Step::AcceptWithin { bridge, family, on } => Ok(self.nft()?.accept_within(bridge, *family, *on)?),
            Step::Record { name, content: Some(content) } => write_whole(&self.file(name), content),
            Step::Record { name, content: None } => remove_optional(&self.file(name)),
            Step::Filter { link, rules } => self.filter(link, rules.as_ref(), mode),
            _ => Ok(self.link.take(step, mode)?),
        }
    }

    /// The record comes first, so that whoever watches filters without the lock (see [`super::FilterGuard`]) goes by what is
    /// to be.
    fn filter(&mut self, link: &str, rules: Option<&Rules>, mode: Mode) -> Result<(), StepFault> {
        filter::keep(&self.options.run, link, rules)?;
        let gone = mode == Mode::Undo || rules.is_none();
        if gone && !self.link.exists(link)? {
            return Ok(());
        }
        match rules {
            Some(rules) => filter::put(&self.options.run, &mut self.link, link, rules, self.options.say),
            None => Ok(self.link.remove_filter(link)?),
        }
    }

    /// A copy of what is in a table, because only we know how to read it back: for undoing its replacement.
    fn keep_table(&self, table: &Table) -> Result<(), StepFault> {
        let path = self.table_file(table.family, &table.name);
        let text = serde_json::to_string(table)
            .map_err(|error| StepFault::File { path: path.clone(), source: error.into() })?;
        write_whole(&path, &text)
    }

    fn table_file(&self, family: Family, name: &str) -> PathBuf {
        table_file(&self.options.run, family, name)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.options.run.join(name)
    }

    fn nft(&mut self) -> Result<&mut Nft, StepFault> {
        match &mut self.nft {
            Some(nft) => Ok(nft),
            none => Ok(none.insert(Nft::open()?)),
        }
    }
}

pub(super) fn table_file(run: &Path, family: Family, name: &str) -> PathBuf {
    run.join(format!("table-{}-{name}.json", family.name()))
}

fn read(run: &Path, link: &mut Link, nft: Option<&mut Nft>, what: &What) -> Result<State, Error> {
    let wrong = |error: StepFault| Error::Read(Box::new(error));
    let mut state = link.read(what).map_err(|error| wrong(error.into()))?;
    for name in &what.filters {
        if let Some(rules) = filter::look(run, link, name)? {
            state.filters.insert(name.clone(), rules);
        }
    }
    if let Some(nft) = nft.filter(|_| what.tables) {
        let tables = nft.tables().map_err(|error| wrong(error.into()))?;
        for (family, name) in tables.into_iter().filter(|(_, name)| name.starts_with("xen-")) {
            let content = kept(&table_file(run, family, &name))?;
            let content = match content {
                // A name says little: see [`Nft::holds`]. Many guests have many tables; those of others are believed.
                Some(table) if concerns(what, &name) && !nft.holds(&table).map_err(|error| wrong(error.into()))? => {
                    None
                }
                content => content,
            };
            state.tables.push(OurTable { family, name, content });
        }
        state.bridge_netfilter = bridge_netfilter().map_err(|error| wrong(error.into()))?;
        let bridges = state.links.values().any(|link| link.is_bridge());
        if bridges && Path::new("/proc/sys").join(BRIDGE_NETFILTER[0]).exists() {
            state.forward = nft.forward_chains().map_err(|error| wrong(error.into()))?;
        }
        // Those that are to be there, and are not: whoever wants them gone has to forget them too.
        for (family, name) in kept_tables(run)? {
            if state.table(family, &name).is_none() {
                state.tables.push(OurTable { family, name, content: None });
            }
        }
    }
    for name in &what.records {
        if let Some(content) = read_optional(&run.join(name))? {
            state.records.insert(name.clone(), content);
        }
    }
    Ok(state)
}

/// Whether br_netfilter is there and hands over what bridges forward, IPv4 and IPv6.
const BRIDGE_NETFILTER: [&str; 2] = ["net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables"];

fn bridge_netfilter() -> Result<[bool; 2], crate::link::Error> {
    let [v4, v6] = BRIDGE_NETFILTER.map(|path| Ok(crate::link::read_sysctl(path)?.is_some_and(|value| value != "0")));
    Ok([v4?, v6?])
}

/// The tables of which there are copies.
fn kept_tables(run: &Path) -> Result<Vec<(Family, String)>, Error> {
    let named = |file: String| {
        let (family, name) = file.strip_prefix("table-")?.strip_suffix(".json")?.split_once('-')?;
        Some((Family::by_name(family)?, name.to_owned()))
    };
    Ok(record_names(run, "table-")?.into_iter().filter_map(named).collect())
}

/// The copy of a table; none where there is none that makes sense.
fn kept(path: &Path) -> Result<Option<Table>, Error> {
    Ok(read_optional(path)?.and_then(|text| serde_json::from_str(&text).ok()))
}

fn is_table(file: &str) -> bool {
    file.starts_with("table-") && file.ends_with(".json")
}

fn content(path: &Path) -> Result<Option<serde_json::Value>, Error> {
    Ok(read_optional(path)?.and_then(|text| serde_json::from_str(&text).ok()))
}

/// Whether one of our tables names this device.
pub(super) fn is_named_in_tables(run: &Path, device: &str) -> Result<bool, Error> {
    for file in names(run)?.iter().filter(|name| is_table(name)) {
        if content(&run.join(file))?.is_some_and(|content| names_device(&content, device)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether a table has this text anywhere: what a rule compares names with.
fn names_device(content: &serde_json::Value, device: &str) -> bool {
    use serde_json::Value::{Array, Object, String};
    match content {
        String(text) => text == device,
        Array(values) => values.iter().any(|value| names_device(value, device)),
        Object(values) => values.values().any(|value| names_device(value, device)),
        _ => false,
    }
}

fn rename_device(content: &mut serde_json::Value, from: &str, to: &str) {
    use serde_json::Value::{Array, Object, String};
    match content {
        String(text) if text == from => to.clone_into(text),
        Array(values) => values.iter_mut().for_each(|value| rename_device(value, from, to)),
        Object(values) => values.values_mut().for_each(|value| rename_device(value, from, to)),
        _ => {}
    }
}

/// Whether a table is about one of the links that are asked for. network-nat's, which is about all, is only looked up by
/// interfaces: after `nft -f` it says the same in other instructions.
fn concerns(what: &What, table: &str) -> bool {
    what.links.as_ref().is_none_or(|links| links.iter().any(|link| table.ends_with(link.as_str())))
}

/// Reads the network's state without a [`Session`]: without waiting, without repairing, for those who only look.
///
/// # Errors
///
/// When the kernel or the run directory cannot be read.
pub fn look(run: &Path, what: &What) -> Result<State, Error> {
    let mut link = Link::open().map_err(|error| Error::Read(Box::new(error.into())))?;
    let mut nft = match what.tables {
        true => Some(Nft::open().map_err(|error| Error::Read(Box::new(error.into())))?),
        false => None,
    };
    read(run, &mut link, nft.as_mut(), what)
}

/// What was interrupted and waits for the next session to take it back. A run at work looks the same.
///
/// # Errors
///
/// When the run directory cannot be read.
pub fn interrupted(run: &Path) -> Result<Option<String>, Error> {
    Ok(journal::find(&run.join(JOURNAL))?.map(|found| found.journal.title))
}

/// The names of records in a run directory that begin like this.
///
/// # Errors
///
/// When the run directory cannot be read.
pub fn record_names(run: &Path, prefix: &str) -> Result<Vec<String>, Error> {
    let mut names = names(run)?;
    names.retain(|name| name.starts_with(prefix) && name.ends_with(".json"));
    names.sort();
    Ok(names)
}

pub(super) fn names(run: &Path) -> Result<Vec<String>, Error> {
    let error = |source| Error::File { path: run.to_owned(), source };
    let entries = match fs::read_dir(run) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(error)?,
    };
    entries.map(|entry| Ok(entry.map_err(error)?.file_name().to_string_lossy().into_owned())).collect()
}

/// As a killed process ends: nothing is dropped, nothing is flushed.
fn die() -> ! {
    // If even that fails, aborting is the next best.
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    std::process::abort()
}

fn make_dir(dir: &Path) -> Result<(), Error> {
    use std::os::unix::fs::DirBuilderExt as _;

    // Others (dnsmasq) may open a file whose name they know, but not look around.
    let made = fs::DirBuilder::new().recursive(true).mode(0o711).create(dir);
    made.map_err(|source| Error::File { path: dir.to_owned(), source })
}

pub(super) fn read_optional(path: &Path) -> Result<Option<String>, Error> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::File { path: path.to_owned(), source }),
    }
}

/// Writes a file so that it is there as a whole or as it was.
pub(super) fn write_whole(path: &Path, content: &str) -> Result<(), StepFault> {
    let mut name = path.as_os_str().to_owned();
    name.push(DRAFT);
    let draft = PathBuf::from(name);
    fs::write(&draft, content)
        // For dnsmasq, whatever this program was started with; the directory tells nobody what is in it.
        .and_then(|()| fs::set_permissions(&draft, fs::Permissions::from_mode(0o644)))
        .and_then(|()| fs::rename(&draft, path))
        .map_err(|source| StepFault::File { path: path.to_owned(), source })
}

pub(super) fn remove_optional(path: &Path) -> Result<(), StepFault> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(StepFault::File { path: path.to_owned(), source: error })
        }
        _ => Ok(()),
    }
}
