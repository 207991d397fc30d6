//! Parameters by name: every trainable tensor of a model under the name that it has in the artifact.

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::Tensor;

use crate::block::Block;
use crate::operator::{Embedding, Linear, Norm};
use crate::{Decoder, Encoder, Frame};

/// One float parameter of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// Burn's identity of it.
    pub id: ParamId,
    /// Name of the tensor (`model.layers.0.mlp.up_proj.weight`); parameters of a training form carry the form's name
    /// (`model.layers.0.mlp.up_proj.lora.a`).
    pub name: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// Whether it gets a gradient.
    pub trainable: bool,
}

/// A module whose parameters have stable names. The default names them by their place in the module.
pub trait Trainable: Module {
    /// All float parameters, each once, in a fixed order.
    fn parameters(&self) -> Vec<Parameter> {
        let mut collect = Collect::default();
        self.visit(&mut collect);
        collect.found
    }
}

/// Gathers the parameters of one module under a prefix.
#[derive(Default)]
struct Collect {
    path: Vec<String>,
    found: Vec<Parameter>,
}

impl Collect {
    fn site(&mut self, site: &str, module: &impl Module) {
        self.path = vec![site.to_owned()];
        module.visit(self);
    }
}

impl ModuleVisitor for Collect {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        // The operator of a linear is no part of a tensor's name.
        let parts = self.path.iter().filter(|p| !matches!(p.as_str(), "op" | "Dense" | "LowRank"));
        self.found.push(Parameter {
            id: param.id,
            name: parts.cloned().collect::<Vec<_>>().join("."),
            shape: param.shape().to_vec(),
            trainable: param.is_require_grad(),
        });
    }

    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }
}

impl Collect {
    fn linear(&mut self, linear: &Linear) {
        self.site(&linear.site, linear);
    }

    fn norm(&mut self, norm: &Norm) {
        self.site(&norm.site, norm);
    }

    fn embedding(&mut self, table: &Embedding) {
        self.site(&table.site, table);
    }

    fn block(&mut self, block: &Block) {
        self.norm(&block.mixer_norm);
        block.linears().into_iter().for_each(|l| self.linear(l));
        let mixer = &block.mixer;
        let rest = [&mixer.q_norm, &mixer.k_norm, &block.mixer_post_norm, &block.ffn_post_norm];
        self.norm(&block.ffn_norm);
        rest.into_iter().flatten().for_each(|n| self.norm(n));
    }

    fn frame(&mut self, frame: &Frame) {
        self.embedding(&frame.embed);
        frame.positions.iter().for_each(|p| self.embedding(p));
        self.norm(&frame.norm);
        frame.head.iter().for_each(|h| self.linear(h));
    }
}

impl Trainable for Decoder {
    fn parameters(&self) -> Vec<Parameter> {
        let mut collect = Collect::default();
        collect.frame(&self.frame);
        self.blocks.iter().for_each(|b| collect.block(b));
        collect.found
    }
}

impl Trainable for Encoder {
    fn parameters(&self) -> Vec<Parameter> {
        let mut collect = Collect::default();
        collect.embedding(&self.embed);
        collect.embedding(&self.positions);
        self.segments.iter().for_each(|s| collect.embedding(s));
        collect.norm(&self.norm);
        self.blocks.iter().for_each(|b| collect.block(b));
        collect.found
    }
}

impl Trainable for Linear {
    fn parameters(&self) -> Vec<Parameter> {
        let mut collect = Collect::default();
        collect.linear(self);
        collect.found
    }
}
