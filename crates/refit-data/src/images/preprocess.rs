use super::{Filter, Image};
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::path::Path;

/// How an image gets to the size of the model's input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resize {
    /// The shorter edge to this many pixels; the shape is kept.
    Shortest(usize),
    /// To this height and width, whatever the shape.
    Exact {
        /// Rows.
        height: usize,
        /// Columns.
        width: usize,
    },
}

/// The order of the channels in the model's input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChannelOrder {
    /// Red, green, blue.
    Rgb,
    /// Blue, green, red.
    Bgr,
    /// One channel.
    Grey,
}

/// What was done to the images that a model was trained on: resize, centre crop,
/// then per channel `(value * rescale - offset - mean) / std`.
#[derive(Debug, Clone, PartialEq)]
pub struct Preprocess {
    /// First step.
    pub resize: Option<Resize>,
    /// Kernel of the resize.
    pub filter: Filter,
    /// Height and width that are cut from the centre.
    pub crop: Option<(usize, usize)>,
    /// Factor on the pixel values 0..=255.
    pub rescale: f32,
    /// Subtracted after `rescale` (1 where pixels are mapped to -1..1).
    pub offset: f32,
    /// One per channel, in the order of `channels`.
    pub mean: Vec<f32>,
    /// One per channel.
    pub std: Vec<f32>,
    /// Channels and their order.
    pub channels: ChannelOrder,
}

impl Preprocess {
    /// EfficientNet-Lite with the ImageNet weights that its authors published: shorter
    /// edge to `size` + 32 (bicubic), centre crop, mean 127/255 and std 128/255.
    /// `size` is 224, 240, 260, 280 or 300 for Lite0 to Lite4. Source: `CROP_PADDING`,
    /// `MEAN_RGB` and `STDDEV_RGB` of the TPU code and of its PyTorch port.
    pub fn efficientnet_lite(size: usize) -> Self {
        Preprocess {
            resize: Some(Resize::Shortest(size + 32)),
            filter: Filter::Bicubic,
            crop: Some((size, size)),
            rescale: 1.0 / 255.0,
            offset: 0.0,
            mean: vec![127.0 / 255.0; 3],
            std: vec![128.0 / 255.0; 3],
            channels: ChannelOrder::Rgb,
        }
    }

    /// ViT as `ViTImageProcessor` has it by default: to 224 x 224 (bilinear), pixels
    /// to -1..1.
    pub fn vit() -> Self {
        Preprocess {
            resize: Some(Resize::Exact { height: 224, width: 224 }),
            filter: Filter::Bilinear,
            crop: None,
            mean: vec![0.5; 3],
            std: vec![0.5; 3],
            ..Self::efficientnet_lite(224)
        }
    }

    /// Reads `preprocessor_config.json`.
    ///
    /// # Errors
    /// Bytes that are not JSON, or values that make no sense.
    pub fn from_config(path: &Path, bytes: &[u8]) -> Result<Self> {
        let map: Map<String, Value> = serde_json::from_slice(bytes)
            .map_err(|e| Error::file(path, format!("not a JSON object: {e}")))?;
        let bad = |key: &str, want: &str| {
            Error::file(
                path,
                format!("`{key}` is {}, expected {want}", map.get(key).unwrap_or(&Value::Null)),
            )
        };
        let flag = |key: &str, default| map.get(key).and_then(Value::as_bool).unwrap_or(default);
        let number = |key: &str, default: f64| match map.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(v) => v.as_f64().filter(|v| v.is_finite()).ok_or_else(|| bad(key, "a number")),
        };

        let do_crop = flag("do_center_crop", false);
        let crop_to = if map.contains_key("crop_size") { "crop_size" } else { "size" };
        let mut crop = match do_crop {
            true => Some(edges(map.get(crop_to)).ok_or_else(|| bad(crop_to, "a size in pixels"))?),
            false => None,
        };
        let mut resize = None;
        if flag("do_resize", true)
            && let Some(size) = map.get("size")
        {
            let shortest =
                size.get("shortest_edge").or(size.is_number().then_some(size).filter(|_| do_crop));
            resize = Some(match shortest {
                Some(edge) => {
                    Resize::Shortest(pixels(edge).ok_or_else(|| bad("size", "a size in pixels"))?)
                }
                None => {
                    let (height, width) =
                        edges(Some(size)).ok_or_else(|| bad("size", "a size in pixels"))?;
                    Resize::Exact { height, width }
                }
            });
        }
        // ConvNeXt: below 384 pixels, resize to size / crop_pct and crop to size.
        if let (Some(Resize::Shortest(edge)), Some(part)) =
            (resize, map.get("crop_pct").and_then(Value::as_f64))
        {
            if edge < 384 && part > 0.0 && part <= 1.0 {
                let larger = edge as f64 / part;
                if larger > MAX_EDGE as f64 {
                    return Err(bad("crop_pct", "a part of the size that leaves a size in pixels"));
                }
                resize = Some(Resize::Shortest(larger as usize));
                crop = Some((edge, edge));
            } else {
                resize = Some(Resize::Exact { height: edge, width: edge });
            }
        }
        let filter = match map.get("resample") {
            None | Some(Value::Null) => Filter::Bilinear,
            Some(v) => {
                v.as_u64().and_then(Filter::from_pil).ok_or_else(|| bad("resample", "0 to 4"))?
            }
        };
        let list = |key: &str, default: f64| -> Result<Vec<f32>> {
            let wrong = || bad(key, "one number per channel");
            let values: Vec<f64> = match map.get(key) {
                None | Some(Value::Null) => vec![default; 3],
                Some(Value::Array(a)) => {
                    a.iter().map(Value::as_f64).collect::<Option<_>>().ok_or_else(wrong)?
                }
                Some(v) => vec![v.as_f64().ok_or_else(wrong)?; 3],
            };
            let values: Vec<f32> = values.into_iter().map(|v| v as f32).collect();
            if !matches!(values.len(), 1 | 3) || values.iter().any(|v| !v.is_finite()) {
                return Err(wrong());
            }
            Ok(values)
        };
        let normalize = flag("do_normalize", true);
        let (mean, std) = match normalize {
            true => (list("image_mean", 0.5)?, list("image_std", 0.5)?),
            false => (vec![0.0; 3], vec![1.0; 3]),
        };
        if std.contains(&0.0) || mean.len() != std.len() {
            return Err(bad("image_std", "as many numbers as image_mean, none of them 0"));
        }
        let rescaled = flag("do_rescale", true);
        let rescale = if rescaled { number("rescale_factor", 1.0 / 255.0)? as f32 } else { 1.0 };
        if !rescale.is_finite() {
            return Err(bad("rescale_factor", "a number"));
        }
        let offset = if rescaled && flag("rescale_offset", false) { 1.0 } else { 0.0 };
        let channels = match (mean.len(), flag("do_flip_channel_order", false)) {
            (1, _) => ChannelOrder::Grey,
            (_, true) => ChannelOrder::Bgr,
            _ => ChannelOrder::Rgb,
        };
        Ok(Preprocess { resize, filter, crop, rescale, offset, mean, std, channels })
    }

    /// The preprocessing that a model directory asks for: `preprocessor_config.json`,
    /// or the default of its architecture; EfficientNet-Lite's without one.
    ///
    /// # Errors
    /// As [`Preprocess::from_config`].
    pub fn from_artifact(artifact: &refit_store::Artifact) -> Result<Self> {
        let file = artifact.side_files().iter().find(|f| f.name == "preprocessor_config.json");
        if let Some(file) = file {
            return Self::from_config(&artifact.path().join(&file.name), &file.read()?);
        }
        let size = artifact.config().usize("image_size").unwrap_or(224);
        Ok(match artifact.config().model_type() {
            Some("vit" | "deit") => {
                let resize = Some(Resize::Exact { height: size, width: size });
                Preprocess { resize, ..Self::vit() }
            }
            _ => Self::efficientnet_lite(size),
        })
    }

    /// The model's input, `[channels, height, width]`, and its height and width.
    ///
    /// # Errors
    /// An image without pixels.
    pub fn apply(&self, image: &Image) -> Result<(Vec<f32>, usize, usize)> {
        if image.width == 0 || image.height == 0 {
            return Err(Error::Invalid("an image without pixels".into()));
        }
        let mut image = match self.channels {
            ChannelOrder::Grey => image.to_grey(),
            _ => image.to_rgb(),
        };
        let (w, h) = (image.width, image.height);
        let size = match self.resize {
            Some(Resize::Shortest(edge)) if w <= h => Some((edge, (edge * h / w).max(1))),
            Some(Resize::Shortest(edge)) => Some(((edge * w / h).max(1), edge)),
            Some(Resize::Exact { height, width }) => Some((width, height)),
            None => None,
        };
        if let Some((width, height)) = size {
            if width.saturating_mul(height) > MAX_PIXELS {
                return Err(Error::Invalid(format!(
                    "an image of {w} x {h} pixels would become one of {width} x {height}; cut it to \
                     a shape nearer to the model's input"
                )));
            }
            image = image.resize(width, height, self.filter);
        }
        if let Some((height, width)) = self.crop {
            image = image.center_crop(width, height);
        }
        let channels = image.channels;
        let mut out = Vec::with_capacity(image.data.len());
        for c in 0..channels {
            let source = if self.channels == ChannelOrder::Bgr { 2 - c } else { c };
            let (mean, std) = (self.mean[c] + self.offset, self.std[c]);
            let values = image.data.iter().skip(source).step_by(channels);
            out.extend(values.map(|v| (f32::from(*v) * self.rescale - mean) / std));
        }
        Ok((out, image.height, image.width))
    }
}

/// Largest height or width that a configuration may ask for.
const MAX_EDGE: u64 = 4096;

/// Pixels of a resized image at most: a thin strip whose short edge is enlarged takes any amount.
const MAX_PIXELS: usize = 1 << 25;

fn pixels(value: &Value) -> Option<usize> {
    value.as_u64().filter(|v| (1..=MAX_EDGE).contains(v)).map(|v| v as usize)
}

/// Height and width: a number, `{height, width}` or `{shortest_edge}`.
fn edges(value: Option<&Value>) -> Option<(usize, usize)> {
    let value = value?;
    if let Some(edge) = pixels(value).or_else(|| pixels(value.get("shortest_edge")?)) {
        return Some((edge, edge));
    }
    Some((pixels(value.get("height")?)?, pixels(value.get("width")?)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(json: &str) -> Result<Preprocess> {
        Preprocess::from_config(Path::new("preprocessor_config.json"), json.as_bytes())
    }

    #[test]
    fn configurations_of_both_generations_are_read() {
        let vit = r#"{"do_normalize": true, "do_resize": true, "image_mean": [0.5,0.5,0.5], "image_std": [0.5,0.5,0.5], "resample": 2, "size": 224}"#;
        assert_eq!(read(vit).unwrap(), Preprocess::vit());
        let clip = read(r#"{"crop_size": {"height": 224, "width": 224}, "do_center_crop": true, "do_resize": true, "resample": 3, "size": {"shortest_edge": 256}}"#).unwrap();
        assert_eq!((clip.resize, clip.crop), (Some(Resize::Shortest(256)), Some((224, 224))));
        let convnext = read(r#"{"size": {"shortest_edge": 224}, "crop_pct": 0.875}"#).unwrap();
        assert_eq!(
            (convnext.resize, convnext.crop),
            (Some(Resize::Shortest(256)), Some((224, 224)))
        );
    }

    #[test]
    fn nonsense_is_named() {
        for (json, key) in [
            (r#"{"size": "big"}"#, "`size`"),
            (r#"{"resample": 9}"#, "`resample`"),
            (r#"{"image_std": [0, 1, 1]}"#, "`image_std`"),
            (r#"{"image_mean": [1, 2]}"#, "`image_mean`"),
            (r#"{"image_mean": ["x", 0.5]}"#, "`image_mean`"),
            (r#"{"image_mean": 1e300}"#, "`image_mean`"),
            (r#"{"rescale_factor": 1e300}"#, "`rescale_factor`"),
            (r#"{"size": {"shortest_edge": 224}, "crop_pct": 1e-300}"#, "`crop_pct`"),
            (r#"{"size": 100000}"#, "`size`"),
            (r#"{"do_center_crop": true, "crop_size": -1}"#, "`crop_size`"),
            ("[]", "JSON object"),
        ] {
            let error = read(json).unwrap_err().to_string();
            assert!(
                error.contains(key) && error.starts_with("preprocessor_config.json"),
                "{error}"
            );
        }
    }

    #[test]
    fn channels_come_out_first_and_normalized() {
        let image =
            Image { width: 2, height: 1, channels: 3, data: vec![0, 127, 255, 255, 127, 0] };
        let mut plan =
            Preprocess { resize: None, crop: None, ..Preprocess::efficientnet_lite(224) };
        let (x, h, w) = plan.apply(&image).unwrap();
        assert_eq!((h, w), (1, 2));
        let near = |a: f32, b: f32| (a - b).abs() < 1e-6;
        assert!(near(x[0], -127.0 / 128.0) && near(x[1], 1.0) && near(x[2], 0.0));
        plan.channels = ChannelOrder::Bgr;
        assert_eq!(plan.apply(&image).unwrap().0[0], x[4]);
    }

    #[test]
    fn the_shorter_edge_decides() {
        let image = Image { width: 300, height: 200, channels: 1, data: vec![9; 60_000] };
        let (x, h, w) = Preprocess::efficientnet_lite(224).apply(&image).unwrap();
        assert_eq!((x.len(), h, w), (3 * 224 * 224, 224, 224));
    }

    #[test]
    fn a_strip_is_refused_before_it_grows() {
        let image = Image { width: 1, height: 60_000, channels: 1, data: vec![9; 60_000] };
        let error = Preprocess::efficientnet_lite(224).apply(&image).unwrap_err().to_string();
        assert!(error.contains("1 x 60000 pixels"), "{error}");
    }

    fn any_setting() -> impl Strategy<Value = Value> {
        let number = prop_oneof![
            (0u64..40).prop_map(Value::from),
            (-2.0..2.0f64).prop_map(Value::from),
            Just(Value::from(1e300)),
            Just(Value::from(u64::MAX)),
        ];
        let size = (0u64..40, 0u64..40)
            .prop_map(|(height, width)| serde_json::json!({"height": height, "width": width}));
        prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            number.clone(),
            Just(Value::from("x")),
            proptest::collection::vec(number, 0..4).prop_map(Value::from),
            size,
            (0u64..40).prop_map(|edge| serde_json::json!({"shortest_edge": edge})),
        ]
    }

    proptest! {
        #![proptest_config(crate::testing::cases(400))]

        /// Any values under the known keys are refused, or give a finite input of the size that they ask for.
        #[test]
        fn any_settings_are_refused_or_usable(
            settings in proptest::collection::btree_map(proptest::sample::select(vec![
                "do_resize", "do_center_crop", "do_normalize", "do_rescale", "do_flip_channel_order", "rescale_offset",
                "size", "crop_size", "crop_pct", "resample", "image_mean", "image_std", "rescale_factor",
            ]), any_setting(), 0..8),
            width in 1usize..20, height in 1usize..20,
        ) {
            let text = serde_json::to_vec(&settings).unwrap();
            let Ok(plan) = Preprocess::from_config(Path::new("p.json"), &text) else { return Ok(()) };
            let image = Image { width, height, channels: 3, data: vec![200; 3 * width * height] };
            let (values, h, w) = plan.apply(&image).unwrap();
            prop_assert_eq!(values.len(), plan.mean.len() * h * w);
            prop_assert!(values.iter().all(|v| v.is_finite()) || plan.std.iter().any(|s| s.abs() < 1e-30));
            if let Some(crop) = plan.crop {
                prop_assert_eq!((h, w), crop);
            } else if let Some(Resize::Exact { height, width }) = plan.resize {
                prop_assert_eq!((h, w), (height, width));
            }
        }

        #[test]
        fn any_text_is_refused_or_read(text in "(\\{|\\}|\\[|\\]|\"size\"|\"image_std\"|:|,|-1|0.5|1e9|null|é){0,20}") {
            let _ = read(&text);
        }
    }
}
