//! The buffers of a step, kept between steps.

use std::ops::Range;

use swarm_kernels::MatmulScratch;
use swarm_weights::ModelConfig;

use crate::stage::Segment;

/// Buffers of [`crate::Stage::forward`] and [`crate::Stage::logits`]. They grow to the largest step
/// seen and stay; after that a step allocates nothing. One per compute thread, for any stage.
#[derive(Default)]
pub struct Scratch {
    pub(crate) rows: Vec<RowPlace>,
    /// Those of them, ascending, that somebody wants when they leave the layer.
    pub(crate) wanted: Vec<usize>,
    pub(crate) floats: Floats,
    pub(crate) matmul: MatmulScratch,
}

/// Which session and position a hidden row belongs to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowPlace {
    pub segment: usize,
    pub position: usize,
}

impl Scratch {
    /// Lists the rows of a step, segment by segment. All of them are wanted.
    pub(crate) fn place_rows(&mut self, segments: &[Segment<'_>]) {
        self.rows.clear();
        for (index, segment) in segments.iter().enumerate() {
            let positions = segment.position..segment.position + segment.tokens;
            self.rows.extend(positions.map(|position| RowPlace { segment: index, position }));
        }
        self.wanted.clear();
        self.wanted.extend(0..self.rows.len());
    }

    /// Of each segment's rows, those whose logits are asked for are wanted alone.
    pub(crate) fn want_logits(&mut self, segments: &[Segment<'_>]) {
        self.wanted.clear();
        let mut end = 0;
        for segment in segments {
            end += segment.tokens;
            self.wanted.extend(end - segment.logits.min(segment.tokens)..end);
        }
    }
}

/// Widths of the activations of a layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Widths {
    pub width: usize,
    /// `heads * head_dim`
    pub q: usize,
    /// `kv_heads * head_dim`
    pub kv: usize,
    pub intermediate: usize,
}

impl Widths {
    pub fn of(config: &ModelConfig) -> Self {
        Self {
            width: config.hidden_size,
            q: config.q_width(),
            kv: config.kv_width(),
            intermediate: config.intermediate_size,
        }
    }

    /// Numbers in [`Floats`] for one token.
    pub fn floats_per_token(&self) -> usize {
        self.width + 3 * self.q + 2 * self.kv + 2 * self.intermediate
    }
}

/// One growing allocation, cut into the activations of a step.
#[derive(Default)]
pub(crate) struct Floats(Vec<f32>);

/// The activations of a step. What they hold between layers means nothing.
pub(crate) struct Activations<'a> {
    pub normed: &'a mut [f32],   // [tokens, width]
    pub q: &'a mut [f32],        // [tokens, heads, head_dim]
    pub k: &'a mut [f32],        // [tokens, kv_heads, head_dim]
    pub v: &'a mut [f32],        // [tokens, kv_heads, head_dim]
    pub unnormed: &'a mut [f32], // [tokens, heads, head_dim], a copy of q or k while it is normed
    pub attended: &'a mut [f32], // [tokens, heads, head_dim]
    pub gate: &'a mut [f32],     // [tokens, intermediate]
    pub up: &'a mut [f32],       // [tokens, intermediate]
}

impl Activations<'_> {
    /// Leaves the first `tokens` rows of each.
    pub fn truncate(&mut self, tokens: usize, widths: Widths) {
        let Widths { width, q, kv, intermediate } = widths;
        let Self { normed, q: query, k, v, unnormed, attended, gate, up } = self;
        let cuts = [
            (normed, width),
            (query, q),
            (k, kv),
            (v, kv),
            (unnormed, q),
            (attended, q),
            (gate, intermediate),
            (up, intermediate),
        ];
        for (rows, width) in cuts {
            *rows = &mut std::mem::take(rows)[..tokens * width];
        }
    }
}

impl Floats {
    pub fn activations(&mut self, tokens: usize, widths: Widths) -> Activations<'_> {
        let mut rest = self.take(tokens * widths.floats_per_token());
        let mut cut = |width: usize| {
            let (head, tail) = std::mem::take(&mut rest).split_at_mut(tokens * width);
            rest = tail;
            head
        };
        Activations {
            normed: cut(widths.width),
            q: cut(widths.q),
            k: cut(widths.kv),
            v: cut(widths.kv),
            unnormed: cut(widths.q),
            attended: cut(widths.q),
            gate: cut(widths.intermediate),
            up: cut(widths.intermediate),
        }
    }

    /// `len` numbers, whatever they hold.
    pub fn take(&mut self, len: usize) -> &mut [f32] {
        if self.0.len() < len {
            self.0.resize(len, 0.0);
        }
        &mut self.0[..len]
    }
}

/// The positions a query attends to: up to itself, or the last `window` of those.
pub(crate) fn attended_positions(position: usize, window: Option<usize>) -> Range<usize> {
    let end = position + 1;
    end.saturating_sub(window.unwrap_or(end))..end
}
