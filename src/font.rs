//! The typeface drawn into pictures: legends of overlays and axis labels of training plots.
//!
//! Embedded, so that the output looks the same on machines without any font installed.

/// DejaVu Sans as a TrueType file; terms in `assets/fonts/LICENSE`.
pub const FONT: &[u8] = include_bytes!("../assets/fonts/DejaVuSans.ttf");
