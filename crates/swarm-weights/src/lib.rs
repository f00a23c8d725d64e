//! Weights from disk: GGUF and safetensors files, `config.json` or GGUF metadata, by byte range.
//!
//! [`cache::resolve`] finds a model, on this computer or on the Hub ([`hub`], of which [`store`] keeps what was needed), [`Checkpoint::open`] reads its headers and holds every tensor against
//! the configuration, and [`Checkpoint::read`] gives one tensor's bytes. A stage reads what
//! [`Checkpoint::stage_tensors`] lists and nothing else.
//!
//! Files are not trusted. All arithmetic on what they say is checked, counts are held against the bytes
//! that are left, and nothing is allocated by a declared size that the file does not have. Both formats
//! come out in one shape: Hugging Face names, Hugging Face row order, one [`ModelConfig`].
//!
//! This room runs no kernel and needs no async runtime. Its only `unsafe` is in `mmap.rs`.

#![deny(unsafe_code)]

pub mod cache;
mod checkpoint;
mod config;
mod error;
mod fingerprint;
pub mod gguf;
mod hashed;
mod hf;
pub mod hub;
mod layout;
mod mmap;
mod open;
mod quant;
pub mod quantized;
pub mod safetensors;
mod share;
mod source;
pub mod store;
mod tokenizer;
mod unit;

pub use checkpoint::{Checkpoint, Format, Origin, Tensor, TensorRows};
pub use config::{ConfigError, Family, ModelConfig, RopeConfig, RopeScaling};
pub use error::WeightsError;
pub use gguf::GgufVocab;
pub use hashed::HashedUnits;
pub use hub::ModelRef;
pub use layout::{EMBED, HEAD, NORM, TensorInfo};
pub use mmap::MmapSource;
pub use quant::QuantGroup;
pub use quantized::{QuantizedError, QuantizedStore};
pub use share::{Found, Promise, Share, SharedFile};
pub use source::{FileSource, Opener, Source, SourceError};
pub use store::{
    Adopted, Brought, Catalogue, FetchControl, FetchProgress, FetchSource, Needs, PIECE_BYTES, Store,
    StoreError, Supplier, SupplyAsk, Take,
};
pub use tokenizer::TokenizerFiles;
pub use unit::{Attached, Unit};
