//! Whole files of the Hugging Face cache hash to what the same bytes hash to that came piece by piece.

use std::fs;
use std::path::{Path, PathBuf};

use swarm_testkit::toy::Storage;
use swarm_weights::{Checkpoint, HashedUnits, Needs};

use crate::fetch::{Room, fetch, model, open};

/// A complete snapshot of the repository at the commit that the Hub has now.
fn snapshot(room: &Room, commit: &str) -> PathBuf {
    let folder = room.folder.path().join("elsewhere/models--org--toy/snapshots").join(commit);
    fs::create_dir_all(&folder).unwrap();
    for file in fs::read_dir(room.folder.path()).unwrap().map(|file| file.unwrap().path()) {
        if file.is_file() {
            fs::copy(&file, folder.join(file.file_name().unwrap())).unwrap();
        }
    }
    folder
}

fn roots(cache: &Path, model: &Checkpoint) -> Vec<Option<[u8; 32]>> {
    let hashed = HashedUnits::open(cache, model).unwrap();
    (0..13).map(|unit| hashed.root(unit)).collect()
}

#[test]
fn whole_files_hash_to_what_pieces_hash_to() {
    let room = Room::safetensors(2);
    let fetched = open(&room.store("me"), "org/toy", Needs::Everything);
    fetch(&fetched, 0..10).unwrap();
    let commit = fetched.origin().unwrap().commit.clone();
    let folder = snapshot(&room, &commit);
    let whole = Checkpoint::open(&folder).unwrap();
    assert_eq!(whole.origin(), fetched.origin());
    let cache = tempfile::tempdir().unwrap();
    let mut hashed = HashedUnits::open(cache.path(), &whole).unwrap();
    // A little at a time; what is known stays known.
    let mut rounds = 0;
    loop {
        let mut pieces = 20;
        let mut go_on = || {
            pieces -= 1;
            pieces >= 0
        };
        rounds += 1;
        if hashed.hash_more(&whole, &mut go_on) {
            break;
        }
        assert!(rounds < 100);
        hashed = HashedUnits::open(cache.path(), &whole).unwrap();
    }
    assert!(rounds > 2, "{rounds}");
    let want: Vec<_> = (0..13).map(|unit| fetched.unit_root(unit)).collect();
    assert!(want.iter().take(12).all(Option::is_some));
    assert_eq!(roots(cache.path(), &whole), want);
    assert!(hashed.hash_more(&whole, &mut || panic!("all is known")));
    // Of a file that was changed nothing is known any more.
    let other = tempfile::tempdir().unwrap();
    model().with_seed(9).write_hf(other.path(), Storage::F32.sharded(2)).unwrap();
    fs::copy(
        other.path().join("model-00001-of-00002.safetensors"),
        folder.join("model-00001-of-00002.safetensors"),
    )
    .unwrap();
    let changed = Checkpoint::open(&folder).unwrap();
    assert!(roots(cache.path(), &changed).iter().all(Option::is_none));
    // What has pieces needs no reading, and what has no repository has no name for others.
    assert!(HashedUnits::open(cache.path(), &fetched).is_none());
    assert!(HashedUnits::open(cache.path(), &Checkpoint::open(room.folder.path()).unwrap()).is_none());
    // Junk is no root.
    let file = fs::read_dir(cache.path().join("hashed")).unwrap().next().unwrap().unwrap().path();
    fs::write(&file, b"0 zz\n1\n\xff 3\n2 00\n").unwrap();
    let _ = HashedUnits::open(cache.path(), &changed);
}
