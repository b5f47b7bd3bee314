//! Text on RGB images: what legends need and no more.

use ab_glyph::{Font, FontRef, PxScale, ScaleFont, point};
use image::{Rgb, RgbImage};

use crate::font::FONT;

/// A text size, ready to measure and draw.
pub struct Text {
    font: FontRef<'static>,
    px: f32,
}

impl Text {
    /// The embedded typeface at `px` pixels from ascender to descender.
    pub fn new(px: f32) -> Self {
        let font = FontRef::try_from_slice(FONT).expect("the embedded font is a valid TrueType");
        Text { font, px }
    }

    /// Height of a line in pixels.
    pub fn line_height(&self) -> u32 {
        self.px.ceil() as u32
    }

    /// Width of a line in pixels.
    pub fn width(&self, line: &str) -> u32 {
        let font = self.font.as_scaled(PxScale::from(self.px));
        let mut width = 0.0;
        let mut previous = None;
        for c in line.chars() {
            let id = font.glyph_id(c);
            width += previous.map_or(0.0, |p| font.kern(p, id)) + font.h_advance(id);
            previous = Some(id);
        }
        width.ceil() as u32
    }

    /// Draws one line whose box has its upper left corner at (x, y). What falls outside of the
    /// image is cut off.
    pub fn draw(&self, image: &mut RgbImage, x: i64, y: i64, colour: [u8; 3], line: &str) {
        let font = self.font.as_scaled(PxScale::from(self.px));
        let mut pen = x as f32;
        let baseline = y as f32 + font.ascent();
        let mut previous = None;
        for c in line.chars() {
            let id = font.glyph_id(c);
            pen += previous.map_or(0.0, |p| font.kern(p, id));
            previous = Some(id);
            let glyph = id.with_scale_and_position(self.px, point(pen, baseline));
            pen += font.h_advance(id);
            let Some(outline) = font.outline_glyph(glyph) else { continue };
            let corner = outline.px_bounds().min;
            let (left, top) = (corner.x as i64, corner.y as i64);
            outline.draw(|dx, dy, coverage| {
                blend(image, left + i64::from(dx), top + i64::from(dy), colour, coverage);
            });
        }
    }
}

/// Fills the part of a rectangle that lies inside the image, `opacity` 0 to 1.
pub fn fill(
    image: &mut RgbImage,
    (x, y): (i64, i64),
    (width, height): (u32, u32),
    colour: [u8; 3],
    opacity: f32,
) {
    for j in y..y + i64::from(height) {
        for i in x..x + i64::from(width) {
            blend(image, i, j, colour, opacity);
        }
    }
}

fn blend(image: &mut RgbImage, x: i64, y: i64, colour: [u8; 3], opacity: f32) {
    let inside =
        (0..i64::from(image.width())).contains(&x) && (0..i64::from(image.height())).contains(&y);
    if !inside {
        return;
    }
    let opacity = opacity.clamp(0.0, 1.0);
    let Rgb(pixel) = image.get_pixel_mut(x as u32, y as u32);
    for (p, c) in pixel.iter_mut().zip(colour) {
        *p = (f32::from(*p) * (1.0 - opacity) + f32::from(c) * opacity).round() as u8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_stays_in_its_box_and_is_cut_off_at_the_edge() {
        let text = Text::new(20.0);
        let line = "Pavement 12.5 %";
        let (w, h) = (text.width(line), text.line_height());
        let mut image = RgbImage::new(w + 40, h + 40);
        text.draw(&mut image, 20, 20, [255, 255, 255], line);
        let inked = |image: &RgbImage| -> Vec<(u32, u32)> {
            image
                .enumerate_pixels()
                .filter(|(_, _, p)| p.0[0] > 0)
                .map(|(x, y, _)| (x, y))
                .collect()
        };
        let ink = inked(&image);
        assert!(ink.len() > 200, "a line of text leaves ink, found {} pixels", ink.len());
        // Antialiasing may touch one pixel beyond the advance box.
        assert!(
            ink.iter().all(|&(x, y)| { (19..=w + 21).contains(&x) && (19..=h + 21).contains(&y) })
        );
        let mut tiny = RgbImage::new(3, 3);
        text.draw(&mut tiny, -40, -5, [255, 255, 255], line);
    }

    #[test]
    fn longer_text_is_wider_and_larger_text_too() {
        let small = Text::new(10.0);
        assert!(small.width("Building") > small.width("Build"));
        assert!(Text::new(20.0).width("Build") > small.width("Build"));
        assert_eq!(small.width(""), 0);
    }
}
