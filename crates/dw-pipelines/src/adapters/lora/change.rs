//! What a LoRA file does to the weight of one module: LoRA (Hu et al. 2021, arXiv:2106.09685), its convolutional
//! form LoCon, LoHa and LoKr (Yeh et al. 2023, arXiv:2309.14859), DoRA (Liu et al. 2024, arXiv:2402.09353) and
//! plain differences.
//!
//! Shapes are checked by [`Change::check`] once; computing afterwards cannot meet a wrong one.

use std::{collections::BTreeMap, ops::Range};

use candle_core::{D, DType, Device, Tensor};
use dw_kernels::ThinProduct;

use super::keys::Part;
use crate::{Result, weights::single_file::key_map::Change as Pick};

/// The tensors of one module, each with its name in the file.
pub(crate) type Parts = BTreeMap<Part, (String, Tensor)>;

/// A matrix that is stored whole or as a product: `(rows, columns)`.
#[derive(Clone, Debug)]
enum Factor {
    Whole(Tensor),
    /// `(rows, rank)` and `(rank, columns)`.
    Product(Tensor, Tensor),
    /// A core `(left rank, right rank, height, width)`, `(rows, left rank)` and `(right rank, columns)`.
    Core(Tensor, Tensor, Tensor),
}

/// How the weight changes.
#[derive(Clone, Debug)]
enum Kind {
    /// By a matrix: LoRA, LoCon, a plain difference.
    Plain(Factor),
    /// By the product by element of two (LoHa).
    Hadamard(Factor, Factor),
    /// By the Kronecker product of two (LoKr).
    Kronecker(Factor, Factor),
    /// To another value, at any strength.
    Replaced(Tensor),
}

/// The direction along which DoRA keeps lengths.
#[derive(Clone, Debug)]
enum Magnitude {
    /// One length for each output.
    Rows(Tensor),
    /// One length for each input channel.
    Columns(Tensor),
}

/// What a file does to one module.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    weight: Option<(Kind, f64)>,
    magnitude: Option<Magnitude>,
    bias: Option<Tensor>,
}

/// Why the tensors of a module cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Flaw {
    /// Some part has no counterpart.
    Incomplete,
    /// The parts do not fit each other.
    Inconsistent,
    /// The change has rows and columns that the weight has not: `(rows, columns)`.
    Misfit(usize, usize),
    /// The lengths of DoRA are not as many as the weight has rows or columns.
    Lengths(usize),
    /// DoRA's lengths of columns belong to several layers of the model together.
    Inseparable,
}

impl Change {
    /// Puts the tensors of one module together. `recorded` is the alpha of a file that stores none.
    pub(crate) fn new(parts: &Parts, recorded: Option<f64>) -> Result<Self, Flaw> {
        let get = |part: Part| parts.get(&part).map(|(_, tensor)| tensor.clone());
        let alpha = get(Part::Alpha).map(|alpha| number(&alpha).ok_or(Flaw::Inconsistent)).transpose()?.or(recorded);
        let kind = kind(&get)?;
        let weight = kind.map(|kind| {
            let scale = match (alpha, kind.rank()) {
                (Some(alpha), Some(rank)) => alpha / rank as f64,
                _ => 1.0,
            };
            (kind, scale)
        });
        let bias = bias(&get, weight.as_ref().map_or(1.0, |(_, scale)| *scale)).map_err(|_| Flaw::Inconsistent)?;
        let magnitude = get(Part::Magnitude).map(Magnitude::Rows).or_else(|| get(Part::DoraScale).map(Magnitude::of));
        if (weight.is_none() && bias.is_none()) || (weight.is_none() && magnitude.is_some()) {
            return Err(Flaw::Incomplete);
        }
        Ok(Self { weight, magnitude, bias })
    }

    /// The part of it that concerns some rows of the weight: those that `pick` takes for one layer of the model, where
    /// the file changes several as one.
    pub(crate) fn picked(&self, pick: Pick) -> Result<Self, Flaw> {
        if pick == Pick::None {
            return Ok(self.clone());
        }
        let rows = self.weight.as_ref().and_then(|(kind, _)| Some(kind.extent()?.0));
        let rows = rows.or_else(|| self.bias.as_ref().map(Tensor::elem_count)).ok_or(Flaw::Inconsistent)?;
        let spans = pick.spans(rows).ok_or(Flaw::Misfit(rows, 1))?;
        let take = |tensor: &Tensor| picked(tensor, &spans).map_err(|_| Flaw::Inconsistent);
        let flat = |tensor: &Tensor| take(&tensor.flatten_all().map_err(|_| Flaw::Inconsistent)?);
        let weight = match &self.weight {
            Some((kind, scale)) => Some((kind.picked(&take)?, *scale)),
            None => None,
        };
        let magnitude = match &self.magnitude {
            Some(Magnitude::Rows(lengths)) => Some(Magnitude::Rows(flat(lengths)?)),
            // Other rows would change the lengths of the columns; the same ones in another order do not.
            Some(Magnitude::Columns(lengths)) if pick == Pick::SwapHalves => Some(Magnitude::Columns(lengths.clone())),
            Some(Magnitude::Columns(_)) => return Err(Flaw::Inseparable),
            None => None,
        };
        let bias = self.bias.as_ref().map(flat).transpose()?;
        Ok(Self { weight, magnitude, bias })
    }

    /// The same with zeros for further columns; none where it is of another form than a product of two thin matrices.
    pub(crate) fn widened(&self, columns: usize) -> Option<Self> {
        let Some((Kind::Plain(Factor::Product(left, right)), scale)) = &self.weight else { return None };
        let missing = columns.checked_sub(right.dims2().ok()?.1)?;
        let right = right.pad_with_zeros(1, 0, missing).ok()?;
        let weight = Some((Kind::Plain(Factor::Product(left.clone(), right)), *scale));
        Some(Self { weight, ..self.clone() })
    }

    /// Rows and columns of what is added to the weight, if anything is.
    pub(crate) fn extent(&self) -> Option<(usize, usize)> {
        self.weight.as_ref()?.0.extent()
    }

    /// Whether the weight changes.
    pub(crate) fn has_weight(&self) -> bool {
        self.weight.is_some()
    }

    /// What is added to the bias at full strength, if anything.
    pub(crate) fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// What is added to `bias` (f32, on any device) at this strength: a tensor of its shape.
    pub(crate) fn shift(&self, bias: &Tensor, strength: f64) -> Result<Option<Tensor>> {
        let Some(shift) = &self.bias else { return Ok(None) };
        let shift = shift.to_device(bias.device())?.to_dtype(DType::F32)?;
        Ok(Some(shift.affine(strength, 0.0)?.reshape(bias.shape())?))
    }

    /// Whether it fits a weight of this shape.
    pub(crate) fn check(&self, shape: &[usize]) -> Result<(), Flaw> {
        let (rows, columns) = matrix(shape);
        if let Some((kind, _)) = &self.weight {
            let found = kind.extent().ok_or(Flaw::Inconsistent)?;
            if found != (rows, columns) {
                return Err(Flaw::Misfit(found.0, found.1));
            }
        }
        match &self.magnitude {
            Some(_) if shape.len() < 2 => Err(Flaw::Inconsistent),
            Some(Magnitude::Rows(lengths)) if lengths.elem_count() != rows => Err(Flaw::Lengths(lengths.elem_count())),
            Some(Magnitude::Columns(lengths)) if Some(&lengths.elem_count()) != shape.get(1) => {
                Err(Flaw::Lengths(lengths.elem_count()))
            }
            _ => Ok(()),
        }
    }

    /// The two thin matrices whose product is added to the weight at this strength, where that is all that happens
    /// to it: what a side branch of a layer computes with.
    pub(crate) fn thin_product(&self, strength: f64) -> Option<ThinProduct<'_>> {
        match (&self.weight, &self.magnitude) {
            (Some((Kind::Plain(Factor::Product(left, right)), scale)), None) => {
                Some(ThinProduct { left, right, factor: strength * scale })
            }
            _ => None,
        }
    }

    /// What is added to `weight` (f32, on any device) at this strength: a tensor of its shape. The strength acts
    /// before DoRA's lengths, as in PEFT.
    pub(crate) fn delta(&self, weight: &Tensor, strength: f64) -> Result<Option<Tensor>> {
        let Some((kind, scale)) = &self.weight else { return Ok(None) };
        if let Kind::Replaced(value) = kind {
            let value = value.to_device(weight.device())?.to_dtype(DType::F32)?.reshape(weight.shape())?;
            return Ok(Some((value - weight)?));
        }
        let delta = kind.matrix(strength * scale, weight.device())?.reshape(weight.shape())?;
        let Some(magnitude) = &self.magnitude else { return Ok(Some(delta)) };
        let moved = (weight + delta)?;
        Ok(Some((magnitude.stretch(&moved)? - weight)?))
    }
}

/// What is added to the bias at full strength: a difference, and the bias of the layer from the rank, which is scaled
/// like the product.
fn bias(get: &impl Fn(Part) -> Option<Tensor>, scale: f64) -> Result<Option<Tensor>> {
    let up = get(Part::UpBias).map(|up| scaled(up.to_dtype(DType::F32)?, scale)).transpose()?;
    Ok(match (get(Part::DiffBias), up) {
        (Some(difference), Some(up)) => Some((difference.to_dtype(DType::F32)? + up)?),
        (difference, up) => difference.or(up),
    })
}

/// Some rows of a tensor.
fn picked(tensor: &Tensor, spans: &[Range<usize>]) -> Result<Tensor> {
    let parts = spans.iter().map(|span| tensor.narrow(0, span.start, span.len()));
    Ok(match parts.collect::<candle_core::Result<Vec<_>>>()?.as_slice() {
        [one] => one.clone(),
        parts => Tensor::cat(parts, 0)?,
    })
}

/// The form of the parts that are there; none when the weight does not change.
fn kind(get: &impl Fn(Part) -> Option<Tensor>) -> Result<Option<Kind>, Flaw> {
    let factor = |whole: Option<Part>, left, right, core| -> Result<Option<Factor>, Flaw> {
        if let Some(whole) = whole.and_then(get) {
            return Ok(Some(Factor::Whole(whole)));
        }
        match (get(left), get(right), get(core)) {
            (Some(left), Some(right), Some(core)) => Ok(Some(Factor::Core(core, left, right))),
            (Some(left), Some(right), None) => Ok(Some(Factor::Product(left, right))),
            (None, None, None) => Ok(None),
            _ => Err(Flaw::Incomplete),
        }
    };
    if let Some(factor) = factor(None, Part::Up, Part::Down, Part::Mid)? {
        return Ok(Some(Kind::Plain(factor)));
    }
    // LoHa stores the left side of a product with a core the other way round: `(rank, rows)`.
    let turned = |factor: Option<Factor>| match factor {
        Some(Factor::Core(core, left, right)) => {
            let left = left.t().map_err(|_| Flaw::Inconsistent)?;
            Ok(Some(Factor::Core(core, left, right)))
        }
        other => Ok(other),
    };
    let first = turned(factor(None, Part::HadaW1A, Part::HadaW1B, Part::HadaT1)?)?;
    let second = turned(factor(None, Part::HadaW2A, Part::HadaW2B, Part::HadaT2)?)?;
    match (first, second) {
        (Some(first), Some(second)) => return Ok(Some(Kind::Hadamard(first, second))),
        (None, None) => {}
        _ => return Err(Flaw::Incomplete),
    }
    let first = match (get(Part::LokrW1), get(Part::LokrW1A), get(Part::LokrW1B)) {
        (Some(whole), _, _) => Some(Factor::Whole(whole)),
        (None, Some(left), Some(right)) => Some(Factor::Product(left, right)),
        (None, None, None) => None,
        _ => return Err(Flaw::Incomplete),
    };
    let second = turned(factor(Some(Part::LokrW2), Part::LokrW2A, Part::LokrW2B, Part::LokrT2)?)?;
    match (first, second) {
        (Some(first), Some(second)) => Ok(Some(Kind::Kronecker(first, second))),
        (None, None) => {
            let replaced = get(Part::Replacement).map(Kind::Replaced);
            Ok(replaced.or_else(|| get(Part::Diff).map(|whole| Kind::Plain(Factor::Whole(whole)))))
        }
        _ => Err(Flaw::Incomplete),
    }
}

impl Kind {
    /// What alpha is divided by; none where alpha plays no part.
    fn rank(&self) -> Option<usize> {
        match self {
            Self::Plain(factor) | Self::Hadamard(factor, _) => factor.rank(),
            Self::Kronecker(first, second) => first.rank().or_else(|| second.rank()),
            Self::Replaced(_) => None,
        }
    }

    /// The same for some of the rows, which `take` takes from a tensor.
    fn picked(&self, take: &impl Fn(&Tensor) -> Result<Tensor, Flaw>) -> Result<Self, Flaw> {
        Ok(match self {
            Self::Plain(factor) => Self::Plain(factor.picked(take)?),
            Self::Hadamard(first, second) => Self::Hadamard(first.picked(take)?, second.picked(take)?),
            Self::Kronecker(..) => {
                let whole = self.matrix(1.0, &Device::Cpu).map_err(|_| Flaw::Inconsistent)?;
                Self::Plain(Factor::Whole(take(&whole)?))
            }
            Self::Replaced(value) => Self::Replaced(take(value)?),
        })
    }

    /// Rows and columns of the matrix; none when the tensors do not fit each other.
    fn extent(&self) -> Option<(usize, usize)> {
        match self {
            Self::Plain(factor) => factor.extent(),
            Self::Hadamard(first, second) => first.extent().filter(|extent| second.extent() == Some(*extent)),
            Self::Kronecker(first, second) => {
                let (first, second) = (first.extent()?, second.extent()?);
                Some((first.0 * second.0, first.1 * second.1))
            }
            Self::Replaced(value) => Some(matrix(value.dims())),
        }
    }

    /// `(rows, columns)`, f32, times `scale`.
    fn matrix(&self, scale: f64, device: &Device) -> Result<Tensor> {
        match self {
            Self::Plain(factor) => factor.matrix(scale, device),
            Self::Hadamard(first, second) => Ok((first.matrix(scale, device)? * second.matrix(1.0, device)?)?),
            Self::Kronecker(first, second) => {
                let (first, second) = (first.matrix(scale, device)?, second.matrix(1.0, device)?);
                let ((rows, columns), (inner_rows, inner_columns)) = (first.dims2()?, second.dims2()?);
                let first = first.reshape((rows, 1, columns, 1))?;
                let product = first.broadcast_mul(&second.reshape((1, inner_rows, 1, inner_columns))?)?;
                Ok(product.reshape((rows * inner_rows, columns * inner_columns))?)
            }
            Self::Replaced(value) => flat(value, device),
        }
    }
}

impl Factor {
    /// The same for some of the rows, which `take` takes from a tensor.
    fn picked(&self, take: &impl Fn(&Tensor) -> Result<Tensor, Flaw>) -> Result<Self, Flaw> {
        Ok(match self {
            Self::Whole(whole) => Self::Whole(take(whole)?),
            Self::Product(left, right) => Self::Product(take(left)?, right.clone()),
            Self::Core(core, left, right) => Self::Core(core.clone(), take(left)?, right.clone()),
        })
    }

    fn rank(&self) -> Option<usize> {
        match self {
            Self::Whole(_) => None,
            Self::Product(_, right) | Self::Core(_, _, right) => right.dims().first().copied(),
        }
    }

    fn extent(&self) -> Option<(usize, usize)> {
        match self {
            Self::Whole(whole) => Some(matrix(whole.dims())),
            Self::Product(left, right) => {
                let ((rows, rank), (other, columns)) = (matrix(left.dims()), matrix(right.dims()));
                (rank == other && rank > 0).then_some((rows, columns))
            }
            Self::Core(core, left, right) => {
                let ((rows, rank), (other, columns)) = (matrix(left.dims()), matrix(right.dims()));
                let [first, second, ref kernel @ ..] = *core.dims() else { return None };
                (first == rank && second == other && rank * other > 0)
                    .then_some((rows, columns * kernel.iter().product::<usize>()))
            }
        }
    }

    /// `(rows, columns)`, f32, times `scale`.
    fn matrix(&self, scale: f64, device: &Device) -> Result<Tensor> {
        let flat = |tensor: &Tensor| flat(tensor, device);
        match self {
            Self::Whole(whole) => scaled(flat(whole)?, scale),
            Self::Product(left, right) => Ok(flat(left)?.matmul(&scaled(flat(right)?, scale)?)?),
            Self::Core(core, left, right) => {
                let (left, right) = (flat(left)?, scaled(flat(right)?, scale)?);
                let (rows, (other, columns)) = (left.dim(0)?, right.dims2()?);
                let core = flat(core)?;
                let pixels = core.dim(1)? / other;
                // (rows, other, pixels), then the inner axis against `right`.
                let half = left.matmul(&core)?.reshape((rows, other, pixels))?.transpose(1, 2)?.contiguous()?;
                let whole = half.reshape((rows * pixels, other))?.matmul(&right)?;
                let whole = whole.reshape((rows, pixels, columns))?.transpose(1, 2)?.contiguous()?;
                Ok(whole.reshape((rows, columns * pixels))?)
            }
        }
    }
}

impl Magnitude {
    /// LyCORIS keeps lengths of rows as `(out, 1, …)` and lengths of columns as `(1, in, …)`.
    fn of(lengths: Tensor) -> Self {
        match *lengths.dims() {
            [1, inputs, ..] if inputs > 1 => Self::Columns(lengths),
            _ => Self::Rows(lengths),
        }
    }

    /// `weight` with each row or column brought to its length.
    fn stretch(&self, weight: &Tensor) -> Result<Tensor> {
        let ratio = |lengths: &Tensor, of: &Tensor| -> Result<Tensor> {
            let norms = of.flatten_from(1)?.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
            let lengths = lengths.to_device(weight.device())?.to_dtype(DType::F32)?.reshape(norms.shape())?;
            Ok((lengths / norms)?)
        };
        let ones = vec![1; weight.rank() - 2];
        let shape = |first: [usize; 2]| [&first[..], &ones].concat();
        match self {
            Self::Rows(lengths) => {
                let ratio = ratio(lengths, weight)?;
                let rows = weight.dim(0)?;
                Ok(weight.broadcast_mul(&ratio.reshape(shape([rows, 1]))?)?)
            }
            Self::Columns(lengths) => {
                let ratio = ratio(lengths, &weight.transpose(0, 1)?.contiguous()?)?;
                let columns = weight.dim(1)?;
                Ok(weight.broadcast_mul(&ratio.reshape(shape([1, columns]))?)?)
            }
        }
    }
}

/// A tensor as a matrix of f32.
fn flat(tensor: &Tensor, device: &Device) -> Result<Tensor> {
    Ok(tensor.to_device(device)?.to_dtype(DType::F32)?.reshape(matrix(tensor.dims()))?)
}

fn scaled(tensor: Tensor, scale: f64) -> Result<Tensor> {
    Ok(if scale == 1.0 { tensor } else { tensor.affine(scale, 0.0)? })
}

/// A tensor's shape as rows and columns: everything behind the first axis counts as columns.
fn matrix(shape: &[usize]) -> (usize, usize) {
    (shape.first().copied().unwrap_or(1), shape.iter().skip(1).product())
}

/// The value of a tensor that holds one number.
fn number(tensor: &Tensor) -> Option<f64> {
    let values = tensor.to_dtype(DType::F64).and_then(|tensor| tensor.flatten_all()?.to_vec1::<f64>()).ok()?;
    match *values.as_slice() {
        [value] if value.is_finite() => Some(value),
        _ => None,
    }
}

#[cfg(test)]
#[path = "change_tests.rs"]
mod tests;
