//! Names of containers and templates: they become directory names, export names and arguments.

use ploop::error::{Error, Result};

/// The longest name, in bytes.
pub const NAME_MAX: usize = 128;

/// Checks a name: 1 to 128 letters, digits, `.`, `_`, `-`, `+`; the first a letter or a digit. So
/// a name is never a path, a hidden file, an option, or `NAME@SNAPSHOT`. Error: `Invalid`.
pub fn check(name: &str) -> Result<()> {
    let why = match name.chars().next() {
        None => "is empty".to_owned(),
        Some(_) if name.len() > NAME_MAX => format!("is longer than {NAME_MAX} bytes"),
        Some(c) if !c.is_ascii_alphanumeric() => {
            format!("begins with {c:?}, must begin with a letter or a digit")
        }
        Some(_) => match name
            .chars()
            .find(|c| !c.is_ascii_alphanumeric() && !"._-+".contains(*c))
        {
            None => return Ok(()),
            Some(c) => format!("has {c:?} in it; letters, digits, '.', '_', '-', '+' are allowed"),
        },
    };
    Err(Error::invalid(format!("the name {name:?} {why}")))
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_name_is_never_a_path_an_option_or_a_snapshot() {
        for bad in [
            "", ".", "..", "a/b", "../x", "-x", "_x", ".x", "a@b", "a b", "ä", "a\n",
        ] {
            assert!(super::check(bad).is_err(), "{bad:?}");
        }
        assert!(super::check(&"x".repeat(129)).is_err());
        for good in ["a", "1", "web-01.prod_x+y", &"x".repeat(128)] {
            super::check(good).unwrap();
        }
    }
}
