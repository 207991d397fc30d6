//! Where the values of a new model come from: a seed, or an artifact.

use burn::module::Param;
use burn::tensor::{Device, Tensor, TensorData};
use refit_data::Rng;
use refit_store::{Artifact, Config};

use crate::error::{Error, Result};
use crate::operator::{Conv2d, Linear, Norm, NormKind};
use crate::ops::ConvSpec;

/// How a tensor starts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Start {
    /// N(0, gain² / fan_in), He et al. 2015: `gain` is √2 before a ReLU and 1 elsewhere.
    Kaiming { gain: f64 },
    /// N(0, std²) without what lies beyond two standard deviations.
    Truncated { std: f64 },
}

/// Before a ReLU.
pub(super) const RELU: Start = Start::Kaiming { gain: std::f64::consts::SQRT_2 };
/// Before a softmax.
pub(super) const PLAIN: Start = Start::Kaiming { gain: 1.0 };

impl Start {
    /// The values of the tensor `name`. Each tensor has a stream of its own, so that one more changes no other.
    fn values(self, seed: u64, name: &str, shape: &[usize]) -> Vec<f32> {
        let mut rng = Rng::named(seed, name);
        let count = shape.iter().product::<usize>();
        match self {
            Self::Kaiming { gain } => {
                let fan_in = shape[1..].iter().product::<usize>().max(1);
                let std = gain / (fan_in as f64).sqrt();
                (0..count).map(|_| (std * rng.normal()) as f32).collect()
            }
            Self::Truncated { std } => {
                let mut draw = || loop {
                    let x = rng.normal();
                    if x.abs() <= 2.0 {
                        return (std * x) as f32;
                    }
                };
                (0..count).map(|_| draw()).collect()
            }
        }
    }
}

/// Makes the parts of a model.
pub(super) enum Values<'a> {
    Seed(u64, &'a Device),
    Artifact(&'a Artifact, &'a Device),
}

impl Values<'_> {
    fn device(&self) -> &Device {
        match self {
            Self::Seed(_, device) | Self::Artifact(_, device) => device,
        }
    }

    /// The tensor `name`; `start` is `None` for what starts at `fill`.
    fn make<const D: usize>(
        &self,
        name: &str,
        shape: [usize; D],
        start: Option<Start>,
        fill: f32,
    ) -> Result<Tensor<D>> {
        let values = match (self, start) {
            (Self::Seed(seed, _), Some(start)) => start.values(*seed, name, &shape),
            (Self::Seed(..), None) => vec![fill; shape.iter().product()],
            (Self::Artifact(artifact, _), _) => {
                let info =
                    artifact.tensor(name).map_err(|_| Error::Missing { name: name.into() })?;
                if info.shape != shape {
                    return Err(Error::Shape {
                        name: name.into(),
                        found: info.shape.clone(),
                        expected: shape.to_vec(),
                    });
                }
                artifact.read_f32(name)?
            }
        };
        Ok(Tensor::from_data(TensorData::new(values, shape), self.device()))
    }

    pub fn tensor<const D: usize>(
        &self,
        name: &str,
        shape: [usize; D],
        start: Start,
    ) -> Result<Tensor<D>> {
        self.make(name, shape, Some(start), 0.0)
    }

    pub fn zeros(&self, name: &str, width: usize) -> Result<Tensor<1>> {
        self.make(name, [width], None, 0.0)
    }

    pub fn linear(&self, site: &str, [out, inputs]: [usize; 2], start: Start) -> Result<Linear> {
        let weight = self.tensor(&format!("{site}.weight"), [out, inputs], start)?;
        Ok(Linear::dense(site, weight, Some(self.zeros(&format!("{site}.bias"), out)?)))
    }

    /// `shape` is `[out, in / groups, k, k]`.
    pub fn conv(&self, site: String, shape: [usize; 4], spec: ConvSpec) -> Result<Conv2d> {
        let weight = self.tensor(&format!("{site}.weight"), shape, RELU)?;
        let bias = self.zeros(&format!("{site}.bias"), shape[0])?;
        Ok(Conv2d::new(site, weight, Some(bias), spec))
    }

    pub fn layer_norm(&self, site: String, width: usize, eps: f64) -> Result<Norm> {
        let weight = self.make(&format!("{site}.weight"), [width], None, 1.0)?;
        let bias = self.zeros(&format!("{site}.bias"), width)?;
        Ok(Norm {
            site,
            weight: Param::from_tensor(weight),
            bias: Some(Param::from_tensor(bias)),
            eps,
            kind: NormKind::Layer,
        })
    }
}

/// The whole number at `key`, or `default` where it has one.
pub(super) fn number(config: &Config, key: &str, default: Option<usize>) -> Result<usize> {
    match (config.get(key), default) {
        (None, Some(default)) => Ok(default),
        _ => config.usize(key).ok_or_else(|| Error::Config {
            key: key.into(),
            problem: "is missing or not a whole number".into(),
        }),
    }
}

/// The list of whole numbers at `key`.
pub(super) fn numbers(config: &Config, key: &str) -> Result<Vec<usize>> {
    let list = config.get(key).and_then(|v| v.as_array()).map(|list| {
        list.iter().map(|v| v.as_u64().and_then(|n| usize::try_from(n).ok())).collect()
    });
    list.flatten().ok_or_else(|| Error::Config {
        key: key.into(),
        problem: "is missing or not a list of whole numbers".into(),
    })
}

/// `num_labels`, or the number of names in `id2label`, or ten.
pub(super) fn classes(config: &Config) -> Result<usize> {
    let named = config.get("id2label").and_then(|v| v.as_object()).map(|names| names.len());
    number(config, "num_labels", Some(named.unwrap_or(10)))
}

/// Refuses zeros and sizes that no model of this kind has, before memory is asked for.
pub(super) fn check(sizes: &[(&str, usize)]) -> Result<()> {
    const MOST: usize = 1 << 20;
    match sizes.iter().find(|(_, size)| *size == 0 || *size > MOST) {
        Some((key, size)) => Err(Error::Config {
            key: (*key).into(),
            problem: format!("is {size}; it must lie between 1 and {MOST}"),
        }),
        None => Ok(()),
    }
}
