//! The kernels for AArch64: written once over 128-bit vector steps ([`vectors::Vectors`]), compiled for three kinds of CPU.
//!
//! Tests run the same tiles on the steps' portable model, on every computer.

// Tiles are indexed by half, token, side and row in several arrays at once.
#![allow(clippy::needless_range_loop)]

#[cfg(target_arch = "aarch64")]
mod arm;
pub(crate) mod attention;
mod float;
#[cfg(test)]
mod model;
mod panel;
mod tile;
mod vectors;

use panel::{Order, QuantPanel};
use tile::{Kind, tile};
use vectors::Vectors;

use crate::activation::QuantRow;
use crate::pack::{GroupShape, LANES};

#[cfg(target_arch = "aarch64")]
pub(crate) use for_arm::{Baseline, float_rows, quant_group};

/// One group of eight packed rows times some tokens (at most 64); `out[n][row]`.
struct Work<'a> {
    group: &'a [u8],
    shape: GroupShape,
    x: &'a [QuantRow<'a>],
    out: &'a mut [[f32; LANES]],
    panel: &'a mut QuantPanel,
}

/// Few tokens meet the weights as they are stored, many a panel.
#[inline(always)]
fn multiply<V: Vectors, O: Order<V>, F: Kind>(work: Work<'_>) {
    let Work { group, shape, x, out, panel } = work;
    match *x {
        [a] => tile::<V, F, 1>(group, shape, [a], out),
        [a, b] => tile::<V, F, 2>(group, shape, [a, b], out),
        [a, b, c] => tile::<V, F, 3>(group, shape, [a, b, c], out),
        [a, b, c, d] => tile::<V, F, 4>(group, shape, [a, b, c, d], out),
        _ => panel::multiply::<V, O, F>(panel, group, shape, x, out),
    }
}

#[cfg(target_arch = "aarch64")]
mod for_arm {
    use std::cell::RefCell;
    use std::ops::Range;

    use super::arm::{Dot, I8mm, Neon, Widening};
    use super::panel::{Pairs, Quads, QuantPanel, TOKENS};
    use super::tile::{Kind, Q2K, Q3K, Q4K, Q5K, Q6K, Q40, Q41, Q50, Q51, Q80};
    use super::{Work, float, multiply};
    use crate::KernelPath;
    use crate::activation::{FloatRows, QuantRows};
    use crate::dtype::DType;
    use crate::interleave::Groups;
    use crate::pack::{LANES, Packed};

    /// The vectors of every AArch64 CPU.
    pub(crate) type Baseline = Neon<Widening>;

    thread_local! {
        /// Each compute thread's own panel, so that a step allocates nothing.
        static PANEL: RefCell<QuantPanel> = RefCell::new(QuantPanel::new());
    }

    fn widening<F: Kind>(work: Work<'_>) {
        multiply::<Neon<Widening>, Quads, F>(work);
    }

    #[target_feature(enable = "dotprod")]
    fn dot<F: Kind>(work: Work<'_>) {
        multiply::<Neon<Dot>, Quads, F>(work);
    }

    #[target_feature(enable = "dotprod,i8mm")]
    fn i8mm<F: Kind>(work: Work<'_>) {
        multiply::<Neon<I8mm>, Pairs, F>(work);
    }

    // SAFETY: of the function it gives: to be called only where `path` is available.
    fn kernel<F: Kind>(path: KernelPath) -> unsafe fn(Work<'_>) {
        match path {
            KernelPath::NeonI8mm => i8mm::<F>,
            KernelPath::NeonDot => dot::<F>,
            _ => widening::<F>,
        }
    }

    /// Eight float rows of a group, from row `row` of it on, times some tokens of `x`; `out[n][row]`.
    pub(crate) fn float_rows(
        dtype: DType,
        group: Groups<'_>,
        row: usize,
        x: &FloatRows,
        tokens: Range<usize>,
        out: &mut [[f32; LANES]],
    ) {
        float::floats::<Baseline>(dtype, group, row, x, tokens.start, &mut out[..tokens.len()]);
    }

    /// Group `group` times some tokens of `x` (at most 64); `out[n][row]`. `path` is available on this CPU.
    pub(crate) fn quant_group(
        path: KernelPath,
        dtype: DType,
        packed: &Packed,
        group: usize,
        x: &QuantRows,
        tokens: Range<usize>,
        out: &mut [[f32; LANES]],
    ) {
        let mut rows = [x.row(tokens.start); TOKENS];
        rows.iter_mut().zip(tokens.clone()).for_each(|(row, token)| *row = x.row(token));
        let (x, out) = (&rows[..tokens.len()], &mut out[..tokens.len()]);
        let kernel = match dtype {
            DType::Q4_0 => kernel::<Q40>(path),
            DType::Q4_1 => kernel::<Q41>(path),
            DType::Q5_0 => kernel::<Q50>(path),
            DType::Q5_1 => kernel::<Q51>(path),
            DType::Q8_0 => kernel::<Q80>(path),
            DType::Q2_K => kernel::<Q2K>(path),
            DType::Q3_K => kernel::<Q3K>(path),
            DType::Q4_K => kernel::<Q4K>(path),
            DType::Q5_K => kernel::<Q5K>(path),
            DType::Q6_K => kernel::<Q6K>(path),
            DType::F32 | DType::F16 | DType::BF16 => unreachable!("floats are not packed in lanes"),
        };
        PANEL.with_borrow_mut(|panel| {
            let work = Work { group: packed.group(group), shape: packed.shape, x, out, panel };
            // SAFETY: `path` is available: the CPU has the kernel's instructions.
            unsafe { kernel(work) };
        });
    }
}

#[cfg(test)]
mod tests;
