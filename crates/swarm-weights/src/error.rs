//! What can go wrong between a path and a model. Context is added once; causes stay in the chain.

use std::ops::Range;
use std::path::PathBuf;

use crate::config::ConfigError;
use crate::gguf::GgufError;
use crate::safetensors::SafetensorsError;
use crate::source::SourceError;

/// Why a model could not be opened or a tensor not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("{path} is not a model: {why}")]
    NotAModel { path: PathBuf, why: String },
    #[error("{file} is not a GGUF file this program reads")]
    Gguf { file: String, source: GgufError },
    #[error("{file} is not a well-formed safetensors file")]
    Safetensors { file: String, source: SafetensorsError },
    #[error("the configuration in {file} is not one this program can run")]
    Config { file: String, source: ConfigError },
    #[error("{file} is not valid JSON")]
    Json { file: String, source: serde_json::Error },
    #[error("{file} cannot be used: {why}")]
    File { file: String, why: String },
    #[error(
        "{model} has no tensor {name:?}; the download is incomplete or the configuration is another model's"
    )]
    MissingTensor { model: String, name: String },
    #[error(
        "tensor {name:?} of {model} is not part of a {family} model as its configuration describes it; running without it would change the result"
    )]
    UnexpectedTensor { model: String, name: String, family: &'static str },
    #[error("tensor {name:?} has shape {got:?}, the configuration asks for {want:?}")]
    Shape { name: String, want: Vec<u64>, got: Vec<u64> },
    #[error("tensor {name:?} has type {dtype:?}, which is not supported{hint}")]
    Dtype { name: String, dtype: String, hint: &'static str },
    #[error("tensor {name:?} of {bytes} bytes does not fit into memory")]
    OutOfMemory { name: String, bytes: u64 },
    #[error("there is no tensor named {name:?} in {model}")]
    NoSuchTensor { model: String, name: String },
    #[error("rows {}..{} of tensor {name:?} are not there to be read into {bytes} bytes", rows.start, rows.end)]
    Rows { name: String, rows: Range<usize>, bytes: usize },
}
