//! Pictures and lists of an evaluation: the worst frames beside their ground truth, the confusion
//! matrix, every frame's score.

pub mod matrix;
pub mod sheet;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, GrayImage, ImageEncoder, RgbImage};
use serde::Serialize;

use crate::data::{Dataset, decode};
use crate::error::{Error, Result};
use crate::evaluate::Frame;
use crate::files::write_atomic;
use crate::metrics::Confusion;

/// A frame's figures, from a confusion matrix of its own.
#[derive(Debug, Clone, Serialize)]
pub struct Score {
    /// Frame name.
    pub name: String,
    /// Mean IoU over the classes that occur in the frame's truth or prediction, 0 to 1; none for
    /// a frame without labelled pixels.
    pub miou: Option<f64>,
    /// Share of its labelled pixels whose class is right.
    pub accuracy: Option<f64>,
    /// Labelled pixels.
    pub pixels: u64,
    /// IoU per class, none where it does not occur.
    pub iou: Vec<Option<f64>>,
}

/// A frame that is kept for the contact sheet.
#[derive(Debug, Clone)]
pub struct Kept {
    /// Index into the data set's samples.
    pub index: usize,
    /// Its mIoU.
    pub miou: f64,
    /// Share of right pixels.
    pub accuracy: f64,
    /// Class per pixel at full size.
    pub prediction: GrayImage,
    /// Truth at full size, 255 = void.
    pub truth: GrayImage,
}

/// Scores frames as they come and keeps the worst of them.
#[derive(Debug)]
pub struct Scores {
    keep: usize,
    /// In the data set's order.
    pub all: Vec<Score>,
    /// The worst frames, the worst first.
    pub worst: Vec<Kept>,
}

impl Scores {
    /// Nothing scored yet; at most `keep` frames stay in memory.
    pub fn new(keep: usize) -> Self {
        Scores { keep, all: Vec::new(), worst: Vec::new() }
    }

    /// Scores a frame of `dataset`.
    ///
    /// # Errors
    /// A prediction that does not fit its truth.
    pub fn add(&mut self, dataset: &Dataset, frame: &Frame) -> Result<()> {
        let mut confusion = Confusion::new(dataset.classes.len());
        confusion.add(frame.prediction, frame.truth.as_raw())?;
        let known = |value: f64| value.is_finite().then_some(value);
        let score = Score {
            name: dataset.samples[frame.index].name.clone(),
            miou: known(confusion.miou()),
            accuracy: known(confusion.global_accuracy()),
            pixels: confusion.total(),
            iou: confusion.per_class_iou().into_iter().map(known).collect(),
        };
        if let (Some(miou), Some(accuracy)) = (score.miou, score.accuracy) {
            let place = self.worst.partition_point(|kept| kept.miou <= miou);
            if place < self.keep {
                let (w, h) = frame.truth.dimensions();
                let prediction = GrayImage::from_raw(w, h, frame.prediction.to_vec());
                let prediction = prediction.ok_or_else(|| {
                    Error::Failed(format!("{}: expected {w}x{h} predictions", score.name))
                })?;
                let truth = frame.truth.clone();
                let kept = Kept { index: frame.index, miou, accuracy, prediction, truth };
                self.worst.insert(place, kept);
                self.worst.truncate(self.keep);
            }
        }
        self.all.push(score);
        Ok(())
    }

    /// One line per frame, the worst first: name, mIoU, accuracy, labelled pixels, then
    /// `iou_CLASS` per class; empty cells where there is no figure.
    pub fn csv(&self, classes: &[String]) -> String {
        let plain = |name: &str| name.replace([',', '"', '\r', '\n'], "_");
        let mut text = String::from("frame,miou,accuracy,labelled_pixels");
        classes.iter().for_each(|class| text.extend([",iou_", &plain(class)]));
        text.push('\n');
        let mut sorted: Vec<&Score> = self.all.iter().collect();
        let rank = |score: &Score| score.miou.unwrap_or(f64::INFINITY);
        sorted.sort_by(|a, b| rank(a).total_cmp(&rank(b)));
        let cell = |value: &Option<f64>| value.map_or(String::new(), |v| format!("{v:.6}"));
        for score in sorted {
            let (miou, accuracy) = (cell(&score.miou), cell(&score.accuracy));
            let _ = write!(text, "{},{miou},{accuracy},{}", plain(&score.name), score.pixels);
            score.iou.iter().for_each(|iou| text.extend([",", &cell(iou)]));
            text.push('\n');
        }
        text
    }
}

/// Writes `worst.png`, `confusion.png` and `frames.csv` to a folder, and returns their paths.
/// `title` names model and data in the pictures.
///
/// # Errors
/// A photo that can no longer be read, an unwritable file.
pub fn write(
    folder: &Path,
    title: &str,
    dataset: &Dataset,
    confusion: &Confusion,
    scores: &Scores,
) -> Result<Vec<PathBuf>> {
    let mut written = Vec::new();
    if !scores.worst.is_empty() {
        let photo = |index: usize| decode::image(&dataset.samples[index].image);
        let picture = sheet::draw(title, dataset, scores, &photo)?;
        let path = folder.join("worst.png");
        write_png(&path, &picture)?;
        written.push(path);
    }
    let picture = matrix::draw(title, &dataset.classes, confusion);
    let path = folder.join("confusion.png");
    write_png(&path, &picture)?;
    written.push(path);
    let (path, text) = (folder.join("frames.csv"), scores.csv(&dataset.classes));
    write_atomic(&path, |file| file.write_all(text.as_bytes()))?;
    written.push(path);
    Ok(written)
}

fn write_png(path: &Path, picture: &RgbImage) -> Result<()> {
    let mut png = Vec::new();
    let (w, h) = picture.dimensions();
    PngEncoder::new(&mut png)
        .write_image(picture, w, h, ExtendedColorType::Rgb8)
        .map_err(|e| Error::Failed(format!("{}: cannot encode: {e}", path.display())))?;
    write_atomic(path, |file| file.write_all(&png))
}

/// Ink and paper of the pictures.
pub(crate) const INK: [u8; 3] = [25, 25, 30];
pub(crate) const FAINT: [u8; 3] = [110, 110, 118];
pub(crate) const PAPER: [u8; 3] = [255, 255, 255];

/// Cuts a line with an ellipsis so that it is at most `width` pixels wide.
pub(crate) fn fit(text: &crate::segment::text::Text, line: &str, width: u32) -> String {
    if text.width(line) <= width {
        return line.to_string();
    }
    let mut cut: String = line.to_string();
    while !cut.is_empty() && text.width(&format!("{cut}…")) > width {
        cut.pop();
    }
    format!("{cut}…")
}

#[cfg(test)]
mod tests {
    use image::Luma;

    use super::*;
    use crate::data::{DatasetKind, LabelEncoding, Sample};

    fn dataset(frames: usize) -> Dataset {
        let sample = |i: usize| Sample {
            image: format!("{i}.png").into(),
            label: format!("{i}.png").into(),
            name: format!("frame{i}"),
            encoding: LabelEncoding::Camvid,
        };
        let (classes, palette) = crate::model::classes::table(11);
        Dataset {
            kind: DatasetKind::Camvid,
            root: "data".into(),
            splits: vec!["val".into()],
            classes,
            palette,
            samples: (0..frames).map(sample).collect(),
        }
    }

    /// Ten pixels of class 0, of which the first `wrong` are taken for class 1.
    fn scored(wrong: &[usize], keep: usize) -> (Dataset, Scores) {
        let data = dataset(wrong.len());
        let mut scores = Scores::new(keep);
        let truth = GrayImage::from_pixel(10, 1, Luma([0]));
        for (index, &wrong) in wrong.iter().enumerate() {
            let prediction: Vec<u8> = (0..10).map(|i| u8::from(i < wrong)).collect();
            let confusion = Confusion::new(11);
            let frame =
                Frame { index, truth: &truth, prediction: &prediction, confusion: &confusion };
            scores.add(&data, &frame).unwrap();
        }
        (data, scores)
    }

    #[test]
    fn the_worst_frames_are_kept_in_order_and_every_frame_is_listed() {
        let (data, scores) = scored(&[2, 9, 0, 5, 7], 3);
        let kept: Vec<usize> = scores.worst.iter().map(|kept| kept.index).collect();
        assert_eq!(kept, [1, 4, 3]);
        // One of ten pixels right: IoU 0.1 of class 0 and 0 of class 1, which was never there.
        assert_eq!(scores.worst[0].miou, 0.05);
        let csv = scores.csv(&data.classes);
        let lines: Vec<&str> = csv.lines().collect();
        assert_eq!(lines.len(), 6);
        assert!(lines[1].starts_with("frame1,0.050000,0.100000,10,0.100000,0.000000,,"), "{csv}");
        assert!(lines[5].starts_with("frame2,1.000000,1.000000,10,1.000000,,"), "{csv}");
        assert!(lines.iter().all(|line| line.split(',').count() == 4 + 11), "{csv}");
    }

    #[test]
    fn a_frame_of_void_has_no_score_and_is_not_among_the_worst() {
        let data = dataset(1);
        let mut scores = Scores::new(5);
        let truth = GrayImage::from_pixel(4, 1, Luma([255]));
        let confusion = Confusion::new(11);
        let frame = Frame { index: 0, truth: &truth, prediction: &[0; 4], confusion: &confusion };
        scores.add(&data, &frame).unwrap();
        assert!(scores.worst.is_empty());
        assert!(scores.csv(&data.classes).contains("frame0,,,0,,"));
    }

    #[test]
    fn long_lines_are_cut_to_their_width() {
        let text = crate::segment::text::Text::new(14.0);
        let line = "a name that is far too long for its column";
        let cut = fit(&text, line, 120);
        assert!(text.width(&cut) <= 120 && cut.ends_with('…') && line.starts_with(&cut[..8]));
        assert_eq!(fit(&text, "short", 120), "short");
    }
}
