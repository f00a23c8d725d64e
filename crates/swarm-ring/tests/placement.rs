//! Placement against an exhaustive search, and its errors in words.

use std::ops::Range;

use proptest::collection::vec;
use proptest::prelude::*;
use swarm_ring::{Goal, ModelShape, NodeCapacity, PlaceError, Placement, place, place_for};
use swarm_wire::NodeId;

const GB: u64 = 1_000_000_000;

fn node(index: usize, memory_bytes: u64, read_gb_s: Option<f64>) -> NodeCapacity {
    NodeCapacity {
        id: NodeId([index as u8; 32]),
        name: format!("node {index}"),
        memory_bytes,
        read_gb_s,
        cores: 4,
    }
}

fn model(layers: usize, layer_bytes: u64) -> ModelShape {
    ModelShape { layer_bytes: vec![layer_bytes; layers], ..ModelShape::default() }
}

fn cut_of(placement: &Placement) -> Vec<Range<usize>> {
    placement.stages.iter().map(|stage| stage.layers.clone()).collect()
}

/// All cuts of `layers` into `nodes` non-empty ranges.
fn every_cut(layers: usize, nodes: usize) -> Vec<Vec<Range<usize>>> {
    fn grow(
        start: usize,
        layers: usize,
        nodes: usize,
        cut: &mut Vec<Range<usize>>,
        all: &mut Vec<Vec<Range<usize>>>,
    ) {
        if nodes == 1 {
            if start < layers {
                cut.push(start..layers);
                all.push(cut.clone());
                cut.pop();
            }
            return;
        }
        for end in start + 1..layers {
            cut.push(start..end);
            grow(end, layers, nodes - 1, cut, all);
            cut.pop();
        }
    }
    let mut all = Vec::new();
    grow(0, layers, nodes, &mut Vec::new(), &mut all);
    all
}

fn any_model() -> impl Strategy<Value = ModelShape> {
    (vec(1u64..50, 1..9), 0u64..60, 0u64..60, any::<bool>(), 0u64..10, 0u64..10).prop_map(
        |(layers, embed, head, tied, kv, scratch)| ModelShape {
            layer_bytes: layers.into_iter().map(|bytes| bytes * 1_000_000).collect(),
            embed_bytes: embed * 1_000_000,
            head_bytes: if tied { embed * 1_000_000 } else { head * 1_000_000 },
            tied,
            kv_bytes_per_layer: kv * 1_000_000,
            scratch_bytes: scratch * 1_000_000,
        },
    )
}

fn any_nodes() -> impl Strategy<Value = Vec<NodeCapacity>> {
    let one = (10u64..400, proptest::option::weighted(0.8, 1u32..20));
    vec(one, 1..5).prop_map(|nodes| {
        let build = |(index, (memory, speed)): (usize, (u64, Option<u32>))| {
            node(index, memory * 1_000_000, speed.map(f64::from))
        };
        nodes.into_iter().enumerate().map(build).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn no_cut_is_better(model in any_model(), nodes in any_nodes()) {
        let layers = model.layer_bytes.len();
        let fits: Vec<Placement> = every_cut(layers, nodes.len())
            .iter()
            .filter_map(|cut| place(&nodes, &model, Some(cut)).ok())
            .collect();
        for goal in [Goal::Balanced, Goal::Latency] {
            let Ok(placement) = place_for(goal, &nodes, &model, None) else {
                prop_assert!(fits.is_empty(), "a cut fits, but none was found");
                continue;
            };
            let all: Vec<usize> = cut_of(&placement).into_iter().flatten().collect();
            prop_assert_eq!(all, (0..layers).collect::<Vec<_>>());
            for (stage, node) in placement.stages.iter().zip(&nodes) {
                prop_assert!(stage.memory_bytes <= node.memory_bytes);
                prop_assert!(!stage.layers.is_empty());
                prop_assert_eq!(stage.node, node.id);
            }
            for other in &fits {
                match goal {
                    Goal::Balanced => {
                        prop_assert!(placement.slowest_ms <= other.slowest_ms);
                        if other.slowest_ms == placement.slowest_ms {
                            prop_assert!(placement.lap_ms <= other.lap_ms);
                        }
                    }
                    Goal::Latency => prop_assert!(placement.lap_ms <= other.lap_ms),
                }
            }
        }
    }

    #[test]
    fn every_layer_exactly_once(layers in 1usize..200, speeds in vec(1u32..100, 1..12)) {
        let nodes: Vec<_> =
            speeds.iter().enumerate().map(|(i, speed)| node(i, u64::MAX, Some(f64::from(*speed)))).collect();
        match place(&nodes, &model(layers, 7), None) {
            Ok(placement) => {
                let all: Vec<usize> = cut_of(&placement).into_iter().flatten().collect();
                prop_assert_eq!(all, (0..layers).collect::<Vec<_>>());
            }
            Err(error) => {
                prop_assert_eq!(error, PlaceError::TooManyNodes { nodes: nodes.len(), layers });
            }
        }
    }

    #[test]
    fn extreme_numbers_do_not_panic(
        layers in vec(prop_oneof![Just(0u64), Just(u64::MAX), any::<u64>()], 0..6),
        sizes in any::<[u64; 4]>(),
        tied in any::<bool>(),
        nodes in vec((any::<u64>(), any::<Option<f64>>(), any::<u32>()), 0..4),
        cut in vec(0usize..8, 0..5),
    ) {
        let [embed_bytes, head_bytes, kv_bytes_per_layer, scratch_bytes] = sizes;
        let model =
            ModelShape { layer_bytes: layers, embed_bytes, head_bytes, tied, kv_bytes_per_layer, scratch_bytes };
        let nodes: Vec<_> = nodes
            .into_iter()
            .map(|(memory, speed, cores)| NodeCapacity { cores, ..node(0, memory, speed) })
            .collect();
        let _ = place(&nodes, &model, None).map_err(|error| error.to_string());
        let cut: Vec<_> = cut.windows(2).map(|pair| pair[0]..pair[1]).collect();
        let _ = place(&nodes, &model, Some(&cut)).map_err(|error| error.to_string());
    }
}

#[test]
fn equal_nodes_share_equally_and_speed_decides() {
    let equal = [node(0, GB, Some(10.0)), node(1, GB, Some(10.0)), node(2, GB, Some(10.0))];
    let placement = place(&equal, &model(30, 10_000_000), None).unwrap();
    assert_eq!(cut_of(&placement), [0..10, 10..20, 20..30]);
    assert!((placement.lap_ms - 30.0).abs() < 1e-6);
    assert!((placement.slowest_ms - 10.0).abs() < 1e-6);
    let uneven = place(&equal, &model(31, 10_000_000), None).unwrap();
    assert_eq!(uneven.stages.iter().map(|stage| stage.layers.len()).max(), Some(11));
    assert_eq!(uneven.stages.iter().map(|stage| stage.layers.len()).min(), Some(10));
    let speeds = [node(0, GB, Some(20.0)), node(1, GB, Some(10.0))];
    let placement = place(&speeds, &model(30, 10_000_000), None).unwrap();
    assert_eq!(cut_of(&placement), [0..20, 20..30]);
    let fastest = place_for(Goal::Latency, &speeds, &model(30, 10_000_000), None).unwrap();
    assert_eq!(cut_of(&fastest), [0..29, 29..30]);
}

#[test]
fn memory_limits_the_fast_node_and_the_reason_says_so() {
    let nodes = [node(0, 50_000_000, Some(20.0)), node(1, GB, None)];
    let placement = place(&nodes, &model(30, 10_000_000), None).unwrap();
    assert_eq!(cut_of(&placement), [0..5, 5..30]);
    let [first, second] = placement.stages.as_slice() else { panic!() };
    assert_eq!(
        first.reason,
        "5 of 30 layers; reads 20.0 GB/s (measured), 50 % of the ring's speed; needs 50.0 MB of 50.0 MB, \
         and has no room for another layer"
    );
    assert!(first.measured && !second.measured);
    assert!(second.reason.contains("assumed from its cores"), "{}", second.reason);
}

#[test]
fn a_tied_head_is_held_once_on_one_node() {
    let shape = ModelShape { embed_bytes: 300, head_bytes: 300, tied: true, ..model(2, 100) };
    let one = place(&[node(0, 500, Some(1.0))], &shape, None).unwrap();
    assert_eq!(one.stages[0].memory_bytes, 500);
    assert_eq!(one.stages[0].read_bytes_per_token, 500);
    let two = place(&[node(0, 400, Some(1.0)), node(1, 400, Some(1.0))], &shape, None).unwrap();
    assert_eq!(two.stages[1].memory_bytes, 400);
}

#[test]
fn errors_name_what_does_not_fit() {
    let nodes = [node(0, 10 * GB, Some(1.0)), node(1, 10 * GB, Some(1.0))];
    let error = place(&nodes, &model(28, GB), None).unwrap_err();
    assert_eq!(error, PlaceError::NoHome { layers: 20..28, missing_bytes: 8 * GB });
    assert!(error.to_string().starts_with("layers 20..28 have no home: 8.0 GB more memory is needed"));
    let nodes = [node(0, 100 * GB, Some(1.0)), node(1, 1, Some(1.0))];
    let error = place(&nodes, &model(28, GB), None).unwrap_err();
    assert!(error.to_string().contains("\"node 1\" offers 1 bytes"), "{error}");
    assert_eq!(place(&[], &model(1, 1), None), Err(PlaceError::NoNodes));
    assert_eq!(place(&nodes, &model(0, 1), None), Err(PlaceError::NoLayers));
}

#[test]
fn explicit_cuts_are_checked() {
    let nodes = [node(0, 10, Some(1.0)), node(1, 10, Some(1.0))];
    let shape = model(6, 2);
    let whole = std::slice::from_ref(&(0..6));
    assert!(place(&nodes, &shape, Some(&[0..1, 1..6])).is_ok());
    let refused: [&[Range<usize>]; 7] =
        [&[], whole, &[0..3, 4..6], &[0..3, 2..6], &[0..3, 3..5], &[0..3, 3..7], &[0..0, 0..6]];
    for cut in refused {
        assert!(matches!(place(&nodes, &shape, Some(cut)), Err(PlaceError::BadCut(_))), "{cut:?}");
    }
    let error = place(&nodes[..1], &shape, Some(whole)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "layers 0..6 need 12 bytes on node \"node 0\", which offers 10 bytes; give it fewer layers"
    );
}
