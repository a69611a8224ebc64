//! For stores and files that stand in front of others: what they do not change goes on as it is.

/// The methods of a [`Store`](crate::store::Store) or a [`StoreFile`](crate::store::StoreFile) that
/// are named, each as the same call on the field `inner`.
///
/// A method with a default is the default unless it is named. Name `read_now`, `for_ring` and
/// `for_guests` only where reads and writes may go around who stands in front.
///
/// ```
/// use std::path::Path;
/// use std::sync::Arc;
///
/// use ploop::Result;
/// use ploop::store::StoreFile;
///
/// /// A file whose permissions stay as they are.
/// #[derive(Debug)]
/// struct Fixed {
///     inner: Arc<dyn StoreFile>,
/// }
///
/// impl StoreFile for Fixed {
///     ploop::delegate! {
///         path, id, len, read_at, write_at, sync, set_len, punch, zero, reserve, next_data,
///         lock_bytes, unlock_bytes, foreign_lock,
///     }
///
///     fn set_mode(&self, _: u32) -> Result<()> {
///         Ok(())
///     }
/// }
/// ```
#[macro_export]
// Tests know a sync by the line that calls it: that of who stands in front, not one in here.
#[collapse_debuginfo(yes)]
macro_rules! delegate {
    // A store's.
    (@open) => {
        $crate::delegate!(@fn open(path: &std::path::Path, access: $crate::store::Access)
            -> $crate::Result<std::sync::Arc<dyn $crate::store::StoreFile>>);
    };
    (@create) => {
        $crate::delegate!(@fn create(path: &std::path::Path, mode: u32)
            -> $crate::Result<std::sync::Arc<dyn $crate::store::StoreFile>>);
    };
    (@rename) => {
        $crate::delegate!(@fn rename(from: &std::path::Path, to: &std::path::Path)
            -> $crate::Result<()>);
    };
    (@rename_new) => {
        $crate::delegate!(@fn rename_new(from: &std::path::Path, to: &std::path::Path)
            -> $crate::Result<()>);
    };
    (@hard_link) => {
        $crate::delegate!(@fn hard_link(from: &std::path::Path, to: &std::path::Path)
            -> $crate::Result<()>);
    };
    (@remove_file) => {
        $crate::delegate!(@fn remove_file(path: &std::path::Path) -> $crate::Result<()>);
    };
    (@create_dir) => {
        $crate::delegate!(@fn create_dir(path: &std::path::Path) -> $crate::Result<()>);
    };
    (@remove_dir) => {
        $crate::delegate!(@fn remove_dir(path: &std::path::Path) -> $crate::Result<()>);
    };
    (@sync_dir) => {
        $crate::delegate!(@fn sync_dir(path: &std::path::Path) -> $crate::Result<()>);
    };
    (@file_system) => {
        $crate::delegate!(@fn file_system(path: &std::path::Path)
            -> $crate::Result<Option<Box<dyn $crate::store::FileSystem>>>);
    };
    (@list) => {
        $crate::delegate!(@fn list(path: &std::path::Path)
            -> $crate::Result<Vec<std::path::PathBuf>>);
    };
    (@kind) => {
        $crate::delegate!(@fn kind(path: &std::path::Path)
            -> $crate::Result<Option<$crate::store::EntryKind>>);
    };
    (@space) => {
        $crate::delegate!(@fn space(path: &std::path::Path)
            -> $crate::Result<Option<$crate::store::Space>>);
    };
    (@resolve) => {
        $crate::delegate!(@fn resolve(path: &std::path::Path)
            -> $crate::Result<std::path::PathBuf>);
    };

    // A file's.
    (@path) => { $crate::delegate!(@fn path() -> &std::path::Path); };
    (@id) => { $crate::delegate!(@fn id() -> $crate::store::FileId); };
    (@len) => { $crate::delegate!(@fn len() -> $crate::Result<u64>); };
    (@read_at) => {
        $crate::delegate!(@fn read_at(buf: &mut [u8], offset: u64) -> $crate::Result<usize>);
    };
    (@read_now) => {
        $crate::delegate!(@fn read_now(buf: &mut [u8], offset: u64)
            -> $crate::Result<Option<usize>>);
    };
    (@for_ring) => {
        $crate::delegate!(@fn for_ring(key: &$crate::store::ring::RingKey)
            -> Option<std::os::fd::BorrowedFd<'_>>);
    };
    (@for_guests) => {
        $crate::delegate!(@fn for_guests() -> Option<std::sync::Arc<dyn $crate::store::StoreFile>>);
    };
    (@write_at) => {
        $crate::delegate!(@fn write_at(buf: &[u8], offset: u64) -> $crate::Result<()>);
    };
    (@sync) => { $crate::delegate!(@fn sync() -> $crate::Result<()>); };
    (@begin_sync) => { $crate::delegate!(@fn begin_sync(offset: u64, len: u64)); };
    (@set_len) => { $crate::delegate!(@fn set_len(len: u64) -> $crate::Result<()>); };
    (@punch) => { $crate::delegate!(@fn punch(offset: u64, len: u64) -> $crate::Result<()>); };
    (@zero) => { $crate::delegate!(@fn zero(offset: u64, len: u64) -> $crate::Result<()>); };
    (@reserve) => { $crate::delegate!(@fn reserve(offset: u64, len: u64) -> $crate::Result<()>); };
    (@set_mode) => { $crate::delegate!(@fn set_mode(mode: u32) -> $crate::Result<()>); };
    (@rights) => {
        $crate::delegate!(@fn rights() -> $crate::Result<Option<$crate::store::Rights>>);
    };
    (@set_rights) => {
        $crate::delegate!(@fn set_rights(rights: &$crate::store::Rights) -> $crate::Result<()>);
    };
    (@next_data) => {
        $crate::delegate!(@fn next_data(from: u64, to: u64)
            -> $crate::Result<Option<std::ops::Range<u64>>>);
    };
    (@host_bytes) => { $crate::delegate!(@fn host_bytes() -> $crate::Result<u64>); };
    (@keep) => { $crate::delegate!(@fn keep(number: u64)); };
    (@recall) => { $crate::delegate!(@fn recall() -> Option<u64>); };
    (@lock_bytes) => {
        $crate::delegate!(@fn lock_bytes(offset: u64, len: u64) -> $crate::Result<()>);
    };
    (@unlock_bytes) => {
        $crate::delegate!(@fn unlock_bytes(offset: u64, len: u64) -> $crate::Result<()>);
    };
    (@foreign_lock) => {
        $crate::delegate!(@fn foreign_lock(offset: u64, len: u64) -> $crate::Result<bool>);
    };

    (@fn $method:ident($($argument:ident: $type:ty),*) $(-> $result:ty)?) => {
        fn $method(&self, $($argument: $type),*) $(-> $result)? {
            self.inner.$method($($argument),*)
        }
    };
    ($($method:ident),+ $(,)?) => { $($crate::delegate!(@$method);)+ };
}
