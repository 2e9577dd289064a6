//! Changing the size of feature maps.

use candle_core::Tensor;

use crate::Result;

/// Nearest neighbour to `(height, width)`: `(batch, channels, h, w)` to `(batch, channels, height, width)`.
pub fn upsample_nearest(x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    Ok(x.upsample_nearest2d(height, width)?)
}

/// Nearest neighbour to twice the size.
pub fn upsample_nearest_2x(x: &Tensor) -> Result<Tensor> {
    let (_, _, height, width) = x.dims4()?;
    upsample_nearest(x, 2 * height, 2 * width)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn an_odd_target_takes_the_nearest_source_below() {
        let x = Tensor::new(&[[[[0f32, 1.0, 2.0]]]], &Device::Cpu).expect("one row");
        let y = upsample_nearest(&x, 1, 5).and_then(|y| Ok(y.flatten_all()?.to_vec1::<f32>()?)).expect("it scales");
        assert_eq!(y, [0.0, 0.0, 1.0, 1.0, 2.0]);
        let y = upsample_nearest_2x(&x).and_then(|y| Ok(y.flatten_all()?.to_vec1::<f32>()?)).expect("it scales");
        assert_eq!(y, [0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 0.0, 0.0, 1.0, 1.0, 2.0, 2.0]);
    }
}
