//! Cuts layers by weight, when nothing but the weights is known.

use std::ops::Range;

/// Cuts `0..layers` into one contiguous range per weight, as close to proportion as whole layers
/// allow. Each layer is in exactly one range. With at least as many layers as weights no range is
/// empty; with fewer, the first `layers` ranges hold one layer each and the rest none. Weights
/// that are all zero count as equal.
///
/// Costs `O(layers * weights)`.
pub fn partition(layers: usize, weights: &[u32]) -> Vec<Range<usize>> {
    let counts = counts(layers, weights);
    let mut start = 0;
    let range = |count: usize| {
        let range = start..start + count;
        start += count;
        range
    };
    counts.into_iter().map(range).collect()
}

fn counts(layers: usize, weights: &[u32]) -> Vec<usize> {
    let nodes = weights.len();
    if layers <= nodes {
        return (0..nodes).map(|node| usize::from(node < layers)).collect();
    }
    let equal = weights.iter().all(|&weight| weight == 0);
    let weights: Vec<i128> = weights.iter().map(|&weight| if equal { 1 } else { weight.into() }).collect();
    let sum: i128 = weights.iter().sum();
    if sum == 0 {
        return Vec::new(); // no node at all
    }
    let layers_wide = layers as i128;
    // What a node has above its exact share, in units of 1 / sum of a layer.
    let surplus = |count: usize, weight: i128| count as i128 * sum - layers_wide * weight;
    let mut counts: Vec<usize> =
        weights.iter().map(|weight| ((layers_wide * weight / sum) as usize).max(1)).collect();
    let mut placed: usize = counts.iter().sum();
    while placed != layers {
        let nodes = counts.iter_mut().zip(&weights);
        if placed < layers {
            let Some((count, _)) = nodes.min_by_key(|(count, weight)| surplus(**count, **weight)) else {
                break;
            };
            *count += 1;
            placed += 1;
        } else {
            let spare = nodes.filter(|(count, _)| **count > 1);
            let Some((count, _)) = spare.max_by_key(|(count, weight)| surplus(**count, **weight)) else {
                break;
            };
            *count -= 1;
            placed -= 1;
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_layer_exactly_once(layers in 0usize..200, weights in vec(0u32..1000, 1..13)) {
            let ranges = partition(layers, &weights);
            prop_assert_eq!(ranges.len(), weights.len());
            if layers >= weights.len() {
                prop_assert!(ranges.iter().all(|range| !range.is_empty()));
            }
            let all: Vec<usize> = ranges.into_iter().flatten().collect();
            prop_assert_eq!(all, (0..layers).collect::<Vec<_>>());
        }

        #[test]
        fn within_a_layer_of_proportion(layers in 50usize..200, weights in vec(300u32..1000, 1..13)) {
            let sum: u32 = weights.iter().sum();
            for (range, weight) in partition(layers, &weights).iter().zip(&weights) {
                let share = layers as f64 * f64::from(*weight) / f64::from(sum);
                prop_assert!((range.len() as f64 - share).abs() < 1.0 + 1e-9);
            }
        }

        #[test]
        fn extreme_weights(layers in 1usize..300, weights in vec(prop_oneof![Just(0), Just(1), Just(u32::MAX)], 1..40)) {
            prop_assert_eq!(partition(layers, &weights).into_iter().flatten().count(), layers);
        }
    }

    #[test]
    fn known_cuts() {
        assert_eq!(partition(30, &[1, 1, 1]), [0..10, 10..20, 20..30]);
        assert_eq!(partition(22, &[2, 1, 1]), [0..11, 11..17, 17..22]);
        assert_eq!(partition(2, &[5, 5, 5]), [0..1, 1..2, 2..2]);
        assert_eq!(partition(5, &[]), []);
    }
}
