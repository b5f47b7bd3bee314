//! [`Backend`] for any [`GpuDevice`]: memory, transfers, and which commands run when.

use half::f16;

use super::device::{Buffer, Element, GpuDevice, Place};
use super::lower::{self, Memory, Program, Target, args};
use super::variants::Variants;
use super::{Command, launch};
use crate::backend::{AdamStep, Backend, Precision, State};
use crate::error::{Error, Result};
use crate::graph::{Mode, Plan, Tensor};

/// Numbers of the command sequences that a device may record ([`GpuDevice::submit`]).
const FORWARD: u32 = 0;
const LABELS: u32 = 1;
const BACKWARD: u32 = 2;

/// A backend over a GPU.
///
/// With [`Precision::F16`] inference stores activations and the weights of matrix products in half
/// precision and computes in f32; training stores f32 in either case.
pub struct GpuBackend<D> {
    device: D,
    precision: Precision,
    variants: Option<Variants>,
    prepared: Option<Prepared>,
}

/// Memory and commands of the plan at hand.
struct Prepared {
    memory: Memory,
    moments: Option<[Buffer; 2]>,
    program: Program,
    element: Element,
    arena_len: usize,
    param_len: usize,
    trainable_len: usize,
    /// Images and pixels per image.
    pixels: usize,
    classes: usize,
    labels_written: bool,
}

impl<D: GpuDevice> GpuBackend<D> {
    /// A backend on an opened device.
    pub fn new(device: D, precision: Precision) -> Self {
        GpuBackend { device, precision, variants: None, prepared: None }
    }

    /// The same with a fixed choice of kernels, for plans prepared from now on. Without it the
    /// variable `FPENET_VARIANTS` chooses, else [`Variants::default`].
    pub fn with_variants(self, variants: Variants) -> Self {
        GpuBackend { variants: Some(variants), ..self }
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
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
        let memory = prepared.memory;
        let optional = [memory.params_half, memory.grads].into_iter().flatten();
        let fixed = [
            memory.arena,
            memory.params,
            memory.scratch,
            memory.labels,
            memory.inverse_count,
            memory.loss,
        ];
        let all = fixed.into_iter().chain(optional).chain(prepared.moments.into_iter().flatten());
        all.into_iter().try_for_each(|buffer| self.device.free(buffer))
    }

    fn run(&mut self, sequence: u32, commands: fn(&Program) -> &[Command]) -> Result<()> {
        let (device, prepared) = self.parts()?;
        device.submit(sequence, commands(&prepared.program))
    }
}

impl Prepared {
    /// First byte of an image of a tensor whose planes are dense.
    fn image(&self, tensor: &Tensor, n: usize) -> Place {
        let byte_offset = (tensor.offset + n * tensor.batch_stride) * self.element.size();
        Place { buffer: self.memory.arena, byte_offset }
    }

    fn check_tensor(&self, tensor: &Tensor, len: usize) -> Result<()> {
        let dense = tensor.plane_stride == tensor.shape.plane();
        let inside = tensor.offset + tensor.extent() <= self.arena_len;
        if len == tensor.shape.len() && dense && inside {
            return Ok(());
        }
        Err(Error::Shape {
            node: "host copy".into(),
            expected: format!("{} elements ({})", tensor.shape.len(), tensor.shape),
            found: format!("{len} elements"),
        })
    }

    fn state(&self, state: State) -> (Option<Buffer>, usize) {
        match state {
            State::Params => (Some(self.memory.params), self.param_len),
            State::Grads => (self.memory.grads, self.trainable_len),
            State::Moment1 => (self.moments.map(|m| m[0]), self.trainable_len),
            State::Moment2 => (self.moments.map(|m| m[1]), self.trainable_len),
        }
    }

    fn check_state(&self, state: State, len: usize) -> Result<Buffer> {
        match self.state(state) {
            (Some(buffer), expected) if expected == len => Ok(buffer),
            (buffer, expected) => Err(Error::Shape {
                node: format!("{state:?}"),
                expected: format!("{} values", buffer.map_or(0, |_| expected)),
                found: format!("{len}"),
            }),
        }
    }
}

impl<D: GpuDevice> Backend for GpuBackend<D> {
    fn kind(&self) -> &'static str {
        self.device.kind()
    }

    fn describe(&self) -> String {
        self.device.describe()
    }

    fn prepare(&mut self, plan: &Plan) -> Result<()> {
        let variants = match self.variants {
            Some(variants) => variants,
            None => Variants::from_env()?.unwrap_or_default(),
        };
        self.release()?;
        let training = plan.mode == Mode::Training;
        let element = match self.precision {
            Precision::F16 if !training => Element::F16,
            _ => Element::F32,
        };
        let pixels = plan.input.shape.n * plan.input.shape.plane();
        let device = &mut self.device;
        let mut vector = |len: usize, purpose: &'static str| -> Result<Buffer> {
            let buffer = device.alloc(4 * len.max(1), purpose)?;
            device.zero(buffer.into(), 4 * len.max(1))?;
            Ok(buffer)
        };
        let params = vector(plan.param_len, "parameters")?;
        let inverse_count = vector(1, "label count")?;
        let loss = vector(1, "loss")?;
        let (grads, moments) = if training {
            let len = plan.trainable_len;
            let moments = [vector(len, "first moments")?, vector(len, "second moments")?];
            (Some(vector(len, "gradients")?), Some(moments))
        } else {
            (None, None)
        };
        let params_half = match element {
            Element::F16 => Some(device.alloc(2 * plan.param_len.max(1), "half parameters")?),
            Element::F32 => None,
        };
        let arena = device.alloc(element.size() * plan.arena_len.max(1), "arena")?;
        let labels = device.alloc(pixels, "labels")?;
        // Scratch is sized by a first lowering that needs no memory of its own.
        let mut memory = Memory {
            arena,
            params,
            params_half,
            grads,
            scratch: arena,
            labels,
            inverse_count,
            loss,
        };
        let target = Target { element, shared_limit: device.shared_memory_limit(), variants };
        let needed = lower::lower(plan, &memory, target)?.scratch_bytes;
        memory.scratch = device.alloc(needed.max(4), "scratch")?;
        let program = lower::lower(plan, &memory, target)?;
        self.prepared = Some(Prepared {
            memory,
            moments,
            program,
            element,
            arena_len: plan.arena_len,
            param_len: plan.param_len,
            trainable_len: plan.trainable_len,
            pixels,
            classes: plan.logits.shape.c,
            labels_written: false,
        });
        Ok(())
    }

    fn write(&mut self, tensor: &Tensor, data: &[f32]) -> Result<()> {
        let (device, prepared) = self.parts()?;
        prepared.check_tensor(tensor, data.len())?;
        let image = tensor.shape.c * tensor.shape.plane();
        for (n, values) in data.chunks(image).enumerate() {
            let place = prepared.image(tensor, n);
            match prepared.element {
                Element::F32 => device.upload(place, bytemuck::cast_slice(values))?,
                Element::F16 => device.upload(place, bytemuck::cast_slice(&to_half(values)))?,
            }
        }
        Ok(())
    }

    fn read(&mut self, tensor: &Tensor, out: &mut [f32]) -> Result<()> {
        let (device, prepared) = self.parts()?;
        prepared.check_tensor(tensor, out.len())?;
        let image = tensor.shape.c * tensor.shape.plane();
        let mut half = Vec::new();
        for (n, values) in out.chunks_mut(image).enumerate() {
            let place = prepared.image(tensor, n);
            match prepared.element {
                Element::F32 => device.download(place, bytemuck::cast_slice_mut(values))?,
                Element::F16 => {
                    half.resize(values.len(), f16::ZERO);
                    device.download(place, bytemuck::cast_slice_mut(&mut half))?;
                    values.iter_mut().zip(&half).for_each(|(v, h)| *v = h.to_f32());
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
            Some(half) if state == State::Params => {
                device.upload(half.into(), bytemuck::cast_slice(&to_half(data)))
            }
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
        if labels.len() != prepared.pixels {
            return Err(Error::Shape {
                node: "labels".into(),
                expected: format!("{} labels", prepared.pixels),
                found: format!("{}", labels.len()),
            });
        }
        let labelled = labels.iter().filter(|&&l| usize::from(l) < prepared.classes).count();
        let inverse = 1.0 / labelled.max(1) as f32;
        device.upload(prepared.memory.labels.into(), labels)?;
        device.upload(prepared.memory.inverse_count.into(), &inverse.to_ne_bytes())?;
        prepared.labels_written = true;
        Ok(())
    }

    fn forward_step(&mut self, _plan: &Plan, index: usize) -> Result<()> {
        let (device, prepared) = self.parts()?;
        prepared.program.step(index).iter().try_for_each(|command| match command {
            Command::Launch(launch) => device.launch(launch),
            Command::Gemm(gemm) => device.gemm(gemm),
        })
    }

    fn forward(&mut self, _plan: &Plan) -> Result<()> {
        self.run(FORWARD, |program| &program.forward)
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
        self.run(LABELS, |program| &program.labels)?;
        let (device, prepared) = self.parts()?;
        device.download(prepared.memory.labels.into(), out)
    }

    fn backward(&mut self, plan: &Plan) -> Result<()> {
        if plan.mode != Mode::Training {
            return Err(Error::Usage("backward needs a plan made for training".into()));
        }
        let prepared = self.parts()?.1;
        if !prepared.labels_written {
            return Err(Error::Shape {
                node: "labels".into(),
                expected: format!("{} labels, written before the backward", prepared.pixels),
                found: "none".into(),
            });
        }
        self.run(BACKWARD, |program| &program.backward)
    }

    fn loss(&mut self) -> Result<f32> {
        let (device, prepared) = self.parts()?;
        let mut bytes = [0; 4];
        device.download(prepared.memory.loss.into(), &mut bytes)?;
        Ok(f32::from_ne_bytes(bytes))
    }

    fn adam(&mut self, plan: &Plan, step: AdamStep) -> Result<()> {
        let (device, prepared) = self.parts()?;
        let (Some(grads), Some([first, second])) = (prepared.memory.grads, prepared.moments) else {
            return Err(Error::Usage("an update needs a plan made for training".into()));
        };
        let correction1 = 1.0 - f64::from(step.beta1).powi(step.step as i32);
        let correction2 = 1.0 - f64::from(step.beta2).powi(step.step as i32);
        let args = args![
            prepared.memory.params,
            grads,
            first,
            second,
            plan.trainable_len,
            (f64::from(step.lr) / correction1) as f32,
            (1.0 / correction2.sqrt()) as f32,
            step.beta1,
            step.beta2,
            step.eps,
            step.weight_decay,
        ];
        device.launch(&launch::vector("adam_f32", plan.trainable_len, args))
    }

    fn synchronize(&mut self) -> Result<()> {
        self.device.synchronize()
    }
}

fn to_half(values: &[f32]) -> Vec<f16> {
    values.iter().map(|&v| f16::from_f32(v)).collect()
}
