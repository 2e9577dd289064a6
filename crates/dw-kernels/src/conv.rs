//! Two-dimensional convolution as a sum of matrix products, one for each kernel position, on shifted
//! views of the padded input; the columns of an im2col are never written down.
//!
//! The input is laid out with channels innermost. For a stride of s the pixels are dealt out to s × s
//! planes first, so that the pixels a kernel position meets lie side by side in one plane.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use crate::{
    host::{self, SharedOutput, is_host_f32},
    matrix::{Into, Matrix, multiply},
};

/// About how many output pixels one task computes.
const PIXELS: usize = 512;
/// At most how many output channels one task computes.
const CHANNELS: usize = 512;
/// The same where a picture is so small that it gives less than [`FEW_BLOCKS`] blocks of pixels.
const FEW_CHANNELS: usize = 256;
/// See [`FEW_CHANNELS`].
const FEW_BLOCKS: usize = 4;
/// Channels that are moved together when channels become innermost.
const TILE: usize = 16;
/// Columns of weights, an input channel and a kernel position each, that one task moves.
const COLUMNS: usize = 256;

/// The cross-correlation of `x` with `weight`, plus `bias`; zeros around the input count as pixels.
///
/// `x` is `(batch, in, height, width)`, `weight` is `(out, in, kernel height, kernel width)`, `bias` is
/// `(out,)`. The result is `(batch, out, height', width')` in the type of `x`.
pub fn conv2d(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, stride: usize, padding: usize) -> Result<Tensor> {
    let dims = weight.dims4()?;
    let shape = Shape::new(x, dims, bias, stride, padding)?;
    if ![Some(x), Some(weight), bias].into_iter().flatten().all(is_host_f32) {
        return composed(x, weight, bias, stride, padding);
    }
    let weight = weight.contiguous()?;
    let weights = host::contiguous(&weight)?;
    let weights: &[f32] = &weights;
    if shape.is_pointwise() {
        return run(&shape, x, bias, |input, bias, output| pointwise(&shape, input, weights, bias, output));
    }
    let weights = weights_by_input(dims, weights);
    run(&shape, x, bias, |input, bias, output| shifted(&shape, input, &weights, bias, output))
}

/// The same by candle's operations.
fn composed(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, stride: usize, padding: usize) -> Result<Tensor> {
    let y = x.conv2d(weight, padding, stride, 1, 1)?;
    match bias {
        Some(bias) => y.broadcast_add(&bias.reshape((1, (), 1, 1))?),
        None => Ok(y),
    }
}

/// Borrows the input and the bias and makes the output that `compute` fills.
fn run(
    shape: &Shape,
    x: &Tensor,
    bias: Option<&Tensor>,
    compute: impl FnOnce(&[f32], &[f32], &mut [f32]),
) -> Result<Tensor> {
    let x = x.contiguous()?;
    let input = host::contiguous(&x)?;
    let bias = match bias {
        Some(bias) => host::contiguous(&bias.contiguous()?)?.to_vec(),
        None => vec![0.0; shape.outputs],
    };
    let mut output = vec![0.0; shape.batch * shape.outputs * shape.output_pixels()];
    if !output.is_empty() && !input.is_empty() {
        compute(&input, &bias, &mut output);
    }
    host::tensor(output, (shape.batch, shape.outputs, shape.output_height, shape.output_width))
}

/// Sizes of one convolution.
struct Shape {
    batch: usize,
    inputs: usize,
    height: usize,
    width: usize,
    outputs: usize,
    kernel_height: usize,
    kernel_width: usize,
    stride: usize,
    padding: usize,
    output_height: usize,
    output_width: usize,
}

impl Shape {
    fn new(
        x: &Tensor,
        (outputs, expected, kernel_height, kernel_width): (usize, usize, usize, usize),
        bias: Option<&Tensor>,
        stride: usize,
        padding: usize,
    ) -> Result<Self> {
        let (batch, inputs, height, width) = x.dims4()?;
        if expected != inputs {
            candle_core::bail!("convolution of `{expected}` channels got an input with `{inputs}`");
        }
        if bias.is_some_and(|bias| bias.dims() != [outputs]) {
            candle_core::bail!("bias must have `{outputs}` entries, like the output channels");
        }
        let (padded_height, padded_width) = (height + 2 * padding, width + 2 * padding);
        if stride == 0 || kernel_height == 0 || kernel_width == 0 {
            candle_core::bail!("stride and kernel of a convolution must be at least 1");
        }
        if padded_height < kernel_height || padded_width < kernel_width {
            candle_core::bail!(
                "a kernel of {kernel_height}x{kernel_width} does not fit into {padded_height}x{padded_width} pixels"
            );
        }
        let output_height = (padded_height - kernel_height) / stride + 1;
        let output_width = (padded_width - kernel_width) / stride + 1;
        Ok(Self {
            batch,
            inputs,
            height,
            width,
            outputs,
            kernel_height,
            kernel_width,
            stride,
            padding,
            output_height,
            output_width,
        })
    }

    fn is_pointwise(&self) -> bool {
        self.kernel_height == 1 && self.kernel_width == 1 && self.stride == 1 && self.padding == 0
    }

    fn output_pixels(&self) -> usize {
        self.output_height * self.output_width
    }

    fn taps(&self) -> usize {
        self.kernel_height * self.kernel_width
    }

    /// Height and width of a plane: every `stride`-th padded pixel in both directions.
    fn plane(&self) -> (usize, usize) {
        let size = |pixels: usize| (pixels + 2 * self.padding).div_ceil(self.stride);
        (size(self.height), size(self.width))
    }

    /// Where in the unpadded input the pixel `i` of a plane with offset `phase` is.
    fn source(&self, i: usize, phase: usize, size: usize) -> Option<usize> {
        (i * self.stride + phase).checked_sub(self.padding).filter(|&source| source < size)
    }

    /// Output channels in equal blocks, when pixels come in so many.
    fn channel_block(&self, pixel_blocks: usize) -> usize {
        let most = if pixel_blocks < FEW_BLOCKS { FEW_CHANNELS } else { CHANNELS };
        let blocks = self.outputs.div_ceil(most);
        self.outputs.div_ceil(blocks).next_multiple_of(TILE).min(self.outputs)
    }
}

/// A 1 × 1 kernel: one matrix product, channels times pixels, in blocks of both.
fn pointwise(shape: &Shape, input: &[f32], weights: &[f32], bias: &[f32], output: &mut [f32]) {
    let pixels = shape.output_pixels();
    let pixel_blocks = pixels.div_ceil(PIXELS);
    let channels = shape.channel_block(pixel_blocks);
    let channel_blocks = shape.outputs.div_ceil(channels);
    let shared = SharedOutput::new(output);
    (0..shape.batch * pixel_blocks * channel_blocks).into_par_iter().for_each(|task| {
        let (block, rest) = (task % pixel_blocks, task / pixel_blocks);
        let (channel, picture) = (rest % channel_blocks * channels, rest / channel_blocks);
        let (count, first) = (channels.min(shape.outputs - channel), block * PIXELS);
        let taken = PIXELS.min(pixels - first);
        let factors = Matrix::rows(&weights[channel * shape.inputs..], count, shape.inputs, shape.inputs);
        let numbers = Matrix::rows(&input[picture * shape.inputs * pixels + first..], shape.inputs, taken, pixels);
        let mut product = vec![0.0; count * taken];
        for (row, &bias) in product.chunks_exact_mut(taken).zip(&bias[channel..]) {
            row.fill(bias);
        }
        multiply(&mut product, taken, Into::Add, 1.0, factors, numbers);
        for (row, channel) in product.chunks_exact(taken).zip(channel..) {
            let start = (picture * shape.outputs + channel) * pixels + first;
            // SAFETY: every channel's run of pixels belongs to one task.
            #[allow(unsafe_code)]
            unsafe { shared.part(start, taken) }.copy_from_slice(row);
        }
    });
}

/// Any kernel: padded planes with channels innermost, then a product for each kernel position.
fn shifted(shape: &Shape, input: &[f32], weights: &[f32], bias: &[f32], output: &mut [f32]) {
    let (_, plane_width) = shape.plane();
    let rows = (PIXELS / plane_width).clamp(1, shape.output_height);
    let row_blocks = shape.output_height.div_ceil(rows);
    let channels = shape.channel_block(row_blocks);
    let channel_blocks = shape.outputs.div_ceil(channels);
    let picture_size = shape.inputs * shape.height * shape.width;
    let pictures = output.chunks_exact_mut(shape.outputs * shape.output_pixels());
    for (picture, output) in input.chunks_exact(picture_size).zip(pictures) {
        let planes = planes(shape, picture);
        let shared = SharedOutput::new(output);
        (0..row_blocks * channel_blocks).into_par_iter().for_each(|task| {
            let (first_row, channel) = (task / channel_blocks * rows, task % channel_blocks * channels);
            let block = Block {
                first_row,
                rows: rows.min(shape.output_height - first_row),
                channel,
                channels: channels.min(shape.outputs - channel),
            };
            let sums = block.sums(shape, &planes, weights, bias);
            block.store(shape, &sums, &shared);
        });
    }
}

/// The output that one task computes.
struct Block {
    first_row: usize,
    rows: usize,
    channel: usize,
    channels: usize,
}

impl Block {
    /// `(pixels, channels)`, where pixels run on through the ends of the plane's rows: those past the
    /// output's width are computed for nothing.
    fn sums(&self, shape: &Shape, planes: &[f32], weights: &[f32], bias: &[f32]) -> Vec<f32> {
        let (plane_height, plane_width) = shape.plane();
        let pixels = (self.rows - 1) * plane_width + shape.output_width;
        let mut sums = vec![0.0; pixels * self.channels];
        for row in sums.chunks_exact_mut(self.channels) {
            row.copy_from_slice(&bias[self.channel..self.channel + self.channels]);
        }
        for tap in 0..shape.taps() {
            let (y, x) = (tap / shape.kernel_width, tap % shape.kernel_width);
            let plane = y % shape.stride * shape.stride + x % shape.stride;
            let row = plane * plane_height + self.first_row + y / shape.stride;
            let first = (row * plane_width + x / shape.stride) * shape.inputs;
            let numbers = Matrix::rows(&planes[first..], pixels, shape.inputs, shape.inputs);
            let factors = &weights[tap * shape.outputs + self.channel..];
            let factors = Matrix::rows(factors, shape.inputs, self.channels, shape.taps() * shape.outputs);
            multiply(&mut sums, self.channels, Into::Add, 1.0, numbers, factors);
        }
        sums
    }

    /// Puts the pixels of each channel back side by side.
    fn store(&self, shape: &Shape, sums: &[f32], output: &SharedOutput<'_>) {
        let (_, plane_width) = shape.plane();
        for row in 0..self.rows {
            for i in 0..self.channels {
                let start = (self.channel + i) * shape.output_pixels() + (self.first_row + row) * shape.output_width;
                // SAFETY: every row of every channel belongs to one task.
                #[allow(unsafe_code)]
                let target = unsafe { output.part(start, shape.output_width) };
                let source = sums[row * plane_width * self.channels + i..].iter().step_by(self.channels);
                for (target, &source) in target.iter_mut().zip(source) {
                    *target = source;
                }
            }
        }
    }
}

/// Weights as `(in, kernel positions, out)`.
fn weights_by_input((outputs, inputs, height, width): (usize, usize, usize, usize), weights: &[f32]) -> Vec<f32> {
    let columns = inputs * height * width;
    let mut moved = vec![0.0; weights.len()];
    moved.par_chunks_mut((COLUMNS * outputs).max(1)).enumerate().for_each(|(block, moved)| {
        // Some outputs at a time, so that whole cache lines are written.
        for output in (0..outputs).step_by(TILE) {
            let end = outputs.min(output + TILE);
            let sources = &weights[output * columns + block * COLUMNS..];
            for (column, moved) in moved.chunks_exact_mut(outputs).enumerate() {
                let source = sources[column..].iter().step_by(columns);
                for (target, &source) in moved[output..end].iter_mut().zip(source) {
                    *target = source;
                }
            }
        }
    });
    moved
}

/// The padded picture as `(phase y, phase x, plane height, plane width, channels)`.
fn planes(shape: &Shape, picture: &[f32]) -> Vec<f32> {
    let (plane_height, plane_width) = shape.plane();
    let (inputs, stride, size) = (shape.inputs, shape.stride, shape.height * shape.width);
    let mut planes = vec![0.0; stride * stride * plane_height * plane_width * inputs];
    planes.par_chunks_mut(plane_width * inputs).enumerate().for_each(|(row, target)| {
        let plane = row / plane_height;
        let Some(y) = shape.source(row % plane_height, plane / stride, shape.height) else { return };
        for tile in (0..inputs).step_by(TILE) {
            let end = inputs.min(tile + TILE);
            for (column, target) in target.chunks_exact_mut(inputs).enumerate() {
                let Some(x) = shape.source(column, plane % stride, shape.width) else { continue };
                let sources = picture[tile * size + y * shape.width + x..].iter().step_by(size);
                for (target, &source) in target[tile..end].iter_mut().zip(sources) {
                    *target = source;
                }
            }
        }
    });
    planes
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::testing::{assert_close, wave};

    #[test]
    fn convolutions_are_those_of_candle() {
        // batch, in, height, width, out, kernel, stride, padding
        for (b, i, h, w, o, k, s, p) in [
            (1, 1, 1, 1, 1, 1, 1, 0),
            (2, 3, 5, 7, 4, 1, 1, 0),
            (1, 20, 40, 60, 300, 1, 1, 0),
            (2, 3, 5, 7, 4, 3, 1, 1),
            (1, 5, 9, 8, 6, 3, 1, 0),
            (1, 17, 16, 16, 33, 3, 1, 1),
            (2, 4, 9, 12, 5, 3, 2, 1),
            (1, 4, 8, 8, 5, 3, 2, 0),
            (1, 3, 10, 11, 2, 1, 2, 0),
            (1, 3, 11, 7, 2, 5, 3, 2),
            (1, 2, 6, 6, 3, 4, 2, 1),
            (1, 2, 3, 3, 3, 3, 1, 2),
            (1, 8, 3, 1100, 8, 3, 1, 1),
            (1, 8, 70, 30, 270, 3, 1, 1),
        ] {
            let (x, weight, bias) = (wave(&[b, i, h, w], 1), wave(&[o, i, k, k], 2), wave(&[o], 3));
            let found = conv2d(&x, &weight, Some(&bias), s, p).expect("a convolution");
            let [x, weight, bias] = [x, weight, bias].map(|t| t.to_dtype(DType::F64).expect("f64"));
            let expected = conv2d(&x, &weight, Some(&bias), s, p).expect("a convolution");
            assert_close(&found, &expected, 2e-6);
        }
    }

    #[test]
    fn a_convolution_without_bias_and_with_a_flat_kernel_works() {
        let (x, weight) = (wave(&[1, 3, 6, 9], 1), wave(&[2, 3, 1, 3], 2));
        let found = conv2d(&x, &weight, None, 1, 1).expect("a convolution");
        let [x, weight] = [x, weight].map(|t| t.to_dtype(DType::F64).expect("f64"));
        assert_close(&found, &conv2d(&x, &weight, None, 1, 1).expect("a convolution"), 2e-6);
    }

    #[test]
    fn tensors_of_different_types_are_refused() {
        let (x, weight, bias) = (wave(&[1, 6, 9, 9], 1), wave(&[5, 6, 3, 3], 2), wave(&[5], 3));
        let [wide, wide_weight, wide_bias] = [&x, &weight, &bias].map(|t| t.to_dtype(DType::F64).expect("f64"));
        for (x, weight, bias) in [(&wide, &weight, &bias), (&x, &wide_weight, &bias), (&x, &weight, &wide_bias)] {
            conv2d(x, weight, Some(bias), 1, 1).expect_err("another type");
        }
    }

    #[test]
    fn the_number_of_threads_does_not_change_a_bit() {
        let (x, weight) = (wave(&[2, 24, 40, 40], 1), wave(&[300, 24, 3, 3], 2));
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
            let y = pool.install(|| conv2d(&x, &weight, None, 1, 1)).expect("a convolution");
            y.flatten_all().and_then(|y| y.to_vec1::<f32>()).expect("numbers")
        };
        assert_eq!(run(1), run(3));
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let x = wave(&[1, 3, 4, 4], 1);
        let refused = |weight: &[usize], stride: usize, padding: usize| {
            let weight = Tensor::zeros(weight, DType::F32, &Device::Cpu).expect("a tensor");
            conv2d(&x, &weight, None, stride, padding).expect_err("does not fit").to_string()
        };
        assert!(refused(&[2, 4, 3, 3], 1, 1).contains("`4` channels"));
        assert!(refused(&[2, 3, 7, 7], 1, 1).contains("does not fit"));
        assert!(refused(&[2, 3, 3, 3], 0, 1).contains("at least 1"));
    }
}
