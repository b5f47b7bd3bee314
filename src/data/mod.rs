//! data

/// `--dataset`: which layout and class table a data folder has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum DatasetKind {
    /// CamVid, 11 classes (SegNet's form).
    Camvid,
    /// Cityscapes, 19 classes.
    Cityscapes,
}
