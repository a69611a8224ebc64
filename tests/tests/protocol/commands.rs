//! Every command with every flag, sent by libnbd with its own checks switched off.

use nbd_server::session::MAX_PAYLOAD;
use nbd_server::wire::errno;
use nbd_server::wire::greeting::transmission_flag as can;
use nbd_server::wire::reply::Style;
use nbd_server::wire::request::{flag, kind};
use ploop_tests::client::{Ask, Client};
use ploop_tests::fsx::Link;
use ploop_tests::server::{Bare, assert_acceptable, nbd_python, pattern, qemu_check};
use ploop_tests::store::Rig;

const STYLES: [Style; 3] = [Style::Simple, Style::Structured, Style::Extended];

#[test]
fn every_command_and_flag_by_libnbd() {
    let bare = Bare::new("64M", &["-b", "128"]);
    let server = bare.serve(&[]);
    nbd_python(
        r"
h.add_meta_context('base:allocation')
h.connect_uri(uri)
size, cluster = h.get_size(), 65536
assert size == 64 << 20
assert h.can_flush() and h.can_fua() and h.can_trim() and h.can_zero() and h.can_cache()
assert h.can_df() and h.can_fast_zero() and h.can_multi_conn() and not h.is_read_only()

# READ and WRITE, unaligned, with their flags.
x = bytes(range(250)) * 20
h.pwrite(x, 7)
assert h.pread(5000, 7) == x
assert h.pread(5000, 7, nbd.CMD_FLAG_DF) == x
h.pwrite(x, 3 * cluster - 100, nbd.CMD_FLAG_FUA)
assert h.pread(5000, 3 * cluster - 100) == x
assert h.pread(100, 3 * cluster - 200) == bytes(100)
h.flush()

# WRITE_ZEROES: gone, or zeros that keep their space; fast where nothing is to be copied.
h.pwrite(b'z' * 4 * cluster, 8 * cluster)
h.zero(cluster, 8 * cluster)
h.zero(cluster, 9 * cluster, nbd.CMD_FLAG_NO_HOLE)
h.zero(cluster, 10 * cluster, nbd.CMD_FLAG_FAST_ZERO)
h.zero(100, 11 * cluster + 1, nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE)
assert h.pread(3 * cluster, 8 * cluster) == bytes(3 * cluster)
assert h.pread(102, 11 * cluster) == b'z' + bytes(100) + b'z'

# TRIM: what was there, or zero; never another byte.
h.pwrite(b't' * 3 * cluster, 20 * cluster)
h.trim(cluster, 21 * cluster)
h.trim(100, 20 * cluster + 50, nbd.CMD_FLAG_FUA)
got = h.pread(3 * cluster, 20 * cluster)
assert got[cluster:2 * cluster] == bytes(cluster), 'whole clusters are given back'
assert set(got[50:150]) <= {0, ord('t')}
assert got[:50] + got[150:cluster] + got[2 * cluster:] == b't' * (2 * cluster - 100)

# CACHE changes nothing; FLUSH neither.
h.cache(size, 0)
h.cache(512, 20 * cluster)
h.flush()
assert h.pread(3 * cluster, 20 * cluster) == got

# BLOCK_STATUS: all, and one.
h.zero(size, 0)
h.pwrite(b'd' * cluster, 5 * cluster)
assert extents(h, size, 0) == [(5 * cluster, 3), (cluster, 0), (size - 6 * cluster, 3)]
assert extents(h, size, 0, nbd.CMD_FLAG_REQ_ONE) == [(5 * cluster, 3)]
assert extents(h, size - 512, 512, nbd.CMD_FLAG_REQ_ONE) == [(5 * cluster - 512, 3)]
assert extents(h, 100, 5 * cluster + 1, nbd.CMD_FLAG_REQ_ONE) == [(100, 0)]

# Nothing, where nothing is allowed.
h.pwrite(b'', 0)
h.zero(0, 0)
h.trim(0, 0)
h.shutdown()
",
        &[&server.uri("root")],
    );
    server.stop();
    qemu_check(bare.image());
    assert_acceptable(bare.image(), false);
}

#[test]
fn refusals_have_the_protocols_numbers_and_change_nothing() {
    let bare = Bare::new("64M", &["-b", "128"]);
    let server = bare.serve(&[]);
    nbd_python(
        r"
h.add_meta_context('base:allocation')
h.connect_uri(uri)
size = h.get_size()
h.pwrite(b'x' * 4096, 0)
h.pwrite(b'e' * 512, size - 512)
refused(errno.ENOSPC, h.pwrite, b'y' * 1024, size - 512)
refused(errno.ENOSPC, h.zero, 1024, size - 512)
refused(errno.EINVAL, h.pread, 1024, size - 512)
refused(errno.EINVAL, h.trim, 1024, size - 512)
refused(errno.EINVAL, h.cache, 1024, size - 512)
refused(errno.EINVAL, h.block_status, 1024, size - 512, lambda *a: 0)
refused(errno.EINVAL, h.block_status, 0, 0, lambda *a: 0)
refused(errno.EINVAL, h.pread, 512, (1 << 63) - 512)
refused(errno.ENOSPC, h.pwrite, b'y' * 512, (1 << 63) - 512)
refused(errno.EINVAL, h.pread, 512, 0, 1 << 9)
refused(errno.EINVAL, h.pread, 512, 0, nbd.CMD_FLAG_NO_HOLE)
refused(errno.EINVAL, h.pwrite, b'z' * 512, 0, nbd.CMD_FLAG_REQ_ONE)
refused(errno.EINVAL, h.pwrite, b'z' * 512, 0, nbd.CMD_FLAG_FAST_ZERO)
refused(errno.EINVAL, h.trim, 512, 0, nbd.CMD_FLAG_DF)
refused(errno.EINVAL, h.zero, 512, 0, nbd.CMD_FLAG_DF)
refused(errno.EOVERFLOW, h.pread, (32 << 20) + 512, 0)
refused(errno.EINVAL, h.pwrite, b'w' * ((32 << 20) + 512), 0)
assert h.pread(4096, 0) == b'x' * 4096
assert h.pread(512, size - 512) == b'e' * 512
h.pwrite(b'w' * (32 << 20), 1)
assert h.pread(32 << 20, 1) == b'w' * (32 << 20), 'the longest request of both kinds'
h.shutdown()
",
        &[&server.uri("root")],
    );
    server.stop();
}

/// What no client library can be made to send.
#[test]
fn refusals_of_strange_requests_in_every_style() {
    let bare = Bare::new("16M", &["-b", "128"]);
    let server = bare.serve(&[]);
    for style in STYLES {
        let mut client = Client::open(server.socket(), "root", style);
        client.write(0, &[1; 4096]);
        for (ask, number) in [
            (Ask::new(77, 0, 0..512), errno::EINVAL),
            (Ask::new(kind::FLUSH, 0, 512..1024), errno::EINVAL),
            (
                Ask::new(kind::READ, 0, u64::MAX - 512..u64::MAX),
                errno::EINVAL,
            ),
            (
                Ask::new(kind::TRIM, 0, u64::MAX - 512..u64::MAX),
                errno::EINVAL,
            ),
            (
                Ask::new(kind::WRITE_ZEROES, 0, u64::MAX - 9..u64::MAX),
                errno::ENOSPC,
            ),
            (Ask::new(kind::READ, flag::REQ_ONE, 0..512), errno::EINVAL),
            (Ask::write(1 << 12, 0, &[2; 512]), errno::EINVAL),
        ] {
            assert_eq!(client.ask(ask.clone()).error, number, "{style:?} {ask:?}");
        }
        if style == Style::Simple {
            // Neither DF nor a status means anything without structured replies.
            let df = Ask::new(kind::READ, flag::DF, 0..512);
            assert_eq!(client.ask(df).error, errno::EINVAL);
            let status = Ask::new(kind::BLOCK_STATUS, 0, 0..512);
            assert_eq!(client.ask(status).error, errno::EINVAL);
        } else {
            let whole = Ask::new(kind::READ, flag::DF, 0..1 << 20);
            let pieces = client.ask(whole).content.len();
            assert_eq!(pieces, 1, "{style:?}: DF is one piece");
        }
        // FUA is allowed on everything.
        for kind in [kind::READ, kind::FLUSH, kind::CACHE] {
            assert_eq!(
                client.ask(Ask::new(kind, flag::FUA, 0..0)).error,
                0,
                "{style:?} {kind}"
            );
        }
        assert_eq!(client.read(0, 4096), [1; 4096]);
        client.disconnect();
    }
    server.stop();
}

#[test]
fn a_compact_write_that_is_too_long_is_read_to_its_end_and_refused() {
    let bare = Bare::new("64M", &["-b", "128"]);
    let server = bare.serve(&[]);
    let mut client = Client::open(server.socket(), "root", Style::Structured);
    let long = vec![9; MAX_PAYLOAD as usize + 1];
    assert_eq!(client.ask(Ask::write(0, 0, &long)).error, errno::EINVAL);
    assert_eq!(client.read(0, 512), [0; 512]);
    // One that claims more than anybody sends ends the session, before its payload.
    let mut client = Client::open(server.socket(), "root", Style::Structured);
    let ask = Ask {
        range: 0..u64::from(u32::MAX),
        ..Ask::write(0, 0, &[])
    };
    assert!(client.try_exchange(&[ask]).is_err());
    server.stop();
}

#[test]
fn fast_zero_is_refused_where_the_rest_of_a_cluster_has_to_be_copied() {
    let rig = Rig::new();
    let bytes = pattern(4 << 20, 2);
    std::fs::write(rig.path("t.raw"), &bytes).unwrap();
    rig.run(["template", "import", "t", &rig.arg("t.raw")]);
    rig.run(["create", "ct", "--template", "t"]);
    let server = rig.serve(["--store"]);
    let mut client = Client::open(server.socket(), "ct", Style::Extended);
    let fast = |range| Ask::new(kind::WRITE_ZEROES, flag::FAST_ZERO, range);
    assert_eq!(client.ask(fast(512..1024)).error, errno::ENOTSUP);
    assert!(
        client.read(0, 65536) == bytes[..65536],
        "a refusal changes nothing"
    );
    assert_eq!(client.ask(fast(65536..131_072)).error, 0);
    assert_eq!(client.read(65536, 65536), vec![0; 65536]);
    assert_eq!(
        client.ask(Ask::new(kind::WRITE_ZEROES, 0, 512..1024)).error,
        0
    );
    assert_eq!(client.read(512, 512), [0; 512]);
    assert!(client.read(1024, 64512) == bytes[1024..65536]);
    server.stop();
}

#[test]
fn a_read_only_export_refuses_every_change() {
    let bare = Bare::new("16M", &["-b", "128"]);
    bare.serve(&[]).stop();
    let before = std::fs::read(bare.image()).unwrap();
    let server = bare.serve(&["--read-only"]);
    for style in STYLES {
        let mut client = Client::open(server.socket(), "root", style);
        assert_ne!(client.flags & can::READ_ONLY, 0);
        assert_eq!(client.flags & (can::SEND_TRIM | can::SEND_WRITE_ZEROES), 0);
        for ask in [
            Ask::write(0, 0, &[1; 512]),
            Ask::write(flag::FUA, 0, &[1; 512]),
            Ask::new(kind::TRIM, 0, 0..65536),
            Ask::new(kind::WRITE_ZEROES, 0, 0..65536),
        ] {
            assert_eq!(
                client.ask(ask.clone()).error,
                errno::EPERM,
                "{style:?} {ask:?}"
            );
        }
        client.flush();
        assert_eq!(client.read(0, 512), [0; 512]);
    }
    server.stop();
    assert!(
        std::fs::read(bare.image()).unwrap() == before,
        "not a byte of the image is touched"
    );
}

#[test]
fn answers_to_many_requests_carry_their_cookies() {
    let bare = Bare::new("16M", &["-b", "128"]);
    let server = bare.serve(&[]);
    for style in STYLES {
        let mut client = Client::open(server.socket(), "root", style);
        let writes: Vec<_> = (0..64u64)
            .map(|i| Ask::write(0, i * 1000, &[i as u8 + 1; 1000]))
            .collect();
        assert!(client.exchange(&writes).iter().all(|r| r.error == 0));
        let reads: Vec<_> = (0..64u64)
            .map(|i| Ask::new(kind::READ, 0, i * 1000..(i + 1) * 1000))
            .collect();
        for (i, (ask, reply)) in reads.iter().zip(client.exchange(&reads)).enumerate() {
            assert_eq!(reply.data(&ask.range), [i as u8 + 1; 1000]);
        }
        // Requests sent together with the good-bye are answered before the close.
        let last = [Ask::write(0, 0, &[7; 512]), Ask::new(kind::DISC, 0, 0..0)];
        assert!(
            client.try_exchange(&last).is_err(),
            "a good-bye has no answer"
        );
        let mut client = Client::open(server.socket(), "root", style);
        assert_eq!(client.read(0, 512), [7; 512]);
    }
    server.stop();
}
