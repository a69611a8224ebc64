//! Small files that are replaced as a whole.

use std::path::Path;

use super::Store;
use crate::error::{Kind, Result};

/// Puts `bytes` in the place of `file` in the directory `side` of `dir`, both made where they are not
/// there. Durable on return; after a crash it is the old file or the new one. What an earlier call left
/// behind goes.
///
/// Order: the new file, its sync, its name, the sync of the directory.
pub fn replace(store: &dyn Store, dir: &Path, side: &str, file: &str, bytes: &[u8]) -> Result<()> {
    let side = dir.join(side);
    if store.kind(&side)?.is_none() {
        store.create_dir(&side)?;
        store.sync_dir(dir)?;
    }
    let temporary = side.join(format!("{file}.tmp"));
    match store.remove_file(&temporary) {
        Err(e) if e.kind() != Kind::NotFound => return Err(e),
        _ => {}
    }
    let new = store.create(&temporary, 0o600)?;
    new.write_at(bytes, 0)?;
    new.sync()?;
    drop(new);
    store.rename(&temporary, &side.join(file))?;
    store.sync_dir(&side)
}
