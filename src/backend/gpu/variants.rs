//! Which of several kernels does a piece of work. Every choice gives the same result up to
//! rounding ([`Expanded::Bytes`] to that of 8 bits); which is fastest depends on the card, the size
//! and the precision.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Who multiplies in a 1x1 convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Products {
    /// cuBLAS, then a kernel for bias, residual and non-linearity: the plain way.
    Blas,
    /// One kernel of ours for all of it (kernels/conv1x1.cu).
    Fused,
}

/// How the projection of a block and the expansion of the next one run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pairs {
    /// One after the other, each as [`Variants::products`] says.
    Separate,
    /// In one launch (kernels/pe.cu), for the widths that it has.
    Fused,
}

/// What the cascade keeps its planes in while it works on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CascadePlanes {
    /// f32 in shared memory, whatever the tensors' storage.
    Wide,
    /// The tensors' own storage: with f16 tensors half the shared memory.
    Stored,
    /// The same, the planes of all branches fetched before the first begins, where rows are whole
    /// vectors and there is room (kernels/cascade_ahead.cu).
    Ahead,
    /// The same on tensor cores (kernels/cascade_mma.cu), with weights rounded to halves: for f16
    /// tensors, dilations up to 8 and rows of whole 16 columns; otherwise as `Ahead`.
    Mma,
}

/// What the expanded tensor of a stride-1 block is stored in, between the kernel that makes a pair
/// and the cascade, in inference with half-precision tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Expanded {
    /// As all tensors are.
    Stored,
    /// 8 bits without a sign and a scale per channel: half the bytes, and a rounding that shows in
    /// some labels. Only where it is asked for; the tuner never tries it.
    Bytes,
}

/// How the collapsed decoder runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decoder {
    /// Every operator by itself.
    Separate,
    /// The gates in a few launches (kernels/decoder.cu), scores with resize and argmax in one.
    Grouped,
    /// In plans for labels all of it in two launches (kernels/decoder_sums.cu, decoder_labels.cu),
    /// for up to 19 classes; otherwise as `Grouped`.
    Fused,
}

/// How the stem and the block of stage 1 run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stem {
    /// Every operator by itself.
    Separate,
    /// In one launch (kernels/stem_block.cu).
    Fused,
}

/// How the strided blocks run on the even grid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strided {
    /// Every operator by itself.
    Separate,
    /// Expansion and branches in one launch (kernels/strided_block.cu, f16).
    Fused,
    /// The projection and the next block's expansion in it as well, where shared memory has room for
    /// what is between them (57 or 95 KB); otherwise as `Fused`.
    Paired,
}

/// How the stride-1 blocks of stage 3 run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage3 {
    /// Two launches per block, or as [`Variants::pairs`] and [`Variants::cascade`] say.
    Separate,
    /// In one cooperative launch (kernels/stage_blocks.cu), where pairs are fused and cascades have
    /// planes as stored.
    Persistent,
}

/// The choices for one plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct Variants {
    /// 1x1 convolutions.
    pub products: Products,
    /// Projection with the next expansion.
    pub pairs: Pairs,
    /// Pixels of a block that makes a pair, 32, 64 or 128; the largest up to it that fits.
    pub pair_pixels: usize,
    /// Whether a pair keeps its weights in shared memory, where they fit; else they come through L1.
    pub stage_weights: bool,
    /// Planes of the cascade.
    pub cascade: CascadePlanes,
    /// Most shared memory of a cascade's block in KB, which decides its tile; 0 for what the device
    /// allows. Smaller tiles load wider halos and fill more multiprocessors.
    pub cascade_kb: usize,
    /// Storage of expanded tensors.
    pub expanded: Expanded,
    /// Whether inference runs the graph that saves work: strided blocks on the even grid, the decoder
    /// collapsed into the classifier ([`Rewrites`](crate::graph::passes::Rewrites)).
    pub rewrites: bool,
    /// The collapsed decoder.
    pub decoder: Decoder,
    /// Stem and stage 1.
    pub stem: Stem,
    /// Strided blocks.
    pub strided: Strided,
    /// The other blocks of stage 3.
    pub stage3: Stage3,
    /// Whether a kernel may start before the one before it ends (programmatic dependent launch), on
    /// GPUs and drivers that have it: Hopper, CUDA 12.3.
    pub dependent_launch: bool,
}

impl Default for Variants {
    fn default() -> Self {
        Variants {
            products: Products::Fused,
            pairs: Pairs::Fused,
            pair_pixels: 64,
            stage_weights: true,
            cascade: CascadePlanes::Ahead,
            cascade_kb: 0,
            expanded: Expanded::Stored,
            rewrites: true,
            decoder: Decoder::Fused,
            stem: Stem::Fused,
            strided: Strided::Fused,
            stage3: Stage3::Separate,
            dependent_launch: true,
        }
    }
}

impl Variants {
    /// Every choice the plain way: what the others are checked against.
    pub const PLAIN: Variants = Variants {
        products: Products::Blas,
        pairs: Pairs::Separate,
        pair_pixels: 64,
        stage_weights: false,
        cascade: CascadePlanes::Wide,
        cascade_kb: 0,
        expanded: Expanded::Stored,
        rewrites: false,
        decoder: Decoder::Separate,
        stem: Stem::Separate,
        strided: Strided::Separate,
        stage3: Stage3::Separate,
        dependent_launch: false,
    };

    /// Name of the variable that [`Variants::from_env`] reads.
    pub const VARIABLE: &str = "FPENET_VARIANTS";

    /// The choices in the variable `FPENET_VARIANTS`, if it is set; see [`Variants::from_str`].
    ///
    /// # Errors
    /// [`Error::Usage`] for text that names no choice.
    pub fn from_env() -> Result<Option<Self>> {
        match std::env::var(Self::VARIABLE) {
            Ok(text) if !text.is_empty() => text.parse().map(Some),
            _ => Ok(None),
        }
    }

    /// Takes one `key=value`.
    fn set(&mut self, key: &str, value: &str) -> std::result::Result<(), &'static str> {
        fn one_of<T: Copy>(
            value: &str,
            names: &[(&str, T)],
            expected: &'static str,
        ) -> std::result::Result<T, &'static str> {
            names.iter().find(|(name, _)| *name == value).map(|(_, v)| *v).ok_or(expected)
        }
        match key {
            "products" => {
                let names = [("blas", Products::Blas), ("fused", Products::Fused)];
                self.products = one_of(value, &names, "blas or fused")?;
            }
            "pairs" => {
                let names = [("separate", Pairs::Separate), ("fused", Pairs::Fused)];
                self.pairs = one_of(value, &names, "separate or fused")?;
            }
            "pair_pixels" => {
                let names = [("32", 32), ("64", 64), ("128", 128)];
                self.pair_pixels = one_of(value, &names, "32, 64 or 128")?;
            }
            "stage_weights" => {
                self.stage_weights = one_of(value, &SWITCH, "on or off")?;
            }
            "cascade" => {
                let names = [
                    ("wide", CascadePlanes::Wide),
                    ("stored", CascadePlanes::Stored),
                    ("ahead", CascadePlanes::Ahead),
                    ("mma", CascadePlanes::Mma),
                ];
                self.cascade = one_of(value, &names, "wide, stored, ahead or mma")?;
            }
            "cascade_kb" => {
                let kb = value.parse().ok().filter(|kb| *kb <= 1024);
                self.cascade_kb = kb.ok_or("a number from 0 to 1024")?;
            }
            "expanded" => {
                let names = [("stored", Expanded::Stored), ("bytes", Expanded::Bytes)];
                self.expanded = one_of(value, &names, "stored or bytes")?;
            }
            "rewrites" => self.rewrites = one_of(value, &SWITCH, "on or off")?,
            "decoder" => {
                let names = [
                    ("separate", Decoder::Separate),
                    ("grouped", Decoder::Grouped),
                    ("fused", Decoder::Fused),
                ];
                self.decoder = one_of(value, &names, "separate, grouped or fused")?;
            }
            "stem" => {
                let names = [("separate", Stem::Separate), ("fused", Stem::Fused)];
                self.stem = one_of(value, &names, "separate or fused")?;
            }
            "strided" => {
                let names = [
                    ("separate", Strided::Separate),
                    ("fused", Strided::Fused),
                    ("paired", Strided::Paired),
                ];
                self.strided = one_of(value, &names, "separate, fused or paired")?;
            }
            "stage3" => {
                let names = [("separate", Stage3::Separate), ("persistent", Stage3::Persistent)];
                self.stage3 = one_of(value, &names, "separate or persistent")?;
            }
            "dependent_launch" => {
                self.dependent_launch = one_of(value, &SWITCH, "on or off")?;
            }
            _ => return Err(KEYS),
        }
        Ok(())
    }
}

const KEYS: &str = "one of products, pairs, pair_pixels, stage_weights, cascade, cascade_kb, expanded, rewrites, \
                    decoder, stem, strided, stage3, dependent_launch";
/// `on` and `off`.
const SWITCH: [(&str, bool); 2] = [("on", true), ("off", false)];

impl std::fmt::Display for Variants {
    /// As [`Variants::from_str`] reads it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let products = match self.products {
            Products::Blas => "blas",
            Products::Fused => "fused",
        };
        let pairs = match self.pairs {
            Pairs::Separate => "separate",
            Pairs::Fused => "fused",
        };
        let cascade = match self.cascade {
            CascadePlanes::Wide => "wide",
            CascadePlanes::Stored => "stored",
            CascadePlanes::Ahead => "ahead",
            CascadePlanes::Mma => "mma",
        };
        let expanded = match self.expanded {
            Expanded::Stored => "stored",
            Expanded::Bytes => "bytes",
        };
        let decoder = match self.decoder {
            Decoder::Separate => "separate",
            Decoder::Grouped => "grouped",
            Decoder::Fused => "fused",
        };
        let stem = match self.stem {
            Stem::Separate => "separate",
            Stem::Fused => "fused",
        };
        let strided = match self.strided {
            Strided::Separate => "separate",
            Strided::Fused => "fused",
            Strided::Paired => "paired",
        };
        let stage3 = match self.stage3 {
            Stage3::Separate => "separate",
            Stage3::Persistent => "persistent",
        };
        let switch = |on: bool| if on { "on" } else { "off" };
        write!(
            f,
            "products={products},pairs={pairs},pair_pixels={},stage_weights={},cascade={cascade},\
             cascade_kb={},expanded={expanded},rewrites={},decoder={decoder},stem={stem},strided={strided},\
             stage3={stage3},dependent_launch={}",
            self.pair_pixels,
            switch(self.stage_weights),
            self.cascade_kb,
            switch(self.rewrites),
            switch(self.dependent_launch),
        )
    }
}

impl FromStr for Variants {
    type Err = Error;

    /// `plain`, `default`, or a list `key=value,...` of changes; `plain,pairs=fused` changes the
    /// plain choices, a list alone the default ones.
    fn from_str(text: &str) -> Result<Self> {
        let mut variants = Variants::default();
        for (i, item) in text.split(',').map(str::trim).enumerate() {
            let wrong = |expected: &str| {
                Error::Usage(format!("variants: expected {expected}, found {item:?}"))
            };
            match item.split_once('=') {
                Some((key, value)) => variants.set(key, value).map_err(|expected| {
                    let what = if expected.starts_with("one of") { "" } else { "=" };
                    let key = if what.is_empty() { "" } else { key };
                    wrong(&format!("{key}{what}{expected}"))
                })?,
                None if i == 0 && item == "plain" => variants = Variants::PLAIN,
                None if i == 0 && item == "default" => {}
                None => return Err(wrong("plain, default or KEY=VALUE")),
            }
        }
        Ok(variants)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        for variants in [Variants::default(), Variants::PLAIN] {
            assert_eq!(variants.to_string().parse::<Variants>().unwrap(), variants);
            let json = serde_json::to_string(&variants).unwrap();
            assert_eq!(serde_json::from_str::<Variants>(&json).unwrap(), variants);
        }
    }

    #[test]
    fn a_list_changes_what_it_starts_from() {
        let found: Variants = "plain,pairs=fused,pair_pixels=32".parse().unwrap();
        assert_eq!(found, Variants { pairs: Pairs::Fused, pair_pixels: 32, ..Variants::PLAIN });
        let found: Variants = "products=blas".parse().unwrap();
        assert_eq!(found, Variants { products: Products::Blas, ..Variants::default() });
    }

    #[test]
    fn a_wrong_choice_names_what_would_be_right() {
        let message = |text: &str| text.parse::<Variants>().unwrap_err().to_string();
        assert!(message("pairs=both").contains("expected pairs=separate or fused"));
        assert!(message("pear=fused").contains("expected one of products, pairs"));
        assert!(message("fast").contains("expected plain, default or KEY=VALUE, found \"fast\""));
    }
}
