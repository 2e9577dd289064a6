//! Diffusion exponential integrator sampler, multistep with polynomials in log rho (Zhang and Chen 2023).

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    NoiseSource, Scheduler, StepOptions, StepOutput, TimestepRequest,
    alphas::Limit,
    basics,
    betas::{BetaSchedule, beta_options},
    check_index,
    config::{PredictionType, TimestepSpacing, config},
    dpm_solver::check_order,
    exponential::{self, History, Level},
    flow::TimeShift,
    levels::NoiseLevels,
    registry::FromConfig,
    spacing::{self, SigmaCurve},
    tensors,
};
use crate::Result;

/// Runs shorter than this end with steps of lower order.
const SHORT_RUN: usize = 15;

/// The one algorithm of this class; names of other classes' algorithms count as it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum DeisAlgorithm {
    /// DEIS.
    #[serde(alias = "dpmsolver", alias = "dpmsolver++")]
    Deis,
}

/// The one solver of this class; names of other classes' solvers count as it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum DeisSolver {
    /// Polynomials in the logarithm of rho.
    #[serde(alias = "midpoint", alias = "heun", alias = "bh1", alias = "bh2")]
    Logrho,
}

config! {
    /// Options of `DEISMultistepScheduler`.
    DeisMultistepConfig {
        num_train_timesteps: usize = 1000,
        beta_start: f64 = 0.0001,
        beta_end: f64 = 0.02,
        beta_schedule: BetaSchedule = BetaSchedule::Linear,
        trained_betas: Option<Vec<f64>> = None,
        solver_order: usize = 2,
        prediction_type: PredictionType = PredictionType::Epsilon,
        thresholding: bool = false,
        dynamic_thresholding_ratio: f64 = 0.995,
        sample_max_value: f64 = 1.0,
        algorithm_type: DeisAlgorithm = DeisAlgorithm::Deis,
        solver_type: DeisSolver = DeisSolver::Logrho,
        lower_order_final: bool = true,
        use_karras_sigmas: bool = false,
        use_exponential_sigmas: bool = false,
        use_beta_sigmas: bool = false,
        use_flow_sigmas: bool = false,
        flow_shift: f64 = 1.0,
        timestep_spacing: TimestepSpacing = TimestepSpacing::Linspace,
        steps_offset: i64 = 0,
        use_dynamic_shifting: bool = false,
        time_shift_type: TimeShift = TimeShift::Exponential,
    }
}

/// `DEISMultistepScheduler`.
pub(super) struct DeisMultistep {
    config: DeisMultistepConfig,
    levels: NoiseLevels,
    limit: Limit,
    timesteps: Vec<f64>,
    sigmas: Vec<f32>,
    history: History,
}

/// Integral of the Lagrange factor of node `b` over the other node `c`, in log rho, up to `t`.
fn second_order_integral(t: f32, b: f32, c: f32) -> f32 {
    t * (-c.ln() + t.ln() - 1.0) / (b.ln() - c.ln())
}

/// Integral of the Lagrange factor of node `b` over the other nodes `c` and `d`, in log rho, up to `t`.
fn third_order_integral(t: f32, b: f32, c: f32, d: f32) -> f32 {
    let (log_t, log_b, log_c, log_d) = (t.ln(), b.ln(), c.ln(), d.ln());
    let numerator = t * (log_c * (log_d - log_t + 1.0) - log_d * log_t + log_d + log_t * log_t - 2.0 * log_t + 2.0);
    numerator / ((log_b - log_c) * (log_b - log_d))
}

impl DeisMultistep {
    fn level(&self, index: usize) -> Level {
        Level::new(self.sigmas[index], self.config.use_flow_sigmas)
    }

    /// Timesteps and sigmas of a run, the final sigma included: curves end where they end.
    fn schedule(&self, request: &TimestepRequest) -> (Vec<f64>, Vec<f64>) {
        let config = &self.config;
        let (train, steps) = (config.num_train_timesteps, request.steps);
        let curve = SigmaCurve::chosen(config.use_karras_sigmas, config.use_exponential_sigmas, config.use_beta_sigmas);
        let (mut timesteps, mut sigmas) = match curve {
            Some(curve) => exponential::on_curve(&self.levels, curve, steps, None, None),
            None if config.use_flow_sigmas => {
                let shift = request.mu.filter(|_| config.use_dynamic_shifting).map_or(config.flow_shift, f64::exp);
                exponential::flow_run(train, steps, shift)
            }
            None => {
                let (spacing, offset) = (config.timestep_spacing, config.steps_offset);
                let (timesteps, mut sigmas) =
                    self.levels.run(exponential::timesteps(spacing, train, train, steps, offset), None, None, None);
                sigmas.push(f64::from(self.levels.smallest()));
                return (timesteps, sigmas);
            }
        };
        if curve == Some(SigmaCurve::Karras) {
            spacing::round(&mut timesteps);
        }
        sigmas.extend(sigmas.last().copied());
        (timesteps, sigmas)
    }

    fn order_at(&self, index: usize) -> usize {
        let (steps, order) = (self.timesteps.len(), self.config.solver_order);
        let short = self.config.lower_order_final && steps < SHORT_RUN;
        let order = if short { order.min(steps - index) } else { order };
        order.min(self.history.len())
    }

    /// The sample at the next level. All f32.
    fn advanced(&self, index: usize, sample: &Tensor) -> Result<Tensor> {
        let (to, from) = (self.level(index + 1), self.level(index));
        let outputs = &self.history;
        let order = self.order_at(index);
        if order == 1 {
            let h = to.lambda - from.lambda;
            let weight = -(to.sigma * (h.exp() - 1.0));
            return tensors::combine(&[(to.alpha / from.alpha, sample), (weight, outputs.ago(0))]);
        }
        let rho = |level: Level| level.sigma / level.alpha;
        let (t, s0, s1) = (rho(to), rho(from), rho(self.level(index - 1)));
        let weights: Vec<f32> = if order == 2 {
            let weight = |b, c| second_order_integral(t, b, c) - second_order_integral(s0, b, c);
            vec![weight(s0, s1), weight(s1, s0)]
        } else {
            let s2 = rho(self.level(index - 2));
            let weight = |b, c, d| third_order_integral(t, b, c, d) - third_order_integral(s0, b, c, d);
            vec![weight(s0, s1, s2), weight(s1, s2, s0), weight(s2, s0, s1)]
        };
        let mut terms = vec![(1.0 / from.alpha, sample)];
        terms.extend(weights.into_iter().enumerate().map(|(back, weight)| (weight, outputs.ago(back))));
        tensors::scale(&tensors::combine(&terms)?, to.alpha)
    }
}

impl FromConfig for DeisMultistep {
    const CLASS: &'static str = "DEISMultistepScheduler";
    type Config = DeisMultistepConfig;

    fn from_config(config: Self::Config) -> Result<Self> {
        spacing::one_curve(
            Self::CLASS,
            config.use_karras_sigmas,
            config.use_exponential_sigmas,
            config.use_beta_sigmas,
        )?;
        check_order(Self::CLASS, config.solver_order, 3)?;
        let levels = NoiseLevels::new(&beta_options!(Self::CLASS, config, false).alphas_cumprod()?);
        let (ratio, max) = (config.dynamic_thresholding_ratio, config.sample_max_value);
        let limit = Limit::chosen(config.thresholding, ratio, max, false, 0.0);
        Ok(Self { config, levels, limit, timesteps: Vec::new(), sigmas: Vec::new(), history: History::default() })
    }
}

impl Scheduler for DeisMultistep {
    basics!(sigmas);

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<()> {
        spacing::refuse_custom(Self::CLASS, request, false, false)?;
        spacing::check_steps(Self::CLASS, request, self.config.num_train_timesteps)?;
        let (timesteps, sigmas) = self.schedule(request);
        self.sigmas = sigmas.into_iter().map(|sigma| sigma as f32).collect();
        self.timesteps = timesteps.into_iter().map(f64::trunc).collect();
        self.history.clear();
        Ok(())
    }

    fn step(
        &mut self,
        model_output: &Tensor,
        index: usize,
        sample: &Tensor,
        _noise: &mut NoiseSource<'_>,
        _options: &StepOptions,
    ) -> Result<StepOutput> {
        check_index(index, &self.timesteps)?;
        let (output, sample) = (tensors::single(model_output)?, tensors::single(sample)?);
        let level = self.level(index);
        let original = self.limit.apply(level.original(self.config.prediction_type, &output, &sample)?)?;
        self.history.push(level.noise_between(&original, &sample)?, self.config.solver_order);
        let moved = self.advanced(index, &sample)?;
        StepOutput::new(&moved, Some(&original), model_output)
    }

    fn add_noise(&self, original: &Tensor, noise: &Tensor, index: usize) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        self.level(index).add_noise(original, noise)
    }
}
