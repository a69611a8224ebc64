//! The kinds of damage. Each is done to one file; most look at its header to hit what matters, and
//! none needs it to be whole.

use ploop::store::{StoreFile, read_or_zero};

use crate::crash::Rng;

/// Offsets and widths of the header's fields.
const FIELDS: &[(u64, usize)] = &[
    (0, 16),
    (16, 4),
    (20, 4),
    (24, 4),
    (28, 4),
    (32, 4),
    (36, 8),
    (44, 4),
    (48, 4),
    (52, 4),
    (56, 8),
];
/// Bytes of the longest file that damage makes.
const LEN_MAX: u64 = 16 << 20;

struct Patient<'a> {
    file: &'a dyn StoreFile,
    len: u64,
}

impl Patient<'_> {
    fn number(&self, at: u64) -> u32 {
        let mut raw = [0; 4];
        read_or_zero(self.file, &mut raw, at).unwrap();
        u32::from_le_bytes(raw)
    }

    /// Never beyond the end: a longer file is a wound of its own.
    fn put(&self, at: u64, bytes: &[u8]) {
        let room = self.len.saturating_sub(at).min(bytes.len() as u64);
        self.file.write_at(&bytes[..room as usize], at).unwrap();
    }

    fn cluster(&self) -> u64 {
        match u64::from(self.number(28)) * 512 {
            0 => 32_768,
            n => n.min(1 << 20),
        }
    }

    /// The byte of an entry: one that is set, most of the time.
    fn entry(&self, rng: &mut Rng) -> u64 {
        let count = u64::from(self.number(32)).clamp(1, 10_000);
        let any = rng.below(count);
        if rng.below(4) == 0 {
            return 64 + any * 4;
        }
        let all = (0..count).map(|i| 64 + (i + any) % count * 4);
        let mut set = all.filter(|at| self.number(*at) != 0);
        set.next().unwrap_or(64 + any * 4)
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        read_or_zero(self.file, &mut bytes, at).unwrap();
        bytes
    }
}

fn odd_number(p: &Patient<'_>, rng: &mut Rng) -> u32 {
    let clusters = (p.len / p.cluster()) as u32;
    match rng.below(10) {
        0 => 0,
        1 => 1,
        2 => u32::MAX,
        3 => rng.bits() as u32,
        4 => clusters,
        5 => clusters + 1,
        6 => clusters.saturating_sub(1),
        7 => 1 << rng.below(32),
        8 => (rng.below(u64::from(clusters) + 2) * (p.cluster() / 512)) as u32,
        _ => rng.below(u64::from(clusters) + 2) as u32,
    }
}

/// Does one thing to `file`; says what.
pub fn wound(file: &dyn StoreFile, rng: &mut Rng) -> String {
    let p = Patient {
        file,
        len: file.len().unwrap(),
    };
    if p.len == 0 {
        return "nothing: it is empty".into();
    }
    match rng.below(16) {
        0 => flip(&p, rng, 0..64.min(p.len)),
        1 => {
            let at = p.entry(rng);
            flip(&p, rng, at..at + 4)
        }
        2 => {
            let at = rng.below(p.len);
            flip(&p, rng, at..at + 1)
        }
        3 | 4 => {
            let (at, value) = (p.entry(rng), odd_number(&p, rng));
            p.put(at, &value.to_le_bytes());
            format!("entry at {at} is {value:#x}")
        }
        5 | 6 => {
            let (from, to) = (p.entry(rng), p.entry(rng));
            let value = p.number(from);
            p.put(to, &value.to_le_bytes());
            format!("entry at {to} is that at {from}, {value:#x}")
        }
        7 => {
            let (a, b) = (p.entry(rng), p.entry(rng));
            let (x, y) = (p.number(a), p.number(b));
            p.put(a, &y.to_le_bytes());
            p.put(b, &x.to_le_bytes());
            format!("entries at {a} and {b} are exchanged")
        }
        8 => {
            let (at, width) = FIELDS[rng.below(FIELDS.len() as u64) as usize];
            let value = odd_number(&p, rng);
            let mut bytes = value.to_le_bytes().to_vec();
            bytes.resize(width, 0);
            p.put(at, &bytes);
            format!("header field at {at} is {value:#x}")
        }
        9 => {
            let a = FIELDS[rng.below(FIELDS.len() as u64) as usize].0;
            let b = FIELDS[rng.below(FIELDS.len() as u64) as usize].0;
            let (x, y) = (p.number(a), p.number(b));
            p.put(a, &y.to_le_bytes());
            p.put(b, &x.to_le_bytes());
            format!("header fields at {a} and {b} are exchanged")
        }
        10 => {
            let to = match rng.below(3) {
                0 => rng.below(p.len),
                1 => p.len - rng.below(p.cluster().min(p.len)),
                _ => rng.below(p.len / 512 + 1) * 512,
            };
            file.set_len(to).unwrap();
            format!("cut from {} to {to} bytes", p.len)
        }
        11 => {
            let more = match rng.below(3) {
                0 => rng.below(2000),
                1 => p.cluster() * rng.below(4),
                _ => rng.below(4 * p.cluster()),
            };
            let to = (p.len + more).min(LEN_MAX.max(p.len));
            file.set_len(to).unwrap();
            if rng.below(2) == 0 {
                let noise: Vec<u8> = (p.len..to).map(|i| (i * 31) as u8).collect();
                file.write_at(&noise, p.len).unwrap();
            }
            format!("extended from {} to {to} bytes", p.len)
        }
        12 => {
            let unit = [512, p.cluster()][rng.below(2) as usize];
            let places = p.len.div_ceil(unit);
            let (from, to) = (rng.below(places) * unit, rng.below(places) * unit);
            p.put(to, &p.bytes(from, unit as usize));
            format!("{unit} bytes from {from} lie at {to}")
        }
        13 => {
            let at = rng.below(p.len / 512 + 1) * 512;
            let n = 512 << rng.below(8);
            p.put(at, &vec![0; n]);
            format!("{n} zeros at {at}")
        }
        14 => {
            p.put(44, &0x746F_6E59u32.to_le_bytes());
            "marked in use".into()
        }
        _ => {
            let at = u64::from(p.number(56)).saturating_mul(512);
            match at {
                0 => {
                    p.put(44, &0x312E_3276u32.to_le_bytes());
                    let sector = rng.below(p.len / 512 + 1) as u32;
                    p.put(56, &sector.to_le_bytes());
                    format!("an extension at sector {sector}, it says")
                }
                _ => flip(&p, rng, at..at.saturating_add(256)),
            }
        }
    }
}

fn flip(p: &Patient<'_>, rng: &mut Rng, within: std::ops::Range<u64>) -> String {
    let at = within.start + rng.below(within.end - within.start);
    let bit = rng.below(8);
    let byte = p.bytes(at, 1)[0] ^ 1 << bit;
    p.put(at, &[byte]);
    format!("bit {bit} of byte {at} is the other")
}
