//! How likely a text is to a model, on this node alone.

use std::sync::atomic::AtomicBool;

use swarm_kernels::Quant;
use swarm_model::{KvPool, LoadOptions, LoadProgress, Stage, kv_layout, score};
use swarm_text::{EncodeOptions, Tokenizer};

use swarm_wire::LoadSource;

use crate::engine::{EngineConfig, EngineEvent, EngineObserver};
use crate::error::NodeError;
use crate::{machine, setup};

/// A text's score, and what gave it.
#[derive(Clone, Debug)]
pub struct TextScore {
    pub model_name: String,
    pub fingerprint: [u8; 32],
    /// What float weights were quantized to.
    pub quant: Option<Quant>,
    /// Positions of a window.
    pub context: usize,
    /// Tokens that were scored: all of the text's but the first.
    pub tokens: usize,
    /// The sum of the natural logarithms of their probabilities.
    pub log_probability: f64,
    /// `e` to the mean negative log probability.
    pub perplexity: f64,
    /// Seconds for all windows, without loading.
    pub seconds: f64,
}

/// Loads the whole model and scores `text`, in windows of the configuration's context. With `dequantized`, all
/// weights are held as f32. `progress` is told how many tokens of how many are done.
///
/// # Errors
/// [`NodeError`]: a model that cannot be used, a text of less than two tokens, not enough memory.
pub fn score_text(
    config: &EngineConfig,
    text: &str,
    dequantized: bool,
    observer: EngineObserver<'_>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<TextScore, NodeError> {
    let model = setup::open_for(config)?;
    let tokenizer = Tokenizer::from_checkpoint(&model)?;
    let ids = tokenizer.encode(text, EncodeOptions { add_special: true, parse_special: false })?;
    let context = setup::context(config, &model)?.max(2);
    if ids.len() < 2 {
        return Err(NodeError::Request(
            "the text has less than two tokens; there is nothing to predict".into(),
        ));
    }
    let threads = config.threads.unwrap_or_else(machine::cores);
    let layers = 0..model.config().num_hidden_layers;
    let quantized = crate::stage_setup::quantized(&model, config.keep_quantized);
    let options = LoadOptions { context: Some(context), threads, dequantized, quantized, abort: None };
    crate::stage_setup::fetch(&model, &layers, &AtomicBool::new(false), &mut |done| {
        let (bytes_done, bytes_total, from) = (done.bytes_done, done.bytes_total, LoadSource::Hub);
        observer(EngineEvent::Loading { node: 0, bytes_done, bytes_total, from });
    })?;
    let loading = &mut |LoadProgress { bytes_done, bytes_total }| {
        observer(EngineEvent::Loading { node: 0, bytes_done, bytes_total, from: LoadSource::Disk });
    };
    let stage = Stage::load(&model, layers.clone(), &options, loading)
        .map_err(|source| NodeError::Load { layers: layers.clone(), source: Box::new(source) })?;
    let layout = kv_layout(model.config(), layers.len(), config.kv_type);
    let positions = context.next_multiple_of(swarm_kernels::TILE);
    let kv = KvPool::new(layout, layout.bytes_per_position().saturating_mul(positions));
    let cores = config.cores.clone();
    machine::pin_caller(cores.as_deref());
    let pool = machine::pool(threads, cores);
    let started = std::time::Instant::now();
    let all = ids.len() - 1;
    let scored = score(&stage, &pool, &kv, &ids, &mut |done| progress(done, all))
        .map_err(|error| NodeError::Stopped(error.to_string()))?;
    let perplexity = scored.perplexity().filter(|perplexity| perplexity.is_finite()).ok_or_else(|| {
        NodeError::Stopped("the model gave logits that are not finite; its weights are broken".into())
    })?;
    Ok(TextScore {
        model_name: model.name().to_owned(),
        quant: model.quant(),
        fingerprint: model.held_fingerprint()?,
        context,
        tokens: scored.tokens,
        log_probability: scored.log_probability,
        perplexity,
        seconds: started.elapsed().as_secs_f64(),
    })
}
