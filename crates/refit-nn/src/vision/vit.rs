//! Vision Transformer (Dosovitskiy et al. 2021): patches as tokens, a class token, the blocks of [`crate::block`].

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use refit_store::artifact::Artifact;

use crate::block::{Block, Context};
use crate::error::{Error, Result};
use crate::load::Loader;
use crate::operator::{Linear, Norm};
use crate::ops;
use crate::run::Run;

/// A ViT classifier.
#[derive(Module, Debug)]
pub struct VisionTransformer {
    /// Patch projection `[hidden, channels, patch, patch]`.
    pub patches: Param<Tensor<4>>,
    /// Bias of the patch projection `[hidden]`.
    pub patch_bias: Param<Tensor<1>>,
    /// Class token `[1, 1, hidden]`.
    pub class_token: Param<Tensor<3>>,
    /// Positions of class token and patches `[1, patches + 1, hidden]`.
    pub positions: Param<Tensor<3>>,
    /// The blocks, in order.
    pub blocks: Vec<Block>,
    /// Norm after the last block.
    pub norm: Norm,
    /// Class logits from the class token.
    pub classifier: Linear,
    /// Height and width of the images.
    pub image_size: usize,
}

impl VisionTransformer {
    /// Loads a `ViTForImageClassification`.
    ///
    /// # Errors
    /// Missing or mis-shaped tensors, sizes that do not divide.
    pub fn load(artifact: &Artifact, device: &Device) -> Result<Self> {
        Self::read(artifact, device, true)
    }

    /// Loads a `ViTModel` or a classifier; one without a classifier gets a head of one class that is always 0.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_trunk(artifact: &Artifact, device: &Device) -> Result<Self> {
        Self::read(artifact, device, false)
    }

    fn read(artifact: &Artifact, device: &Device, classifies: bool) -> Result<Self> {
        let loader = Loader::new(artifact, device)?;
        loader.decode_ahead()?;
        let raw = artifact.config();
        let hidden = loader.config().hidden;
        let image_size = raw.usize("image_size").unwrap_or(224);
        let patch = raw.usize("patch_size").unwrap_or(16);
        let channels = raw.usize("num_channels").unwrap_or(3);
        if patch == 0 || !image_size.is_multiple_of(patch) {
            let problem = format!("{patch} does not divide image_size = {image_size}");
            return Err(Error::Config { key: "patch_size".into(), problem });
        }
        let tokens = (image_size / patch).pow(2) + 1;
        let projection = loader.trunk("embeddings.patch_embeddings.projection");
        let classifier = match artifact.tensor("classifier.weight") {
            Ok(head) => {
                let classes = head.shape.first().copied().unwrap_or(0);
                loader.linear("classifier".into(), classes, hidden)?
            }
            Err(_) if classifies => {
                return Err(Error::Missing {
                    name: "classifier.weight (a ViT without a classifier has no classes)".into(),
                });
            }
            Err(_) => Linear::dense(
                "classifier",
                Tensor::zeros([1, hidden], device),
                Some(Tensor::zeros([1], device)),
            ),
        };
        Ok(Self {
            patches: Param::from_tensor(
                loader.tensor(&format!("{projection}.weight"), [hidden, channels, patch, patch])?,
            ),
            patch_bias: Param::from_tensor(loader.tensor(&format!("{projection}.bias"), [hidden])?),
            class_token: Param::from_tensor(
                loader.tensor(&loader.trunk("embeddings.cls_token"), [1, 1, hidden])?,
            ),
            positions: Param::from_tensor(
                loader
                    .tensor(&loader.trunk("embeddings.position_embeddings"), [1, tokens, hidden])?,
            ),
            blocks: (0..loader.config().layers).map(|i| loader.block(i)).collect::<Result<_>>()?,
            norm: loader.outer_norm()?,
            classifier,
            image_size,
        })
    }

    /// Images `[batch, channels, height, width]` to the residual stream after the last block's norm, `[batch, patches + 1, hidden]`.
    ///
    /// # Errors
    /// An image size that the positions were not made for.
    pub fn features(&self, images: Tensor<4>, run: &mut Run) -> Result<Tensor<3>> {
        Ok(self.norm.forward(self.stream(images, run)?))
    }

    /// Images to the class token after the last block's norm, `[batch, hidden]`: what the classifier sees.
    ///
    /// # Errors
    /// As [`Self::features`].
    pub fn pooled(&self, images: Tensor<4>, run: &mut Run) -> Result<Tensor<2>> {
        let x = self.stream(images, run)?;
        let [batch, _, hidden] = x.dims();
        let class = x.slice([0..batch, 0..1, 0..hidden]);
        Ok(self.norm.forward(class).reshape([batch, hidden]))
    }

    /// Images to logits `[batch, classes]`.
    ///
    /// # Errors
    /// As [`Self::features`].
    pub fn forward(&self, images: Tensor<4>, run: &mut Run) -> Result<Tensor<2>> {
        Ok(super::classify(&self.classifier, self.pooled(images, run)?, run))
    }

    /// The residual stream after the last block.
    fn stream(&self, images: Tensor<4>, run: &mut Run) -> Result<Tensor<3>> {
        let mut x = self.embed(images)?;
        let context = Self::context();
        for (index, block) in self.blocks.iter().enumerate() {
            x = block.forward(x, &context, index, run);
        }
        Ok(x)
    }

    /// What the blocks of a pass share.
    pub fn context() -> Context {
        Context { start: 0, rope: None, causal: false, lengths: None, prefix: None }
    }

    /// Images to the residual stream before the first block, `[batch, patches + 1, hidden]`.
    ///
    /// # Errors
    /// As [`Self::features`].
    pub fn embed(&self, images: Tensor<4>) -> Result<Tensor<3>> {
        let [hidden, channels, patch, _] = self.patches.shape().dims();
        super::check(&images, channels, self.image_size)?;
        let batch = images.dims()[0];
        let side = self.image_size / patch;
        // A convolution whose stride is its kernel is a linear map of unfolded patches.
        let unfolded = images
            .reshape([batch, channels, side, patch, side, patch])
            .permute([0, 2, 4, 1, 3, 5])
            .reshape([batch, side * side, channels * patch * patch]);
        let weight = self.patches.val().reshape([hidden, channels * patch * patch]);
        let tokens = ops::linear(unfolded, weight, Some(self.patch_bias.val()));
        let class = self.class_token.val().expand([batch, 1, hidden]);
        Ok(Tensor::cat(vec![class, tokens], 1) + self.positions.val())
    }
}
