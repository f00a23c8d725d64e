//! Bytes from other nodes before the Hub's, and nothing believed that does not match its digest.

use std::error::Error;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use swarm_testkit::hub::Trouble;
use swarm_testkit::toy::{GgufType, Storage};
use swarm_weights::hub::HubSettings;
use swarm_weights::{
    Adopted, Brought, Catalogue, Checkpoint, Found, ModelRef, Needs, Share, Store, StoreError, Supplier,
    SupplyAsk, Take,
};

use crate::fetch::{Room, assert_right, fetch, model, open};

/// What goes wrong with every so many pieces.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    None,
    /// Other bytes than the digest says.
    Corrupt(u64),
    /// Gone after so many pieces.
    Leaves(u64),
}

/// Another node, without a network between.
struct Neighbour {
    share: Share,
    fault: Fault,
    pieces: AtomicU64,
}

impl Neighbour {
    fn of(checkpoint: &Checkpoint, fault: Fault) -> Arc<Self> {
        Arc::new(Self { share: checkpoint.share().unwrap(), fault, pieces: AtomicU64::new(0) })
    }

    fn give(
        &self,
        ask: usize,
        range: Range<u64>,
        digest: [u8; 32],
        bytes: &mut [u8],
        take: &mut Take<'_>,
    ) -> bool {
        let count = self.pieces.fetch_add(1, Ordering::Relaxed);
        if matches!(self.fault, Fault::Corrupt(every) if count % every == every - 1) {
            bytes[0] ^= 1;
        }
        take(Brought::Piece { ask, range, digest, bytes })
    }
}

impl Supplier for Neighbour {
    fn name(&self) -> &str {
        "neighbour"
    }

    fn bring(
        &self,
        asks: &[SupplyAsk],
        through: bool,
        take: &mut Take<'_>,
    ) -> Result<(), Box<dyn Error + Send + Sync>> {
        for (number, ask) in asks.iter().enumerate() {
            let file =
                self.share.files().iter().position(|file| file.name == ask.file).ok_or("no such file")?;
            let mut absent = Vec::new();
            for range in &ask.pieces {
                if matches!(self.fault, Fault::Leaves(after) if self.pieces.load(Ordering::Relaxed) >= after)
                {
                    return Err("it left".into());
                }
                let mut bytes = Vec::new();
                match self.share.piece(file, range, &mut bytes)?.ok_or("no such piece")? {
                    Found::Here(digest) => {
                        if !self.give(number, range.clone(), digest, &mut bytes, take) {
                            return Ok(());
                        }
                    }
                    Found::Coming | Found::Absent => absent.push(range.clone()),
                }
            }
            if through {
                self.share.through(file, &absent, false, &mut |range, bytes| {
                    let digest = *blake3::hash(bytes).as_bytes();
                    self.give(number, range.clone(), digest, &mut bytes.to_vec(), take)
                })?;
            }
        }
        Ok(())
    }
}

fn catalogue(checkpoint: &Checkpoint, share: &Share) -> Catalogue {
    Catalogue {
        name: checkpoint.name().to_owned(),
        origin: checkpoint.origin().cloned(),
        fingerprint: checkpoint.fingerprint().unwrap(),
        from: [1; 32],
        files: share.files().to_vec(),
    }
}

fn adopt(store: &Arc<Store>, from: &Checkpoint, by: &Arc<Neighbour>) -> (Adopted, Checkpoint) {
    let adopted = store.adopt(&catalogue(from, &by.share), by.clone()).unwrap();
    let checkpoint = Checkpoint::open_with(&adopted.path, &|path| store.open_file(path)).unwrap();
    (adopted, checkpoint)
}

fn offline(room: &Room, who: &str) -> Arc<Store> {
    room.store_with(who, HubSettings { offline: true, ..room.settings(who) })
}

#[test]
fn a_node_without_a_hub_gets_its_stage_from_one_with_files() {
    type Write = fn(&Path) -> std::path::PathBuf;
    let writes: [Write; 4] = [
        |folder| {
            model().write_hf(folder, Storage::F32).unwrap();
            folder.to_owned()
        },
        |folder| {
            model().write_hf(folder, Storage::F32.sharded(3)).unwrap();
            folder.to_owned()
        },
        |folder| {
            let file = folder.join("a name with spaces.gguf");
            model().write_gguf(&file, GgufType::Q8_0).unwrap();
            file
        },
        |folder| {
            model().write_gguf_split(folder, "toy", GgufType::F16, 3).unwrap();
            folder.join("toy-00001-of-00003.gguf")
        },
    ];
    for write in writes {
        let room = Room::safetensors(1);
        let files = tempfile::tempdir().unwrap();
        let original = write(files.path());
        let source = Checkpoint::open(&original).unwrap();
        let neighbour = Neighbour::of(&source, Fault::None);
        let store = offline(&room, "worker");
        let (adopted, checkpoint) = adopt(&store, &source, &neighbour);
        assert!(checkpoint.is_model(&source.fingerprint().unwrap()).unwrap());
        let missing = checkpoint.missing_bytes(3..6);
        // The header of a GGUF file comes in growing pieces, which may hold the first tensors.
        assert!(missing > 0 && missing <= checkpoint.stage_bytes(3..6));
        let last = fetch(&checkpoint, 3..6).unwrap();
        assert_eq!((last.bytes_done, last.bytes_total), (missing, missing));
        assert_right(&checkpoint, &original, 3..6);
        // The next time all is here, and nobody is asked.
        let asked = neighbour.pieces.load(Ordering::Relaxed);
        drop((adopted, checkpoint));
        let (_adopted, checkpoint) = adopt(&store, &source, &neighbour);
        assert_eq!(checkpoint.missing_bytes(3..6), 0);
        assert_right(&checkpoint, &original, 3..6);
        assert_eq!(neighbour.pieces.load(Ordering::Relaxed), asked);
        assert!(room.hub.log().is_empty());
        // Without anybody to ask, the rest is not to be had, and that is said.
        drop(_adopted);
        let error = fetch(&checkpoint, 6..10).unwrap_err();
        assert!(matches!(error, StoreError::NotSupplied { .. }), "{error}");
    }
}

#[test]
fn what_a_neighbour_holds_is_not_asked_of_the_hub() {
    let room = Room::safetensors(2);
    let first = room.store("first");
    let source = open(&first, "org/toy", Needs::WeightsOnly);
    fetch(&source, 0..5).unwrap();
    let neighbour = Neighbour::of(&source, Fault::None);
    let second = room.store("second");
    let (_adopted, checkpoint) = adopt(&second, &source, &neighbour);
    assert_eq!(checkpoint.origin(), source.origin());
    fetch(&checkpoint, 3..8).unwrap();
    assert_right(&checkpoint, room.folder.path(), 3..8);
    assert_eq!(room.hub.bytes_again(), 0);
    assert_eq!(checkpoint.missing_bytes(5..8), 0);
    // What another told is replaced by what the Hub says, and the bytes stay.
    let whole = open(&second, "org/toy", Needs::Everything);
    assert_eq!(whole.missing_bytes(3..8), 0);
    assert_eq!(room.hub.bytes_again(), 0);
}

#[test]
fn a_node_with_a_way_to_the_hub_fetches_for_one_without() {
    let room = Room::safetensors(2);
    let first = room.store("first");
    let source = open(&first, "org/toy", Needs::WeightsOnly);
    fetch(&source, 0..5).unwrap();
    let neighbour = Neighbour::of(&source, Fault::None);
    let (_adopted, checkpoint) = adopt(&offline(&room, "second"), &source, &neighbour);
    fetch(&checkpoint, 5..10).unwrap();
    assert_right(&checkpoint, room.folder.path(), 5..10);
    assert_eq!(room.hub.bytes_again(), 0);
    assert_eq!(room.hub.bytes_to("second"), 0);
    // It keeps nothing of what it fetched for another.
    assert!(source.missing_bytes(5..10) > 0);
}

#[test]
fn what_is_fetched_on_the_way_comes_by_several_requests_at_once_and_in_order() {
    let room = Room::safetensors(1);
    let source = open(&room.store("first"), "org/toy", Needs::WeightsOnly);
    let neighbour = Neighbour::of(&source, Fault::None);
    let (_adopted, checkpoint) = adopt(&offline(&room, "second"), &source, &neighbour);
    let under_way = Arc::new((AtomicU64::new(0), AtomicU64::new(0)));
    let seen = under_way.clone();
    room.hub.trouble(move |request| {
        if request.store {
            let now = seen.0.fetch_add(1, Ordering::SeqCst) + 1;
            seen.1.fetch_max(now, Ordering::SeqCst);
            std::thread::sleep(std::time::Duration::from_millis(60));
            seen.0.fetch_sub(1, Ordering::SeqCst);
        }
        Trouble::None
    });
    fetch(&checkpoint, 3..10).unwrap();
    assert_right(&checkpoint, room.folder.path(), 3..10);
    let most = under_way.1.load(Ordering::SeqCst);
    assert!(most > 2 && most <= 8, "{most} requests at a time");
    assert_eq!(room.hub.bytes_again(), 0);
    // Who wants no more ends all of them.
    let file = neighbour.share.files().iter().position(|file| file.name == "model.safetensors").unwrap();
    let pieces: Vec<Range<u64>> = (0..20).map(|piece| piece << 18..(piece + 1) << 18).collect();
    let mut came = Vec::new();
    let ended = neighbour.share.through(file, &pieces, false, &mut |range, bytes| {
        assert_eq!(bytes.len() as u64, range.end - range.start);
        came.push(range.clone());
        came.len() < 3
    });
    assert!(matches!(ended, Err(StoreError::Aborted)));
    assert_eq!(came, pieces[..3]);
}

#[test]
fn corrupt_bytes_are_refused_and_fetched_elsewhere() {
    for (fault, from_hub) in [(Fault::Corrupt(5), true), (Fault::Corrupt(1), true), (Fault::Leaves(4), true)]
    {
        let room = Room::safetensors(1);
        let source = open(&room.store("first"), "org/toy", Needs::WeightsOnly);
        fetch(&source, 0..10).unwrap();
        let neighbour = Neighbour::of(&source, Fault::None);
        // A sound beginning: small files and headers; then the trouble.
        let second = room.store("second");
        let (adopted, checkpoint) = adopt(&second, &source, &neighbour);
        drop(adopted);
        let troubled = Neighbour::of(&source, fault);
        let _adopted = second.adopt(&catalogue(&source, &troubled.share), troubled.clone()).unwrap();
        fetch(&checkpoint, 0..10).unwrap();
        assert_right(&checkpoint, room.folder.path(), 0..10);
        assert_eq!(room.hub.bytes_to("second") > 0, from_hub);
    }
}

#[test]
fn a_damaged_piece_is_asked_for_again() {
    let room = Room::safetensors(1);
    let source = open(&room.store("first"), "org/toy", Needs::WeightsOnly);
    fetch(&source, 0..10).unwrap();
    let neighbour = Neighbour::of(&source, Fault::None);
    let second = offline(&room, "second");
    let (adopted, checkpoint) = adopt(&second, &source, &neighbour);
    fetch(&checkpoint, 0..2).unwrap();
    let info = checkpoint.stage_tensors(1..2)[0].clone();
    let file = adopted.path.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let tensor = checkpoint.read(&info.name).unwrap().bytes;
    let at = bytes.windows(64).position(|window| window == &tensor[..64]).unwrap();
    bytes[at] ^= 4;
    std::fs::write(&file, bytes).unwrap();
    drop((adopted, checkpoint));
    let (_adopted, checkpoint) = adopt(&offline(&room, "second"), &source, &neighbour);
    assert_right(&checkpoint, room.folder.path(), 0..2);
}

#[test]
fn names_that_would_leave_the_folder_are_refused() {
    let room = Room::safetensors(1);
    let source = Checkpoint::open(room.folder.path()).unwrap();
    let neighbour = Neighbour::of(&source, Fault::None);
    let sound = catalogue(&source, &neighbour.share);
    let store = offline(&room, "worker");
    for name in
        ["../x.gguf", "/etc/x.gguf", ".x.gguf", "repo.json", "model.safetensors.ranges", "write.lock", ""]
    {
        for small in [false, true] {
            let mut bad = sound.clone();
            bad.files[1].name = name.to_owned();
            bad.files[1].small = small;
            let refused = store.adopt(&bad, neighbour.clone()).err().map(|error| error.to_string());
            assert!(refused.is_some_and(|error| error.contains("a file of it is called")), "{name}");
        }
    }
    let origin = swarm_weights::Origin { id: "../..".into(), commit: "0".repeat(40), file: None };
    assert!(store.adopt(&Catalogue { origin: Some(origin), ..sound }, neighbour).is_err());
    assert!(ModelRef::parse("../..").is_none());
}
