//! Matrix products of strided views, on one thread (callers cut the work themselves).

/// A matrix in a slice: the entry at (`row`, `column`) is at `row * row_stride + column * column_stride`.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    numbers: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Rows one after the other, `row_stride` apart.
    pub(crate) fn rows(numbers: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        Self::strided(numbers, rows, columns, row_stride, 1)
    }

    /// Any strides.
    pub(crate) fn strided(
        numbers: &'a [f32],
        rows: usize,
        columns: usize,
        row_stride: usize,
        column_stride: usize,
    ) -> Self {
        assert!(reach(rows, columns, row_stride, column_stride) <= numbers.len(), "matrix lies inside its slice");
        Self { numbers, rows, columns, row_stride, column_stride }
    }

    /// Rows and columns exchanged.
    pub(crate) fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// How many numbers a matrix spans.
fn reach(rows: usize, columns: usize, row_stride: usize, column_stride: usize) -> usize {
    if rows == 0 || columns == 0 { 0 } else { (rows - 1) * row_stride + (columns - 1) * column_stride + 1 }
}

/// What becomes of the numbers in the output.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Into {
    /// They are overwritten.
    Overwrite,
    /// The product is added to them.
    Add,
}

/// `output = factor * a * b`, or that added to it. Rows of `output` are `row_stride` apart.
pub(crate) fn multiply(output: &mut [f32], row_stride: usize, into: Into, factor: f32, a: Matrix, b: Matrix) {
    let (m, n, k) = (a.rows, b.columns, a.columns);
    assert_eq!(k, b.rows, "inner sizes of a product");
    assert!(reach(m, n, row_stride, 1) <= output.len(), "product lies inside its slice");
    if m == 0 || n == 0 {
        return;
    }
    let stride = |stride: usize| isize::try_from(stride).expect("a slice is shorter than isize::MAX");
    // SAFETY: the assertions here and in `Matrix::strided` keep every access inside the slices, and `output`
    // is borrowed mutably, so it overlaps neither operand.
    #[allow(unsafe_code)]
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            output.as_mut_ptr(),
            1,
            stride(row_stride),
            into == Into::Add,
            a.numbers.as_ptr(),
            stride(a.column_stride),
            stride(a.row_stride),
            b.numbers.as_ptr(),
            stride(b.column_stride),
            stride(b.row_stride),
            1.0,
            factor,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_views_are_those_of_the_formula() {
        let a: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let b: Vec<f32> = (0..20).map(|i| (i as f32 - 9.0) * 0.5).collect();
        let mut output = vec![1.0; 2 * 7];
        // a is 2 x 3 with rows 5 apart, b is 3 x 4, given as its transpose.
        let (a, b) = (Matrix::rows(&a, 2, 3, 5), Matrix::rows(&b, 4, 3, 4).transposed());
        multiply(&mut output, 7, Into::Add, 2.0, a, b);
        for row in 0..2 {
            for column in 0..4 {
                let dot: f32 = (0..3).map(|k| a.numbers[row * 5 + k] * b.numbers[column * 4 + k]).sum();
                assert_eq!(output[row * 7 + column], 1.0 + 2.0 * dot);
            }
            assert!(row == 1 || output[4..7] == [1.0; 3], "numbers between rows stay");
        }
    }

    #[test]
    #[should_panic(expected = "inside its slice")]
    fn a_matrix_that_leaves_its_slice_is_refused() {
        let _ = Matrix::rows(&[0.0; 5], 2, 3, 3);
    }
}
