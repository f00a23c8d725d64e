//! The safetensors header: the reference crate's verdict, or a stricter one.

use proptest::prelude::*;
use serde_json::json;
use swarm_weights::safetensors::{SafetensorsError, SafetensorsHeader};

use crate::writer::{safetensors, safetensors_raw};

fn ours(file: &[u8]) -> Result<SafetensorsHeader, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    std::fs::write(&path, file).unwrap();
    let source = swarm_weights::FileSource::open(&path).unwrap();
    SafetensorsHeader::read(&source).map_err(|error| {
        let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        let root = std::error::Error::source(&error).and_then(std::error::Error::source);
        format!("{error}: {cause}: {}", root.map(ToString::to_string).unwrap_or_default())
    })
}

/// Never more lenient than the reference; equal contents when both accept.
fn compare(file: &[u8]) -> Result<(), TestCaseError> {
    let reference = safetensors::SafeTensors::deserialize(file);
    let Ok(header) = ours(file) else { return Ok(()) };
    let reference = match reference {
        Ok(reference) => reference,
        Err(error) => return Err(TestCaseError::fail(format!("the reference refuses: {error:?}"))),
    };
    prop_assert_eq!(header.tensors.len(), reference.len());
    for (name, tensor) in &header.tensors {
        let view = reference.tensor(name).unwrap();
        let shape: Vec<u64> = view.shape().iter().map(|&dim| dim as u64).collect();
        prop_assert_eq!(&tensor.shape, &shape);
        prop_assert_eq!(&tensor.dtype, &view.dtype().to_string());
        prop_assert_eq!(&file[tensor.offset as usize..][..tensor.bytes as usize], view.data());
    }
    Ok(())
}

fn sound() -> Vec<u8> {
    safetensors(&[
        ("a".into(), "F32", vec![2, 3], vec![1; 24]),
        ("b".into(), "BF16", vec![4], vec![2; 8]),
        ("empty".into(), "F16", vec![0, 5], vec![]),
        ("c".into(), "I8", vec![], vec![3]),
    ])
}

#[test]
fn a_sound_file_reads_as_the_reference_reads_it() {
    let file = sound();
    assert_eq!(ours(&file).unwrap().tensors.len(), 4);
    compare(&file).unwrap();
}

#[test]
fn malformed_files_are_refused() {
    let entry = |shape: &str, start: u64, end: u64| {
        format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":[{start},{end}]}}"#)
    };
    let (first, second) = (entry("[1]", 0, 4), entry("[1]", 4, 8));
    let cases: Vec<(&str, String, usize)> = vec![
        ("hole or an overlap", format!(r#"{{"a":{first},"b":{}}}"#, entry("[1]", 8, 12)), 12),
        ("hole or an overlap", format!(r#"{{"a":{first},"b":{}}}"#, entry("[1]", 2, 6)), 8),
        ("hole or an overlap", format!(r#"{{"a":{first},"b":{first}}}"#), 4),
        ("hole or an overlap", format!(r#"{{"b":{second}}}"#), 8),
        ("occurs twice", format!(r#"{{"a":{first},"a":{second}}}"#), 8),
        ("occurs twice", format!(r#"{{"__metadata__":{{}},"a":{first},"__metadata__":{{}}}}"#), 4),
        ("cannot span", format!(r#"{{"a":{}}}"#, entry("[2]", 0, 4)), 4),
        ("cannot span", format!(r#"{{"a":{}}}"#, entry("[1]", 4, 0)), 4),
        ("cannot span", format!(r#"{{"a":{}}}"#, entry("[4294967296,4294967296]", 0, 0)), 0),
        ("cannot span", format!(r#"{{"a":{}}}"#, entry("[4611686018427387905]", 0, 4)), 4),
        ("cannot span", format!(r#"{{"a":{}}}"#, entry("[18446744073709551615,2,0]", 0, 0)), 0),
        ("the file has", format!(r#"{{"a":{first}}}"#), 3),
        ("the file has", format!(r#"{{"a":{first}}}"#), 5),
        ("the file has", "{}".into(), 1),
        ("unknown type", first.replace("F32", "Q4_0").replacen('{', "{\"a\":{", 1) + "}", 4),
        ("at most 8 dimensions", format!(r#"{{"a":{}}}"#, entry("[1,1,1,1,1,1,1,1,1]", 0, 4)), 4),
        ("not the JSON", r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#.into(), 4),
        ("not the JSON", r#"{"a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}}"#.into(), 4),
        ("not the JSON", r#"{"a":{"dtype":"F32","shape":[1]}}"#.into(), 4),
        ("not the JSON", r#"{"__metadata__":{"a":1}}"#.into(), 0),
        ("not the JSON", format!("{{\"a\":{}", "[".repeat(100_000)), 0),
        ("not the JSON", r#"{"a":"#.into(), 0),
        ("not the JSON", "{} x".into(), 0),
        ("does not start with", "[]".into(), 0),
        ("does not start with", " {}".into(), 0),
        ("does not start with", String::new(), 0),
    ];
    for (word, header, data) in cases {
        let file = safetensors_raw(&header, &vec![0; data]);
        let error = ours(&file).expect_err(&header);
        assert!(error.contains(word), "{word:?} is not in {error:?}");
        compare(&file).unwrap();
    }
    let not_utf8 = [&9_u64.to_le_bytes()[..], b"{\"\xff\":{}} "].concat();
    assert!(ours(&not_utf8).is_err());
}

#[test]
fn lengths_are_held_against_the_file() {
    for len in 0..8 {
        assert!(ours(&vec![0; len]).unwrap_err().contains("too few"));
    }
    for (len, word) in
        [(3_u64, "fetch it again"), (100_000_000, "fetch it again"), (100_000_001, "more than the")]
    {
        assert!(ours(&[&len.to_le_bytes()[..], b"{}"].concat()).unwrap_err().contains(word), "{len}");
    }
    assert!(ours(&[&u64::MAX.to_le_bytes()[..], b"{}"].concat()).unwrap_err().contains("more than the"));
    let file = sound();
    for len in 0..file.len() {
        assert!(ours(&file[..len]).is_err(), "cut to {len}");
    }
}

#[test]
fn too_many_tensors_are_refused() {
    let mut header = String::from("{");
    for number in 0..=1 << 18 {
        header += &format!(r#""{number}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}},"#);
    }
    header.pop();
    let error = SafetensorsHeader::parse(format!("{header}}}").as_bytes(), 1 << 40).unwrap_err();
    assert!(matches!(error, SafetensorsError::Json(_)), "{error}");
}

proptest! {
    #[test]
    fn any_bytes_give_an_answer(json in prop::collection::vec(any::<u8>(), 0..200), file_len in any::<u64>()) {
        let _ = SafetensorsHeader::parse(&json, file_len);
    }

    #[test]
    fn flipped_bytes_are_judged_as_the_reference_judges(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut file = sound();
        for (index, byte) in changes {
            let at = index.index(file.len());
            file[at] = byte;
        }
        if let Some(cut) = cut {
            file.truncate(cut.index(file.len()));
        }
        compare(&file)?;
    }

    /// Whole headers made of plausible parts: sizes, gaps, orders and duplicates vary.
    #[test]
    fn plausible_headers_are_judged_as_the_reference_judges(
        tensors in prop::collection::vec(
            ("[a-c]", prop::sample::select(vec!["F32", "F16", "F4", "BOOL", "C64", "F8_E8M0", "f32"]),
             prop::collection::vec(0_u64..4, 0..3), 0_u64..12, 0_u64..12),
            0..4,
        ),
        chain in any::<bool>(),
        extra in 0_usize..2,
    ) {
        let mut header = serde_json::Map::new();
        let mut end = 0;
        for (name, dtype, shape, start, len) in tensors {
            let start = if chain { end } else { start };
            let bits = shape.iter().product::<u64>() * match dtype { "F32" => 32, "F16" => 16, "F4" => 4, "C64" => 64, _ => 8 };
            let len = if chain { bits / 8 } else { len };
            header.insert(name, json!({"dtype": dtype, "shape": shape, "data_offsets": [start, start + len]}));
            end = start + len;
        }
        let file = safetensors_raw(&serde_json::Value::Object(header).to_string(), &vec![7; end as usize + extra]);
        compare(&file)?;
        // Where the reference accepts such a file, so do we.
        if safetensors::SafeTensors::deserialize(&file).is_ok() {
            prop_assert!(ours(&file).is_ok());
        }
    }
}
