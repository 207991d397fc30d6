//! The axes of the design space, the presets as points on them, and which points can be run.

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

use super::{Preset, UnifiedPeft};
use crate::error::{Error, Result};
use crate::method::Method;

const NAME: &str = UnifiedPeft::INFO.name;

/// Declares an axis: its values as they are typed, with what they mean.
macro_rules! axis {
    ($(#[$about:meta])* $axis:ident { $($(#[$meaning:meta])* $value:ident = $name:literal $(| $alias:literal)?),+ $(,)? }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema)]
        pub enum $axis {
            $($(#[$meaning])* #[value(name = $name $(, alias = $alias)?)] #[serde(rename = $name $(, alias = $alias)?)] $value),+
        }

        impl $axis {
            /// As it is typed.
            pub fn name(self) -> &'static str {
                match self { $(Self::$value => $name),+ }
            }
        }
    };
}

axis! {
    /// Which hidden state is changed.
    Site {
        /// Every attention head by itself, before the output projection.
        PerHead = "per-head",
        /// The heads together, before the output projection.
        Heads = "heads",
        /// The output of attention.
        Attention = "attention",
        /// The output of the ffn.
        Ffn = "ffn",
    }
}

axis! {
    /// What the change is computed from.
    Form {
        /// What the part of the block at this site reads.
        Parallel = "parallel",
        /// The hidden state that is changed.
        Sequential = "sequential",
    }
}

axis! {
    /// Nonlinearity between the two maps of the change.
    Function {
        /// max(x, 0).
        Relu = "relu",
        /// x Φ(x).
        Gelu = "gelu",
        /// x σ(x).
        Silu = "silu",
        /// None: a low-rank map, as LoRA's.
        Linear = "linear" | "identity",
        /// Over the channels: attention to learned keys, as a prefix's.
        Softmax = "softmax",
    }
}

axis! {
    /// How the change `Δh` joins the hidden state `h`.
    Composition {
        /// h + Δh.
        Add = "add",
        /// h + s Δh.
        Scaled = "scaled",
        /// (1 - λ) h + λ Δh, λ the attention that the learned keys get beside the text's own: prefix tuning.
        Gated = "gated",
    }
}

/// An adapter at one site: a value on every axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which hidden state.
    pub site: Site,
    /// Computed from what.
    pub form: Form,
    /// By which function.
    pub function: Function,
    /// Joined how.
    pub composition: Composition,
}

const PREFIX: Place = Place {
    site: Site::PerHead,
    form: Form::Parallel,
    function: Function::Softmax,
    composition: Composition::Gated,
};

const fn parallel(site: Site, composition: Composition) -> Place {
    Place { site, form: Form::Parallel, function: Function::Relu, composition }
}

const fn sequential(site: Site) -> Place {
    Place { form: Form::Sequential, ..parallel(site, Composition::Add) }
}

impl Preset {
    /// The preset on the axes. A prompt is no point on them: it adds tokens and changes no hidden state itself.
    pub fn places(self) -> &'static [Place] {
        const ADD: Composition = Composition::Add;
        const SCALED: Composition = Composition::Scaled;
        match self {
            Self::Mam => &const { [PREFIX, parallel(Site::Ffn, SCALED)] },
            Self::Houlsby => &const { [sequential(Site::Attention), sequential(Site::Ffn)] },
            Self::Pfeiffer => &const { [sequential(Site::Ffn)] },
            Self::PaAttn => &const { [parallel(Site::Heads, ADD)] },
            Self::PaFfn => &const { [parallel(Site::Ffn, ADD)] },
            Self::ScaledPaFfn => &const { [parallel(Site::Ffn, SCALED)] },
            Self::MhPa => &const { [parallel(Site::PerHead, ADD)] },
            Self::Prefix => &const { [PREFIX] },
            Self::Prompt => &[],
        }
    }
}

/// What was said explicitly; an empty list leaves the axis to the preset.
#[derive(Clone, Copy, Debug, Default)]
pub struct Axes<'a> {
    /// Sites.
    pub site: &'a [Site],
    /// Forms: one for all sites, or one for each.
    pub form: &'a [Form],
    /// Functions, as above.
    pub function: &'a [Function],
    /// Compositions, as above.
    pub composition: &'a [Composition],
}

impl Axes<'_> {
    fn is_empty(&self) -> bool {
        let Self { site, form, function, composition } = self;
        site.is_empty() && form.is_empty() && function.is_empty() && composition.is_empty()
    }

    /// The places of a design: the preset's, with what was said explicitly in place of it.
    ///
    /// # Errors
    /// Lists of other lengths, and points that cannot be run, with those that can.
    pub fn over(&self, preset: Preset) -> Result<Vec<Place>> {
        if preset == Preset::Prompt && !self.is_empty() {
            return Err(Error::Conflict {
                method: NAME,
                problem: "`prompt` puts tokens before the text and changes no hidden state itself, so that it has no site, form, \
                          function or composition; leave them out or take another preset"
                    .into(),
            });
        }
        let of_preset = preset.places();
        let mut places: Vec<Place> = match self.site {
            [] => of_preset.to_vec(),
            sites => {
                let find = |site: &Site| of_preset.iter().find(|place| place.site == *site);
                let default = |site: &Site| parallel(*site, Composition::Add);
                sites
                    .iter()
                    .map(|site| find(site).copied().unwrap_or_else(|| default(site)))
                    .collect()
            }
        };
        spread("form", self.form, Form::name, &mut places, |place, form| place.form = form)?;
        spread("function", self.function, Function::name, &mut places, |place, function| {
            place.function = function;
        })?;
        spread("composition", self.composition, Composition::name, &mut places, |place, how| {
            place.composition = how;
        })?;
        places.iter().try_for_each(Place::check)?;
        together(&places)?;
        Ok(places)
    }
}

/// Sets one axis. A single value is for every site; a prefix beside other sites keeps its own, which is the only one that it has.
fn spread<T: Copy>(
    axis: &'static str,
    values: &[T],
    name: fn(T) -> &'static str,
    places: &mut [Place],
    set: impl Fn(&mut Place, T),
) -> Result<()> {
    match values {
        [] => {}
        [one] => {
            let alone = places.len() == 1;
            places
                .iter_mut()
                .filter(|place| alone || **place != PREFIX)
                .for_each(|place| set(place, *one));
        }
        each if each.len() == places.len() => {
            places.iter_mut().zip(each).for_each(|(place, value)| set(place, *value));
        }
        other => {
            let given: Vec<&str> = other.iter().map(|value| name(*value)).collect();
            let sites: Vec<&str> = places.iter().map(|place| place.site.name()).collect();
            let expected = format!(
                "one value for all sites, or one for each of {} ({})",
                sites.len(),
                sites.join(", ")
            );
            return Err(Error::range(NAME, axis, given.join(","), expected));
        }
    }
    Ok(())
}

impl Place {
    /// True for keys and values of virtual tokens.
    pub fn is_prefix(&self) -> bool {
        self.composition == Composition::Gated
    }

    /// Whether the point can be run.
    fn check(&self) -> Result<()> {
        let Self { site, form, function, composition } = *self;
        let fail =
            |axis, value: &str, expected: String| Err(Error::range(NAME, axis, value, expected));
        let at = site.name();
        if site == Site::PerHead {
            if form != Form::Parallel {
                let expected =
                    format!("an adapter at `{at}` reads its head's query, which is `parallel`");
                return fail("form", form.name(), expected);
            }
            let legal = if composition == Composition::Gated { "softmax" } else { "relu, softmax" };
            if !legal.split(", ").any(|name| name == function.name()) {
                let expected = format!("`{at}` joined by `{}` has {legal}", composition.name());
                return fail("function", function.name(), expected);
            }
            return Ok(());
        }
        if composition == Composition::Gated {
            let expected =
                format!("add or scaled at `{at}`; only `per-head` with softmax has a gate");
            return fail("composition", composition.name(), expected);
        }
        if function == Function::Softmax {
            let expected = format!(
                "relu, gelu, silu or linear at `{at}`; only `per-head` attends to learned keys"
            );
            return fail("function", function.name(), expected);
        }
        Ok(())
    }
}

/// What one block can hold at once, and one file.
fn together(places: &[Place]) -> Result<()> {
    for (i, place) in places.iter().enumerate() {
        if places[..i].iter().any(|other| other.site == place.site) {
            return Err(Error::range(NAME, "site", place.site.name(), "each site once"));
        }
    }
    let at_attention: Vec<&str> = places
        .iter()
        .filter(|place| place.site != Site::Ffn && !place.is_prefix())
        .map(|place| place.site.name())
        .collect();
    match at_attention.len() {
        0 | 1 => Ok(()),
        _ => Err(Error::range(
            NAME,
            "site",
            at_attention.join(","),
            "one adapter is written for each attention: heads, attention or per-head (per-head with `--composition gated` is a \
             prefix and may stand beside one of them)",
        )),
    }
}

/// Reads a value or a list of them.
pub fn one_or_many<'de, D: Deserializer<'de>, T: serde::de::DeserializeOwned>(
    deserializer: D,
) -> Result<Vec<T>, D::Error> {
    let list = match serde_json::Value::deserialize(deserializer)? {
        serde_json::Value::Null => Vec::new(),
        serde_json::Value::Array(list) => list,
        one => vec![one],
    };
    let read = |value| serde_json::from_value(value).map_err(serde::de::Error::custom);
    list.into_iter().map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refuse(preset: Preset, axes: Axes, parts: &[&str]) {
        let error = axes.over(preset).unwrap_err().to_string();
        for part in parts {
            assert!(error.contains(part), "`{error}` should contain `{part}`");
        }
    }

    #[test]
    fn a_preset_is_a_point_that_can_be_spelt_out() {
        let mam = Axes {
            site: &[Site::PerHead, Site::Ffn],
            form: &[Form::Parallel],
            function: &[Function::Softmax, Function::Relu],
            composition: &[Composition::Gated, Composition::Scaled],
        };
        // From any preset: nothing is left of it.
        for preset in [Preset::Mam, Preset::Houlsby, Preset::MhPa] {
            assert_eq!(mam.over(preset).unwrap(), Preset::Mam.places(), "{preset:?}");
        }
        let houlsby = Axes {
            site: &[Site::Attention, Site::Ffn],
            form: &[Form::Sequential],
            function: &[Function::Relu],
            composition: &[Composition::Add],
        };
        assert_eq!(houlsby.over(Preset::Mam).unwrap(), Preset::Houlsby.places());
        for preset in [Preset::Mam, Preset::Pfeiffer, Preset::PaAttn, Preset::MhPa, Preset::Prefix]
        {
            assert_eq!(Axes::default().over(preset).unwrap(), preset.places());
            preset.places().iter().for_each(|place| place.check().unwrap());
        }
    }

    #[test]
    fn what_is_not_said_stays_as_the_preset_has_it() {
        let gelu = Axes { function: &[Function::Gelu], ..Axes::default() };
        let places = gelu.over(Preset::Mam).unwrap();
        assert_eq!(places[0], PREFIX, "a prefix has one function");
        assert_eq!(places[1].function, Function::Gelu);
        assert_eq!(places[1].composition, Composition::Scaled);
        let moved =
            Axes { site: &[Site::Heads], ..Axes::default() }.over(Preset::ScaledPaFfn).unwrap();
        assert_eq!(moved, [parallel(Site::Heads, Composition::Add)]);
        let kept = Axes { site: &[Site::Ffn], ..Axes::default() }.over(Preset::Houlsby).unwrap();
        assert_eq!(kept, [sequential(Site::Ffn)]);
        // The ungated prefix term: what the paper's section 3.3 takes apart.
        let ungated = Axes { composition: &[Composition::Add], ..Axes::default() };
        assert_eq!(ungated.over(Preset::Prefix).unwrap()[0].function, Function::Softmax);
    }

    #[test]
    fn points_that_cannot_be_run_name_those_that_can() {
        let none = Axes::default();
        let gated = &[Composition::Gated][..];
        refuse(
            Preset::PaFfn,
            Axes { composition: gated, ..none },
            &["add or scaled", "`ffn`", "per-head"],
        );
        refuse(Preset::MhPa, Axes { composition: gated, ..none }, &["function = relu", "softmax"]);
        refuse(Preset::MhPa, Axes { function: &[Function::Gelu], ..none }, &["relu, softmax"]);
        refuse(Preset::MhPa, Axes { form: &[Form::Sequential], ..none }, &["parallel", "query"]);
        refuse(
            Preset::PaAttn,
            Axes { function: &[Function::Softmax], ..none },
            &["gelu", "`heads`"],
        );
        refuse(Preset::Prompt, Axes { site: &[Site::Ffn], ..none }, &["`prompt`", "no site"]);
        refuse(Preset::Mam, Axes { site: &[Site::Ffn, Site::Ffn], ..none }, &["once"]);
        refuse(
            Preset::PaFfn,
            Axes { site: &[Site::Heads, Site::Attention], ..none },
            &["heads,attention", "one adapter", "gated"],
        );
        refuse(
            Preset::Houlsby,
            Axes { function: &[Function::Relu, Function::Gelu, Function::Silu], ..none },
            &["relu,gelu,silu", "each of 2", "attention, ffn"],
        );
        // A prefix stands beside them.
        let both = Axes { site: &[Site::PerHead, Site::Heads, Site::Ffn], ..none };
        assert_eq!(both.over(Preset::Mam).unwrap().len(), 3);
    }
}
