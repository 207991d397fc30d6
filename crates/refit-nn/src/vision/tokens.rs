//! What happens to the tokens of image encoders before a language model sees them (POINTS, Liu et al. 2024, arXiv:2409.04828).

use burn::tensor::Tensor;

use crate::error::{Error, Result};

/// Features of two encoders of one shape as one: `w general + (1 - w) other`, `[batch, tokens, dim]`. The paper does not say
/// its `w`.
///
/// # Errors
/// Features of different shapes, a weight outside of 0 to 1.
pub fn fuse(general: Tensor<3>, other: Tensor<3>, weight: f32) -> Result<Tensor<3>> {
    if general.dims() != other.dims() {
        return Err(Error::Invalid(format!(
            "two encoders give {:?} and {:?}; features are fused value by value",
            general.dims(),
            other.dims()
        )));
    }
    if !(0.0..=1.0).contains(&weight) {
        return Err(Error::Invalid(format!("the weight {weight} is not within 0 and 1")));
    }
    Ok(general * weight + other * (1.0 - weight))
}

/// A grid of `rows x columns` tokens, row by row, `[batch, rows * columns, dim]`, with `factor x factor` neighbours stacked into
/// one: `[batch, rows * columns / factor², dim * factor²]`. Within a token the neighbours come row by row.
///
/// # Errors
/// A number of tokens that is not that of the grid, a factor that does not divide it.
pub fn merge_neighbours(
    tokens: Tensor<3>,
    rows: usize,
    columns: usize,
    factor: usize,
) -> Result<Tensor<3>> {
    let [batch, count, dim] = tokens.dims();
    check(rows, columns, factor)?;
    if count != rows * columns {
        return Err(Error::Invalid(format!(
            "{count} tokens are no grid of {rows} x {columns}; leave class tokens out"
        )));
    }
    let (down, across) = (rows / factor, columns / factor);
    Ok(tokens.reshape([batch * down, factor, across, factor * dim]).swap_dims(1, 2).reshape([
        batch,
        down * across,
        factor * factor * dim,
    ]))
}

/// Takes [`merge_neighbours`] back; `rows` and `columns` are those of the result.
///
/// # Errors
/// As there.
pub fn split_neighbours(
    tokens: Tensor<3>,
    rows: usize,
    columns: usize,
    factor: usize,
) -> Result<Tensor<3>> {
    let [batch, count, wide] = tokens.dims();
    check(rows, columns, factor)?;
    let (down, across) = (rows / factor, columns / factor);
    if count != down * across || !wide.is_multiple_of(factor * factor) {
        return Err(Error::Invalid(format!(
            "{count} tokens of {wide} values do not come from a grid of {rows} x {columns} by {factor}"
        )));
    }
    Ok(tokens.reshape([batch * down, across, factor, wide / factor]).swap_dims(1, 2).reshape([
        batch,
        rows * columns,
        wide / (factor * factor),
    ]))
}

fn check(rows: usize, columns: usize, factor: usize) -> Result<()> {
    if factor == 0 || !rows.is_multiple_of(factor) || !columns.is_multiple_of(factor) {
        return Err(Error::Invalid(format!(
            "{factor} does not divide a grid of {rows} x {columns}"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BurnDevice;

    fn counted(shape: [usize; 3]) -> Tensor<3> {
        let values: Vec<f32> = (0..shape.iter().product()).map(|i| i as f32).collect();
        Tensor::<1>::from_floats(values.as_slice(), &BurnDevice::flex()).reshape(shape)
    }

    fn values(tensor: Tensor<3>) -> Vec<f32> {
        crate::ops::to_vec(&tensor)
    }

    #[test]
    fn neighbours_are_stacked_and_come_back() {
        // Two images of 2 x 4 tokens with one value each.
        let merged = merge_neighbours(counted([2, 8, 1]), 2, 4, 2).unwrap();
        assert_eq!(merged.dims(), [2, 2, 4]);
        assert_eq!(values(merged)[..8], [0., 1., 4., 5., 2., 3., 6., 7.]);
        for (rows, columns, factor) in [(4, 6, 2), (6, 3, 3), (2, 2, 1)] {
            let tokens = counted([3, rows * columns, 5]);
            let merged = merge_neighbours(tokens.clone(), rows, columns, factor).unwrap();
            assert_eq!(merged.dims()[1] * factor * factor, rows * columns);
            let back = split_neighbours(merged, rows, columns, factor).unwrap();
            assert_eq!(values(back), values(tokens));
        }
        assert!(merge_neighbours(counted([1, 9, 1]), 2, 4, 2).is_err());
        assert!(merge_neighbours(counted([1, 9, 1]), 3, 3, 2).is_err());
        assert!(split_neighbours(counted([1, 2, 3]), 2, 4, 2).is_err());
    }

    #[test]
    fn features_are_fused_value_by_value() {
        let (a, b) = (counted([1, 2, 3]), counted([1, 2, 3]) * 3.0);
        let fused = values(fuse(a.clone(), b.clone(), 0.25).unwrap());
        assert!(fused.iter().enumerate().all(|(i, &x)| (x - 2.5 * i as f32).abs() < 1e-5));
        assert_eq!(values(fuse(a.clone(), b, 1.0).unwrap()), values(a.clone()));
        assert!(fuse(a.clone(), counted([1, 3, 2]), 0.5).is_err());
        assert!(fuse(a.clone(), a, 1.5).is_err());
    }
}
