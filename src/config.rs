//! Network configuration: the switches of SPEC.md, with the paper's network as the default.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How the decoder fuses stages (paper, section 3.3 and Table 6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Decoder {
    /// Two mutual-embedding upsampling modules with channel and spatial attention.
    Meu,
    /// The same with channel attention only.
    Ca,
    /// Classifier on stage 3, one bilinear upsampling.
    Bilinear,
}

/// Non-linearity of the attention gates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Attention {
    /// ReLU, as the paper's figure draws it.
    Relu,
    /// Sigmoid, an ablation of this project.
    Sigmoid,
}

/// What follows the residual addition of an FPE block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum BlockActivation {
    /// Nothing: a linear bottleneck.
    Linear,
    /// ReLU.
    Relu,
}

/// Everything that fixes the network's structure. As JSON every key is optional.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelConfig {
    /// Number of classes C (void excluded), 1 to 255.
    pub classes: usize,
    /// FPE blocks of stage 2.
    pub p: usize,
    /// FPE blocks of stage 3.
    pub q: usize,
    /// Depthwise branches of an FPE block: 1, 2 or 4.
    pub branches: usize,
    /// Dilation of each branch; the first `branches` entries count.
    pub dilations: Vec<usize>,
    /// Whether branch i takes in the output of branch i-1.
    pub branch_addition: bool,
    /// Whether a stage hands on concat(first unit, last block).
    pub long_skip: bool,
    /// Decoder variant.
    pub decoder: Decoder,
    /// Non-linearity of the attention gates.
    pub attention: Attention,
    /// Non-linearity after an FPE block.
    pub block_activation: BlockActivation,
}

impl Default for ModelConfig {
    fn default() -> Self {
        ModelConfig {
            classes: 19,
            p: 3,
            q: 9,
            branches: 4,
            dilations: vec![1, 2, 4, 8],
            branch_addition: true,
            long_skip: true,
            decoder: Decoder::Meu,
            attention: Attention::Relu,
            block_activation: BlockActivation::Linear,
        }
    }
}

/// Largest dilation accepted: twice the plane of an 8K frame would still be covered, and sizes
/// derived from it cannot overflow.
const MAX_DILATION: usize = 1024;

impl ModelConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the field, what was expected and what was found.
    pub fn validate(&self) -> Result<()> {
        let wrong = |field: &str, expected: &str, found: String| {
            Err(Error::Usage(format!("config: {field}: expected {expected}, found {found}")))
        };
        if !(1..=255).contains(&self.classes) {
            return wrong("classes", "1 to 255", self.classes.to_string());
        }
        if !(1..=64).contains(&self.p) {
            return wrong("p", "1 to 64 blocks", self.p.to_string());
        }
        if !(1..=64).contains(&self.q) {
            return wrong("q", "1 to 64 blocks", self.q.to_string());
        }
        if ![1, 2, 4].contains(&self.branches) {
            return wrong("branches", "1, 2 or 4", self.branches.to_string());
        }
        if self.dilations.len() < self.branches {
            return wrong(
                "dilations",
                &format!("at least one per branch ({})", self.branches),
                format!("{:?}", self.dilations),
            );
        }
        if self.dilations.iter().any(|d| !(1..=MAX_DILATION).contains(d)) {
            return wrong("dilations", "values from 1 to 1024", format!("{:?}", self.dilations));
        }
        Ok(())
    }

    /// The dilations in use, one per branch.
    pub fn branch_dilations(&self) -> &[usize] {
        &self.dilations[..self.branches]
    }
}
