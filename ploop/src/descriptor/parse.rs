//! Elements to [`Descriptor`]: which element stands where, and what its text means.
//!
//! As lenient as OpenVZ's tool and no more: it ignores the root's name, unknown elements in places
//! where more elements may come, attributes and stray text; it takes everything after the first
//! `Image` or `Shot` for another one. Where it would take the first of two contradicting elements
//! we refuse. Every refusal names the element and its offset.

use std::borrow::Cow;

use super::tree::Place;
use super::xml::{self, Element, RESTORE};
use super::{
    CLUSTER_SECTORS, Chs, Defect, Descriptor, Encryption, Foreign, Guid, Image, ImageKind,
    MAX_IMAGES, MAX_SECTORS, Shot, Temporary, Volume, shown,
};
use crate::error::{Error, Result};

/// Reads a DiskDescriptor.xml.
///
/// Errors name the element and the byte offset; the caller adds the file with
/// [`Error::on`]. [`Kind::Corrupt`](crate::error::Kind::Corrupt) for what contradicts the format,
/// [`Kind::Unsupported`](crate::error::Kind::Unsupported) for what is sound but not handled: UTF-16,
/// split disks, clusters that are no power of two, more than [`MAX_IMAGES`] images.
pub fn parse(bytes: &[u8]) -> Result<Descriptor> {
    let root = xml::read(bytes)?;
    let parameters = required(&root, "Disk_Parameters")?;
    let data = required(&root, "StorageData")?;
    let snapshots = required(&root, "Snapshots")?;
    let (storage, volume) = storage_data(data)?;

    let mut d = Descriptor {
        disk_sectors: None,
        max_delta_sectors: None,
        chs: Chs::default(),
        start: None,
        end: None,
        cluster_sectors: 0,
        preallocated: false,
        images: Vec::new(),
        shots: Vec::new(),
        top: Guid::TOP,
        encryption: None,
        volume: volume.map(read_volume).transpose()?,
        root: root.tag.to_owned(),
        foreign: Foreign::default(),
    };
    read_parameters(parameters, &mut d)?;
    let images = read_storage(storage, &mut d)?;
    let (mut shots, top) = read_snapshots(snapshots, &mut d)?;

    // Disks from before snapshots existed: one image, no shot.
    if d.shots.is_empty() && d.images.len() == 1 {
        d.shots.push(Shot {
            guid: d.top,
            parent: Guid::NONE,
            temporary: Temporary::No,
        });
        shots.push(snapshots.at);
    }
    if let Some((place, defect)) = d.defect() {
        let at = match place {
            Place::Image(i) => images.get(i).copied(),
            Place::Shot(i) => shots.get(i).copied(),
            Place::Top => Some(top),
            Place::Preallocated => one(storage, "Preallocated")?.map(|e| e.at),
            Place::Encryption => one(parameters, "Encryption")?.map(|e| e.at),
            Place::Volume => volume.map(|v| v.at),
            Place::Cluster => one(storage, "Blocksize")?.map(|e| e.at),
            Place::Size => one(parameters, "Disk_size")?.map(|e| e.at),
        };
        return Err(defect.at(at.unwrap_or(root.at)).fix(RESTORE));
    }
    Ok(d)
}

/// `Storage`, and `Volume` if it is there.
fn storage_data<'e, 'a>(
    data: &'e Element<'a>,
) -> Result<(&'e Element<'a>, Option<&'e Element<'a>>)> {
    let mut storage = None;
    for child in &data.children {
        match (child.name, storage) {
            ("Storage", None) => storage = Some(child),
            ("Storage", Some(_)) => {
                let what = "a second <Storage>: the disk is split over several files";
                let fix = "Join it with the tool that made it";
                return Err(Error::unsupported(what).at(child.at).fix(fix));
            }
            (_, Some(_)) => return Err(misplaced(child, "after <Storage>")),
            (_, None) => {}
        }
    }
    let storage = storage.ok_or_else(|| missing(data, "Storage"))?;
    Ok((storage, one(data, "Volume")?))
}

fn read_parameters(parameters: &Element<'_>, d: &mut Descriptor) -> Result<()> {
    let mut seen = Once::default();
    for child in &parameters.children {
        let mut known = true;
        match child.name {
            "Disk_size" => d.disk_sectors = Some(sectors(child)?),
            "Max_delta_size" => d.max_delta_sectors = Some(sectors(child)?).filter(|&n| n != 0),
            "Cylinders" => d.chs.cylinders = Some(number(child)?),
            "Heads" => d.chs.heads = Some(number(child)?),
            "Sectors" => d.chs.sectors = Some(number(child)?),
            "Padding" => {
                if number(child).map_err(|e| e.with_defect(Defect::Padding))? != 0 {
                    return Err(bad(Defect::Padding, child, "must be 0"));
                }
            }
            "Encryption" => d.encryption = Some(read_encryption(child)?),
            _ => known = false,
        }
        match known {
            true => seen.note(child)?,
            false => d.foreign.parameters.push(child.raw.to_owned()),
        }
    }
    Ok(())
}

fn read_encryption(element: &Element<'_>) -> Result<Encryption> {
    let mut encryption = Encryption::default();
    let mut seen = Once::default();
    for child in &element.children {
        if child.name == "KeyId" {
            seen.note(child)?;
            let key = text(child)?.into_owned();
            encryption.key_id = Some(key).filter(|key| !xml::is_white(key));
        } else {
            encryption.foreign.push(child.raw.to_owned());
        }
    }
    Ok(encryption)
}

fn read_volume(element: &Element<'_>) -> Result<Volume> {
    Ok(Volume {
        parent: one(element, "Parent")?
            .map(text)
            .transpose()?
            .map(Cow::into_owned),
        snapshot_guid: one(element, "SnapshotGUID")?.map(guid).transpose()?,
        // Its presence says it, whatever it holds.
        read_only: one(element, "ReadOnly")?.is_some(),
    })
}

/// Returns the offset of each image.
fn read_storage(storage: &Element<'_>, d: &mut Descriptor) -> Result<Vec<u64>> {
    let mut offsets = Vec::new();
    let mut seen = Once::default();
    let mut cluster = None;
    for child in &storage.children {
        if child.name == "Image" {
            room_for(&offsets, child)?;
            offsets.push(child.at);
            d.images.push(read_image(child)?);
            continue;
        }
        if !offsets.is_empty() {
            return Err(misplaced(child, "after the first <Image>"));
        }
        match child.name {
            "Start" => d.start = Some(sectors(child)?),
            "End" => d.end = Some(sectors(child)?),
            "Blocksize" => cluster = Some(blocksize(child)?),
            "Preallocated" => {
                d.preallocated = match number(child)? {
                    0 => false,
                    1 => true,
                    _ => return Err(bad(Defect::BadNumber, child, "must be 0 or 1")),
                }
            }
            _ => {
                d.foreign.storage.push(child.raw.to_owned());
                continue;
            }
        }
        seen.note(child)?;
    }
    d.cluster_sectors = cluster.ok_or_else(|| missing(storage, "Blocksize"))?;
    if offsets.is_empty() {
        return Err(missing(storage, "Image"));
    }
    Ok(offsets)
}

fn blocksize(element: &Element<'_>) -> Result<u32> {
    let value = number(element).map_err(|e| e.with_defect(Defect::BadBlocksize))?;
    let (min, max) = CLUSTER_SECTORS.into_inner();
    if value == 0 || value > max {
        let must = format!("must be from {min} to {max} sectors");
        return Err(bad(Defect::BadBlocksize, element, must));
    }
    if value < min || !value.is_power_of_two() {
        let what = format!(
            "<Blocksize> is {value} sectors; only powers of two from {min} to {max} are supported"
        );
        return Err(Error::unsupported(what).at(element.at));
    }
    Ok(value as u32)
}

fn read_image(element: &Element<'_>) -> Result<Image> {
    let kind = match one(element, "Type")? {
        None => ImageKind::Compressed,
        Some(child) => match xml::trim(&text(child)?) {
            "Plain" => ImageKind::Plain,
            "Compressed" => ImageKind::Compressed,
            _ => return Err(bad(Defect::BadType, child, "must be Plain or Compressed")),
        },
    };
    let guid = guid(required(element, "GUID")?)?;
    let file = text(required(element, "File")?)?.into_owned();
    Ok(Image { guid, kind, file })
}

/// Returns the offset of each shot, and of what says which one is the top.
fn read_snapshots(snapshots: &Element<'_>, d: &mut Descriptor) -> Result<(Vec<u64>, u64)> {
    let mut offsets = Vec::new();
    let mut seen = Once::default();
    let mut top = snapshots.at;
    for child in &snapshots.children {
        if child.name == "Shot" {
            room_for(&offsets, child)?;
            offsets.push(child.at);
            d.shots.push(read_shot(child)?);
        } else if !offsets.is_empty() {
            return Err(misplaced(child, "after the first <Shot>"));
        } else if child.name == "TopGUID" {
            seen.note(child)?;
            d.top = guid(child)?;
            top = child.at;
        } else {
            d.foreign.snapshots.push(child.raw.to_owned());
        }
    }
    Ok((offsets, top))
}

fn read_shot(element: &Element<'_>) -> Result<Shot> {
    let mut temporary = Temporary::No;
    for (name, mark) in Temporary::ELEMENTS {
        if let Some(child) = one(element, name)? {
            if temporary != Temporary::No {
                return Err(misplaced(child, "beside another mark of the same <Shot>"));
            }
            temporary = mark;
        }
    }
    Ok(Shot {
        guid: guid(required(element, "GUID")?)?,
        parent: guid(required(element, "ParentGUID")?)?,
        temporary,
    })
}

fn room_for(offsets: &[u64], child: &Element<'_>) -> Result<()> {
    if offsets.len() < MAX_IMAGES {
        return Ok(());
    }
    let what = format!("more than {MAX_IMAGES} <{}> elements", child.name);
    Err(Error::unsupported(what)
        .at(child.at)
        .fix("Merge snapshots with the tool that made them"))
}

/// The known elements that a parent has shown, to refuse the second of a kind. A handful.
#[derive(Default)]
struct Once<'a>(Vec<&'a str>);

impl<'a> Once<'a> {
    fn note(&mut self, child: &Element<'a>) -> Result<()> {
        if self.0.contains(&child.name) {
            return Err(twice(child));
        }
        self.0.push(child.name);
        Ok(())
    }
}

fn one<'e, 'a>(parent: &'e Element<'a>, name: &str) -> Result<Option<&'e Element<'a>>> {
    let mut found = parent.children.iter().filter(|child| child.name == name);
    let first = found.next();
    found.next().map_or(Ok(first), |second| Err(twice(second)))
}

fn required<'e, 'a>(parent: &'e Element<'a>, name: &str) -> Result<&'e Element<'a>> {
    one(parent, name)?.ok_or_else(|| missing(parent, name))
}

/// The text of an element that can hold nothing else.
fn text<'e>(element: &'e Element<'_>) -> Result<Cow<'e, str>> {
    match element.children.first() {
        None => Ok(Cow::Borrowed(&element.text)),
        Some(child) => {
            let what = format!(
                "<{}> inside <{}>, which holds text",
                xml::clip(child.name),
                element.name
            );
            Err(Defect::UnexpectedElement.refuse(what).at(child.at))
        }
    }
}

fn guid(element: &Element<'_>) -> Result<Guid> {
    Guid::read(xml::trim(&text(element)?))
        .ok_or_else(|| bad(Defect::BadGuid, element, "is not a GUID"))
}

/// A number as C reads it: decimal, 0x hexadecimal, or octal after a 0. No sign, nothing after it.
fn number(element: &Element<'_>) -> Result<u64> {
    let text = text(element)?;
    let text = xml::trim(&text);
    let (digits, radix) = if let Some(hex) = text.strip_prefix("0x").or(text.strip_prefix("0X")) {
        (hex, 16)
    } else if text.len() > 1 && text.starts_with('0') {
        (text, 8)
    } else {
        (text, 10)
    };
    if digits.is_empty() || !digits.chars().all(|c| c.is_digit(radix)) {
        return Err(bad(Defect::BadNumber, element, "is not a number"));
    }
    u64::from_str_radix(digits, radix)
        .map_err(|_| bad(Defect::BadNumber, element, "is beyond 64 bits"))
}

/// A number of sectors, as bytes within what a file offset can say.
fn sectors(element: &Element<'_>) -> Result<u64> {
    let value = number(element)?;
    if value > MAX_SECTORS {
        return Err(bad(
            Defect::BadNumber,
            element,
            "is more sectors than a disk can have",
        ));
    }
    Ok(value)
}

fn bad(defect: Defect, element: &Element<'_>, must: impl std::fmt::Display) -> Error {
    let value = shown(&element.text);
    defect
        .refuse(format!("<{}> {value} {must}", element.name))
        .at(element.at)
        .fix(RESTORE)
}

fn missing(parent: &Element<'_>, name: &str) -> Error {
    let parent_name = xml::clip(parent.name);
    Defect::MissingElement
        .refuse(format!("<{parent_name}> has no <{name}>"))
        .at(parent.at)
        .fix(RESTORE)
}

fn twice(second: &Element<'_>) -> Error {
    Defect::UnexpectedElement
        .refuse(format!("a second <{}> in the same place", second.name))
        .at(second.at)
        .fix("Remove the wrong one")
}

fn misplaced(child: &Element<'_>, place: &str) -> Error {
    let what = format!(
        "<{}> {place}: OpenVZ's tool cannot read it there",
        xml::clip(child.name)
    );
    Defect::UnexpectedElement
        .refuse(what)
        .at(child.at)
        .fix("Move it before, or remove it")
}
