//! [`Backend`] for any [`GpuDevice`]: memory, transfers, and which commands run when.

use std::time::Duration;

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::Command;
use super::cards::{self, Card};
use super::choice::{self, Cache, Choice, Chosen, Key, Source};
use super::control::{self, Hyper, Run};
use super::cost;
use super::device::{Element, GpuDevice, LANES, Place};
use super::lower::{self, Program, Target};
use super::predict;
use super::prepared::{Prepared, Reservation};
use super::variants::{Expanded, Variants};
use crate::backend::{
    AdamStep, Backend, CommandMarks, Counters, Images, Mark, Output, Pass, Precision, Rgb, State,
    Work,
};
use crate::error::{Error, Result};
use crate::graph::passes::Rewrites;
use crate::graph::{Mode, Plan, Tensor};

/// Numbers of the command sequences that a device may record ([`GpuDevice::submit`]).
const FORWARD: u32 = 0;
const LABELS: u32 = 1;
const BACKWARD: u32 = 2;
const UPDATE: u32 = 3;
const FORWARD_RGB: u32 = 4;

/// Why 8-bit storage is refused.
const F32_BYTES: &str = "expanded=bytes: expected --precision f16, found f32; use --precision f16 or \
                         expanded=stored";

/// Training steps between two looks at the loss: some ten milliseconds of work each.
const LOSS_INTERVAL: usize = 16;

/// A backend over a GPU.
///
/// With [`Precision::F16`] activations, their gradients and the weights of matrix products are stored
/// in half precision, sums are f32; trained weights, their gradients, moments and statistics are f32.
pub struct GpuBackend<D> {
    device: D,
    precision: Precision,
    variants: Option<Variants>,
    /// Storage of expanded tensors, where the caller has decided.
    expanded: Option<Expanded>,
    /// Whether to record sequences, where the caller has decided.
    graphs: Option<bool>,
    /// Where to look for measured choices.
    cache: Option<Cache>,
    chosen: Option<Chosen>,
    prepared: Option<Prepared>,
    labels_computed: Option<Mark>,
}

impl<D: GpuDevice> GpuBackend<D> {
    /// A backend on an opened device.
    pub fn new(device: D, precision: Precision) -> Self {
        GpuBackend {
            // A device that does not record (by an environment variable) is not made to.
            graphs: (!device.records()).then_some(false),
            device,
            precision,
            variants: None,
            expanded: None,
            cache: None,
            chosen: None,
            prepared: None,
            labels_computed: None,
        }
    }

    /// The same with a fixed choice of kernels, for plans prepared from now on. Without it the
    /// variable `FPENET_VARIANTS` chooses, else a cache ([`Self::with_cache`]), else
    /// [`Variants::default`].
    pub fn with_variants(self, variants: Variants) -> Self {
        GpuBackend { variants: Some(variants), ..self }
    }

    /// The same with what was measured on this card before, or else the cost model's choice, where
    /// neither the caller nor the environment chooses.
    pub fn with_cache(self, cache: Cache) -> Self {
        GpuBackend { cache: Some(cache), ..self }
    }

    /// What a plan is to run with: the caller's choice, the environment's, what was measured, or the
    /// model's; how expanded tensors are kept is decided by itself.
    fn choice(&self, plan: &Plan, element: Element) -> Result<Chosen> {
        let mut chosen = self.chosen_kernels(plan, element)?;
        chosen.choice.variants.expanded = self.variants()?.expanded;
        Ok(chosen)
    }

    fn chosen_kernels(&self, plan: &Plan, element: Element) -> Result<Chosen> {
        let fixed = |variants: Variants, source: Source| Chosen {
            choice: Choice { variants, ..Choice::default() },
            source,
            warning: None,
        };
        if let Some(variants) = self.variants {
            return Ok(fixed(variants, Source::Given));
        }
        if let Some(variants) = Variants::from_env()? {
            return Ok(fixed(variants, Source::Environment));
        }
        let Some(cache) = &self.cache else {
            return Ok(fixed(Variants::default(), Source::Default));
        };
        let card = self.device.card();
        let card = card.unwrap_or_else(|| cards::nearest(self.device.capability()));
        let card = Card { shared_per_block: self.device.shared_memory_limit(), ..*card };
        let key = Key::new(self.device.identity(), plan, element);
        cache.choose(&key, || Ok(choice::by_model(plan, element, &card)?.0))
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The choice of kernels that is in force before a plan is looked at.
    fn variants(&self) -> Result<Variants> {
        let variants = match self.variants {
            Some(variants) => variants,
            None => Variants::from_env()?.unwrap_or_default(),
        };
        Ok(Variants { expanded: self.expanded.unwrap_or(variants.expanded), ..variants })
    }

    fn parts(&mut self) -> Result<(&mut D, &mut Prepared)> {
        match &mut self.prepared {
            Some(prepared) => Ok((&mut self.device, prepared)),
            None => Err(Error::Usage("the device has no plan: call prepare first".into())),
        }
    }

    fn release(&mut self) -> Result<()> {
        self.device.forget_sequences();
        let Some(prepared) = self.prepared.take() else { return Ok(()) };
        prepared.buffers.into_iter().try_for_each(|buffer| self.device.free(buffer))
    }

    /// Scores to labels, where the forward pass has not made them.
    fn run_labels(&mut self) -> Result<()> {
        match self.parts()?.1.program.labels.is_empty() {
            true => Ok(()),
            false => self.run(LABELS, |program| &program.labels),
        }
    }

    fn run(&mut self, sequence: u32, commands: fn(&Program) -> &[Command]) -> Result<()> {
        let (device, prepared) = self.parts()?;
        device.submit(sequence, commands(&prepared.program))
    }

    fn check_backward(&mut self, plan: &Plan) -> Result<()> {
        if plan.mode != Mode::Training {
            return Err(Error::Usage("backward needs a plan made for training".into()));
        }
        let prepared = self.parts()?.1;
        if prepared.labels_written {
            return Ok(());
        }
        Err(Error::Shape {
            node: "labels".into(),
            expected: format!("{} labels, written before the backward", prepared.pixels),
            found: "none".into(),
        })
    }

    /// Puts the setting of the next update in its place.
    fn set_update(&mut self, plan: &Plan, step: AdamStep) -> Result<()> {
        if plan.mode != Mode::Training {
            return Err(Error::Usage("an update needs a plan made for training".into()));
        }
        let (device, prepared) = self.parts()?;
        let hyper = Hyper::from(step);
        device.upload(Hyper::place(prepared.memory.control), bytemuck::bytes_of(&hyper))
    }

    /// Makes the stem read 8-bit RGB from now on, if it can, and says where that belongs.
    fn set_rgb(&mut self, plan: &Plan, rgb: &Rgb) -> Result<Option<Place>> {
        rgb.check(plan.input.shape)?;
        let (device, prepared) = self.parts()?;
        prepared.is_rgb = prepared.forward_rgb.is_some();
        let Some([values, normalisation]) = prepared.memory.rgb.filter(|_| prepared.is_rgb) else {
            return Ok(None);
        };
        let wanted = rgb.scale_and_shift();
        if prepared.normalisation != Some(wanted) {
            device.upload(normalisation.into(), bytemuck::bytes_of(&wanted))?;
            prepared.normalisation = Some(wanted);
        }
        Ok(Some(values.into()))
    }
}

fn run(device: &mut impl GpuDevice, command: &Command) -> Result<()> {
    match command {
        Command::Launch(launch) => device.launch(launch),
        Command::Gemm(gemm) => device.gemm(gemm),
    }
}

impl<D: GpuDevice> Backend for GpuBackend<D> {
    fn kind(&self) -> &'static str {
        self.device.kind()
    }

    fn describe(&self) -> String {
        self.device.describe()
    }

    fn rewrites(&self) -> Rewrites {
        // A wrong choice in the environment is reported by `prepare`.
        choice::rewrites(self.variants().unwrap_or_default())
    }

    fn prepare(&mut self, plan: &Plan) -> Result<()> {
        let training = plan.mode == Mode::Training;
        let element = Element::from(self.precision);
        if training && self.expanded == Some(Expanded::Bytes) {
            let text = "expanded=bytes: expected inference, found training; use expanded=stored";
            return Err(Error::Usage(text.into()));
        }
        let chosen = self.choice(plan, element)?;
        let variants = chosen.choice.variants;
        self.release()?;
        // Kernels load weights before they wait: in training an update may still be writing those.
        self.device.overlap_launches(variants.dependent_launch && !training);
        let graphs = self.graphs.unwrap_or(chosen.choice.graphs);
        if graphs != self.device.records() {
            self.device.use_graphs(graphs);
        }
        self.chosen = Some(chosen);
        let target = Target { element, shared_limit: self.device.shared_memory_limit(), variants };
        let mut reserved = Reservation::new(&mut self.device);
        let memory = reserved.memory(plan, target)?;
        let program = lower::lower(plan, &memory, target)?;
        reserved.load(&program)?;
        if variants.expanded == Expanded::Bytes && program.in_bytes == 0 {
            check_no_bytes(plan, element)?;
        }
        let (buffers, reserved_bytes) = reserved.keep();
        self.prepared = Some(Prepared {
            memory,
            buffers,
            forward_rgb: program.forward_rgb(),
            program,
            is_rgb: false,
            normalisation: None,
            element,
            arena_len: plan.arena_len,
            param_len: plan.param_len,
            trainable_len: plan.trainable_len,
            pixels: plan.input.shape.n * plan.input.shape.plane(),
            classes: plan.logits.shape.c,
            class_weights: Vec::new(),
            labels_written: false,
            reserved_bytes,
        });
        self.write_class_weights(&[])?;
        self.write_counters(Counters::default())
    }

    fn write_images(&mut self, plan: &Plan, images: &Images) -> Result<()> {
        match images {
            Images::Rgb(rgb) => match self.set_rgb(plan, rgb)? {
                Some(place) => self.device.upload(place, rgb.pixels),
                None => self.write(&plan.input, &rgb.normalise(plan.input.shape)),
            },
            Images::Normalised(values) => {
                self.parts()?.1.is_rgb = false;
                self.write(&plan.input, values)
            }
        }
    }

    fn lanes(&self) -> usize {
        LANES
    }

    fn launch(&mut self, plan: &Plan, lane: usize, images: &Images) -> Result<()> {
        let place = match images {
            Images::Rgb(rgb) => self.set_rgb(plan, rgb)?.map(|place| (place, rgb.pixels)),
            Images::Normalised(_) => None,
        };
        match place {
            Some((place, pixels)) => {
                self.device.send(lane, pixels)?;
                self.device.deliver(lane, place)?;
            }
            // Values in f32 are what tests and old callers pass: not worth a way of their own.
            None => self.write_images(plan, images)?,
        }
        self.forward(plan)?;
        self.run_labels()?;
        let (device, prepared) = self.parts()?;
        let (from, bytes) = prepared.result(plan);
        device.fetch(lane, from, bytes)
    }

    fn collect(&mut self, plan: &Plan, lane: usize, output: Output) -> Result<()> {
        let (device, prepared) = self.parts()?;
        match output {
            Output::Labels(labels) if plan.mode == Mode::Labels => device.receive(lane, labels),
            Output::Logits(logits) if plan.mode != Mode::Labels => {
                prepared.check_tensor(&plan.logits, logits.len())?;
                let mut bytes = vec![0; prepared.result(plan).1];
                device.receive(lane, &mut bytes)?;
                let image = plan.logits.shape.c * plan.logits.shape.plane();
                let stride = plan.logits.batch_stride * prepared.element.size();
                for (values, bytes) in logits.chunks_mut(image).zip(bytes.chunks(stride)) {
                    prepared.element.widen(bytes, values);
                }
                Ok(())
            }
            _ => Err(Error::Usage("labels come from a plan for labels, logits from others".into())),
        }
    }

    fn write(&mut self, tensor: &Tensor, data: &[f32]) -> Result<()> {
        let (device, prepared) = self.parts()?;
        prepared.check_tensor(tensor, data.len())?;
        let (images, len) = prepared.adjacent(tensor);
        for (i, values) in data.chunks(len).enumerate() {
            let place = prepared.image(tensor, i * images);
            match prepared.element {
                Element::F32 => device.upload(place, bytemuck::cast_slice(values))?,
                Element::F16 => device.upload_half(place, values)?,
            }
        }
        Ok(())
    }

    fn read(&mut self, tensor: &Tensor, out: &mut [f32]) -> Result<()> {
        let (device, prepared) = self.parts()?;
        prepared.check_tensor(tensor, out.len())?;
        let (images, len) = prepared.adjacent(tensor);
        let mut half = Vec::new();
        for (i, values) in out.chunks_mut(len).enumerate() {
            let place = prepared.image(tensor, i * images);
            match prepared.element {
                Element::F32 => device.download(place, bytemuck::cast_slice_mut(values))?,
                Element::F16 => {
                    half.resize(values.len(), f16::ZERO);
                    device.download(place, bytemuck::cast_slice_mut(&mut half))?;
                    half.convert_to_f32_slice(values);
                }
            }
        }
        Ok(())
    }

    fn write_state(&mut self, state: State, data: &[f32]) -> Result<()> {
        let (device, prepared) = self.parts()?;
        let buffer = prepared.check_state(state, data.len())?;
        device.upload(buffer.into(), bytemuck::cast_slice(data))?;
        match prepared.memory.params_half {
            Some(half) if state == State::Params => device.upload_half(half.into(), data),
            _ => Ok(()),
        }
    }

    fn read_state(&mut self, state: State, out: &mut [f32]) -> Result<()> {
        let (device, prepared) = self.parts()?;
        let buffer = prepared.check_state(state, out.len())?;
        device.download(buffer.into(), bytemuck::cast_slice_mut(out))
    }

    fn write_labels(&mut self, labels: &[u8]) -> Result<()> {
        let (device, prepared) = self.parts()?;
        let inverse = prepared.inverse_total(labels)?;
        device.upload(prepared.memory.labels.into(), labels)?;
        device.upload(control::inverse_total(prepared.memory.control), &inverse.to_ne_bytes())?;
        prepared.labels_written = true;
        Ok(())
    }

    fn write_class_weights(&mut self, weights: &[f32]) -> Result<()> {
        let (device, prepared) = self.parts()?;
        prepared.class_weights = weights.to_vec();
        let all = control::all_weights(weights);
        let place = control::class_weights(prepared.memory.control);
        device.upload(place, bytemuck::cast_slice(&all))
    }

    fn within_another(&self, index: usize) -> bool {
        self.prepared.as_ref().is_some_and(|prepared| prepared.program.step(index).is_empty())
    }

    fn forward_step(&mut self, _plan: &Plan, index: usize) -> Result<()> {
        let (device, prepared) = self.parts()?;
        let commands = prepared.step(index);
        commands.iter().try_for_each(|command| run(device, command))
    }

    fn run_marked(&mut self, plan: &Plan, pass: Pass) -> Result<Vec<CommandMarks>> {
        match pass {
            Pass::Forward => {}
            Pass::Backward => self.check_backward(plan)?,
            Pass::Update(step) => self.set_update(plan, step)?,
        }
        let (device, prepared) = self.parts()?;
        let program = &prepared.program;
        let commands: Vec<(&Command, Option<usize>)> = match pass {
            Pass::Forward => (0..program.step_ends.len())
                .flat_map(|i| prepared.step(i).iter().map(move |command| (command, Some(i))))
                .collect(),
            Pass::Backward => {
                let commands = program.backward.iter().enumerate();
                commands.map(|(i, command)| (command, program.backward_step(i))).collect()
            }
            Pass::Update(_) => program.update.iter().map(|command| (command, None)).collect(),
        };
        let mut begun = device.mark()?;
        let marked = |(command, step): (&Command, Option<usize>)| {
            run(device, command)?;
            let done = device.mark()?;
            let kernel = command.kernel().unwrap_or("gemm");
            let marks = CommandMarks { kernel, step, begun, done };
            begun = done;
            Ok(marks)
        };
        commands.into_iter().map(marked).collect()
    }

    fn forward(&mut self, _plan: &Plan) -> Result<()> {
        let (device, prepared) = self.parts()?;
        match &prepared.forward_rgb {
            Some(commands) if prepared.is_rgb => device.submit(FORWARD_RGB, commands),
            _ => device.submit(FORWARD, &prepared.program.forward),
        }
    }

    fn read_labels(&mut self, plan: &Plan, out: &mut [u8]) -> Result<()> {
        if plan.mode != Mode::Labels {
            return Err(Error::Usage("labels need a plan made for labels".into()));
        }
        let pixels = self.parts()?.1.pixels;
        if out.len() != pixels {
            return Err(Error::Shape {
                node: "labels".into(),
                expected: format!("{pixels} labels"),
                found: format!("{}", out.len()),
            });
        }
        self.run_labels()?;
        self.labels_computed = Some(self.device.mark()?);
        let (device, prepared) = self.parts()?;
        device.download(prepared.memory.labels.into(), out)
    }

    fn backward(&mut self, plan: &Plan) -> Result<()> {
        self.check_backward(plan)?;
        self.run(BACKWARD, |program| &program.backward)
    }

    fn counters(&mut self) -> Result<Counters> {
        let (device, prepared) = self.parts()?;
        let mut run: Run = bytemuck::Zeroable::zeroed();
        device.download(Run::place(prepared.memory.control), bytemuck::bytes_of_mut(&mut run))?;
        Ok(run.counters())
    }

    fn write_counters(&mut self, counters: Counters) -> Result<()> {
        let (device, prepared) = self.parts()?;
        let run = Run::from(counters);
        device.upload(Run::place(prepared.memory.control), bytemuck::bytes_of(&run))
    }

    fn loss_interval(&self) -> usize {
        LOSS_INTERVAL
    }

    fn adam(&mut self, plan: &Plan, step: AdamStep) -> Result<()> {
        self.set_update(plan, step)?;
        self.run(UPDATE, |program| &program.update)
    }

    fn synchronize(&mut self) -> Result<()> {
        self.device.synchronize()
    }

    fn mark(&mut self) -> Result<Mark> {
        self.device.mark()
    }

    fn between(&mut self, from: Mark, to: Mark) -> Result<Duration> {
        self.device.between(from, to)
    }

    fn labels_computed(&self) -> Option<Mark> {
        self.labels_computed
    }

    fn work(&self, plan: &Plan) -> Option<Work> {
        let prepared = self.prepared.as_ref()?;
        let costs = cost::forward(plan, &prepared.program, prepared.element);
        let gemms = costs.iter().filter(|cost| cost.kernel == "gemm").count();
        let card = self.device.card();
        Some(Work {
            launches: cost::launches(&costs) - gemms,
            gemms,
            replayed: self.device.records(),
            bytes: costs.iter().map(|cost| cost.bytes + cost.again).sum(),
            flops: costs.iter().map(|cost| cost.flops).sum(),
            roofline_seconds: card.map(|card| predict::total(&costs, card, true).roofline),
            reserved_bytes: prepared.reserved_bytes as u64,
        })
    }

    fn keep_expanded(&mut self, expanded: Expanded) -> Result<()> {
        if expanded == Expanded::Bytes && self.precision == Precision::F32 {
            return Err(Error::Usage(F32_BYTES.into()));
        }
        self.expanded = Some(expanded);
        Ok(())
    }

    fn use_graphs(&mut self, on: bool) {
        self.graphs = Some(on);
        self.device.use_graphs(on);
    }

    fn choose(&mut self, choice: Choice) {
        self.variants = Some(choice.variants);
        self.use_graphs(choice.graphs);
    }

    fn chosen(&self) -> Option<&Chosen> {
        self.chosen.as_ref()
    }

    fn tuning_key(&self, plan: &Plan) -> Option<Key> {
        Some(Key::new(self.device.identity(), plan, self.precision.into()))
    }
}

/// Refuses a plan that was to have expanded tensors in 8 bits and has none, but for one that was not
/// made for it: a step by itself, a training plan.
fn check_no_bytes(plan: &Plan, element: Element) -> Result<()> {
    let with_scales = plan.steps.iter().any(|step| step.byte_scale.is_some());
    match element {
        _ if !with_scales => Ok(()),
        Element::F32 => Err(Error::Usage(F32_BYTES.into())),
        Element::F16 => Err(Error::Usage(
            "expanded=bytes: expected blocks of 32 or 64 channels with dilations of 1 or even, \
             pairs=fused and cascade=stored or ahead, found none; use expanded=stored"
                .into(),
        )),
    }
}
