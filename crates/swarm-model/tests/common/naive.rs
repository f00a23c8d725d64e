//! The slow twin of the whole forward pass: f64, whole sequence at once, no cache, no pages, weights
//! dequantized first. It shares no arithmetic with the crate but the reading of tensors.

use swarm_kernels::dequantize;
use swarm_weights::{Checkpoint, RopeScaling};

type Rows = Vec<Vec<f64>>;

/// Logits of every position of `ids`, `[tokens, vocab]`. Plain RoPE only.
pub fn logits(checkpoint: &Checkpoint, ids: &[u32]) -> Vec<f32> {
    let config = checkpoint.config();
    assert_eq!(config.rope.scaling, RopeScaling::None, "the slow twin has plain RoPE only");
    let eps = f64::from(config.rms_norm_eps);
    let embed = matrix(checkpoint, "model.embed_tokens.weight");
    let mut x: Rows = ids.iter().map(|&id| embed[id as usize].clone()).collect();
    for layer in 0..config.num_hidden_layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let linear = |rows: &Rows, part: &str| {
            let weight = matrix(checkpoint, &name(&format!("{part}.weight")));
            let bias = optional(checkpoint, &name(&format!("{part}.bias")));
            rows.iter().map(|row| apply(&weight, bias.as_deref(), row)).collect::<Rows>()
        };
        let norm = |rows: &Rows, part: &str| {
            let weight = optional(checkpoint, &name(part)).unwrap();
            rows.iter().map(|row| rms_norm(row, &weight, eps)).collect::<Rows>()
        };
        let normed = norm(&x, "input_layernorm.weight");
        let heads = |part: &str, norm: &str| {
            let norm = optional(checkpoint, &name(norm));
            let mut rows = linear(&normed, part);
            for (position, row) in rows.iter_mut().enumerate() {
                for head in row.chunks_exact_mut(config.head_dim) {
                    if let Some(norm) = &norm {
                        head.copy_from_slice(&rms_norm(head, norm, eps));
                    }
                    rotate(head, position, config.rope.rotary_dim, config.rope.theta);
                }
            }
            rows
        };
        let q = heads("self_attn.q_proj", "self_attn.q_norm.weight");
        let k = heads("self_attn.k_proj", "self_attn.k_norm.weight");
        let v = linear(&normed, "self_attn.v_proj");
        let group = config.num_attention_heads / config.num_key_value_heads;
        let window = config.layer_window(layer);
        let attended: Rows = (0..ids.len())
            .map(|i| {
                let start = window.map_or(0, |window| (i + 1).saturating_sub(window));
                (0..config.num_attention_heads)
                    .flat_map(|head| {
                        attend(&q[i], &k[start..=i], &v[start..=i], head, head / group, config.head_dim)
                    })
                    .collect()
            })
            .collect();
        add(&mut x, &linear(&attended, "self_attn.o_proj"));
        let normed = norm(&x, "post_attention_layernorm.weight");
        let (mut gate, up) = (linear(&normed, "mlp.gate_proj"), linear(&normed, "mlp.up_proj"));
        for (gate, up) in gate.iter_mut().flatten().zip(up.iter().flatten()) {
            *gate = *gate / (1.0 + (-*gate).exp()) * up;
        }
        add(&mut x, &linear(&gate, "mlp.down_proj"));
    }
    let norm = optional(checkpoint, "model.norm.weight").unwrap();
    let head = if config.tie_word_embeddings { embed } else { matrix(checkpoint, "lm_head.weight") };
    x.iter()
        .flat_map(|row| apply(&head, None, &rms_norm(row, &norm, eps)))
        .map(|logit| logit as f32)
        .collect()
}

fn matrix(checkpoint: &Checkpoint, name: &str) -> Rows {
    let tensor = checkpoint.read(name).unwrap();
    let mut values = vec![0.0; tensor.rows * tensor.cols];
    dequantize(tensor.dtype, &tensor.bytes, &mut values).unwrap();
    values.chunks_exact(tensor.cols).map(|row| row.iter().map(|&x| f64::from(x)).collect()).collect()
}

fn optional(checkpoint: &Checkpoint, name: &str) -> Option<Vec<f64>> {
    checkpoint.tensor(name).map(|_| matrix(checkpoint, name).concat())
}

fn apply(weight: &Rows, bias: Option<&[f64]>, x: &[f64]) -> Vec<f64> {
    let dot = |row: &Vec<f64>| row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
    weight.iter().enumerate().map(|(i, row)| dot(row) + bias.map_or(0.0, |bias| bias[i])).collect()
}

fn rms_norm(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    x.iter().zip(weight).map(|(x, w)| x / (mean + eps).sqrt() * w).collect()
}

fn rotate(head: &mut [f64], position: usize, rotary_dim: usize, theta: f64) {
    let half = rotary_dim / 2;
    for i in 0..half {
        let angle = position as f64 * theta.powf(-2.0 * i as f64 / rotary_dim as f64);
        let (a, b) = (head[i], head[i + half]);
        head[i] = a * angle.cos() - b * angle.sin();
        head[i + half] = b * angle.cos() + a * angle.sin();
    }
}

fn attend(
    q: &[f64],
    k: &[Vec<f64>],
    v: &[Vec<f64>],
    head: usize,
    kv_head: usize,
    head_dim: usize,
) -> Vec<f64> {
    let q = &q[head * head_dim..][..head_dim];
    let of = |row: &Vec<f64>| row[kv_head * head_dim..][..head_dim].to_vec();
    let scores: Vec<f64> = k
        .iter()
        .map(|row| of(row).iter().zip(q).map(|(k, q)| k * q).sum::<f64>() / (head_dim as f64).sqrt())
        .collect();
    let max = scores.iter().copied().fold(f64::MIN, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let mut out = vec![0.0; head_dim];
    for (row, weight) in v.iter().zip(&weights) {
        out.iter_mut().zip(of(row)).for_each(|(out, v)| *out += weight / sum * v);
    }
    out
}

fn add(x: &mut Rows, y: &Rows) {
    x.iter_mut().flatten().zip(y.iter().flatten()).for_each(|(x, y)| *x += y);
}
