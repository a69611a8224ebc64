//! An error on the wire. [`Failure`] and [`Error`] turn into each other without a loss that a
//! person or a program would notice: kind, file, offset, text and advice stay.

use axum::http::StatusCode;
use ploop::error::{Error, Kind};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

const KINDS: [Kind; 11] = [
    Kind::Io,
    Kind::NotFound,
    Kind::Exists,
    Kind::Invalid,
    Kind::Corrupt,
    Kind::Unsupported,
    Kind::InUse,
    Kind::NoSpace,
    Kind::Permission,
    Kind::ReadOnly,
    Kind::Latched,
];

/// The kind of that name; `Io` for one that is not known.
pub(crate) fn kind_of(name: &str) -> Kind {
    let found = KINDS.into_iter().find(|k| k.name() == name);
    found.unwrap_or(Kind::Io)
}

/// What failed, where, and what to do next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Failure {
    /// The class: `io`, `not-found`, `exists`, `invalid`, `corrupt`, `unsupported`, `in-use`,
    /// `no-space`, `permission`, `read-only` or `latched`.
    pub kind: String,
    /// What failed, one sentence.
    pub what: String,
    /// On which file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// At which byte of that file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// All of it, as a person reads it.
    pub text: String,
    /// What to do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
    /// The operating system's number, where the failure came from there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub os_error: Option<i32>,
}

impl From<&Error> for Failure {
    fn from(e: &Error) -> Failure {
        Failure {
            kind: e.kind().name().into(),
            what: e.what().into(),
            file: e.path().map(|p| p.display().to_string()),
            offset: e.offset(),
            text: e.to_string(),
            fix: e.fix_text().map(Into::into),
            os_error: e.raw_os_error(),
        }
    }
}

impl From<Failure> for Error {
    fn from(f: Failure) -> Error {
        let mut e = Error::new(kind_of(&f.kind), f.what);
        if let Some(file) = f.file {
            e = e.on(file);
        }
        if let Some(offset) = f.offset {
            e = e.at(offset);
        }
        // The cause stands in the text only, between the sentence and the advice.
        let fix = f.fix.map(|fix| (format!(". {fix}"), fix));
        let rest = f.text.strip_prefix(&e.to_string()).unwrap_or_default();
        let cause = match &fix {
            Some((end, _)) => rest.strip_suffix(end.as_str()).unwrap_or(rest),
            None => rest,
        };
        if let Some(cause) = cause.strip_prefix(": ") {
            let system = f.os_error.map(std::io::Error::from_raw_os_error);
            e = match system.filter(|s| s.to_string() == cause) {
                Some(system) => e.caused_by(system),
                None => e.caused_by(cause),
            };
        }
        match fix {
            Some((_, fix)) => e.fix(fix),
            None => e,
        }
    }
}

/// The HTTP status of a kind of failure.
pub fn status(kind: Kind) -> StatusCode {
    match kind {
        Kind::Invalid => StatusCode::BAD_REQUEST,
        Kind::Permission | Kind::ReadOnly => StatusCode::FORBIDDEN,
        Kind::NotFound => StatusCode::NOT_FOUND,
        Kind::Exists | Kind::InUse => StatusCode::CONFLICT,
        Kind::Unsupported => StatusCode::NOT_IMPLEMENTED,
        Kind::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
        // Io, Corrupt, Latched, and what comes later: the request was right, the disk is not.
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pass(e: &Error) -> Error {
        let json = serde_json::to_string(&Failure::from(e)).unwrap();
        serde_json::from_str::<Failure>(&json).unwrap().into()
    }

    #[test]
    fn an_error_reads_the_same_after_the_wire() {
        let os = || std::io::Error::from_raw_os_error(28);
        for kind in KINDS {
            for bits in 0..32 {
                let mut e = Error::new(kind, "write 4096 bytes: to it");
                if bits & 1 != 0 {
                    e = e.on("/a b/c: d. e");
                }
                if bits & 2 != 0 {
                    e = e.at(0x1234);
                }
                if bits & 4 != 0 {
                    e = e.fix("Make room: there. Then try again");
                }
                if bits & 8 != 0 {
                    e = e.caused_by("one: two. three");
                }
                if bits & 16 != 0 {
                    e = e.caused_by(os());
                }
                let back = pass(&e);
                assert_eq!(back.to_string(), e.to_string());
                assert_eq!(back.kind(), e.kind());
                assert_eq!(back.what(), e.what());
                assert_eq!((back.path(), back.offset()), (e.path(), e.offset()));
                assert_eq!(back.fix_text(), e.fix_text());
                assert_eq!(back.raw_os_error(), e.raw_os_error());
                assert_eq!(back.kind().exit_code(), e.kind().exit_code());
            }
        }
    }

    #[test]
    fn what_another_version_may_send_is_an_error_still() {
        let text = r#"{"kind":"new","what":"w","text":"unrelated","offset":1,"more":2}"#;
        let e: Error = serde_json::from_str::<Failure>(text).unwrap().into();
        assert_eq!((e.kind(), e.what()), (Kind::Io, "w"));
    }
}
