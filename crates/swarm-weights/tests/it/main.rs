//! The room from outside: files written here, opened and read through the public API.

mod checkpoint;
mod fetch;
mod gguf;
mod gguf_model;
mod hashed;
mod safetensors;
mod split;
mod supply;
mod trouble;
mod writer;
