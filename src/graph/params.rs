//! Parameters: one flat vector, trainable tensors first, then the running statistics.
//!
//! One vector means one Adam step, one checkpoint record and one upload, whatever the network.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal};

use crate::error::{Error, Result};

/// Index into a graph's parameter table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ParamId(pub usize);

/// What a parameter is, which decides how it is initialised and whether Adam updates it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParamRole {
    /// Convolution weights (out, in / groups, kh, kw), He-normal with fan-out.
    Weight {
        /// Output positions that one input touches: out * kh * kw / groups.
        fan_out: usize,
    },
    /// Scale of a batch norm, starts at 1.
    Scale,
    /// Any bias that starts at 0.
    Bias,
    /// Bias of an attention convolution: starts at 1 so that the gates start open.
    GateBias,
    /// Running mean of a batch norm, starts at 0, updated by the forward pass.
    RunningMean,
    /// Running variance of a batch norm, starts at 1, updated by the forward pass.
    RunningVar,
}

impl ParamRole {
    /// Whether the optimiser updates it.
    pub fn trainable(self) -> bool {
        !matches!(self, ParamRole::RunningMean | ParamRole::RunningVar)
    }
}

/// A parameter's name, shape (PyTorch layout) and place in the flat vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParamSpec {
    /// Name as in the SPEC's model file.
    pub name: String,
    /// Shape in PyTorch layout.
    pub shape: Vec<usize>,
    /// Kind.
    pub role: ParamRole,
    /// First element in the flat vector.
    pub offset: usize,
}

impl ParamSpec {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no elements (never true for a valid graph).
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its elements in the flat vector.
    pub fn range(&self) -> std::ops::Range<usize> {
        self.offset..self.offset + self.len()
    }
}

/// Every tensor starts at a multiple of this many elements (64 bytes), for aligned loads.
const ALIGN: usize = 16;

/// Assigns offsets: trainable tensors first, in table order, then the running statistics.
/// Gaps left by the alignment hold zeros, which an Adam step leaves at zero.
pub(crate) fn assign_offsets(params: &mut [ParamSpec]) {
    let mut next = 0;
    for trainable in [true, false] {
        for p in params.iter_mut().filter(|p| p.role.trainable() == trainable) {
            p.offset = next;
            next += p.len().next_multiple_of(ALIGN);
        }
    }
}

/// Length of the flat vector, and of its trainable part.
pub fn flat_len(params: &[ParamSpec]) -> (usize, usize) {
    let end = |p: &ParamSpec| p.offset + p.len().next_multiple_of(ALIGN);
    let all = params.iter().map(end).max().unwrap_or(0);
    let trainable = params.iter().filter(|p| p.role.trainable()).map(end).max().unwrap_or(0);
    (all, trainable)
}

/// Values for a parameter table.
#[derive(Debug, Clone, PartialEq)]
pub struct ParamStore {
    /// Names, shapes, offsets.
    pub specs: Vec<ParamSpec>,
    /// All values; see [`ParamSpec::range`].
    pub values: Vec<f32>,
}

impl ParamStore {
    /// All zeros.
    pub fn zeros(specs: &[ParamSpec]) -> Self {
        ParamStore { specs: specs.to_vec(), values: vec![0.0; flat_len(specs).0] }
    }

    /// Initial values (SPEC, "Initialisation"): convolutions He-normal with fan-out, batch norm 1
    /// and 0, biases 0, attention biases 1. The same seed gives the same values.
    pub fn init(specs: &[ParamSpec], seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut store = Self::zeros(specs);
        for spec in specs {
            let values = &mut store.values[spec.range()];
            match spec.role {
                ParamRole::Weight { fan_out } => {
                    let std = (2.0 / fan_out as f64).sqrt();
                    let normal = Normal::new(0.0, std).expect("a positive deviation");
                    values.fill_with(|| normal.sample(&mut rng) as f32);
                }
                ParamRole::Scale | ParamRole::GateBias | ParamRole::RunningVar => values.fill(1.0),
                ParamRole::Bias | ParamRole::RunningMean => values.fill(0.0),
            }
        }
        store
    }

    /// Values of one parameter, dense in the order of its shape (PyTorch's layout).
    pub fn get(&self, id: ParamId) -> &[f32] {
        &self.values[self.specs[id.0].range()]
    }

    /// Values of one parameter, to write.
    pub fn get_mut(&mut self, id: ParamId) -> &mut [f32] {
        let range = self.specs[id.0].range();
        &mut self.values[range]
    }

    /// A parameter by its name.
    pub fn find(&self, name: &str) -> Option<ParamId> {
        self.specs.iter().position(|s| s.name == name).map(ParamId)
    }

    /// Number of trainable values (alignment gaps not counted): what the paper calls parameters.
    pub fn trainable_count(&self) -> usize {
        self.specs.iter().filter(|s| s.role.trainable()).map(ParamSpec::len).sum()
    }

    /// Refuses NaN and infinities.
    ///
    /// # Errors
    /// [`Error::Failed`] naming the tensor and the element.
    pub fn check_finite(&self) -> Result<()> {
        for spec in &self.specs {
            if let Some(i) = self.values[spec.range()].iter().position(|v| !v.is_finite()) {
                return Err(Error::Failed(format!(
                    "tensor {}: expected finite values, found {} at element {i}",
                    spec.name,
                    self.values[spec.offset + i]
                )));
            }
        }
        Ok(())
    }
}
