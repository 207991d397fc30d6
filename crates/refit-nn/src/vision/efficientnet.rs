//! EfficientNet-Lite (Tan and Le 2019, without squeeze-and-excitation and with ReLU6).
//!
//! Each block expands channels (1x1), filters them one by one (depthwise k x k) and projects back (1x1), all followed by batch
//! normalization; padding follows TensorFlow's "same" rule, which is not symmetric for stride 2. Depths and widths are read off
//! the tensors, so Lite 0 to 4 need no config.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use refit_store::artifact::Artifact;

use crate::error::{Error, Result};
use crate::operator::Linear;
use crate::ops::{self, Activation, ConvSpec};
use crate::run::Run;

/// Stride of the first block of each stage; a stage begins where the output width changes.
const STAGE_STRIDES: [usize; 7] = [1, 2, 2, 2, 1, 2, 1];
/// Added to the variance of batch normalization in the published weights.
const EPS: f32 = 1e-3;

/// A convolution without bias and the batch normalization after it, at inference.
#[derive(Module, Debug)]
pub struct ConvNorm {
    /// Name of the site.
    #[module(skip)]
    pub site: String,
    /// Kernel `[out, in / groups, k, k]`.
    pub weight: Param<Tensor<4>>,
    /// `gamma / sqrt(var + eps)`, `[out]`.
    pub scale: Param<Tensor<1>>,
    /// `beta - mean * scale`, `[out]`.
    pub shift: Param<Tensor<1>>,
    /// Step of the kernel.
    pub stride: usize,
    /// Channel groups; equal to the channels for a depthwise convolution.
    pub groups: usize,
}

/// One inverted bottleneck.
#[derive(Module, Debug)]
pub struct Bottleneck {
    /// 1x1 expansion; the first block has none.
    pub expand: Option<ConvNorm>,
    /// Depthwise convolution.
    pub depthwise: ConvNorm,
    /// 1x1 projection, not followed by a nonlinearity.
    pub project: ConvNorm,
}

/// The whole classifier.
#[derive(Module, Debug)]
pub struct EfficientNetLite {
    /// First convolution, stride 2.
    pub stem: ConvNorm,
    /// Bottlenecks, in order.
    pub blocks: Vec<Bottleneck>,
    /// Last 1x1 convolution.
    pub head: ConvNorm,
    /// Class logits.
    pub classifier: Linear,
}

struct Reader<'a> {
    artifact: &'a Artifact,
    device: &'a Device,
}

impl Reader<'_> {
    fn shape(&self, name: &str) -> Result<&[usize]> {
        let info = self.artifact.tensor(name).map_err(|_| Error::Missing { name: name.into() })?;
        Ok(&info.shape)
    }

    fn vector(&self, name: &str, width: usize) -> Result<Vec<f32>> {
        let shape = self.shape(name)?;
        if shape != [width] {
            return Err(Error::Shape {
                name: name.into(),
                found: shape.to_vec(),
                expected: vec![width],
            });
        }
        Ok(self.artifact.read_f32(name)?)
    }

    fn conv(&self, site: &str, norm: &str, stride: usize) -> Result<ConvNorm> {
        let name = format!("{site}.weight");
        let &[out, inner, height, width] = self.shape(&name)? else {
            return Err(Error::Shape {
                name: name.clone(),
                found: self.shape(&name)?.to_vec(),
                expected: vec![0; 4],
            });
        };
        let depthwise = inner == 1 && site.contains("depthwise");
        let values = self.artifact.read_f32(&name)?;
        let [gamma, beta, mean, var] = ["weight", "bias", "running_mean", "running_var"];
        let vector = |part: &str| self.vector(&format!("{norm}.{part}"), out);
        let scale: Vec<f32> =
            vector(gamma)?.iter().zip(vector(var)?).map(|(g, v)| g / (v + EPS).sqrt()).collect();
        let means = vector(mean)?;
        let shift: Vec<f32> = vector(beta)?
            .iter()
            .zip(means)
            .zip(&scale)
            .map(|((beta, mean), scale)| beta - mean * scale)
            .collect();
        let param = |values: Vec<f32>| {
            Param::from_tensor(Tensor::from_data(TensorData::new(values, [out]), self.device))
        };
        let weight =
            Tensor::from_data(TensorData::new(values, [out, inner, height, width]), self.device);
        Ok(ConvNorm {
            site: site.into(),
            weight: Param::from_tensor(weight),
            scale: param(scale),
            shift: param(shift),
            stride,
            groups: if depthwise { out } else { 1 },
        })
    }
}

impl ConvNorm {
    /// Site of the normalization behind the convolution.
    pub fn norm(&self) -> String {
        let norm = match self.site.rsplit('.').next() {
            Some("_conv_stem" | "_expand_conv") => "_bn0",
            Some("_depthwise_conv" | "_conv_head") => "_bn1",
            _ => "_bn2",
        };
        match self.site.rsplit_once('.') {
            Some((block, _)) => format!("{block}.{norm}"),
            None => norm.to_owned(),
        }
    }

    /// Weight and bias of the normalization that has these running statistics and computes what `scale` and `shift` do: the way
    /// back from loading.
    pub fn unfold(&self, mean: &[f32], variance: &[f32]) -> [Vec<f32>; 2] {
        let (scale, shift) = (ops::to_vec(&self.scale.val()), ops::to_vec(&self.shift.val()));
        let weight = scale.iter().zip(variance).map(|(s, v)| s * (v + EPS).sqrt()).collect();
        let bias = scale.iter().zip(shift).zip(mean).map(|((s, b), m)| b + m * s).collect();
        [weight, bias]
    }

    /// Gradients by weight and bias of the normalization, from those by `scale` and `shift`; the statistics are constants.
    pub fn unfold_gradient(
        &self,
        scale: &[f32],
        shift: &[f32],
        mean: &[f32],
        variance: &[f32],
    ) -> [Vec<f32>; 2] {
        let by = scale.iter().zip(shift).zip(mean.iter().zip(variance));
        let weight = by.map(|((scale, shift), (m, v))| (scale - m * shift) / (v + EPS).sqrt());
        [weight.collect(), shift.to_vec()]
    }

    /// `[batch, in, h, w]` to `[batch, out, ceil(h / stride), ceil(w / stride)]`.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let [_, _, height, width] = x.dims();
        let kernel = self.weight.shape()[2];
        let pad = |size: usize| {
            let total =
                ((size.div_ceil(self.stride) - 1) * self.stride + kernel).saturating_sub(size);
            (total / 2, total - total / 2)
        };
        let ((top, bottom), (left, right)) = (pad(height), pad(width));
        let spec = ConvSpec {
            stride: self.stride,
            padding: [top, bottom, left, right],
            groups: self.groups,
        };
        // The scale belongs to the rows of the weight: one small product instead of a pass over the image.
        let scale = self.scale.val();
        let channels = scale.dims()[0];
        let weight = self.weight.val() * scale.reshape([channels, 1, 1, 1]);
        ops::conv2d_with(x, weight, Some(self.shift.val()), &spec)
    }
}

impl EfficientNetLite {
    /// Loads the weights; names are those of the published PyTorch checkpoints (`_blocks.3._expand_conv.weight`).
    ///
    /// # Errors
    /// Missing or mis-shaped tensors.
    pub fn load(artifact: &Artifact, device: &Device) -> Result<Self> {
        let reader = Reader { artifact, device };
        let mut blocks = Vec::new();
        let (mut stage, mut width) = (0usize, None);
        while reader.shape(&format!("_blocks.{}._depthwise_conv.weight", blocks.len())).is_ok() {
            let at = |part: &str| format!("_blocks.{}.{part}", blocks.len());
            let out = reader.shape(&at("_project_conv.weight"))?.first().copied();
            let new_stage = out != width;
            if new_stage && width.is_some() {
                stage += 1;
            }
            width = out;
            let stride = if new_stage { STAGE_STRIDES.get(stage).copied().unwrap_or(1) } else { 1 };
            let expand = match reader.shape(&at("_expand_conv.weight")) {
                Ok(_) => Some(reader.conv(&at("_expand_conv"), &at("_bn0"), 1)?),
                Err(_) => None,
            };
            let depthwise = reader.conv(&at("_depthwise_conv"), &at("_bn1"), stride)?;
            let project = reader.conv(&at("_project_conv"), &at("_bn2"), 1)?;
            blocks.push(Bottleneck { expand, depthwise, project });
        }
        let &[classes, features] = reader.shape("_fc.weight")? else {
            let found = reader.shape("_fc.weight")?.to_vec();
            return Err(Error::Shape {
                name: "_fc.weight".into(),
                found,
                expected: vec![1000, 1280],
            });
        };
        let weight = TensorData::new(artifact.read_f32("_fc.weight")?, [classes, features]);
        let bias = TensorData::new(reader.vector("_fc.bias", classes)?, [classes]);
        Ok(Self {
            stem: reader.conv("_conv_stem", "_bn0", 2)?,
            blocks,
            head: reader.conv("_conv_head", "_bn1", 1)?,
            classifier: Linear::dense(
                "_fc",
                Tensor::from_data(weight, device),
                Some(Tensor::from_data(bias, device)),
            ),
        })
    }

    /// Every convolution, in the order in which a pass reaches them.
    pub fn convs(&self) -> impl Iterator<Item = &ConvNorm> {
        let inner = self
            .blocks
            .iter()
            .flat_map(|block| block.expand.iter().chain([&block.depthwise, &block.project]));
        [&self.stem].into_iter().chain(inner).chain([&self.head])
    }

    /// Images `[batch, 3, height, width]` to the mean of each channel after the last convolution, `[batch, width]`.
    pub fn features(&self, images: Tensor<4>) -> Tensor<2> {
        let relu6 = |x| Activation::Relu6.apply(x);
        let mut x = relu6(self.stem.forward(images));
        for block in &self.blocks {
            let expanded = match &block.expand {
                Some(expand) => relu6(expand.forward(x.clone())),
                None => x.clone(),
            };
            let y = block.project.forward(relu6(block.depthwise.forward(expanded)));
            x = if y.dims() == x.dims() { x + y } else { y };
        }
        ops::global_avg_pool2d(relu6(self.head.forward(x)))
    }

    /// Images `[batch, 3, height, width]` to logits `[batch, classes]`.
    pub fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        super::classify(&self.classifier, self.features(images), &mut Run::plain())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conv(scale: &[f32], shift: &[f32]) -> ConvNorm {
        let device = Device::flex();
        let vector = |values: &[f32]| Param::from_tensor(Tensor::from_floats(values, &device));
        ConvNorm {
            site: "_blocks.3._expand_conv".into(),
            weight: Param::from_tensor(Tensor::zeros([3, 1, 1, 1], &device)),
            scale: vector(scale),
            shift: vector(shift),
            stride: 1,
            groups: 1,
        }
    }

    #[test]
    fn a_folded_normalization_unfolds_to_what_it_was() {
        let (gamma, beta) = ([1.5f32, -0.25, 0.75], [0.1f32, -2.0, 0.0]);
        let (mean, variance) = ([0.5f32, -1.0, 3.0], [0.25f32, 4.0, 0.0]);
        let fold = |gamma: &[f32], beta: &[f32]| -> [Vec<f32>; 2] {
            let scale: Vec<f32> =
                gamma.iter().zip(variance).map(|(g, v)| g / (v + EPS).sqrt()).collect();
            let pairs = beta.iter().zip(mean).zip(&scale);
            let shift = pairs.map(|((b, m), s)| b - m * s).collect();
            [scale, shift]
        };
        let [scale, shift] = fold(&gamma, &beta);
        let [weight, bias] = conv(&scale, &shift).unfold(&mean, &variance);
        for i in 0..3 {
            assert!((weight[i] - gamma[i]).abs() < 1e-6 && (bias[i] - beta[i]).abs() < 1e-5);
        }
        // A function of scale and shift, through the chain rule and by differences.
        let (by_scale, by_shift) = ([0.3f32, -1.0, 2.0], [0.7f32, 0.2, -0.4]);
        let value = |gamma: &[f32], beta: &[f32]| -> f32 {
            let [scale, shift] = fold(gamma, beta);
            (0..3).map(|i| by_scale[i] * scale[i] + by_shift[i] * shift[i]).sum()
        };
        let [by_gamma, by_beta] =
            conv(&scale, &shift).unfold_gradient(&by_scale, &by_shift, &mean, &variance);
        for i in 0..3 {
            let (mut g, mut b) = (gamma, beta);
            g[i] += 0.5;
            b[i] += 0.5;
            let slope = |moved: f32| (moved - value(&gamma, &beta)) / 0.5;
            assert!(
                (slope(value(&g, &beta)) - by_gamma[i]).abs() < 1e-3 * (1.0 + by_gamma[i].abs())
            );
            assert!((slope(value(&gamma, &b)) - by_beta[i]).abs() < 1e-4);
        }
        assert_eq!(conv(&scale, &shift).norm(), "_blocks.3._bn0");
    }
}
