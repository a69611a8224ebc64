//! Anything in: no panic. Anything accepted: the same again after being written.

use proptest::prelude::*;

use super::super::*;
use super::with;

/// Reads what may be anything. What is accepted must survive being written.
fn survive(bytes: &[u8]) {
    if let Ok(d) = parse(bytes) {
        assert!(d.check().is_ok());
        for shot in &d.shots {
            d.chain(shot.guid).unwrap();
        }
        assert_eq!(parse(&d.to_xml()).unwrap(), d);
    }
}

#[test]
fn no_truncation_and_no_changed_byte_does_harm() {
    let small: String = with("<Padding>", "<V a='1'><![CDATA[x]]>&#65;</V><Padding>")
        .lines()
        .map(str::trim)
        .collect();
    for end in 0..small.len() {
        assert!(parse(&small.as_bytes()[..end]).is_err(), "cut at {end}");
    }
    let mut bytes = small.clone().into_bytes();
    for at in 0..bytes.len() {
        let old = bytes[at];
        let flips = (0..8).map(|bit| old ^ 1 << bit);
        for new in flips.chain(*b"<>&;/!?'\"]-= \n\0\xff").collect::<Vec<u8>>() {
            bytes[at] = new;
            survive(&bytes);
        }
        bytes[at] = old;
    }
}

fn any_text() -> impl Strategy<Value = String> {
    "[ -~é€😀\u{2028}]{1,40}".prop_filter("not blank", |text| !text.trim().is_empty())
}

prop_compose! {
    fn any_descriptor()(
        n in 1usize..12,
        files in prop::collection::btree_set(any_text(), 12),
        seeds in prop::collection::vec(any::<(u16, u8, bool)>(), 12),
        numbers in prop::array::uniform6(prop::option::of(0..MAX_SECTORS)),
        shift in 6u32..=17,
        texts in prop::option::of((any_text(), any_text())),
        top_is_usual in any::<bool>(),
        order in any::<(bool, bool)>(),
    ) -> Descriptor {
        let guids: Vec<Guid> = (1..=n as u128).map(|i| Guid::from_bytes(i.to_be_bytes())).collect();
        let mut d = Descriptor::new_single(64, 1 << shift, false, Guid::TOP, "x").unwrap();
        [d.disk_sectors, d.max_delta_sectors, d.start, d.end, d.chs.heads, d.chs.sectors] = numbers;
        d.max_delta_sectors = d.max_delta_sectors.filter(|&m| m != 0);
        (d.images, d.shots) = (Vec::new(), Vec::new());
        let marks = [Temporary::No, Temporary::Temporary, Temporary::Zero, Temporary::ZeroSwap];
        for (i, file) in files.into_iter().take(n).enumerate() {
            let last = i == n - 1;
            let guid = if last && top_is_usual { Guid::TOP } else { guids[i] };
            let (parent, mark, plain) = seeds[i];
            let kind = if plain { ImageKind::Plain } else { ImageKind::Compressed };
            let parent = if i == 0 { Guid::NONE } else { guids[parent as usize % i] };
            let temporary = if last { Temporary::No } else { marks[mark as usize % 4] };
            d.images.push(Image { guid, kind, file });
            d.shots.push(Shot { guid, parent, temporary });
            d.top = guid;
        }
        d.preallocated = !d.base_is_raw();
        if let Some((key, parent)) = texts {
            d.encryption = Some(Encryption { key_id: Some(key), foreign: Vec::new() });
            let snapshot_guid = Some(guids[0]);
            d.volume = Some(Volume { parent: Some(parent), snapshot_guid, read_only: order.0 });
        }
        if order.0 { d.images.reverse(); }
        if order.1 { d.shots.reverse(); }
        d
    }
}

proptest! {
    #[test]
    fn every_disk_is_read_back_as_it_was_written(d in any_descriptor()) {
        d.check().unwrap();
        prop_assert_eq!(parse(&d.to_xml()).unwrap(), d);
    }

    #[test]
    fn random_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        survive(&bytes);
    }

    #[test]
    fn random_markup_does_no_harm(
        parts in prop::collection::vec(prop::sample::select(vec![
            "<a>", "</a>", "<a/>", "<Storage>", "</Storage>", "<!--", "-->", "<![CDATA[", "]]>",
            "&lt;", "&#65;", "&", ";", "<?xml version='1.0'?>", "<?", "?>", "<!", "x", " ", "'",
            "<a b='", "=", ">", "<", "é", "\u{feff}",
        ]), 0..40),
    ) {
        survive(parts.concat().as_bytes());
        survive(with("<Storage>", &format!("{}<Storage>", parts.concat())).as_bytes());
        survive(with("root.hds", &parts.concat()).as_bytes());
    }
}
