//! Antialiased resampling, bit for bit that of PIL: two passes (rows, then
//! columns) over eight-bit values with 22-bit fixed-point weights, rounded to
//! eight bits in between. Models were trained on PIL's pixels; other resamplers
//! differ by several grey levels where an image shrinks much.

use super::Image;

/// The interpolation kernel; numbers are PIL's (`resample` in
/// `preprocessor_config.json`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Filter {
    /// 0: the pixel under the centre.
    Nearest,
    /// 1: windowed sinc, three lobes.
    Lanczos,
    /// 2: triangle.
    Bilinear,
    /// 3: Keys' cubic, a = -0.5.
    Bicubic,
    /// 4: mean of what is covered.
    Box,
}

impl Filter {
    /// The filter of PIL's number.
    pub fn from_pil(number: u64) -> Option<Filter> {
        [Filter::Nearest, Filter::Lanczos, Filter::Bilinear, Filter::Bicubic, Filter::Box]
            .get(usize::try_from(number).ok()?)
            .copied()
    }

    fn support(self) -> f64 {
        match self {
            Filter::Nearest => 0.0,
            Filter::Box => 0.5,
            Filter::Bilinear => 1.0,
            Filter::Bicubic => 2.0,
            Filter::Lanczos => 3.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        let sinc = |x: f64| {
            let x = x * std::f64::consts::PI;
            if x == 0.0 { 1.0 } else { x.sin() / x }
        };
        let a = x.abs();
        match self {
            Filter::Nearest => 0.0,
            Filter::Box => f64::from(x > -0.5 && x <= 0.5),
            Filter::Bilinear => (1.0 - a).max(0.0),
            Filter::Bicubic if a < 1.0 => (1.5 * a - 2.5) * a * a + 1.0,
            Filter::Bicubic if a < 2.0 => -0.5 * (((a - 5.0) * a + 8.0) * a - 4.0),
            Filter::Bicubic => 0.0,
            Filter::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Filter::Lanczos => 0.0,
        }
    }
}

const PRECISION: u32 = 22;

/// For each output position, its first input position and the weights from there.
fn weights(from: usize, to: usize, filter: Filter) -> Vec<(usize, Vec<i64>)> {
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0);
    let reach = filter.support() * stretch;
    (0..to)
        .map(|i| {
            let center = (i as f64 + 0.5) * scale;
            let start = (center - reach + 0.5).max(0.0) as usize;
            let end = ((center + reach + 0.5) as usize).min(from);
            let raw: Vec<f64> = (start..end)
                .map(|x| filter.weight((x as f64 - center + 0.5) * (1.0 / stretch)))
                .collect();
            let sum: f64 = raw.iter().sum();
            let fixed = |w: &f64| {
                let w = if sum == 0.0 { *w } else { w * (1.0 / sum) };
                (w * f64::from(1u32 << PRECISION)).round() as i64
            };
            (start, raw.iter().map(fixed).collect())
        })
        .collect()
}

pub(super) fn resize(image: &Image, width: usize, height: usize, filter: Filter) -> Image {
    if image.data.is_empty() || width == 0 || height == 0 {
        return Image {
            width,
            height,
            channels: image.channels,
            data: vec![0; width * height * image.channels],
        };
    }
    if filter == Filter::Nearest {
        return nearest(image, width, height);
    }
    let mut out = image.clone();
    let channels = image.channels;
    if width != out.width {
        out.data =
            pass(&out.data, out.height, out.width, channels, &weights(out.width, width, filter));
        out.width = width;
    }
    if height != out.height {
        // Columns are rows of one long "pixel".
        out.data =
            pass(&out.data, 1, out.height, width * channels, &weights(out.height, height, filter));
        out.height = height;
    }
    out
}

/// `data` is `[rows, from, inner]`; resamples the middle axis.
fn pass(
    data: &[u8],
    rows: usize,
    from: usize,
    inner: usize,
    weights: &[(usize, Vec<i64>)],
) -> Vec<u8> {
    let mut out = Vec::with_capacity(rows * weights.len() * inner);
    let mut sums = vec![0i64; inner];
    for row in data.chunks_exact(from * inner).take(rows) {
        for (start, weights) in weights {
            sums.fill(1 << (PRECISION - 1));
            for (pixel, weight) in row[start * inner..].chunks_exact(inner).zip(weights) {
                for (sum, value) in sums.iter_mut().zip(pixel) {
                    *sum += i64::from(*value) * weight;
                }
            }
            out.extend(sums.iter().map(|s| (s >> PRECISION).clamp(0, 255) as u8));
        }
    }
    out
}

fn nearest(image: &Image, width: usize, height: usize) -> Image {
    let at = |i: usize, from: usize, to: usize| {
        (((i as f64 + 0.5) * from as f64 / to as f64) as usize).min(from - 1)
    };
    let channels = image.channels;
    let mut data = Vec::with_capacity(width * height * channels);
    for y in 0..height {
        for x in 0..width {
            let pixel = at(y, image.height, height) * image.width + at(x, image.width, width);
            data.extend_from_slice(&image.data[pixel * channels..(pixel + 1) * channels]);
        }
    }
    Image { width, height, channels, data }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_flat_image_stays_flat(w in 1usize..40, h in 1usize..40, tw in 1usize..50, th in 1usize..50, value: u8, pil in 0u64..5) {
            let filter = Filter::from_pil(pil).unwrap();
            let image = Image { width: w, height: h, channels: 3, data: vec![value; w * h * 3] };
            let out = resize(&image, tw, th, filter);
            prop_assert_eq!(out.data.len(), tw * th * 3);
            prop_assert!(out.data.iter().all(|v| v.abs_diff(value) <= 1));
        }
    }
}
