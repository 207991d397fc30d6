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
        let head = artifact.tensor("classifier.weight").map_err(|_| Error::Missing {
            name: "classifier.weight (a ViT without a classifier has no classes)".into(),
        })?;
        let classes = head.shape.first().copied().unwrap_or(0);
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
            classifier: loader.linear("classifier".into(), classes, hidden)?,
            image_size,
        })
    }

    /// Images `[batch, channels, height, width]` to the residual stream after the last block's norm, `[batch, patches + 1, hidden]`.
    ///
    /// # Errors
    /// An image size that the positions were not made for.
    pub fn features(&self, images: Tensor<4>, run: &mut Run) -> Result<Tensor<3>> {
        let [batch, channels, height, width] = images.dims();
        if [height, width] != [self.image_size; 2] {
            let message = format!(
                "images are {height} x {width}, the model takes {0} x {0}",
                self.image_size
            );
            return Err(Error::Invalid(message));
        }
        let [hidden, _, patch, _] = self.patches.val().dims();
        let (rows, columns) = (height / patch, width / patch);
        // A convolution whose stride is its kernel is a linear map of unfolded patches.
        let unfolded = images
            .reshape([batch, channels, rows, patch, columns, patch])
            .permute([0, 2, 4, 1, 3, 5])
            .reshape([batch, rows * columns, channels * patch * patch]);
        let weight = self.patches.val().reshape([hidden, channels * patch * patch]);
        let tokens = ops::linear(unfolded, weight, Some(self.patch_bias.val()));
        let class = self.class_token.val().expand([batch, 1, hidden]);
        let mut x = Tensor::cat(vec![class, tokens], 1) + self.positions.val();
        let context = Context { start: 0, rope: None, causal: false, lengths: None };
        for (index, block) in self.blocks.iter().enumerate() {
            x = block.forward(x, &context, index, run);
        }
        Ok(self.norm.forward(x))
    }

    /// Images to logits `[batch, classes]`.
    ///
    /// # Errors
    /// As [`Self::features`].
    pub fn forward(&self, images: Tensor<4>, run: &mut Run) -> Result<Tensor<2>> {
        let x = self.features(images, run)?;
        let [batch, _, hidden] = x.dims();
        let logits = self.classifier.forward(x.slice([0..batch, 0..1, 0..hidden]), run);
        let classes = logits.dims()[2];
        Ok(logits.reshape([batch, classes]))
    }
}
