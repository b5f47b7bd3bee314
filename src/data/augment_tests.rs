//! Tests of the augmentation's geometry.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::*;

const MEAN: [f32; 3] = [0.41, 0.42, 0.43];
const STD: [f32; 3] = [0.3, 0.31, 0.32];

fn normalise() -> Normalise {
    Normalise::new(MEAN, STD)
}

/// Different everywhere, and smooth enough that a shift by a pixel changes every value.
fn image(w: u32, h: u32) -> RgbImage {
    RgbImage::from_fn(w, h, |x, y| {
        image::Rgb([(x * 5 % 256) as u8, (y * 7 % 256) as u8, ((x * 3 + y * 11) % 256) as u8])
    })
}

fn labels(w: u32, h: u32) -> GrayImage {
    GrayImage::from_fn(w, h, |x, y| image::Luma([((x / 3 + y / 5 * 4) % 11) as u8]))
}

fn apply(warp: &Warp, image: &RgbImage, labels: &GrayImage) -> (Vec<f32>, Vec<u8>) {
    let plane = warp.size().0 * warp.size().1;
    // Filled with what no pixel can be, so that a pixel left out shows.
    let (mut input, mut out) = (vec![f32::NAN; 3 * plane], vec![77; plane]);
    warp.image(image, &normalise(), &mut input);
    warp.labels(labels, &mut out);
    (input, out)
}

fn params(source: (usize, usize)) -> WarpParams {
    let (scale, offset) = ((1.0, 1.0), (0.0, 0.0));
    WarpParams { source, size: source, flip: false, degrees: 0.0, scale, offset }
}

#[test]
fn identity_is_exactly_the_normalised_image() {
    let (image, labels) = (image(37, 21), labels(37, 21));
    for warp in [
        Warp::resize((37, 21), (37, 21)),
        Augment::crop((37, 21)).draw((37, 21), &mut ChaCha8Rng::seed_from_u64(1)),
    ] {
        let (input, out) = apply(&warp, &image, &labels);
        assert_eq!(&out, labels.as_raw());
        for (i, pixel) in image.pixels().enumerate() {
            for c in 0..3 {
                let got = input[c * 37 * 21 + i];
                assert_eq!(got, normalise().value(c, f32::from(pixel[c])));
                // The definition, up to the rounding of its three f32 operations.
                let expected = (f32::from(pixel[c]) / 255.0 - MEAN[c]) / STD[c];
                assert!((got - expected).abs() < 1e-6, "{got} {expected}");
            }
        }
    }
}

#[test]
fn flipping_a_mirrored_sample_restores_it() {
    let (image, labels) = (image(24, 10), labels(24, 10));
    let mirrored =
        (image::imageops::flip_horizontal(&image), image::imageops::flip_horizontal(&labels));
    let flip = Warp::new(WarpParams { flip: true, ..params((24, 10)) });
    let identity = Warp::new(params((24, 10)));
    assert_eq!(apply(&flip, &mirrored.0, &mirrored.1), apply(&identity, &image, &labels));
}

#[test]
fn a_quarter_turn_goes_counter_clockwise() {
    // 90 degrees moves the pixel at the right end of the middle row to the top of the middle
    // column; on a square of odd side the map is exact up to rounding of cos(90 degrees).
    let mut labels = GrayImage::from_pixel(9, 9, image::Luma([0]));
    labels.put_pixel(8, 4, image::Luma([5]));
    let warp = Warp::new(WarpParams { degrees: 90.0, ..params((9, 9)) });
    let mut out = vec![77; 81];
    warp.labels(&labels, &mut out);
    assert_eq!(out[4], 5, "top of the middle column");
    assert_eq!(out.iter().filter(|v| **v == 5).count(), 1);
}

#[test]
fn ten_degrees_move_a_mark_where_trigonometry_says() {
    // A 5x5 mark at (40, 0) from the centre of 121x121 goes to 40 (cos, -sin): (39.4, -6.9).
    let mut labels = GrayImage::from_pixel(121, 121, image::Luma([0]));
    for (x, y) in (98..103).flat_map(|x| (58..63).map(move |y| (x, y))) {
        labels.put_pixel(x, y, image::Luma([3]));
    }
    let warp = Warp::new(WarpParams { degrees: 10.0, ..params((121, 121)) });
    let mut out = vec![0; 121 * 121];
    warp.labels(&labels, &mut out);
    let marked: Vec<usize> = (0..out.len()).filter(|i| out[*i] == 3).collect();
    let mean = |f: fn(usize) -> usize| {
        marked.iter().map(|i| f(*i) as f64).sum::<f64>() / marked.len() as f64
    };
    let (x, y) = (mean(|i| i % 121) - 60.0, mean(|i| i / 121) - 60.0);
    let (sin, cos) = 10f64.to_radians().sin_cos();
    // Nearest neighbour moves the 25 pixels' mean by a fraction of a pixel.
    assert!((x - 40.0 * cos).abs() < 0.3 && (y + 40.0 * sin).abs() < 0.3, "{x} {y}");
}

#[test]
fn uncovered_corners_are_void_and_mean_colour() {
    let (image, labels) = (image(60, 40), labels(60, 40));
    let warp = Warp::new(WarpParams { degrees: 10.0, ..params((60, 40)) });
    let (input, out) = apply(&warp, &image, &labels);
    for corner in [0, 59, 39 * 60, 40 * 60 - 1] {
        assert_eq!(out[corner], VOID);
        assert_eq!([0, 1, 2].map(|c| input[c * 2400 + corner]), [0.0; 3]);
    }
    assert_ne!(out[20 * 60 + 30], VOID);
    assert!(input.iter().all(|v| v.is_finite()));
}

#[test]
fn padding_is_void_all_around_a_smaller_image() {
    let (image, labels) = (image(20, 10), labels(20, 10));
    let warp = Warp::new(WarpParams { size: (32, 24), offset: (-7.0, -9.0), ..params((20, 10)) });
    let (input, out) = apply(&warp, &image, &labels);
    for y in 0..24usize {
        for x in 0..32usize {
            let i = y * 32 + x;
            let expected = match (x.checked_sub(7), y.checked_sub(9)) {
                (Some(sx @ 0..20), Some(sy @ 0..10)) => {
                    let red = f32::from(image.get_pixel(sx as u32, sy as u32)[0]);
                    assert_eq!(input[i], normalise().value(0, red));
                    labels.get_pixel(sx as u32, sy as u32)[0]
                }
                _ => {
                    assert_eq!(input[i], 0.0);
                    VOID
                }
            };
            assert_eq!(out[i], expected, "x {x} y {y}");
        }
    }
}

#[test]
fn image_and_labels_stay_aligned_under_random_warps() {
    // Two halves, left dark with label 1, right bright with label 2: wherever the warped image
    // is clearly dark or clearly bright, the label must say the same.
    let edge = 45;
    let image =
        RgbImage::from_fn(90, 64, |x, _| image::Rgb(if x < edge { [10; 3] } else { [240; 3] }));
    let labels = GrayImage::from_fn(90, 64, |x, _| image::Luma([if x < edge { 1 } else { 2 }]));
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let mut checked = 0;
    for _ in 0..50 {
        let warp = Augment::paper((80, 60)).draw((90, 64), &mut rng);
        let (input, out) = apply(&warp, &image, &labels);
        for (i, label) in out.iter().enumerate() {
            let value = (input[i] * STD[0] + MEAN[0]) * 255.0;
            match label {
                // Within a pixel of the edge (two with the half-size copy) the image blends.
                1 => assert!(value < 230.0, "bright under the dark half's label"),
                2 => assert!(value > 20.0, "dark under the bright half's label"),
                void => {
                    assert_eq!(*void, VOID);
                    assert_eq!(input[i], 0.0);
                    continue;
                }
            }
            checked += 1;
        }
    }
    assert!(checked > 50 * 80 * 60 / 4, "most of the area is covered: {checked}");
}

#[test]
fn a_linear_ramp_survives_any_warp_that_keeps_inside() {
    // Bilinear interpolation reproduces a linear image, so the colour tells the source position:
    // the affine map is checked to a small fraction of a pixel, at a scale that uses the
    // half-size copy (whose rounding to u8 is worth 0.5 of 255) and at one that does not.
    let image = RgbImage::from_fn(100, 100, |x, y| image::Rgb([2 * x as u8, 2 * y as u8, 0]));
    let plane = 20 * 20;
    for scale in [0.6, 0.9, 1.6] {
        let offset = (50.0 * scale - 10.0, 50.0 * scale - 10.0);
        let warp = Warp::new(WarpParams {
            size: (20, 20),
            degrees: -8.0,
            scale: (scale, scale),
            offset,
            ..params((100, 100))
        });
        let mut input = vec![0.0; 3 * plane];
        warp.image(&image, &Normalise::new([0.0; 3], [1.0; 3]), &mut input);
        let (sin, cos) = (-8f64).to_radians().sin_cos();
        for i in 0..plane {
            let (x, y) = ((i % 20) as f64 + 0.5 - 10.0, (i / 20) as f64 + 0.5 - 10.0);
            let u = 50.0 + (cos * x - sin * y) / scale;
            let v = 50.0 + (sin * x + cos * y) / scale;
            for (got, place) in [(input[i], u), (input[plane + i], v)] {
                let expected = 2.0 * (place - 0.5);
                let got = f64::from(got) * 255.0;
                assert!((got - expected).abs() < 0.51, "scale {scale}: {got} {expected}");
            }
        }
    }
}

#[test]
fn same_seed_same_sample_and_other_seed_another() {
    let (image, labels) = (image(64, 48), labels(64, 48));
    let sample = |seed| {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        apply(&Augment::paper((64, 48)).draw((64, 48), &mut rng), &image, &labels)
    };
    assert_eq!(sample(3), sample(3));
    assert_ne!(sample(3), sample(4));
}

#[test]
fn drawn_warps_spread_over_the_whole_range() {
    let augment = Augment::paper((64, 48));
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let warps: Vec<Warp> = (0..500).map(|_| augment.draw((64, 48), &mut rng)).collect();
    let flipped = warps.iter().filter(|w| w.u[0] < 0.0).count();
    assert!((200..300).contains(&flipped), "{flipped} of 500 flipped");
    let scales: Vec<f64> = warps.iter().map(|w| 1.0 / w.v[1].hypot(w.v[0])).collect();
    let (low, high) = scales.iter().fold((9f64, 0f64), |(l, h), s| (l.min(*s), h.max(*s)));
    assert!((0.5..0.52).contains(&low) && (1.73..=1.75).contains(&high), "{low} {high}");
    let turn = |w: &Warp| w.v[0].atan2(w.v[1]).to_degrees();
    assert!(warps.iter().all(|w| turn(w).abs() <= 10.0 + 1e-9));
    assert!(warps.iter().any(|w| turn(w) > 9.0) && warps.iter().any(|w| turn(w) < -9.0));
}

#[test]
fn halving_takes_means_and_repeats_an_odd_border() {
    let image = RgbImage::from_raw(3, 1, vec![0, 0, 0, 10, 20, 30, 200, 100, 50]).unwrap();
    assert_eq!(halve(&image).as_raw(), &[5, 10, 15, 200, 100, 50]);
    let labels = GrayImage::from_raw(4, 2, vec![0, 1, 2, 3, 4, 5, 6, 7]).unwrap();
    assert_eq!(halve_labels(&labels).as_raw(), &[5, 7]);
}

#[test]
fn senseless_settings_are_usage_errors() {
    let good = Augment::paper((64, 48));
    assert!(good.validate().is_ok());
    for bad in [
        Augment { rotation_deg: f32::NAN, ..good },
        Augment { scale: (1.5, 0.5), ..good },
        Augment { scale: (0.0, 1.0), ..good },
        Augment { size: (0, 48), ..good },
    ] {
        assert_eq!(bad.validate().unwrap_err().exit_code(), 2);
    }
}

#[test]
fn colours_change_within_their_range_and_not_at_all_at_strength_zero() {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let plain = normalise();
    let none = Augment::paper((64, 48)).draw_colour(&mut rng);
    assert_eq!(plain.after(&none), plain);

    let augment = Augment { colour: 0.3, ..Augment::paper((64, 48)) };
    let drawn: Vec<Colour> = (0..500).map(|_| augment.draw_colour(&mut rng)).collect();
    // 0.7 * 0.7 * 0.9 to 1.3 * 1.3 * 1.1.
    assert!(drawn.iter().all(|c| c.gain.iter().all(|g| (0.44..=1.86).contains(g))));
    assert!(drawn.iter().any(|c| c.gain[0] > 1.2) && drawn.iter().any(|c| c.gain[0] < 0.8));
    assert!(drawn.iter().any(|c| c.gain[0] != c.gain[2]), "white balance varies");
    // Mid-grey at full exposure stays where it was: 127.5 * contrast + shift = 127.5.
    assert!(drawn.iter().all(|c| c.shift.abs() <= 127.5 * 0.3 + 1e-3));
}
