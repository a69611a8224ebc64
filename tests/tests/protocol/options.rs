//! The handshake: libnbd's option mode, and options by hand.

use nbd_server::wire::option::{InfoRequest, MetaRequest, info, kind as opt};
use nbd_server::wire::option_reply::kind as answer;
use nbd_server::wire::reply::Style;
use ploop_tests::client::Client;
use ploop_tests::server::{Bare, nbd_python};
use ploop_tests::store::Rig;

#[test]
fn option_mode_of_libnbd() {
    let rig = Rig::new();
    rig.small_template("t", &["a", "b"]);
    let server = rig.serve(["--store"]);
    nbd_python(
        r"
h.set_opt_mode(True)
h.connect_uri(uri)
assert h.get_structured_replies_negotiated()
names = []
assert h.opt_list(lambda name, text: names.append((name, text))) == 3
assert sorted(n for n, _ in names) == ['a', 'b', 'template:t'], names

h.set_export_name('nobody')
refused(errno.ENOENT, h.opt_info)
refused(errno.ENOENT, h.opt_go)

contexts = []
h.set_export_name('a')
assert h.opt_list_meta_context(contexts.append) == 2
assert contexts == ['base:allocation', 'qemu:allocation-depth'], contexts
h.add_meta_context('base:')
assert h.opt_list_meta_context(contexts.append) == 1
h.clear_meta_contexts()
h.add_meta_context('nonsense:nothing')
assert h.opt_list_meta_context(contexts.append) == 0
h.clear_meta_contexts()
h.set_export_name('nobody')
# libnbd gives every refusal of this option the same number.
refused(errno.ENOTSUP, h.opt_list_meta_context, contexts.append)

h.set_export_name('template:t')
h.opt_info()
assert h.is_read_only() and h.get_size() == 64 << 20
h.set_export_name('a')
h.add_meta_context('base:allocation')
h.add_meta_context('x:unknown')
h.opt_info()
assert not h.is_read_only()
h.opt_go()
assert h.get_size() == 64 << 20
assert h.can_meta_context('base:allocation') and not h.can_meta_context('x:unknown')
assert h.get_block_size(nbd.SIZE_PREFERRED) == 65536
assert h.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20
assert extents(h, 64 << 20, 0)
h.shutdown()

a = nbd.NBD()
a.set_opt_mode(True)
a.connect_uri(uri)
a.opt_abort()
assert a.aio_is_closed()
",
        &[&server.uri("")],
    );
    server.stop();
}

#[test]
fn without_structured_replies() {
    let bare = Bare::new("16M", &["-b", "128"]);
    let server = bare.serve(&[]);
    nbd_python(
        r"
h.set_request_structured_replies(False)
h.add_meta_context('base:allocation')
h.connect_uri(uri)
assert not h.get_structured_replies_negotiated()
assert not h.can_df() and not h.can_meta_context('base:allocation')
h.pwrite(b's' * 5000, 100)
assert h.pread(6000, 0) == bytes(100) + b's' * 5000 + bytes(900)
refused(errno.EINVAL, h.pread, 512, 0, nbd.CMD_FLAG_DF)
refused(errno.EINVAL, h.pread, 512, 16 << 20)
h.zero(1000, 100)
assert h.pread(1100, 0) == bytes(1100)
h.shutdown()
",
        &[&server.uri("root")],
    );
    server.stop();
}

#[test]
fn an_export_opens_by_its_name_and_a_single_one_by_none() {
    let bare = Bare::new("16M", &[]);
    let server = bare.serve(&["--name", "disk"]);
    for name in ["disk", ""] {
        let mut client = Client::connect(server.socket());
        client.go(name).unwrap();
        assert_eq!(client.size, 16 << 20);
    }
    let mut client = Client::connect(server.socket());
    for name in ["root", "disk2", "../root.hds", "disk@"] {
        let (kind, text) = client.go(name).unwrap_err();
        assert_eq!(kind, answer::ERR_UNKNOWN, "{name}: {text}");
        assert!(text.contains(name), "{text}");
    }
    client.go("disk").unwrap();
    server.stop();
}

#[test]
fn names_are_no_paths() {
    let rig = Rig::new();
    rig.small_template("t", &["a"]);
    let server = rig.serve(["--store"]);
    let mut client = Client::connect(server.socket());
    for name in [
        "../containers/a",
        "a/",
        "/etc/passwd",
        ".",
        "..",
        "template:../t",
        "a@..",
        "",
    ] {
        assert!(client.go(name).is_err(), "{name:?} was opened");
    }
    client.go("a").unwrap();
    server.stop();
}

#[test]
fn info_tells_what_was_asked() {
    let bare = Bare::new("16M", &["-b", "64"]);
    let server = bare.serve(&["--name", "disk"]);
    let mut client = Client::connect(server.socket());
    let mut data = Vec::new();
    InfoRequest::emit(
        "",
        &[info::NAME, info::BLOCK_SIZE, info::DESCRIPTION, 99],
        &mut data,
    );
    let answers = client.option(opt::INFO, &data);
    let told = |kind: u16| {
        answers
            .iter()
            .find(|(k, d)| *k == answer::INFO && d[..2] == kind.to_be_bytes())
    };
    assert_eq!(&told(info::NAME).unwrap().1[2..], b"disk");
    assert_eq!(
        told(info::EXPORT).unwrap().1[2..10],
        (16u64 << 20).to_be_bytes()
    );
    let sizes = &told(info::BLOCK_SIZE).unwrap().1[2..];
    let number = |at: usize| u32::from_be_bytes(*sizes[at..].first_chunk().unwrap());
    assert_eq!([number(0), number(4), number(8)], [1, 32 << 10, 32 << 20]);
    assert!(told(99).is_none(), "what is not known is left out");
    assert_eq!(answers.last().unwrap().0, answer::ACK);
    server.stop();
}

#[test]
fn meta_contexts_need_structured_replies_and_the_exports_own_name() {
    let bare = Bare::new("16M", &[]);
    let server = bare.serve(&["--name", "disk"]);
    let request = |name: &str, queries: &[&str]| {
        let mut data = Vec::new();
        MetaRequest::emit(name, queries, &mut data);
        data
    };
    let mut client = Client::connect(server.socket());
    let ask = |client: &mut Client, option, data: &[u8]| client.option(option, data);
    let set = request("disk", &["base:allocation"]);
    assert_eq!(
        ask(&mut client, opt::SET_META_CONTEXT, &set)[0].0,
        answer::ERR_INVALID
    );
    ask(&mut client, opt::STRUCTURED_REPLY, &[]);
    let unknown = request("other", &["base:allocation"]);
    assert_eq!(
        ask(&mut client, opt::SET_META_CONTEXT, &unknown)[0].0,
        answer::ERR_UNKNOWN
    );
    let none = ask(
        &mut client,
        opt::SET_META_CONTEXT,
        &request("disk", &["qemu:nothing"]),
    );
    assert_eq!(none.len(), 1, "an unknown context is no error");
    assert_eq!(none[0].0, answer::ACK);
    let one = ask(
        &mut client,
        opt::SET_META_CONTEXT,
        &request("disk", &["x:y", "base:allocation"]),
    );
    assert_eq!(&one[0].1[4..], b"base:allocation");
    let other = ask(&mut client, opt::LIST_META_CONTEXT, &request("other", &[]));
    assert_eq!(other[0].0, answer::ERR_UNKNOWN);
    let listed = ask(&mut client, opt::LIST_META_CONTEXT, &request("disk", &[]));
    assert_eq!(
        (listed.len(), &listed[0].1[4..], &listed[1].1[4..]),
        (3, &b"base:allocation"[..], &b"qemu:allocation-depth"[..])
    );
    client.go("disk").unwrap();
    server.stop();
}

#[test]
fn the_three_styles_are_negotiated() {
    let bare = Bare::new("16M", &[]);
    let server = bare.serve(&[]);
    for style in [Style::Simple, Style::Structured, Style::Extended] {
        let mut client = Client::open(server.socket(), "root", style);
        client.write(5, b"bytes");
        assert_eq!(client.read(5, 5), b"bytes");
    }
    let mut client = Client::connect(server.socket());
    assert_eq!(
        client.option(opt::EXTENDED_HEADERS, &[]).last().unwrap().0,
        answer::ACK
    );
    let structured = client.option(opt::STRUCTURED_REPLY, &[]);
    assert_eq!(structured[0].0, answer::ERR_EXT_HEADER_REQD);
    let with_data = client.option(opt::EXTENDED_HEADERS, &[1]);
    assert_eq!(with_data[0].0, answer::ERR_INVALID);
    assert_eq!(client.option(opt::STARTTLS, &[])[0].0, answer::ERR_POLICY);
    assert_eq!(client.option(opt::ABORT, &[]), [(answer::ACK, Vec::new())]);
    assert!(client.is_closed());
    server.stop();
}
