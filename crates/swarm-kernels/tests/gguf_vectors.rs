//! Dequantization equals the `gguf` Python package's, value for value, on committed vectors.

use swarm_kernels::{DType, Matrix, dequantize};

fn dtype(name: &str) -> DType {
    DType::ALL.into_iter().find(|d| d.name() == name).unwrap_or_else(|| panic!("no dtype {name}"))
}

#[test]
fn every_format_dequantizes_as_gguf_does() {
    let vectors = swarm_testkit::quant_vectors();
    assert_eq!(vectors.len(), DType::ALL.len());
    for vector in vectors {
        let dtype = dtype(vector.dtype_name);
        let mut got = vec![0.0; vector.values.len()];
        dequantize(dtype, &vector.bytes, &mut got).unwrap();
        let same = |(a, b): (&f32, &f32)| {
            a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()) || (*a == 0.0 && *b == 0.0)
        };
        let wrong = got.iter().zip(&vector.values).position(|pair| !same(pair));
        assert_eq!(wrong, None, "{dtype:?}");
        // And the packed layout gives the same row back.
        let matrix = Matrix::new(dtype, 1, got.len(), &vector.bytes).unwrap();
        let mut row = vec![0.0; got.len()];
        matrix.dequantize_row(0, &mut row).unwrap();
        assert!(row.iter().zip(&got).all(same), "{dtype:?} packed");
    }
}
