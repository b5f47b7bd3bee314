//! Models: configuration, class table, normalisation and weights, as one file.

use crate::config::ModelConfig;
use crate::graph::ParamStore;

/// Everything needed to segment an image.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// Structure.
    pub config: ModelConfig,
    /// Class names, one per class.
    pub classes: Vec<String>,
    /// Colours (R, G, B), one per class.
    pub palette: Vec<[u8; 3]>,
    /// Per-channel mean (R, G, B) on the 0..1 scale.
    pub mean: [f32; 3],
    /// Per-channel standard deviation on the 0..1 scale.
    pub std: [f32; 3],
    /// Width and height of the training images, where known.
    pub train_size: Option<(usize, usize)>,
    /// Weights and running statistics.
    pub params: ParamStore,
}
