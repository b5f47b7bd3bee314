//! `plot.png`: training loss and validation mIoU over the epochs.

use std::path::Path;
use std::sync::OnceLock;

use image::{ExtendedColorType, ImageEncoder, codecs::png::PngEncoder};
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};

use super::history::EpochRecord;
use crate::error::{Error, Result};
use crate::files::write_atomic;
use crate::font::FONT;

const WIDTH: u32 = 960;
const HEIGHT: u32 = 540;
/// Height of the strip above the chart.
const STRIP: u32 = 40;
const LOSS: RGBColor = RGBColor(31, 119, 180);
const MIOU: RGBColor = RGBColor(214, 39, 40);

/// Draws the history of a run as a PNG of 960 x 540: loss on the left axis, mIoU on the right.
/// An empty history draws nothing.
///
/// # Errors
/// An unwritable file, or the plotting library's own words.
pub fn write_plot(path: &Path, title: &str, history: &[EpochRecord]) -> Result<()> {
    if history.is_empty() {
        return Ok(());
    }
    let pixels = draw(title, history)
        .map_err(|e| Error::Failed(format!("{}: cannot draw the plot: {e}", path.display())))?;
    let mut png = Vec::new();
    PngEncoder::new(&mut png)
        .write_image(&pixels, WIDTH, HEIGHT, ExtendedColorType::Rgb8)
        .map_err(|e| Error::Failed(format!("{}: cannot encode the plot: {e}", path.display())))?;
    write_atomic(path, |file| file.write_all(&png))
}

fn draw(title: &str, history: &[EpochRecord]) -> std::result::Result<Vec<u8>, String> {
    // The backend finds fonts by family name only, in a table of the process.
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    if !REGISTERED.get_or_init(|| register_font("sans-serif", FontStyle::Normal, FONT).is_ok()) {
        return Err("the embedded font is not a TrueType file".into());
    }
    let words = |e: DrawingAreaErrorKind<_>| e.to_string();

    let mut pixels = vec![0u8; (WIDTH * HEIGHT * 3) as usize];
    {
        let area = BitMapBackend::with_buffer(&mut pixels, (WIDTH, HEIGHT)).into_drawing_area();
        area.fill(&WHITE).map_err(words)?;

        let loss: Vec<(f64, f64)> = history.iter().map(|r| (r.epoch as f64, r.loss)).collect();
        let miou: Vec<(f64, f64)> = history
            .iter()
            .filter_map(|r| r.validation.as_ref().map(|v| (r.epoch as f64, v.miou)))
            .collect();
        let last = history.last().map_or(1.0, |r| r.epoch as f64).max(2.0);
        let top = loss.iter().map(|p| p.1).fold(0.0, f64::max).max(1e-3) * 1.05;

        // Title and legend have a strip of their own, where they cannot hide a curve.
        let (strip, area) = area.split_vertically(STRIP as i32);
        let best = miou.iter().map(|p| p.1).fold(0.0, f64::max);
        let entries = [
            (LOSS, "training loss".to_string()),
            (MIOU, format!("validation mIoU (best {best:.3})")),
        ];
        head(&strip, title, &entries[..if miou.is_empty() { 1 } else { 2 }]).map_err(words)?;

        let mut chart = ChartBuilder::on(&area)
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(56)
            .right_y_label_area_size(56)
            .build_cartesian_2d(1.0..last, 0.0..top)
            .map_err(words)?
            .set_secondary_coord(1.0..last, 0.0..1.0);
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .x_desc("epoch")
            .y_desc("training loss")
            // Early on, ticks fall between epochs: those stay unlabelled.
            .x_label_formatter(&|x| if x.fract() == 0.0 { format!("{x}") } else { String::new() })
            .label_style(("sans-serif", 15))
            .draw()
            .map_err(words)?;
        chart
            .configure_secondary_axes()
            .y_desc("validation mIoU")
            .label_style(("sans-serif", 15))
            .draw()
            .map_err(words)?;
        chart.draw_series(LineSeries::new(loss, LOSS.stroke_width(2))).map_err(words)?;
        // A single validation is a point, which a line would not show.
        let points: Vec<_> = miou.iter().map(|&p| Circle::new(p, 3, MIOU.filled())).collect();
        chart.draw_secondary_series(LineSeries::new(miou, MIOU.stroke_width(2))).map_err(words)?;
        chart.draw_secondary_series(points).map_err(words)?;
        area.present().map_err(words)?;
    }
    Ok(pixels)
}

type Area<'a> = DrawingArea<BitMapBackend<'a>, plotters::coord::Shift>;
type DrawError<'a> = DrawingAreaErrorKind<<BitMapBackend<'a> as DrawingBackend>::ErrorType>;

/// Title on the left, curves with their colours on the right.
fn head<'a>(
    strip: &Area<'a>,
    title: &str,
    entries: &[(RGBColor, String)],
) -> std::result::Result<(), DrawError<'a>> {
    const LINE: i32 = 24;
    let style = |size: u32| TextStyle::from(("sans-serif", size).into_font());
    strip.draw(&Text::new(title.to_string(), (68, 12), style(20)))?;
    let mut right = WIDTH as i32 - 68;
    for (colour, text) in entries.iter().rev() {
        let (width, _) = strip.estimate_text_size(text, &style(15))?;
        right -= width as i32;
        strip.draw(&Text::new(text.clone(), (right, 15), style(15)))?;
        let ends = [(right - LINE - 6, 23), (right - 6, 23)];
        strip.draw(&PathElement::new(ends.to_vec(), colour.stroke_width(3)))?;
        right -= LINE + 30;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::history::Validation;

    #[test]
    fn a_plot_shows_both_curves() {
        let history: Vec<EpochRecord> = (1..=20)
            .map(|epoch| EpochRecord {
                epoch,
                step: epoch as u64,
                lr: 5e-4,
                loss: 2.0 / epoch as f64,
                images_per_second: 1.0,
                seconds: 1.0,
                validation: (epoch % 2 == 0).then(|| Validation {
                    miou: 0.04 * epoch as f64,
                    global_accuracy: 0.9,
                    per_class_iou: Vec::new(),
                }),
            })
            .collect();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("plot.png");
        write_plot(&path, "run", &history).unwrap();
        let picture = image::open(&path).unwrap().to_rgb8();
        for colour in [LOSS, MIOU] {
            let count = picture.pixels().filter(|p| p.0 == [colour.0, colour.1, colour.2]).count();
            // A line two pixels wide across most of an 850 pixel wide chart.
            assert!(count > 500, "{count} pixels of {colour:?}");
        }
    }

    /// The legend once lay over the last epochs of a good run.
    #[test]
    fn a_curve_stays_visible_to_its_last_epoch_wherever_it_runs() {
        for miou in [0.05, 0.5, 0.95] {
            let record = |epoch| EpochRecord {
                epoch,
                step: 1,
                lr: 5e-4,
                loss: 1.0,
                images_per_second: 1.0,
                seconds: 1.0,
                validation: Some(Validation {
                    miou,
                    global_accuracy: 0.9,
                    per_class_iou: Vec::new(),
                }),
            };
            let history: Vec<EpochRecord> = (1..=30).map(record).collect();
            let pixels = draw("run", &history).unwrap();
            let pure = |x: u32, y: u32| {
                let at = ((y * WIDTH + x) * 3) as usize;
                pixels[at..at + 3] == [MIOU.0, MIOU.1, MIOU.2]
            };
            // Axes take up to 68 pixels on either side.
            let seen = |x: u32| (STRIP..HEIGHT).any(|y| pure(x, y));
            let hidden = (72..WIDTH - 72).filter(|&x| !seen(x)).count();
            assert_eq!(hidden, 0, "columns without the curve at mIoU {miou}");
        }
    }

    #[test]
    fn a_single_epoch_can_be_drawn() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("plot.png");
        let record = EpochRecord {
            epoch: 1,
            step: 1,
            lr: 5e-4,
            loss: 0.0,
            images_per_second: 1.0,
            seconds: 1.0,
            validation: None,
        };
        write_plot(&path, "run", &[record]).unwrap();
        assert!(path.exists());
    }
}
