//! DPM-Solver++ as a singlestep method: groups of one to three model calls, each group a step of that
//! order from where the group began (Lu et al. 2022b, algorithm 1).

use candle_core::Tensor;

use super::{
    NoiseSource, Scheduler, StepOptions, StepOutput, TimestepRequest,
    alphas::Limit,
    basics,
    betas::{BetaSchedule, beta_options},
    check_index,
    config::{self, FinalSigmas, PredictionType, config, option_error},
    dpm_solver::{Algorithm, Solver, Update, check_order, quotient},
    dpmsolver_multistep::{LearnedVariance, check_algorithm, convert},
    exponential::{self, History, Level},
    flow::TimeShift,
    levels::NoiseLevels,
    numeric,
    registry::FromConfig,
    spacing::{self, SigmaCurve},
    tensors,
};
use crate::Result;

config! {
    /// Options of `DPMSolverSinglestepScheduler`.
    DpmSolverSinglestepConfig {
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
        algorithm_type: Algorithm = Algorithm::DpmSolverPlusPlus,
        solver_type: Solver = Solver::Midpoint,
        lower_order_final: bool = false,
        use_karras_sigmas: bool = false,
        use_exponential_sigmas: bool = false,
        use_beta_sigmas: bool = false,
        use_flow_sigmas: bool = false,
        flow_shift: f64 = 1.0,
        final_sigmas_type: FinalSigmas = FinalSigmas::Zero,
        #[serde(serialize_with = "config::write_bound", deserialize_with = "config::read_bound")]
        lambda_min_clipped: f64 = f64::NEG_INFINITY,
        variance_type: Option<LearnedVariance> = None,
        use_dynamic_shifting: bool = false,
        time_shift_type: TimeShift = TimeShift::Exponential,
    }
}

/// `DPMSolverSinglestepScheduler`.
pub(super) struct DpmSolverSinglestep {
    config: DpmSolverSinglestepConfig,
    levels: NoiseLevels,
    /// Training timesteps that `lambda_min_clipped` leaves.
    unclipped: usize,
    limit: Limit,
    timesteps: Vec<f64>,
    sigmas: Vec<f32>,
    /// The order of the step at each position: 1 begins a group, 2 and 3 carry it on.
    orders: Vec<usize>,
    history: History,
    /// Where the current group began; f32.
    start: Option<Tensor>,
}

/// The orders of `steps` calls: groups 1, 2, 3 (or 1, 2), and with `lower_order_final` or a last step to
/// no noise a tail of lower order.
fn orders(steps: usize, order: usize, lower_order_final: bool, ends_at_zero: bool) -> Vec<usize> {
    let mut orders: Vec<usize> = (0..steps).map(|i| i % order + 1).collect();
    if ends_at_zero || (lower_order_final && steps.is_multiple_of(order)) {
        orders[steps - 1] = 1;
    }
    orders
}

impl DpmSolverSinglestep {
    fn level(&self, index: usize) -> Level {
        Level::new(self.sigmas[index], self.config.use_flow_sigmas)
    }

    fn schedule(&self, request: &TimestepRequest) -> Result<(Vec<f64>, Vec<f64>)> {
        let config = &self.config;
        let curve = SigmaCurve::chosen(config.use_karras_sigmas, config.use_exponential_sigmas, config.use_beta_sigmas);
        if let Some(timesteps) = &request.timesteps {
            if curve.is_some() || config.use_flow_sigmas {
                let reason = "cannot be given with this scheduler's sigma curve - switch that off";
                return Err(config::request_error("timesteps", reason));
            }
            let timesteps: Vec<f64> = timesteps.iter().map(|timestep| timestep.trunc()).collect();
            return Ok(self.levels.run(timesteps, None, None, None));
        }
        let (train, steps) = (config.num_train_timesteps, request.steps);
        spacing::check_steps(Self::CLASS, request, train)?;
        if let Some(curve) = curve {
            let (mut timesteps, sigmas) = exponential::on_curve(&self.levels, curve, steps, None, None);
            if curve == SigmaCurve::Karras {
                spacing::round(&mut timesteps);
            }
            return Ok((timesteps, sigmas));
        }
        if config.use_flow_sigmas {
            let shift = request.mu.filter(|_| config.use_dynamic_shifting).map_or(config.flow_shift, f64::exp);
            return Ok(exponential::flow_run(train, steps, shift));
        }
        let rising = numeric::linspace(0.0, self.unclipped as f64 - 1.0, steps + 1);
        let timesteps = rising[1..].iter().rev().map(|timestep| timestep.round_ties_even()).collect();
        Ok(self.levels.run(timesteps, None, None, None))
    }

    /// The first level of the current group's step and the differences of its outputs there.
    fn group(&self, order: usize, index: usize, to: Level) -> Result<(Level, Vec<Tensor>)> {
        let outputs = &self.history;
        let from = self.level(index + 1 - order);
        let span = to.lambda - from.lambda;
        let ratio = |i: usize| (self.level(i).lambda - from.lambda) / span;
        let differences = match order {
            1 => vec![outputs.ago(0).clone()],
            2 => vec![outputs.ago(1).clone(), quotient(outputs.ago(0), outputs.ago(1), ratio(index))?],
            _ => {
                let (r0, r1) = (ratio(index), ratio(index - 1));
                let near = quotient(outputs.ago(1), outputs.ago(2), r1)?;
                let far = quotient(outputs.ago(0), outputs.ago(2), r0)?;
                let start = outputs.ago(2).clone();
                if self.config.solver_type == Solver::Midpoint {
                    vec![start, far]
                } else {
                    let first = tensors::combine(&[(r0 / (r0 - r1), &near), (-r1 / (r0 - r1), &far)])?;
                    vec![start, first, tensors::scale(&(far - near)?, 2.0 / (r0 - r1))?]
                }
            }
        };
        Ok((from, differences))
    }
}

impl FromConfig for DpmSolverSinglestep {
    const CLASS: &'static str = "DPMSolverSinglestepScheduler";
    type Config = DpmSolverSinglestepConfig;

    fn from_config(config: Self::Config) -> Result<Self> {
        let algorithm = config.algorithm_type;
        if algorithm == Algorithm::SdeDpmSolver {
            let reason = "`sde-dpmsolver` is not possible here - choose `sde-dpmsolver++`";
            return Err(option_error(Self::CLASS, "algorithm_type", reason));
        }
        check_algorithm(
            Self::CLASS,
            algorithm,
            config.prediction_type,
            config.final_sigmas_type,
            config.use_flow_sigmas,
        )?;
        spacing::one_curve(
            Self::CLASS,
            config.use_karras_sigmas,
            config.use_exponential_sigmas,
            config.use_beta_sigmas,
        )?;
        check_order(Self::CLASS, config.solver_order, 3)?;
        let alphas_cumprod = beta_options!(Self::CLASS, config, false).alphas_cumprod()?;
        let (ratio, max) = (config.dynamic_thresholding_ratio, config.sample_max_value);
        Ok(Self {
            levels: NoiseLevels::new(&alphas_cumprod),
            unclipped: exponential::unclipped(&alphas_cumprod, config.lambda_min_clipped),
            limit: Limit::chosen(config.thresholding, ratio, max, false, 0.0),
            config,
            timesteps: Vec::new(),
            sigmas: Vec::new(),
            orders: Vec::new(),
            history: History::default(),
            start: None,
        })
    }
}

impl Scheduler for DpmSolverSinglestep {
    basics!(sigmas);

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<()> {
        spacing::refuse_custom(Self::CLASS, request, true, false)?;
        let (timesteps, sigmas) = self.schedule(request)?;
        let ends_at_zero = self.config.final_sigmas_type == FinalSigmas::Zero;
        let last = if ends_at_zero { 0.0 } else { self.levels.smallest() };
        self.orders = orders(timesteps.len(), self.config.solver_order, self.config.lower_order_final, ends_at_zero);
        self.sigmas = sigmas.into_iter().map(|sigma| sigma as f32).chain([last]).collect();
        self.timesteps = timesteps.into_iter().map(f64::trunc).collect();
        self.history.clear();
        self.start = None;
        Ok(())
    }

    fn step(
        &mut self,
        model_output: &Tensor,
        index: usize,
        sample: &Tensor,
        noise: &mut NoiseSource<'_>,
        _options: &StepOptions,
    ) -> Result<StepOutput> {
        check_index(index, &self.timesteps)?;
        let (output, sample) = (tensors::single(model_output)?, tensors::single(sample)?);
        let (algorithm, kind) = (self.config.algorithm_type, self.config.prediction_type);
        let learned =
            matches!(self.config.variance_type, Some(LearnedVariance::Learned | LearnedVariance::LearnedRange));
        let output = if learned && kind == PredictionType::Epsilon { output.narrow(1, 0, 3)? } else { output };
        let converted = convert(algorithm, kind, self.limit, &output, &sample, self.level(index))?;
        self.history.push(converted.clone(), self.config.solver_order);
        let fresh = if algorithm.is_stochastic() {
            Some(tensors::single(&noise(converted.dims(), model_output.dtype())?)?)
        } else {
            None
        };
        // A run that starts in the middle of a group starts a group of its own.
        let order = self.orders[index].min(self.history.len());
        let start = match (order, self.start.take()) {
            (1, _) | (_, None) => sample,
            (_, Some(start)) => start,
        };
        let to = self.level(index + 1);
        let (from, differences) = self.group(order, index, to)?;
        // The midpoint form of order 3 weighs its one difference as Heun's form does.
        let solver = if order == 3 { Solver::Heun } else { self.config.solver_type };
        let moved = Update::new(algorithm, solver, from, to).apply(&start, &differences, fresh.as_ref())?;
        self.start = Some(start);
        StepOutput::new(&moved, algorithm.predicts_original().then_some(&converted), model_output)
    }

    fn add_noise(&self, original: &Tensor, noise: &Tensor, index: usize) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        self.level(index).add_noise(original, noise)
    }

    fn accepts_timesteps(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::orders;

    #[test]
    fn the_last_group_is_cut_so_that_a_run_ends_with_order_one() {
        assert_eq!(orders(6, 3, true, true), [1, 2, 3, 1, 2, 1]);
        assert_eq!(orders(7, 3, true, true), [1, 2, 3, 1, 2, 3, 1]);
        assert_eq!(orders(8, 3, true, false), [1, 2, 3, 1, 2, 3, 1, 2]);
        assert_eq!(orders(8, 3, true, true), [1, 2, 3, 1, 2, 3, 1, 1]);
        assert_eq!(orders(4, 2, true, true), [1, 2, 1, 1]);
        assert_eq!(orders(5, 2, false, false), [1, 2, 1, 2, 1]);
        assert_eq!(orders(4, 2, false, false), [1, 2, 1, 2]);
        assert_eq!(orders(1, 3, false, true), [1]);
    }
}
