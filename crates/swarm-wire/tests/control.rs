//! The control plane: round trips, tolerance, refusals.

use std::net::SocketAddr;

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use serde_json::{Value, json};
use swarm_wire::{
    Blame, CONTROL_BYTES_MAX, CloseCode, Control, ControlError, Epoch, Examine, Examined, Fingerprint, Held,
    Hello, KvType, LayerRange, LayerShape, Limits, Listed, ListedModel, LoadSource, Loading, MatrixShape,
    Measure, Measured, MeasuredLink, ModelId, NextHop, NodeId, Origin, PROTOCOL_MAJOR, PROTOCOL_MINOR, Ping,
    Pong, Prepare, Quant, Ready, Refused, Role, Stats, SuppliedFile, Supply, UnitRoot, WeightSource,
};

const LIMITS: Limits =
    Limits { width: 576, vocab: 49152, context_max: 2048, tokens_max: 128, segments_max: 16, stages_max: 8 };

fn hello() -> Hello {
    Hello {
        protocol_major: PROTOCOL_MAJOR,
        protocol_minor: PROTOCOL_MINOR,
        build: "0.1.0".into(),
        numerics: "swarm-numerics-1".into(),
        node_id: NodeId([7; 32]),
        name: "kitchen".into(),
        role: Role::Worker,
        memory_bytes_available: 8 << 30,
        cores: 4,
        read_gb_s: Some(12.5),
        models: None,
    }
}

fn prepare() -> Prepare {
    Prepare {
        epoch: Epoch(1),
        model: "smol".into(),
        fingerprint: Fingerprint([9; 32]),
        origin: None,
        layers: LayerRange { start: 10, end: 20 },
        layers_total: 30,
        tail: false,
        quant: None,
        kv_type: KvType::F16,
        context: 2048,
        sessions_max: 4,
        limits: LIMITS,
        next: Some(NextHop { node_id: NodeId([8; 32]), addresses: vec!["10.0.0.2:4000".parse().unwrap()] }),
        threads: None,
        numerics: "swarm-numerics-1".into(),
        sources: Vec::new(),
    }
}

fn model_id(name: &str) -> ModelId {
    ModelId { name: name.into(), fingerprint: Fingerprint([9; 32]), origin: None }
}

fn weight_source() -> WeightSource {
    let node = NextHop { node_id: NodeId([4; 32]), addresses: vec!["10.0.0.3:4000".parse().unwrap()] };
    WeightSource { node, units: vec![UnitRoot { unit: 7, root: Fingerprint([1; 32]) }] }
}

fn supply() -> Supply {
    let file = |name: &str, small| SuppliedFile { name: name.into(), bytes: 99, tag: None, small };
    Supply {
        epoch: Epoch(3),
        fingerprint: Fingerprint([9; 32]),
        name: "toy".into(),
        origin: None,
        cache: None,
        files: vec![file("config.json", true), file("model.safetensors", false)],
    }
}

fn any_supply() -> impl Strategy<Value = Supply> {
    let file = (".{0,20}", 0u64..=1 << 50, option::of("[0-9a-f]{40}"), any::<bool>());
    (any::<u32>(), any::<[u8; 32]>(), ".{0,80}", vec(file, 1..5), any::<bool>()).prop_map(
        |(epoch, id, name, files, has_cache)| {
            let files = files.into_iter().enumerate();
            let file = |(index, (name, bytes, tag, small))| SuppliedFile {
                name: format!("{index}{name}"),
                bytes,
                tag,
                small,
            };
            let (fingerprint, cache) = (Fingerprint(id), has_cache.then_some(Fingerprint(id)));
            Supply {
                epoch: Epoch(epoch),
                fingerprint,
                name,
                origin: None,
                cache,
                files: files.map(file).collect(),
            }
        },
    )
}

fn any_hello() -> impl Strategy<Value = Hello> {
    let text = || ".{0,64}";
    let size = 0u64..=1 << 50;
    let speed = option::of((1u32..1_000_000).prop_map(|n| f64::from(n) / 64.0));
    let fixed = (any::<u32>(), any::<u32>(), any::<[u8; 32]>(), any::<bool>());
    (text(), text(), text(), size, 1u32..=256, speed, option::of(vec(text(), 0..4)), fixed).prop_map(
        |(build, numerics, name, memory_bytes_available, cores, read_gb_s, models, fixed)| Hello {
            protocol_major: fixed.0,
            protocol_minor: fixed.1,
            build,
            numerics,
            node_id: NodeId(fixed.2),
            name,
            role: if fixed.3 { Role::Worker } else { Role::Coordinator },
            memory_bytes_available,
            cores,
            read_gb_s,
            models,
        },
    )
}

fn any_prepare() -> impl Strategy<Value = Prepare> {
    let layers = (1u32..=100).prop_flat_map(|total| {
        (0..total).prop_flat_map(move |start| (Just(total), Just(start), start + 1..=total))
    });
    let ids = (any::<u32>(), any::<[u8; 32]>(), any::<[u8; 32]>());
    let addresses = vec((any::<[u8; 4]>(), any::<u16>()).prop_map(SocketAddr::from), 1..=3);
    let numbers = (1u32..=2048, 1u32..=64, option::of(1u32..=64), any::<bool>());
    (layers, ids, addresses, ".{0,80}", numbers).prop_map(
        |((layers_total, start, end), (epoch, fingerprint, id), addresses, model, numbers)| {
            let tail = end == layers_total;
            Prepare {
                epoch: Epoch(epoch),
                origin: numbers.3.then(|| Origin {
                    repository: model.chars().take(20).collect(),
                    commit: "0".repeat(40),
                    file: tail.then(|| "x.gguf".to_owned()),
                    fingerprint: Fingerprint(id),
                }),
                model,
                fingerprint: Fingerprint(fingerprint),
                layers: LayerRange { start, end },
                layers_total,
                tail,
                quant: [None, Some(Quant::Q8_0), Some(Quant::Q4_0), Some(Quant::Q4_K)]
                    [fingerprint[0] as usize % 4],
                kv_type: if numbers.3 { KvType::F16 } else { KvType::F32 },
                context: numbers.0,
                sessions_max: numbers.1,
                limits: LIMITS,
                next: (!tail).then_some(NextHop { node_id: NodeId(id), addresses }),
                threads: numbers.2,
                numerics: "n".into(),
                sources: tail.then(weight_source).into_iter().collect(),
            }
        },
    )
}

fn any_control() -> impl Strategy<Value = Control> {
    let time = || 0u64..=1 << 53;
    let blame = prop_oneof![Just(Blame::Caller), Just(Blame::Link), Just(Blame::Peer), Just(Blame::Us)];
    let stats = (any::<u64>(), option::of(any::<u32>()), any::<u32>(), time(), time()).prop_map(
        |(id, epoch, n, a, b)| Stats {
            id,
            epoch: epoch.map(Epoch),
            sessions: n,
            frames: id,
            compute_us_p50: a,
            queue_us_p99: b,
            ..Stats::default()
        },
    );
    prop_oneof![
        any_hello().prop_map(Control::Hello),
        any_hello().prop_map(Control::Welcome),
        any_prepare().prop_map(|prepare| Control::Prepare(Box::new(prepare))),
        any_supply().prop_map(|supply| Control::Supply(Box::new(supply))),
        ".{0,80}".prop_map(|name| Control::Fetch(model_id(&name))),
        ".{0,80}".prop_map(|model| Control::Resolve { model }),
        Just(Control::List),
        any_listed().prop_map(|listed| Control::Listed(Box::new(listed))),
        (0u64..1 << 40, 0u64..1 << 40).prop_map(|(a, b)| Control::Loading(Loading {
            bytes_done: a.min(b),
            bytes_total: a.max(b),
            from: LoadSource::Hub
        })),
        (any::<u32>(), 0u64..1 << 50, 0u64..1 << 50).prop_map(|(epoch, bytes_loaded, per_token)| {
            Control::Ready(Ready { epoch: Epoch(epoch), bytes_loaded, weight_bytes_per_token: per_token })
        }),
        any::<u32>().prop_map(|epoch| Control::Start { epoch: Epoch(epoch) }),
        any::<u32>().prop_map(|epoch| Control::Started { epoch: Epoch(epoch) }),
        (blame, ".{0,200}", any::<Option<u32>>()).prop_map(|(blame, reason, epoch)| {
            let code = epoch.map(|byte| CloseCode::ALL[byte as usize % CloseCode::ALL.len()]);
            let towards = epoch.filter(|epoch| epoch % 2 == 0).map(|_| NodeId([4; 32]));
            Control::Refused(Refused { blame, reason, epoch: epoch.map(Epoch), code, towards })
        }),
        (any::<u64>(), time()).prop_map(|(id, sent_us)| Control::Ping(Ping { id, sent_us })),
        (any::<u64>(), time(), time()).prop_map(|(id, sent_us, node_us)| Control::Pong(Pong {
            id,
            sent_us,
            node_us
        })),
        any::<u64>().prop_map(|id| Control::StatsRequest { id }),
        stats.prop_map(Control::Stats),
        ".{0,200}".prop_map(|reason| Control::Release { reason }),
        any_measure().prop_map(|measure| Control::Measure(Box::new(measure))),
        any_measured().prop_map(Control::Measured),
        Just(Control::Probe),
        any_examine().prop_map(Control::Examine),
        any_examined().prop_map(|examined| Control::Examined(Box::new(examined))),
        Just(Control::Bye),
    ]
}

fn any_listed() -> impl Strategy<Value = Listed> {
    let layers = vec((0u32..3, 1u32..5), 0..6);
    let model = (".{0,40}", option::of("[0-9a-f]{40}"), option::of(".{0,20}"), layers, 0u64..1 << 40);
    let model = model.prop_map(|(name, commit, file, gaps, bytes)| {
        let mut end = 0;
        let range = |(gap, len)| {
            let range = LayerRange { start: end + gap, end: end + gap + len };
            end = range.end;
            range
        };
        let layers: Vec<_> = gaps.into_iter().map(range).collect();
        let format = if file.is_some() { "gguf" } else { "safetensors" }.to_owned();
        let (layers_total, bytes_held) = (end.max(1), bytes / 3);
        ListedModel { name, commit, file, format, layers_total, layers, bytes, bytes_held }
    });
    (".{0,64}", vec(model, 0..4), any::<u32>()).prop_map(|(name, models, left_out)| Listed {
        name,
        models,
        left_out,
    })
}

fn any_examine() -> impl Strategy<Value = Examine> {
    (any::<u64>(), option::of(1u16..), option::of(".{0,64}"), 0u32..=128 * 1024)
        .prop_map(|(id, reach, hear, padding_bytes)| Examine { id, reach, hear, padding_bytes })
}

fn any_examined() -> impl Strategy<Value = Examined> {
    (any::<u64>(), any_hello(), any::<Option<bool>>(), any::<Option<bool>>(), 0usize..200).prop_map(
        |(id, hello, reaches, hears, padding)| Examined {
            id,
            hello,
            reaches,
            hears,
            padding: "0".repeat(padding),
        },
    )
}

fn any_measure() -> impl Strategy<Value = Measure> {
    let matrix = (".{0,16}", 1u32..1 << 22, 1u32..1 << 22).prop_map(|(dtype, rows, cols)| MatrixShape {
        dtype,
        rows,
        cols,
    });
    let shape = (vec(matrix, 8), 1u32..4096).prop_map(|(all, layers)| LayerShape {
        layer: std::array::from_fn(|index| all[index].clone()),
        head: all[7].clone(),
        layers,
    });
    let target = any::<[u8; 32]>()
        .prop_map(|id| NextHop { node_id: NodeId(id), addresses: vec!["10.0.0.2:4000".parse().unwrap()] });
    (any::<u64>(), shape, option::of(1u32..64), vec(target, 0..4)).prop_map(
        |(id, shape, threads, targets)| Measure {
            model: (id % 2 == 0).then(|| model_id("m")),
            id,
            shape,
            threads,
            targets,
        },
    )
}

fn any_measured() -> impl Strategy<Value = Measured> {
    let link = (any::<[u8; 32]>(), option::of(0u64..1 << 40), option::of(1u64..)).prop_map(
        |(id, round_trip_ns, bytes_per_s)| MeasuredLink { node_id: NodeId(id), round_trip_ns, bytes_per_s },
    );
    (any::<u64>(), [0u64..1 << 40, 0..1 << 40, 0..1 << 40], any::<bool>(), vec(link, 0..4)).prop_map(
        |(id, [layer_ns, row_ns, head_ns], layers, links)| Measured {
            held: layers.then(|| Held {
                layers: vec![LayerRange { start: 0, end: 2 }, LayerRange { start: 2, end: 5 }],
                embed: true,
                ..Held::default()
            }),
            id,
            layer_ns,
            row_ns,
            head_ns,
            layers,
            links,
        },
    )
}

fn bytes(message: &Control) -> Vec<u8> {
    let mut out = Vec::new();
    message.encode(&mut out).unwrap();
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn round_trip(message in any_control()) {
        prop_assert_eq!(Control::decode(&bytes(&message)).unwrap(), message);
    }

    #[test]
    fn unknown_fields_are_tolerated(message in any_control(), extra in ".{0,20}") {
        let mut value: Value = serde_json::from_slice(&bytes(&message)).unwrap();
        value.as_object_mut().unwrap().insert("a_later_field".into(), json!({ "deep": [extra, null] }));
        prop_assert_eq!(Control::decode(value.to_string().as_bytes()).unwrap(), message);
    }

    #[test]
    fn random_bytes(bytes in vec(any::<u8>(), 0..200)) {
        let _ = Control::decode(&bytes);
    }

    #[test]
    fn truncated_and_flipped(message in any_control(), seed in any::<u64>()) {
        let mut bytes = bytes(&message);
        for len in 0..bytes.len() {
            prop_assert!(Control::decode(&bytes[..len]).is_err());
        }
        for round in 0..64u64 {
            let at = (seed.wrapping_mul(round | 1) % bytes.len() as u64) as usize;
            let kept = bytes[at];
            bytes[at] = (seed >> (round % 56)) as u8;
            if let Ok(other) = Control::decode(&bytes) {
                let again = self::bytes(&other);
                prop_assert_eq!(Control::decode(&again).unwrap(), other);
            }
            bytes[at] = kept;
        }
    }
}

#[test]
fn the_json_is_the_one_we_mean() {
    let value: Value = serde_json::from_slice(&bytes(&Control::Prepare(Box::new(prepare())))).unwrap();
    assert_eq!(value["kind"], "prepare");
    assert_eq!(value["layers"], json!([10, 20]));
    assert_eq!(value["kv_type"], "f16");
    assert_eq!(value["fingerprint"], "09".repeat(32));
    assert_eq!(value["next"]["addresses"], json!(["10.0.0.2:4000"]));
    assert_eq!(bytes(&Control::Bye), br#"{"kind":"bye"}"#);
    let value: Value = serde_json::from_slice(&bytes(&Control::Hello(hello()))).unwrap();
    assert_eq!(value["role"], "worker");
    assert!(value.get("models").is_none());
}

#[test]
fn every_kind_is_known_to_the_decoder() {
    let messages = [
        Control::Hello(hello()),
        Control::Welcome(hello()),
        Control::Prepare(Box::new(prepare())),
        Control::Loading(Loading { bytes_done: 1, bytes_total: 2, from: LoadSource::Disk }),
        Control::Ready(Ready { epoch: Epoch(1), bytes_loaded: 1, weight_bytes_per_token: 1 }),
        Control::Start { epoch: Epoch(1) },
        Control::Started { epoch: Epoch(1) },
        Control::Refused(Refused::new(Blame::Caller, "no").of(Epoch(1))),
        Control::Ping(Ping { id: 1, sent_us: 2 }),
        Control::Pong(Pong { id: 1, sent_us: 2, node_us: 3 }),
        Control::StatsRequest { id: 4 },
        Control::Stats(Stats::default()),
        Control::Release { reason: "done".into() },
        Control::Supply(Box::new(supply())),
        Control::Wanting { epoch: Epoch(1) },
        Control::Fetch(model_id("toy")),
        Control::Resolve { model: "org/toy".into() },
        Control::List,
        Control::Listed(Box::default()),
        Control::Bye,
    ];
    for message in messages {
        assert_eq!(Control::decode(&bytes(&message)).unwrap(), message);
    }
}

#[test]
fn an_unknown_kind_is_named() {
    let error = Control::decode(br#"{"kind":"juggle","balls":3}"#).unwrap_err();
    assert!(matches!(&error, ControlError::UnknownKind { kind } if kind == "juggle"));
    assert!(error.to_string().contains("juggle"));
    let long = format!(r#"{{"kind":"{}"}}"#, "x".repeat(1000));
    let error = Control::decode(long.as_bytes()).unwrap_err();
    assert!(matches!(&error, ControlError::UnknownKind { kind } if kind.len() == 64));
}

#[test]
fn long_and_deep_messages_are_refused() {
    let long = vec![b' '; CONTROL_BYTES_MAX + 1];
    assert!(matches!(Control::decode(&long), Err(ControlError::TooLong { .. })));
    let deep = format!(r#"{{"kind":"bye","x":{}"#, "[".repeat(100_000));
    assert!(matches!(Control::decode(deep.as_bytes()), Err(ControlError::Malformed(_))));
    let deep = format!(r#"{{"x":{}"#, "{\"kind\":".repeat(20_000));
    assert!(matches!(Control::decode(deep.as_bytes()), Err(ControlError::Malformed(_))));
}

fn refused_field(message: &Control) -> &'static str {
    match message.encode(&mut Vec::new()) {
        Err(ControlError::Invalid { field, .. }) => field,
        other => panic!("{other:?}"),
    }
}

#[test]
fn fields_out_of_range_are_named() {
    let hellos = [
        ("name", Hello { name: "x".repeat(65), ..hello() }),
        ("cores", Hello { cores: 0, ..hello() }),
        ("read_gb_s", Hello { read_gb_s: Some(f64::NAN), ..hello() }),
        ("read_gb_s", Hello { read_gb_s: Some(-1.0), ..hello() }),
        ("memory_bytes_available", Hello { memory_bytes_available: u64::MAX, ..hello() }),
        ("models", Hello { models: Some(vec![String::new(); 65]), ..hello() }),
    ];
    for (field, hello) in hellos {
        assert_eq!(refused_field(&Control::Hello(hello)), field);
    }
    let base = prepare();
    let prepares = [
        (
            "origin.repository",
            Prepare {
                origin: Some(Origin {
                    repository: "a".repeat(513),
                    commit: String::new(),
                    file: None,
                    fingerprint: Fingerprint([0; 32]),
                }),
                ..base.clone()
            },
        ),
        ("layers", Prepare { layers: LayerRange { start: 5, end: 5 }, ..base.clone() }),
        ("layers", Prepare { layers: LayerRange { start: 5, end: 31 }, ..base.clone() }),
        ("layers_total", Prepare { layers_total: u32::MAX, ..base.clone() }),
        ("tail", Prepare { tail: true, ..base.clone() }),
        ("next", Prepare { next: None, ..base.clone() }),
        ("context", Prepare { context: 0, ..base.clone() }),
        ("context", Prepare { context: 4096, ..base.clone() }),
        ("sessions_max", Prepare { sessions_max: 0, ..base.clone() }),
        ("threads", Prepare { threads: Some(0), ..base.clone() }),
        ("limits", Prepare { limits: Limits { width: 0, ..LIMITS }, ..base }),
    ];
    for (field, prepare) in prepares {
        assert_eq!(refused_field(&Control::Prepare(Box::new(prepare))), field);
    }
    assert_eq!(refused_field(&Control::Ping(Ping { id: 0, sent_us: u64::MAX })), "sent_us");
    assert_eq!(
        refused_field(&Control::Loading(Loading { bytes_done: 2, bytes_total: 1, from: LoadSource::Disk })),
        "bytes_done"
    );
}

#[test]
fn numbers_and_names_of_weights_out_of_range_are_named() {
    let base = prepare();
    let prepares = [
        (
            "sources.addresses",
            Prepare {
                sources: vec![WeightSource {
                    node: NextHop { node_id: NodeId([4; 32]), addresses: Vec::new() },
                    units: Vec::new(),
                }],
                ..base.clone()
            },
        ),
        (
            "unit",
            Prepare {
                sources: vec![WeightSource {
                    units: vec![UnitRoot { unit: u32::MAX, root: Fingerprint([0; 32]) }],
                    ..weight_source()
                }],
                ..base.clone()
            },
        ),
        ("sources", Prepare { sources: vec![weight_source(); 17], ..base.clone() }),
    ];
    for (field, prepare) in prepares {
        assert_eq!(refused_field(&Control::Prepare(Box::new(prepare))), field);
    }
    let base = supply();
    let file = base.files[0].clone();
    let supplies = [
        ("files", Supply { files: Vec::new(), ..base.clone() }),
        ("files", Supply { files: vec![file.clone(), file.clone()], ..base.clone() }),
        (
            "files.bytes",
            Supply { files: vec![SuppliedFile { bytes: u64::MAX, ..file.clone() }], ..base.clone() },
        ),
        (
            "files.name",
            Supply { files: vec![SuppliedFile { name: "x".repeat(257), ..file }], ..base.clone() },
        ),
        ("name", Supply { name: "x".repeat(513), ..base }),
    ];
    for (field, supply) in supplies {
        assert_eq!(refused_field(&Control::Supply(Box::new(supply))), field);
    }
    let ranges = |ranges: &[[u32; 2]]| Held {
        layers: ranges.iter().map(|&range| range.into()).collect(),
        ..Held::default()
    };
    for held in [ranges(&[[3, 3]]), ranges(&[[2, 4], [3, 5]]), ranges(&[[0, 5000]])] {
        let measured = Measured { held: Some(held), ..measured() };
        assert_eq!(refused_field(&Control::Measured(measured)), "held.layers");
    }
    assert_eq!(refused_field(&Control::Fetch(model_id(&"x".repeat(513)))), "model.name");
    assert_eq!(refused_field(&Control::Resolve { model: "x".repeat(513) }), "model");
}

#[test]
fn lists_of_models_out_of_range_are_named() {
    let base = ListedModel {
        name: "org/toy".into(),
        commit: None,
        file: None,
        format: "gguf".into(),
        layers_total: 10,
        layers: vec![[0, 4].into(), [6, 10].into()],
        bytes: 100,
        bytes_held: 80,
    };
    let models = [
        ("models.name", ListedModel { name: "x".repeat(513), ..base.clone() }),
        ("models.commit", ListedModel { commit: Some("0".repeat(65)), ..base.clone() }),
        ("models.file", ListedModel { file: Some("x".repeat(513)), ..base.clone() }),
        ("models.format", ListedModel { format: "x".repeat(65), ..base.clone() }),
        ("models.layers_total", ListedModel { layers_total: 0, ..base.clone() }),
        ("models.layers", ListedModel { layers: vec![[0, 11].into()], ..base.clone() }),
        ("models.layers", ListedModel { layers: vec![[1, 2].into(); 257], ..base.clone() }),
        ("models.bytes", ListedModel { bytes: u64::MAX, ..base.clone() }),
        ("models.bytes_held", ListedModel { bytes_held: 101, ..base.clone() }),
    ];
    let listed = |models| Control::Listed(Box::new(Listed { name: "den".into(), models, left_out: 0 }));
    for (field, model) in models {
        assert_eq!(refused_field(&listed(vec![model])), field);
    }
    assert_eq!(refused_field(&listed(vec![base; 257])), "models");
    let named = Listed { name: "x".repeat(65), ..Listed::default() };
    assert_eq!(refused_field(&Control::Listed(Box::new(named))), "name");
}

fn measured() -> Measured {
    Measured { id: 1, layer_ns: 1, row_ns: 1, head_ns: 1, layers: false, links: Vec::new(), held: None }
}

#[test]
fn a_long_refusal_is_cut_and_sent() {
    let refused = Refused::new(Blame::Us, &"é".repeat(10_000));
    assert!(bytes(&Control::Refused(refused)).len() < CONTROL_BYTES_MAX);
}
