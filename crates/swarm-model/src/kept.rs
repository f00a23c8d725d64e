//! Layers in memory between two placements: those that stay are used again, those that go give their memory back before
//! anything is read.

use std::collections::BTreeMap;
use std::ops::Range;

use swarm_kernels::Matrix;
use swarm_weights::{EMBED, HEAD, ModelConfig, NORM};

use crate::decoder::DecoderLayer;
use crate::load::Weights;
use crate::stage::Stage;

/// Layers of one model, final norm and head, as far as they are here. Empty by default.
#[derive(Default)]
pub struct Kept {
    pub(crate) layers: BTreeMap<usize, DecoderLayer>,
    pub(crate) norm: Option<Vec<f32>>,
    pub(crate) head: Option<Matrix>,
}

impl Kept {
    /// Bytes of weights.
    pub fn weight_bytes(&self) -> usize {
        let layers: usize = self.layers.values().map(DecoderLayer::weight_bytes).sum();
        let norm = self.norm.as_ref().map_or(0, |norm| size_of_val(norm.as_slice()));
        layers + norm + self.head.as_ref().map_or(0, Matrix::bytes)
    }

    /// Lets go of what a stage of `layers` does not need, one layer after the other. Memory falls with each.
    pub fn trim(&mut self, config: &ModelConfig, layers: &Range<usize>) {
        self.layers.retain(|layer, _| layers.contains(layer));
        if layers.end != config.num_hidden_layers {
            (self.norm, self.head) = (None, None);
        }
    }

    /// All weights of a stage of `layers` are here.
    pub fn is_whole(&self, config: &ModelConfig, layers: &Range<usize>) -> bool {
        let is_tail = layers.end == config.num_hidden_layers;
        layers.clone().all(|layer| self.layers.contains_key(&layer))
            && (!is_tail || self.norm.is_some() && self.head.is_some())
    }

    /// The tensor is part of what is here.
    pub(crate) fn has(&self, tensor: &str) -> bool {
        match tensor {
            NORM => self.norm.is_some(),
            // In memory, an embedding is a head.
            EMBED | HEAD => self.head.is_some(),
            layer => layer_of(layer).is_some_and(|layer| self.layers.contains_key(&layer)),
        }
    }
}

impl From<Stage> for Kept {
    fn from(stage: Stage) -> Self {
        let (layers, Weights { decoder, norm, head, .. }) = stage.into_weights();
        Self { layers: layers.zip(decoder).collect(), norm, head }
    }
}

/// The layer of a tensor of the decoder.
fn layer_of(tensor: &str) -> Option<usize> {
    let (layer, _) = tensor.strip_prefix("model.layers.")?.split_once('.')?;
    layer.parse().ok()
}
