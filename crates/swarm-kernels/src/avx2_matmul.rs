//! Which AVX2 tile multiplies which group: few tokens straight from the stored weights, many from an unpacked panel.

use std::cell::RefCell;
use std::ops::Range;

use crate::activation::{QuantRows, SIDE};
use crate::avx2::quant_tile;
use crate::avx2_panel::{QuantPanel, TOKENS};
use crate::dtype::DType;
use crate::pack::{LANES, Packed};

thread_local! {
    /// Each compute thread's own panel, so that a step allocates nothing.
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
