//! What each kind of change does to a weight.

use super::*;

/// Small made-up values of this shape.
fn tensor(shape: &[usize], seed: usize) -> Tensor {
    let count = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|i| ((i * 7 + seed * 5 + i * i) % 13) as f32 / 4.0 - 1.5).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).expect("as many values as the shape has")
}

fn change(parts: &[(Part, Tensor)]) -> Result<Change, Flaw> {
    Change::new(&parts.iter().map(|(part, tensor)| (*part, (format!("{part:?}"), tensor.clone()))).collect(), None)
}

fn alpha(value: f32) -> (Part, Tensor) {
    (Part::Alpha, Tensor::new(value, &Device::Cpu).expect("one number"))
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().and_then(|tensor| tensor.to_vec1()).expect("f32 values")
}

/// What the parts add to a weight of this shape at strength 1.
fn delta(parts: &[(Part, Tensor)], shape: &[usize]) -> Vec<f32> {
    delta_of(parts, &tensor(shape, 9), 1.0)
}

fn delta_of(parts: &[(Part, Tensor)], weight: &Tensor, strength: f64) -> Vec<f32> {
    let change = change(parts).expect("complete");
    change.check(weight.dims()).expect("fitting");
    let delta = change.delta(weight, strength).expect("checked").expect("the weight changes");
    assert_eq!(delta.dims(), weight.dims());
    values(&delta)
}

fn assert_close(left: &[f32], right: &[f32]) {
    assert_eq!(left.len(), right.len());
    for (at, (left, right)) in left.iter().zip(right).enumerate() {
        assert!((left - right).abs() < 1e-4, "value {at}: {left} is not {right}");
    }
}

/// The matrix product, written out.
fn product(left: &Tensor, right: &Tensor) -> Vec<f32> {
    let ((rows, rank), columns) = (matrix(left.dims()), matrix(right.dims()).1);
    let (left, right) = (values(left), values(right));
    let cell = |row: usize, column: usize| (0..rank).map(|i| left[row * rank + i] * right[i * columns + column]).sum();
    (0..rows * columns).map(|at| cell(at / columns, at % columns)).collect()
}

/// Σ over i and j of `left[p, i] core[i, j, k] right[j, r]`, written out: `(p, r, k)`.
fn contracted(core: &Tensor, left: &Tensor, right: &Tensor) -> Vec<f32> {
    let ((rows, first), (second, columns)) = (matrix(left.dims()), matrix(right.dims()));
    let pixels: usize = core.dims()[2..].iter().product();
    let (core, left, right) = (values(core), values(left), values(right));
    let mut result = vec![0.0; rows * columns * pixels];
    for (at, value) in result.iter_mut().enumerate() {
        let (p, r, k) = (at / (columns * pixels), at / pixels % columns, at % pixels);
        for i in 0..first {
            for j in 0..second {
                *value += left[p * first + i] * core[(i * second + j) * pixels + k] * right[j * columns + r];
            }
        }
    }
    result
}

#[test]
fn low_rank_factors_are_multiplied_and_scaled_by_alpha_over_rank() {
    let (up, down) = (tensor(&[3, 2], 1), tensor(&[2, 4], 2));
    let parts = [(Part::Up, up.clone()), (Part::Down, down.clone())];
    let expected = product(&up, &down);
    assert_close(&delta(&parts, &[3, 4]), &expected);
    let [up, down] = parts;
    let scaled: Vec<f32> = expected.iter().map(|value| value * 0.5).collect();
    let parts = [up, down, alpha(1.0)];
    assert_close(&delta(&parts, &[3, 4]), &scaled);
    let negative: Vec<f32> = scaled.iter().map(|value| value * -2.0).collect();
    assert_close(&delta_of(&parts, &tensor(&[3, 4], 0), -2.0), &negative);
}

#[test]
fn convolutions_take_factors_of_two_and_of_four_axes() {
    let (up, down) = (tensor(&[3, 2, 1, 1], 1), tensor(&[2, 2, 3, 3], 2));
    assert_close(&delta(&[(Part::Up, up.clone()), (Part::Down, down.clone())], &[3, 2, 3, 3]), &product(&up, &down));
    let (up, down) = (tensor(&[3, 2], 1), tensor(&[2, 4], 2));
    let parts = [(Part::Up, up.clone()), (Part::Down, down.clone())];
    assert_close(&delta(&parts, &[3, 4, 1, 1]), &product(&up, &down));
}

#[test]
fn a_core_between_the_factors_is_contracted_with_both() {
    let (up, mid, down) = (tensor(&[4, 2, 1, 1], 1), tensor(&[2, 3, 3, 3], 2), tensor(&[3, 5, 1, 1], 3));
    let parts = [(Part::Up, up.clone()), (Part::Mid, mid.clone()), (Part::Down, down.clone()), alpha(1.5)];
    let expected: Vec<f32> = contracted(&mid, &up, &down).iter().map(|value| value * 0.5).collect();
    assert_close(&delta(&parts, &[4, 5, 3, 3]), &expected);
}

#[test]
fn loha_multiplies_two_products_by_element() {
    let factors = [tensor(&[3, 2], 1), tensor(&[2, 8], 2), tensor(&[3, 2], 3), tensor(&[2, 8], 4)];
    let names = [Part::HadaW1A, Part::HadaW1B, Part::HadaW2A, Part::HadaW2B];
    let mut parts: Vec<_> = names.into_iter().zip(factors.clone()).collect();
    parts.push(alpha(1.0));
    let (first, second) = (product(&factors[0], &factors[1]), product(&factors[2], &factors[3]));
    let expected: Vec<f32> = first.iter().zip(second).map(|(a, b)| a * b * 0.5).collect();
    assert_close(&delta(&parts, &[3, 8]), &expected);
    assert_close(&delta(&parts, &[3, 2, 2, 2]), &expected);
}

#[test]
fn loha_with_cores_reads_its_left_factors_turned() {
    let cores = [tensor(&[2, 2, 3, 3], 5), tensor(&[2, 2, 3, 3], 6)];
    let left = [tensor(&[2, 4], 1), tensor(&[2, 4], 2)];
    let right = [tensor(&[2, 3], 3), tensor(&[2, 3], 4)];
    let turned = |at: usize| left[at].t().and_then(|left| left.contiguous()).expect("two axes");
    let parts = [
        (Part::HadaT1, cores[0].clone()),
        (Part::HadaW1A, left[0].clone()),
        (Part::HadaW1B, right[0].clone()),
        (Part::HadaT2, cores[1].clone()),
        (Part::HadaW2A, left[1].clone()),
        (Part::HadaW2B, right[1].clone()),
    ];
    let (first, second) = (contracted(&cores[0], &turned(0), &right[0]), contracted(&cores[1], &turned(1), &right[1]));
    let expected: Vec<f32> = first.iter().zip(second).map(|(a, b)| a * b).collect();
    assert_close(&delta(&parts, &[4, 3, 3, 3]), &expected);
}

/// The Kronecker product of two matrices with these shapes, written out.
fn kronecker(first: &[f32], (rows, columns): (usize, usize), second: &[f32], inner: (usize, usize)) -> Vec<f32> {
    let width = columns * inner.1;
    let cell = |row: usize, column: usize| {
        first[row / inner.0 * columns + column / inner.1] * second[row % inner.0 * inner.1 + column % inner.1]
    };
    (0..rows * inner.0 * width).map(|at| cell(at / width, at % width)).collect()
}

#[test]
fn lokr_is_a_kronecker_product_whose_sides_may_be_products() {
    let (w1, w2) = (tensor(&[2, 3], 1), tensor(&[2, 2], 2));
    let whole = [(Part::LokrW1, w1.clone()), (Part::LokrW2, w2.clone()), alpha(7.0)];
    // Alpha belongs to a rank, and here is none.
    let expected = kronecker(&values(&w1), (2, 3), &values(&w2), (2, 2));
    assert_close(&delta(&whole, &[4, 6]), &expected);
    let (a, b) = (tensor(&[2, 2], 3), tensor(&[2, 8], 4));
    let parts = [(Part::LokrW1, w1.clone()), (Part::LokrW2A, a.clone()), (Part::LokrW2B, b.clone()), alpha(1.0)];
    let expected: Vec<f32> =
        kronecker(&values(&w1), (2, 3), &product(&a, &b), (2, 8)).iter().map(|value| value * 0.5).collect();
    assert_close(&delta(&parts, &[4, 6, 2, 2]), &expected);
    let (core, a, b) = (tensor(&[2, 2, 3, 3], 5), tensor(&[2, 4], 6), tensor(&[2, 2], 7));
    let turned = a.t().and_then(|a| a.contiguous()).expect("two axes");
    let inner = contracted(&core, &turned, &b);
    let parts = [(Part::LokrW1, w1.clone()), (Part::LokrT2, core), (Part::LokrW2A, a), (Part::LokrW2B, b)];
    assert_close(&delta(&parts, &[8, 6, 3, 3]), &kronecker(&values(&w1), (2, 3), &inner, (4, 18)));
}

#[test]
fn dora_brings_each_row_of_the_changed_weight_to_its_length() {
    let weight = tensor(&[3, 4], 9);
    let lengths = Tensor::new(&[1f32, 2.0, 3.0], &Device::Cpu).expect("three lengths");
    let low_rank = [(Part::Up, tensor(&[3, 2], 1)), (Part::Down, tensor(&[2, 4], 2))];
    for part in [(Part::Magnitude, lengths.clone()), (Part::DoraScale, lengths.reshape((3, 1)).expect("a column"))] {
        let parts = [low_rank[0].clone(), low_rank[1].clone(), part];
        let delta = delta_of(&parts, &weight, 0.5);
        let plain = delta_of(&low_rank, &weight, 0.5);
        let base = values(&weight);
        for row in 0..3 {
            let moved: Vec<f32> = (0..4).map(|i| base[row * 4 + i] + plain[row * 4 + i]).collect();
            let norm = moved.iter().map(|value| value * value).sum::<f32>().sqrt();
            let expected: Vec<f32> = (0..4).map(|i| moved[i] * (row + 1) as f32 / norm - base[row * 4 + i]).collect();
            assert_close(&delta[row * 4..row * 4 + 4], &expected);
        }
    }
}

#[test]
fn dora_of_columns_and_of_convolutions_keeps_lengths_too() {
    let parts = |lengths: Tensor| {
        [(Part::Up, tensor(&[3, 2], 1)), (Part::Down, tensor(&[2, 8], 2)), (Part::DoraScale, lengths)]
    };
    let weight = tensor(&[3, 2, 2, 2], 9);
    let moved = |parts: &[(Part, Tensor)]| -> Vec<f32> {
        let delta = delta_of(parts, &weight, 1.0);
        values(&weight).iter().zip(delta).map(|(base, delta)| base + delta).collect()
    };
    let columns = Tensor::new(&[[[[2f32]], [[3.0]]]], &Device::Cpu).expect("two lengths");
    let after = moved(&parts(columns));
    for (channel, length) in [2.0, 3.0].into_iter().enumerate() {
        let squares = (0..24).filter(|at| at / 4 % 2 == channel).map(|at| after[at] * after[at]);
        assert_close(&[squares.sum::<f32>().sqrt()], &[length]);
    }
    let rows = Tensor::new(&[[[[1f32]]], [[[2.0]]], [[[4.0]]]], &Device::Cpu).expect("three lengths");
    let after = moved(&parts(rows));
    for (row, length) in [1.0, 2.0, 4.0].into_iter().enumerate() {
        let squares = after[row * 8..row * 8 + 8].iter().map(|value| value * value);
        assert_close(&[squares.sum::<f32>().sqrt()], &[length]);
    }
}

#[test]
fn differences_are_added_as_they_are() {
    let diff = tensor(&[3, 2, 2, 2], 1);
    assert_close(&delta(&[(Part::Diff, diff.clone()), alpha(4.0)], &[3, 2, 2, 2]), &values(&diff));
    let norm = change(&[(Part::Diff, tensor(&[5], 1)), (Part::DiffBias, tensor(&[5], 2))]).expect("complete");
    assert_eq!(norm.check(&[5]), Ok(()));
    assert_eq!(norm.bias().map(values), Some(values(&tensor(&[5], 2))));
    let bias = change(&[(Part::DiffBias, tensor(&[5], 2))]).expect("a bias alone is complete");
    assert!(!bias.has_weight());
}

#[test]
fn tensors_that_do_not_fit_are_told_apart() {
    let flaw = |parts: &[(Part, Tensor)], shape: &[usize]| change(parts).and_then(|change| change.check(shape)).err();
    let (up, down) = ((Part::Up, tensor(&[3, 2], 1)), (Part::Down, tensor(&[2, 4], 2)));
    assert_eq!(flaw(std::slice::from_ref(&up), &[3, 4]), Some(Flaw::Incomplete));
    assert_eq!(flaw(&[alpha(1.0)], &[3, 4]), Some(Flaw::Incomplete));
    assert_eq!(flaw(&[up.clone(), (Part::Down, tensor(&[3, 4], 2))], &[3, 4]), Some(Flaw::Inconsistent));
    assert_eq!(flaw(&[up.clone(), down.clone()], &[3, 5]), Some(Flaw::Misfit(3, 4)));
    let lengths = (Part::Magnitude, tensor(&[4], 3));
    assert_eq!(flaw(&[up.clone(), down.clone(), lengths], &[3, 4]), Some(Flaw::Lengths(4)));
    let nothing = [(Part::Up, tensor(&[3, 0], 1)), (Part::Down, tensor(&[0, 4], 2))];
    assert_eq!(flaw(&nothing, &[3, 4]), Some(Flaw::Inconsistent));
    let wide = (Part::Alpha, tensor(&[2], 1));
    assert_eq!(flaw(&[up, down, wide], &[3, 4]), Some(Flaw::Inconsistent));
}

/// The rows that `pick` takes of values in rows of `columns`.
fn rows_of(values: &[f32], columns: usize, pick: Pick) -> Vec<f32> {
    let spans = pick.spans(values.len() / columns).expect("it fits");
    spans.into_iter().flat_map(|span| values[span.start * columns..span.end * columns].to_vec()).collect()
}

#[test]
fn a_change_of_a_fused_layer_has_the_same_rows_in_the_layers_it_consists_of() {
    let picks = [Pick::Third(1), Pick::Rows { start: 2, end: None }, Pick::SwapHalves, Pick::None];
    let low_rank = vec![(Part::Up, tensor(&[6, 2], 1)), (Part::Down, tensor(&[2, 4], 2)), alpha(4.0)];
    let loha = [Part::HadaW1A, Part::HadaW1B, Part::HadaW2A, Part::HadaW2B].into_iter().enumerate();
    let loha = loha.map(|(at, part)| (part, tensor(if at % 2 == 0 { &[6, 2] } else { &[2, 4] }, at))).collect();
    let lokr = vec![(Part::LokrW1, tensor(&[3, 2], 1)), (Part::LokrW2, tensor(&[2, 2], 2))];
    let mut dora = low_rank.clone();
    dora.push((Part::Magnitude, tensor(&[6], 3).abs().expect("numbers")));
    for parts in [low_rank, loha, lokr, dora] {
        let weight = tensor(&[6, 4], 9);
        let whole = delta_of(&parts, &weight, 0.7);
        for pick in picks {
            let part = change(&parts).expect("complete").picked(pick).expect("it fits");
            let weight = picked(&weight, &pick.spans(6).expect("it fits")).expect("inside");
            part.check(weight.dims()).expect("fitting");
            let delta = part.delta(&weight, 0.7).expect("checked").expect("the weight changes");
            assert_close(&values(&delta), &rows_of(&whole, 4, pick));
        }
    }
}

#[test]
fn lengths_of_columns_cannot_be_split_between_layers() {
    let parts =
        [(Part::Up, tensor(&[6, 2], 1)), (Part::Down, tensor(&[2, 4], 2)), (Part::DoraScale, tensor(&[1, 4], 3))];
    let change = change(&parts).expect("complete");
    assert_eq!(change.picked(Pick::Third(0)).err(), Some(Flaw::Inseparable));
    assert!(change.picked(Pick::SwapHalves).is_ok());
}

#[test]
fn the_bias_from_the_rank_is_scaled_like_the_product_and_a_replacement_is_not() {
    let up_bias = tensor(&[3], 4);
    let parts =
        [(Part::Up, tensor(&[3, 2], 1)), (Part::Down, tensor(&[2, 4], 2)), alpha(1.0), (Part::UpBias, up_bias.clone())];
    let shift = change(&parts).expect("complete").shift(&tensor(&[3], 5), 3.0).expect("fitting").expect("a bias");
    assert_close(&values(&shift), &values(&up_bias.affine(1.5, 0.0).expect("numbers")));
    let (value, weight) = (tensor(&[5], 6), tensor(&[5], 7));
    let delta = delta_of(&[(Part::Replacement, value.clone())], &weight, 0.1);
    assert_close(&delta, &values(&(value - weight).expect("of one shape")));
}
