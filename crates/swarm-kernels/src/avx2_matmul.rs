//! Which AVX2 tile multiplies which group: few tokens straight from the stored weights, many from an unpacked panel.

use std::cell::RefCell;
use std::ops::Range;

use crate::activation::{FloatRows, QuantRows, SIDE};
use crate::avx2::quant_tile;
use crate::avx2_float::{FloatPanel, float_tile};
use crate::avx2_panel::{QuantPanel, TOKENS};
use crate::dtype::DType;
use crate::interleave::{STRIPE, Stripes};
use crate::pack::{LANES, Packed};

thread_local! {
    /// Each compute thread's own panels, so that a step allocates nothing.
    static FLOAT_PANEL: RefCell<Box<FloatPanel>> = RefCell::new(FloatPanel::new());
    static QUANT_PANEL: RefCell<QuantPanel> = RefCell::new(QuantPanel::new());
}

/// Packed groups times the tokens of `block`, whose first token begins a panel: `put(group, token, its eight values)`.
///
/// # Safety
/// The CPU has AVX2, FMA and F16C.
pub(crate) unsafe fn quant_groups(
    dtype: DType,
    packed: &Packed,
    groups: Range<usize>,
    x: &QuantRows,
    block: Range<usize>,
    put: impl Fn(usize, usize, &[f32]),
) {
    let panel = block.start / SIDE;
    if block.len() > SIDE {
        QUANT_PANEL.with_borrow_mut(|scratch| {
            let mut values = [[[0.0; LANES]; 2]; TOKENS];
            for first in groups.clone().step_by(2) {
                let second = Some(first + 1).filter(|second| groups.contains(second));
                let pair = [Some(packed.group(first)), second.map(|second| packed.group(second))];
                // SAFETY: promised by the caller.
                unsafe {
                    scratch.multiply(dtype, pair, packed.shape, x, panel, &mut values[..block.len()]);
                }
                for (token, values) in block.clone().zip(&values) {
                    put(first, token, &values[0]);
                    if let Some(second) = second {
                        put(second, token, &values[1]);
                    }
                }
            }
        });
        return;
    }
    for group in groups {
        let mut values = [[0.0; LANES]; SIDE];
        // SAFETY: promised by the caller.
        unsafe {
            let (bytes, shape) = (packed.group(group), packed.shape);
            match block.len() {
                0 => {}
                1 => quant_tile::<1>(dtype, bytes, shape, x, panel, &mut values),
                2 => quant_tile::<2>(dtype, bytes, shape, x, panel, &mut values),
                3 => quant_tile::<3>(dtype, bytes, shape, x, panel, &mut values),
                _ => quant_tile::<4>(dtype, bytes, shape, x, panel, &mut values),
            }
        }
        for (token, values) in block.clone().zip(&values) {
            put(group, token, values);
        }
    }
}

/// Up to eight float rows times the tokens of `block`; `values[n][r]`.
///
/// # Safety
/// The CPU has AVX2, FMA and F16C.
pub(crate) unsafe fn float_group(
    dtype: DType,
    rows: Stripes<'_>,
    x: &FloatRows,
    block: Range<usize>,
    values: &mut [[f32; LANES]],
) {
    /// A tile of `N` tokens and `R` rows of a stripe, the first of which is row `place` of the group.
    ///
    /// # Safety
    /// As [`float_group`].
    unsafe fn tile<const R: usize, const N: usize>(
        dtype: DType,
        stripe: &[u8],
        place: usize,
        x: &FloatRows,
        token: usize,
        values: &mut [[f32; LANES]],
    ) {
        let mut out = [[0.0; R]; N];
        // SAFETY: promised by the caller.
        unsafe { float_tile(dtype, stripe, place % STRIPE, x, token, &mut out) };
        for (values, out) in values.iter_mut().zip(&out) {
            values[place..place + R].copy_from_slice(out);
        }
    }
    if x.in_triples() {
        FLOAT_PANEL.with_borrow_mut(|panel| {
            // SAFETY: promised by the caller.
            unsafe { panel.multiply(dtype, rows, x, block.start, &mut values[..block.len()]) };
        });
        return;
    }
    // A stripe stays in the L1 cache from three tokens to the next. Eight to twelve sums keep both FMA units busy.
    for (at, stripe) in rows.bytes.chunks_exact(rows.shape.bytes).enumerate() {
        for (three, values) in values[..block.len()].chunks_mut(3).enumerate() {
            let (first, token) = (STRIPE * at, block.start + 3 * three);
            // SAFETY: promised by the caller.
            unsafe {
                match values.len() {
                    1 => tile::<4, 1>(dtype, stripe, first, x, token, values),
                    2 => {
                        tile::<2, 2>(dtype, stripe, first, x, token, values);
                        tile::<2, 2>(dtype, stripe, first + 2, x, token, values);
                    }
                    _ => {
                        tile::<2, 3>(dtype, stripe, first, x, token, values);
                        tile::<2, 3>(dtype, stripe, first + 2, x, token, values);
                    }
                }
            }
        }
    }
}
