//! The GGUF header grammar: what it accepts, what it refuses, and that it is total.

use std::io::Write;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use swarm_kernels::DType;
use swarm_weights::FileSource;
use swarm_weights::gguf::{ElementType, GgufError, GgufHeader, Parsed, Value, parse};

use crate::writer::{Gguf, Meta, Noting, Toy, array, string};

fn done(bytes: &[u8]) -> GgufHeader {
    match parse(bytes, bytes.len() as u64) {
        Ok(Parsed::Done(header)) => header,
        other => panic!("{other:?}"),
    }
}

fn error(bytes: &[u8]) -> GgufError {
    parse(bytes, bytes.len() as u64).expect_err("must be refused")
}

fn every_kind() -> Gguf {
    let mut gguf = Gguf { alignment: 64, ..Gguf::default() }
        .key("general.alignment", Meta::U32(64))
        .key("u8", Meta::U8(200))
        .key("i8", Meta::I8(-100))
        .key("u16", Meta::U16(60_000))
        .key("i16", Meta::I16(-30_000))
        .key("u32", Meta::U32(u32::MAX))
        .key("i32", Meta::I32(i32::MIN))
        .key("f32", Meta::F32(0.5))
        .key("bool", Meta::Bool(1))
        .key("str", Meta::Str("caf\u{e9}".into()))
        .key("u64", Meta::U64(u64::MAX))
        .key("i64", Meta::I64(i64::MIN))
        .key("f64", Meta::F64(-1e300))
        .key("strs", Meta::Strs(vec!["a".into(), String::new(), "bc".into()]))
        .key("i32s", Meta::I32s(vec![-1, 2]))
        .key("f32s", Meta::F32s(vec![1.5]))
        .key("bools", Meta::Raw(9, array(7, 3, &[0, 1, 1])))
        .key("none", Meta::Raw(9, array(8, 0, &[])));
    gguf = gguf.tensor("w", &[64, 3], 3, vec![1; 2 * 20 * 3]);
    gguf.tensor("v", &[5], 0, vec![2; 20])
}

#[test]
fn every_value_type_and_both_versions_are_read() {
    for version in [2, 3] {
        let header = done(&Gguf { version, ..every_kind() }.bytes());
        assert_eq!(header.version, version);
        assert_eq!(header.unsigned("u8").unwrap(), Some(200));
        assert_eq!(header.metadata["i8"], Value::Signed(-100));
        assert_eq!(header.unsigned("u16").unwrap(), Some(60_000));
        assert_eq!(header.metadata["i16"], Value::Signed(-30_000));
        assert_eq!(header.unsigned("u32").unwrap(), Some(u64::from(u32::MAX)));
        assert_eq!(header.metadata["i32"], Value::Signed(i32::MIN.into()));
        assert_eq!(header.float("f32").unwrap(), Some(0.5));
        assert_eq!(header.bool("bool").unwrap(), Some(true));
        assert_eq!(header.string("str").unwrap(), Some("caf\u{e9}"));
        assert_eq!(header.unsigned("u64").unwrap(), Some(u64::MAX));
        assert_eq!(header.metadata["i64"], Value::Signed(i64::MIN));
        assert_eq!(header.float("f64").unwrap(), Some(-1e300));
        assert_eq!(header.strings("strs", 3).unwrap().unwrap(), ["a", "", "bc"]);
        assert_eq!(header.i32s("i32s").unwrap(), Some(vec![-1, 2]));
        assert_eq!(header.f32s("f32s").unwrap(), Some(vec![1.5]));
        assert!(matches!(
            header.metadata["bools"],
            Value::Array { element: ElementType::Bool, count: 3, .. }
        ));
        assert_eq!(header.strings("none", 3).unwrap(), Some(vec![]));
        assert_eq!(header.string("absent").unwrap(), None);
        let (w, v) = (&header.tensors["w"], &header.tensors["v"]);
        assert_eq!((w.dtype, w.dims.as_slice(), w.bytes), (DType::Q4_1, &[64, 3][..], 120));
        assert_eq!((v.dtype, v.bytes, v.offset), (DType::F32, 20, w.offset + 128));
        assert!(w.offset.is_multiple_of(64));
    }
}

#[test]
fn wrong_types_are_named() {
    let header = done(&every_kind().bytes());
    assert!(header.string("u8").unwrap_err().to_string().contains("\"u8\" is an integer, not a string"));
    assert!(header.unsigned("i8").unwrap_err().to_string().contains("negative"));
    assert!(header.bool("str").is_err() && header.float("bool").is_err() && header.f32s("strs").is_err());
    assert!(header.unsigned("i32s").unwrap_err().to_string().contains("different numbers, one per layer"));
    assert!(matches!(header.strings("strs", 2), Err(GgufError::ArrayLen { count: 3, .. })));
}

#[test]
fn a_prefix_asks_for_more_and_a_cut_file_is_an_error() {
    let bytes = every_kind().bytes();
    let file_len = bytes.len() as u64;
    let header_len = every_kind().header().len();
    for len in 0..bytes.len() {
        let prefix = &bytes[..len];
        match parse(prefix, file_len).unwrap() {
            Parsed::Need(need) => {
                assert!(len < header_len && need > len as u64 && need <= header_len as u64, "{len} {need}");
            }
            Parsed::Done(_) => assert!(len >= header_len, "{len}"),
        }
        assert!(parse(prefix, len as u64).is_err(), "a file of {len} bytes");
    }
}

/// One way to break a sound file, and a word of the error it must give.
type Break = (&'static str, fn(&mut Gguf));

const BROKEN: [Break; 33] = [
    ("instead of \"GGUF\"", |g| g.magic = *b"GGML"),
    ("version 1;", |g| g.version = 1),
    ("version 4;", |g| g.version = 4),
    ("version 4294967295;", |g| g.version = u32::MAX),
    ("big-endian", |g| g.version = 3_u32.swap_bytes()),
    ("1000000000 tensors", |g| g.tensor_count = Some(1_000_000_000)),
    ("60000 tensors, which", |g| g.tensor_count = Some(60_000)),
    ("tensors", |g| g.tensor_count = Some(u64::MAX)),
    ("1000000000 metadata keys", |g| g.key_count = Some(1_000_000_000)),
    ("60000 metadata keys, which", |g| g.key_count = Some(60_000)),
    ("metadata keys", |g| g.key_count = Some(u64::MAX)),
    ("a string value has", |g| g.set("x", Meta::Raw(8, u64::MAX.to_le_bytes().to_vec()))),
    ("ends at byte", |g| g.set("x", Meta::Raw(8, (1_u64 << 20).to_le_bytes().to_vec()))),
    ("array elements", |g| g.set("x", Meta::Raw(9, array(8, 1_000_000_000, &[])))),
    ("array elements", |g| g.set("x", Meta::Raw(9, array(10, usize::MAX, &[])))),
    ("array elements", |g| g.set("x", Meta::Raw(9, array(0, 1 << 20, &[])))),
    ("array of arrays", |g| g.set("x", Meta::Raw(9, array(9, 1, &array(9, 1, &array(0, 1, &[0])))))),
    ("unknown value type 13", |g| g.set("x", Meta::Raw(13, vec![0]))),
    ("unknown value type 99", |g| g.set("x", Meta::Raw(9, array(99, 1, &[0])))),
    ("boolean with the value 2", |g| g.set("x", Meta::Bool(2))),
    ("metadata key \"u8\" occurs twice", |g| g.keys.push((b"u8".to_vec(), Meta::U8(1)))),
    ("metadata key is not valid UTF-8", |g| g.keys.push((vec![0xff], Meta::U8(1)))),
    ("tensor \"v\" occurs twice", |g| g.tensors.push(g.tensors[1].clone())),
    ("tensor name is not valid UTF-8", |g| g.entry("v").name = vec![b'v', 0xc0]),
    ("a tensor name has 200 bytes", |g| g.entry("v").name = vec![b'v'; 200]),
    ("0 dimensions", |g| g.entry("v").dims = vec![]),
    ("5 dimensions", |g| g.entry("v").dims = vec![1; 5]),
    ("cannot have dimensions [0, 5]", |g| g.entry("v").dims = vec![0, 5]),
    ("cannot have dimensions [5, 0]", |g| g.entry("v").dims = vec![5, 0]),
    ("cannot have dimensions [33, 3]", |g| g.entry("w").dims = vec![33, 3]),
    ("cannot have dimensions", |g| g.entry("v").dims = vec![1 << 40, 1 << 40]),
    ("cannot have dimensions", |g| g.entry("v").dims = vec![u64::MAX]),
    ("multiple of the alignment 64", |g| g.entry("v").offset = Some(130)),
];

const MISPLACED: [Break; 11] = [
    ("lies outside the file", |g| g.entry("v").dims = vec![6]),
    ("lies outside the file", |g| g.entry("v").offset = Some(1 << 40)),
    ("lies outside the file", |g| g.entry("v").offset = Some(u64::MAX - 63)),
    ("\"w\" and \"v\" overlap", |g| g.entry("v").offset = Some(64)),
    ("overlap", |g| g.entry("v").offset = Some(0)),
    ("type 16 (IQ2_XXS), which is not supported", |g| g.entry("v").kind = 16),
    ("type 4 (Q4_2 (removed))", |g| g.entry("v").kind = 4),
    ("type 77 (unknown)", |g| g.entry("v").kind = 77),
    ("general.alignment", |g| g.set("general.alignment", Meta::U32(0))),
    ("general.alignment", |g| g.set("general.alignment", Meta::U32(48))),
    ("general.alignment", |g| g.set("general.alignment", Meta::Str("64".into()))),
];

#[test]
fn malformed_headers_are_refused_by_name() {
    for (word, break_it) in BROKEN.iter().chain(&MISPLACED) {
        let mut gguf = every_kind();
        break_it(&mut gguf);
        let text = error(&gguf.bytes()).to_string();
        assert!(text.contains(word), "{word:?} is not in {text:?}");
    }
}

#[test]
fn strangers_names_are_escaped_in_errors() {
    let mut gguf = every_kind();
    gguf.entry("v").name = b"\x1b[31m".to_vec();
    gguf.entry("w").kind = 99;
    gguf.entry("w").name = b"\x1b]0;x\x07".to_vec();
    assert!(!error(&gguf.bytes()).to_string().contains('\x1b'));
}

/// The sizes at which other readers wrapped: a product just past 64 bits, and a sum just past it.
#[test]
fn sizes_that_wrap_are_refused() {
    for (dims, kind) in [
        (vec![1_u64 << 32, 1 << 32], 0),
        (vec![1 << 31, 1 << 31, 4], 0),
        (vec![32, (1 << 59) + 1], 8),
        (vec![(1 << 62) + 1], 0),
        (vec![256, u64::MAX / 100], 14),
    ] {
        let gguf = Gguf::default().tensor("w", &dims, kind, vec![0; 64]);
        let text = error(&gguf.bytes()).to_string();
        assert!(text.contains("cannot have dimensions") || text.contains("outside"), "{text}");
    }
}

proptest! {
    #[test]
    fn any_bytes_give_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..300), more in 0_u64..100) {
        let _ = parse(&bytes, bytes.len() as u64 + more);
    }

    #[test]
    fn any_bytes_after_the_magic_give_an_answer(
        tail in prop::collection::vec(any::<u8>(), 0..300), keys in 0_u64..4, tensors in 0_u64..4,
    ) {
        let mut bytes = Gguf { key_count: Some(keys), tensor_count: Some(tensors), ..Gguf::default() }.header();
        bytes.extend(tail);
        let _ = parse(&bytes, bytes.len() as u64);
    }

    #[test]
    fn flipped_bits_give_an_answer(flips in prop::collection::vec((any::<prop::sample::Index>(), 0_u32..8), 1..4)) {
        let mut bytes = every_kind().bytes();
        for (index, bit) in flips {
            let at = index.index(bytes.len());
            bytes[at] ^= 1_u8 << bit;
        }
        let file_len = bytes.len() as u64;
        if let Ok(Parsed::Done(header)) = parse(&bytes, file_len) {
            for tensor in header.tensors.values() {
                prop_assert!(tensor.offset + tensor.bytes <= file_len);
            }
            for key in header.metadata.keys() {
                let _ = (header.string(key), header.unsigned(key), header.strings(key, 1000));
                let _ = (header.i32s(key), header.f32s(key), header.float(key), header.bool(key));
            }
        }
    }

    /// What is written is read: names, values and places.
    #[test]
    fn round_trip(
        version in 2_u32..4,
        shift in 3_u32..9,
        strings in prop::collection::btree_map("[a-z]{1,6}", ".{0,9}", 0..5),
        sizes in prop::collection::vec(1_u64..50, 0..6),
    ) {
        let alignment = 1_u64 << shift;
        let mut gguf = Gguf { version, alignment, ..Gguf::default() }
            .key("general.alignment", Meta::U32(alignment as u32));
        for (key, value) in &strings {
            gguf = gguf.key(key, Meta::Str(value.clone()));
        }
        for (number, &size) in sizes.iter().enumerate() {
            gguf = gguf.tensor(&format!("t{number}"), &[size], 0, vec![number as u8; 4 * size as usize]);
        }
        let bytes = gguf.bytes();
        let header = done(&bytes);
        for (key, value) in &strings {
            prop_assert_eq!(header.string(key).unwrap(), Some(value.as_str()));
        }
        for (number, &size) in sizes.iter().enumerate() {
            let tensor = &header.tensors[&format!("t{number}")];
            prop_assert_eq!(tensor.bytes, 4 * size);
            let data = &bytes[tensor.offset as usize..][..tensor.bytes as usize];
            prop_assert!(data.iter().all(|&byte| byte == number as u8));
        }
    }
}

/// The file is read in order, in growing pieces, never twice, and not far past its header.
#[test]
fn a_long_header_is_read_in_growing_pieces() {
    let tokens: Vec<String> = (0..100_000).map(|id| format!("token{id}")).collect();
    let gguf =
        Gguf::default().key("tokens", Meta::Strs(tokens)).tensor("w", &[8 << 20], 0, vec![0; 32 << 20]);
    let header_len = gguf.header().len() as u64;
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&gguf.bytes()).unwrap();
    let reads = Arc::new(Mutex::new(Vec::new()));
    let source = Noting { inner: FileSource::open(file.path()).unwrap(), reads: Arc::clone(&reads) };
    let header = GgufHeader::read(&source).unwrap();
    assert_eq!(header.strings("tokens", 100_000).unwrap().unwrap()[99_999], "token99999");
    let reads = reads.lock().unwrap();
    assert!(reads.len() > 2, "{reads:?}");
    assert!(reads.first().is_some_and(|read| read.start == 0));
    assert!(reads.windows(2).all(|pair| pair[0].end == pair[1].start), "{reads:?}");
    assert!(reads.last().is_some_and(|read| read.end < 2 * header_len), "{reads:?} for {header_len}");
}

#[test]
fn a_toy_model_is_sound() {
    let toy = Toy::new(swarm_weights::Family::Llama);
    assert_eq!(done(&toy.gguf().bytes()).tensors.len(), toy.tensors().len());
    assert_eq!(string("ab"), [2, 0, 0, 0, 0, 0, 0, 0, b'a', b'b']);
}
