//! The inner loops of attention for 128-bit vectors. Equal to the scalar ones of `attention.rs` bit for bit.

use half::f16;

use crate::float::dot_f32;
use crate::neon::vectors::Vectors;

/// f16 bits to f32, eight at a time.
#[inline(always)]
pub(crate) fn widen<V: Vectors>(from: &[u16], to: &mut [f32]) {
    let (from8, from_rest) = from.as_chunks::<8>();
    let (to8, to_rest) = to.as_chunks_mut::<8>();
    for (to, from) in to8.iter_mut().zip(from8) {
        let [low, high] = V::halves(V::bytes(bytemuck::cast_ref(from)));
        let [to_low, to_high] = bytemuck::cast_mut::<[f32; 8], [[f32; 4]; 2]>(to);
        V::store(low, to_low);
        V::store(high, to_high);
    }
    for (to, from) in to_rest.iter_mut().zip(from_rest) {
        *to = f16::from_bits(*from).to_f32();
    }
}

/// The dots of one query with the keys of a tile, four keys at a time: the 16 partial sums of each in four vectors.
#[inline(always)]
pub(crate) fn score<V: Vectors>(q: &[f32], keys: &[f32], scale: f32, scores: &mut [f32]) {
    let (columns, rest) = q.as_chunks::<16>();
    if !rest.is_empty() {
        for (s, k) in scores.iter_mut().zip(keys.chunks_exact(q.len())) {
            *s = dot_f32(q, k) * scale;
        }
        return;
    }
    let mut keys = keys.as_chunks::<16>().0.chunks_exact(columns.len());
    let (fours, last) = scores.as_chunks_mut::<4>();
    for four in fours {
        let rows = std::array::from_fn(|_| keys.next().unwrap_or(&[]));
        *four = dots::<V, 4>(columns, rows).map(|dot| dot * scale);
    }
    for (s, k) in last.iter_mut().zip(keys) {
        *s = dots::<V, 1>(columns, [k])[0] * scale;
    }
}

/// `K` dots with one query, as many columns as the shortest of them has.
#[inline(always)]
fn dots<V: Vectors, const K: usize>(q: &[[f32; 16]], keys: [&[[f32; 16]]; K]) -> [f32; K] {
    let len = keys.iter().fold(q.len(), |len, key| len.min(key.len()));
    let (q, keys) = (&q[..len], keys.map(|key| &key[..len]));
    let mut sums = [[V::splat(0.0); 4]; K];
    for i in 0..len {
        let q = quarters::<V>(&q[i]);
        for (sum, key) in sums.iter_mut().zip(&keys) {
            let key = quarters::<V>(&key[i]);
            *sum = std::array::from_fn(|lane| V::fma(sum[lane], q[lane], key[lane]));
        }
    }
    sums.map(V::tree)
}

#[inline(always)]
fn quarters<V: Vectors>(v: &[f32; 16]) -> [V::Floats; 4] {
    let v = v.as_chunks::<4>().0;
    std::array::from_fn(|i| V::floats(&v[i]))
}

/// The weighted sum of a tile's values; 64, 16 or 4 dimensions at a time stay in registers.
#[inline(always)]
pub(crate) fn weigh<V: Vectors>(p: &[f32], values: &[f32], tile: &mut [f32]) {
    let dim = tile.len();
    let mut d = 0;
    while d + 64 <= dim {
        columns::<V, 16>(p, values, tile, d);
        d += 64;
    }
    while d + 16 <= dim {
        columns::<V, 4>(p, values, tile, d);
        d += 16;
    }
    while d + 4 <= dim {
        columns::<V, 1>(p, values, tile, d);
        d += 4;
    }
    for (i, t) in tile.iter_mut().enumerate().skip(d) {
        *t = p.iter().zip(values.chunks_exact(dim)).fold(0.0, |s, (p, row)| p.mul_add(row[i], s));
    }
}

/// Dimensions `d .. d + 4 * W` of the weighted sum.
#[inline(always)]
fn columns<V: Vectors, const W: usize>(p: &[f32], values: &[f32], tile: &mut [f32], d: usize) {
    let mut sums = [V::splat(0.0); W];
    for (p, row) in p.iter().zip(values.chunks_exact(tile.len())) {
        let (p, row) = (V::splat(*p), &row[d..d + 4 * W].as_chunks::<4>().0[..W]);
        for (sum, v) in sums.iter_mut().zip(row) {
            *sum = V::fma(*sum, p, V::floats(v));
        }
    }
    for (sum, t) in sums.into_iter().zip(tile[d..].as_chunks_mut::<4>().0) {
        V::store(sum, t);
    }
}
