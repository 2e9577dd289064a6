//! torch's CUDA generator: Philox4x32-10 (Salmon et al. 2011) with curand's Box-Muller and the thread
//! layout of torch's element-wise kernels (aten `DistributionTemplates.cuh`). Agrees with a GPU to a few
//! units in the last place, because a GPU's `logf`, `sinf` and `cosf` are not the host's.

const BLOCK_THREADS: u32 = 256;

/// State of one stream.
#[derive(Clone, Debug)]
pub(super) struct Philox {
    key: [u32; 2],
    offset: u64,
    max_blocks: u64,
}

impl Philox {
    /// A stream at offset 0, for a GPU of the given size.
    pub(super) fn new(seed: u64, multiprocessors: u32, threads_per_multiprocessor: u32) -> Self {
        let max_blocks = u64::from(multiprocessors) * u64::from(threads_per_multiprocessor / BLOCK_THREADS);
        Self { key: [seed as u32, (seed >> 32) as u32], offset: 0, max_blocks: max_blocks.max(1) }
    }

    /// `torch.randn` of `count` f32 on the GPU: thread `t` of `T` makes the elements `t`, `t + T`,
    /// `t + 2 T`, `t + 3 T` of each round from the four words of one counter.
    pub(super) fn normal(&mut self, count: usize) -> Vec<f32> {
        if count == 0 {
            return Vec::new();
        }
        let blocks = self.max_blocks.min((count as u64).div_ceil(u64::from(BLOCK_THREADS)));
        let threads = (blocks * u64::from(BLOCK_THREADS)) as usize;
        let rounds = count.div_ceil(threads * 4);
        let mut values = vec![0.0; count];
        for round in 0..rounds {
            let counter = self.offset / 4 + round as u64;
            let first = round * threads * 4;
            for thread in 0..threads.min(count - first) {
                let normals = normals(self.words(counter, thread as u64));
                for (value, normal) in values[first + thread..].iter_mut().step_by(threads).zip(normals) {
                    *value = normal;
                }
            }
        }
        self.offset += 4 * rounds as u64;
        values
    }

    fn words(&self, counter: u64, thread: u64) -> [u32; 4] {
        let mut c = [counter as u32, (counter >> 32) as u32, thread as u32, (thread >> 32) as u32];
        let mut key = self.key;
        for _ in 0..10 {
            let a = u64::from(c[0]) * 0xd251_1f53;
            let b = u64::from(c[2]) * 0xcd9e_8d57;
            c = [(b >> 32) as u32 ^ c[1] ^ key[0], b as u32, (a >> 32) as u32 ^ c[3] ^ key[1], a as u32];
            key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
        }
        c
    }
}

/// curand's Box-Muller, twice; the sine comes first.
fn normals(words: [u32; 4]) -> [f32; 4] {
    const SCALE: f32 = 2.3283064e-10;
    const ANGLE: f32 = 2.3283064e-10 * std::f32::consts::TAU;
    let pair = |a: u32, b: u32| {
        let radius = (-2.0 * (a as f32 * SCALE + SCALE / 2.0).ln()).sqrt();
        let (sin, cos) = (b as f32 * ANGLE + ANGLE / 2.0).sin_cos();
        [radius * sin, radius * cos]
    };
    let ([a, b], [c, d]) = (pair(words[0], words[1]), pair(words[2], words[3]));
    [a, b, c, d]
}
