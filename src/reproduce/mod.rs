//! The paper's experiments as commands: each of its tables, measured here beside the paper's own
//! column (Liu & Yin, BMVC 2019, section 4).
//!
//! [`ablation`] trains the switches of Tables 2, 3, 5 and 6, [`depth`] counts Table 4 from the
//! model alone, [`speed`] times Table 7, [`camvid`] trains and evaluates Table 8; [`markdown`]
//! writes what they found, [`paper`] holds the figures that stand beside it.

pub mod ablation;
pub mod camvid;
pub mod depth;
pub mod markdown;
pub mod paper;
pub mod runs;
pub mod speed;

/// A table of the paper.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum Table {
    /// Branches of the FPE block and their dilations.
    #[value(name = "table2")]
    Branches,
    /// Addition between branches.
    #[value(name = "table3")]
    Addition,
    /// Depth of the encoder: p and q.
    #[value(name = "table4")]
    Depth,
    /// Long skips.
    #[value(name = "table5")]
    LongSkip,
    /// Decoder.
    #[value(name = "table6")]
    Decoder,
    /// Speed at three input sizes.
    #[value(name = "table7")]
    Speed,
    /// CamVid.
    #[value(name = "table8")]
    Camvid,
}

impl Table {
    /// `table2` .. `table8`: the word on the command line and the stem of the output files.
    pub fn name(self) -> &'static str {
        match self {
            Table::Branches => "table2",
            Table::Addition => "table3",
            Table::Depth => "table4",
            Table::LongSkip => "table5",
            Table::Decoder => "table6",
            Table::Speed => "table7",
            Table::Camvid => "table8",
        }
    }

    /// What the table compares.
    pub fn title(self) -> &'static str {
        match self {
            Table::Branches => "branches of the FPE block and their dilations",
            Table::Addition => "addition between the branches",
            Table::Depth => "blocks of stages 2 and 3",
            Table::LongSkip => "long skips",
            Table::Decoder => "decoder",
            Table::Speed => "speed",
            Table::Camvid => "CamVid",
        }
    }
}
