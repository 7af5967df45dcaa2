//! Instructions of classic BPF (linux/filter.h) with places to jump to that get their distances at the end.

/// One instruction (struct sock_filter).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    /// What to do.
    pub code: u16,
    /// How far to jump if it is so.
    pub jt: u8,
    /// How far to jump if it is not.
    pub jf: u8,
    /// The operand.
    pub k: u32,
}

impl Instruction {
    /// The bytes of struct sock_filter.
    pub fn bytes(self) -> [u8; 8] {
        let ([a, b], [c, d, e, f]) = (self.code.to_ne_bytes(), self.k.to_ne_bytes());
        [a, b, self.jt, self.jf, c, d, e, f]
    }
}

// BPF_LD, BPF_LDX, BPF_ST, BPF_ALU, BPF_JMP, BPF_RET and BPF_MISC with their modes (linux/bpf_common.h).
const LOAD: u16 = 0x20;
const LOAD_INDEXED: u16 = 0x40;
const HALF: u16 = 0x08;
const BYTE: u16 = 0x10;
const LENGTH: u16 = 0x80;
const CONSTANT: u16 = 0x00;
const LOAD_M: u16 = 0x60;
const STORE_M: u16 = 0x02;
const HEADER_X: u16 = 0xb1;
const AND: u16 = 0x54;
const SUBTRACT: u16 = 0x14;
const MOVE_TO_X: u16 = 0x07;
const MOVE_TO_A: u16 = 0x87;
const JUMP: u16 = 0x05;
const RETURN: u16 = 0x06;

/// A comparison of A.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Is {
    /// With a constant.
    Equal,
    /// The same.
    Greater,
    /// The same.
    AtLeast,
    /// With X.
    AtLeastX,
}

impl Is {
    fn code(self) -> u16 {
        match self {
            Self::Equal => 0x15,
            Self::Greater => 0x25,
            Self::AtLeast => 0x35,
            Self::AtLeastX => 0x3d,
        }
    }
}

/// A place in the code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Label(usize);

#[derive(Debug, Clone, Copy)]
enum Item {
    Plain(Instruction),
    /// Goes on if the comparison turns out like this; else to the label.
    Unless(Is, u32, bool, Label),
    Jump(Label),
    Mark(Label),
}

/// Code being written.
#[derive(Debug, Default)]
pub(super) struct Code {
    items: Vec<Item>,
    labels: usize,
}

impl Code {
    pub(super) fn label(&mut self) -> Label {
        self.labels += 1;
        Label(self.labels - 1)
    }

    /// The label is here.
    pub(super) fn mark(&mut self, label: Label) {
        self.items.push(Item::Mark(label));
    }

    fn plain(&mut self, code: u16, k: u32) {
        self.items.push(Item::Plain(Instruction { code, jt: 0, jf: 0, k }));
    }

    /// A becomes 1, 2 or 4 bytes of the packet, counted from its beginning or from X. They must be there.
    pub(super) fn load(&mut self, at: u32, bytes: usize, from_x: bool) {
        let size = match bytes {
            1 => BYTE,
            2 => HALF,
            _ => 0,
        };
        self.plain(size | if from_x { LOAD_INDEXED } else { LOAD }, at);
    }

    /// A becomes something that is known of the packet (SKF_AD_*).
    pub(super) fn load_about(&mut self, what: u32) {
        /// SKF_AD_OFF.
        const ABOUT: u32 = 0xffff_f000;
        self.plain(LOAD, ABOUT + what);
    }

    /// A becomes the packet's length.
    pub(super) fn load_length(&mut self) {
        self.plain(LENGTH, 0);
    }

    pub(super) fn load_constant(&mut self, k: u32) {
        self.plain(CONSTANT, k);
    }

    pub(super) fn load_memory(&mut self, place: u32) {
        self.plain(LOAD_M, place);
    }

    pub(super) fn store_memory(&mut self, place: u32) {
        self.plain(STORE_M, place);
    }

    /// X becomes the length of the IPv4 header that begins there. The byte must be there.
    pub(super) fn header_length_to_x(&mut self, at: u32) {
        self.plain(HEADER_X, at);
    }

    pub(super) fn and(&mut self, mask: u32) {
        self.plain(AND, mask);
    }

    pub(super) fn subtract(&mut self, k: u32) {
        self.plain(SUBTRACT, k);
    }

    pub(super) fn move_to_x(&mut self) {
        self.plain(MOVE_TO_X, 0);
    }

    pub(super) fn move_to_a(&mut self) {
        self.plain(MOVE_TO_A, 0);
    }

    /// Goes on if the comparison is true, else there.
    pub(super) fn unless(&mut self, is: Is, k: u32, to: Label) {
        self.items.push(Item::Unless(is, k, true, to));
    }

    /// Goes on if the comparison is false, else there.
    pub(super) fn when(&mut self, is: Is, k: u32, to: Label) {
        self.items.push(Item::Unless(is, k, false, to));
    }

    pub(super) fn jump(&mut self, to: Label) {
        self.items.push(Item::Jump(to));
    }

    pub(super) fn answer(&mut self, k: u32) {
        self.plain(RETURN, k);
    }

    /// The instructions; `None` if something jumps back, or nowhere.
    pub(super) fn finish(&self) -> Option<Vec<Instruction>> {
        // A conditional jump reaches 255 instructions; a longer one needs a second instruction. Each round finds some that
        // are near enough, which brings others nearer.
        let mut short = vec![false; self.items.len()];
        loop {
            let (places, marks) = self.places(&short);
            let mut changed = false;
            for (index, item) in self.items.iter().enumerate() {
                if let Item::Unless(.., to) = item
                    && !short[index]
                    && marks[to.0]?.checked_sub(places[index] + 1)? <= 255
                {
                    short[index] = true;
                    changed = true;
                }
            }
            if !changed {
                return self.emit(&short, &places, &marks);
            }
        }
    }

    /// Where each item is, and each label.
    fn places(&self, short: &[bool]) -> (Vec<usize>, Vec<Option<usize>>) {
        let (mut at, mut places, mut marks) = (0, Vec::with_capacity(self.items.len()), vec![None; self.labels]);
        for (item, short) in self.items.iter().zip(short) {
            places.push(at);
            match item {
                Item::Mark(label) => marks[label.0] = Some(at),
                Item::Unless(..) if !short => at += 2,
                _ => at += 1,
            }
        }
        (places, marks)
    }

    fn emit(&self, short: &[bool], places: &[usize], marks: &[Option<usize>]) -> Option<Vec<Instruction>> {
        let mut code = Vec::new();
        let far = |from: usize, to: Label| u32::try_from(marks[to.0]?.checked_sub(from + 1)?).ok();
        for (index, item) in self.items.iter().enumerate() {
            let at = places[index];
            match item {
                Item::Plain(instruction) => code.push(*instruction),
                Item::Mark(_) => {}
                Item::Jump(to) => code.push(Instruction { code: JUMP, jt: 0, jf: 0, k: far(at, *to)? }),
                Item::Unless(is, k, wanted, to) => {
                    let near = if short[index] { u8::try_from(far(at, *to)?).ok()? } else { 0 };
                    let on = if short[index] { 0 } else { 1 };
                    let (jt, jf) = if *wanted { (on, near) } else { (near, on) };
                    code.push(Instruction { code: is.code(), jt, jf, k: *k });
                    if !short[index] {
                        code.push(Instruction { code: JUMP, jt: 0, jf: 0, k: far(at + 1, *to)? });
                    }
                }
            }
        }
        Some(code)
    }
}
