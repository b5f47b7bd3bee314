//! The poly learning-rate schedule (paper, section 4.1).

/// Exponent of the paper's schedule.
pub const POWER: f64 = 0.9;

/// Learning rate of an epoch, counted from 0: `base * (1 - epoch / epochs)^0.9`.
///
/// Constant within an epoch; 0 from epoch `epochs` on.
pub fn poly(base: f64, epoch: usize, epochs: usize) -> f64 {
    if epoch >= epochs {
        return 0.0;
    }
    base * (1.0 - epoch as f64 / epochs as f64).powf(POWER)
}

#[cfg(test)]
mod tests {
    use super::poly;

    #[test]
    fn poly_starts_at_the_base_rate_and_falls_to_zero() {
        assert_eq!(poly(5e-4, 0, 300), 5e-4);
        assert_eq!(poly(5e-4, 300, 300), 0.0);
        assert_eq!(poly(5e-4, 301, 300), 0.0);
        assert!((0..300).all(|e| poly(5e-4, e, 300) > poly(5e-4, e + 1, 300)));
    }

    #[test]
    fn poly_agrees_with_hand_computed_values() {
        // 0.5^0.9 = 0.535886731..., 0.1^0.9 = 0.125892541...; printed to nine digits.
        assert!((poly(1.0, 150, 300) - 0.535_886_731).abs() < 1e-9);
        assert!((poly(1.0, 270, 300) - 0.125_892_541).abs() < 1e-9);
    }
}
