//! GGUF tensor names, spelled as the Hugging Face checkpoint spells them.

const LAYER_PARTS: [(&str, &str); 12] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    // Frequencies that older converters stored; computed here, as everywhere else.
    ("attn_rot_embd", "self_attn.rotary_emb.inv_freq"),
];

/// The Hugging Face name of a GGUF tensor. A name outside the grammar is given back as it is; the
/// check for unexpected tensors then names it as the file does.
pub fn hf_name(gguf: &str) -> String {
    match gguf {
        "token_embd.weight" => return "model.embed_tokens.weight".into(),
        "output_norm.weight" => return "model.norm.weight".into(),
        "output.weight" => return "lm_head.weight".into(),
        _ => {}
    }
    layer_name(gguf).unwrap_or_else(|| gguf.to_owned())
}

fn layer_name(gguf: &str) -> Option<String> {
    let (layer, rest) = gguf.strip_prefix("blk.")?.split_once('.')?;
    // Only the canonical spelling, so that `blk.07` cannot be a second layer 7.
    let number: u32 = layer.parse().ok()?;
    if number.to_string() != layer {
        return None;
    }
    let (part, kind) = rest.rsplit_once('.')?;
    if !matches!(kind, "weight" | "bias") {
        return None;
    }
    let (_, hf) = LAYER_PARTS.iter().find(|(name, _)| *name == part)?;
    Some(format!("model.layers.{number}.{hf}.{kind}"))
}

#[cfg(test)]
mod tests {
    use super::hf_name;

    #[test]
    fn known_names_are_translated_and_others_kept() {
        for (gguf, hf) in [
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("output_norm.weight", "model.norm.weight"),
            ("output.weight", "lm_head.weight"),
            ("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight"),
            ("blk.17.attn_k.bias", "model.layers.17.self_attn.k_proj.bias"),
            ("blk.3.attn_q_norm.weight", "model.layers.3.self_attn.q_norm.weight"),
            ("blk.3.ffn_norm.weight", "model.layers.3.post_attention_layernorm.weight"),
            ("blk.07.attn_q.weight", "blk.07.attn_q.weight"),
            ("blk.+7.attn_q.weight", "blk.+7.attn_q.weight"),
            ("blk.1.ffn_gate_exps.weight", "blk.1.ffn_gate_exps.weight"),
            ("blk.1.attn_q.scale", "blk.1.attn_q.scale"),
            ("rope_freqs.weight", "rope_freqs.weight"),
        ] {
            assert_eq!(hf_name(gguf), hf);
        }
    }
}
