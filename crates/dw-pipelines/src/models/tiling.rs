//! Autoencoders in tiles: the memory of one tile instead of that of the whole picture (diffusers
//! `AutoencoderKL.enable_tiling`).
//!
//! Owns where tiles lie and how their overlaps are blended. What happens to a tile is the autoencoder's matter.

use candle_core::{DType, Tensor};

use crate::{Error, Result};

/// How much of a tile its neighbour sees too, where nothing else is asked for.
const OVERLAP: f64 = 0.25;

/// How large tiles are. A tile differs a little from its part of the whole, because its normalisations and its
/// attention see no more than the tile.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tiling {
    /// Height and width of a tile in pixels.
    pub sample: usize,
    /// Height and width of a tile in latents.
    pub latent: usize,
    /// Which part of a tile overlaps the next one, at least 0 and below 1.
    pub overlap: f64,
}

/// The steps of one direction: encoding or decoding.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Steps {
    /// Height and width of an input tile.
    pub(crate) tile: usize,
    /// From the start of one input tile to that of the next.
    pub(crate) stride: usize,
    /// How many rows and columns of the results are blended.
    pub(crate) blend: usize,
    /// How much of each result is kept.
    pub(crate) kept: usize,
}

impl Tiling {
    /// Tiles of `sample` pixels for a model that turns `scale` pixels per side into one latent.
    pub fn new(sample: usize, scale: usize, overlap: Option<f64>) -> Result<Self> {
        let overlap = overlap.unwrap_or(OVERLAP);
        let tiling = Self { sample, latent: sample / scale.max(1), overlap };
        let is_usable = (0.0..1.0).contains(&overlap)
            && [tiling.decoding(), tiling.encoding()].iter().all(|steps| steps.stride > 0 && steps.kept > 0);
        if is_usable {
            return Ok(tiling);
        }
        Err(Error::Argument {
            name: "enable_tiling".into(),
            reason: format!(
                "tiles of {sample} pixels with an overlap of {overlap} are too small for this autoencoder; use a \
                 `tile_sample_min_size` of at least {} and a `tile_overlap_factor` from 0 to less than 1",
                8 * scale
            ),
        })
    }

    /// From latents to pixels.
    pub(crate) fn decoding(&self) -> Steps {
        Steps::new(self.latent, self.sample, self.overlap)
    }

    /// From pixels to latents.
    pub(crate) fn encoding(&self) -> Steps {
        Steps::new(self.sample, self.latent, self.overlap)
    }
}

impl Steps {
    fn new(tile: usize, result: usize, overlap: f64) -> Self {
        let blend = (result as f64 * overlap) as usize;
        Self { tile, stride: (tile as f64 * (1.0 - overlap)) as usize, blend, kept: result - blend }
    }

    /// Whether an input `(batch, channels, height, width)` is larger than one tile.
    pub(crate) fn divide(&self, input: &Tensor) -> Result<bool> {
        let (_, _, height, width) = input.dims4()?;
        Ok(height > self.tile || width > self.tile)
    }

    /// `run` on each tile of `input`, `(batch, channels, height, width)`, blended into one result. Each tile is
    /// blended with the (already blended) one above, then with the one to its left.
    pub(crate) fn run(&self, input: &Tensor, run: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let (_, _, height, width) = input.dims4()?;
        let mut above: Vec<Tensor> = Vec::new();
        let mut bands = Vec::new();
        for top in (0..height).step_by(self.stride) {
            let mut row: Vec<Tensor> = Vec::new();
            let mut band = Vec::new();
            for left in (0..width).step_by(self.stride) {
                let tile = input.narrow(2, top, self.tile.min(height - top))?;
                let tile = tile.narrow(3, left, self.tile.min(width - left))?.contiguous()?;
                let mut result = run(&tile)?;
                if let Some(above) = above.get(row.len()) {
                    result = blended(above, &result, 2, self.blend)?;
                }
                if let Some(before) = row.last() {
                    result = blended(before, &result, 3, self.blend)?;
                }
                let kept = result.narrow(2, 0, self.kept.min(result.dim(2)?))?;
                band.push(kept.narrow(3, 0, self.kept.min(kept.dim(3)?))?.contiguous()?);
                row.push(result);
            }
            bands.push(Tensor::cat(&band, 3)?);
            above = row;
        }
        Ok(Tensor::cat(&bands, 2)?)
    }
}

/// `second`, whose first `extent` rows (axis 2) or columns (axis 3) go over from the last ones of `first`.
fn blended(first: &Tensor, second: &Tensor, axis: usize, extent: usize) -> Result<Tensor> {
    let (before, after) = (first.dim(axis)?, second.dim(axis)?);
    let extent = extent.min(before).min(after);
    if extent == 0 {
        return Ok(second.clone());
    }
    let dtype = second.dtype();
    let share = |of: &dyn Fn(f64) -> f64| -> Result<Tensor> {
        let values: Vec<f32> = (0..extent).map(|at| of(at as f64 / extent as f64) as f32).collect();
        let shape = if axis == 2 { (1, 1, extent, 1) } else { (1, 1, 1, extent) };
        Ok(Tensor::from_vec(values, shape, second.device())?)
    };
    let end = first.narrow(axis, before - extent, extent)?.to_dtype(DType::F32)?;
    let start = second.narrow(axis, 0, extent)?.to_dtype(DType::F32)?;
    let mixed = (end.broadcast_mul(&share(&|at| 1.0 - at)?)? + start.broadcast_mul(&share(&|at| at)?)?)?;
    let mixed = mixed.to_dtype(dtype)?;
    if extent == after {
        return Ok(mixed);
    }
    Ok(Tensor::cat(&[mixed, second.narrow(axis, extent, after - extent)?.contiguous()?], axis)?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// Latents to pixels without any model: every latent becomes 2x2 equal pixels.
    fn doubled(tile: &Tensor) -> Result<Tensor> {
        let (_, _, height, width) = tile.dims4()?;
        Ok(tile.upsample_nearest2d(2 * height, 2 * width)?)
    }

    #[test]
    fn tiles_that_agree_blend_into_the_whole() {
        let values: Vec<f32> = (0..7 * 11).map(|i| (i as f32 * 0.3).sin()).collect();
        let latents = Tensor::from_vec(values, (1, 1, 7, 11), &Device::Cpu).expect("the count fits");
        let tiling = Tiling::new(8, 2, None).expect("tiles of four latents");
        let mut count = 0;
        let tiled = tiling.decoding().run(&latents, &mut |tile| {
            count += 1;
            doubled(tile)
        });
        let tiled = tiled.expect("the shapes fit");
        assert_eq!((tiled.dims(), count), (&[1, 1, 14, 22][..], 3 * 4));
        let whole = doubled(&latents).expect("the shapes fit");
        let worst = (tiled - whole).and_then(|x| x.abs()?.max_all()?.to_scalar::<f32>()).expect("equal shapes");
        assert!(worst < 1e-6, "{worst}");
    }

    #[test]
    fn a_blend_goes_from_one_tile_to_the_next_in_even_steps() {
        let tile = |value: f32| Tensor::full(value, (1, 1, 1, 5), &Device::Cpu).expect("a small tensor");
        let mixed = blended(&tile(0.0), &tile(4.0), 3, 4).and_then(|x| Ok(x.flatten_all()?.to_vec1::<f32>()?));
        assert_eq!(mixed.expect("the shapes fit"), [0.0, 1.0, 2.0, 3.0, 4.0]);
    }

    #[test]
    fn an_input_no_larger_than_a_tile_is_left_whole() {
        let steps = Tiling::new(64, 8, None).expect("tiles of eight latents").decoding();
        let input = |height, width| Tensor::zeros((1, 4, height, width), DType::F32, &Device::Cpu).expect("small");
        assert!(!steps.divide(&input(8, 8)).expect("four axes"));
        assert!(steps.divide(&input(8, 9)).expect("four axes"));
    }

    #[test]
    fn tiles_without_an_inside_are_refused_with_sizes_that_work() {
        for (sample, overlap) in [(4, None), (64, Some(1.0)), (64, Some(-0.5)), (64, Some(0.99))] {
            let message = Tiling::new(sample, 8, overlap).expect_err("no usable tile").to_string();
            assert!(message.contains("`tile_sample_min_size` of at least 64"), "{message}");
        }
    }
}
