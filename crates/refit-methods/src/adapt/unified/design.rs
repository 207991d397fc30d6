//! A point of the design space: what is attached to a decoder, what of it trains, and what was learned.

use burn::module::Param;
use burn::tensor::{Tensor, TensorData};
use refit_data::Rng;
use refit_nn::config::TransformerConfig;
use refit_nn::operator::Linear;
use refit_nn::ops::{self, Activation};
use refit_nn::side::{Bottleneck, HeadAdapter, Init, Prefix};
use refit_nn::{BurnDevice, Decoder, adapter};
use refit_store::adapter::{Form, Part, Prompt, Values};
use refit_train::train::{Rule, Scope};

use super::axes::Function;
use crate::error::Result;

/// What is attached to every block, and before the text.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Design {
    /// On the heads, before the output projection.
    pub heads: Option<Side>,
    /// On the output of attention.
    pub attention: Option<Side>,
    /// On the output of the ffn.
    pub ffn: Option<Side>,
    /// On every head by itself.
    pub per_head: Option<PerHead>,
    /// Virtual tokens as keys and values, and the width of the net that they are trained through.
    pub prefix: Option<(usize, usize)>,
    /// Virtual tokens as embeddings.
    pub prompt: Option<usize>,
}

/// One bottleneck.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Side {
    /// Channels.
    pub rank: usize,
    /// Factor on the output.
    pub scale: f64,
    /// Whether that factor is learned besides.
    pub learnable: bool,
    /// Reads the output that it changes, not the input of the part beside it.
    pub sequential: bool,
    /// How it begins.
    pub init: Init,
    /// Nonlinearity.
    pub function: Function,
}

/// An adapter on every head by itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PerHead {
    /// Channels of each head.
    pub rank: usize,
    /// Factor on the output.
    pub scale: f64,
    /// Softmax over the channels in place of the ReLU.
    pub softmax: bool,
}

/// The engine's name of a function; `None` for the linear one and for softmax, which is no elementwise function.
fn activation(function: Function) -> Option<Activation> {
    match function {
        Function::Relu => Some(Activation::Relu),
        Function::Gelu => Some(Activation::Gelu),
        Function::Silu => Some(Activation::Silu),
        Function::Linear | Function::Softmax => None,
    }
}

/// The name under which a bottleneck's function is written.
fn written(activation: Option<Activation>) -> &'static str {
    match activation {
        Some(Activation::Relu) => Function::Relu.name(),
        Some(Activation::Gelu) => Function::Gelu.name(),
        Some(Activation::Silu) => Function::Silu.name(),
        Some(other) => unreachable!("{other:?} is attached by nothing here"),
        None => Function::Linear.name(),
    }
}

impl Design {
    /// Nothing is attached: the base model.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Positions that virtual tokens take.
    pub fn virtual_tokens(&self) -> usize {
        self.prefix.map_or(0, |(tokens, _)| tokens) + self.prompt.unwrap_or(0)
    }

    /// Parameters that are written: those of a prefix's table, without the net that it is trained through.
    pub fn parameters(&self, config: &TransformerConfig) -> usize {
        let (hidden, heads) = (config.hidden, config.heads * config.head_dim);
        let side = |side: Option<Side>, inputs: usize, outputs: usize| {
            let side = side?;
            Some(side.rank * (inputs + outputs + 1) + outputs + usize::from(side.learnable))
        };
        let of = |part: Option<Side>, outputs: usize| {
            let inputs = part.map_or(0, |s| if s.sequential { outputs } else { hidden });
            side(part, inputs, outputs).unwrap_or(0)
        };
        let per_head = self.per_head.map_or(0, |part| 2 * heads * part.rank);
        let kv = config.kv_heads * config.head_dim;
        let prefix = self.prefix.map_or(0, |(tokens, _)| tokens * 2 * kv);
        let block = of(self.heads, heads) + of(self.attention, hidden) + of(self.ffn, hidden);
        config.layers * (block + per_head + prefix) + self.prompt.unwrap_or(0) * hidden
    }

    /// Attaches everything to `decoder` and says what trains.
    ///
    /// # Errors
    /// A prefix on a model with sliding windows.
    pub fn attach(&self, decoder: &mut Decoder, rng: &mut Rng) -> Result<Scope> {
        let config = decoder.config().clone();
        let device = decoder.frame.embed.weight.val().device();
        let (hidden, heads) = (config.hidden, config.heads * config.head_dim);
        let kv_width = config.kv_heads * config.head_dim;
        if self.prefix.is_some() {
            adapter::refuse_windows(decoder)?;
        }
        for block in &mut decoder.blocks {
            let o = block.mixer.o.site.clone();
            let down = block.ffn.down_site().to_owned();
            let mut new = |side: Side, site: &str, inputs: usize, outputs: usize| {
                let inputs = if side.sequential { outputs } else { inputs };
                let shape = [inputs, side.rank, outputs];
                Bottleneck {
                    activation: activation(side.function),
                    scale: side.scale,
                    gain: side.learnable.then(|| one(&device)),
                    sequential: side.sequential,
                    ..Bottleneck::new(site, shape, side.init, rng, &device)
                }
            };
            block.mixer.side = self.heads.map(|side| new(side, &o, hidden, heads));
            block.mixer_side = self.attention.map(|side| new(side, &o, hidden, hidden));
            block.ffn_side = self.ffn.map(|side| new(side, &down, hidden, hidden));
            if let Some(PerHead { rank, scale, softmax }) = self.per_head {
                let shape = [config.heads, rank, config.head_dim];
                let fresh = HeadAdapter::new(shape, scale, rng, &device);
                block.mixer.head_adapter = Some(HeadAdapter { softmax, ..fresh });
            }
        }
        if let Some((tokens, net)) = self.prefix {
            let shape = [hidden, net];
            let prefix = Prefix::new(tokens, config.layers, kv_width, shape, rng, &device);
            decoder.frame.prefix = Some(prefix);
        }
        if let Some(tokens) = self.prompt {
            let values: Vec<f32> =
                (0..tokens * hidden).map(|_| 0.02 * rng.normal() as f32).collect();
            let table = TensorData::new(values, [tokens, hidden]);
            let table = Tensor::from_data(table, &device);
            decoder.frame.prompt = Some(Param::from_tensor(table));
        }
        let mut rules = vec![Rule::freeze("@all")];
        let sides = [self.heads, self.attention, self.ffn];
        if sides.iter().any(Option::is_some) {
            rules.extend([Rule::train("*.adapter_down.*"), Rule::train("*.adapter_up.*")]);
            let learnable = sides.iter().flatten().any(|side| side.learnable);
            rules.extend(learnable.then(|| Rule::train("*.adapter_gain")));
        }
        rules.extend(self.per_head.map(|_| Rule::train("*.head_adapter.*")));
        rules.extend(self.prefix.map(|_| Rule::train("prefix.*")));
        rules.extend(self.prompt.map(|_| Rule::train("prompt.*")));
        Ok(Scope { rules })
    }
}

fn one(device: &BurnDevice) -> Param<Tensor<1>> {
    Param::from_tensor(Tensor::ones([1], device))
}

/// What a trained model learned, as it is written.
pub fn learned(model: &Decoder) -> (Vec<Part>, Option<Prompt>) {
    let mut parts = Vec::new();
    for block in &model.blocks {
        let (o, down) = (block.mixer.o.site.as_str(), block.ffn.down_site());
        let places = [
            (&block.mixer.side, o, "heads"),
            (&block.mixer_side, o, "attention"),
            (&block.ffn_side, down, "ffn"),
        ];
        for (side, site, position) in places {
            let Some(side) = side else { continue };
            let gain = side.gain.as_ref().map_or(1.0, |gain| ops::to_vec(&gain.val())[0]);
            let (down, down_bias) = matrix(&side.down);
            let (up, up_bias) = matrix(&side.up);
            parts.push(Part {
                site: site.to_owned(),
                form: Form::Bottleneck {
                    down,
                    down_bias,
                    up,
                    up_bias,
                    // A learned factor is one number by now.
                    scale: side.scale as f32 * gain,
                    activation: written(side.activation).into(),
                    sequential: side.sequential,
                    position: position.into(),
                },
            });
        }
        if let Some(adapter) = &block.mixer.head_adapter {
            let values =
                |x: Tensor<3>| Values { shape: x.dims().to_vec(), values: ops::to_vec(&x) };
            parts.push(Part {
                site: o.to_owned(),
                form: Form::Heads {
                    keys: values(adapter.keys.val()),
                    values: values(adapter.values.val()),
                    scale: adapter.scale as f32,
                    activation: head_function(adapter.softmax).name().into(),
                },
            });
        }
    }
    let table = |x: Tensor<2>| Values { shape: x.dims().to_vec(), values: ops::to_vec(&x) };
    let prompt = match (&model.frame.prefix, &model.frame.prompt) {
        (Some(prefix), _) => Some(Prompt::Prefix {
            tokens: prefix.tokens(),
            layers: model.config().layers,
            table: table(prefix.keys_and_values()),
        }),
        (None, Some(prompt)) => {
            Some(Prompt::Input { tokens: prompt.val().dims()[0], table: table(prompt.val()) })
        }
        (None, None) => None,
    };
    (parts, prompt)
}

fn head_function(softmax: bool) -> Function {
    if softmax { Function::Softmax } else { Function::Relu }
}

fn matrix(linear: &Linear) -> (Values, Vec<f32>) {
    let weight = linear.weight();
    let values = Values { shape: weight.dims().to_vec(), values: ops::to_vec(&weight) };
    let bias = linear.bias.as_ref().map(|bias| ops::to_vec(&bias.val())).unwrap_or_default();
    (values, bias)
}

#[cfg(test)]
mod tests {
    use refit_nn::scratch::DecoderShape;
    use refit_nn::{Run, Trainable, named};
    use refit_train::BoxError;
    use refit_train::train::loss::next_token;
    use refit_train::train::{At, Recipe, Terms, Trainer};

    use super::*;

    fn decoder() -> Decoder {
        let shape = DecoderShape {
            hidden: 16,
            intermediate: 24,
            layers: 3,
            heads: 4,
            kv_heads: 2,
            vocab: 40,
            context: 32,
            tied: true,
        };
        shape.init(5, &BurnDevice::flex()).unwrap()
    }

    fn designs() -> Vec<(&'static str, Design, usize)> {
        let side = Some(Side {
            rank: 3,
            scale: 4.0,
            learnable: false,
            sequential: false,
            init: Init::Lora,
            function: Function::Relu,
        });
        let linear = side.map(|side| Side { function: Function::Linear, ..side });
        let heads = |softmax| Some(PerHead { rank: 2, scale: 1.0, softmax });
        let none = Design::default();
        let (layers, d, kv) = (3, 16, 8);
        // The card's counts: L (2 d r + r + d) for a bottleneck, 2 L l kv for a prefix.
        let bottleneck = layers * (2 * d * 3 + 3 + d);
        vec![
            ("ffn", Design { ffn: side, ..none }, bottleneck),
            ("heads", Design { heads: side, ..none }, bottleneck),
            ("prefix", Design { prefix: Some((5, 0)), ..none }, 2 * layers * 5 * kv),
            ("prompt", Design { prompt: Some(5), ..none }, 5 * d),
            ("per head", Design { per_head: heads(false), ..none }, layers * 2 * 4 * 2 * 4),
            ("ungated prefix", Design { per_head: heads(true), ..none }, layers * 2 * 4 * 2 * 4),
            ("attention and ffn", Design { attention: linear, ffn: side, ..none }, 2 * bottleneck),
            (
                "prefix and heads",
                Design { prefix: Some((5, 0)), heads: linear, ..none },
                bottleneck + 240,
            ),
            ("mam", Design { prefix: Some((5, 0)), ffn: side, ..none }, bottleneck + 240),
        ]
    }

    #[test]
    fn counts_are_those_of_the_card() {
        for (name, design, count) in designs() {
            assert_eq!(design.parameters(decoder().config()), count, "{name}");
            let mut model = decoder();
            let before: usize = size(&model);
            design.attach(&mut model, &mut Rng::new(1)).unwrap();
            assert_eq!(size(&model) - before, count, "{name}");
        }
    }

    fn size(model: &Decoder) -> usize {
        model.parameters().iter().map(|p| p.shape.iter().product::<usize>()).sum()
    }

    fn values(model: Decoder) -> std::collections::BTreeMap<String, Vec<f32>> {
        let mut all = std::collections::BTreeMap::new();
        let _ = named::edit(model, |name, _, values| {
            all.insert(name.to_owned(), values());
            None
        });
        all
    }

    #[test]
    fn nothing_but_the_adapter_trains() {
        let base = values(decoder());
        let ids: Vec<u32> = (0..24).map(|i| i * 7 % 40).collect();
        for (name, design, _) in designs() {
            let mut model = decoder();
            let scope = design.attach(&mut model, &mut Rng::new(1)).unwrap();
            let start = values(model.clone());
            let recipe = Recipe { scope, decay: 0.1, ..Recipe::new(3, 1e-2) };
            let mut trainer = Trainer::new(model, recipe).unwrap();
            let objective = |model: &Decoder, _: At| -> Result<Terms, BoxError> {
                let (loss, tokens) = next_token(model, &ids, 2, None, &mut Run::plain())?;
                Ok(Terms::one("ce", loss, tokens))
            };
            for _ in 0..3 {
                trainer.step(&objective).unwrap();
            }
            for (parameter, trained) in values(trainer.into_model()) {
                let moved = trained != start[&parameter];
                assert_eq!(moved, !base.contains_key(&parameter), "{name}: {parameter}");
            }
        }
    }
}
