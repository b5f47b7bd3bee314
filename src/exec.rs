//! Executors: [`Inference`] and [`Training`] tie a graph, a plan and a backend together.

use crate::backend::{AdamStep, Backend, CommandMarks, Counters, Images, Output, Pass, Rgb, State};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::graph::passes::{self, Rewrites};
use crate::graph::{Graph, Mode, ParamStore, Plan, PlaneLayout, Shape};
use crate::model::Model;

/// Folds and fuses a model's graph as a device wants it, and plans its memory for n x 3 x h x w;
/// returns the parameters that the plan refers to as well.
///
/// # Errors
/// [`Error::Usage`] for an unusable size or mode.
pub fn plan_inference(
    model: &Model,
    (layout, rewrites): (PlaneLayout, Rewrites),
    size: (usize, usize, usize),
    mode: Mode,
) -> Result<(Plan, ParamStore)> {
    if mode == Mode::Training {
        return Err(Error::Usage("inference cannot run a training plan".into()));
    }
    let graph = Graph::fpenet(&model.config)?;
    let rewrites = match mode {
        // The others leave no decoder to inspect.
        Mode::Inspect => Rewrites { byte_scales: rewrites.byte_scales, ..Rewrites::NONE },
        _ => rewrites,
    };
    let (graph, params) = passes::for_inference_with(&graph, &model.params, rewrites);
    Ok((Plan::new(&graph, size, mode, layout)?, params))
}

/// A model ready to run on one device for inputs of one shape.
pub struct Inference {
    plan: Plan,
    backend: Box<dyn Backend>,
    mean: [f32; 3],
    std: [f32; 3],
    /// Batches launched and collected so far; a batch's lane is its number modulo the lanes.
    launched: usize,
    collected: usize,
}

impl Inference {
    /// Folds and fuses the model's graph, plans its memory for n x 3 x h x w and moves the
    /// weights to the device.
    ///
    /// # Errors
    /// [`Error::Usage`] for an unusable size or mode, or what the device says.
    pub fn new(
        model: &Model,
        mut backend: Box<dyn Backend>,
        n: usize,
        h: usize,
        w: usize,
        mode: Mode,
    ) -> Result<Self> {
        let wanted = (backend.layout(), backend.rewrites());
        let (plan, params) = plan_inference(model, wanted, (n, h, w), mode)?;
        backend.prepare(&plan)?;
        backend.write_state(State::Params, &params.values)?;
        let (mean, std) = (model.mean, model.std);
        Ok(Inference { plan, backend, mean, std, launched: 0, collected: 0 })
    }

    /// Runs the network on a normalised image batch, dense NCHW.
    ///
    /// # Errors
    /// [`Error::Shape`] for an input of another length, or what the device says.
    pub fn run(&mut self, input: &[f32]) -> Result<()> {
        self.run_images(&Images::Normalised(input))
    }

    /// Runs the network on 8-bit RGB, N x H x W x 3, normalised by the model's mean and deviation on
    /// its way into the stem.
    ///
    /// # Errors
    /// As [`Inference::run`].
    pub fn run_rgb(&mut self, pixels: &[u8]) -> Result<()> {
        self.run_images(&Images::Rgb(Rgb { pixels, mean: self.mean, std: self.std }))
    }

    fn run_images(&mut self, images: &Images) -> Result<()> {
        if self.in_flight() > 0 {
            return Err(Error::Usage("inference: collect what was launched before a run".into()));
        }
        self.backend.write_images(&self.plan, images)?;
        self.backend.forward(&self.plan)?;
        self.backend.synchronize()
    }

    /// Starts the network on 8-bit RGB as [`Inference::run_rgb`] takes it, and returns while a GPU
    /// still works: the next batch can be launched meanwhile, up to [`Inference::has_room`]. Results
    /// are collected in the order of the launches.
    ///
    /// # Errors
    /// [`Error::Usage`] without room, [`Error::Shape`] for another number of bytes, or what the device
    /// says.
    pub fn launch_rgb(&mut self, pixels: &[u8]) -> Result<()> {
        if !self.has_room() {
            let lanes = self.backend.lanes();
            return Err(Error::Usage(format!(
                "inference: expected at most {lanes} batches under way, found another; collect first"
            )));
        }
        let lane = self.launched % self.backend.lanes();
        let images = Images::Rgb(Rgb { pixels, mean: self.mean, std: self.std });
        self.backend.launch(&self.plan, lane, &images)?;
        self.launched += 1;
        Ok(())
    }

    /// Batches launched and not yet collected.
    pub fn in_flight(&self) -> usize {
        self.launched - self.collected
    }

    /// Whether another batch can be launched before one is collected.
    pub fn has_room(&self) -> bool {
        self.in_flight() < self.backend.lanes()
    }

    /// Waits for the oldest launch; class per pixel as [`Inference::labels`].
    ///
    /// # Errors
    /// [`Error::Usage`] where nothing was launched or the plan is not for labels, [`Error::Shape`]
    /// for an output of another length, or what the device says.
    pub fn collect_labels(&mut self, out: &mut [u8]) -> Result<()> {
        self.collect(Output::Labels(out))
    }

    /// Waits for the oldest launch; logits as [`Inference::logits`].
    ///
    /// # Errors
    /// [`Error::Usage`] where nothing was launched or the plan is for labels, or what the device says.
    pub fn collect_logits(&mut self) -> Result<Vec<f32>> {
        let mut out = vec![0.0; self.plan.logits.shape.len()];
        self.collect(Output::Logits(&mut out))?;
        Ok(out)
    }

    fn collect(&mut self, output: Output) -> Result<()> {
        if self.in_flight() == 0 {
            return Err(Error::Usage("inference: expected a launch to collect, found none".into()));
        }
        if matches!(output, Output::Labels(_)) != (self.plan.mode == Mode::Labels) {
            return Err(Error::Usage(
                "inference: a plan for labels gives labels, any other logits".into(),
            ));
        }
        let lane = self.collected % self.backend.lanes();
        // Also after an error: it belongs to this batch.
        self.collected += 1;
        self.backend.collect(&self.plan, lane, output)
    }

    /// Logits at the input's resolution, N x C x H x W; not with [`Mode::Labels`].
    ///
    /// # Errors
    /// [`Error::Usage`] with [`Mode::Labels`], or what the device says.
    pub fn logits(&mut self) -> Result<Vec<f32>> {
        if self.plan.mode == Mode::Labels {
            return Err(Error::Usage("logits are not computed by a plan for labels".into()));
        }
        let mut out = vec![0.0; self.plan.logits.shape.len()];
        self.backend.read(&self.plan.logits, &mut out)?;
        Ok(out)
    }

    /// Class per pixel at the input's resolution, N x H x W; only with [`Mode::Labels`].
    ///
    /// # Errors
    /// [`Error::Usage`] in other modes, [`Error::Shape`] for an output of another length.
    pub fn labels(&mut self, out: &mut [u8]) -> Result<()> {
        if self.plan.mode != Mode::Labels {
            return Err(Error::Usage("labels are computed by a plan for labels only".into()));
        }
        self.backend.read_labels(&self.plan, out)
    }

    /// The SPEC's named intermediates after the last run, dense NCHW; only with
    /// [`Mode::Inspect`].
    ///
    /// # Errors
    /// What the device says.
    pub fn intermediates(&mut self) -> Result<Vec<(String, Shape, Vec<f32>)>> {
        let mut all = Vec::new();
        for (name, tensor) in &self.plan.named {
            let mut values = vec![0.0; tensor.shape.len()];
            self.backend.read(tensor, &mut values)?;
            all.push((name.clone(), tensor.shape, values));
        }
        Ok(all)
    }

    /// The plan in use.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The device in use.
    pub fn backend(&self) -> &dyn Backend {
        self.backend.as_ref()
    }

    /// Plan and device, for profiles that run step by step.
    pub fn parts(&mut self) -> (&Plan, &mut dyn Backend) {
        (&self.plan, self.backend.as_mut())
    }
}

/// A network in training on one device, for batches of one shape.
pub struct Training {
    plan: Plan,
    backend: Box<dyn Backend>,
}

impl Training {
    /// Plans forward and backward for batches of n x 3 x h x w and moves `params` to the device;
    /// Adam's moments start at zero.
    ///
    /// # Errors
    /// [`Error::Usage`] for an invalid configuration or size, or what the device says.
    pub fn new(
        config: &ModelConfig,
        params: &ParamStore,
        mut backend: Box<dyn Backend>,
        n: usize,
        h: usize,
        w: usize,
    ) -> Result<Self> {
        let graph = passes::for_training(&Graph::fpenet(config)?);
        let plan = Plan::new(&graph, (n, h, w), Mode::Training, backend.layout())?;
        backend.prepare(&plan)?;
        let mut training = Training { plan, backend };
        training.restore(params, None)?;
        Ok(training)
    }

    /// Forward with batch statistics (which updates the running statistics), loss and backward,
    /// without an update. `input` is dense NCHW, `labels` N x H x W with 255 for void.
    /// Returns the mean cross-entropy over labelled pixels.
    ///
    /// # Errors
    /// [`Error::Shape`] for arrays of the wrong length, or what the device says.
    pub fn gradients(&mut self, input: &[f32], labels: &[u8]) -> Result<f32> {
        self.launch(input, labels)?;
        self.backend.loss()
    }

    /// [`Training::gradients`] (input N x 3 x H x W, normalised; labels N x H x W, 255 ignored), then one
    /// Adam update (paper, section 4.1). On a device that works beside the host nothing
    /// is waited for: [`Training::counters`] tells of the loss when it is wanted.
    ///
    /// # Errors
    /// As [`Training::gradients`].
    pub fn step(&mut self, input: &[f32], labels: &[u8], adam: AdamStep) -> Result<()> {
        self.launch(input, labels)?;
        self.update(adam)
    }

    /// [`Training::step`] with a mark between any two commands: those of forward, backward and update.
    /// Waits for nothing.
    ///
    /// # Errors
    /// As [`Training::gradients`].
    pub fn step_marked(
        &mut self,
        input: &[f32],
        labels: &[u8],
        adam: AdamStep,
    ) -> Result<[Vec<CommandMarks>; 3]> {
        self.backend.write(&self.plan.input, input)?;
        self.backend.write_labels(labels)?;
        Ok([
            self.backend.run_marked(&self.plan, Pass::Forward)?,
            self.backend.run_marked(&self.plan, Pass::Backward)?,
            self.backend.run_marked(&self.plan, Pass::Update(adam))?,
        ])
    }

    /// Losses and loss scaling so far; waits for the device.
    ///
    /// # Errors
    /// What the device says.
    pub fn counters(&mut self) -> Result<Counters> {
        self.backend.counters()
    }

    /// Sets where losses and loss scaling stand.
    ///
    /// # Errors
    /// What the device says.
    pub fn set_counters(&mut self, counters: Counters) -> Result<()> {
        self.backend.write_counters(counters)
    }

    /// Sets the weight of each class in the loss, C values, which are all 1 otherwise: the loss is then
    /// the weighted mean, sum of w_t times the cross-entropy over sum of w_t.
    ///
    /// # Errors
    /// [`Error::Usage`] for another number of weights, or one that is negative or not finite; what the
    /// device says.
    pub fn set_class_weights(&mut self, weights: &[f32]) -> Result<()> {
        let classes = self.plan.logits.shape.c;
        let usable = |w: &f32| w.is_finite() && *w >= 0.0;
        if weights.len() != classes || !weights.iter().all(usable) {
            return Err(Error::Usage(format!(
                "class weights: expected {classes} finite values, none negative, found {weights:?}"
            )));
        }
        self.backend.write_class_weights(weights)
    }

    fn launch(&mut self, input: &[f32], labels: &[u8]) -> Result<()> {
        self.backend.write(&self.plan.input, input)?;
        self.backend.write_labels(labels)?;
        self.backend.forward(&self.plan)?;
        self.backend.backward(&self.plan)
    }

    /// One Adam update from the gradients at hand.
    ///
    /// # Errors
    /// What the device says.
    pub fn update(&mut self, adam: AdamStep) -> Result<()> {
        self.backend.adam(&self.plan, adam)
    }

    /// Parameters and running statistics.
    ///
    /// # Errors
    /// What the device says.
    pub fn params(&mut self) -> Result<ParamStore> {
        let mut store = ParamStore::zeros(&self.plan.params);
        self.backend.read_state(State::Params, &mut store.values)?;
        Ok(store)
    }

    /// Gradients of the trainable parameters; entries of running statistics are 0.
    ///
    /// # Errors
    /// What the device says.
    pub fn grads(&mut self) -> Result<ParamStore> {
        let mut store = ParamStore::zeros(&self.plan.params);
        let trainable = &mut store.values[..self.plan.trainable_len];
        self.backend.read_state(State::Grads, trainable)?;
        Ok(store)
    }

    /// Adam's first and second moment, each of the trainable length.
    ///
    /// # Errors
    /// What the device says.
    pub fn moments(&mut self) -> Result<(Vec<f32>, Vec<f32>)> {
        let mut first = vec![0.0; self.plan.trainable_len];
        let mut second = first.clone();
        self.backend.read_state(State::Moment1, &mut first)?;
        self.backend.read_state(State::Moment2, &mut second)?;
        Ok((first, second))
    }

    /// Puts parameters, and moments (of the parameters' length each) if given, on the device.
    ///
    /// # Errors
    /// [`Error::Shape`] for vectors of another network.
    pub fn restore(
        &mut self,
        params: &ParamStore,
        moments: Option<(&[f32], &[f32])>,
    ) -> Result<()> {
        self.backend.write_state(State::Params, &params.values)?;
        if let Some((first, second)) = moments {
            self.backend.write_state(State::Moment1, first)?;
            self.backend.write_state(State::Moment2, second)?;
        }
        Ok(())
    }

    /// The plan in use.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The device in use.
    pub fn backend(&self) -> &dyn Backend {
        self.backend.as_ref()
    }

    /// Plan and device, for profiles.
    pub fn parts(&mut self) -> (&Plan, &mut dyn Backend) {
        (&self.plan, self.backend.as_mut())
    }
}
