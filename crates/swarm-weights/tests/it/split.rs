//! Models over several GGUF files.

use std::path::Path;

use swarm_testkit::toy::{GgufType, spec};
use swarm_weights::{Checkpoint, cache};

fn written(folder: &Path, files: u16) -> std::path::PathBuf {
    spec("llama3").write_gguf_split(folder, "toy-Q8_0", GgufType::Q8_0, files).unwrap();
    folder.join(format!("toy-Q8_0-00001-of-{files:05}.gguf"))
}

#[test]
fn several_files_are_one_model() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole.gguf");
    spec("llama3").write_gguf(&whole, GgufType::Q8_0).unwrap();
    let whole = Checkpoint::open(&whole).unwrap();
    for files in [1, 2, 3, 7] {
        let folder = tempfile::tempdir().unwrap();
        let first = written(folder.path(), files);
        let last = folder.path().join(format!("toy-Q8_0-{files:05}-of-{files:05}.gguf"));
        for path in [first.as_path(), last.as_path(), folder.path()] {
            let split = Checkpoint::open(path).unwrap();
            assert_eq!(split.name(), "toy-Q8_0");
            assert_eq!(split.fingerprint().unwrap(), whole.fingerprint().unwrap());
            for info in whole.tensors() {
                assert_eq!(split.read(&info.name).unwrap(), whole.read(&info.name).unwrap(), "{}", info.name);
            }
        }
    }
}

#[test]
fn a_file_that_is_missing_or_another_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let first = written(folder.path(), 3);
    let (second, third) = (
        folder.path().join("toy-Q8_0-00002-of-00003.gguf"),
        folder.path().join("toy-Q8_0-00003-of-00003.gguf"),
    );
    let kept = std::fs::read(&second).unwrap();
    std::fs::copy(&third, &second).unwrap();
    let error = Checkpoint::open(&first).unwrap_err().to_string();
    assert!(error.contains("00002-of-00003") && error.contains("part 3 of 3"), "{error}");
    std::fs::remove_file(&second).unwrap();
    let error = Checkpoint::open(&first).unwrap_err().to_string();
    assert!(error.contains("00002-of-00003"), "{error}");
    // A part under a name that hides what it is.
    let alone = folder.path().join("alone.gguf");
    std::fs::write(&alone, kept).unwrap();
    let error = Checkpoint::open(&alone).unwrap_err().to_string();
    assert!(error.contains("part 2 of 3"), "{error}");
    assert!(cache::resolve(first.to_str().unwrap()).is_ok());
}
