//! Large images as tiles of the size that an image encoder takes.
//!
//! Two ways. [`catty`]: consistent aspect ratio tiling of POINTS (Liu et al. 2024, arXiv:2409.04828): the image is resized in
//! proportion and cut into overlapping windows, so nothing is distorted. [`stretch`]: dynamic high resolution as InternVL 1.5
//! has it, the paper's baseline: the image is stretched to a whole number of tiles.
//!
//! Where the paper and its code differ, this follows the code: the paper's equation 1 scales by the reciprocal of what it must,
//! and the code takes the nearest ratio on one side only, which keeps the longer side within its tiles. Windows stand at
//! `round(i (W' - s) / (a - 1))`, so that there are exactly `a x b` of them and the last one ends at the border; the code's
//! integer strides can lose pixels there.

use super::{Filter, Image};
use crate::{Error, Result};

/// How an image is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tiling {
    /// Side of a tile in pixels: what the encoder takes.
    pub side: usize,
    /// Most tiles, the thumbnail not counted.
    pub max_tiles: usize,
    /// Whether the whole image, resized to one tile, comes last.
    pub thumbnail: bool,
    /// Whether an image that is longer than `max_tiles : 1` is squeezed to that ratio; otherwise it is refused.
    pub squeeze: bool,
}

impl Default for Tiling {
    /// CLIP's 336 pixels, and the paper's eight tiles with a thumbnail.
    fn default() -> Self {
        Self { side: 336, max_tiles: 8, thumbnail: true, squeeze: true }
    }
}

/// An image in tiles.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tiles {
    /// Tiles side by side.
    pub columns: usize,
    /// Tiles one above the other.
    pub rows: usize,
    /// Width and height of the image that was cut.
    pub resized: (usize, usize),
    /// Left and top of every tile in it, row by row.
    pub corners: Vec<(usize, usize)>,
    /// The tiles, row by row.
    pub tiles: Vec<Image>,
    /// The whole image in one tile.
    pub thumbnail: Option<Image>,
}

/// Cuts an image into overlapping tiles without distorting it.
///
/// # Errors
/// An image without pixels, no side, no tiles; an image that is too long where squeezing is not allowed.
pub fn catty(image: &Image, tiling: &Tiling) -> Result<Tiles> {
    let (width, height) = legal(image, tiling)?;
    let (columns, rows) = catty_grid(width, height, tiling);
    let side = tiling.side;
    // The shorter side fills its tiles; the longer one follows in proportion and is never longer than its tiles.
    let resized = match width < height {
        true => (columns * side, height * columns * side / width),
        false => (width * rows * side / height, rows * side),
    };
    Ok(cut(image, tiling, columns, rows, resized))
}

/// Stretches an image to a whole number of tiles and cuts it without overlap.
///
/// # Errors
/// As [`catty`].
pub fn stretch(image: &Image, tiling: &Tiling) -> Result<Tiles> {
    let (width, height) = legal(image, tiling)?;
    let ratio = width as f64 / height as f64;
    let off = |&(a, b): &(usize, usize)| (a as f64 / b as f64 - ratio).abs();
    let nearest = grids(tiling.max_tiles).map(|grid| off(&grid)).fold(f64::INFINITY, f64::min);
    // Of equal ratios the largest that the image more than half fills.
    let fills = |a: usize, b: usize| 2 * width * height > a * b * tiling.side * tiling.side;
    let (columns, rows) = grids(tiling.max_tiles)
        .filter(|grid| off(grid) == nearest)
        .enumerate()
        .filter(|&(i, (a, b))| i == 0 || fills(a, b))
        .map(|(_, grid)| grid)
        .last()
        .unwrap_or((1, 1));
    Ok(cut(image, tiling, columns, rows, (columns * tiling.side, rows * tiling.side)))
}

/// Grids of at most `most` tiles as columns and rows, those with few tiles first.
fn grids(most: usize) -> impl Iterator<Item = (usize, usize)> {
    (1..=most).flat_map(|tiles| {
        (1..=tiles).filter(move |a| tiles.is_multiple_of(*a)).map(move |a| (a, tiles / a))
    })
}

/// Width and height that are tiled: those of the image, squeezed to the longest legal ratio.
fn legal(image: &Image, tiling: &Tiling) -> Result<(usize, usize)> {
    let (width, height, most) = (image.width, image.height, tiling.max_tiles);
    if tiling.side == 0 || most == 0 {
        return Err(Error::Tiling(
            "a tile has at least one pixel, and an image at least one tile".into(),
        ));
    }
    if width == 0 || height == 0 {
        return Err(Error::Tiling(format!("an image of {width} x {height} has no pixels")));
    }
    let too_long = width > most * height || height > most * width;
    if too_long && !tiling.squeeze {
        return Err(Error::Tiling(format!(
            "an image of {width} x {height} is longer than {most} tiles in a row; allow more tiles, or let it be squeezed"
        )));
    }
    Ok((width.min(most * height), height.min(most * width)))
}

fn catty_grid(width: usize, height: usize, tiling: &Tiling) -> (usize, usize) {
    use std::cmp::Ordering::{Equal, Greater, Less};
    // a / b against W / H, exactly.
    let against = |&(a, b): &(usize, usize)| (a * height).cmp(&(b * width));
    let allowed = |grid: &(usize, usize)| match width.cmp(&height) {
        Less => against(grid) != Greater,
        Greater => against(grid) != Less,
        Equal => against(grid) == Equal,
    };
    let ratio = width as f64 / height as f64;
    let off = |&(a, b): &(usize, usize)| (a as f64 / b as f64 - ratio).abs();
    let nearest = grids(tiling.max_tiles)
        .filter(allowed)
        .map(|grid| off(&grid))
        .fold(f64::INFINITY, f64::min);
    let area = (width * height) as f64 / (tiling.side * tiling.side) as f64;
    grids(tiling.max_tiles)
        .filter(|grid| allowed(grid) && off(grid) == nearest)
        .min_by(|(a, b), (c, d)| {
            let far = |tiles: usize| (tiles as f64 - area).abs();
            far(a * b).total_cmp(&far(c * d))
        })
        .unwrap_or((1, 1))
}

fn cut(
    image: &Image,
    tiling: &Tiling,
    columns: usize,
    rows: usize,
    resized: (usize, usize),
) -> Tiles {
    let side = tiling.side;
    let whole = image.resize(resized.0, resized.1, Filter::Bilinear);
    let place = |i: usize, of: usize, length: usize| match of {
        1 => 0,
        _ => (2 * i * (length - side) + of - 1) / (2 * (of - 1)),
    };
    let corners: Vec<(usize, usize)> = (0..rows)
        .flat_map(|y| (0..columns).map(move |x| (x, y)))
        .map(|(x, y)| (place(x, columns, resized.0), place(y, rows, resized.1)))
        .collect();
    let tiles = corners.iter().map(|&(left, top)| window(&whole, left, top, side)).collect();
    let thumbnail = tiling.thumbnail.then(|| image.resize(side, side, Filter::Bilinear));
    Tiles { columns, rows, resized, corners, tiles, thumbnail }
}

fn window(image: &Image, left: usize, top: usize, side: usize) -> Image {
    let row = side * image.channels;
    let data = (top..top + side)
        .flat_map(|y| {
            let from = (y * image.width + left) * image.channels;
            &image.data[from..from + row]
        })
        .copied()
        .collect();
    Image { width: side, height: side, channels: image.channels, data }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn picture(width: usize, height: usize) -> Image {
        let data = (0..width * height).map(|i| (i % 251) as u8).collect();
        Image { width, height, channels: 1, data }
    }

    fn small(side: usize, max_tiles: usize) -> Tiling {
        Tiling { side, max_tiles, ..Tiling::default() }
    }

    #[test]
    fn a_square_of_one_tile_is_that_tile() {
        let image = picture(12, 12);
        for tiles in [catty(&image, &small(12, 1)), stretch(&image, &small(12, 1))] {
            let tiles = tiles.unwrap();
            assert_eq!((tiles.tiles.len(), &tiles.tiles[0]), (1, &image));
            assert_eq!(tiles.thumbnail.as_ref(), Some(&image));
        }
    }

    #[test]
    fn grids_follow_ratio_and_area() {
        let grid = |w, h| catty_grid(w, h, &Tiling::default());
        assert_eq!(grid(336, 336), (1, 1));
        assert_eq!(grid(672, 672), (2, 2));
        assert_eq!(grid(1344, 672), (4, 2), "eight tiles hold it");
        assert_eq!(grid(400, 200), (2, 1), "small images get few");
        // 5 : 3 has no grid: the next longer one, 2 : 1, so that windows overlap.
        assert_eq!(grid(1000, 600), (4, 2));
        assert_eq!(grid(600, 1000), (2, 4));
        let tiles = stretch(&picture(1000, 600), &Tiling::default()).unwrap();
        assert_eq!((tiles.columns, tiles.rows), (3, 2), "3 : 2 is nearest to 5 : 3");
    }

    #[test]
    fn what_cannot_be_tiled_is_said() {
        let message =
            |image: &Image, tiling: &Tiling| catty(image, tiling).unwrap_err().to_string();
        assert!(message(&picture(0, 5), &small(4, 2)).contains("no pixels"));
        assert!(message(&picture(5, 5), &small(0, 2)).contains("at least one pixel"));
        assert!(message(&picture(5, 5), &small(4, 0)).contains("at least one tile"));
        let strict = Tiling { squeeze: false, ..small(4, 2) };
        assert!(message(&picture(9, 2), &strict).contains("longer than 2 tiles"));
        let squeezed = catty(&picture(9, 2), &small(4, 2)).unwrap();
        assert_eq!((squeezed.columns, squeezed.rows, squeezed.resized), (2, 1, (8, 4)));
        assert_eq!(catty(&picture(1, 1), &small(4, 2)).unwrap().resized, (4, 4));
    }

    proptest! {
        #![proptest_config(crate::testing::cases(200))]

        #[test]
        fn tiles_cover_the_image_and_distort_nothing(
            width in 1usize..90, height in 1usize..90, side in 4usize..14, most in 1usize..10,
        ) {
            let (image, tiling) = (picture(width, height), small(side, most));
            let tiles = catty(&image, &tiling).unwrap();
            let (w, h) = tiles.resized;
            prop_assert!(tiles.columns * tiles.rows <= most);
            prop_assert_eq!(tiles.tiles.len(), tiles.columns * tiles.rows);
            prop_assert!(tiles.tiles.iter().all(|t| (t.width, t.height) == (side, side)));
            // Every pixel lies in a tile, and no tile reaches over the border.
            let mut seen = vec![false; w * h];
            for &(left, top) in &tiles.corners {
                prop_assert!(left + side <= w && top + side <= h);
                for y in top..top + side {
                    seen[y * w + left..y * w + left + side].fill(true);
                }
            }
            prop_assert!(seen.iter().all(|&seen| seen));
            // Distortion: how much one side grew more than the other.
            let distortion = |(w, h): (usize, usize)| {
                let grown = (w as f64 / width as f64) / (h as f64 / height as f64);
                grown.max(1.0 / grown) - 1.0
            };
            let squeezed = width > most * height || height > most * width;
            if !squeezed {
                prop_assert!(distortion(tiles.resized) <= 1.0 / side as f64, "{}", distortion(tiles.resized));
            }
            let stretched = stretch(&image, &tiling).unwrap();
            prop_assert_eq!(stretched.resized, (stretched.columns * side, stretched.rows * side));
            prop_assert!(distortion(stretched.resized) + 1.0 / side as f64 >= distortion(tiles.resized));
        }
    }
}
