//! Parameters by name: every trainable tensor of a model under the name that it has in the artifact.

use std::collections::HashMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{Gradients, Tensor, TensorData};

use crate::block::Block;
use crate::classifier::{Body, TextClassifier};
use crate::operator::{Conv2d, Embedding, Linear, Norm};
use crate::vision::{Cnn, EfficientNetLite, Mlp, Vision, VisionTransformer};
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

/// Reads or changes the values of parameters by name: `edit` gets name, shape and values of each, and returns new values of
/// the same number, or `None` to leave it alone.
pub fn edit<M: Trainable>(
    model: M,
    mut edit: impl FnMut(&str, &[usize], &dyn Fn() -> Vec<f32>) -> Option<Vec<f32>>,
) -> M {
    let names: HashMap<ParamId, String> =
        model.parameters().into_iter().map(|p| (p.id, p.name)).collect();
    model.map(&mut Edit { names: &names, edit: &mut edit })
}

/// Takes the gradients of a backward pass by name.
pub fn gradients<M: Trainable>(
    model: &M,
    gradients: &mut Gradients,
    mut take: impl FnMut(&str, Vec<f32>),
) {
    let names: HashMap<ParamId, String> =
        model.parameters().into_iter().map(|p| (p.id, p.name)).collect();
    model.visit(&mut Take { names: &names, gradients, take: &mut take });
}

struct Take<'a> {
    names: &'a HashMap<ParamId, String>,
    gradients: &'a mut Gradients,
    take: &'a mut dyn FnMut(&str, Vec<f32>),
}

impl ModuleVisitor for Take<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(name) = self.names.get(&param.id)
            && let Some(gradient) = param.base().grad_remove(self.gradients)
        {
            (self.take)(name, crate::ops::to_vec(&gradient));
        }
    }
}

/// What [`edit`] calls with name, shape and a way to the values.
type Editor<'a> = dyn FnMut(&str, &[usize], &dyn Fn() -> Vec<f32>) -> Option<Vec<f32>> + 'a;

struct Edit<'a> {
    names: &'a HashMap<ParamId, String>,
    edit: &'a mut Editor<'a>,
}

impl ModuleMapper for Edit<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(name) = self.names.get(&param.id) else { return param };
        let base = param.base();
        let plain = if base.is_autodiff() { base.clone().inner() } else { base.clone() };
        let shape = plain.dims();
        let Some(values) = (self.edit)(name, &shape, &|| crate::ops::to_vec(&plain)) else {
            return param;
        };
        let (id, old, mapper) = param.consume();
        let (tracked, autodiff) = (old.is_require_grad(), old.is_autodiff());
        let new = Tensor::<D>::from_data(TensorData::new(values, shape), &plain.device());
        let new = if autodiff { Tensor::from_inner(new) } else { new };
        Param::from_mapped_value(id, new.set_require_grad(tracked), mapper)
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
        // The operator of a linear is no part of a tensor's name, and a form's parameters stand beside the weight.
        let last = self.path.len().saturating_sub(1);
        let keep = |(i, part): &(usize, &String)| match part.as_str() {
            "op" | "Dense" | "LowRank" => false,
            "weight" => *i == last,
            _ => true,
        };
        let parts = self.path.iter().enumerate().filter(keep).map(|(_, part)| part.as_str());
        self.found.push(Parameter {
            id: param.id,
            name: parts.collect::<Vec<_>>().join("."),
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
    fn tensor<const D: usize>(&mut self, name: &str, param: &Param<Tensor<D>>) {
        self.path = vec![name.to_owned()];
        self.visit_float(param);
    }

    fn conv(&mut self, conv: &Conv2d) {
        self.site(&conv.site, conv);
    }

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
        for side in block.sides() {
            self.linear(&side.down);
            self.linear(&side.up);
            if let Some(gain) = &side.gain {
                let site = side.up.site.strip_suffix("adapter_up").unwrap_or(&side.up.site);
                self.path = vec![format!("{site}adapter_gain")];
                self.visit_float(gain);
            }
        }
        if let Some(adapter) = &mixer.head_adapter {
            self.site(&format!("{}.head_adapter", mixer.o.site), adapter);
        }
        let rest = [&mixer.q_norm, &mixer.k_norm, &block.mixer_post_norm, &block.ffn_post_norm];
        self.norm(&block.ffn_norm);
        rest.into_iter().flatten().for_each(|n| self.norm(n));
    }

    fn frame(&mut self, frame: &Frame) {
        self.embedding(&frame.embed);
        frame.positions.iter().for_each(|p| self.embedding(p));
        self.norm(&frame.norm);
        frame.head.iter().for_each(|h| self.linear(h));
        if let Some(prefix) = &frame.prefix {
            self.path = vec!["prefix.table".into()];
            self.visit_float(&prefix.table);
            if let Some(net) = &prefix.net {
                self.linear(&net.first);
                self.linear(&net.second);
            }
        }
        if let Some(prompt) = &frame.prompt {
            self.path = vec!["prompt.table".into()];
            self.visit_float(prompt);
        }
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

/// The body under the artifact's names, then the head.
impl Trainable for TextClassifier {
    fn parameters(&self) -> Vec<Parameter> {
        let found = match &self.body {
            Body::Encoder(encoder) => encoder.parameters(),
            Body::Decoder(decoder) => decoder.parameters(),
        };
        let mut collect = Collect { path: Vec::new(), found };
        [&self.dense, &self.classifier].into_iter().flatten().for_each(|l| collect.linear(l));
        collect.found
    }
}

impl Trainable for VisionTransformer {
    fn parameters(&self) -> Vec<Parameter> {
        // Checkpoints differ in what stands before the trunk's names; the last norm tells.
        let prefix = self.norm.site.strip_suffix("layernorm").unwrap_or_default();
        let at = |part: &str| format!("{prefix}embeddings.{part}");
        let mut collect = Collect::default();
        collect.tensor(&at("cls_token"), &self.class_token);
        collect.tensor(&at("position_embeddings"), &self.positions);
        collect.tensor(&at("patch_embeddings.projection.weight"), &self.patches);
        collect.tensor(&at("patch_embeddings.projection.bias"), &self.patch_bias);
        self.blocks.iter().for_each(|b| collect.block(b));
        collect.norm(&self.norm);
        collect.linear(&self.classifier);
        collect.found
    }
}

/// The scale and shift of a folded batch normalization are `SITE.scale` and `SITE.shift`.
impl Trainable for EfficientNetLite {
    fn parameters(&self) -> Vec<Parameter> {
        let mut collect = Collect::default();
        for conv in self.convs() {
            collect.site(&conv.site, conv);
        }
        collect.linear(&self.classifier);
        collect.found
    }
}

impl Trainable for Cnn {
    fn parameters(&self) -> Vec<Parameter> {
        let mut collect = Collect::default();
        self.stages.iter().flat_map(|s| &s.convs).for_each(|c| collect.conv(c));
        collect.linear(&self.classifier);
        collect.found
    }
}

impl Trainable for Mlp {
    fn parameters(&self) -> Vec<Parameter> {
        let mut collect = Collect::default();
        self.layers.iter().chain([&self.classifier]).for_each(|l| collect.linear(l));
        collect.found
    }
}

impl Trainable for Vision {
    fn parameters(&self) -> Vec<Parameter> {
        match self {
            Self::EfficientNetLite(model) => model.parameters(),
            Self::Vit(model) => model.parameters(),
            Self::Cnn(model) => model.parameters(),
            Self::Mlp(model) => model.parameters(),
        }
    }
}

impl Trainable for Linear {
    fn parameters(&self) -> Vec<Parameter> {
        let mut collect = Collect::default();
        collect.linear(self);
        collect.found
    }
}
