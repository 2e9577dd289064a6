//! A map between the names that tensors have in an original checkpoint and their canonical (diffusers') names,
//! readable in both directions.
//!
//! Owns the look-up. Which names stand for which is said by [`super::unet`], [`super::vae`], [`super::clip`],
//! [`super::flux`] and [`super::sd3`]. Every [`Change`] but [`Change::ConvToLinear`] and [`Change::Transpose`] picks whole
//! rows, so it can be applied to storage that packs rows, and to the output side of a low-rank change.

use std::{collections::BTreeMap, ops::Range};

use candle_core::DType;

use crate::{Result, quant::Weight};

/// What becomes of a tensor on its way to its canonical name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// Nothing.
    None,
    /// A 1x1 convolution `(out, in, 1[, 1])` becomes a linear layer `(out, in)`.
    ConvToLinear,
    /// Rows and columns change places.
    Transpose,
    /// One third of the rows: query 0, key 1, value 2.
    Third(usize),
    /// The rows from `start` to `end`, or to the last one.
    Rows {
        /// The first row.
        start: usize,
        /// The row behind the last one; none where all that follow belong to it.
        end: Option<usize>,
    },
    /// The first half of the rows and the second change places: shift and scale of a modulation.
    SwapHalves,
}

impl Change {
    /// Applies it to a weight, which stays quantized where rows stay whole.
    pub(crate) fn apply(self, weight: &Weight) -> Result<Weight> {
        Ok(match (self, weight) {
            (Self::None, weight) | (Self::ConvToLinear, weight @ Weight::Quantized(_)) => weight.clone(),
            (Self::ConvToLinear, Weight::Dense(tensor)) if tensor.rank() > 2 => {
                let (rows, columns) = (tensor.dim(0)?, tensor.dim(1)?);
                Weight::Dense(tensor.reshape((rows, columns))?)
            }
            (Self::ConvToLinear, Weight::Dense(_)) => weight.clone(),
            (Self::Transpose, weight) => Weight::Dense(weight.dense(DType::F32)?.t()?.contiguous()?),
            (Self::Third(_) | Self::Rows { .. } | Self::SwapHalves, weight) => {
                let rows = weight.dims().first().copied().unwrap_or(0);
                let spans = self.spans(rows).unwrap_or_default();
                let parts = spans.iter().map(|span| weight.rows(span)).collect::<Result<Vec<_>>>()?;
                match <[Weight; 1]>::try_from(parts) {
                    Ok([one]) => one,
                    Err(several) => Weight::joined(&several)?,
                }
            }
        })
    }

    /// Which rows of a tensor with this many make up the result, in order; none when the change does not fit them, or
    /// does more than picking rows.
    #[expect(clippy::single_range_in_vec_init, reason = "most changes pick one span, one picks two")]
    pub(crate) fn spans(self, rows: usize) -> Option<Vec<Range<usize>>> {
        match self {
            Self::None => Some(vec![0..rows]),
            Self::ConvToLinear | Self::Transpose => None,
            Self::Third(part) => {
                let third = rows / 3;
                rows.is_multiple_of(3).then(|| vec![part * third..(part + 1) * third])
            }
            Self::Rows { start, end } => {
                let end = end.unwrap_or(rows);
                (start < end && end <= rows).then(|| vec![start..end])
            }
            Self::SwapHalves => rows.is_multiple_of(2).then(|| vec![rows / 2..rows, 0..rows / 2]),
        }
    }

    /// The shape of the result for a tensor of this shape; none when the change does not fit it.
    pub(crate) fn shape(self, shape: &[usize]) -> Option<Vec<usize>> {
        match (self, shape) {
            (Self::None, _) | (Self::ConvToLinear, [_] | [_, _]) => Some(shape.to_vec()),
            (Self::ConvToLinear, [rows, columns, 1] | [rows, columns, 1, 1]) => Some(vec![*rows, *columns]),
            (Self::Transpose, [rows, columns]) => Some(vec![*columns, *rows]),
            (Self::Third(_) | Self::Rows { .. } | Self::SwapHalves, [rows, rest @ ..]) => {
                let rows = self.spans(*rows)?.iter().map(Range::len).sum();
                Some(std::iter::once(rows).chain(rest.iter().copied()).collect())
            }
            _ => None,
        }
    }
}

/// Where a tensor of the original goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    /// The canonical name.
    pub(crate) name: String,
    /// What is done to it.
    pub(crate) change: Change,
}

/// Original names to canonical ones and back. Names are looked up without the prefix of their component.
#[derive(Clone, Debug, Default)]
pub(crate) struct KeyMap {
    /// Where the names are canonical already.
    is_identity: bool,
    /// Paths of modules; whatever is below them keeps its name.
    modules: BTreeMap<String, String>,
    modules_back: BTreeMap<String, String>,
    /// Full names of single tensors.
    tensors: BTreeMap<String, Vec<Target>>,
    tensors_back: BTreeMap<String, String>,
}

impl KeyMap {
    /// The map of a file whose names are canonical.
    pub(crate) fn identity() -> Self {
        Self { is_identity: true, ..Self::default() }
    }

    /// Everything below the path `original` is found below `canonical`.
    pub(crate) fn module(&mut self, original: impl Into<String>, canonical: impl Into<String>) {
        let (original, canonical) = (original.into(), canonical.into());
        self.modules_back.insert(canonical.clone(), original.clone());
        self.modules.insert(original, canonical);
    }

    /// The tensor `original` becomes `canonical`; may be said several times of one original.
    pub(crate) fn tensor(&mut self, original: impl Into<String>, canonical: impl Into<String>, change: Change) {
        let (original, name) = (original.into(), canonical.into());
        self.tensors_back.insert(name.clone(), original.clone());
        self.tensors.entry(original).or_default().push(Target { name, change });
    }

    /// The rows of the layer `original` (of weight and bias) are those of several layers.
    pub(crate) fn fused(&mut self, original: &str, canonical: &[(String, Change)]) {
        for (layer, change) in canonical {
            for name in ["weight", "bias"] {
                self.tensor(format!("{original}.{name}"), format!("{layer}.{name}"), *change);
            }
        }
    }

    /// What becomes of the tensor with this original name; empty when the map does not know it.
    pub(crate) fn canonical(&self, original: &str) -> Vec<Target> {
        if let Some(targets) = self.tensors.get(original) {
            return targets.clone();
        }
        let name = if self.is_identity { Some(original.to_owned()) } else { moved(&self.modules, original) };
        name.map(|name| Target { name, change: Change::None }).into_iter().collect()
    }

    /// What a canonical name is called in the original.
    pub(crate) fn original(&self, canonical: &str) -> Option<String> {
        if let Some(name) = self.tensors_back.get(canonical) {
            return Some(name.clone());
        }
        if self.is_identity { Some(canonical.to_owned()) } else { moved(&self.modules_back, canonical) }
    }
}

/// `name` with its longest path in `modules` replaced.
fn moved(modules: &BTreeMap<String, String>, name: &str) -> Option<String> {
    let mut path = name;
    loop {
        if let Some(new) = modules.get(path) {
            return Some(format!("{new}{}", &name[path.len()..]));
        }
        path = path.rsplit_once('.')?.0;
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;

    #[test]
    fn the_longest_known_path_decides_and_the_way_back_is_the_same() {
        let mut map = KeyMap::default();
        map.module("input_blocks.1.0", "down.0");
        map.module("input_blocks.1.0.skip", "down.0.short");
        map.module("input_blocks.1", "wrong");
        for (original, canonical) in
            [("input_blocks.1.0.x.weight", "down.0.x.weight"), ("input_blocks.1.0.skip.bias", "down.0.short.bias")]
        {
            assert_eq!(map.canonical(original), [Target { name: canonical.to_owned(), change: Change::None }]);
            assert_eq!(map.original(canonical).as_deref(), Some(original));
        }
        assert!(map.canonical("input_blocks.10.x").is_empty());
        assert_eq!(map.original("up.0"), None);
    }

    #[test]
    fn one_tensor_can_become_three_thirds_of_its_rows() {
        let mut map = KeyMap::default();
        for (part, name) in ["q", "k", "v"].into_iter().enumerate() {
            map.tensor("in_proj", name, Change::Third(part));
        }
        let fused = Tensor::arange(0f32, 6.0, &Device::Cpu).and_then(|x| x.reshape((6, 1))).expect("a small tensor");
        let parts: Vec<Vec<f32>> = map
            .canonical("in_proj")
            .iter()
            .map(|target| {
                let third =
                    target.change.apply(&Weight::Dense(fused.clone())).and_then(|third| third.dense(DType::F32));
                third.and_then(|x| Ok(x.flatten_all()?.to_vec1()?)).expect("thirds")
            })
            .collect();
        assert_eq!(parts, [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]);
        assert_eq!(map.original("k").as_deref(), Some("in_proj"));
        assert_eq!(Change::Third(0).shape(&[7, 2]), None);
    }

    #[test]
    fn rows_are_picked_and_halves_exchanged() {
        let tensor = Tensor::arange(0f32, 6.0, &Device::Cpu).expect("a small tensor");
        let weight = Weight::Dense(tensor);
        let rows = |change: Change| {
            let picked = change.apply(&weight).and_then(|weight| weight.dense(DType::F32));
            picked.and_then(|picked| Ok(picked.to_vec1::<f32>()?)).expect("it fits")
        };
        assert_eq!(rows(Change::Rows { start: 1, end: Some(3) }), [1.0, 2.0]);
        assert_eq!(rows(Change::Rows { start: 4, end: None }), [4.0, 5.0]);
        assert_eq!(rows(Change::SwapHalves), [3.0, 4.0, 5.0, 0.0, 1.0, 2.0]);
        assert_eq!(Change::Rows { start: 4, end: None }.shape(&[6, 2]), Some(vec![2, 2]));
        assert_eq!(Change::Rows { start: 4, end: Some(8) }.shape(&[6]), None);
        assert_eq!(Change::Rows { start: 6, end: None }.shape(&[6]), None);
        assert_eq!(Change::SwapHalves.shape(&[7]), None);
    }

    #[test]
    fn a_convolution_of_size_one_is_a_linear_layer_and_a_larger_one_is_not() {
        assert_eq!(Change::ConvToLinear.shape(&[8, 4, 1, 1]), Some(vec![8, 4]));
        assert_eq!(Change::ConvToLinear.shape(&[8, 4]), Some(vec![8, 4]));
        assert_eq!(Change::ConvToLinear.shape(&[8, 4, 3, 3]), None);
        assert_eq!(Change::Transpose.shape(&[8, 4]), Some(vec![4, 8]));
    }
}
