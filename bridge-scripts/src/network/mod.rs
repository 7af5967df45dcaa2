//! The network programs: network-bridge, network-vlan, network-dummy, network-route, network-nat.
//!
//! Each reads words ([`words`]), makes a plan from the machine's state (pure, in [`bridge`], [`vlan`], [`dummy`], [`route`],
//! [`nat`]) and applies it. [`run`] does the whole; other programs may call `start` and `stop` of the modules themselves.

pub mod bridge;
pub mod dummy;
mod forwarding;
mod lease;
mod moving;
pub mod nat;
pub mod owners;
mod record;
mod refusal;
pub mod route;
mod settings;
pub mod status;
#[cfg(test)]
mod tests;
pub mod vlan;
pub mod words;
mod xen3;

use std::path::Path;

use crate::apply::{Error, Options, Session};
use crate::plan::Plan;
use crate::state::{State, What};
use crate::step::Step;
use dummy::DummyRequest;
use nat::NatRequest;
use owners::Owners;
use vlan::VlanRequest;
use words::{Action, Words};

pub use record::{Layout, PREFIX, Record, antispoof};
pub use refusal::Refusal;

/// One of the programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// A card and the machine's addresses become a bridge.
    Bridge,
    /// VLANs of a card, a bridge each.
    Vlan,
    /// Nothing, or a network of guests alone.
    Dummy,
    /// The machine routes for guests.
    Route,
    /// The machine lends guests its address.
    Nat,
}

impl Program {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Bridge, Self::Vlan, Self::Dummy, Self::Route, Self::Nat];

    /// The name it is called by.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bridge => "network-bridge",
            Self::Vlan => "network-vlan",
            Self::Dummy => "network-dummy",
            Self::Route => "network-route",
            Self::Nat => "network-nat",
        }
    }

    /// The program of this name.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|program| program.name() == name)
    }

    /// The keys it knows.
    pub const fn keys(self) -> &'static [&'static str] {
        match self {
            Self::Bridge => &bridge::KEYS,
            Self::Vlan => &vlan::KEYS,
            Self::Dummy => &dummy::KEYS,
            Self::Route => &route::KEYS,
            Self::Nat => &nat::KEYS,
        }
    }
}

/// What was asked, read from words.
enum Request {
    Bridge(bridge::Request),
    Vlan(VlanRequest),
    /// `network-dummy` without words that mean anything: as xend's script, nothing.
    Nothing,
    Dummy(DummyRequest),
    Route(Option<String>),
    Nat(NatRequest),
}

impl Request {
    fn read(program: Program, words: &Words, run: &Path) -> Result<Self, words::Unclear> {
        Ok(match program {
            Program::Bridge => Self::Bridge(bridge::Request::read(words)?),
            Program::Vlan => Self::Vlan(VlanRequest::read(words)?),
            Program::Dummy if words.get("bridge").is_none() && words.get("address").is_none() => Self::Nothing,
            Program::Dummy => Self::Dummy(DummyRequest::read(words)?),
            Program::Route => Self::Route(words.name("netdev")?),
            Program::Nat => Self::Nat(NatRequest::read(words, run)?),
        })
    }

    /// Finds out what links alone do not tell.
    fn look_around(&mut self, state: &State) {
        if let Self::Bridge(request) = self {
            request.owners = Owners::find(state.links.keys().map(String::as_str));
        }
    }

    fn plan(&self, state: &State, start: bool) -> Result<Plan, Refusal> {
        match (self, start) {
            (Self::Nothing, _) => Ok(Plan::new("network-dummy")),
            (Self::Bridge(request), true) => bridge::start(state, request),
            (Self::Bridge(request), false) => bridge::stop(state, request),
            (Self::Vlan(request), true) => vlan::start(state, request),
            (Self::Vlan(request), false) => vlan::stop(state, request),
            (Self::Dummy(request), true) => dummy::start(state, request, true),
            (Self::Dummy(request), false) => dummy::stop(state, request),
            (Self::Route(netdev), true) => route::start(state, netdev.as_ref()),
            (Self::Route(netdev), false) => route::stop(state, netdev.as_ref()),
            (Self::Nat(request), true) => nat::start(state, request),
            (Self::Nat(_), false) => nat::stop(state),
        }
    }

    fn status(&self, state: &State) -> Result<String, Refusal> {
        Ok(match self {
            Self::Nothing => {
                "network-dummy does nothing; with bridge=NAME it makes a network of guests alone\n".to_owned()
            }
            Self::Bridge(request) => status::bridges(state, request.bridge.as_deref()),
            Self::Vlan(_) => status::bridges(state, None),
            Self::Dummy(request) => status::bridges(state, Some(&request.bridge)),
            Self::Route(netdev) => status::routing(state, &route::card(state, netdev.as_ref())?),
            Self::Nat(_) => status::translation(state),
        })
    }
}

/// Runs a program with the words after its name; `print` gets what is to be shown, line by line.
///
/// # Errors
///
/// When nothing was done, and why.
pub fn run(program: Program, words: &[String], options: Options, print: &mut dyn FnMut(&str)) -> Result<(), Refusal> {
    if program == Program::Dummy && !words.iter().any(|word| word.contains('=') || word.starts_with('-')) {
        // xend calls it so, with start, stop or status.
        return Ok(());
    }
    let words = Words::parse(program.name(), words, &Action::ALL, program.keys())?;
    let run = options.run.clone();
    let mut request = Request::read(program, &words, &run)?;
    if words.plan || words.action == Action::Status {
        return look(&words, &mut request, &run, print);
    }
    let mut session = Session::open(options)?;
    if words.action == Action::Confirm {
        let kept = session.confirm()?;
        print(&format!("{} stays", kept.title));
        return Ok(());
    }
    if let Some(pending) = session.pending()? {
        return Err(Error::Unconfirmed { title: pending.title, seconds: pending.seconds }.into());
    }
    let state = read_all(&mut |what| session.read(what), &record_names(&run)?)?;
    request.look_around(&state);
    let mut plan = request.plan(&state, words.action == Action::Start)?;
    let mut applied = carry_out(&mut session, &plan, &state, words.confirm);
    if let (Err(error), Request::Dummy(dummy), Action::Start) = (&applied, &request, words.action)
        && is_no_dummy(error, &plan)
    {
        plan = dummy::start(&state, dummy, false)?;
        applied = carry_out(&mut session, &plan, &state, words.confirm);
    }
    let steps = applied?.steps;
    plan.notes.iter().for_each(|note| print(&format!("note: {note}")));
    match (steps, words.confirm) {
        (0, _) => print("nothing to do"),
        (_, Some(seconds)) => {
            print(&format!("done; it is taken back in {seconds} s unless `network-bridge confirm` comes"));
        }
        (_, None) => (),
    }
    if let (Request::Nat(NatRequest { dhcp: true, .. }), Action::Start) = (&request, words.action) {
        print(&format!("DHCP is dnsmasq's: dnsmasq --conf-file={}", run.join(nat::DNSMASQ).display()));
    }
    Ok(())
}

/// `--plan` and `status`: nothing is changed, not even an interrupted run repaired.
fn look(words: &Words, request: &mut Request, run: &Path, print: &mut dyn FnMut(&str)) -> Result<(), Refusal> {
    let names = record_names(run)?;
    let filters = crate::apply::filtered(run)?;
    let look = &mut |what: &What| crate::apply::look(run, &What { filters: filters.clone(), ..what.clone() });
    let state = read_all(look, &names)?;
    if let Some(title) = crate::apply::interrupted(run)? {
        print(&format!("{title:?} was interrupted: the next program that changes something takes it back first"));
    }
    if let Some(pending) = crate::apply::Pending::find(run)? {
        print(&format!("{:?} waits for `network-bridge confirm`: {} s are left", pending.title, pending.seconds));
    }
    let text = match words.action {
        Action::Status => request.status(&state)?,
        Action::Confirm => "would keep what waits to be confirmed".to_owned(),
        action => {
            request.look_around(&state);
            let plan = request.plan(&state, action == Action::Start)?;
            if plan.is_empty() { format!("{plan}nothing to do") } else { plan.to_string() }
        }
    };
    text.lines().for_each(print);
    Ok(())
}

/// Everything that the programs' plans depend on: all links with all that is on them, all our records, and the sysctls of
/// every link.
fn read_all(read: &mut dyn FnMut(&What) -> Result<State, Error>, records: &[String]) -> Result<State, Error> {
    let links = read(&What { tables: false, ..What::default() })?;
    let names = || links.links.keys().map(String::as_str);
    let mut sysctls = settings::sysctls(names());
    sysctls.extend(forwarding::sysctls(names()));
    read(&What { sysctls, records: records.to_vec(), ..What::everything() })
}

fn record_names(run: &Path) -> Result<Vec<String>, Error> {
    let mut names = vec![forwarding::RECORD.to_owned(), nat::DNSMASQ.to_owned()];
    names.extend(crate::apply::record_names(run, PREFIX)?);
    Ok(names)
}

fn carry_out(
    session: &mut Session,
    plan: &Plan,
    state: &State,
    confirm: Option<u32>,
) -> Result<crate::apply::Report, Error> {
    match confirm {
        Some(seconds) => session.apply_for(plan, state, seconds),
        None => session.apply(plan, state),
    }
}

/// Whether a plan failed because the kernel has no dummy devices.
fn is_no_dummy(error: &Error, plan: &Plan) -> bool {
    let Error::Step { index, .. } = error else { return false };
    let dummy = matches!(plan.steps.get(*index), Some(Step::CreateDummy { .. }));
    dummy && matches!(error.errno(), Some(libc::EOPNOTSUPP))
}
