//! Many histories: all short ones, and long ones by seed.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use super::bench::{Aim, What};
use super::checker::{Class, Finding};
use super::plan::{ALPHABET, LONGEST, Op, Plan};
use super::plant::{Bug, both_get_the_lock};
use super::random::{Path, Random, mix};
use super::world::{Outcome, World};

/// Histories after which all queues are built anew: what came before one reaches no further back.
const BLOCK: u64 = 256;

/// What goes wrong in enumerated histories: nothing, or one operation of the disk. With the letters that name it.
const FAULTS: [(&str, Option<Aim>); 4] = [
    ("none", None),
    ("flush1", Some(Aim { what: What::Flush, after: 0, errno: Some(libc::EIO) })),
    ("flush2", Some(Aim { what: What::Flush, after: 1, errno: Some(libc::EIO) })),
    ("write1", Some(Aim { what: What::Write, after: 0, errno: Some(libc::EIO) })),
];

/// What was done, and what was found.
#[derive(Debug, Clone, Default)]
pub struct Totals {
    /// Sequences of requests that were enumerated.
    pub sequences: u64,
    /// Sequences, with what fails in them, of which only the first orders were tried.
    pub capped: u64,
    /// Histories.
    pub histories: u64,
    /// Power cuts and deaths.
    pub crashes: (u64, u64),
    /// By number of requests.
    pub lengths: Vec<u64>,
    /// Histories in which something failed, and in which a flush did.
    pub faulty: (u64, u64),
    /// Seeds: the first, and the one after the last.
    pub seeds: Option<(u64, u64)>,
    /// Findings by class.
    pub found: BTreeMap<Class, u64>,
}

impl Totals {
    /// Crashes of both kinds.
    pub fn all_crashes(&self) -> u64 {
        self.crashes.0 + self.crashes.1
    }

    fn count(&mut self, length: usize, outcome: &Outcome) {
        self.histories += 1;
        self.crashes.0 += outcome.crashes.0;
        self.crashes.1 += outcome.crashes.1;
        self.faulty.0 += u64::from(outcome.failures.0 > 0);
        self.faulty.1 += u64::from(outcome.failures.1 > 0);
        self.lengths.resize(LONGEST + 1, 0);
        self.lengths[length] += 1;
        if let Some(finding) = &outcome.finding {
            *self.found.entry(finding.class).or_default() += 1;
        }
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "histories   {:>12}", self.histories)?;
        if self.sequences > 0 {
            writeln!(
                f,
                "  enumerated sequences {:>12}, of {} cases only the first orders",
                self.sequences, self.capped
            )?;
        }
        if let Some((first, end)) = self.seeds {
            writeln!(f, "  seeds                {first}..{end}")?;
        }
        writeln!(f, "  with a failed operation {:>9}, with a failed flush {}", self.faulty.0, self.faulty.1)?;
        let band = |from: usize, to: usize| self.lengths.iter().take(to + 1).skip(from).sum::<u64>();
        write!(f, "  by number of requests: ")?;
        for (from, to) in [(1, 1), (2, 2), (3, 3), (4, 6), (7, 12), (13, LONGEST)] {
            let name = if from == to { from.to_string() } else { format!("{from}-{to}") };
            write!(f, " {name}: {}", band(from, to))?;
        }
        writeln!(
            f,
            "\ncrashes     {:>12} ({} power cuts, {} kills)",
            self.all_crashes(),
            self.crashes.0,
            self.crashes.1
        )?;
        for class in Class::ALL {
            writeln!(f, "{class:<20}{:>4}", self.found.get(&class).copied().unwrap_or(0))?;
        }
        Ok(())
    }
}

/// A history in which something is wrong.
#[derive(Debug, Clone)]
pub struct Failure {
    /// What replays it: see [`Explorer::replay`].
    pub id: String,
    /// What is wrong.
    pub finding: Finding,
}

/// Plays histories on machines that it keeps.
#[derive(Debug, Default)]
pub struct Explorer {
    worlds: HashMap<(usize, bool, u64), World>,
    bug: Option<Bug>,
    two_guests: bool,
    /// What was done so far.
    pub totals: Totals,
}

impl Explorer {
    /// With or without a bug.
    ///
    /// # Panics
    /// When there is no room for the file that two guests would share.
    pub fn new(bug: Option<Bug>) -> Self {
        let two_guests = bug == Some(Bug::LockOnPath) && both_get_the_lock(true).expect("a temporary file");
        Self { bug, two_guests, ..Self::default() }
    }

    /// Lets two guests write if blkback's own lock does.
    ///
    /// # Errors
    /// When there is no room for the file that two guests would share.
    pub fn with_real_lock() -> std::io::Result<Self> {
        Ok(Self { two_guests: both_get_the_lock(false)?, ..Self::default() })
    }

    fn world(&mut self, plan: &Plan) -> &mut World {
        let Plan { lanes, persistent, unit, .. } = *plan;
        let bug = self.bug;
        self.worlds.entry((lanes, persistent, unit)).or_insert_with(|| World::new(lanes, persistent, unit, bug))
    }

    /// Plays the history of a seed.
    ///
    /// # Errors
    /// What is wrong.
    pub fn seed(&mut self, seed: u64) -> Result<(), Failure> {
        self.play_seed(seed, false).map(drop)
    }

    fn play_seed(&mut self, seed: u64, trace: bool) -> Result<String, Failure> {
        if seed.is_multiple_of(BLOCK) {
            self.worlds.values_mut().for_each(World::connect);
        }
        let mut dice = Random::new(seed);
        let mut plan = Plan::random(&mut dice);
        if self.two_guests {
            plan.lanes = plan.lanes.max(2);
            plan.intruder = true;
        }
        let world = self.world(&plan);
        let outcome = world.play(&plan, &mut Random::new(mix(seed)), dice, None, trace);
        let text = world.take_trace();
        let seeds = self.totals.seeds.get_or_insert((seed, seed));
        seeds.1 = seed + 1;
        self.totals.count(plan.ops.len(), &outcome);
        match outcome.finding {
            Some(finding) if !trace => Err(Failure { id: seed.to_string(), finding }),
            _ => Ok(format!("{plan}\n{text}")),
        }
    }

    /// Plays all sequences of `length` requests of the alphabet, on one or two queues, in all orders of completion, with
    /// nothing going wrong and with each of a few things; where `eager`, queues run whenever they can, else their turns
    /// are choices too, and from three requests on nothing goes wrong. Of a sequence with more than `most` orders only the first are tried.
    ///
    /// # Errors
    /// The first that is wrong.
    pub fn enumerate(&mut self, length: usize, eager: bool, most: u64) -> Result<(), Failure> {
        let letters = 2 * ALPHABET.len();
        // Which queue comes first makes no difference.
        for sequence in 0..ALPHABET.len() * letters.pow(length as u32 - 1) {
            let letter = |nth: u32| sequence / letters.pow(nth) % letters;
            let ops: Vec<(usize, Op)> = (0..length as u32)
                .map(|nth| {
                    let letter = letter(length as u32 - 1 - nth);
                    (letter / ALPHABET.len(), ALPHABET[letter % ALPHABET.len()])
                })
                .collect();
            let flushes = ops.iter().any(|(_, op)| op.is_barrier() || matches!(op, Op::Flush | Op::FlushWrite(_)));
            let writes = ops.iter().any(|(_, op)| op.writes().is_some());
            let plan = Plan { eager, ..Plan::of(2, ops) };
            for (fault, aim) in FAULTS {
                // Too many otherwise: each ends with new queues.
                if aim.is_some() && !eager && length > 2 {
                    continue;
                }
                let happens = aim.is_none_or(|aim| if aim.what == What::Flush { flushes } else { writes });
                if happens {
                    self.orders(&plan, (fault, aim), most)?;
                }
            }
            self.totals.sequences += 1;
        }
        Ok(())
    }

    fn orders(&mut self, plan: &Plan, (fault, aim): (&str, Option<Aim>), most: u64) -> Result<(), Failure> {
        let mut path = Path::default();
        let mut orders = 0;
        loop {
            let outcome = self.world(plan).play(plan, &mut path, Random::new(orders), aim, false);
            self.totals.count(plan.ops.len(), &outcome);
            if let Some(finding) = outcome.finding {
                return Err(Failure { id: name(plan, fault, orders, &path), finding });
            }
            orders += 1;
            if !path.step() {
                return Ok(());
            }
            if orders == most {
                self.totals.capped += 1;
                return Ok(());
            }
        }
    }

    /// Plays one history again and says what happens in it. `id` is a seed, or what names an enumerated history.
    ///
    /// # Errors
    /// When it is neither.
    pub fn replay(bug: Option<Bug>, id: &str) -> Result<String, String> {
        let mut explorer = Self::new(bug);
        if let Ok(seed) = id.parse::<u64>() {
            // What came before it in its block is part of it.
            for before in seed / BLOCK * BLOCK..seed {
                // Its own finding is not what was asked for.
                let _ = explorer.seed(before);
            }
            return explorer.play_seed(seed, true).map_err(|failure| failure.finding.text);
        }
        let wrong = || format!("{id:?} is neither a seed nor an enumerated history, as eager/0a1c/none/7/0.1.0");
        let (plan, aim, dice, mut path) = parse(id).ok_or_else(wrong)?;
        let world = explorer.world(&plan);
        world.play(&plan, &mut path, Random::new(dice), aim, true);
        Ok(world.take_trace())
    }
}

/// An enumerated history in one word: how turns are chosen, each request's queue and letter, what fails, the seed of its
/// dice, the choices.
fn name(plan: &Plan, fault: &str, dice: u64, path: &Path) -> String {
    let letter = |op: &Op| ALPHABET.iter().position(|known| known == op).unwrap_or(0) as u8 + b'a';
    let ops: String = plan.ops.iter().map(|(lane, op)| format!("{lane}{}", char::from(letter(op)))).collect();
    let choices: Vec<String> = path.choices().iter().map(u16::to_string).collect();
    format!("{}/{ops}/{fault}/{dice}/{}", if plan.eager { "eager" } else { "lazy" }, choices.join("."))
}

fn parse(id: &str) -> Option<(Plan, Option<Aim>, u64, Path)> {
    let mut parts = id.split('/');
    let eager = match parts.next()? {
        "eager" => true,
        "lazy" => false,
        _ => return None,
    };
    let (pairs, _) = parts.next()?.as_bytes().as_chunks::<2>();
    let op = |[lane, letter]: &[u8; 2]| {
        let lane = usize::from(lane.wrapping_sub(b'0'));
        Some((lane, *ALPHABET.get(usize::from(letter.wrapping_sub(b'a')))?)).filter(|_| lane < 2)
    };
    let ops = pairs.iter().map(op).collect::<Option<Vec<_>>>()?;
    let fault = parts.next()?;
    let (_, aim) = FAULTS.into_iter().find(|(name, _)| *name == fault)?;
    let dice = parts.next()?.parse().ok()?;
    let choices = parts.next()?.split('.').map(|choice| choice.parse().ok()).collect::<Option<Vec<u16>>>()?;
    Some((Plan { eager, ..Plan::of(2, ops) }, aim, dice, Path::of(&choices)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
    fn names_of_enumerated_histories_come_back() {
        let mut path = Path::of(&[1, 0, 2]);
        for _ in 0..3 {
            super::super::random::Choose::pick(&mut path, 3);
        }
        let plan = Plan { eager: true, ..Plan::of(2, vec![(0, ALPHABET[0]), (1, ALPHABET[7])]) };
        let id = name(&plan, "flush2", 5, &path);
        assert_eq!(id, "eager/0a1h/flush2/5/1.0.2");
        let (again, aim, dice, _) = parse(&id).unwrap();
        assert_eq!((again.ops, aim.unwrap().after, dice, again.eager), (plan.ops, 1, 5, true));
        assert!(parse("eager/0z/1/0").is_none() && parse("x").is_none());
    }
}
