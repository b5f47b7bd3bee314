//! The paper's augmentation (section 4.1; SPEC, "Training defaults"): random horizontal flip,
//! rotation, scale, then a crop or a padding to the training size at a random position.
//!
//! All of it is one inverse affine map per sample: each pixel of the result looks up its place in
//! the source, bilinearly in the image and by nearest neighbour in the labels, so that an image is
//! resampled once and never stored in between. Pixel i covers [i, i + 1) and its centre is
//! i + 0.5; a result whose centre falls outside the source is uncovered: void in the labels, mean
//! colour (0 after normalisation) in the image.

use image::{GrayImage, RgbImage};
use rand::{Rng, RngExt};

use super::VOID;
use crate::error::{Error, Result};

/// Below this scale the image is read from a half-size copy: one bilinear tap per pixel would
/// skip source pixels and alias.
const HALVE_BELOW: f64 = 0.7;

/// Distribution of the warps of a training set.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Augment {
    /// Whether half of the samples are mirrored left to right.
    pub flip: bool,
    /// Largest rotation to either side, degrees.
    pub rotation_deg: f32,
    /// Smallest and largest scale, drawn uniformly.
    pub scale: (f32, f32),
    /// Strength of the random change of colours, 0 (the paper's protocol: none) to 1; see
    /// [`Augment::draw_colour`].
    pub colour: f32,
    /// Width and height of the result.
    pub size: (usize, usize),
}

impl Augment {
    /// The paper's augmentation: flip, [-10, 10] degrees, scale [0.5, 1.75].
    pub fn paper(size: (usize, usize)) -> Self {
        Augment { flip: true, rotation_deg: 10.0, scale: (0.5, 1.75), colour: 0.0, size }
    }

    /// A random position of the crop or padding and nothing else.
    pub fn crop(size: (usize, usize)) -> Self {
        Augment { flip: false, rotation_deg: 0.0, scale: (1.0, 1.0), colour: 0.0, size }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the field, what was expected and what was found.
    pub fn validate(&self) -> Result<()> {
        let wrong = |field: &str, expected: &str, found: String| {
            Err(Error::Usage(format!("augmentation: {field}: expected {expected}, found {found}")))
        };
        let (low, high) = self.scale;
        if !(0.0..=180.0).contains(&self.rotation_deg) {
            return wrong("rotation", "0 to 180 degrees", self.rotation_deg.to_string());
        }
        if !(low >= 0.05 && low <= high && high <= 20.0) {
            return wrong("scale", "0.05 <= low <= high <= 20", format!("{low} to {high}"));
        }
        if !(0.0..=1.0).contains(&self.colour) {
            return wrong("colour", "0 to 1", self.colour.to_string());
        }
        if self.size.0 == 0 || self.size.1 == 0 {
            return wrong("size", "a width and height", format!("{:?}", self.size));
        }
        Ok(())
    }

    /// Draws the warp of one sample whose image is `source` (width, height). Always takes the
    /// same number of draws from `rng`, so that the switches do not shift later samples.
    pub fn draw(&self, source: (usize, usize), rng: &mut impl Rng) -> Warp {
        let flip = rng.random::<f32>() < 0.5;
        let turn = rng.random_range(-1.0..=1.0f64);
        let scale = rng.random::<f64>();
        let (x, y) = (rng.random::<f64>(), rng.random::<f64>());
        let (low, high) = (f64::from(self.scale.0), f64::from(self.scale.1));
        let scale = low + (high - low) * scale;
        // Slack > 0: the crop moves inside the image. Slack < 0: the image moves inside the crop.
        // Whole pixels, so that without scale and rotation nothing is resampled.
        let offset =
            |full: usize, side: usize, at: f64| ((full as f64 * scale - side as f64) * at).round();
        Warp::new(WarpParams {
            source,
            size: self.size,
            flip: flip && self.flip,
            degrees: turn * f64::from(self.rotation_deg),
            scale: (scale, scale),
            offset: (offset(source.0, self.size.0, x), offset(source.1, self.size.1, y)),
        })
    }
}

impl Augment {
    /// Draws a change of colours: exposure by a factor in 1 +- colour, contrast around mid-grey
    /// likewise, and each channel by a factor in 1 +- colour / 3 (white balance). Not clamped to
    /// 0..255, so that it stays an affine map per channel. To be called after
    /// [`Augment::draw`] with the same generator.
    pub fn draw_colour(&self, rng: &mut impl Rng) -> Colour {
        let mut factor = |range: f32| 1.0 + range * rng.random_range(-1.0..=1.0f32);
        let (exposure, contrast) = (factor(self.colour), factor(self.colour));
        let tint = [(); 3].map(|()| factor(self.colour / 3.0));
        Colour { gain: tint.map(|t| t * exposure * contrast), shift: 127.5 * (1.0 - contrast) }
    }
}

/// A change of colours: value * gain + shift per channel, on the 0..255 scale.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Colour {
    /// Factor of each channel.
    pub gain: [f32; 3],
    /// Added to every channel.
    pub shift: f32,
}

/// What fixes a [`Warp`]: the source is mirrored, scaled, turned about its centre, and a window
/// of `size` is cut out of it at `offset`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WarpParams {
    /// Width and height of the source.
    pub source: (usize, usize),
    /// Width and height of the result.
    pub size: (usize, usize),
    /// Whether the source is mirrored left to right.
    pub flip: bool,
    /// Rotation, counter-clockwise as seen.
    pub degrees: f64,
    /// Scale over x and y.
    pub scale: (f64, f64),
    /// Top left corner of the window in the scaled source, pixels; negative pads.
    pub offset: (f64, f64),
}

/// Maps a position of the result to the source: u = ux x + uy y + u1, v = vx x + vy y + v1, in
/// pixels with centres at + 0.5.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Warp {
    source: (usize, usize),
    size: (usize, usize),
    u: [f64; 3],
    v: [f64; 3],
    /// How often the image is halved before it is read.
    halvings: u32,
}

impl Warp {
    /// The inverse map of the given parameters.
    pub fn new(p: WarpParams) -> Self {
        let (sin, cos) = p.degrees.to_radians().sin_cos();
        let (w, h) = (p.source.0 as f64, p.source.1 as f64);
        let (sx, sy) = p.scale;
        // From the window to the scaled, turned source relative to its centre ...
        let (dx, dy) = (p.offset.0 - w * sx / 2.0, p.offset.1 - h * sy / 2.0);
        // ... turned back (y points down), scaled back, and from the source's centre.
        let mut u = [cos / sx, -sin / sx, (cos * dx - sin * dy) / sx + w / 2.0];
        let v = [sin / sy, cos / sy, (sin * dx + cos * dy) / sy + h / 2.0];
        if p.flip {
            u = [-u[0], -u[1], w - u[2]];
        }
        let mut halvings = 0;
        while sx.max(sy) * f64::from(1 << halvings) < HALVE_BELOW && halvings < 8 {
            halvings += 1;
        }
        Warp { source: p.source, size: p.size, u, v, halvings }
    }

    /// No change but a resize where the sizes differ: for evaluation.
    pub fn resize(source: (usize, usize), size: (usize, usize)) -> Self {
        let scale = (size.0 as f64 / source.0 as f64, size.1 as f64 / source.1 as f64);
        let offset = (0.0, 0.0);
        Warp::new(WarpParams { source, size, flip: false, degrees: 0.0, scale, offset })
    }

    /// Width and height of the result.
    pub fn size(&self) -> (usize, usize) {
        self.size
    }

    /// Writes the warped, normalised image as 3 x H x W.
    ///
    /// # Panics
    /// Where the image or `out` does not have the size that the warp was made for.
    pub fn image(&self, image: &RgbImage, normalise: &Normalise, out: &mut [f32]) {
        let (w, h) = self.size;
        self.check(image.dimensions());
        assert_eq!(out.len(), 3 * w * h, "3 planes of the warp's size");
        let mut smaller = None;
        for _ in 0..self.halvings {
            smaller = Some(halve(smaller.as_ref().unwrap_or(image)));
        }
        let reads = smaller.as_ref().unwrap_or(image);
        let shrink = 1.0 / f64::from(1 << self.halvings);
        let tap = Tap { image: reads.as_raw(), w: reads.width() as usize, normalise };
        let (read_w, read_h) = (reads.width() as usize, reads.height() as usize);
        let (red, rest) = out.split_at_mut(w * h);
        let (green, blue) = rest.split_at_mut(w * h);
        let rows = red.chunks_exact_mut(w).zip(green.chunks_exact_mut(w));
        for (y, ((r, g), b)) in rows.zip(blue.chunks_exact_mut(w)).enumerate() {
            let mut row = [r, g, b];
            let covered = self.covered(y);
            // Taps are centred on pixels, hence the half pixel.
            let u = Line::of(&self.u, y, shrink, -0.5);
            let v = Line::of(&self.v, y, shrink, -0.5);
            let inner = u.within(0, read_w as i64 - 1, w);
            let inner = intersect(inner, v.within(0, read_h as i64 - 1, w));
            let mut inner = intersect(inner, covered.clone());
            if inner.is_empty() {
                inner = covered.end..covered.end;
            }
            for plane in &mut row {
                plane[..covered.start].fill(0.0);
                plane[covered.end..].fill(0.0);
            }
            tap.edge(&mut row, covered.start..inner.start, u, v, read_h);
            tap.interior(&mut row, inner.clone(), u, v);
            tap.edge(&mut row, inner.end..covered.end, u, v, read_h);
        }
    }

    /// Writes the warped labels as H x W, void where the source does not reach.
    ///
    /// # Panics
    /// Where the labels or `out` do not have the size that the warp was made for.
    pub fn labels(&self, labels: &GrayImage, out: &mut [u8]) {
        let (w, h) = self.size;
        self.check(labels.dimensions());
        assert_eq!(out.len(), w * h, "a plane of the warp's size");
        let (source, stride) = (labels.as_raw(), self.source.0);
        for (y, row) in out.chunks_exact_mut(w).enumerate() {
            let covered = self.covered(y);
            row[..covered.start].fill(VOID);
            row[covered.end..].fill(VOID);
            let (u, v) = (Line::of(&self.u, y, 1.0, 0.0), Line::of(&self.v, y, 1.0, 0.0));
            for x in covered {
                row[x] = source[v.whole(x) * stride + u.whole(x)];
            }
        }
    }

    /// Columns of row `y` whose centre falls on the source.
    fn covered(&self, y: usize) -> std::ops::Range<usize> {
        let u = Line::of(&self.u, y, 1.0, 0.0).within(0, self.source.0 as i64, self.size.0);
        let v = Line::of(&self.v, y, 1.0, 0.0).within(0, self.source.1 as i64, self.size.0);
        intersect(u, v)
    }

    fn check(&self, (w, h): (u32, u32)) {
        assert_eq!((w as usize, h as usize), self.source, "the size that the warp was made for");
    }
}

/// One source coordinate along a row of the result, in fixed point with 32 fractional bits: it
/// is exact over a row, so bounds worked out once per row hold for every pixel of it.
#[derive(Clone, Copy)]
struct Line {
    start: i64,
    step: i64,
}

const ONE: i64 = 1 << 32;

impl Line {
    /// Coordinate along row `y` of an affine map, scaled and then shifted.
    fn of(map: &[f64; 3], y: usize, scale: f64, shift: f64) -> Self {
        let fixed = |v: f64| (v * ONE as f64).round() as i64;
        let start = map[0] * 0.5 + map[1] * (y as f64 + 0.5) + map[2];
        Line { start: fixed(start * scale + shift), step: fixed(map[0] * scale) }
    }

    fn at(self, x: usize) -> i64 {
        self.start + self.step * x as i64
    }

    /// Integer part; the coordinate must not be negative.
    fn whole(self, x: usize) -> usize {
        (self.at(x) >> 32) as usize
    }

    /// The x in 0..n for which the coordinate lies in [low, high).
    fn within(self, low: i64, high: i64, n: usize) -> std::ops::Range<usize> {
        let (low, high) = (low * ONE - self.start, high * ONE - self.start);
        // low <= step x < high, solved for x by the sign of the step.
        let ceil = |a: i64, b: i64| -(-a).div_euclid(b);
        let (from, to) = match self.step {
            0 if low <= 0 && 0 < high => (0, n as i64),
            0 => (0, 0),
            step if step > 0 => (ceil(low, step), ceil(high, step)),
            step => ((-high).div_euclid(-step) + 1, (-low).div_euclid(-step) + 1),
        };
        let clamp = |x: i64| x.clamp(0, n as i64) as usize;
        let from = clamp(from);
        from..clamp(to).max(from)
    }
}

fn intersect(a: std::ops::Range<usize>, b: std::ops::Range<usize>) -> std::ops::Range<usize> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}

/// Bilinear reading of an interleaved RGB image into normalised planes.
struct Tap<'a> {
    image: &'a [u8],
    w: usize,
    normalise: &'a Normalise,
}

impl Tap<'_> {
    /// Pixels all of whose four taps lie on the image.
    fn interior(&self, row: &mut [&mut [f32]; 3], xs: std::ops::Range<usize>, u: Line, v: Line) {
        let (stride, n) = (3 * self.w, self.normalise);
        if u.step == ONE && v.step == 0 && (u.start | v.start) as u32 == 0 && !xs.is_empty() {
            // Whole-pixel moves: nothing to interpolate.
            let first = v.whole(0) * stride + 3 * u.whole(xs.start);
            for (x, pixel) in xs.zip(self.image[first..].chunks_exact(3)) {
                for c in 0..3 {
                    row[c][x] = n.value(c, f32::from(pixel[c]));
                }
            }
            return;
        }
        let [red, green, blue] = row;
        let (red, green) = (&mut red[xs.clone()], &mut green[xs.clone()]);
        let pixels = red.iter_mut().zip(green).zip(&mut blue[xs.clone()]);
        let (mut fu, mut fv) = (u.at(xs.start), v.at(xs.start));
        for ((red, green), blue) in pixels {
            let weights = (weight(fu), weight(fv));
            let first = (fv >> 32) as usize * stride + 3 * (fu >> 32) as usize;
            let above = &self.image[first..first + 6];
            let below = &self.image[first + stride..first + stride + 6];
            let blend = |c| blend([above[c], above[c + 3], below[c], below[c + 3]], weights);
            *red = n.value(0, blend(0));
            *green = n.value(1, blend(1));
            *blue = n.value(2, blend(2));
            fu += u.step;
            fv += v.step;
        }
    }

    /// Pixels within half a pixel of the image's border: taps are clamped to it.
    fn edge(
        &self,
        row: &mut [&mut [f32]; 3],
        xs: std::ops::Range<usize>,
        u: Line,
        v: Line,
        h: usize,
    ) {
        let clamp = |at: i64, side: usize| (at >> 32).clamp(0, side as i64 - 1) as usize;
        for x in xs {
            let (fu, fv) = (u.at(x), v.at(x));
            let weights = (weight(fu), weight(fv));
            let (left, right) = (clamp(fu, self.w), clamp(fu + ONE, self.w));
            let (above, below) = (clamp(fv, h) * self.w, clamp(fv + ONE, h) * self.w);
            for c in 0..3 {
                let at = |row: usize, column: usize| self.image[3 * (row + column) + c];
                let taps = [at(above, left), at(above, right), at(below, left), at(below, right)];
                row[c][x] = self.normalise.value(c, blend(taps, weights));
            }
        }
    }
}

/// Bits of an interpolation weight: two of them and a byte just fit an i32.
const WEIGHT_BITS: u32 = 11;

/// Fractional part of a fixed-point coordinate as a weight of [`WEIGHT_BITS`] bits.
fn weight(at: i64) -> i32 {
    (at as u32 >> (32 - WEIGHT_BITS)) as i32
}

/// Bilinear mean of the taps above left, above right, below left, below right. Integers until the
/// end: that is one conversion to f32 per value, not four, and exact where a weight is 0.
#[inline(always)]
fn blend(taps: [u8; 4], (u, v): (i32, i32)) -> f32 {
    let [a, b, c, d] = taps.map(i32::from);
    let above = (a << WEIGHT_BITS) + (b - a) * u;
    let below = (c << WEIGHT_BITS) + (d - c) * u;
    let sum = (above << WEIGHT_BITS) + (below - above) * v;
    sum as f32 * (1.0 / (1 << (2 * WEIGHT_BITS)) as f32)
}

/// Normalisation of a channel: (value / 255 - mean) / std.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Normalise {
    gain: [f32; 3],
    bias: [f32; 3],
}

impl Normalise {
    /// From a model's mean and standard deviation, RGB, on the 0..1 scale.
    pub fn new(mean: [f32; 3], std: [f32; 3]) -> Self {
        let gain = std.map(|s| (1.0 / (255.0 * f64::from(s))) as f32);
        let bias = [0, 1, 2].map(|c| (-f64::from(mean[c]) / f64::from(std[c])) as f32);
        Normalise { gain, bias }
    }

    /// The same after a change of colours. Uncovered pixels, which stand for the mean, stay 0.
    pub fn after(&self, colour: &Colour) -> Self {
        Normalise {
            gain: [0, 1, 2].map(|c| self.gain[c] * colour.gain[c]),
            bias: [0, 1, 2].map(|c| self.bias[c] + self.gain[c] * colour.shift),
        }
    }

    /// Normalised value of `value` (0..255) in channel `c`.
    #[inline]
    pub fn value(&self, c: usize, value: f32) -> f32 {
        value * self.gain[c] + self.bias[c]
    }
}

/// The image at half its size (rounded up): means of 2x2 pixels, the border repeated.
pub fn halve(image: &RgbImage) -> RgbImage {
    let (w, h) = (image.width() as usize, image.height() as usize);
    let (half_w, half_h) = (w.div_ceil(2), h.div_ceil(2));
    let mut out = vec![0u8; 3 * half_w * half_h];
    let source = image.as_raw();
    for (y, row) in out.chunks_exact_mut(3 * half_w).enumerate() {
        let line = |y: usize| &source[3 * w * y..3 * w * (y + 1)];
        let (above, below) = (line(2 * y), line((2 * y + 1).min(h - 1)));
        for (x, pixel) in row.chunks_exact_mut(3).enumerate() {
            let (left, right) = (6 * x, 3 * (2 * x + 1).min(w - 1));
            for c in 0..3 {
                let sum = [above[left + c], above[right + c], below[left + c], below[right + c]]
                    .map(u16::from)
                    .iter()
                    .sum::<u16>();
                pixel[c] = ((sum + 2) / 4) as u8;
            }
        }
    }
    RgbImage::from_raw(half_w as u32, half_h as u32, out).expect("3 bytes a pixel")
}

/// Labels at half their size (rounded up): of each 2x2 pixels the lower right one, which is the
/// nearest neighbour under half-pixel centres with ties away from the origin.
pub fn halve_labels(labels: &GrayImage) -> GrayImage {
    let (w, h) = labels.dimensions();
    GrayImage::from_fn(w.div_ceil(2), h.div_ceil(2), |x, y| {
        *labels.get_pixel((2 * x + 1).min(w - 1), (2 * y + 1).min(h - 1))
    })
}

#[cfg(test)]
#[path = "augment_tests.rs"]
mod tests;
