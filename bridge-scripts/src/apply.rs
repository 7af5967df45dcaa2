//! Carries out plans: one at a time on a machine, all or nothing.
//!
//! A [`Session`] holds the machine-wide lock. Opening one first takes back what a killed run left unfinished, and what was
//! applied with a time limit and never confirmed. Then a program reads the [`State`], makes its [`Plan`], and applies it:
//!
//! ```no_run
//! use bridge_scripts::apply::{Options, Session};
//! use bridge_scripts::plan::Plan;
//! use bridge_scripts::state::What;
//! use bridge_scripts::step::Step;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut session = Session::open(Options::default())?;
//! let before = session.read(&What::links(["vif1.0"]))?;
//! let mut plan = Plan::new("vif-bridge online vif1.0");
//! plan.push(Step::SetUp { link: "vif1.0".into(), up: true });
//! session.apply(&plan, &before)?;
//! # Ok(())
//! # }
//! ```

mod error;
mod filter;
mod filter_guard;
mod follow;
mod guard;
mod journal;
mod lock;
mod pending;
mod session;
mod watcher;

pub use error::Error;
pub use filter::forget_filters;
pub use filter_guard::FilterGuard;
pub use follow::Follower;
pub use guard::Guard;
pub use journal::Journal;
pub use pending::Pending;
pub use session::{Fault, Options, Report, Restored, Session, interrupted, look, record_names};

pub(crate) use filter::filtered;

pub(crate) use pending::{COMMAND as WAITER, is_due_later, leave_terminal};

use crate::plan::Plan;
use crate::state::{State, What};

/// Opens a [`Session`], reads `what`, makes a plan from it and applies it.
///
/// # Errors
///
/// The plan's own, as `E`, and everything that [`Session`] may say.
pub fn apply<E: From<Error>>(
    options: Options,
    what: &What,
    plan: impl FnOnce(&State) -> Result<Plan, E>,
) -> Result<Report, E> {
    let mut session = Session::open(options)?;
    let before = session.read(what)?;
    let plan = plan(&before)?;
    Ok(session.apply(&plan, &before)?)
}
