//! Between Y'CbCr and RGB, 8 bits per sample: BT.601 and BT.709, limited and full range.
//!
//! With brightness y and colour differences cb, cr on the scales of the range:
//!   R = y + 2 (1 - Kr) cr
//!   B = y + 2 (1 - Kb) cb
//!   G = (y - Kr R - Kb B) / Kg
//! Colour planes of less than full size are brought to it by linear interpolation between the
//! places where their samples lie.

use super::y4m::{Chroma, Header, Range};

/// Weights of red and blue in the brightness.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Matrix {
    /// Standard definition: Kr 0.299, Kb 0.114.
    Bt601,
    /// High definition: Kr 0.2126, Kb 0.0722.
    Bt709,
}

impl Matrix {
    /// What players take a stream for that does not tell (Y4M never does): BT.709 from 1280
    /// pixels of width or above 576 of height, else BT.601.
    pub fn usual(width: usize, height: usize) -> Matrix {
        if width >= 1280 || height > 576 { Matrix::Bt709 } else { Matrix::Bt601 }
    }

    /// Kr, Kg, Kb.
    fn weights(self) -> [f64; 3] {
        let (red, blue) = match self {
            Matrix::Bt601 => (0.299, 0.114),
            Matrix::Bt709 => (0.2126, 0.0722),
        };
        [red, 1.0 - red - blue, blue]
    }
}

/// Black's value, and how many steps brightness and colour have.
fn scale(range: Range) -> (i32, f64, f64) {
    match range {
        Range::Limited => (16, 219.0, 224.0),
        Range::Full => (0, 255.0, 255.0),
    }
}

/// Bits after the point of the factors.
const BITS: u32 = 14;

fn fixed(factor: f64) -> i32 {
    (factor * f64::from(1 << BITS)).round() as i32
}

/// Where an output position reads: two samples with weights that sum to 4.
#[derive(Clone, Copy)]
struct Tap {
    near: usize,
    other: usize,
    weights: [i32; 2],
}

/// Where the samples of a halved axis lie.
#[derive(Clone, Copy)]
enum Siting {
    /// One for every pixel: not halved.
    All,
    /// Halfway between two pixels.
    Between,
    /// On the first of two pixels.
    First,
}

impl Siting {
    fn taps(self, length: usize) -> Vec<Tap> {
        let last = length.div_ceil(2) - 1;
        let tap = |i: usize| match self {
            Siting::All => Tap { near: i, other: i, weights: [4, 0] },
            Siting::Between if i.is_multiple_of(2) => {
                Tap { near: i / 2, other: (i / 2).saturating_sub(1), weights: [3, 1] }
            }
            Siting::Between => Tap { near: i / 2, other: (i / 2 + 1).min(last), weights: [3, 1] },
            Siting::First if i.is_multiple_of(2) => {
                Tap { near: i / 2, other: i / 2, weights: [4, 0] }
            }
            Siting::First => Tap { near: i / 2, other: (i / 2 + 1).min(last), weights: [2, 2] },
        };
        (0..length).map(tap).collect()
    }
}

/// Turns the planes of a stream's frames into RGB.
pub struct ToRgb {
    width: usize,
    height: usize,
    /// Width and height of a plane of colour.
    plane: Option<(usize, usize)>,
    columns: Vec<Tap>,
    rows: Vec<Tap>,
    black: i32,
    luma: i32,
    /// Factors of cr in R, of cb and cr in G, of cb in B.
    factors: [i32; 4],
    /// A row of each plane of colour between its rows, in quarters.
    mixed: [Vec<i32>; 2],
}

impl ToRgb {
    /// Prepares for frames of a stream; `range` where the stream does not tell its own.
    pub fn new(header: &Header, matrix: Matrix, range: Range) -> Self {
        let (horizontal, vertical) = match header.chroma {
            Chroma::Mono | Chroma::C444 => (Siting::All, Siting::All),
            Chroma::C420Jpeg => (Siting::Between, Siting::Between),
            Chroma::C420Mpeg2 => (Siting::First, Siting::Between),
            Chroma::C420Paldv => (Siting::First, Siting::First),
            Chroma::C422 => (Siting::First, Siting::All),
        };
        let (black, luma, chroma) = scale(range);
        let [red, green, blue] = matrix.weights();
        let (cr, cb) = (2.0 * (1.0 - red) * 255.0 / chroma, 2.0 * (1.0 - blue) * 255.0 / chroma);
        let factors = [cr, -cb * blue / green, -cr * red / green, cb];
        let plane = header.chroma.plane(header.width, header.height);
        let width = plane.map_or(0, |(width, _)| width);
        ToRgb {
            width: header.width,
            height: header.height,
            plane,
            columns: horizontal.taps(header.width),
            rows: vertical.taps(header.height),
            black,
            luma: fixed(255.0 / luma),
            factors: factors.map(fixed),
            mixed: [vec![0; width], vec![0; width]],
        }
    }

    /// Planes Y, Cb, Cr of [`Header::frame_len`] bytes in all to interleaved RGB, 3 bytes a pixel.
    pub fn convert(&mut self, planes: &[u8], rgb: &mut [u8]) {
        let (luma, colour) = planes.split_at(self.width * self.height);
        let rows = luma.chunks_exact(self.width).zip(rgb.chunks_exact_mut(3 * self.width));
        let Some((width, height)) = self.plane else {
            rows.for_each(|(luma, rgb)| {
                for (&y, pixel) in luma.iter().zip(rgb.as_chunks_mut().0) {
                    *pixel = [byte((i32::from(y) - self.black) * self.luma, BITS); 3];
                }
            });
            return;
        };
        let (cb, cr) = colour.split_at(width * height);
        for ((luma, rgb), &row) in rows.zip(&self.rows) {
            for (plane, mixed) in [cb, cr].into_iter().zip(&mut self.mixed) {
                let line = |at: usize| &plane[at * width..][..width];
                let lines = line(row.near).iter().zip(line(row.other));
                for (out, (&near, &other)) in mixed.iter_mut().zip(lines) {
                    let [a, b] = row.weights;
                    *out = a * (i32::from(near) - 128) + b * (i32::from(other) - 128);
                }
            }
            let [cb, cr] = &self.mixed;
            let [r_cr, g_cb, g_cr, b_cb] = self.factors;
            let pixels = luma.iter().zip(&self.columns).zip(rgb.as_chunks_mut().0);
            for ((&y, tap), pixel) in pixels {
                let [a, b] = tap.weights;
                // In sixteenths: quarters from the rows, quarters from the columns.
                let cb = a * cb[tap.near] + b * cb[tap.other];
                let cr = a * cr[tap.near] + b * cr[tap.other];
                let y = (i32::from(y) - self.black) * self.luma * 16;
                *pixel = [y + r_cr * cr, y + g_cb * cb + g_cr * cr, y + b_cb * cb]
                    .map(|value| byte(value, BITS + 4));
            }
        }
    }
}

/// Rounds a number with `bits` after the point, and clips it.
fn byte(value: i32, bits: u32) -> u8 {
    ((value + (1 << (bits - 1))) >> bits).clamp(0, 255) as u8
}

/// Interleaved RGB to full-size planes Y, Cb, Cr of limited range ([`Chroma::C444`]), in place of
/// what `planes` held.
pub fn to_planes(rgb: &[u8], matrix: Matrix, planes: &mut Vec<u8>) {
    let pixels = rgb.as_chunks::<3>().0;
    planes.clear();
    planes.resize(3 * pixels.len(), 0);
    let (black, luma, chroma) = scale(Range::Limited);
    let weights = matrix.weights();
    let y = weights.map(|weight| fixed(weight * luma / 255.0));
    // Half of (colour - brightness) over what that can be at most.
    let difference = |colour: usize| -> [i32; 3] {
        let factor = 0.5 / (1.0 - weights[colour]) * chroma / 255.0;
        let own = |i: usize| if i == colour { 1.0 } else { 0.0 };
        std::array::from_fn(|i| fixed(factor * (own(i) - weights[i])))
    };
    let parts = [(black, y), (128, difference(2)), (128, difference(0))];
    for (plane, (offset, factors)) in planes.chunks_exact_mut(pixels.len().max(1)).zip(parts) {
        for (out, pixel) in plane.iter_mut().zip(pixels) {
            let sum: i32 = (0..3).map(|i| factors[i] * i32::from(pixel[i])).sum();
            *out = byte(sum + (offset << BITS), BITS);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(chroma: Chroma, width: usize, height: usize) -> Header {
        Header { width, height, fps: (25, 1), chroma, range: None }
    }

    fn rgb(header: &Header, matrix: Matrix, range: Range, planes: &[u8]) -> Vec<u8> {
        let mut out = vec![0; 3 * header.width * header.height];
        ToRgb::new(header, matrix, range).convert(planes, &mut out);
        out
    }

    /// Straight from the definition, in double precision.
    fn exact(matrix: Matrix, range: Range, [y, cb, cr]: [f64; 3]) -> [f64; 3] {
        let (kr, kb) = if matrix == Matrix::Bt601 { (0.299, 0.114) } else { (0.2126, 0.0722) };
        let (y, cb, cr) = match range {
            Range::Limited => ((y - 16.0) / 219.0, (cb - 128.0) / 224.0, (cr - 128.0) / 224.0),
            Range::Full => (y / 255.0, (cb - 128.0) / 255.0, (cr - 128.0) / 255.0),
        };
        let (r, b) = (y + 2.0 * (1.0 - kr) * cr, y + 2.0 * (1.0 - kb) * cb);
        let g = (y - kr * r - kb * b) / (1.0 - kr - kb);
        [r, g, b].map(|v| (255.0 * v).clamp(0.0, 255.0))
    }

    const STEPS: [u8; 8] = [0, 16, 50, 100, 128, 180, 235, 255];

    #[test]
    fn conversion_follows_the_definition() {
        for matrix in [Matrix::Bt601, Matrix::Bt709] {
            for range in [Range::Limited, Range::Full] {
                for y in STEPS {
                    for cb in STEPS {
                        for cr in STEPS {
                            let found =
                                rgb(&header(Chroma::C444, 1, 1), matrix, range, &[y, cb, cr]);
                            let expected = exact(matrix, range, [y, cb, cr].map(f64::from));
                            for (f, e) in found.iter().zip(expected) {
                                // Half a step of rounding, and the factors' own.
                                assert!((f64::from(*f) - e).abs() < 0.55, "{found:?} {expected:?}");
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn colours_survive_the_way_out_and_back() {
        let colours: Vec<[u8; 3]> = STEPS
            .iter()
            .flat_map(|&r| STEPS.iter().flat_map(move |&g| STEPS.map(|b| [r, g, b])))
            .collect();
        for matrix in [Matrix::Bt601, Matrix::Bt709] {
            let mut planes = Vec::new();
            to_planes(colours.as_flattened(), matrix, &mut planes);
            let header = header(Chroma::C444, colours.len(), 1);
            let back = rgb(&header, matrix, Range::Limited, &planes);
            for (found, expected) in back.iter().zip(colours.as_flattened()) {
                // 219 and 224 steps stand for 256, and three roundings add up.
                assert!(found.abs_diff(*expected) <= 3, "{found} for {expected}");
            }
        }
        to_planes(&[], Matrix::Bt601, &mut vec![1]);
    }

    /// Colour samples that grow by 16 from place to place must do so from pixel to pixel, by 8.
    #[test]
    fn colour_samples_lie_where_the_layout_puts_them() {
        // What cr is at columns 0 .. 5 for samples 128, 144, 160 (in quarters, minus 128).
        let cases = [
            (Chroma::C420Jpeg, [0, 16, 48, 80, 112, 128]),
            (Chroma::C420Mpeg2, [0, 32, 64, 96, 128, 128]),
            (Chroma::C422, [0, 32, 64, 96, 128, 128]),
        ];
        for (chroma, expected) in cases {
            let header = header(chroma, 6, 2);
            let (w, h) = chroma.plane(6, 2).unwrap();
            let mut planes = vec![100; 12];
            planes.extend(vec![128; w * h]);
            planes.extend((0..h).flat_map(|_| [128, 144, 160]));
            let found = rgb(&header, Matrix::Bt601, Range::Full, &planes);
            for (x, cr) in expected.iter().enumerate() {
                let red =
                    exact(Matrix::Bt601, Range::Full, [100.0, 128.0, 128.0 + f64::from(*cr) / 4.0]);
                assert!((f64::from(found[3 * x]) - red[0]).abs() < 0.6, "{chroma:?} {x}");
            }
        }
        // Down the rows: between them for C420jpeg, on the first for C420paldv.
        for (chroma, expected) in
            [(Chroma::C420Jpeg, [0, 16, 48, 64]), (Chroma::C420Paldv, [0, 32, 64, 64])]
        {
            let header = header(chroma, 1, 4);
            let planes = [100, 100, 100, 100, 128, 128, 128, 144];
            let found = rgb(&header, Matrix::Bt601, Range::Full, &planes);
            for (y, cr) in expected.iter().enumerate() {
                let red =
                    exact(Matrix::Bt601, Range::Full, [100.0, 128.0, 128.0 + f64::from(*cr) / 4.0]);
                assert!((f64::from(found[3 * y]) - red[0]).abs() < 0.6, "{chroma:?} {y}");
            }
        }
    }

    #[test]
    fn mono_is_grey_and_odd_sizes_fit() {
        let found =
            rgb(&header(Chroma::Mono, 3, 1), Matrix::Bt709, Range::Limited, &[16, 126, 235]);
        assert_eq!(found, [0, 0, 0, 128, 128, 128, 255, 255, 255]);
        for chroma in [Chroma::C420Jpeg, Chroma::C420Mpeg2, Chroma::C420Paldv, Chroma::C422] {
            for (w, h) in [(1, 1), (5, 3), (2, 7)] {
                let header = header(chroma, w, h);
                let planes = vec![128; header.frame_len()];
                assert_eq!(rgb(&header, Matrix::Bt601, Range::Full, &planes), vec![128; 3 * w * h]);
            }
        }
    }
}
