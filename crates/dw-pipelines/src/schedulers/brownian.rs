//! A Brownian path that answers for any interval, whatever the order of the questions: the value on an
//! interval follows from the seed alone. It is torchsde's `BrownianInterval` with `halfway_tree`, number
//! for number: intervals are halved down to a resolution of 1e-6, and each halving draws from a torch
//! generator whose seed comes from numpy's `SeedSequence`.

use candle_core::{DType, Device, Tensor};

use super::tensors;
use crate::{
    Result,
    rng::{Generator, NoiseDialect},
};

/// Words of entropy that a seed sequence keeps.
const POOL_SIZE: usize = 24;

/// A path over an interval, for tensors of one shape.
pub(super) struct BrownianPath {
    seed: u64,
    shape: Vec<usize>,
    start: f64,
    end: f64,
    /// The increment over the whole interval; f32, on the CPU.
    increment: Tensor,
}

/// One node of the tree of halvings.
struct Node {
    start: f64,
    end: f64,
    increment: Tensor,
    /// The path from the root: a bit for each halving.
    key: u64,
    depth: u64,
}

impl BrownianPath {
    /// A path from `start` to `end`.
    pub(super) fn new(start: f64, end: f64, shape: &[usize], seed: u64) -> Result<Self> {
        let [word, ..] = seed_words::<3>(seed, &[]);
        let increment = tensors::scale(&draw(shape, word)?, (end - start).sqrt() as f32)?;
        Ok(Self { seed, shape: shape.to_vec(), start: rounded(start), end: rounded(end), increment })
    }

    /// The increment from `from` to `to` (`from` before `to`), divided by the root of their distance: unit
    /// noise. f32, on the CPU.
    pub(super) fn unit_noise(&self, from: f32, to: f32) -> Result<Tensor> {
        let within = |time: f32| rounded(f64::from(time).clamp(self.start, self.end));
        let root = Node { start: self.start, end: self.end, increment: self.increment.clone(), key: 0, depth: 0 };
        let mut sum = None;
        self.collect(root, within(from), within(to), &mut sum)?;
        match sum {
            Some(increment) => tensors::divide(&increment, (to - from).abs().sqrt()),
            None => Ok(self.increment.zeros_like()?),
        }
    }

    /// Adds the increments of the largest nodes that make up the interval, from left to right.
    fn collect(&self, node: Node, from: f64, to: f64, sum: &mut Option<Tensor>) -> Result<()> {
        if from >= to {
            return Ok(());
        }
        if from == node.start && to == node.end {
            *sum = Some(match sum.take() {
                Some(sum) => (sum + node.increment)?,
                None => node.increment,
            });
            return Ok(());
        }
        let middle = rounded(0.5 * (node.end + node.start));
        let (left, right) = self.halves(node, middle)?;
        if from < middle {
            self.collect(left, from, to.min(middle), sum)?;
        }
        if to > middle {
            self.collect(right, from.max(middle), to, sum)?;
        }
        Ok(())
    }

    /// The Brownian bridge through the middle of a node.
    fn halves(&self, node: Node, middle: f64) -> Result<(Node, Node)> {
        let [word, ..] = seed_words::<4>(self.seed, &[node.key, node.depth]);
        let (before, after, share) = (middle - node.start, node.end - middle, 1.0 / (node.end - node.start));
        let mean = tensors::scale(&tensors::scale(&node.increment, before as f32)?, share as f32)?;
        let deviation = (before * after * share).sqrt() as f32;
        let left = tensors::combine(&[(1.0, &mean), (deviation, &draw(&self.shape, word)?)])?;
        let right = (&node.increment - &left)?;
        let depth = node.depth + 1;
        Ok((
            Node { start: node.start, end: middle, increment: left, key: 2 * node.key, depth },
            Node { start: middle, end: node.end, increment: right, key: 2 * node.key + 1, depth },
        ))
    }
}

fn draw(shape: &[usize], seed: u32) -> Result<Tensor> {
    Generator::new(i128::from(seed), NoiseDialect::Cpu).randn(shape, DType::F32, &Device::Cpu)
}

/// Six decimals, as Python's `round` finds them: by way of the decimal representation.
fn rounded(time: f64) -> f64 {
    format!("{time:.6}").parse().unwrap_or(time)
}

/// `numpy.random.SeedSequence(entropy, spawn_key=key, pool_size=24).generate_state(N)`
/// (O'Neill's `seed_seq_fe`).
fn seed_words<const N: usize>(entropy: u64, spawn_key: &[u64]) -> [u32; N] {
    const INIT_A: u32 = 0x43b0_d7e5;
    const MULT_A: u32 = 0x931e_8875;
    const INIT_B: u32 = 0x8b51_f9dd;
    const MULT_B: u32 = 0x58f3_8ded;
    let mut constant = INIT_A;
    let mut hash = |value: u32| {
        let value = value ^ constant;
        constant = constant.wrapping_mul(MULT_A);
        let value = value.wrapping_mul(constant);
        value ^ (value >> 16)
    };
    let mut words = little_words(entropy);
    if !spawn_key.is_empty() {
        words.resize(POOL_SIZE.max(words.len()), 0);
        words.extend(spawn_key.iter().flat_map(|&key| little_words(key)));
    }
    let mut pool: Vec<u32> = (0..POOL_SIZE).map(|i| hash(words.get(i).copied().unwrap_or(0))).collect();
    for from in 0..POOL_SIZE {
        for to in (0..POOL_SIZE).filter(|&to| to != from) {
            pool[to] = mixed(pool[to], hash(pool[from]));
        }
    }
    for word in words.into_iter().skip(POOL_SIZE) {
        for entry in &mut pool {
            *entry = mixed(*entry, hash(word));
        }
    }
    let mut constant = INIT_B;
    std::array::from_fn(|i| {
        let value = pool[i % POOL_SIZE] ^ constant;
        constant = constant.wrapping_mul(MULT_B);
        let value = value.wrapping_mul(constant);
        value ^ (value >> 16)
    })
}

fn mixed(x: u32, y: u32) -> u32 {
    let value = x.wrapping_mul(0xca01_f9dd).wrapping_sub(y.wrapping_mul(0x4973_f715));
    value ^ (value >> 16)
}

/// The 32-bit words of a number, the low one first; at least one.
fn little_words(value: u64) -> Vec<u32> {
    if value >> 32 == 0 { vec![value as u32] } else { vec![value as u32, (value >> 32) as u32] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_those_of_numpy() {
        assert_eq!(seed_words::<3>(0, &[])[..2], [4_025_752_534, 2_687_548_107]);
        assert_eq!(seed_words::<4>(0, &[0, 0])[0], 245_430_115);
    }

    #[test]
    fn increments_of_neighbours_add_up() {
        let path = BrownianPath::new(0.03, 14.6, &[4, 8], 5).expect("a path");
        let sized = |from: f32, to: f32| {
            let noise = path.unit_noise(from, to).expect("noise");
            tensors::scale(&noise, (to - from).sqrt()).expect("a product")
        };
        let parts = (sized(1.0, 2.5) + sized(2.5, 7.25)).expect("a sum");
        let difference = (parts - sized(1.0, 7.25)).expect("a difference").abs().expect("f32");
        let worst = difference.max_all().and_then(|t| t.to_scalar::<f32>()).expect("a number");
        assert!(worst < 1e-5, "{worst}");
    }
}
