//! Whatever the Hub does: the right bytes, or an error that says what happened.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use swarm_testkit::hub::{HubRequest, Trouble};
use swarm_weights::hub::HubSettings;
use swarm_weights::{ModelRef, Needs};

use crate::fetch::{Room, assert_right, fetch, open, swarm};

/// Opens, sets `plan`, fetches five layers, and looks at every byte. The text is the error, if there was one.
fn with(room: &Room, plan: impl Fn(&HubRequest) -> Trouble + Send + Sync + 'static) -> Result<(), String> {
    room.hub.trouble(|_| Trouble::None);
    let who = format!("node-{}", room.hub.log().len());
    let checkpoint = open(&room.store(&who), "org/toy", Needs::WeightsOnly);
    room.hub.clear_log();
    room.hub.trouble(plan);
    let fetched = fetch(&checkpoint, 2..7).map(drop).map_err(|error| swarm(&error));
    room.hub.trouble(|_| Trouble::None);
    if fetched.is_ok() {
        assert_right(&checkpoint, room.folder.path(), 2..7);
    }
    assert!(room.hub.log().iter().all(|served| !served.token_leaked));
    fetched
}

/// The trouble for every third request to the store, from the first on.
fn now_and_then(trouble: Trouble) -> impl Fn(&HubRequest) -> Trouble + Send + Sync + 'static {
    let count = AtomicU64::new(0);
    move |request| {
        let hit = request.store && count.fetch_add(1, Ordering::Relaxed).is_multiple_of(3);
        if hit { trouble.clone() } else { Trouble::None }
    }
}

#[test]
fn what_passes_is_waited_for() {
    let room = Room::safetensors(2);
    for trouble in [
        Trouble::Busy(None),
        Trouble::Busy(Some(0)),
        Trouble::Status(500),
        Trouble::Status(503),
        Trouble::Expired,
        Trouble::Cut(0),
        Trouble::Cut(1),
        Trouble::Shifted(1),
        Trouble::NoContentRange,
        Trouble::IgnoreRange,
        Trouble::Half,
    ] {
        with(&room, now_and_then(trouble.clone())).unwrap_or_else(|error| panic!("{trouble:?}: {error}"));
    }
}

#[test]
fn what_does_not_pass_is_said() {
    let room = Room::safetensors(2);
    for (trouble, words) in [
        (Trouble::Busy(None), "429"),
        (Trouble::Status(500), "500"),
        (Trouble::Expired, "403"),
        (Trouble::Cut(0), "ended early"),
        (Trouble::Shifted(7), "asked for"),
        (Trouble::NoContentRange, "does not say which"),
        (Trouble::IgnoreRange, "does not serve byte ranges"),
        (Trouble::OtherTotal, "changed"),
        (Trouble::Status(416), "changed"),
        (Trouble::Busy(Some(4000)), "4000 s"),
    ] {
        let always = trouble.clone();
        let plan = move |request: &HubRequest| if request.store { always.clone() } else { Trouble::None };
        let error = with(&room, plan).unwrap_err();
        assert!(error.contains(words) && error.contains("org/toy/model-"), "{trouble:?}: {error}");
        assert!(!error.contains("signature"), "a signed URL is shown: {error}");
    }
}

#[test]
fn a_connection_that_is_cut_anywhere_goes_on_there() {
    let room = Room::safetensors(1);
    for seed in [3_u64, 1009, 70_001] {
        let count = AtomicU64::new(seed);
        let cut = move |request: &HubRequest| {
            let step = count.fetch_add(1, Ordering::Relaxed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 44;
            if request.store { Trouble::Cut(1 + step % 700_000) } else { Trouble::None }
        };
        with(&room, cut).unwrap();
        assert_eq!(room.hub.bytes_again(), 0, "a byte that came was asked for again");
    }
}

#[test]
fn signed_urls_expire_while_a_stage_is_fetched() {
    let room = Room::safetensors(1);
    room.hub.set_url_life(Duration::from_millis(40));
    with(
        &room,
        |request| {
            if request.store { Trouble::Slow(Duration::from_millis(1)) } else { Trouble::None }
        },
    )
    .unwrap();
    let statuses: Vec<u16> = room.hub.log().iter().map(|served| served.status).collect();
    // Each request that comes too late is answered 403 once, and its bytes come all the same.
    assert!(statuses.contains(&206), "{statuses:?}");
}

#[test]
fn patience_is_what_the_server_asks_for() {
    let room = Room::safetensors(1);
    let asked = Arc::new(AtomicU64::new(0));
    let seen = asked.clone();
    let start = Instant::now();
    with(&room, move |request| {
        let first = request.store && seen.fetch_add(1, Ordering::Relaxed) == 0;
        if first { Trouble::Busy(Some(1)) } else { Trouble::None }
    })
    .unwrap();
    assert!(start.elapsed() >= Duration::from_secs(1) && asked.load(Ordering::Relaxed) > 1);
}

#[test]
fn a_server_that_falls_silent_is_left() {
    let room = Room::safetensors(1);
    let start = Instant::now();
    with(&room, now_and_then(Trouble::Stall(100_000, Duration::from_secs(60)))).unwrap();
    assert!(start.elapsed() < Duration::from_secs(20));
}

#[test]
fn two_versions_are_never_put_together() {
    let room = Room::safetensors(2);
    let error = with(&room, now_and_then(Trouble::OtherVersion)).unwrap_err();
    assert!(error.contains("changed") && error.contains("two tags"), "{error}");
    for trouble in [Trouble::OtherVersion, Trouble::OtherCommit] {
        let plan = {
            let trouble = trouble.clone();
            move |request: &HubRequest| if request.store { Trouble::Expired } else { trouble.clone() }
        };
        let error = with(&room, plan).unwrap_err();
        assert!(error.contains("changed"), "{trouble:?}: {error}");
    }
    // A revision that moved is another version, and what was fetched of the first one stays with it.
    let pinned = open(&room.store("pinned"), "org/toy", Needs::WeightsOnly);
    let newer = tempfile::tempdir().unwrap();
    let other = crate::fetch::model().with_seed(77);
    other.write_hf(newer.path(), swarm_testkit::toy::Storage::F32.sharded(2)).unwrap();
    room.hub.add("org/toy", newer.path()).unwrap();
    fetch(&pinned, 0..10).unwrap();
    assert_right(&pinned, room.folder.path(), 0..10);
}

#[test]
fn a_server_without_ranges_may_give_small_files_and_whole_ones() {
    let room = Room::safetensors(1);
    room.hub.trouble(|_| Trouble::IgnoreRange);
    let settings = HubSettings { connections: 1, ..room.settings("one") };
    let store = room.store_with("one", settings);
    let path = store.resolve(&ModelRef::parse("org/toy").unwrap(), Needs::Everything).unwrap();
    let error = swarm_weights::Checkpoint::open_with(&path, &|path| store.open_file(path)).unwrap_err();
    assert!(swarm(&error).contains("does not serve byte ranges"), "{}", swarm(&error));
}

#[test]
fn a_closed_door_is_explained() {
    let room = Room::safetensors(1);
    room.hub.require_token("right");
    let name = ModelRef::parse("org/toy").unwrap();
    let told = |who: &str| swarm(&room.store(who).resolve(&name, Needs::Everything).unwrap_err());
    assert!(told("wrong").contains("HF_TOKEN belongs to"), "{}", told("wrong"));
    assert!(!told("wrong").contains("wrong"), "a token is shown");
    let nobody = room.store_with("x", HubSettings { token: None, ..room.settings("") });
    let error = swarm(&nobody.resolve(&name, Needs::Everything).unwrap_err());
    assert!(error.contains("set HF_TOKEN"), "{error}");
    let checkpoint = open(&room.store("right"), "org/toy", Needs::Everything);
    fetch(&checkpoint, 0..1).unwrap();
    let absent = room.store("right").resolve(&ModelRef::parse("org/none").unwrap(), Needs::Everything);
    assert!(swarm(&absent.unwrap_err()).contains("org/none"));
}

#[test]
fn sizes_need_not_be_listed() {
    let room = Room::safetensors(3);
    room.hub.set_lists_blobs(false);
    with(&room, |_| Trouble::None).unwrap();
}
