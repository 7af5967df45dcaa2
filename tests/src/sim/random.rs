//! Chance, the same for the same seed on every machine.

/// SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// From a seed; neighbouring seeds give unrelated numbers.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0xd134_2543_de82_ef95))
    }

    /// The next 64 bits.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        // The bias of 2^-32 and less is nothing here.
        ((self.draw() >> 32) * limit) >> 32
    }

    /// True once in `n` times; never for 0.
    pub fn once_in(&mut self, n: u64) -> bool {
        n > 0 && self.below(n) == 0
    }
}

/// Spreads a number over all 64 bits.
pub fn mix(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

/// Who decides what happens next.
pub trait Choose {
    /// A number below `count`, which is not 0.
    fn pick(&mut self, count: usize) -> usize;
}

impl Choose for Random {
    fn pick(&mut self, count: usize) -> usize {
        self.below(count as u64) as usize
    }
}

/// One path through a tree of choices; [`step`](Self::step) goes to the path after it, until all have been walked.
#[derive(Debug, Clone, Default)]
pub struct Path {
    /// What was chosen, of how many.
    choices: Vec<(u16, u16)>,
    at: usize,
}

impl Path {
    /// The path that begins with these choices.
    pub fn of(choices: &[u16]) -> Self {
        Self { choices: choices.iter().map(|&choice| (choice, u16::MAX)).collect(), at: 0 }
    }

    /// What was chosen so far.
    pub fn choices(&self) -> Vec<u16> {
        self.choices[..self.at].iter().map(|(choice, _)| *choice).collect()
    }

    /// The next path, depth first. False when there is none.
    pub fn step(&mut self) -> bool {
        self.choices.truncate(self.at);
        self.at = 0;
        while let Some((choice, count)) = self.choices.pop() {
            if choice + 1 < count {
                self.choices.push((choice + 1, count));
                return true;
            }
        }
        false
    }
}

impl Choose for Path {
    fn pick(&mut self, count: usize) -> usize {
        if self.at == self.choices.len() {
            self.choices.push((0, count as u16));
        }
        self.choices[self.at].1 = count as u16;
        self.at += 1;
        usize::from(self.choices[self.at - 1].0).min(count - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_walked_once_and_whole() {
        let mut path = Path::default();
        let mut seen = Vec::new();
        loop {
            let first = path.pick(2);
            let second = if first == 0 { path.pick(3) } else { 9 };
            seen.push((first, second));
            if !path.step() {
                break;
            }
        }
        assert_eq!(seen, [(0, 0), (0, 1), (0, 2), (1, 9)]);
    }
}
