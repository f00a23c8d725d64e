//! The room from outside: files written here, opened and read through the public API.

mod checkpoint;
mod gguf;
mod gguf_model;
mod safetensors;
mod writer;
