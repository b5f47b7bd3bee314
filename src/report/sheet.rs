//! Contact sheet: photo, ground truth and prediction of the worst frames.

use image::imageops::{self, FilterType};
use image::{GrayImage, Rgb, RgbImage};

use super::{FAINT, INK, Kept, PAPER, Scores, fit};
use crate::data::{Dataset, VOID};
use crate::error::Result;
use crate::segment::input::resize;
use crate::segment::render::mask;
use crate::segment::text::{Text, fill};

/// Width of a picture, and its largest height.
const WIDTH: u32 = 320;
const HEIGHT: u32 = 320;
const GAP: u32 = 6;
const MARGIN: u32 = 24;
/// Height of a frame's caption.
const CAPTION: u32 = 30;
/// Frames side by side, where there are that many.
const COLUMNS: usize = 2;
/// Colour of void in the ground truth.
const VOID_COLOUR: [u8; 3] = [0, 0, 0];

/// Draws the kept frames of `scores`, the worst first, left to right and down; `photo` reads a
/// frame's image.
///
/// # Errors
/// Those of `photo`.
pub fn draw(
    title: &str,
    dataset: &Dataset,
    scores: &Scores,
    photo: &dyn Fn(usize) -> Result<RgbImage>,
) -> Result<RgbImage> {
    let frames = &scores.worst;
    let columns = COLUMNS.min(frames.len()).max(1) as u32;
    let (heading, names, small) = (Text::new(24.0), Text::new(17.0), Text::new(15.0));
    let column = 3 * WIDTH + 2 * GAP;
    let width = 2 * MARGIN + columns * column + (columns - 1) * 2 * MARGIN;
    let legend = Legend::new(dataset, &small, width - 2 * MARGIN);
    // All frames of a data set have one shape as a rule; the tallest counts.
    let height = |kept: &Kept| scaled(kept.truth.dimensions()).1;
    let tallest = frames.iter().map(height).max().unwrap_or(HEIGHT);
    let row = CAPTION + tallest + 18;
    let rows = (frames.len() as u32).div_ceil(columns);
    let top = MARGIN + 40 + legend.height + 34;
    let mut sheet = RgbImage::from_pixel(width, top + rows * row + MARGIN, Rgb(PAPER));

    let left = i64::from(MARGIN);
    let scored = scores.all.iter().filter(|score| score.miou.is_some()).count();
    let line = format!("{title}: the {} frames of lowest mIoU of {scored}", frames.len());
    heading.draw(&mut sheet, left, left, INK, &fit(&heading, &line, width - 2 * MARGIN));
    legend.draw(&mut sheet, &small, (MARGIN, MARGIN + 40));
    for c in 0..columns {
        let x = MARGIN + c * (column + 2 * MARGIN);
        for (i, name) in ["photo", "ground truth", "prediction"].into_iter().enumerate() {
            let x = i64::from(x + i as u32 * (WIDTH + GAP));
            names.draw(&mut sheet, x, i64::from(top) - 26, FAINT, name);
        }
    }
    for (i, kept) in frames.iter().enumerate() {
        let (c, r) = (i as u32 % columns, i as u32 / columns);
        let (x, y) = (MARGIN + c * (column + 2 * MARGIN), top + r * row);
        let caption = format!(
            "{}. {}   mIoU {:.1} %, accuracy {:.1} %",
            i + 1,
            dataset.samples[kept.index].name,
            100.0 * kept.miou,
            100.0 * kept.accuracy
        );
        let at = (i64::from(x), i64::from(y) + 6);
        names.draw(&mut sheet, at.0, at.1, INK, &fit(&names, &caption, column));
        let (w, h) = scaled(kept.truth.dimensions());
        let pictures = [
            resize(&photo(kept.index)?, w as usize, h as usize)?,
            coloured(&kept.truth, &dataset.palette, (w, h)),
            coloured(&kept.prediction, &dataset.palette, (w, h)),
        ];
        for (k, picture) in pictures.iter().enumerate() {
            let x = x + k as u32 * (WIDTH + GAP);
            imageops::replace(&mut sheet, picture, i64::from(x), i64::from(y + CAPTION));
        }
    }
    Ok(sheet)
}

/// Size of a picture of a frame.
fn scaled((w, h): (u32, u32)) -> (u32, u32) {
    let scale = (f64::from(WIDTH) / f64::from(w)).min(f64::from(HEIGHT) / f64::from(h));
    let side = |side: u32| ((f64::from(side) * scale).round() as u32).max(1);
    (side(w), side(h))
}

/// Labels in their colours; nearest, so that no colour appears that stands for no class.
fn coloured(labels: &GrayImage, palette: &[[u8; 3]], (w, h): (u32, u32)) -> RgbImage {
    mask(&imageops::resize(labels, w, h, FilterType::Nearest), palette)
}

/// Swatches of the classes and of void, in as many lines as they need.
struct Legend {
    /// Line, horizontal place, colour, name.
    entries: Vec<(u32, u32, [u8; 3], String)>,
    height: u32,
}

const SWATCH: u32 = 16;
const LINE: u32 = 26;

impl Legend {
    fn new(dataset: &Dataset, text: &Text, width: u32) -> Self {
        let void = ("void".to_string(), VOID_COLOUR);
        debug_assert!(dataset.palette.len() <= usize::from(VOID));
        let classes = dataset.classes.iter().cloned().zip(dataset.palette.iter().copied());
        let (mut line, mut x) = (0, 0);
        let mut entries = Vec::new();
        for (name, colour) in classes.chain([void]) {
            let needed = SWATCH + 6 + text.width(&name) + 18;
            if x > 0 && x + needed > width {
                (line, x) = (line + 1, 0);
            }
            entries.push((line, x, colour, name));
            x += needed;
        }
        Legend { entries, height: (line + 1) * LINE }
    }

    fn draw(&self, image: &mut RgbImage, text: &Text, (left, top): (u32, u32)) {
        for (line, x, colour, name) in &self.entries {
            let (x, y) = (i64::from(left + x), i64::from(top + line * LINE));
            fill(image, (x, y), (SWATCH, SWATCH), *colour, 1.0);
            text.draw(image, x + i64::from(SWATCH) + 6, y, INK, name);
        }
    }
}

#[cfg(test)]
mod tests {
    use image::Luma;

    use super::*;
    use crate::data::DatasetKind;
    use crate::model::classes;
    use crate::report::Score;

    #[test]
    fn a_sheet_shows_photo_truth_and_prediction_side_by_side() {
        let (names, palette) = classes::table(11);
        let sample = |name: &str| crate::data::Sample {
            image: "a.png".into(),
            label: "a.png".into(),
            name: name.into(),
            encoding: crate::data::LabelEncoding::Camvid,
        };
        let data = Dataset {
            kind: DatasetKind::Camvid,
            root: "data".into(),
            splits: vec!["val".into()],
            classes: names,
            palette,
            samples: vec![sample("one"), sample("two"), sample("three")],
        };
        let plane = |class: u8| GrayImage::from_pixel(48, 36, Luma([class]));
        let mut scores = Scores::new(3);
        for index in 0..3 {
            let (truth, prediction) = (plane(4), plane(10));
            scores.worst.push(Kept { index, miou: 0.1, accuracy: 0.2, prediction, truth });
            scores.all.push(Score {
                name: String::new(),
                miou: Some(0.1),
                accuracy: Some(0.2),
                pixels: 1,
                iou: Vec::new(),
            });
        }
        let photo = |_| Ok(RgbImage::from_pixel(48, 36, Rgb([1, 200, 3])));
        let sheet = draw("model on val", &data, &scores, &photo).unwrap();
        let area = (320 * 240) as usize;
        for (colour, what) in
            [([1, 200, 3], "photo"), (data.palette[4], "truth"), (data.palette[10], "prediction")]
        {
            let count = sheet.pixels().filter(|p| p.0 == colour).count();
            // Three frames, and for the classes a swatch each.
            assert!((3 * area..3 * area + 400).contains(&count), "{what}: {count} pixels");
        }
    }

    #[test]
    fn pictures_keep_the_shape_of_their_frame() {
        assert_eq!(scaled((480, 360)), (320, 240));
        assert_eq!(scaled((2048, 1024)), (320, 160));
        assert_eq!(scaled((100, 400)), (80, 320));
        assert_eq!(scaled((1, 5000)), (1, 320));
    }
}
