//! Reading a stage's tensors: slices of rows go from the file through a small window into their packed place, so that
//! memory holds the weights once, also while loading.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::vec::IntoIter;

use swarm_kernels::{Arena, DType, Matrix, MatrixBuilder, MatrixPart, ShapeError, dequantize, quantize};
use swarm_weights::{Checkpoint, EMBED, HEAD, ModelConfig, NORM, TensorInfo, TensorRows, WeightsError};

use crate::LoadError;
use crate::decoder::{DecoderLayer, Linear};
use crate::scratch::Widths;
use crate::stage::{LoadOptions, LoadProgress};

/// Stored bytes that a thread reads at once: they stay in its core's cache until they are packed.
const SLICE_BYTES: usize = 512 << 10;

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

/// Loads a stage with `options.threads` threads; the result does not depend on them. `progress` is called on this
/// thread, with bytes of the file.
pub(crate) fn load(
    checkpoint: &Checkpoint,
    layers: Range<usize>,
    options: &LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Weights, LoadError> {
    let mut tensors = held_tensors(checkpoint, &layers);
    let bytes_total = tensors.iter().map(|info| info.bytes).sum();
    tensors.sort_by_key(|info| info.place()); // the file from front to back
    let mut arena = Arena::default();
    let rooms = tensors.into_iter().map(|info| Room::new(info, options.dequantized, &mut arena));
    let mut rooms = rooms.collect::<Result<Vec<_>, LoadError>>()?;
    let mut slices = Vec::new();
    for room in &mut rooms {
        room.cut(checkpoint, &mut slices);
    }
    fill(checkpoint, slices, options, bytes_total, progress)?;
    Parts { checkpoint, rooms: rooms.into_iter().map(|room| (room.info.name.as_str(), room)).collect() }
        .assemble(&layers)
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
}

enum Data {
    Matrix(MatrixBuilder),
    Vector(Vec<f32>),
}

impl<'a> Room<'a> {
    /// Room for `info`; as f32 if `widen`.
    fn new(info: &'a TensorInfo, widen: bool, arena: &mut Arena) -> Result<Self, LoadError> {
        let is_vector = info.name.ends_with("norm.weight") || info.name.ends_with(".bias");
        let dtype = if widen { DType::F32 } else { info.held };
        let data = if is_vector {
            Data::Vector(vec![0.0; info.cols])
        } else {
            let builder = MatrixBuilder::new(arena, dtype, info.rows, info.cols);
            Data::Matrix(builder.map_err(|source| LoadError::Pack { name: info.name.clone(), source })?)
        };
        Ok(Self { info, dtype, data })
    }

    /// Adds the slices that fill this room.
    fn cut<'s>(&'s mut self, checkpoint: &Checkpoint, slices: &mut Vec<Slice<'s>>)
    where
        'a: 's,
    {
        let (info, dtype) = (self.info, self.dtype);
        match &mut self.data {
            Data::Vector(out) => slices.push(Slice { info, dtype, place: Place::Vector(out) }),
            Data::Matrix(builder) => {
                let row_bytes = info.bytes.checked_div(info.rows as u64).unwrap_or(0).max(1);
                let unit = match checkpoint.row_unit(info) {
                    unit if unit.is_multiple_of(MatrixBuilder::ROWS) => unit,
                    unit => unit * MatrixBuilder::ROWS,
                };
                let rows = (SLICE_BYTES as u64 / row_bytes).max(1) as usize;
                let parts = builder.parts(rows.next_multiple_of(unit)).into_iter();
                slices.extend(parts.map(|part| Slice { info, dtype, place: Place::Rows(part) }));
            }
        }
    }
}

/// Consecutive rows of one tensor, read by one thread at once.
struct Slice<'a> {
    info: &'a TensorInfo,
    /// What it is turned into.
    dtype: DType,
    place: Place<'a>,
}

enum Place<'a> {
    Rows(MatrixPart<'a>),
    Vector(&'a mut Vec<f32>),
}

/// A thread's buffers, reused from slice to slice.
#[derive(Default)]
struct Window {
    stored: Vec<u8>,
    laid_out: Vec<u8>,
    turning: Turning,
}

/// What stands between stored bytes and those that are held.
#[derive(Default)]
struct Turning {
    blocks: Vec<u8>,
    floats: Vec<f32>,
}

impl Slice<'_> {
    /// Reads the slice and puts it in its place. Returns its stored bytes.
    fn fill(self, checkpoint: &Checkpoint, window: &mut Window) -> Result<u64, LoadError> {
        let Self { info, dtype, place } = self;
        let unread = |source| LoadError::Read { name: info.name.clone(), source: Box::new(source) };
        let unpacked = |source| LoadError::Pack { name: info.name.clone(), source };
        let Window { stored, laid_out, turning } = window;
        let row_bytes = info.dtype.row_bytes(info.cols).unwrap_or(0);
        let rows = match &place {
            Place::Rows(part) => part.rows(),
            Place::Vector(_) => 0..info.rows,
        };
        let bytes = row_bytes * rows.len(); // of a tensor whose size was checked
        match place {
            Place::Rows(part) if dtype == info.dtype => {
                part.fill(stored, |out| checkpoint.read_rows(info, rows, out)).map_err(unread)?;
            }
            Place::Rows(part) => {
                stored.resize(bytes, 0);
                checkpoint.read_rows(info, rows, stored).map_err(unread)?;
                part.fill(laid_out, |out| turning.turn(info, stored, dtype, out)).map_err(unpacked)?;
            }
            Place::Vector(out) => {
                stored.resize(bytes, 0);
                checkpoint.read_rows(info, rows, stored).map_err(unread)?;
                dequantize(info.dtype, stored, out).map_err(unpacked)?;
            }
        }
        Ok(bytes as u64)
    }
}

impl Turning {
    /// Turns stored rows of `info` into `dtype`: quantizes them where that is asked for, and then widens them to f32
    /// where that is.
    fn turn(
        &mut self,
        info: &TensorInfo,
        stored: &[u8],
        dtype: DType,
        out: &mut [u8],
    ) -> Result<(), ShapeError> {
        if dtype == info.held {
            return quantize(info.dtype, stored, dtype, out);
        }
        let Self { blocks, floats } = self;
        floats.resize(out.len() / 4, 0.0);
        if info.held == info.dtype {
            dequantize(info.dtype, stored, floats)?;
        } else {
            blocks.resize(info.held.row_bytes(floats.len()).unwrap_or(0), 0);
            quantize(info.dtype, stored, info.held, blocks)?;
            dequantize(info.held, blocks, floats)?;
        }
        for (place, value) in out.as_chunks_mut::<4>().0.iter_mut().zip(floats) {
            *place = value.to_le_bytes();
        }
        Ok(())
    }
}

/// Filled rooms by name, to be put together.
struct Parts<'a> {
    checkpoint: &'a Checkpoint,
    rooms: BTreeMap<&'a str, Room<'a>>,
}

impl Parts<'_> {
    fn assemble(mut self, layers: &Range<usize>) -> Result<Weights, LoadError> {
        let checkpoint = self.checkpoint;
        let config = checkpoint.config();
        let (vocab, width) = (config.vocab_size, config.hidden_size);
        let embed_tokens = looks_up(checkpoint, layers).then(|| self.looked_up(vocab, width)).transpose()?;
        let decoder = layers.clone().map(|layer| self.decoder_layer(layer)).collect::<Result<_, _>>()?;
        let is_tail = layers.end == config.num_hidden_layers;
        let head = if config.tie_word_embeddings { EMBED } else { HEAD };
        Ok(Weights {
            embed_tokens,
            decoder,
            norm: is_tail.then(|| self.vector(NORM, width)).transpose()?,
            head: is_tail.then(|| self.matrix(head, vocab, width)).transpose()?,
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
