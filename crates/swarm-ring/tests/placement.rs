//! Placement against an exhaustive search, and its errors in words.

use std::ops::Range;

use proptest::collection::vec;
use proptest::prelude::*;
use swarm_ring::{
    CutStage, Downloads, EXACT_NODES_MAX, Link, Missing, ModelShape, NodeProfile, NodeSpeed, Objective,
    PlaceError, Placement, Plan, RoomProfile, SLACK_PERCENT, SpeedSource, Split, plan, plan_cut,
    plan_frugally,
};
use swarm_wire::NodeId;

const GB: u64 = 1_000_000_000;
const MS: u64 = 1_000_000;
const OBJECTIVES: [Objective; 3] = [Objective::Latency, Objective::Throughput, Objective::Fit];

fn node(index: usize, memory_bytes: u64, layer_ns: u64) -> NodeProfile {
    let speed = NodeSpeed { layer_ns, row_ns: layer_ns / 10, head_ns: 0, source: SpeedSource::Probe };
    NodeProfile { id: NodeId([index as u8; 32]), name: format!("node {index}"), memory_bytes, speed }
}

fn link(round_trip_ns: u64) -> Option<Link> {
    Some(Link { round_trip_ns, bytes_per_s: GB, measured: true })
}

/// Everybody reaches everybody as fast.
fn room(nodes: Vec<NodeProfile>, round_trip_ns: u64) -> RoomProfile {
    let links = vec![vec![link(round_trip_ns); nodes.len()]; nodes.len()];
    RoomProfile { nodes, links }
}

fn model(layers: usize, layer_bytes: u64) -> ModelShape {
    ModelShape { layer_bytes: vec![layer_bytes; layers], context: 4096, ..ModelShape::default() }
}

fn cut_of(placement: &Placement) -> Vec<Range<usize>> {
    placement.stages.iter().map(|stage| stage.layers.clone()).collect()
}

fn auto(room: &RoomProfile, model: &ModelShape) -> Plan {
    plan(room, model, Objective::Latency, Split::Auto).unwrap()
}

/// Every subset with the coordinator, every order of the others, every cut.
fn every_cut(nodes: usize, layers: usize) -> Vec<Vec<CutStage>> {
    fn grow(
        nodes: usize,
        layers: usize,
        start: usize,
        cut: &mut Vec<CutStage>,
        all: &mut Vec<Vec<CutStage>>,
    ) {
        if start == layers {
            all.push(cut.clone());
            return;
        }
        for node in 0..nodes {
            if (node == 0) != cut.is_empty() || cut.iter().any(|(used, _)| *used == node) {
                continue;
            }
            for end in start + 1..=layers {
                cut.push((node, start..end));
                grow(nodes, layers, end, cut, all);
                cut.pop();
            }
        }
    }
    let mut all = Vec::new();
    grow(nodes, layers, 0, &mut Vec::new(), &mut all);
    all
}

fn any_model() -> impl Strategy<Value = ModelShape> {
    (vec(1u64..50, 1..6), 0u64..60, 0u64..60, any::<bool>(), 0u64..10, [0u64..10, 0u64..10]).prop_map(
        |(layers, embed, head, tied, kv, [buffers, more])| ModelShape {
            layer_bytes: layers.into_iter().map(|bytes| bytes * 1_000_000).collect(),
            embed_bytes: embed * 1_000_000,
            norm_bytes: 1000,
            head_bytes: if tied { embed * 1_000_000 } else { head * 1_000_000 },
            tied,
            kv_bytes_per_layer: kv * 1_000_000,
            buffer_bytes: buffers * 1_000_000,
            tail_buffer_bytes: more * 1_000_000,
            hidden_bytes: 4096,
            token_bytes: 100,
            context: 4096,
        },
    )
}

fn any_room() -> impl Strategy<Value = RoomProfile> {
    let node_strategy = (10u64..400, 1u64..20, 1u64..8, 0u64..30);
    let link_strategy = proptest::option::weighted(0.9, (0u64..8, 1u64..200));
    (vec(node_strategy, 1..5), vec(link_strategy, 16)).prop_map(|(nodes, links)| {
        let nodes: Vec<NodeProfile> = nodes
            .into_iter()
            .enumerate()
            .map(|(index, (memory, layer, row, head))| {
                let mut node = node(index, memory * 1_000_000, layer * MS);
                node.speed.row_ns = row * MS;
                node.speed.head_ns = head * MS;
                node
            })
            .collect();
        let link = |index: usize| {
            links[index].map(|(round_trip, speed)| Link {
                round_trip_ns: round_trip * MS,
                bytes_per_s: speed * 1_000_000,
                measured: true,
            })
        };
        let links =
            (0..nodes.len()).map(|from| (0..nodes.len()).map(|to| link(from * 4 + to)).collect()).collect();
        RoomProfile { nodes, links }
    })
}

/// What the objective is about among placements as good as each other, the smaller the better.
fn cost(objective: Objective, placement: &Placement) -> (f64, f64) {
    let fullest = placement
        .stages
        .iter()
        .map(|stage| (u128::from(stage.memory_bytes) * 1_000_000 / u128::from(stage.offered_bytes)) as f64)
        .fold(0.0, f64::max);
    match objective {
        Objective::Latency => (placement.lap_ms, placement.stages.len() as f64),
        Objective::Throughput => (placement.slowest_ms, placement.lap_ms),
        Objective::Fit => (placement.stages.len() as f64, fullest),
    }
}

/// Those with the fastest prompts among those whose slowest stage is nearly as fast as it can be.
fn fastest_prompts(placements: &mut Vec<&Placement>) {
    let ns = |placement: &Placement| (placement.slowest_ms * 1e6).round() as u64;
    let best = placements.iter().map(|placement| ns(placement)).min().unwrap_or_default();
    placements.retain(|placement| ns(placement) <= best + best * SLACK_PERCENT / 100);
    let fastest = placements.iter().map(|placement| placement.prefill_tok_per_s).fold(0.0, f64::max);
    placements.retain(|placement| placement.prefill_tok_per_s == fastest);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn no_choice_is_better(model in any_model(), room in any_room()) {
        let layers = model.layer_bytes.len();
        for objective in OBJECTIVES {
            let fits: Vec<Placement> = every_cut(room.nodes.len(), layers)
                .iter()
                .filter_map(|cut| plan_cut(&room, &model, objective, cut).ok())
                .map(|plan| plan.placement)
                .collect();
            for split in [Split::Auto, Split::Always, Split::Never] {
                let count = match split {
                    Split::Auto => 1..=4,
                    Split::Always => room.nodes.len()..=room.nodes.len(),
                    Split::Never => 1..=1,
                };
                let mut allowed: Vec<&Placement> =
                    fits.iter().filter(|other| count.contains(&other.stages.len())).collect();
                let Ok(plan) = plan(&room, &model, objective, split) else {
                    prop_assert!(allowed.is_empty(), "a cut fits, but none was found");
                    continue;
                };
                let chosen = &plan.placement;
                let all: Vec<usize> = cut_of(chosen).into_iter().flatten().collect();
                prop_assert_eq!(all, (0..layers).collect::<Vec<_>>());
                prop_assert!(count.contains(&chosen.stages.len()));
                prop_assert_eq!(chosen.stages[0].node, room.nodes[0].id);
                for stage in &chosen.stages {
                    prop_assert!(stage.memory_bytes <= stage.offered_bytes);
                    prop_assert_eq!(stage.memory_bytes, model.stage_memory(&stage.layers).total());
                    prop_assert!(!stage.layers.is_empty());
                }
                if objective == Objective::Throughput {
                    fastest_prompts(&mut allowed);
                    prop_assert!(allowed.contains(&chosen), "{:?}", chosen);
                }
                for other in allowed {
                    prop_assert!(cost(objective, chosen) <= cost(objective, other), "{:?}\n{:?}", chosen, other);
                }
                for other in plan.alternatives.iter().filter_map(|other| other.placement.as_ref()) {
                    prop_assert!(fits.contains(other));
                }
            }
        }
    }

    #[test]
    fn less_is_fetched_only_where_it_costs_little(
        model in any_model(),
        room in any_room(),
        held in vec((vec(0u64..2, 6), 0u64..2, 0u64..2), 4),
    ) {
        let missing: Vec<Missing> = held
            .into_iter()
            .map(|(layers, embed, head)| Missing {
                layers: layers.iter().zip(&model.layer_bytes).map(|(lacks, bytes)| lacks * bytes).collect(),
                embed: embed * model.embed_bytes,
                norm: head * model.norm_bytes,
                head: head * model.head_bytes,
            })
            .collect();
        let downloads = Downloads(&missing);
        let fetched = |placement: &Placement| {
            let at = |id| room.nodes.iter().position(|node| node.id == id).unwrap();
            let cut: Vec<CutStage> =
                placement.stages.iter().map(|stage| (at(stage.node), stage.layers.clone())).collect();
            downloads.of_cut(&cut, &model)
        };
        for objective in OBJECTIVES {
            for split in [Split::Auto, Split::Always, Split::Never] {
                let best = plan(&room, &model, objective, split);
                let frugal = plan_frugally(&room, &model, objective, split, downloads);
                prop_assert_eq!(best.is_ok(), frugal.is_ok());
                let (Ok(best), Ok(frugal)) = (best, frugal) else { continue };
                let (best, frugal) = (best.placement, frugal.placement);
                let all: Vec<usize> = cut_of(&frugal).into_iter().flatten().collect();
                prop_assert_eq!(all, (0..model.layer_bytes.len()).collect::<Vec<_>>());
                prop_assert!(frugal.stages.iter().all(|stage| stage.memory_bytes <= stage.offered_bytes));
                // Without a difference in bytes the placement is the one without this rule.
                prop_assert!(fetched(&frugal) < fetched(&best) || frugal == best);
                let slack = 1.0 + SLACK_PERCENT as f64 / 100.0 + 1e-9;
                match objective {
                    Objective::Latency => prop_assert!(frugal.lap_ms <= best.lap_ms * slack),
                    Objective::Throughput => prop_assert!(frugal.slowest_ms <= best.slowest_ms * slack),
                    Objective::Fit => prop_assert!(frugal.stages.len() <= best.stages.len()),
                }
            }
        }
    }

    #[test]
    fn many_nodes_in_the_order_of_their_speed(
        layers in 1usize..40,
        speeds in vec(1u64..100, EXACT_NODES_MAX + 1..20),
        memory in 3u64..60,
    ) {
        let nodes = speeds.iter().enumerate().map(|(i, speed)| node(i, memory * 1000, speed * 1000)).collect();
        let room = room(nodes, 50_000);
        for objective in OBJECTIVES {
            match plan(&room, &model(layers, 1000), objective, Split::Auto) {
                Ok(plan) => {
                    let all: Vec<usize> = cut_of(&plan.placement).into_iter().flatten().collect();
                    prop_assert_eq!(all, (0..layers).collect::<Vec<_>>());
                    let mut nodes: Vec<_> = plan.placement.stages.iter().map(|stage| stage.node).collect();
                    prop_assert!(plan.placement.stages.iter().all(|stage| stage.memory_bytes <= memory * 1000));
                    nodes.sort();
                    nodes.dedup();
                    prop_assert_eq!(nodes.len(), plan.placement.stages.len());
                }
                Err(error) => prop_assert!(layers as u64 > memory * speeds.len() as u64, "{}", error),
            }
        }
    }

    #[test]
    fn extreme_numbers_do_not_panic(
        layers in vec(prop_oneof![Just(0u64), Just(u64::MAX), any::<u64>()], 0..6),
        sizes in any::<[u64; 9]>(),
        tied in any::<bool>(),
        nodes in vec(any::<[u64; 4]>(), 0..4),
        hops in vec(any::<Option<[u64; 2]>>(), 9),
        cut in vec(0usize..8, 0..5),
    ) {
        let [embed_bytes, head_bytes, kv_bytes_per_layer, buffer_bytes, ..] = sizes;
        let model = ModelShape {
            layer_bytes: layers,
            embed_bytes,
            norm_bytes: sizes[4],
            head_bytes,
            tied,
            kv_bytes_per_layer,
            buffer_bytes,
            tail_buffer_bytes: sizes[5],
            hidden_bytes: sizes[6],
            token_bytes: sizes[7],
            context: sizes[8],
        };
        let build = |(index, [memory, layer, row, head]): (usize, [u64; 4])| {
            let mut node = node(index, memory, layer);
            (node.speed.row_ns, node.speed.head_ns) = (row, head);
            node
        };
        let nodes: Vec<_> = nodes.into_iter().enumerate().map(build).collect();
        let link = |index: usize| {
            hops[index].map(|[round_trip_ns, bytes_per_s]| Link { round_trip_ns, bytes_per_s, measured: true })
        };
        let links = (0..nodes.len()).map(|a| (0..nodes.len()).map(|b| link(a * 3 + b)).collect()).collect();
        let room = RoomProfile { nodes, links };
        for objective in OBJECTIVES {
            let _ = plan(&room, &model, objective, Split::Auto).map_err(|error| error.to_string());
            let cut: Vec<_> = cut.windows(2).enumerate().map(|(node, pair)| (node, pair[0]..pair[1])).collect();
            let _ = plan_cut(&room, &model, objective, &cut).map_err(|error| error.to_string());
        }
    }
}

#[test]
fn who_has_the_layers_gets_them_where_the_others_are_as_fast() {
    let (room, model) =
        (room(vec![node(0, GB, MS), node(1, GB, MS), node(2, GB, MS)], 50_000), model(9, 1_000_000));
    let holds = |held: Range<usize>| Missing {
        layers: (0..9).map(|layer| if held.contains(&layer) { 0 } else { 1_000_000 }).collect(),
        ..Missing::default()
    };
    // From an evening on which the ring went the other way round.
    let missing = [holds(0..3), holds(6..9), holds(3..6)];
    let usual = plan(&room, &model, Objective::Throughput, Split::Always).unwrap();
    let frugal =
        plan_frugally(&room, &model, Objective::Throughput, Split::Always, Downloads(&missing)).unwrap();
    let nodes = |plan: &Plan| plan.placement.stages.iter().map(|stage| stage.node.0[0]).collect::<Vec<_>>();
    assert_eq!((nodes(&usual), nodes(&frugal)), (vec![0, 1, 2], vec![0, 2, 1]));
    assert_eq!(cut_of(&frugal.placement), [0..3, 3..6, 6..9]);
    // One that is much slower does not get more work for what it has.
    let slow =
        RoomProfile { nodes: vec![node(0, GB, MS), node(1, GB, 10 * MS), node(2, GB, MS)], ..room.clone() };
    let missing = [holds(0..0), holds(0..9), holds(0..0)];
    let (usual, frugal) = (
        auto(&slow, &model),
        plan_frugally(&slow, &model, Objective::Latency, Split::Auto, Downloads(&missing)),
    );
    assert_eq!(frugal.unwrap().placement, usual.placement);
}

#[test]
fn a_model_that_fits_stays_where_it_is() {
    // Two equal computers: one user gains nothing from the second one.
    let room = room(vec![node(0, GB, MS), node(1, GB, MS)], 4 * MS);
    let plan = auto(&room, &model(25, 10_000_000));
    assert_eq!(cut_of(&plan.placement), std::iter::once(0..25).collect::<Vec<_>>());
    assert_eq!(plan.sentence, "not splitting: alone 40.0 tok/s, with node 1 34.5 tok/s");
    assert_eq!(plan.left_out, ["node 1"]);
    let other = plan.alternatives[0].placement.as_ref().unwrap();
    assert!((other.lap_ms - 29.0).abs() < 1e-6 && (other.hops_ms - 4.0).abs() < 1e-6, "{other:?}");
}

#[test]
fn equal_nodes_share_equally_in_their_order() {
    let nodes: Vec<NodeProfile> = (0..5).map(|index| node(index, GB, MS)).collect();
    for objective in [Objective::Latency, Objective::Throughput] {
        let plan = plan(&room(nodes.clone(), 1000), &model(25, 1000), objective, Split::Always).unwrap();
        assert_eq!(cut_of(&plan.placement), [0..5, 5..10, 10..15, 15..20, 20..25]);
        let order: Vec<u8> = plan.placement.stages.iter().map(|stage| stage.node.0[0]).collect();
        assert_eq!(order, [0, 1, 2, 3, 4]);
    }
}

#[test]
fn prompts_are_shared_out_evenly_where_decoding_loses_little() {
    // The head weighs one and a half layers in decoding, and nothing in a prompt.
    let node = |index| {
        let mut node = node(index, GB, MS);
        (node.speed.row_ns, node.speed.head_ns) = (MS / 8, 3 * MS / 2);
        node
    };
    let room = room(vec![node(0), node(1)], 1000);
    let cut = |layers| {
        let plan = plan(&room, &model(layers, 10_000_000), Objective::Throughput, Split::Always).unwrap();
        cut_of(&plan.placement)
    };
    assert_eq!(cut(22), [0..11, 11..22]); // 12.5 in place of 12 layers' time
    assert_eq!(cut(8), [0..5, 5..8]); // 5.5 in place of 5 would be too much
}

#[test]
fn many_users_gain_from_a_second_computer() {
    let room = room(vec![node(0, GB, MS), node(1, GB, MS)], 4 * MS);
    let plan = plan(&room, &model(24, 10_000_000), Objective::Throughput, Split::Auto).unwrap();
    assert_eq!(cut_of(&plan.placement), [0..12, 12..24]);
    assert_eq!(
        plan.sentence,
        "splitting: with node 1 83.3 tok/s for many users together, alone 41.7 tok/s for many users together"
    );
}

#[test]
fn a_faster_computer_gets_the_layers_when_the_hop_is_worth_it() {
    let room = room(vec![node(0, GB, 3 * MS), node(1, GB, MS), node(2, GB, 9 * MS)], 2 * MS);
    let plan = auto(&room, &model(20, 10_000_000));
    assert_eq!(cut_of(&plan.placement), [0..1, 1..20]);
    assert!(
        plan.sentence.starts_with("splitting: with node 1 41.7 tok/s, alone 16.7 tok/s"),
        "{}",
        plan.sentence
    );
    assert!(plan.sentence.ends_with("left out: node 2"), "{}", plan.sentence);
    let all = swarm_ring::plan(&room, &model(20, 10_000_000), Objective::Latency, Split::Always).unwrap();
    assert_eq!(all.placement.stages.len(), 3);
    assert!(all.sentence.starts_with("splitting, as asked: with node 1 and node 2 "), "{}", all.sentence);
}

#[test]
fn the_order_in_the_ring_follows_the_links() {
    let mut room = room(vec![node(0, 10, 1), node(1, 10, 1), node(2, 10, 1)], 10 * MS);
    // 0 -> 2 -> 1 -> 0 is the fast way round.
    for (from, to) in [(0, 2), (2, 1), (1, 0)] {
        room.links[from][to] = link(MS);
    }
    let plan = auto(&room, &model(6, 5));
    let ids: Vec<u8> = plan.placement.stages.iter().map(|stage| stage.node.0[0]).collect();
    assert_eq!(ids, [0, 2, 1]);
    // Without it there is only the slow one, and without any there is none.
    room.links[2][1] = None;
    assert_eq!(auto(&room, &model(6, 5)).placement.stages[1].node.0[0], 1);
    room.links[1][2] = None;
    let error = plan_error(&room, &model(6, 5));
    assert!(
        matches!(&error, PlaceError::NoWay(why) if why.contains("node 1 does not reach node 2")),
        "{error}"
    );
}

fn plan_error(room: &RoomProfile, model: &ModelShape) -> PlaceError {
    plan(room, model, Objective::Latency, Split::Auto).unwrap_err()
}

#[test]
fn memory_forces_a_split_and_the_sentence_says_so() {
    let room = room(vec![node(0, 50_000_000, MS), node(1, GB, MS)], MS);
    let plan = auto(&room, &model(30, 10_000_000));
    assert_eq!(plan.placement.stages.len(), 2);
    assert!(plan.placement.stages[0].layers.len() <= 5);
    assert_eq!(
        plan.sentence,
        "splitting: with node 1 32.3 tok/s, alone it does not fit (needs 300.0 MB here, 250.0 MB too much)"
    );
}

#[test]
fn a_tied_head_is_held_once_on_one_node() {
    let shape = ModelShape { embed_bytes: 300, head_bytes: 300, tied: true, ..model(2, 100) };
    assert_eq!(shape.stage_memory(&(0..2)).total(), 500);
    assert_eq!(shape.stage_memory(&(1..2)).total(), 400);
}

#[test]
fn fit_takes_few_nodes_and_leaves_room() {
    let room = room(vec![node(0, 30, 1), node(1, 60, 9), node(2, 60, 1)], 1);
    let plan = plan(&room, &model(6, 10), Objective::Fit, Split::Auto).unwrap();
    assert_eq!(plan.placement.stages.len(), 2);
    assert_eq!(cut_of(&plan.placement), [0..2, 2..6]);
    // Of two equal ones the faster.
    assert_eq!(plan.placement.stages[1].node.0[0], 2);
}

#[test]
fn errors_name_what_does_not_fit() {
    let nodes = vec![node(0, 10 * GB, 1), node(1, 10 * GB, 1)];
    let error = plan_error(&room(nodes, 1), &model(28, GB));
    assert!(matches!(&error, PlaceError::NoHome { layers, missing_bytes, .. }
        if *layers == (20..28) && *missing_bytes == 8 * GB));
    let words = error.to_string();
    assert!(
        words.starts_with(
            "layers 20..28 have no home: 8.0 GB more memory is needed (\"node 0\" offers 10.0 GB"
        )
    );
    assert!(words.ends_with("add a node, free memory, or use a smaller quantization"), "{words}");
    let shape = ModelShape { kv_bytes_per_layer: GB, ..model(10, GB) };
    let error = plan_error(&room(vec![node(0, 13 * GB, 1)], 1), &shape);
    assert!(error.to_string().contains("--context 1024 would fit"), "{error}");
    let small = room(vec![node(0, 100 * GB, 1), node(1, 1, 1)], 1);
    let error = plan(&small, &model(28, GB), Objective::Latency, Split::Always).unwrap_err();
    assert!(error.to_string().contains("\"node 1\" offers 1 bytes"), "{error}");
    assert_eq!(auto(&small, &model(28, GB)).placement.stages.len(), 1);
    assert_eq!(plan_error(&RoomProfile::default(), &model(1, 1)), PlaceError::NoNodes);
    assert_eq!(plan_error(&small, &model(0, 1)), PlaceError::NoLayers);
    let many = plan(&small, &model(1, 1), Objective::Fit, Split::Always).unwrap_err();
    assert_eq!(many, PlaceError::TooManyNodes { nodes: 2, layers: 1 });
    let never = plan(&small, &model(200, GB), Objective::Latency, Split::Never).unwrap_err();
    assert!(matches!(never, PlaceError::NoHome { layers, .. } if layers == (100..200)));
}

#[test]
fn explicit_cuts_are_checked() {
    let room = room(vec![node(0, 10, 1), node(1, 10, 1)], 1);
    let shape = model(6, 2);
    let check = |cut: &[CutStage]| plan_cut(&room, &shape, Objective::Latency, cut);
    let plan = check(&[(0, 0..1), (1, 1..6)]).unwrap();
    assert!(plan.sentence.starts_with("as the given layers say: with node 1 "), "{}", plan.sentence);
    let refused: [&[CutStage]; 9] = [
        &[],
        &[(0, 0..3), (1, 4..6)],
        &[(0, 0..3), (1, 2..6)],
        &[(0, 0..3), (1, 3..5)],
        &[(0, 0..3), (1, 3..7)],
        &[(0, 0..0), (1, 0..6)],
        &[(1, 0..3), (0, 3..6)],
        &[(0, 0..3), (0, 3..6)],
        &[(0, 0..3), (2, 3..6)],
    ];
    for cut in refused {
        assert!(matches!(check(cut), Err(PlaceError::BadCut(_))), "{cut:?}");
    }
    assert_eq!(
        check(&[(0, 0..6)]).unwrap_err().to_string(),
        "layers 0..6 need 12 bytes on node \"node 0\", which offers 10 bytes; give it fewer layers, or ask for a \
         smaller --context"
    );
}
