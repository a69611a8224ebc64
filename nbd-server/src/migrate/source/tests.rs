use super::course::{Course, Then};
use super::pieces::{BLOCK, REGION, ZEROS_MIN};
use super::*;
use crate::migrate::wire::tests::{hears, said};

const SIZE: u64 = 64 << 20;

fn dirty(ranges: &[(u64, u64)]) -> Bitmap {
    let bits = Bitmap::new(SIZE, GRANULE).unwrap();
    for (start, len) in ranges {
        bits.set(&(start * GRANULE..(start + len) * GRANULE));
    }
    bits
}

/// Bytes that are set, in their order.
fn runs(bits: &Bitmap) -> Vec<(u64, u64)> {
    let set = bits.runs(0..bits.size()).filter(|r| r.1);
    set.map(|(r, _)| (r.start, r.end - r.start)).collect()
}

#[test]
fn what_was_written_is_sent_once_in_pieces_and_the_cold_first() {
    let bits = dirty(&[(0, 1), (3, 100), (200, 17), (1023, 1)]);
    let heat: HashMap<u64, u32> = (2..4).map(|r| (r, 3)).chain([(0, 1), (13, 7)]).collect();
    for heat in [&HashMap::new(), &heat] {
        let pieces = order(&bits, heat);
        let warm = |at: u64| heat.get(&(at / REGION)).copied().unwrap_or(0);
        let again = Bitmap::new(SIZE, GRANULE).unwrap();
        for (start, len) in &pieces {
            assert!((1..=PIECE).contains(len), "{start} {len}");
            assert!(
                again.runs(*start..start + len).all(|(_, set)| !set),
                "twice"
            );
            again.set(&(*start..start + len));
            let granules = (*start..start + len).step_by(GRANULE as usize);
            assert!(granules.into_iter().all(|g| warm(g) == warm(*start)));
        }
        assert_eq!(runs(&again), runs(&bits));
        assert!(pieces.is_sorted_by_key(|p| warm(p.0)));
    }
    assert!(order(&dirty(&[]), &heat).is_empty());
}

#[test]
fn what_is_written_in_each_round_grows_warm_and_what_rests_is_cold() {
    // In granules; of each region one is enough.
    let region = REGION / GRANULE;
    let first = heat(&dirty(&[(2 * region - 1, 2)]), &HashMap::new());
    assert_eq!(first, HashMap::from([(1, 1), (2, 1)]));
    let second = heat(&dirty(&[(2 * region, region + 1)]), &first);
    assert!(second[&2] > second[&3] && second[&3] == 1);
    assert!(!second.contains_key(&1));
}

#[test]
fn stretches_are_all_of_it_and_zeros_only_where_there_are() {
    let (block, many) = (BLOCK, ZEROS_MIN / BLOCK);
    let layouts: [&[(usize, u8)]; 8] = [
        &[],
        &[(block, 0)],
        &[(100, 0)],
        &[(many * block, 0), (block, 1)],
        &[(block, 1), ((many - 1) * block, 0), (block, 1)],
        &[(block, 1), (many * block, 0), (100, 1)],
        &[(block - 1, 0), (1, 1), (2 * many * block, 0)],
        &[(many * block, 1), (many * block, 0), (77, 0)],
    ];
    for layout in layouts {
        let parts = layout.iter().map(|(len, byte)| vec![*byte; *len]);
        let buf: Vec<u8> = parts.flatten().collect();
        let mut at = 0;
        let mut last = None;
        for (len, zeros) in stretches(&buf) {
            assert!(len > 0 && last != Some(zeros), "{layout:?}");
            let part = &buf[at..at + len];
            if zeros {
                assert!(part.iter().all(|b| *b == 0), "{layout:?}");
                assert!(len >= ZEROS_MIN.min(buf.len()), "{layout:?}");
            } else {
                let mut rest = part.chunks(ZEROS_MIN);
                assert!(part.len() < ZEROS_MIN || rest.any(|c| c.iter().any(|b| *b != 0)));
            }
            at += len;
            last = Some(zeros);
        }
        assert_eq!(at, buf.len(), "{layout:?}");
    }
}

/// Rounds that leave what `left` says, of their number and of what clients are let write, until they end.
fn course(brake: bool, left: &dyn Fn(u64, u64) -> u64) -> (Then, u64) {
    let (mut course, mut braked) = (Course::new(brake), u64::MAX);
    for round in 1.. {
        match course.after(left(round, braked), 10 << 20, Duration::from_millis(20)) {
            Then::Again => {}
            Then::Brake(rate) => {
                assert!(
                    rate < braked,
                    "clients are slowed down to {rate} from {braked}"
                );
                braked = rate;
            }
            end => return (end, round),
        }
        assert!(round < 1000, "it does not end");
    }
    unreachable!()
}

#[test]
fn rounds_have_an_end_whatever_is_written() {
    let never: [&dyn Fn(u64, u64) -> u64; 4] = [
        // A link so slow that even what is let through is too much; one that jumps; one that falters.
        &|_, _| 1 << 30,
        &|_, brake| (1 << 20) + brake / 2,
        &|round, _| (1 << 20) << (round % 3),
        &|round, _| (1 << 30) - round,
    ];
    for (n, left) in never.into_iter().enumerate() {
        for brake in [true, false] {
            assert_eq!(course(brake, left).0, Then::Never, "{n} {brake}");
        }
    }
    // Each leaves a tenth; and what is let through, of a link that it fits at last.
    assert_eq!(
        course(false, &|round, _| (1 << 40) >> (4 * round)).0,
        Then::Fits
    );
    assert_eq!(
        course(true, &|_, brake| brake.min(1 << 30) / 8).0,
        Then::Fits
    );
}

/// Goal: the destination has every bit, and the gap is for those alone that are new. Method: bits that
/// are sent while others are set.
#[test]
fn bits_are_sent_once() {
    let (id, sent) = (Id::random(), Bitmap::new(SIZE, GRANULE).unwrap());
    let (there, mut room) = (Bitmap::new(SIZE, GRANULE).unwrap(), RUNS_MAX);
    let bits = dirty(&[(0, 3), (5, 1), (100, 1000)]);
    for (more, come) in [
        (None, vec![(0, 3), (5, 1), (100, 1000)]),
        (Some((2, 6)), vec![(3, 2), (6, 2)]),
        (Some((5000, 10)), vec![(5000, 10)]),
        (None, vec![]),
    ] {
        if let Some((start, len)) = more {
            bits.set(&(start * GRANULE..(start + len) * GRANULE));
        }
        let mut wire = hears(&said(|wire| {
            pieces::bits(wire, id, &bits, &sent, &mut room).unwrap();
        }));
        assert_eq!(wire.read().unwrap(), Type::Bits);
        assert_eq!(wire.payload()[..16], id.0);
        let at = (16..wire.payload().len()).step_by(16);
        let runs = at.map(|at| (wire.number(at).unwrap(), wire.number(at + 8).unwrap()));
        let runs: Vec<_> = runs.inspect(|(s, l)| there.set(&(*s..s + l))).collect();
        let come: Vec<_> = come
            .iter()
            .map(|(s, l)| (s * GRANULE, l * GRANULE))
            .collect();
        assert_eq!(runs, come);
        assert_eq!(self::runs(&there), self::runs(&bits));
    }
    assert_eq!(room, RUNS_MAX - 6 * 16);
    // A bit more than there is room for.
    bits.set(&(9000 * GRANULE..9001 * GRANULE));
    said(|wire| {
        let e = pieces::bits(wire, id, &bits, &sent, &mut 8).unwrap_err();
        assert_eq!(e.kind(), Kind::Unsupported);
    });
}
