//! Whole documents in, values or named refusals out, and back.

mod refusals;
mod round_trip;
mod tree;

use super::*;
use crate::error::Kind;

const BASE: &str = "{11111111-1111-4111-8111-111111111111}";
const SNAP: &str = "{22222222-2222-4222-8222-222222222222}";
const TOP: &str = "{5fbaabe3-6958-40ff-92a7-860e329aab41}";
const NONE: &str = "{00000000-0000-0000-0000-000000000000}";
const OTHER: &str = "{99999999-9999-4999-8999-999999999999}";

/// Three images, exactly as OpenVZ's tool lays the file out.
const DOC: &str = r#"<?xml version="1.0"?>
<Virtuozzo_disk_image>
  <Disk_Parameters>
    <Disk_size>20480</Disk_size>
    <Cylinders>40</Cylinders>
    <Heads>16</Heads>
    <Sectors>32</Sectors>
    <Padding>0</Padding>
  </Disk_Parameters>
  <StorageData>
    <Storage>
      <Start>0</Start>
      <End>20480</End>
      <Blocksize>2048</Blocksize>
      <Image>
        <GUID>{11111111-1111-4111-8111-111111111111}</GUID>
        <Type>Compressed</Type>
        <File>root.hds</File>
      </Image>
      <Image>
        <GUID>{22222222-2222-4222-8222-222222222222}</GUID>
        <Type>Compressed</Type>
        <File>a &amp; b.hds</File>
      </Image>
      <Image>
        <GUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</GUID>
        <Type>Compressed</Type>
        <File>top.hds</File>
      </Image>
    </Storage>
  </StorageData>
  <Snapshots>
    <TopGUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</TopGUID>
    <Shot>
      <GUID>{11111111-1111-4111-8111-111111111111}</GUID>
      <ParentGUID>{00000000-0000-0000-0000-000000000000}</ParentGUID>
      <Temporary/>
    </Shot>
    <Shot>
      <GUID>{22222222-2222-4222-8222-222222222222}</GUID>
      <ParentGUID>{11111111-1111-4111-8111-111111111111}</ParentGUID>
    </Shot>
    <Shot>
      <GUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</GUID>
      <ParentGUID>{22222222-2222-4222-8222-222222222222}</ParentGUID>
    </Shot>
  </Snapshots>
</Virtuozzo_disk_image>
"#;

fn guid(text: &str) -> Guid {
    Guid::parse(text).unwrap()
}

/// The document with the first `from` replaced; `from` must be there.
fn with(from: &str, to: &str) -> String {
    assert!(DOC.contains(from), "{from}");
    DOC.replacen(from, to, 1)
}

fn read(doc: impl AsRef<[u8]>) -> Descriptor {
    let d = parse(doc.as_ref()).unwrap();
    assert_eq!(parse(&d.to_xml()).unwrap(), d, "written and read again");
    d
}

fn doc() -> Descriptor {
    read(DOC)
}

fn text(d: &Descriptor) -> String {
    String::from_utf8(d.to_xml()).unwrap()
}

fn files(d: &Descriptor, node: &str) -> Vec<String> {
    d.chain(guid(node))
        .unwrap()
        .iter()
        .map(|image| image.file.clone())
        .collect()
}

#[test]
fn what_openvz_wrote_is_read_and_written_back_byte_for_byte() {
    let d = doc();
    assert_eq!(d.disk_sectors, Some(20480));
    assert_eq!(
        d.chs,
        Chs {
            cylinders: Some(40),
            heads: Some(16),
            sectors: Some(32)
        }
    );
    assert_eq!((d.start, d.end), (Some(0), Some(20480)));
    assert_eq!((d.cluster_sectors, d.preallocated), (2048, false));
    assert_eq!(d.top, Guid::TOP);
    assert_eq!(d.shots[0].temporary, Temporary::Temporary);
    assert_eq!(d.image(guid(SNAP)).unwrap().file, "a & b.hds");
    assert_eq!(files(&d, TOP), ["root.hds", "a & b.hds", "top.hds"]);
    assert_eq!(text(&d), DOC);
}

#[test]
fn the_spellings_that_openvz_reads_mean_the_same() {
    let plain = doc();
    let missing_top = with(&format!("<TopGUID>{TOP}</TopGUID>"), "");
    let upper = DOC
        .replace("{5fba", "{5FBA")
        .replacen("aab41}", "AAB41}", 2);
    let same = [
        missing_top,
        upper,
        with("<Blocksize>2048<", "<Blocksize>0x800<"),
        with("<Blocksize>2048<", "<Blocksize>0X800<"),
        with("<Blocksize>2048<", "<Blocksize>04000<"),
        with("<Blocksize>2048<", "<Blocksize>\n  2048\t<"),
        with("<Type>Compressed</Type>", ""),
        with("<Padding>0</Padding>", ""),
        with("<Padding>0<", "<Padding>00<"),
        with("<Start>", "<Preallocated>0</Preallocated><Start>"),
        with("<Heads>", "<Max_delta_size>0</Max_delta_size><Heads>"),
        with(
            "<Storage>",
            "stray <Storage kind='x'><!-- <Image> is not here -->",
        ),
        with("root.hds", "<![CDATA[root]]>&#46;&#x68;ds"),
        with("root.hds", "ro<!-- x -->ot<?pi y?>.hds"),
        with("<Temporary/>", "<Temporary>why</Temporary>"),
        with("</GUID>", "</GUID><Comment>x</Comment>"),
        with("<Storage>", "<Vendor/><Storage>"),
        with("<Snapshots>", "<Vendor/><Snapshots>"),
        with("<?xml version=\"1.0\"?>\n", ""),
        with("\"1.0\"?", "\"1.0\" encoding=\"utf-8\"?"),
        with(
            "\"1.0\"?",
            "\"1.0\" encoding='ISO-8859-1' standalone='yes'?",
        ),
        format!("\u{feff}{}", DOC.replace('\n', "\r\n")),
        DOC.lines().map(str::trim).collect::<String>(),
    ];
    for doc in same {
        assert_eq!(read(&doc), plain, "{doc}");
    }
}

#[test]
fn order_and_top_are_taken_as_they_are() {
    let d = read(DOC.replace(TOP, OTHER));
    assert_eq!(d.top, guid(OTHER));
    let (a, b) = (guid(BASE), guid(SNAP));
    let mut reversed = doc();
    reversed.images.reverse();
    reversed.shots.reverse();
    let d = read(reversed.to_xml());
    assert_eq!(files(&d, TOP), ["root.hds", "a & b.hds", "top.hds"]);
    assert_eq!(d.children(Guid::NONE), [a]);
    assert_eq!(d.children(a), [b]);
    assert_eq!(d.children(Guid::TOP), []);
}

#[test]
fn a_disk_from_before_snapshots_has_its_one_shot_implied() {
    let one = |guid: &str, snapshots: &str| {
        format!(
            "<d><Disk_Parameters/><StorageData><Storage><Blocksize>64</Blocksize><Image>\
             <GUID>{guid}</GUID><File>/vz/root.hds</File></Image></Storage></StorageData>\
             {snapshots}</d>"
        )
    };
    for snapshots in [
        "<Snapshots/>",
        &format!("<Snapshots><TopGUID>{TOP}</TopGUID></Snapshots>"),
    ] {
        let d = read(one(TOP, snapshots));
        assert_eq!(files(&d, TOP), ["/vz/root.hds"]);
        assert_eq!((d.disk_sectors, d.end, d.chs), (None, None, Chs::default()));
        assert_eq!(d.shots.len(), 1);
    }
    let top = format!("<Snapshots><TopGUID>{OTHER}</TopGUID></Snapshots>");
    assert_eq!(files(&read(one(OTHER, &top)), OTHER), ["/vz/root.hds"]);
    assert_eq!(
        parse(one(OTHER, "<Snapshots/>").as_bytes())
            .unwrap_err()
            .kind(),
        Kind::Corrupt
    );
}

#[test]
fn one_plain_label_makes_the_base_raw() {
    assert!(!doc().base_is_raw());
    let base_only = read(with("Compressed", "Plain"));
    let all = read(DOC.replace("Compressed", "Plain"));
    assert!(base_only.base_is_raw() && all.base_is_raw());
    assert_eq!(all.images[2].kind, ImageKind::Plain);
    let both =
        with("Compressed", "Plain").replace("<Start>", "<Preallocated>1</Preallocated><Start>");
    assert!(
        parse(both.as_bytes())
            .unwrap_err()
            .what()
            .contains("Preallocated")
    );
}

#[test]
fn volumes_and_keys_are_handed_on() {
    let volume = format!(
        "<Volume><Parent>../a&lt;b</Parent><SnapshotGUID>{OTHER}</SnapshotGUID>\
         <ReadOnly>0</ReadOnly></Volume><Storage>"
    );
    let outer = with("<Storage>", &volume).replace(NONE, OTHER);
    let d = read(outer);
    let v = d.volume.as_ref().unwrap();
    assert_eq!(v.parent.as_deref(), Some("../a<b"));
    assert_eq!(v.snapshot_guid, Some(guid(OTHER)));
    assert!(v.read_only);
    assert_eq!(d.chain(Guid::TOP).unwrap().len(), 3);
    assert_eq!(d.outer_parent(Guid::TOP).unwrap(), Some(guid(OTHER)));
    assert_eq!(doc().outer_parent(Guid::TOP).unwrap(), None);
    let d = read(with("<Storage>", "<Volume/><Storage>"));
    assert_eq!(d.volume, Some(Volume::default()));

    let key = "<Encryption><Data>x</Data><KeyId>key-1</KeyId></Encryption></Disk_P";
    let d = read(with("</Disk_P", key));
    assert_eq!(d.encryption_key(), Some("key-1"));
    assert!(text(&d).contains("<Data>x</Data>"));
    let none = read(with(
        "</Disk_P",
        "<Encryption><KeyId/></Encryption></Disk_P",
    ));
    assert_eq!(none.encryption_key(), None);
}

#[test]
fn what_other_products_added_survives_a_rewrite() {
    let d = read(
        with(
            "<Virtuozzo_disk_image>",
            "<Parallels_disk_image\n Version=\"1.0\" x='a&amp;b'>",
        )
        .replace("</Virtuozzo_disk_image>", "</Parallels_disk_image >")
        .replace(
            "<Padding>",
            "<Misc a='1'><B>&#233;<!-- c --></B>\r\n</Misc><Padding>",
        )
        .replace("<Start>", "<Note>é</Note><Start>")
        .replace("<TopGUID>", "<Saved><![CDATA[<Shot>]]></Saved><TopGUID>")
        .replace("<Storage>", "<Gone/><Storage>"),
    );
    let out = text(&d);
    for kept in [
        "<Parallels_disk_image\n Version=\"1.0\" x='a&amp;b'>",
        "</Parallels_disk_image>",
        "<Misc a='1'><B>&#233;<!-- c --></B>\r\n</Misc>",
        "<Saved><![CDATA[<Shot>]]></Saved>",
    ] {
        assert!(out.contains(kept), "{kept} in {out}");
    }
    assert!(!out.contains("Gone"));
    // Where OpenVZ's tool takes everything for another image, there is nothing else.
    let order = |a: &str, b: &str| assert!(out.find(a).unwrap() < out.find(b).unwrap(), "{out}");
    order("<Note>é</Note>", "<Image>");
    order("<Saved>", "<Shot>\n");
}
