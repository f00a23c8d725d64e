//! Reading a stage's tensors: slices of rows go from the file through a small window into their packed place, so that
//! memory holds the weights once, also while loading.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::vec::IntoIter;

use swarm_kernels::{Arena, DType, Matrix, MatrixBuilder};
use swarm_weights::{Checkpoint, EMBED, HEAD, ModelConfig, NORM, TensorInfo, TensorRows, WeightsError};

use crate::LoadError;
use crate::decoder::{DecoderLayer, Linear};
use crate::kept::Kept;
use crate::scratch::Widths;
use crate::slice::{OnDisk, Place, Slice, Window, slice_rows};
use crate::stage::{LoadOptions, LoadProgress, check_layers};

/// What a stage reads.
pub(crate) struct Weights {
    /// On the first stage, `[vocab, width]` in the file; `None` where the head in memory is the same matrix.
    pub embed_tokens: Option<TensorRows>,
    pub decoder: Vec<DecoderLayer>,
    pub norm: Option<Vec<f32>>, // [width], on the tail
    pub head: Option<Matrix>,   // [vocab, width], on the tail: lm_head, or the embedding when tied
}

/// True when a stage multiplies by the embedding.
fn is_head(config: &ModelConfig, layers: &Range<usize>) -> bool {
    config.tie_word_embeddings && layers.end == config.num_hidden_layers
}

/// True when a stage looks up rows of the embedding in its file: it is not in memory, or not as it is stored. A row is
/// the same wherever the layers are cut.
fn looks_up(checkpoint: &Checkpoint, layers: &Range<usize>) -> bool {
    let as_stored = |info: &TensorInfo| info.held == info.dtype;
    let in_memory = is_head(checkpoint.config(), layers) && checkpoint.tensor(EMBED).is_some_and(as_stored);
    layers.start == 0 && !in_memory
}

/// The tensors that a stage holds in memory.
pub(crate) fn held_tensors<'a>(checkpoint: &'a Checkpoint, layers: &Range<usize>) -> Vec<&'a TensorInfo> {
    let mut tensors = checkpoint.stage_tensors(layers.clone());
    if !is_head(checkpoint.config(), layers) {
        tensors.retain(|info| info.name != EMBED);
    }
    tensors
}

/// Loads what `kept` lacks of a stage, with `options.threads` threads; the result does not depend on them. `progress` is
/// called on this thread, with bytes of the file. `kept` has nothing that the stage does not need, and nothing at all
/// afterwards; after an error it is as it was.
pub(crate) fn load(
    checkpoint: &Checkpoint,
    layers: Range<usize>,
    options: &LoadOptions,
    kept: &mut Kept,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Weights, LoadError> {
    let mut tensors = held_tensors(checkpoint, &layers);
    tensors.retain(|info| !kept.has(&info.name));
    let bytes_total = tensors.iter().map(|info| info.bytes).sum();
    tensors.sort_by_key(|info| info.place()); // the file from front to back
    let mut arena = Arena::default();
    let rooms = tensors.into_iter().map(|info| Room::new(checkpoint, info, options, &mut arena));
    let mut rooms = rooms.collect::<Result<Vec<_>, LoadError>>()?;
    let mut slices = Vec::new();
    for room in &mut rooms {
        room.cut(checkpoint, &mut slices);
    }
    fill(checkpoint, slices, options, bytes_total, progress)?;
    Parts { checkpoint, rooms: rooms.into_iter().map(|room| (room.info.name.as_str(), room)).collect() }
        .assemble(&layers, kept)
}

/// Reads and packs all slices.
fn fill(
    checkpoint: &Checkpoint,
    slices: Vec<Slice<'_>>,
    options: &LoadOptions,
    bytes_total: u64,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<(), LoadError> {
    let threads = options.threads.clamp(1, slices.len().max(1));
    let abort = options.abort.as_deref();
    let queue = Mutex::new(slices.into_iter());
    let (events, received) = channel();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let (events, queue) = (events.clone(), &queue);
            scope.spawn(move || work(checkpoint, queue, abort, &events));
        }
        drop(events); // so that the last thread to end ends the loop
        let mut done = LoadProgress { bytes_done: 0, bytes_total };
        let mut failed = None;
        for event in received {
            match event {
                Ok(bytes) => {
                    done.bytes_done = done.bytes_done.saturating_add(bytes);
                    progress(done);
                }
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        failed.map_or(Ok(()), Err)
    })
}

/// One thread: slices in order until there are no more. Sends the stored bytes of each, or why it failed.
fn work(
    checkpoint: &Checkpoint,
    queue: &Mutex<IntoIter<Slice<'_>>>,
    abort: Option<&AtomicBool>,
    events: &Sender<Result<u64, LoadError>>,
) {
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let mut window = Window::default();
    while let Some(slice) = next() {
        let done = match abort {
            Some(abort) if abort.load(Ordering::Relaxed) => Err(LoadError::Aborted),
            _ => slice.fill(checkpoint, &mut window),
        };
        if done.is_err() {
            // The others stop after their slice.
            queue.lock().unwrap_or_else(PoisonError::into_inner).by_ref().for_each(drop);
        }
        let _gone = events.send(done); // the receiver outlives the scope's threads
    }
}

/// A tensor's place in memory.
struct Room<'a> {
    info: &'a TensorInfo,
    /// As it will be held; `info.held`, or f32.
    dtype: DType,
    data: Data,
    on_disk: OnDisk,
}

enum Data {
    Matrix(MatrixBuilder),
    Vector(Vec<f32>),
}

impl<'a> Room<'a> {
    /// Room for `info`; as f32 if `options` say so.
    fn new(
        checkpoint: &Checkpoint,
        info: &'a TensorInfo,
        options: &LoadOptions,
        arena: &mut Arena,
    ) -> Result<Self, LoadError> {
        let is_vector = info.name.ends_with("norm.weight") || info.name.ends_with(".bias");
        let dtype = if options.dequantized { DType::F32 } else { info.held };
        let data = if is_vector {
            Data::Vector(vec![0.0; info.cols])
        } else {
            let builder = MatrixBuilder::new(arena, dtype, info.rows, info.cols);
            Data::Matrix(builder.map_err(|source| LoadError::Pack { name: info.name.clone(), source })?)
        };
        let on_disk = OnDisk::of(checkpoint, info, options.quantized.as_ref());
        Ok(Self { info, dtype, data, on_disk })
    }

    /// Adds the slices that fill this room.
    fn cut<'s>(&'s mut self, checkpoint: &Checkpoint, slices: &mut Vec<Slice<'s>>)
    where
        'a: 's,
    {
        let (info, dtype, on_disk) = (self.info, self.dtype, &self.on_disk);
        let slice = |place| Slice { info, dtype, on_disk, place };
        match &mut self.data {
            Data::Vector(out) => slices.push(slice(Place::Vector(out))),
            Data::Matrix(builder) => {
                let rows = on_disk.piece_rows().unwrap_or_else(|| slice_rows(checkpoint, info));
                slices.extend(builder.parts(rows).into_iter().map(|part| slice(Place::Rows(part))));
            }
        }
    }
}

/// Quantizes the matrices of a stage that are not on disk in that form yet, and keeps them there; no stage is made of them.
/// `progress` is called on this thread, with bytes of the file. What cannot be kept is told by the store.
///
/// # Errors
/// [`LoadError`]: layers that are no stage, a tensor that is unreadable, or the end that `options` ask for.
pub fn keep_quantized(
    checkpoint: &Checkpoint,
    layers: Range<usize>,
    options: &LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<(), LoadError> {
    check_layers(checkpoint.config(), &layers)?;
    let mut tensors = held_tensors(checkpoint, &layers);
    tensors.retain(|info| info.held != info.dtype);
    tensors.sort_by_key(|info| info.place());
    let on_disk = |info| (info, OnDisk::of(checkpoint, info, options.quantized.as_ref()));
    let missing: Vec<_> = tensors
        .into_iter()
        .map(on_disk)
        // What the disk does not take is not made.
        .filter(|(_, on_disk)| matches!(on_disk, OnDisk::Wanted(_)))
        .collect();
    let bytes_total = missing.iter().map(|(info, _)| info.bytes).sum();
    let mut slices = Vec::new();
    for (info, on_disk) in &missing {
        let step = slice_rows(checkpoint, info);
        for start in (0..info.rows).step_by(step) {
            let rows = start..info.rows.min(start + step);
            slices.push(Slice { info, dtype: info.held, on_disk, place: Place::Nowhere(rows) });
        }
    }
    fill(checkpoint, slices, options, bytes_total, progress)
}

/// Filled rooms by name, to be put together.
struct Parts<'a> {
    checkpoint: &'a Checkpoint,
    rooms: BTreeMap<&'a str, Room<'a>>,
}

impl Parts<'_> {
    fn assemble(mut self, layers: &Range<usize>, kept: &mut Kept) -> Result<Weights, LoadError> {
        let checkpoint = self.checkpoint;
        let config = checkpoint.config();
        let (vocab, width) = (config.vocab_size, config.hidden_size);
        let embed_tokens = looks_up(checkpoint, layers).then(|| self.looked_up(vocab, width)).transpose()?;
        let missing = layers.clone().filter(|layer| !kept.layers.contains_key(layer));
        let fresh = missing.map(|layer| Ok((layer, self.decoder_layer(layer)?)));
        let mut fresh = fresh.collect::<Result<BTreeMap<_, _>, LoadError>>()?;
        let is_tail = layers.end == config.num_hidden_layers;
        let head = if config.tie_word_embeddings { EMBED } else { HEAD };
        let norm = (is_tail && kept.norm.is_none()).then(|| self.vector(NORM, width)).transpose()?;
        let head = (is_tail && kept.head.is_none()).then(|| self.matrix(head, vocab, width)).transpose()?;
        // Nothing can fail from here on.
        let mut kept = std::mem::take(kept);
        kept.layers.append(&mut fresh);
        Ok(Weights {
            embed_tokens,
            decoder: kept.layers.into_values().collect(),
            norm: norm.or(kept.norm),
            head: head.or(kept.head),
        })
    }

    fn looked_up(&self, vocab: usize, width: usize) -> Result<TensorRows, LoadError> {
        let rows = self.checkpoint.rows(EMBED).map_err(|source| unread(EMBED, source))?;
        check_shape(rows.info(), vocab, width)?;
        Ok(rows)
    }

    /// Layer `layer` of the model, with the parts its configuration says it has.
    fn decoder_layer(&mut self, layer: usize) -> Result<DecoderLayer, LoadError> {
        let config: &ModelConfig = self.checkpoint.config();
        let Widths { width, q, kv, intermediate } = Widths::of(config);
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let qkv_bias = config.attention_bias;
        let (head_dim, qk_norm) = (config.head_dim, config.qk_norm);
        let head_norm =
            |parts: &mut Self, part: &str| qk_norm.then(|| parts.vector(&name(part), head_dim)).transpose();
        Ok(DecoderLayer {
            q_norm: head_norm(self, "self_attn.q_norm.weight")?,
            k_norm: head_norm(self, "self_attn.k_norm.weight")?,
            input_layernorm: self.vector(&name("input_layernorm.weight"), width)?,
            q_proj: self.linear(&name("self_attn.q_proj"), q, width, qkv_bias)?,
            k_proj: self.linear(&name("self_attn.k_proj"), kv, width, qkv_bias)?,
            v_proj: self.linear(&name("self_attn.v_proj"), kv, width, qkv_bias)?,
            o_proj: self.linear(&name("self_attn.o_proj"), width, q, config.o_proj_bias)?,
            post_attention_layernorm: self.vector(&name("post_attention_layernorm.weight"), width)?,
            gate_proj: self.linear(&name("mlp.gate_proj"), intermediate, width, config.mlp_bias)?,
            up_proj: self.linear(&name("mlp.up_proj"), intermediate, width, config.mlp_bias)?,
            down_proj: self.linear(&name("mlp.down_proj"), width, intermediate, config.mlp_bias)?,
            window: config.layer_window(layer),
        })
    }

    fn linear(&mut self, name: &str, rows: usize, cols: usize, bias: bool) -> Result<Linear, LoadError> {
        Ok(Linear {
            weight: self.matrix(&format!("{name}.weight"), rows, cols)?,
            bias: bias.then(|| self.vector(&format!("{name}.bias"), rows)).transpose()?,
        })
    }

    /// A matrix `[rows, cols]`, packed for this CPU.
    fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Result<Matrix, LoadError> {
        match self.take(name, rows, cols)? {
            Data::Matrix(builder) => {
                builder.finish().map_err(|source| LoadError::Pack { name: name.to_owned(), source })
            }
            Data::Vector(_) => Err(self.missing(name)),
        }
    }

    /// A vector `[len]`, as f32.
    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>, LoadError> {
        match self.take(name, 1, len)? {
            Data::Vector(vector) => Ok(vector),
            Data::Matrix(_) => Err(self.missing(name)),
        }
    }

    fn take(&mut self, name: &str, rows: usize, cols: usize) -> Result<Data, LoadError> {
        let room = self.rooms.remove(name).ok_or_else(|| self.missing(name))?;
        check_shape(room.info, rows, cols)?;
        Ok(room.data)
    }

    fn missing(&self, name: &str) -> LoadError {
        LoadError::MissingTensor { name: name.to_owned(), model: self.checkpoint.name().to_owned() }
    }
}

fn check_shape(info: &TensorInfo, want_rows: usize, want_cols: usize) -> Result<(), LoadError> {
    let (name, rows, cols) = (info.name.clone(), info.rows, info.cols);
    if (rows, cols) == (want_rows, want_cols) {
        Ok(())
    } else {
        Err(LoadError::Shape { name, rows, cols, want_rows, want_cols })
    }
}

fn unread(name: &str, source: WeightsError) -> LoadError {
    LoadError::Read { name: name.to_owned(), source: Box::new(source) }
}

impl DecoderLayer {
    /// Bytes in memory, all of which a step reads.
    pub fn weight_bytes(&self) -> usize {
        let Self { q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, .. } = self;
        let linears = [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj];
        let vectors = linears.iter().filter_map(|linear| linear.bias.as_ref()).chain(&self.q_norm);
        let vectors =
            vectors.chain(&self.k_norm).chain([&self.input_layernorm, &self.post_attention_layernorm]);
        let matrices: usize = linears.iter().map(|linear| linear.weight.bytes()).sum();
        matrices + vectors.map(|vector| size_of_val(vector.as_slice())).sum::<usize>()
    }
}
