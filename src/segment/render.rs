//! Pictures of a segmentation: colour mask, and the photo under it with a legend.

use image::{GrayImage, Rgb, RgbImage};

use super::text::{Text, fill};

const PANEL: [u8; 3] = [18, 18, 22];
const PANEL_OPACITY: f32 = 0.72;
const INK: [u8; 3] = [245, 245, 245];
/// Text heights between which the legend scales with the photo.
const TEXT_PX: std::ops::RangeInclusive<f32> = 11.0..=44.0;

/// How much of a picture a class covers.
#[derive(Debug, Clone, PartialEq)]
pub struct Share {
    /// Class index.
    pub class: usize,
    /// Pixels of the class.
    pub pixels: u64,
    /// Fraction of all pixels, 0 to 1.
    pub fraction: f64,
}

impl Share {
    /// In percent with one decimal; what is there but would round to nothing reads "<0.1".
    pub fn percent(&self) -> String {
        if self.pixels > 0 && self.fraction < 0.0005 {
            "<0.1".into()
        } else {
            format!("{:.1}", self.fraction * 100.0)
        }
    }
}

/// Pixels per class, all classes in index order. A label of `classes` or more is not counted.
pub fn count(labels: &GrayImage, classes: usize) -> Vec<u64> {
    let mut histogram = [0u64; 256];
    labels.as_raw().iter().for_each(|&l| histogram[usize::from(l)] += 1);
    histogram[..classes].to_vec()
}

/// The classes that are present, largest share first.
pub fn shares(pixels: &[u64]) -> Vec<Share> {
    let total: u64 = pixels.iter().sum();
    let mut shares: Vec<Share> = pixels
        .iter()
        .enumerate()
        .filter(|&(_, &pixels)| pixels > 0)
        .map(|(class, &pixels)| Share { class, pixels, fraction: pixels as f64 / total as f64 })
        .collect();
    shares.sort_by_key(|s| (std::cmp::Reverse(s.pixels), s.class));
    shares
}

/// Labels as colours; a label without a palette entry is black.
pub fn mask(labels: &GrayImage, palette: &[[u8; 3]]) -> RgbImage {
    let mut out = RgbImage::new(labels.width(), labels.height());
    paint(&mut out, labels, palette);
    out
}

/// [`mask`] over a picture of the labels' size.
pub fn paint(picture: &mut RgbImage, labels: &GrayImage, palette: &[[u8; 3]]) {
    for (pixel, &label) in picture.pixels_mut().zip(labels.as_raw()) {
        *pixel = Rgb(palette.get(usize::from(label)).copied().unwrap_or_default());
    }
}

/// Mixes the labels' colours into a photo of their size, half and half.
pub fn blend(photo: &mut RgbImage, labels: &GrayImage, palette: &[[u8; 3]]) {
    for (pixel, &label) in photo.pixels_mut().zip(labels.as_raw()) {
        let colour = palette.get(usize::from(label)).copied().unwrap_or_default();
        for (p, c) in pixel.0.iter_mut().zip(colour) {
            // Rounds halves up; in integers, since it runs on every sample of a video.
            *p = (u16::from(*p) + u16::from(c)).div_ceil(2) as u8;
        }
    }
}

/// The photo under its mask, with a legend of the classes present: swatch, name, share of pixels.
///
/// The picture has the photo's size: the legend lies in the corner where the labels change the
/// least. Only under a photo too small to hold it, the picture grows downwards (and to the right)
/// and the legend stands below.
pub fn overlay(
    photo: &RgbImage,
    labels: &GrayImage,
    shares: &[Share],
    classes: &[String],
    palette: &[[u8; 3]],
) -> RgbImage {
    let mut out = photo.clone();
    blend(&mut out, labels, palette);
    let legend = Legend::new(photo.dimensions(), shares, classes, palette);
    match legend.corner(labels) {
        Some(corner) => legend.draw(&mut out, corner, PANEL_OPACITY),
        None => {
            let (width, height) = photo.dimensions();
            let canvas = (width.max(legend.size.0), height + legend.size.1);
            let mut larger = RgbImage::from_pixel(canvas.0, canvas.1, Rgb(PANEL));
            image::imageops::replace(&mut larger, &out, 0, 0);
            legend.draw(&mut larger, (0, height), 1.0);
            out = larger;
        }
    }
    out
}

struct Row {
    name: String,
    share: String,
    colour: [u8; 3],
}

struct Legend {
    rows: Vec<Row>,
    text: Text,
    /// Height of a row, and the unit of all gaps a third of it.
    line: u32,
    share_width: u32,
    size: (u32, u32),
}

impl Legend {
    fn new(
        (width, height): (u32, u32),
        shares: &[Share],
        classes: &[String],
        palette: &[[u8; 3]],
    ) -> Self {
        let rows: Vec<Row> = shares
            .iter()
            .map(|share| Row {
                name: classes.get(share.class).cloned().unwrap_or_default(),
                share: format!("{} %", share.percent()),
                colour: palette.get(share.class).copied().unwrap_or_default(),
            })
            .collect();
        // Readable where the picture is shown at a third of a screen, and rows to spare.
        let by_height = height as f32 / (1.4 * rows.len() as f32 + 6.0);
        let px = (width as f32 / 46.0).min(by_height).clamp(*TEXT_PX.start(), *TEXT_PX.end());
        let text = Text::new(px);
        let line = (px * 1.25).ceil() as u32;
        let widest = |column: &dyn Fn(&Row) -> &str| {
            rows.iter().map(|r| text.width(column(r))).max().unwrap_or(0)
        };
        let (names, share_width) = (widest(&|r| &r.name), widest(&|r| &r.share));
        let gap = line / 3;
        let width = gap + line + gap + names + 2 * gap + share_width + gap + gap / 2;
        let size = (width, 2 * gap + line * rows.len() as u32);
        Legend { rows, text, line, share_width, size }
    }

    /// The corner (upper left of the panel) under which the labels change the least, so that the
    /// panel hides little; none where the panel would take more than half of a side.
    fn corner(&self, labels: &GrayImage) -> Option<(u32, u32)> {
        let (width, height) = labels.dimensions();
        let margin = self.line / 2;
        let (w, h) = (self.size.0 + margin, self.size.1 + margin);
        if w > width / 2 || h > height * 3 / 4 {
            return None;
        }
        let changes = |&(x, y): &(u32, u32)| -> usize {
            (y..y + self.size.1)
                .map(|row| {
                    let start = (row * width + x) as usize;
                    let line = &labels.as_raw()[start..start + self.size.0 as usize];
                    line.windows(2).filter(|pair| pair[0] != pair[1]).count()
                })
                .sum()
        };
        let corners =
            [(margin, margin), (width - w, margin), (margin, height - h), (width - w, height - h)];
        corners.into_iter().min_by_key(changes)
    }

    fn draw(&self, image: &mut RgbImage, (x, y): (u32, u32), opacity: f32) {
        let (x, mut y) = (i64::from(x), i64::from(y));
        fill(image, (x, y), self.size, PANEL, opacity);
        let gap = self.line / 3;
        let inset = i64::from(self.line / 8);
        y += i64::from(gap);
        for row in &self.rows {
            let left = x + i64::from(gap);
            let side = self.line - 2 * (self.line / 8);
            fill(image, (left, y + inset), (side, side), row.colour, 1.0);
            let baseline_box = y + i64::from(self.line - self.text.line_height()) / 2;
            let names = left + i64::from(self.line + gap);
            self.text.draw(image, names, baseline_box, INK, &row.name);
            let end = x + i64::from(self.size.0 - gap - gap / 2);
            let start = end - i64::from(self.text.width(&row.share).min(self.share_width));
            self.text.draw(image, start, baseline_box, INK, &row.share);
            y += i64::from(self.line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::Luma;

    const PALETTE: [[u8; 3]; 3] = [[200, 0, 0], [0, 200, 0], [0, 0, 200]];

    fn classes() -> Vec<String> {
        ["Road", "Sky", "Building with a long name"].map(String::from).into()
    }

    /// Left half class 0, right half class 1, one pixel of class 2 in the lower right.
    fn halves(width: u32, height: u32) -> GrayImage {
        let mut labels = GrayImage::from_fn(width, height, |x, _| Luma([u8::from(x >= width / 2)]));
        labels.put_pixel(width - 1, height - 1, Luma([2]));
        labels
    }

    #[test]
    fn shares_are_sorted_and_sum_to_one() {
        let shares = shares(&count(&halves(100, 50), 3));
        assert_eq!(shares.iter().map(|s| s.class).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(shares.iter().map(|s| s.pixels).sum::<u64>(), 5000);
        assert!((shares.iter().map(|s| s.fraction).sum::<f64>() - 1.0).abs() < 1e-12);
        let percent: Vec<_> = shares.iter().map(Share::percent).collect();
        assert_eq!(percent, ["50.0", "50.0", "<0.1"]);
    }

    #[test]
    fn the_mask_shows_each_label_in_its_colour() {
        let labels = halves(8, 4);
        let mask = mask(&labels, &PALETTE);
        for (x, y, pixel) in mask.enumerate_pixels() {
            assert_eq!(pixel.0, PALETTE[usize::from(labels.get_pixel(x, y).0[0])]);
        }
    }

    #[test]
    fn the_legend_shows_the_swatches_of_the_classes_present_only() {
        let (w, h) = (480, 360);
        let photo = RgbImage::from_pixel(w, h, Rgb([120; 3]));
        let labels = GrayImage::from_fn(w, h, |x, _| Luma([u8::from(x > 200)]));
        let out = overlay(&photo, &labels, &shares(&count(&labels, 3)), &classes(), &PALETTE);
        assert_eq!(out.dimensions(), (w, h), "a photo that can hold the legend keeps its size");
        let pure = |colour: [u8; 3]| out.pixels().filter(|p| p.0 == colour).count();
        // Blended pixels are never a palette colour: those that are belong to swatches.
        assert!(pure(PALETTE[0]) >= 64 && pure(PALETTE[1]) >= 64);
        assert_eq!(pure(PALETTE[2]), 0, "class 2 is absent");
        // Neither the photo nor a mask colour nor the panel is bright in all channels; ink is.
        let ink = out.pixels().filter(|p| p.0.iter().all(|&v| v > 150)).count();
        assert!(ink > 20, "names and shares are written, found {ink} bright pixels");
        assert_eq!(out.get_pixel(w / 2, h / 2).0, [60, 160, 60], "photo and mask, half each");
    }

    #[test]
    fn a_tiny_photo_gets_its_legend_below() {
        let labels = halves(20, 10);
        let photo = RgbImage::from_pixel(20, 10, Rgb([100; 3]));
        let out = overlay(&photo, &labels, &shares(&count(&labels, 3)), &classes(), &PALETTE);
        assert!(out.height() > 40 && out.width() > 60, "{:?}", out.dimensions());
        assert_eq!(out.get_pixel(0, 0).0, [150, 50, 50], "the photo stays at the upper left");
    }
}
