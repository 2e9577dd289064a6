//! DPM-Solver++ and its relatives as multistep methods: one model call for each step, earlier outputs
//! reused (Lu et al. 2022b, algorithm 2).

use candle_core::{DType, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    NoiseSource, Scheduler, StepOptions, StepOutput, TimestepRequest,
    alphas::Limit,
    basics,
    betas::{BetaSchedule, beta_options},
    check_index,
    config::{self, FinalSigmas, PredictionType, TimestepSpacing, config, option_error},
    dpm_solver::{Algorithm, Multistep, Solver, check_order},
    exponential::{self, History, Level},
    flow::TimeShift,
    levels::NoiseLevels,
    numeric,
    registry::FromConfig,
    spacing::{self, SigmaCurve},
    tensors,
};
use crate::Result;

/// What else than a prediction the model's output holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum LearnedVariance {
    /// Variances, in the channels after the third.
    Learned,
    /// Where variances lie in their range, in the channels after the third.
    LearnedRange,
    /// Nothing; names of another class's variances count as this.
    #[serde(other)]
    None,
}

config! {
    /// Options of `DPMSolverMultistepScheduler`.
    DpmSolverMultistepConfig {
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
        lower_order_final: bool = true,
        euler_at_final: bool = false,
        use_karras_sigmas: bool = false,
        use_exponential_sigmas: bool = false,
        use_beta_sigmas: bool = false,
        use_lu_lambdas: bool = false,
        use_flow_sigmas: bool = false,
        flow_shift: f64 = 1.0,
        final_sigmas_type: FinalSigmas = FinalSigmas::Zero,
        #[serde(serialize_with = "config::write_bound", deserialize_with = "config::read_bound")]
        lambda_min_clipped: f64 = f64::NEG_INFINITY,
        variance_type: Option<LearnedVariance> = None,
        timestep_spacing: TimestepSpacing = TimestepSpacing::Linspace,
        steps_offset: i64 = 0,
        rescale_betas_zero_snr: bool = false,
        use_dynamic_shifting: bool = false,
        time_shift_type: TimeShift = TimeShift::Exponential,
    }
}

/// `DPMSolverMultistepScheduler`.
pub(super) struct DpmSolverMultistep {
    config: DpmSolverMultistepConfig,
    levels: NoiseLevels,
    /// Training timesteps that `lambda_min_clipped` leaves.
    unclipped: usize,
    limit: Limit,
    timesteps: Vec<f64>,
    sigmas: Vec<f32>,
    run: Multistep,
}

impl DpmSolverMultistep {
    fn level(&self, index: usize) -> Level {
        Level::new(self.sigmas[index], self.config.use_flow_sigmas)
    }

    fn curve(&self) -> Option<SigmaCurve> {
        let config = &self.config;
        SigmaCurve::chosen(config.use_karras_sigmas, config.use_exponential_sigmas, config.use_beta_sigmas)
    }

    /// Timesteps and sigmas of a run, without the final sigma.
    fn schedule(&self, request: &TimestepRequest) -> Result<(Vec<f64>, Vec<f64>)> {
        let config = &self.config;
        if let Some(timesteps) = &request.timesteps {
            if self.curve().is_some() || config.use_lu_lambdas || config.use_flow_sigmas {
                let reason = "cannot be given with this scheduler's sigma curve - switch that off";
                return Err(config::request_error("timesteps", reason));
            }
            let timesteps: Vec<f64> = timesteps.iter().map(|timestep| timestep.trunc()).collect();
            return Ok(self.levels.run(timesteps, None, None, None));
        }
        let (train, steps) = (config.num_train_timesteps, request.steps);
        spacing::check_steps(Self::CLASS, request, train)?;
        // Curves that the timesteps are rounded on, unless the training schedule is a cosine.
        let round = |(mut timesteps, sigmas): (Vec<f64>, Vec<f64>)| {
            if config.beta_schedule != BetaSchedule::SquaredcosCapV2 {
                spacing::round(&mut timesteps);
            }
            (timesteps, sigmas)
        };
        Ok(match self.curve() {
            Some(curve @ SigmaCurve::Karras) => round(exponential::on_curve(&self.levels, curve, steps, None, None)),
            _ if config.use_lu_lambdas => round(self.lu_schedule(steps)),
            Some(curve) => exponential::on_curve(&self.levels, curve, steps, None, None),
            None if config.use_flow_sigmas => {
                let shift = request.mu.filter(|_| config.use_dynamic_shifting).map_or(config.flow_shift, f64::exp);
                exponential::flow_run(train, steps, shift)
            }
            None => {
                let (spacing, offset) = (config.timestep_spacing, config.steps_offset);
                let timesteps = exponential::timesteps(spacing, train, self.unclipped, steps, offset);
                self.levels.run(timesteps, None, None, None)
            }
        })
    }

    /// Evenly spaced logarithms: Lu et al.'s schedule with rho 1, which is what the reference computes.
    fn lu_schedule(&self, steps: usize) -> (Vec<f64>, Vec<f64>) {
        let (largest, smallest) = self.levels.log_range();
        let sigmas: Vec<f64> = numeric::linspace(0.0, 1.0, steps)
            .into_iter()
            .map(|x| (largest + x * (smallest - largest)).exp())
            .collect();
        (sigmas.iter().map(|&sigma| self.levels.timestep_of(sigma)).collect(), sigmas)
    }

    /// What the algorithm integrates, from the model's output.
    fn converted(&self, output: &Tensor, sample: &Tensor, level: Level) -> Result<Tensor> {
        let kind = self.config.prediction_type;
        let learned =
            matches!(self.config.variance_type, Some(LearnedVariance::Learned | LearnedVariance::LearnedRange));
        let output = if learned && kind == PredictionType::Epsilon { &output.narrow(1, 0, 3)? } else { output };
        convert(self.config.algorithm_type, kind, self.limit, output, sample, level)
    }
}

/// The clean sample or the noise, as `algorithm` needs it, kept in range. All f32.
pub(super) fn convert(
    algorithm: Algorithm,
    kind: PredictionType,
    limit: Limit,
    output: &Tensor,
    sample: &Tensor,
    level: Level,
) -> Result<Tensor> {
    if algorithm.predicts_original() {
        return limit.apply(level.original(kind, output, sample)?);
    }
    let epsilon = level.epsilon(kind, output, sample)?;
    match limit {
        Limit::Free => Ok(epsilon),
        limit => {
            let original = limit.apply(level.original(PredictionType::Epsilon, &epsilon, sample)?)?;
            level.noise_between(&original, sample)
        }
    }
}

/// Refuses combinations of algorithm and options that give no numbers.
pub(super) fn check_algorithm(
    class: &'static str,
    algorithm: Algorithm,
    kind: PredictionType,
    last: FinalSigmas,
    flow: bool,
) -> Result<()> {
    use PredictionType::{Epsilon, FlowPrediction, Sample, VPrediction};
    if algorithm.predicts_original() {
        return kind.one_of(class, &[Epsilon, Sample, VPrediction, FlowPrediction]);
    }
    kind.one_of(class, &[Epsilon, Sample, VPrediction])?;
    if flow {
        let reason = "cannot be combined with `use_flow_sigmas` - use `dpmsolver++`";
        return Err(option_error(class, "algorithm_type", reason));
    }
    if last == FinalSigmas::Zero {
        let reason = "`zero` is not possible when the noise is integrated - choose `sigma_min`, or `dpmsolver++` as `algorithm_type`";
        return Err(option_error(class, "final_sigmas_type", reason));
    }
    Ok(())
}

impl FromConfig for DpmSolverMultistep {
    const CLASS: &'static str = "DPMSolverMultistepScheduler";
    type Config = DpmSolverMultistepConfig;

    fn from_config(config: Self::Config) -> Result<Self> {
        let algorithm = config.algorithm_type;
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
        check_order(Self::CLASS, config.solver_order, if algorithm == Algorithm::SdeDpmSolver { 2 } else { 3 })?;
        let alphas_cumprod = beta_options!(Self::CLASS, config).positive_alphas_cumprod()?;
        let (ratio, max) = (config.dynamic_thresholding_ratio, config.sample_max_value);
        let run = Multistep {
            algorithm,
            solver: config.solver_type,
            order: config.solver_order,
            lower_order_final: config.lower_order_final,
            first_order_last: config.euler_at_final || config.final_sigmas_type == FinalSigmas::Zero,
            history: History::default(),
        };
        Ok(Self {
            levels: NoiseLevels::new(&alphas_cumprod),
            unclipped: exponential::unclipped(&alphas_cumprod, config.lambda_min_clipped),
            limit: Limit::chosen(config.thresholding, ratio, max, false, 0.0),
            config,
            timesteps: Vec::new(),
            sigmas: Vec::new(),
            run,
        })
    }
}

impl Scheduler for DpmSolverMultistep {
    basics!(sigmas);

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<()> {
        spacing::refuse_custom(Self::CLASS, request, true, false)?;
        let (timesteps, sigmas) = self.schedule(request)?;
        let last = match self.config.final_sigmas_type {
            FinalSigmas::Zero => 0.0,
            FinalSigmas::SigmaMin => self.levels.smallest(),
        };
        self.sigmas = sigmas.into_iter().map(|sigma| sigma as f32).chain([last]).collect();
        self.timesteps = timesteps.into_iter().map(f64::trunc).collect();
        self.run.history.clear();
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
        let converted = self.converted(&output, &sample, self.level(index))?;
        let algorithm = self.config.algorithm_type;
        let fresh = algorithm.is_stochastic().then(|| noise(converted.dims(), DType::F32)).transpose()?;
        let (sigmas, flow) = (&self.sigmas, self.config.use_flow_sigmas);
        let position = (index, self.timesteps.len());
        let level = |i: usize| Level::new(sigmas[i], flow);
        let moved = self.run.step(converted.clone(), &sample, position, level, fresh.as_ref())?;
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
