//! Memory and commands of the plan that a [`GpuBackend`](super::GpuBackend) has at hand.

use super::Command;
use super::control;
use super::device::{Buffer, Element, GpuDevice, Place};
use super::lower::{self, Memory, Program, Target};
use crate::backend::State;
use crate::error::{Error, Result};
use crate::graph::{Mode, Plan, Tensor};
use crate::ops::cross_entropy;

/// Memory and commands of the plan at hand.
pub(super) struct Prepared {
    pub(super) memory: Memory,
    /// All that `memory` refers to, each once.
    pub(super) buffers: Vec<Buffer>,
    pub(super) program: Program,
    /// The forward pass over 8-bit RGB.
    pub(super) forward_rgb: Option<Vec<Command>>,
    /// Whether the input at hand is 8-bit RGB.
    pub(super) is_rgb: bool,
    /// What is in the memory for it: three scales, three shifts.
    pub(super) normalisation: Option<[[f32; 3]; 2]>,
    pub(super) element: Element,
    pub(super) arena_len: usize,
    pub(super) param_len: usize,
    pub(super) trainable_len: usize,
    /// Images and pixels per image.
    pub(super) pixels: usize,
    pub(super) classes: usize,
    /// Of the first classes in the loss; the others' are 1.
    pub(super) class_weights: Vec<f32>,
    pub(super) labels_written: bool,
    pub(super) reserved_bytes: usize,
}

/// Memory that is being reserved for a plan; given back on drop unless it is kept, so that a plan too
/// large for the device leaves it as it was.
pub(super) struct Reservation<'a, D: GpuDevice> {
    device: &'a mut D,
    buffers: Vec<Buffer>,
    bytes: usize,
}

impl<'a, D: GpuDevice> Reservation<'a, D> {
    pub(super) fn new(device: &'a mut D) -> Self {
        Reservation { device, buffers: Vec::new(), bytes: 0 }
    }

    /// The buffers, and their bytes together.
    pub(super) fn keep(mut self) -> (Vec<Buffer>, usize) {
        (std::mem::take(&mut self.buffers), self.bytes)
    }

    /// Undefined contents. A vector that a plan has no element of is still a place that commands may
    /// name.
    fn raw(&mut self, bytes: usize, purpose: &'static str) -> Result<Buffer> {
        let bytes = bytes.max(4);
        let buffer = self.device.alloc(bytes, purpose)?;
        self.buffers.push(buffer);
        self.bytes += bytes;
        Ok(buffer)
    }

    fn zeroed(&mut self, bytes: usize, purpose: &'static str) -> Result<Buffer> {
        let buffer = self.raw(bytes, purpose)?;
        self.device.zero(buffer.into(), bytes.max(4))?;
        Ok(buffer)
    }

    /// Makes the kernels of a program ready.
    pub(super) fn load(&mut self, program: &Program) -> Result<()> {
        let kernels: Vec<&'static str> = program.all().filter_map(Command::kernel).collect();
        self.device.load(&kernels)
    }

    /// Everything that the commands of a plan refer to.
    pub(super) fn memory(&mut self, plan: &Plan, target: Target) -> Result<Memory> {
        let training = plan.mode == Mode::Training;
        let (input, element) = (plan.input.shape, target.element);
        let vector = 4 * plan.trainable_len;
        let params = self.zeroed(4 * plan.param_len, "parameters")?;
        let control = self.zeroed(control::BYTES, "training state")?;
        let (mut grads, mut moments, mut params_half, mut rgb) = (None, None, None, None);
        if training {
            let first = self.zeroed(vector, "first moments")?;
            moments = Some([first, self.zeroed(vector, "second moments")?]);
            grads = Some(self.zeroed(vector, "gradients")?);
        } else {
            let values = self.raw(input.len(), "8-bit input")?;
            rgb = Some([values, self.raw(size_of::<[[f32; 3]; 2]>(), "normalisation")?]);
        }
        if element == Element::F16 {
            params_half = Some(self.raw(2 * plan.param_len, "half parameters")?);
        }
        let arena = self.raw(element.size() * plan.arena_len, "arena")?;
        let labels = self.raw(input.n * input.plane(), "labels")?;
        let mut memory = Memory {
            arena,
            params,
            params_half,
            grads,
            moments,
            statistics: arena,
            scratch: arena,
            rgb,
            labels,
            control,
            counters: arena,
        };
        // The last three are sized by a first lowering that needs no memory of its own.
        let needed = lower::lower(plan, &memory, target)?;
        memory.scratch = self.raw(needed.scratch_bytes, "scratch")?;
        memory.statistics = self.raw(needed.statistics_bytes, "statistics")?;
        memory.counters = self.zeroed(needed.counter_bytes, "counters")?;
        Ok(memory)
    }
}

impl<D: GpuDevice> Drop for Reservation<'_, D> {
    fn drop(&mut self) {
        for buffer in self.buffers.drain(..) {
            // The error that led here says more than one of giving back.
            let _ = self.device.free(buffer);
        }
    }
}

impl Prepared {
    /// Commands of a forward step over the input at hand.
    pub(super) fn step(&self, index: usize) -> &[Command] {
        match &self.program.stem_rgb {
            Some(stem) if self.is_rgb && index == 0 => stem,
            _ => self.program.step(index),
        }
    }

    /// Where a forward pass leaves its result, and its bytes.
    pub(super) fn result(&self, plan: &Plan) -> (Place, usize) {
        match plan.mode {
            Mode::Labels => (self.memory.labels.into(), self.pixels),
            _ => (self.image(&plan.logits, 0), plan.logits.extent() * self.element.size()),
        }
    }

    /// What the loss of these labels is divided by, inverted.
    pub(super) fn inverse_total(&self, labels: &[u8]) -> Result<f32> {
        if labels.len() != self.pixels {
            return Err(Error::Shape {
                node: "labels".into(),
                expected: format!("{} labels", self.pixels),
                found: format!("{}", labels.len()),
            });
        }
        let total = cross_entropy::total_weight(labels, self.classes, &self.class_weights);
        Ok(1.0 / total as f32)
    }

    /// First byte of an image of a tensor whose planes are dense.
    pub(super) fn image(&self, tensor: &Tensor, n: usize) -> Place {
        let byte_offset = (tensor.offset + n * tensor.batch_stride) * self.element.size();
        Place { buffer: self.memory.arena, byte_offset }
    }

    /// How many images of a tensor with dense planes lie one behind the other, to be copied at once, and
    /// their elements.
    pub(super) fn adjacent(&self, tensor: &Tensor) -> (usize, usize) {
        let image = tensor.shape.c * tensor.shape.plane();
        let images = if tensor.batch_stride == image { tensor.shape.n } else { 1 };
        (images, images * image)
    }

    pub(super) fn check_tensor(&self, tensor: &Tensor, len: usize) -> Result<()> {
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
            State::Moment1 => (self.memory.moments.map(|m| m[0]), self.trainable_len),
            State::Moment2 => (self.memory.moments.map(|m| m[1]), self.trainable_len),
        }
    }

    pub(super) fn check_state(&self, state: State, len: usize) -> Result<Buffer> {
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

#[cfg(test)]
mod tests {
    use super::super::launch::{Gemm, Launch};
    use super::super::variants::Variants;
    use super::*;
    use crate::config::ModelConfig;
    use crate::graph::{Graph, PlaneLayout, passes};

    /// A device that has memory and nothing else.
    struct Small {
        room: usize,
        /// Bytes of every buffer that was ever given out, 0 once it is back.
        given: Vec<usize>,
    }

    impl Small {
        fn new(room: usize) -> Self {
            Small { room, given: Vec::new() }
        }

        fn taken(&self) -> usize {
            self.given.iter().sum()
        }
    }

    impl GpuDevice for Small {
        fn kind(&self) -> &'static str {
            "small"
        }

        fn describe(&self) -> String {
            "small".into()
        }

        fn capability(&self) -> u32 {
            70
        }

        fn shared_memory_limit(&self) -> usize {
            48 << 10
        }

        fn alloc(&mut self, bytes: usize, purpose: &'static str) -> Result<Buffer> {
            if self.taken() + bytes > self.room {
                return Err(Error::Device {
                    device: "small".into(),
                    problem: format!("no {bytes} bytes for {purpose}"),
                    remedy: String::new(),
                });
            }
            self.given.push(bytes);
            Ok(Buffer(self.given.len() as u32 - 1))
        }

        fn free(&mut self, buffer: Buffer) -> Result<()> {
            assert_ne!(self.given[buffer.0 as usize], 0, "given back twice");
            self.given[buffer.0 as usize] = 0;
            Ok(())
        }

        fn zero(&mut self, at: Place, bytes: usize) -> Result<()> {
            assert!(at.byte_offset + bytes <= self.given[at.buffer.0 as usize]);
            Ok(())
        }

        fn upload(&mut self, _: Place, _: &[u8]) -> Result<()> {
            Ok(())
        }

        fn download(&mut self, _: Place, _: &mut [u8]) -> Result<()> {
            Ok(())
        }

        fn send(&mut self, _: usize, _: &[u8]) -> Result<()> {
            Ok(())
        }

        fn deliver(&mut self, _: usize, _: Place) -> Result<()> {
            Ok(())
        }

        fn fetch(&mut self, _: usize, _: Place, _: usize) -> Result<()> {
            Ok(())
        }

        fn receive(&mut self, _: usize, _: &mut [u8]) -> Result<()> {
            Ok(())
        }

        fn launch(&mut self, _: &Launch) -> Result<()> {
            Ok(())
        }

        fn gemm(&mut self, _: &Gemm) -> Result<()> {
            Ok(())
        }

        fn synchronize(&mut self) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_plan_that_does_not_fit_leaves_the_device_as_it_was() {
        let graph = Graph::fpenet(&ModelConfig { p: 1, q: 1, ..ModelConfig::default() }).unwrap();
        let graph = passes::for_training(&graph);
        let plan = Plan::new(&graph, (1, 32, 48), Mode::Training, PlaneLayout::Dense).unwrap();
        let target =
            Target { element: Element::F16, shared_limit: 48 << 10, variants: Variants::default() };
        let mut large = Small::new(usize::MAX / 2);
        let mut reserved = Reservation::new(&mut large);
        reserved.memory(&plan, target).unwrap();
        let (buffers, bytes) = reserved.keep();
        assert_eq!((large.taken(), large.given.len()), (bytes, buffers.len()));
        // Whichever of them is the first without room.
        let mut before = 0;
        for size in large.given {
            let mut small = Small::new(before + size - 1);
            let mut reserved = Reservation::new(&mut small);
            assert!(matches!(reserved.memory(&plan, target), Err(Error::Device { .. })));
            drop(reserved);
            assert_eq!(small.taken(), 0);
            before += size;
        }
        assert_eq!(before, bytes);
    }
}
