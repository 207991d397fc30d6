//! Models from scratch: a shape, which is a handful of numbers, and a seed give a model made of the same parts as pretrained ones.

mod cnn;
mod decoder;
mod mlp;
mod values;
mod vit;

pub use cnn::{CnnShape, Downsample};
pub use decoder::DecoderShape;
pub use mlp::MlpShape;
pub use vit::VitShape;
