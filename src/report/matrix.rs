//! Picture of a confusion matrix: what each class was taken for.

use image::{Rgb, RgbImage, imageops};

use super::{FAINT, INK, PAPER, fit};
use crate::metrics::Confusion;
use crate::segment::text::{Text, fill};

const MARGIN: u32 = 24;
/// Room for a class name beside a row or above a column.
const NAME: u32 = 130;
/// Columns behind the matrix: IoU and share of the pixels.
const EXTRA: u32 = 76;
const RIGHT: [f32; 3] = [23.0, 92.0, 160.0];
const WRONG: [f32; 3] = [192.0, 47.0, 38.0];
/// Values are written into cells of at least this side.
const READABLE: u32 = 34;

/// Draws the matrix, a row per true class and a column per predicted one, each cell the share of
/// the row's pixels in percent: blue on the diagonal, red beside it. Behind each row the class's
/// IoU and its share of all labelled pixels. Rows of classes that do not occur stay empty.
pub fn draw(title: &str, classes: &[String], confusion: &Confusion) -> RgbImage {
    let count = classes.len() as u32;
    let cell = (1100 / count.max(1)).clamp(6, 56);
    let (heading, small) = (Text::new(24.0), Text::new(15.0));
    let values = Text::new((cell as f32 * 0.34).clamp(11.0, 17.0));
    // Names shrink with the cells, down to where they can still be told apart.
    let names = Text::new((cell as f32 * 0.62).clamp(6.0, 16.0));
    let side = count * cell;
    let (left, top) = (MARGIN + 26 + NAME, MARGIN + 44 + 26 + NAME);
    let width = (left + side + 2 * EXTRA + MARGIN).max(700);
    let mut image = RgbImage::from_pixel(width, top + side + 46 + MARGIN, Rgb(PAPER));

    let line = format!(
        "{title}: mIoU {:.2} %, global accuracy {:.2} %",
        100.0 * confusion.miou(),
        100.0 * confusion.global_accuracy()
    );
    let margin = i64::from(MARGIN);
    heading.draw(&mut image, margin, margin, INK, &fit(&heading, &line, width - 2 * MARGIN));
    let middle = |start: u32, text: &str| {
        i64::from(start) + (i64::from(side) - i64::from(small.width(text))) / 2
    };
    let prediction = "predicted class";
    small.draw(&mut image, middle(left, prediction), margin + 44, FAINT, prediction);
    let truth = "true class";
    upright(&mut image, &small, truth, (margin, middle(top, truth)), FAINT);
    let note = "each row is 100 %: the pixels of a true class, by what they were taken for";
    small.draw(&mut image, i64::from(left), i64::from(top + side + 14), FAINT, note);
    for (i, title) in ["IoU %", "pixels %"].into_iter().enumerate() {
        let x = extra(left + side, i as u32) - i64::from(small.width(title));
        small.draw(&mut image, x, i64::from(top) - 24, FAINT, title);
    }

    let total = confusion.total() as f64;
    let half = |height: u32| (i64::from(cell) - i64::from(height)) / 2;
    for (t, iou) in confusion.per_class_iou().into_iter().enumerate() {
        let y = top + t as u32 * cell;
        let name = fit(&names, &classes[t], NAME - 8);
        let x = i64::from(left) - 8 - i64::from(names.width(&name));
        names.draw(&mut image, x, i64::from(y) + half(names.line_height()), INK, &name);
        let start = left + t as u32 * cell;
        let x = i64::from(start) + half(names.line_height());
        let bottom = i64::from(top) - 8 - i64::from(names.width(&name));
        upright(&mut image, &names, &name, (x, bottom), INK);

        let pixels: u64 = (0..confusion.classes()).map(|p| confusion.count(t, p)).sum();
        for p in 0..confusion.classes() {
            let share = confusion.count(t, p) as f64 / (pixels.max(1)) as f64;
            let corner = (left + p as u32 * cell, y);
            draw_cell(&mut image, &values, corner, cell, share, t == p);
        }
        let text = if iou.is_nan() { "absent".into() } else { format!("{:.1}", 100.0 * iou) };
        let share = format!("{:.1}", 100.0 * pixels as f64 / total);
        for (i, text) in [text, share].into_iter().enumerate() {
            let x = extra(left + side, i as u32) - i64::from(names.width(&text));
            names.draw(&mut image, x, i64::from(y) + half(names.line_height()), INK, &text);
        }
    }
    image
}

/// Right edge of a column behind the matrix.
fn extra(end: u32, column: u32) -> i64 {
    i64::from(end + (column + 1) * EXTRA - 8)
}

fn draw_cell(
    image: &mut RgbImage,
    text: &Text,
    (x, y): (u32, u32),
    cell: u32,
    share: f64,
    diagonal: bool,
) {
    let (x, y) = (i64::from(x), i64::from(y));
    // The root lifts small confusions, which are what one looks for.
    let strength = if diagonal { share } else { share.sqrt() } as f32;
    let full = if diagonal { RIGHT } else { WRONG };
    let mix = |c: f32| (250.0 + (c - 250.0) * strength).round() as u8;
    let colour = full.map(mix);
    // A pixel of paper between cells is the grid.
    let gap = u32::from(cell > 8);
    fill(image, (x, y), (cell - gap, cell - gap), colour, 1.0);
    if cell < READABLE || share <= 0.0 {
        return;
    }
    let percent = 100.0 * share;
    let value = match percent {
        p if p < 0.05 => return,
        p if p < 9.95 => format!("{p:.1}"),
        p => format!("{p:.0}"),
    };
    let ink = if strength > 0.55 { PAPER } else { INK };
    let left = x + (i64::from(cell) - i64::from(text.width(&value))) / 2;
    let top = y + (i64::from(cell) - i64::from(text.line_height())) / 2;
    text.draw(image, left, top, ink, &value);
}

/// A line that reads from below, its upper left corner at (x, y).
fn upright(image: &mut RgbImage, text: &Text, line: &str, (x, y): (i64, i64), colour: [u8; 3]) {
    let (w, h) = (text.width(line).max(1) + 2, text.line_height() + 2);
    let mut lying = RgbImage::from_pixel(w, h, Rgb(PAPER));
    text.draw(&mut lying, 1, 0, colour, line);
    imageops::replace(image, &imageops::rotate270(&lying), x, y);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(image: &RgbImage, count: u32, t: u32, p: u32) -> [u8; 3] {
        let cell = (1100 / count).clamp(6, 56);
        let (left, top) = (MARGIN + 26 + NAME, MARGIN + 44 + 26 + NAME);
        // Near a corner of the cell, where no value is written.
        image.get_pixel(left + p * cell + 2, top + t * cell + 2).0
    }

    #[test]
    fn rows_are_shares_blue_on_the_diagonal_and_red_beside_it() {
        let mut confusion = Confusion::new(3);
        // Class 0: three right, one taken for 1. Class 1: all taken for 2. Class 2 never occurs.
        confusion.add(&[0, 0, 0, 1, 2, 2], &[0, 0, 0, 0, 1, 1]).unwrap();
        let names = ["road", "sky", "a class with a name that is too long"].map(String::from);
        let image = draw("model", &names, &confusion);
        let [r, _, b] = at(&image, 3, 0, 0);
        assert!(b > r, "a right class is blue");
        let [r, g, b] = at(&image, 3, 0, 1);
        assert!(r > b && g < 200, "a quarter is visibly red: {r} {g} {b}");
        assert_eq!(at(&image, 3, 1, 2), WRONG.map(|c| c as u8), "all of a row is full red");
        assert_eq!(at(&image, 3, 0, 2), [250; 3], "nothing is pale");
        assert_eq!(at(&image, 3, 2, 2), [250; 3], "an absent class stays empty");
    }

    #[test]
    fn any_number_of_classes_can_be_drawn() {
        for count in [1, 19, 255] {
            let mut confusion = Confusion::new(count);
            confusion.add(&[0], &[0]).unwrap();
            let names: Vec<String> = (0..count).map(|i| format!("class {i}")).collect();
            let image = draw("model", &names, &confusion);
            assert!(
                image.width() < 2200 && image.height() < 2000,
                "{count}: {:?}",
                image.dimensions()
            );
        }
    }
}
