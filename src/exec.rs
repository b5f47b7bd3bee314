//! Executors: [`Inference`] and [`Training`] tie a graph, a plan and a backend together.

use crate::backend::{AdamStep, Backend, State};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::graph::passes::{self, Rewrites};
use crate::graph::{Graph, Mode, ParamStore, Plan, Shape};
use crate::model::Model;

/// A model ready to run on one device for inputs of one shape.
pub struct Inference {
    plan: Plan,
    backend: Box<dyn Backend>,
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
        if mode == Mode::Training {
            return Err(Error::Usage("inference cannot run a training plan".into()));
        }
        let graph = Graph::fpenet(&model.config)?;
        // The rewrites leave no decoder to inspect.
        let rewrites = if mode == Mode::Inspect { Rewrites::NONE } else { backend.rewrites() };
        let (graph, params) = passes::for_inference_with(&graph, &model.params, rewrites);
        let plan = Plan::new(&graph, (n, h, w), mode, backend.layout())?;
        backend.prepare(&plan)?;
        backend.write_state(State::Params, &params.values)?;
        Ok(Inference { plan, backend })
    }

    /// Runs the network on a normalised image batch, dense NCHW.
    ///
    /// # Errors
    /// [`Error::Shape`] for an input of another length, or what the device says.
    pub fn run(&mut self, input: &[f32]) -> Result<()> {
        self.backend.write(&self.plan.input, input)?;
        self.backend.forward(&self.plan)?;
        self.backend.synchronize()
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

    /// [`Training::gradients`], then one Adam update.
    ///
    /// # Errors
    /// As [`Training::gradients`].
    pub fn step(&mut self, input: &[f32], labels: &[u8], adam: AdamStep) -> Result<f32> {
        self.launch(input, labels)?;
        self.update(adam)?;
        self.backend.loss()
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

    /// Puts parameters, and moments if given, on the device.
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
}
