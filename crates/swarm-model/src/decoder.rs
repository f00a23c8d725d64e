//! One decoder layer, the same for every family: the forward pass on a page.
//!
//! Names are those of the checkpoint. Which optional parts a layer has is its family's affair
//! ([`crate::families`]); a part that is `None` is skipped.

use std::cell::RefCell;

use swarm_kernels::{
    AttentionScratch, Job, MatmulScratch, Matrix, Pool, add, add_bias, attention, matmul, rms_norm, rope,
    silu_mul,
};

use crate::rope::RopeTable;
use crate::scratch::{Activations, Scratch, Widths, attended_positions};
use crate::stage::Segment;

/// A projection and, in some families, its bias.
pub(crate) struct Linear {
    pub weight: Matrix, // [out, in]
    pub bias: Option<Vec<f32>>,
}

pub(crate) struct DecoderLayer {
    pub input_layernorm: Vec<f32>,          // [width]
    pub q_proj: Linear,                     // [heads * head_dim, width]
    pub k_proj: Linear,                     // [kv_heads * head_dim, width]
    pub v_proj: Linear,                     // [kv_heads * head_dim, width]
    pub o_proj: Linear,                     // [width, heads * head_dim]
    pub q_norm: Option<Vec<f32>>,           // [head_dim]
    pub k_norm: Option<Vec<f32>>,           // [head_dim]
    pub post_attention_layernorm: Vec<f32>, // [width]
    pub gate_proj: Linear,                  // [intermediate, width]
    pub up_proj: Linear,                    // [intermediate, width]
    pub down_proj: Linear,                  // [width, intermediate]
    pub window: Option<usize>,
}

/// What all layers of a stage share.
pub(crate) struct Shape {
    pub widths: Widths,
    pub head_dim: usize,
    pub kv_heads: usize,
    pub eps: f32,
    /// `1 / sqrt(head_dim)`
    pub scale: f32,
}

/// What all layers of a step share.
pub(crate) struct Step<'a, 's> {
    pub pool: &'a Pool,
    pub shape: &'a Shape,
    pub rope: &'a RopeTable,
    pub segments: &'a mut [Segment<'s>],
}

thread_local! {
    /// Scores of one query group; each thread of the pool grows its own, once.
    static ATTENTION: RefCell<AttentionScratch> = RefCell::default();
}

impl DecoderLayer {
    /// Runs the layer over the rows `x`, `[tokens, width]`, in place.
    ///
    /// `layer` counts from the first layer of the stage. Keys and values go into the sessions' pages
    /// behind the committed positions; the caller commits. Rows that the scratch does not list as wanted get keys and
    /// values, and nothing else: what is left of them in `x` means nothing. Llama 2, arXiv:2307.09288 section 2.2.
    pub fn forward(&self, layer: usize, step: &mut Step<'_, '_>, x: &mut [f32], scratch: &mut Scratch) {
        let Scratch { rows, wanted, floats, matmul: packed, .. } = scratch;
        let Step { pool, shape, rope: table, .. } = *step;
        let Shape { widths, head_dim, kv_heads, eps, scale } = *shape;
        let (tokens, all) = (rows.len(), wanted.len() == rows.len());
        let mut a = floats.activations(tokens, widths);

        // Attention block: x += o_proj(attention(rope(q), rope(k), v))
        each_row(pool, a.normed, widths.width, |row, out| {
            rms_norm(&x[row * widths.width..][..widths.width], &self.input_layernorm, eps, out);
        });
        let mut kvq = [self.k_proj.job(a.k), self.v_proj.job(a.v), self.q_proj.job(a.q)];
        matmul(pool, packed, a.normed, tokens, if all { &mut kvq } else { &mut kvq[..2] });
        self.k_proj.bias(a.k);
        self.v_proj.bias(a.v);
        norm_heads(a.k, a.unnormed, self.k_norm.as_deref(), eps);
        let per_row = a.k.chunks_exact_mut(widths.kv).zip(a.v.chunks_exact(widths.kv));
        for (place, (k, v)) in rows.iter().zip(per_row) {
            let (cos, sin) = table.at(place.position); // [rotary_dim / 2]
            rope(k, head_dim, cos, sin);
            step.segments[place.segment].kv.store(layer, place.position, k, v);
        }
        if !all {
            gather(x, widths.width, wanted);
            gather(a.normed, widths.width, wanted);
            a.truncate(wanted.len(), widths);
            matmul(pool, packed, a.normed, wanted.len(), &mut [self.q_proj.job(a.q)]);
        }
        let left = &mut x[..wanted.len() * widths.width];
        self.q_proj.bias(a.q);
        norm_heads(a.q, a.unnormed, self.q_norm.as_deref(), eps);
        for (&row, q) in wanted.iter().zip(a.q.chunks_exact_mut(widths.q)) {
            let (cos, sin) = table.at(rows[row].position);
            rope(q, head_dim, cos, sin);
        }
        let (q, segments, group) = (&*a.q, &*step.segments, widths.q / kv_heads); // group: heads of a kv head * head_dim
        pool.run_chunks(a.attended, group, |chunk, out| {
            let (place, kv_head) = (rows[wanted[chunk / kv_heads]], chunk % kv_heads);
            let positions = attended_positions(place.position, self.window);
            let kv = &*segments[place.segment].kv;
            ATTENTION.with_borrow_mut(|scratch| {
                let q = &q[chunk * group..][..group]; // [heads of this kv head, head_dim]
                attention(q, head_dim, scale, positions, &|tile| kv.tile(layer, kv_head, tile), scratch, out);
            });
        });
        matmul(pool, packed, a.attended, wanted.len(), &mut [self.o_proj.job(a.normed)]);
        self.o_proj.bias(a.normed);
        add(left, a.normed);
        self.mlp(pool, shape, left, packed, &mut a);
        if !all {
            scatter(x, widths.width, wanted);
        }
    }

    /// MLP block: `x += down_proj(silu(gate_proj(x)) * up_proj(x))`
    fn mlp(
        &self,
        pool: &Pool,
        shape: &Shape,
        x: &mut [f32],
        packed: &mut MatmulScratch,
        a: &mut Activations<'_>,
    ) {
        let Shape { widths, eps, .. } = *shape;
        let tokens = x.len() / widths.width;
        each_row(pool, a.normed, widths.width, |row, out| {
            rms_norm(&x[row * widths.width..][..widths.width], &self.post_attention_layernorm, eps, out);
        });
        matmul(pool, packed, a.normed, tokens, &mut [self.gate_proj.job(a.gate), self.up_proj.job(a.up)]);
        self.gate_proj.bias(a.gate);
        self.up_proj.bias(a.up);
        let up = &*a.up;
        each_row(pool, a.gate, widths.intermediate, |row, gate| {
            silu_mul(gate, &up[row * widths.intermediate..][..widths.intermediate]);
        });
        matmul(pool, packed, a.gate, tokens, &mut [self.down_proj.job(a.normed)]);
        self.down_proj.bias(a.normed);
        add(x, a.normed);
    }
}

impl Linear {
    /// `out = x weight^T`, `[tokens, out]`, as one of the matmuls that share `x`.
    pub fn job<'a>(&'a self, out: &'a mut [f32]) -> Job<'a> {
        Job { matrix: &self.weight, out }
    }

    fn bias(&self, out: &mut [f32]) {
        if let Some(bias) = &self.bias {
            add_bias(out, bias);
        }
    }
}

/// Norms every head of `x` where the family does so. `copy` is at least as long as `x`.
fn norm_heads(x: &mut [f32], copy: &mut [f32], weight: Option<&[f32]>, eps: f32) {
    if let Some(weight) = weight {
        let copy = &mut copy[..x.len()];
        copy.copy_from_slice(x);
        rms_norm(copy, weight, eps, x);
    }
}

/// Brings some rows of `x`, in ascending order, to its beginning.
fn gather(x: &mut [f32], width: usize, rows: &[usize]) {
    for (to, &from) in rows.iter().enumerate() {
        x.copy_within(from * width..(from + 1) * width, to * width);
    }
}

/// Puts them back where they were.
fn scatter(x: &mut [f32], width: usize, rows: &[usize]) {
    for (from, &to) in rows.iter().enumerate().rev() {
        x.copy_within(from * width..(from + 1) * width, to * width);
    }
}

/// Computes each row of `out` in parallel; alone, a row is not worth waking threads for.
pub(crate) fn each_row(pool: &Pool, out: &mut [f32], width: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    if out.len() == width { f(0, out) } else { pool.run_chunks(out, width, f) }
}
