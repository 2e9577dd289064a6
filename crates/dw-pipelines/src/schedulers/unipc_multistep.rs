//! UniPC: a multistep predictor, and a corrector that reuses the next model output to improve the step
//! before it without a further call (Zhao et al. 2023).

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    NoiseSource, Scheduler, StepOptions, StepOutput, TimestepRequest,
    alphas::Limit,
    basics,
    betas::{BetaSchedule, beta_options},
    check_index,
    config::{self, FinalSigmas, PredictionType, TimestepSpacing, config, option_error},
    dpm_solver::{Algorithm, check_order},
    dpmsolver_multistep::convert,
    exponential::{self, History, Level},
    flow::{Precision, TimeShift},
    levels::NoiseLevels,
    numeric,
    registry::FromConfig,
    spacing::{self, SigmaCurve},
    tensors,
};
use crate::Result;

/// The function B(h) of the method (equation 9).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum UniPcSolver {
    /// B(h) = h.
    Bh1,
    /// B(h) = exp(h) - 1. Names of other classes' solvers count as this.
    #[serde(alias = "midpoint", alias = "heun", alias = "logrho")]
    Bh2,
}

config! {
    /// Options of `UniPCMultistepScheduler`.
    UniPcMultistepConfig {
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
        predict_x0: bool = true,
        solver_type: UniPcSolver = UniPcSolver::Bh2,
        lower_order_final: bool = true,
        disable_corrector: Vec<usize> = Vec::new(),
        solver_p: Option<Value> = None,
        use_karras_sigmas: bool = false,
        use_exponential_sigmas: bool = false,
        use_beta_sigmas: bool = false,
        use_flow_sigmas: bool = false,
        flow_shift: f64 = 1.0,
        timestep_spacing: TimestepSpacing = TimestepSpacing::Linspace,
        steps_offset: i64 = 0,
        final_sigmas_type: FinalSigmas = FinalSigmas::Zero,
        rescale_betas_zero_snr: bool = false,
        use_dynamic_shifting: bool = false,
        time_shift_type: TimeShift = TimeShift::Exponential,
        sigma_min: Option<f64> = None,
        sigma_max: Option<f64> = None,
        shift_terminal: Option<f64> = None,
    }
}

/// The highest order whose equations are solved.
const MAX_ORDER: usize = 6;

/// `UniPCMultistepScheduler`.
pub(super) struct UniPcMultistep {
    config: UniPcMultistepConfig,
    levels: NoiseLevels,
    limit: Limit,
    timesteps: Vec<f64>,
    sigmas: Vec<f32>,
    history: History,
    /// The sample that the last prediction started from and the prediction's order.
    last: Option<(Tensor, usize)>,
}

/// Solves `matrix * x = right` by elimination with row pivots. The nodes are distinct, so a solution
/// exists.
fn solve(mut matrix: Vec<Vec<f32>>, mut right: Vec<f32>) -> Vec<f32> {
    let n = right.len();
    for column in 0..n {
        let pivot = (column..n)
            .max_by(|&a, &b| matrix[a][column].abs().total_cmp(&matrix[b][column].abs()))
            .expect("the range holds `column`");
        matrix.swap(column, pivot);
        right.swap(column, pivot);
        for row in column + 1..n {
            let factor = matrix[row][column] / matrix[column][column];
            let (above, below) = matrix.split_at_mut(row);
            for (entry, pivot) in below[0][column..].iter_mut().zip(&above[column][column..]) {
                *entry -= factor * pivot;
            }
            right[row] -= factor * right[column];
        }
    }
    for row in (0..n).rev() {
        let known: f32 = (row + 1..n).map(|k| matrix[row][k] * right[k]).sum();
        right[row] = (right[row] - known) / matrix[row][row];
    }
    right
}

/// One step of the predictor or the corrector: the nodes of the differences and the right-hand side of
/// equation 8.
struct Equations {
    /// `exp(h) - 1` in the direction that is integrated.
    phi: f32,
    /// B(h).
    b_h: f32,
    /// Relative positions of the earlier levels.
    nodes: Vec<f32>,
    right: Vec<f32>,
}

impl Equations {
    fn new(solver: UniPcSolver, hh: f32, nodes: Vec<f32>) -> Self {
        let phi = hh.exp_m1();
        let b_h = if solver == UniPcSolver::Bh1 { hh } else { phi };
        let (mut phi_k, mut factorial) = (phi / hh - 1.0, 1.0);
        let right = (1..=nodes.len() + 1)
            .map(|i| {
                let entry = phi_k * factorial / b_h;
                factorial *= (i + 1) as f32;
                phi_k = phi_k / hh - 1.0 / factorial;
                entry
            })
            .collect();
        Self { phi, b_h, nodes, right }
    }

    /// Powers of the first `count` nodes; the node after the earlier levels is 1.
    fn matrix(&self, count: usize) -> Vec<Vec<f32>> {
        let nodes: Vec<f32> = self.nodes.iter().copied().chain([1.0]).take(count).collect();
        (0..count).map(|power| nodes.iter().map(|node| node.powi(power as i32)).collect()).collect()
    }

    /// Weights of the earlier differences when the output at the new level is not known yet.
    fn predictor_weights(&self) -> Vec<f32> {
        match self.nodes.len() {
            0 => Vec::new(),
            1 => vec![0.5],
            count => solve(self.matrix(count), self.right[..count].to_vec()),
        }
    }

    /// Weights of the earlier differences and, last, of the difference at the new level.
    fn corrector_weights(&self) -> Vec<f32> {
        match self.nodes.len() {
            0 => vec![0.5],
            count => solve(self.matrix(count + 1), self.right.clone()),
        }
    }
}

impl UniPcMultistep {
    fn level(&self, index: usize) -> Level {
        Level::new(self.sigmas[index], self.config.use_flow_sigmas)
    }

    /// The step between levels `from` and `from + 1` with earlier outputs, the sample it starts from, and
    /// the output at its end if that is known. All f32.
    fn advance(&self, from: usize, order: usize, sample: &Tensor, new: Option<&Tensor>) -> Result<Tensor> {
        let (to, base) = (self.level(from + 1), self.level(from));
        let latest = self.history.ago(0);
        let h = to.lambda - base.lambda;
        let nodes: Vec<f32> = (1..order).map(|i| (self.level(from - i).lambda - base.lambda) / h).collect();
        let mut differences = Vec::with_capacity(order);
        for (i, &node) in nodes.iter().enumerate() {
            differences.push(tensors::divide(&(self.history.ago(i + 1) - latest)?, node)?);
        }
        let hh = if self.config.predict_x0 { -h } else { h };
        let equations = Equations::new(self.config.solver_type, hh, nodes);
        let weights = match new {
            None => equations.predictor_weights(),
            Some(new) => {
                differences.push((new - latest)?);
                equations.corrector_weights()
            }
        };
        let (kept, scale) =
            if self.config.predict_x0 { (to.sigma / base.sigma, to.alpha) } else { (to.alpha / base.alpha, to.sigma) };
        let mut terms = vec![(kept, sample), (-scale * equations.phi, latest)];
        terms.extend(
            weights.iter().zip(&differences).map(|(weight, difference)| (-scale * equations.b_h * weight, difference)),
        );
        tensors::combine(&terms)
    }

    /// Timesteps and sigmas of a run, the final sigma included.
    fn schedule(&self, request: &TimestepRequest) -> Result<(Vec<f64>, Vec<f64>)> {
        let config = &self.config;
        let curve = SigmaCurve::chosen(config.use_karras_sigmas, config.use_exponential_sigmas, config.use_beta_sigmas);
        if request.sigmas.is_some() && (!config.use_flow_sigmas || curve.is_some()) {
            let reason = "need `use_flow_sigmas` and no other sigma curve - set those in the scheduler's configuration";
            return Err(config::request_error("sigmas", reason));
        }
        let (train, steps) = (config.num_train_timesteps, request.steps);
        if request.sigmas.is_none() {
            spacing::check_steps(Self::CLASS, request, train)?;
        }
        let (timesteps, mut sigmas) = match curve {
            Some(curve) => self.curve_schedule(curve, steps),
            None if config.use_flow_sigmas => self.flow_schedule(request),
            None => {
                let (spacing, offset) = (config.timestep_spacing, config.steps_offset);
                self.levels.run(exponential::timesteps(spacing, train, train, steps, offset), None, None, None)
            }
        };
        let own_end = curve.is_some() || config.use_flow_sigmas;
        sigmas.push(match config.final_sigmas_type {
            FinalSigmas::Zero => 0.0,
            FinalSigmas::SigmaMin if own_end => sigmas[sigmas.len() - 1],
            FinalSigmas::SigmaMin => f64::from(self.levels.smallest()),
        });
        Ok((timesteps, sigmas))
    }

    fn curve_schedule(&self, curve: SigmaCurve, steps: usize) -> (Vec<f64>, Vec<f64>) {
        let config = &self.config;
        let (timesteps, sigmas) = exponential::on_curve(&self.levels, curve, steps, config.sigma_min, config.sigma_max);
        if curve != SigmaCurve::Karras {
            return (timesteps, sigmas);
        }
        if config.use_flow_sigmas {
            let sigmas: Vec<f64> = sigmas.iter().map(|sigma| sigma / (sigma + 1.0)).collect();
            return (sigmas.iter().map(|sigma| sigma * config.num_train_timesteps as f64).collect(), sigmas);
        }
        (timesteps.into_iter().map(f64::round_ties_even).collect(), sigmas)
    }

    fn flow_schedule(&self, request: &TimestepRequest) -> (Vec<f64>, Vec<f64>) {
        /// A first level of exactly 1 would have no signal at all.
        const BELOW_ONE: f64 = 1e-6;
        let config = &self.config;
        let train = config.num_train_timesteps as f64;
        let times = request.sigmas.clone().unwrap_or_else(|| {
            let mut times = numeric::linspace(1.0, 1.0 / train, request.steps + 1);
            times.pop();
            times
        });
        let precision = Precision::Double;
        let mut sigmas: Vec<f64> = match request.mu.filter(|_| config.use_dynamic_shifting) {
            Some(mu) => times.iter().map(|&time| precision.time_shifted(time, config.time_shift_type, mu)).collect(),
            None => times.iter().map(|&time| precision.shifted(time, config.flow_shift)).collect(),
        };
        if let Some(terminal) = config.shift_terminal.filter(|&terminal| terminal != 0.0) {
            sigmas = precision.stretched(&sigmas, terminal);
        }
        if (sigmas[0] - 1.0).abs() < BELOW_ONE {
            sigmas[0] -= BELOW_ONE;
        }
        (sigmas.iter().map(|sigma| sigma * train).collect(), sigmas)
    }
}

/// Refuses combinations of options that give no numbers.
fn check(config: &UniPcMultistepConfig) -> Result<()> {
    use PredictionType::{Epsilon, FlowPrediction, Sample, VPrediction};
    const CLASS: &str = UniPcMultistep::CLASS;
    if config.predict_x0 {
        config.prediction_type.one_of(CLASS, &[Epsilon, Sample, VPrediction, FlowPrediction])?;
    } else {
        config.prediction_type.one_of(CLASS, &[Epsilon, Sample, VPrediction])?;
    }
    if config.solver_p.is_some() {
        return Err(option_error(CLASS, "solver_p", "another scheduler as predictor is not possible - leave it out"));
    }
    if config.shift_terminal.is_some() && !config.use_flow_sigmas {
        return Err(option_error(CLASS, "shift_terminal", "needs `use_flow_sigmas`"));
    }
    if config.final_sigmas_type == FinalSigmas::Zero {
        let remedy = "cannot end at no noise - set `final_sigmas_type` to `sigma_min`";
        if config.solver_type == UniPcSolver::Bh1 {
            return Err(option_error(CLASS, "solver_type", &format!("`bh1` {remedy}, or use `bh2`")));
        }
        if !config.predict_x0 {
            return Err(option_error(CLASS, "predict_x0", &format!("`false` {remedy}")));
        }
        if !config.lower_order_final && config.solver_order > 1 {
            return Err(option_error(CLASS, "lower_order_final", &format!("`false` {remedy}")));
        }
    }
    Ok(())
}

impl FromConfig for UniPcMultistep {
    const CLASS: &'static str = "UniPCMultistepScheduler";
    type Config = UniPcMultistepConfig;

    fn from_config(config: Self::Config) -> Result<Self> {
        check(&config)?;
        spacing::one_curve(
            Self::CLASS,
            config.use_karras_sigmas,
            config.use_exponential_sigmas,
            config.use_beta_sigmas,
        )?;
        check_order(Self::CLASS, config.solver_order, MAX_ORDER)?;
        let levels = NoiseLevels::new(&beta_options!(Self::CLASS, config).positive_alphas_cumprod()?);
        let (ratio, max) = (config.dynamic_thresholding_ratio, config.sample_max_value);
        let limit = Limit::chosen(config.thresholding && config.predict_x0, ratio, max, false, 0.0);
        let (timesteps, sigmas) = (Vec::new(), Vec::new());
        Ok(Self { config, levels, limit, timesteps, sigmas, history: History::default(), last: None })
    }
}

impl Scheduler for UniPcMultistep {
    basics!(sigmas);

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<()> {
        spacing::refuse_custom(Self::CLASS, request, false, true)?;
        if self.config.use_dynamic_shifting && request.mu.is_none() {
            let reason = "must be given, because this scheduler has `use_dynamic_shifting`";
            return Err(config::request_error("mu", reason));
        }
        let (timesteps, sigmas) = self.schedule(request)?;
        self.sigmas = sigmas.into_iter().map(|sigma| sigma as f32).collect();
        self.timesteps = timesteps.into_iter().map(f64::trunc).collect();
        self.history.clear();
        self.last = None;
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
        let (output, mut sample) = (tensors::single(model_output)?, tensors::single(sample)?);
        let integrates = if self.config.predict_x0 { Algorithm::DpmSolverPlusPlus } else { Algorithm::DpmSolver };
        let kind = self.config.prediction_type;
        let converted = convert(integrates, kind, self.limit, &output, &sample, self.level(index))?;
        if let Some((start, order)) = self.last.take()
            && index > 0
            && !self.config.disable_corrector.contains(&(index - 1))
        {
            sample = self.advance(index - 1, order, &start, Some(&converted))?;
        }
        self.history.push(converted.clone(), self.config.solver_order);
        let left = self.timesteps.len() - index;
        let order =
            if self.config.lower_order_final { self.config.solver_order.min(left) } else { self.config.solver_order };
        let order = order.min(self.history.len());
        let moved = self.advance(index, order, &sample, None)?;
        self.last = Some((sample, order));
        StepOutput::new(&moved, self.config.predict_x0.then_some(&converted), model_output)
    }

    fn add_noise(&self, original: &Tensor, noise: &Tensor, index: usize) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        self.level(index).add_noise(original, noise)
    }

    fn accepts_sigmas(&self) -> bool {
        self.config.use_flow_sigmas
    }
}

#[cfg(test)]
mod tests {
    use super::solve;

    #[test]
    fn elimination_solves_a_system_that_needs_pivots() {
        let x = solve(vec![vec![0.0, 2.0], vec![4.0, 1.0]], vec![6.0, 7.0]);
        assert_eq!(x, [1.0, 3.0]);
    }
}
