//! What is not read, and what is said about it.

use super::super::*;
use super::{BASE, DOC, NONE, OTHER, SNAP, TOP, guid, read, text, with};
use crate::error::Kind;

/// Each change of the document, and words of the refusal.
fn refused(cases: &[(&str, &str, &str)]) {
    for (from, to, words) in cases {
        refused_whole(&with(from, to), words);
    }
}

fn refused_whole(doc: &str, words: &str) {
    let e = parse(doc.as_bytes()).expect_err(words);
    assert!(
        matches!(e.kind(), Kind::Corrupt | Kind::Unsupported),
        "{e:?}"
    );
    assert!(e.what().contains(words), "{words}: {e}");
    assert!(e.offset().is_some_and(|at| at < doc.len() as u64), "{e}");
}

#[test]
fn a_tree_that_does_not_hang_together_is_refused() {
    refused(&[
        (BASE, TOP, "two <Image>"),
        (NONE, OTHER, "the parent of snapshot {1111"),
        (NONE, SNAP, "cycle"),
        (NONE, BASE, "cycle"),
        (BASE, NONE, "none"),
        (BASE, OTHER, "snapshot {1111"),
        (BASE, "{not-a-guid}", "“{not-a-guid}” is not a GUID"),
        ("top.hds", "root.hds", "“root.hds”"),
    ]);
    let top = format!("TopGUID>{TOP}");
    refused_whole(&with(&top, &format!("TopGUID>{OTHER}")), "the top {9999");
    let shot = format!("<Shot>\n      <GUID>{BASE}");
    refused_whole(&with(&shot, &format!("<Shot><GUID>{SNAP}")), "two <Shot>");
    let shots = DOC.find("    <Shot>").unwrap()..DOC.find("  </Snap").unwrap();
    refused_whole(&with(&DOC[shots.clone()], ""), "no <Shot>");
    let one = shots.start..DOC.find("</Shot>").unwrap() + "</Shot>".len();
    refused_whole(&with(&DOC[one], "").replacen(BASE, NONE, 2), "none");
    let marked = DOC.replace("</ParentGUID>", "</ParentGUID><TemporaryZero/>");
    refused_whole(&marked.replace("<Temporary/>", ""), "marked for removal");
}

#[test]
fn elements_that_are_missing_twice_there_or_in_the_wrong_place_are_refused() {
    refused(&[
        (
            "<Temporary/>",
            "<Temporary/><TemporaryZero/>",
            "<TemporaryZero>",
        ),
        ("</Storage>", "</Storage><Storage/>", "split"),
        (
            "</Storage>",
            "</Storage><Volume/>",
            "<Volume> after <Storage>",
        ),
        (
            "</Image>",
            "</Image><Note/>",
            "<Note> after the first <Image>",
        ),
        (
            "</Image>",
            "</Image><Start>0</Start>",
            "<Start> after the first <Image>",
        ),
        ("</Shot>", "</Shot><Note/>", "<Note> after the first <Shot>"),
        ("<Heads>", "<Heads>1</Heads><Heads>", "a second <Heads>"),
        ("<Start>", "<Start>0</Start><Start>", "a second <Start>"),
        ("<TopGUID>", "<TopGUID>0</TopGUID><TopGUID>", "<TopGUID>"),
        (
            "<Snapshots>",
            "<Snapshots/><Snapshots>",
            "a second <Snapshots>",
        ),
        (
            "<Storage>",
            "<Volume><Parent/></Volume><Storage>",
            "<Parent> is empty",
        ),
        (
            "<Storage>",
            "<Volume/><Volume/><Storage>",
            "a second <Volume>",
        ),
        ("root.hds", "root<b/>.hds", "<b> inside <File>"),
    ]);
    for (name, words) in [
        ("Disk_Parameters", "no <Disk_Parameters>"),
        ("StorageData", "no <StorageData>"),
        ("Storage", "no <Storage>"),
        ("Blocksize", "no <Blocksize>"),
        ("Image", "no <Image>"),
        ("File", "no <File>"),
        ("GUID", "no <GUID>"),
        ("Snapshots", "no <Snapshots>"),
        ("ParentGUID", "no <ParentGUID>"),
    ] {
        let renamed = DOC.replace(&format!("<{name}>"), "<Foo>");
        refused_whole(&renamed.replace(&format!("</{name}>"), "</Foo>"), words);
    }
}

#[test]
fn values_that_mean_nothing_are_refused() {
    refused(&[
        ("root.hds", "", "<File> is empty"),
        ("root.hds", " \t", "<File> is empty"),
        ("root.hds", "root&#10;.hds", "U+000A"),
        ("root.hds", "root\n.hds", "U+000A"),
        ("root.hds", "root\u{85}.hds", "U+0085"),
        ("root.hds", "root&#0;.hds", "&#0;"),
        ("root.hds", "root&#x1b;.hds", "&#x1b;"),
        ("Compressed", "Encrypted", "“Encrypted”"),
        ("<Padding>0", "<Padding>8", "<Padding> “8” must be 0"),
        (
            "<Disk_size>20480",
            "<Disk_size>99999999999999999999",
            "64 bits",
        ),
        (
            "<Disk_size>20480",
            "<Disk_size>0xffffffffffffff",
            "more sectors",
        ),
        ("<Start>", "<Preallocated>2</Preallocated><Start>", "0 or 1"),
    ]);
    for (value, words) in [
        ("0", "“0”"),
        ("", "is not a number"),
        ("64 sectors", "“64 sectors” is not a number"),
        ("-64", "is not a number"),
        ("+64", "is not a number"),
        ("6_4", "is not a number"),
        ("0x", "is not a number"),
        ("089", "is not a number"),
        ("63", "powers of two"),
        ("32", "powers of two"),
        ("262144", "131072"),
    ] {
        refused_whole(
            &with("Blocksize>2048<", &format!("Blocksize>{value}<")),
            words,
        );
    }
}

#[test]
fn an_error_says_where() {
    let doc = format!("\u{feff}{}", with("<Blocksize>2048", "<Blocksize>x"));
    let e = parse(doc.as_bytes()).unwrap_err();
    assert_eq!(e.offset(), Some(doc.find("<Blocksize>").unwrap() as u64));
    let doc = with(SNAP, "{oops}");
    let e = parse(doc.as_bytes()).unwrap_err();
    assert_eq!(e.offset(), Some(doc.find("<GUID>{oops}").unwrap() as u64));
}

#[test]
fn what_is_no_harmless_xml_is_refused_by_name() {
    let utf16: Vec<u8> = DOC.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let zeros = vec![0; 4096];
    let nested = format!("<a>{}", "<a>".repeat(100_000));
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("empty", Vec::new()),
        ("U+0000", zeros),
        ("UTF-16", utf16.clone()),
        ("UTF-16", [&[0xff, 0xfe], &utf16[..]].concat()),
        (
            "not valid UTF-8",
            DOC.replace("root", "r\u{1}")
                .replace('\u{1}', "\u{7f}")
                .into_bytes(),
        ),
        ("U+FEFF", format!("\u{feff}\u{feff}{DOC}").into_bytes()),
        (
            "encoding “KOI8-R”",
            with("\"1.0\"?", "\"1.0\" encoding=\"KOI8-R\"?").into(),
        ),
        (
            "encoding “UTF-16”",
            with("\"1.0\"?", "\"1.0\" encoding=\"UTF-16\"?").into(),
        ),
        ("version 1.0", with("\"1.0\"", "\"2.0\"").into()),
        ("at the start", format!(" {DOC}").into()),
        (
            "DOCTYPE",
            with("<Virt", "<!DOCTYPE d SYSTEM 'http://x.invalid/d'><Virt").into(),
        ),
        (
            "DOCTYPE",
            with("<Virt", "<!DOCTYPE d [<!ENTITY e 'x'>]><Virt").into(),
        ),
        ("&e;", with("root.hds", "&e;").into()),
        ("attribute", with("<Storage>", "<Storage a='&e;'>").into()),
        (
            "attribute",
            with("<Storage>", "<Storage a='1' a='2'>").into(),
        ),
        ("attribute", with("<Storage>", "<Storage a='<'>").into()),
        ("attribute", with("<Storage>", "<Storage a>").into()),
        ("deeper than 32", nested.into()),
        (
            "longer than 4096",
            with("root.hds", &"x".repeat(5000)).into(),
        ),
        (
            "longer than 4096",
            with("root.hds", &"<![CDATA[xxxx]]>&lt;".repeat(1000)).into(),
        ),
        (
            "start tag of",
            with("<Storage>", &format!("<Storage a='{}'>", "x".repeat(5000))).into(),
        ),
        (
            "elements",
            with("<Padding>", &format!("{}<Padding>", "<a/>".repeat(1 << 18))).into(),
        ),
        ("are not read", vec![b' '; MAX_BYTES + 1]),
        ("outside of the root", format!("{DOC}x").into()),
        ("second root", format!("{DOC}<a/>").into()),
        ("no element", b"<!-- nothing -->".to_vec()),
        (
            "ends inside <Storage>",
            DOC[..DOC.find("</Storage>").unwrap()].into(),
        ),
        ("not well-formed", DOC[..DOC.len() - 2].into()),
        ("not well-formed", with("</Storage>", "</Store>").into()),
        ("not well-formed", with("root.hds", "a & b").into()),
        ("not the name", with("<Storage>", "<1/><Storage>").into()),
    ];
    for (words, mut doc) in cases {
        if words == "not valid UTF-8" {
            let at = doc.iter().position(|&b| b == 0x7f).unwrap();
            doc[at] = 0x80;
        }
        let e = parse(&doc).expect_err(words);
        assert!(e.what().contains(words), "{words}: {e}");
        assert!(
            e.what().len() < 1000,
            "an error is a message, not a copy of the file"
        );
    }
    assert_eq!(parse(&utf16).unwrap_err().kind(), Kind::Unsupported);
}

#[test]
fn as_many_images_as_allowed_and_not_one_more() {
    let mut d = Descriptor::new_single(20480, 2048, false, Guid::TOP, "0").unwrap();
    while d.images.len() < MAX_IMAGES {
        let n = d.images.len();
        let becomes = Guid::from_bytes((n as u128).to_be_bytes());
        // What push_overlay does, without its checks against all the others.
        d.images.last_mut().unwrap().guid = becomes;
        d.shots.last_mut().unwrap().guid = becomes;
        let kind = ImageKind::Compressed;
        d.images.push(Image {
            guid: Guid::TOP,
            kind,
            file: n.to_string(),
        });
        d.shots.push(Shot {
            guid: Guid::TOP,
            parent: becomes,
            temporary: Temporary::No,
        });
    }
    assert_eq!(read(d.to_xml()).chain(Guid::TOP).unwrap().len(), MAX_IMAGES);
    assert_eq!(
        d.push_overlay(guid(OTHER), "x").unwrap_err().kind(),
        Kind::Unsupported
    );
    let xml = text(&d).replacen("<Image>", "<Image><GUID/></Image><Image>", 1);
    assert!(parse(xml.as_bytes()).is_err());
    d.images.push(Image {
        guid: guid(OTHER),
        kind: ImageKind::Compressed,
        file: "x".into(),
    });
    let e = parse(&d.to_xml()).unwrap_err();
    assert_eq!(e.kind(), Kind::Unsupported, "{e}");
}
