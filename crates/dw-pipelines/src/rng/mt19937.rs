//! The Mersenne twister of torch's CPU generator (Matsumoto and Nishimura 1998; `at::mt19937`), with the
//! cached second normal that belongs to the generator's state.

const STATE: usize = 624;
const SHIFT: usize = 397;

/// State of one stream.
#[derive(Clone, Debug)]
pub(super) struct Mt19937 {
    state: [u32; STATE],
    next: usize,
    cached_normal: Option<f64>,
}

impl Mt19937 {
    /// Knuth's initialisation from 32 bits of seed.
    pub(super) fn new(seed: u32) -> Self {
        let mut state = [0_u32; STATE];
        state[0] = seed;
        for i in 1..STATE {
            let previous = state[i - 1];
            state[i] = (previous ^ (previous >> 30)).wrapping_mul(1_812_433_253).wrapping_add(i as u32);
        }
        Self { state, next: STATE, cached_normal: None }
    }

    fn twist(&mut self) {
        for i in 0..STATE {
            let mixed = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % STATE] & 0x7fff_ffff);
            let odd = if mixed & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + SHIFT) % STATE] ^ (mixed >> 1) ^ odd;
        }
        self.next = 0;
    }

    /// The next tempered word.
    pub(super) fn word(&mut self) -> u32 {
        if self.next >= STATE {
            self.twist();
        }
        let mut word = self.state[self.next];
        self.next += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }

    /// Uniform in [0, 1) with 24 bits: `torch.rand` of f32.
    pub(super) fn uniform_f32(&mut self) -> f32 {
        (self.word() & 0x00ff_ffff) as f32 / 16_777_216.0
    }

    /// Uniform in [0, 1) with 53 bits, from two words, the high one first: `torch.rand` of f64.
    pub(super) fn uniform_f64(&mut self) -> f64 {
        let high = u64::from(self.word());
        let bits = (high << 32 | u64::from(self.word())) & ((1 << 53) - 1);
        bits as f64 / 9_007_199_254_740_992.0
    }

    /// One normal number (`at::normal_distribution<double>`). Every second call returns the number the
    /// call before kept; that one survives draws of any other kind.
    pub(super) fn normal_f64(&mut self) -> f64 {
        if let Some(cached) = self.cached_normal.take() {
            return cached;
        }
        let angle = 2.0 * std::f64::consts::PI * self.uniform_f64();
        let radius = (-2.0 * (-self.uniform_f64()).ln_1p()).sqrt();
        self.cached_normal = Some(radius * angle.sin());
        radius * angle.cos()
    }
}
