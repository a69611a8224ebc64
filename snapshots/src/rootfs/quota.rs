//! User and group quota of ext4, kept in the file system itself (the feature `quota`): the kernel
//! counts in every mount, and needs no quota file and no quotacheck. Limits are the owner's to set,
//! inside (`setquota`).
//!
//! Counting is not yet enforcing: that takes mount options, which whoever mounts the disk may not
//! know of. So they stand in the superblock, as defaults; `-o noquota` overrules them.
//!
//! The feature comes last, when every inode has its owner: tune2fs counts what is there.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use ploop::error::{Error, Kind, Result};

use super::ext4::Superblock;
use super::gpt::Gpt;
use super::grow::{split, what_is_there};
use super::script::Script;
use super::tool;

/// `s_mount_opts`: text, ended by a zero byte.
const MOUNT_OPTIONS_AT: u64 = 1024 + 512;
const MOUNT_OPTIONS: usize = 64;

/// Turns user and group quota on in the ext4 of the raw disk in the file `image`: in partition 1,
/// or on the whole disk. Returns the file system's first byte. Blocking; durable on return. Needs
/// no privilege but to write the file, which nobody else may use. After an error the file is to be
/// thrown away.
///
/// Errors: `Unsupported` for anything but ext4, `Corrupt` for a damaged partition table or file
/// system, `NoSpace` when it has no block left for the counts.
pub fn add_quota(image: &Path) -> Result<u64> {
    let file = File::open(image).map_err(|e| Error::io("open", image, e))?;
    let offset = match Gpt::read(&file, image)? {
        None => 0,
        Some(gpt) => {
            let part = gpt.partition(0).map(|p| p.offset);
            part.ok_or_else(|| refused("a partition table without partition 1", image))?
        }
    };
    if Superblock::read(&file, image, offset)?.is_none() {
        return Err(refused(what_is_there(&file, offset), image));
    }
    let (dir, name) = split(image)?;
    let name = format!("{name}?offset={offset}");
    let checked = tool::run_on(image, "e2fsck", &["-fp", &name], dir)?;
    // 1: what was found was repaired.
    if !matches!(checked.code, Some(0 | 1)) {
        let error = tool::failed("e2fsck", image, &checked);
        return Err(Error::corrupt(error.what())
            .on(image)
            .fix("Attach the disk that it comes from, and check that: e2fsck -f DEVICE"));
    }
    turn_on(dir, &name, image, offset)?;
    let checked = tool::run_on(image, "e2fsck", &["-fn", &name], dir)?;
    if checked.code != Some(0) {
        return Err(tool::failed("e2fsck", image, &checked));
    }
    file.sync_all().map_err(|e| Error::io("sync", image, e))?;
    Ok(offset)
}

/// Counts what the clean file system `name` (as e2fsprogs write it) in `dir` holds, and turns the
/// feature on.
pub(super) fn turn_on(dir: &Path, name: &str, image: &Path, offset: u64) -> Result<()> {
    let args = ["-O", "quota", "-Q", "usrquota,grpquota", name];
    let out = tool::run("tune2fs", &args, dir)?;
    if out.code != Some(0) {
        let error = tool::failed("tune2fs", image, &out);
        return Err(match error.kind() {
            Kind::NoSpace => error.fix("Ask for a larger size"),
            _ => error,
        });
    }
    let file = File::open(image).map_err(|e| Error::io("open", image, e))?;
    let mut options = mount_options(&file, image, offset)?;
    for wanted in ["usrquota", "grpquota"] {
        if !options
            .split(|&b| b == b',')
            .any(|o| o == wanted.as_bytes())
        {
            if !options.is_empty() {
                options.push(b',');
            }
            options.extend(wanted.as_bytes());
        }
    }
    let mut script = Script::default();
    let fits = options.len() < MOUNT_OPTIONS
        && script.add_quoted("set_super_value", &[b"mount_opts", &options]);
    if !fits {
        let what = "the default mount options of the file system leave no room for quota's";
        return Err(Error::unsupported(what)
            .on(image)
            .fix("Shorten them: tune2fs -E mount_opts=... DEVICE"));
    }
    script.run(dir, "quota.debugfs", name)
}

/// The default mount options in the superblock.
fn mount_options(file: &File, image: &Path, base: u64) -> Result<Vec<u8>> {
    let mut text = vec![0; MOUNT_OPTIONS];
    let at = base + MOUNT_OPTIONS_AT;
    file.read_exact_at(&mut text, at)
        .map_err(|e| Error::io("read", image, e).at(at))?;
    text.truncate(text.iter().position(|&b| b == 0).unwrap_or(text.len()));
    Ok(text)
}

fn refused(found: &str, image: &Path) -> Error {
    let fix = if found == "XFS" {
        "XFS counts when it is mounted so: mount -o uquota,gquota; leave --user-quota out"
    } else {
        "Leave --user-quota out; only ext4 keeps its quota in the file system"
    };
    let what = format!("user quota in a template of {found}: it is a feature of ext4");
    Error::unsupported(what).on(image).fix(fix)
}
