//! The paper's own figures, as far as this project has them on record. What is not here is shown
//! as a dash and never guessed: the mIoU columns of Tables 2, 3, 5 and 6 among it, the classes of Table 8.

/// A row of Table 4.
#[derive(Debug, Clone, Copy)]
pub struct Depth {
    /// Blocks of stage 2.
    pub p: usize,
    /// Blocks of stage 3.
    pub q: usize,
    /// Parameters in thousands, cut to whole ones.
    pub parameters_k: usize,
    /// FLOPs in units of 10^9.
    pub gflops: Option<f64>,
}

/// Table 4. It is an inference that it counts the whole network (SPEC, "Totals that must come
/// out"); of its FLOPs one figure is on record.
pub const TABLE_4: [Depth; 6] = [
    Depth { p: 3, q: 5, parameters_k: 233, gflops: None },
    Depth { p: 3, q: 7, parameters_k: 305, gflops: None },
    Depth { p: 5, q: 7, parameters_k: 325, gflops: None },
    Depth { p: 3, q: 9, parameters_k: 378, gflops: Some(4.98) },
    Depth { p: 5, q: 9, parameters_k: 398, gflops: None },
    Depth { p: 3, q: 11, parameters_k: 450, gflops: None },
];

/// A row of Table 7 for FPENet: PyTorch, f32, on a TITAN V.
#[derive(Debug, Clone, Copy)]
pub struct Speed {
    /// Input width and height.
    pub size: (usize, usize),
    /// FLOPs in units of 10^9.
    pub gflops: f64,
    /// Images per second.
    pub fps: f64,
}

/// Table 7.
pub const TABLE_7: [Speed; 3] = [
    Speed { size: (768, 384), gflops: 3.2, fps: 129.0 },
    Speed { size: (1024, 512), gflops: 5.7, fps: 102.0 },
    Speed { size: (1536, 768), gflops: 12.8, fps: 55.0 },
];

/// Table 8: mIoU in percent on CamVid's test split, trained on train + val.
pub const TABLE_8_MIOU: f64 = 65.4;
