//! What a caller may hand to a run: a cache and taps. Both are optional and cost nothing when unused.

use burn::tensor::Tensor;

use crate::cache::Cache;

/// Reads or replaces named activations.
///
/// Names: `SITE:in` and `SITE:out` around every linear (`model.layers.7.mlp.down_proj:in`), and `layers.N.resid.pre`,
/// `layers.N.resid.mid`, `layers.N.resid.post` on the residual stream. Activations are `[batch, seq, width]`.
pub trait Tap {
    /// Sees the activation `name` and returns what the run goes on with.
    fn visit(&mut self, name: &str, value: Tensor<3>) -> Tensor<3>;
}

impl<F: FnMut(&str, Tensor<3>) -> Tensor<3>> Tap for F {
    fn visit(&mut self, name: &str, value: Tensor<3>) -> Tensor<3> {
        self(name, value)
    }
}

/// The extras of one forward pass.
#[derive(Default)]
pub struct Run<'a> {
    /// Decoding state to read and extend.
    pub cache: Option<&'a mut Cache>,
    /// Activations to observe or replace.
    pub tap: Option<&'a mut dyn Tap>,
}

impl<'a> Run<'a> {
    /// A pass without cache and taps.
    pub fn plain() -> Self {
        Self::default()
    }

    /// A pass that reads and extends `cache`.
    pub fn cached(cache: &'a mut Cache) -> Self {
        Self { cache: Some(cache), tap: None }
    }

    /// A pass observed by `tap`.
    pub fn tapped(tap: &'a mut dyn Tap) -> Self {
        Self { cache: None, tap: Some(tap) }
    }

    /// Shows `value` to the tap, if there is one. The name is built only then.
    pub fn tap(&mut self, name: impl FnOnce() -> String, value: Tensor<3>) -> Tensor<3> {
        match &mut self.tap {
            Some(tap) => tap.visit(&name(), value),
            None => value,
        }
    }
}
