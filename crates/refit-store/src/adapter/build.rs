//! From the factors at one site to a form, with every shape held against the configuration and its partners.

use std::collections::BTreeMap;

use super::form::{Factor, Form, Side};
use super::pattern::Pattern;
use super::read::{PREFIX, Reader, Stored};
use crate::error::{Result, TensorFault};

/// Factors of one site by their word.
#[derive(Default)]
pub(super) struct Site(pub BTreeMap<&'static str, Stored>);

impl Site {
    fn take(&mut self, word: &str) -> Option<Stored> {
        self.0.remove(word)
    }
}

/// Assembles forms, with the numbers of the configuration at hand.
pub(super) struct Builder<'a> {
    reader: &'a Reader<'a>,
    kind: &'a str,
    rank: usize,
    alpha: f64,
    rank_stabilized: bool,
    dora: bool,
    ranks: Vec<(Pattern, f64)>,
    alphas: Vec<(Pattern, f64)>,
}

impl<'a> Builder<'a> {
    pub fn new(reader: &'a Reader<'a>, kind: &'a str) -> Result<Self> {
        let config = reader.config;
        let alpha = if kind == "LORA" { "lora_alpha" } else { "alpha" };
        let ranked = ["LORA", "LOHA", "LOKR"].contains(&kind);
        let rank = if ranked { reader.key(config.count("r"))? } else { None };
        let alpha = if ranked { reader.key(config.number(alpha))? } else { None };
        let patterns = |key| if ranked { reader.key(config.patterns(key)) } else { Ok(Vec::new()) };
        Ok(Self {
            reader,
            kind,
            rank: rank.unwrap_or(8),
            alpha: alpha.unwrap_or(8.0),
            rank_stabilized: kind == "LORA" && reader.key(config.flag("use_rslora"))?,
            dora: kind == "LORA" && reader.key(config.flag("use_dora"))?,
            ranks: patterns("rank_pattern")?,
            alphas: patterns("alpha_pattern")?,
        })
    }

    /// `r` and the factor of the product at a site.
    fn rank_and_scale(&self, site: &str) -> Result<(usize, f32)> {
        let pick = |patterns: &[(Pattern, f64)]| {
            patterns.iter().find(|(pattern, _)| pattern.matches(site)).map(|(_, number)| *number)
        };
        let rank = pick(&self.ranks).unwrap_or(self.rank as f64);
        if rank.fract() != 0.0 || !(1.0..1e9).contains(&rank) {
            let reason = format!("`{site}` gets rank {rank}; expected a whole number from 1");
            return Err(self.reader.wrong("rank_pattern", reason));
        }
        let alpha = pick(&self.alphas).unwrap_or(self.alpha);
        let divisor = if self.rank_stabilized { rank.sqrt() } else { rank };
        Ok((rank as usize, (alpha / divisor) as f32))
    }

    pub fn form(&self, site: &str, mut factors: Site) -> Result<Form> {
        let form = match self.kind {
            "LORA" => self.lora(site, &mut factors)?,
            "IA3" => self.ia3(&mut factors, site)?,
            "LOHA" => self.loha(site, &mut factors)?,
            "LOKR" => self.lokr(site, &mut factors)?,
            "LN_TUNING" => self.norm(site, &mut factors)?,
            _ => self.bottleneck(site, &mut factors)?,
        };
        match factors.0.into_values().next() {
            None => Ok(form),
            Some((name, _)) => {
                let reason = format!("it does not belong to the {} at `{site}`", form.name());
                Err(self.reader.fault(&name, TensorFault::Other(reason)))
            }
        }
    }

    /// A factor that must be there.
    fn need(&self, site: &str, factors: &mut Site, word: &str, end: &str) -> Result<Stored> {
        factors.take(word).ok_or_else(|| {
            let missing = format!("{PREFIX}{site}.{word}{end}");
            let present = factors.0.values().next().map_or(site, |(name, _)| &**name);
            self.reader.fault(present, TensorFault::Half { missing })
        })
    }

    fn vector(&self, stored: Stored, len: Option<usize>, what: &str) -> Result<Vec<f32>> {
        // Magnitudes of convolutions keep dimensions of one.
        let long = stored.1.shape.iter().filter(|&&dim| dim != 1).count() <= 1;
        if !long || len.is_some_and(|len| len != stored.1.values.len()) {
            let expected = len.map_or("a vector".to_owned(), |len| format!("[{len}], {what}"));
            return Err(self.reader.shape(&stored, expected));
        }
        Ok(stored.1.values)
    }

    /// `left [m, r]` and `right [r, n]` (kernels flattened) of the rank that the configuration gives.
    fn pair(&self, left: &Stored, right: &Stored, rank: Option<usize>) -> Result<()> {
        for stored in [left, right] {
            if stored.1.shape.len() < 2 {
                return Err(self.reader.shape(stored, "at least two dimensions"));
            }
        }
        if let Some(rank) = rank
            && right.1.rows() != rank
        {
            return Err(self
                .reader
                .shape(right, format!("{rank} rows, the rank in the configuration")));
        }
        if left.1.columns() != right.1.rows() {
            let expected = format!("{} columns, the rows of `{}`", right.1.rows(), right.0);
            return Err(self.reader.shape(left, expected));
        }
        Ok(())
    }

    fn lora(&self, site: &str, factors: &mut Site) -> Result<Form> {
        let (rank, scale) = self.rank_and_scale(site)?;
        let embedding = ["lora_embedding_A", "lora_embedding_B"];
        if embedding.iter().any(|word| factors.0.contains_key(word)) {
            if factors.0.contains_key("lora_magnitude_vector") {
                let reason =
                    format!("DoRA on the embedding `{site}` is not supported; merge it with PEFT");
                return Err(self.reader.wrong("use_dora", reason));
            }
            let a = self.need(site, factors, embedding[0], "")?;
            // Put back for the message of a missing half.
            factors.0.insert(embedding[0], a);
            let b = self.need(site, factors, embedding[1], "")?;
            let a = self.need(site, factors, embedding[0], "")?;
            self.pair(&b, &a, Some(rank))?;
            return Ok(Form::EmbeddingLora { a: a.1, b: b.1, scale });
        }
        let b = self.need(site, factors, "lora_B", ".weight")?;
        let Some(a) = factors.take("lora_A") else {
            let missing = format!("{PREFIX}{site}.lora_A.weight");
            return Err(self.reader.fault(&b.0, TensorFault::Half { missing }));
        };
        self.pair(&b, &a, Some(rank))?;
        let out = b.1.rows();
        let magnitude = match factors.take("lora_magnitude_vector") {
            Some(stored) => Some(self.vector(stored, Some(out), "one magnitude a row")?),
            None if self.dora => {
                let missing = format!("{PREFIX}{site}.lora_magnitude_vector");
                return Err(self.reader.fault(&b.0, TensorFault::Half { missing }));
            }
            None => None,
        };
        if magnitude.is_some() && !self.dora {
            let reason = format!("`{site}` has a magnitude, so that this is DoRA; set it to true");
            return Err(self.reader.wrong("use_dora", reason));
        }
        let bias = factors.take("lora_B.bias");
        let bias =
            bias.map(|stored| self.vector(stored, Some(out), "as B has rows")).transpose()?;
        Ok(Form::Lora { a: a.1, b: b.1, scale, magnitude, bias })
    }

    fn ia3(&self, factors: &mut Site, site: &str) -> Result<Form> {
        let stored = self.need(site, factors, "ia3_l", "")?;
        let (rows, columns) = match stored.1.shape[..] {
            [rows, columns] => (rows, columns),
            _ => {
                return Err(self
                    .reader
                    .shape(&stored, "[out, 1] or [1, in]; convolutions are not supported"));
            }
        };
        let listed = self.reader.key(self.reader.config.names("feedforward_modules"))?;
        let whole = matches!(
            self.reader.config.get("feedforward_modules"),
            Some(serde_json::Value::String(_))
        );
        // PEFT: a string is an expression for the whole name, a list holds the ends of names.
        let expression = |text: &str| Pattern::new(&format!("^(?:{text})$"));
        let forward = match (whole, listed.first()) {
            (true, Some(text)) => expression(text)
                .map_err(|reason| self.reader.wrong("feedforward_modules", reason))?
                .matches(site),
            _ => listed.iter().any(|name| site.ends_with(name)),
        };
        let side = match (rows, columns) {
            (1, 1) if forward => Side::Input,
            (_, 1) if !forward => Side::Output,
            (1, _) if forward => Side::Input,
            _ => {
                let expected = match forward {
                    true => "[1, in], since the site is in `feedforward_modules`",
                    false => "[out, 1], since the site is not in `feedforward_modules`",
                };
                return Err(self.reader.shape(&stored, expected));
            }
        };
        Ok(Form::Ia3 { factors: stored.1.values, side })
    }

    fn loha(&self, site: &str, factors: &mut Site) -> Result<Form> {
        self.refuse_tucker(factors, &["hada_t1", "hada_t2"])?;
        let (rank, scale) = self.rank_and_scale(site)?;
        let missing = ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"]
            .into_iter()
            .find(|word| !factors.0.contains_key(word));
        if let Some(word) = missing {
            self.need(site, factors, word, "")?;
        }
        let mut take = |word| self.need(site, factors, word, "");
        let (w1_a, w1_b) = (take("hada_w1_a")?, take("hada_w1_b")?);
        let (w2_a, w2_b) = (take("hada_w2_a")?, take("hada_w2_b")?);
        self.pair(&w1_a, &w1_b, Some(rank))?;
        self.pair(&w2_a, &w2_b, Some(rank))?;
        let dims = |a: &Stored, b: &Stored| (a.1.rows(), b.1.columns());
        if dims(&w1_a, &w1_b) != dims(&w2_a, &w2_b) {
            let (rows, columns) = dims(&w1_a, &w1_b);
            return Err(self
                .reader
                .shape(&w2_a, format!("{rows} rows, and {columns} columns in its partner")));
        }
        Ok(Form::Loha { w1_a: w1_a.1, w1_b: w1_b.1, w2_a: w2_a.1, w2_b: w2_b.1, scale })
    }

    fn lokr(&self, site: &str, factors: &mut Site) -> Result<Form> {
        self.refuse_tucker(factors, &["lokr_t2"])?;
        let (rank, scale) = self.rank_and_scale(site)?;
        let mut factor = |full: &'static str, a: &'static str, b: &'static str| {
            if let Some(stored) = factors.take(full) {
                return match stored.1.shape.len() {
                    2 => Ok(Factor::Full(stored.1)),
                    _ => {
                        Err(self.reader.shape(&stored, "a matrix; convolutions are not supported"))
                    }
                };
            }
            let left = self.need(site, factors, a, "")?;
            let Some(right) = factors.take(b) else {
                let missing = format!("{PREFIX}{site}.{b}");
                return Err(self.reader.fault(&left.0, TensorFault::Half { missing }));
            };
            self.pair(&left, &right, Some(rank))?;
            Ok(Factor::LowRank(left.1, right.1))
        };
        let w1 = factor("lokr_w1", "lokr_w1_a", "lokr_w1_b")?;
        let w2 = factor("lokr_w2", "lokr_w2_a", "lokr_w2_b")?;
        Ok(Form::Lokr { w1, w2, scale })
    }

    /// Tucker factors of convolutions are another product.
    fn refuse_tucker(&self, factors: &Site, words: &[&str]) -> Result<()> {
        match words.iter().find_map(|word| factors.0.get(*word)) {
            None => Ok(()),
            Some((name, _)) => {
                let reason =
                    "Tucker factors of a convolution (`use_effective_conv2d`) are not supported; \
                              merge the adapter with PEFT"
                        .to_owned();
                Err(self.reader.fault(name, TensorFault::Other(reason)))
            }
        }
    }

    fn norm(&self, site: &str, factors: &mut Site) -> Result<Form> {
        let weight = self.need(site, factors, "ln_tuning_layers", ".weight")?;
        let weight = self.vector(weight, None, "")?;
        let bias = factors.take("ln_tuning_layers.bias");
        let bias =
            bias.map(|bias| self.vector(bias, Some(weight.len()), "as the scale")).transpose()?;
        Ok(Form::LayerNorm { weight, bias })
    }

    /// What the configuration says of one place.
    fn entry(&self, site: &str) -> Result<&serde_json::Map<String, serde_json::Value>> {
        let entry = self.reader.config.get("adapters").and_then(|map| map.get(site));
        entry.and_then(|entry| entry.as_object()).ok_or_else(|| {
            let reason = format!("`{site}`: expected an object for this site");
            self.reader.wrong("adapters", reason)
        })
    }

    fn scale(&self, site: &str) -> Result<f32> {
        let scale = self.entry(site)?.get("scale").and_then(|value| value.as_f64());
        scale.filter(|scale| scale.is_finite()).map(|scale| scale as f32).ok_or_else(|| {
            self.reader.wrong("adapters", format!("`{site}`: `scale` must be a number"))
        })
    }

    fn heads(&self, site: &str, factors: &mut Site) -> Result<Form> {
        let (_, keys) = self.need(site, factors, "adapter_keys", "")?;
        let (name, values) = self.need(site, factors, "adapter_values", "")?;
        if keys.shape.len() != 3 || keys.shape != values.shape {
            let expected =
                format!("[heads, channels, head_dim] in both, the keys are {:?}", keys.shape);
            return Err(self.reader.shape(&(name, values), expected));
        }
        // Earlier files do not say it: there was one.
        let activation = match self.entry(site)?.get("activation").map(|value| value.as_str()) {
            None => "relu",
            Some(Some(name @ ("relu" | "softmax"))) => name,
            Some(_) => {
                let reason =
                    format!("`{site}`: `activation` must be relu or softmax at a per-head adapter");
                return Err(self.reader.wrong("adapters", reason));
            }
        };
        Ok(Form::Heads {
            keys,
            values,
            scale: self.scale(site)?,
            activation: activation.to_owned(),
        })
    }

    fn bottleneck(&self, site: &str, factors: &mut Site) -> Result<Form> {
        if ["adapter_keys", "adapter_values"].iter().any(|word| factors.0.contains_key(word)) {
            return self.heads(site, factors);
        }
        let missing = ["adapter_down", "adapter_down.bias", "adapter_up", "adapter_up.bias"]
            .into_iter()
            .find(|word| !factors.0.contains_key(word));
        if let Some(word) = missing {
            self.need(site, factors, word, if word.ends_with("bias") { "" } else { ".weight" })?;
        }
        let mut take = |word| self.need(site, factors, word, "");
        let (down, down_bias) = (take("adapter_down")?, take("adapter_down.bias")?);
        let (up, up_bias) = (take("adapter_up")?, take("adapter_up.bias")?);
        self.pair(&up, &down, None)?;
        let down_bias = self.vector(down_bias, Some(down.1.rows()), "the bottleneck")?;
        let up_bias = self.vector(up_bias, Some(up.1.rows()), "as the up projection has rows")?;
        let wrong = |reason: String| self.reader.wrong("adapters", format!("`{site}`: {reason}"));
        let entry = self.entry(site)?;
        let text = |key: &str, known: &[&str]| {
            let found = entry.get(key).and_then(|value| value.as_str());
            let fits = |text: &&str| known.contains(text);
            found.filter(fits).ok_or_else(|| wrong(format!("`{key}` must be one of {known:?}")))
        };
        let sequential = text("form", &["parallel", "sequential"])? == "sequential";
        let position = text("position", &["heads", "attention", "ffn"])?.to_owned();
        let activation = entry.get("activation").and_then(|value| value.as_str());
        let activation =
            activation.ok_or_else(|| wrong("`activation` must be a name".to_owned()))?;
        Ok(Form::Bottleneck {
            down: down.1,
            down_bias,
            up: up.1,
            up_bias,
            scale: self.scale(site)?,
            activation: activation.to_owned(),
            sequential,
            position,
        })
    }
}
