//! Files of certificates and keys.

use super::*;

/// What `Tls::load` says after `change`.
fn says(change: impl FnOnce(&TlsFiles)) -> Error {
    let dir = tempfile::tempdir().unwrap();
    let ca = Ca::new("ca");
    let files = files(&dir, &ca.sign(|_| {}), &ca.pem);
    Tls::load(&files).unwrap();
    change(&files);
    Tls::load(&files).unwrap_err()
}

#[test]
fn a_key_that_others_may_read_is_refused() {
    for mode in [0o640, 0o604, 0o644, 0o620] {
        let refused = says(|f| {
            fs::set_permissions(&f.key, fs::Permissions::from_mode(mode)).unwrap();
        });
        assert_eq!(refused.kind(), Kind::Permission);
        let text = refused.to_string();
        assert!(text.contains("others may use the private key"), "{text}");
        assert!(text.contains("chmod 0600"), "{text}");
    }
}

#[test]
fn an_encrypted_key_is_refused() {
    for text in [
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n",
        "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: X\n\nAAAA\n\
         -----END RSA PRIVATE KEY-----\n",
    ] {
        let refused = says(|f| fs::write(&f.key, text).unwrap());
        assert_eq!(refused.kind(), Kind::Unsupported);
        assert!(refused.to_string().contains("is encrypted"), "{refused}");
    }
}

#[test]
fn what_is_no_key_is_refused_and_never_quoted() {
    for text in [
        "",
        "secret",
        "-----BEGIN PRIVATE KEY-----\nsecret",
        "-----BEGIN PRIVATE KEY-----\nsecret\n-----END PRIVATE KEY-----\n",
        "-----BEGIN secret",
        "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n",
    ] {
        let refused = says(|f| fs::write(&f.key, text).unwrap());
        assert_eq!(refused.kind(), Kind::Invalid, "{text}: {refused}");
        assert!(!refused.to_string().contains("secret"), "{refused}");
    }
}

#[test]
fn a_key_of_another_certificate_is_refused() {
    let (_, other) = Ca::new("ca").sign(|_| {});
    let refused = says(|f| fs::write(&f.key, other).unwrap()).to_string();
    assert!(refused.contains("does not go with the private key"));
}

#[test]
fn what_holds_no_certificate_is_refused() {
    let garbage = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    for text in ["", "nothing", garbage, "-----BEGIN CERTIFICATE-----\n"] {
        let refused = says(|f| fs::write(&f.cert, text).unwrap());
        assert_eq!(refused.kind(), Kind::Invalid, "{refused}");
        let refused = says(|f| fs::write(&f.ca, text).unwrap());
        assert_eq!(refused.kind(), Kind::Invalid, "{refused}");
    }
    let huge = says(|f| fs::File::create(&f.ca).unwrap().set_len(1 << 40).unwrap());
    assert!(huge.to_string().contains("larger than"), "{huge}");
    let none = says(|f| fs::remove_file(&f.cert).unwrap());
    assert_eq!(none.kind(), Kind::NotFound);
    let no_file = says(|f| {
        fs::remove_file(&f.ca).unwrap();
        fs::create_dir(&f.ca).unwrap();
    });
    assert!(no_file.to_string().contains("no regular file"), "{no_file}");
}

#[test]
fn a_name_is_shown_as_far_as_it_is_understood() {
    let name = |der: &[u8]| super::super::subject::name(der);
    let cn = [
        0x31, 0x0b, 0x30, 0x09, 0x06, 0x03, 0x55, 0x04, 0x03, 0x0c, 0x02, b'a', b'\n',
    ];
    assert_eq!(name(&cn), "CN=a ");
    for end in 0..cn.len() {
        name(&cn[..end]);
    }
    for at in 0..cn.len() {
        for byte in 0..=255 {
            let mut other = cn;
            other[at] = byte;
            name(&other);
        }
    }
    for hostile in [&[0x31, 0x84, 255, 255, 255, 255][..], &[0x31, 0x82, 255]] {
        assert_eq!(name(hostile), "");
    }
}
