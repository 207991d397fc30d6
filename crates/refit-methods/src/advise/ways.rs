//! How each method is told which grid to use.

use serde_json::{Map, Value, json};

use super::files::{File, Files};
use crate::error::Result;
use crate::quantize::export::Target;
use crate::registry::Entry;
use crate::rewrite::OutputType;

/// How a quantizer is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// One grid for all matrices.
    Uniform(Zero),
    /// Bits, and a mean that groups of several sizes keep to.
    Mean(Zero),
    /// One grid for all matrices, and a product of low rank beside each.
    Compensated(Zero),
    /// A size; the method finds the grids.
    Sized,
    /// 8 bits per row, and as many for activations; parameters of both.
    Activations {
        /// The parameter of the weights.
        weights: &'static str,
        /// That of the activations.
        activations: &'static str,
        /// Whether there is no zero point.
        symmetric: bool,
    },
    /// No file of its own: why.
    Nowhere(&'static str),
}

/// How zero points are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zero {
    /// With `asymmetric`.
    Asked,
    /// They are there unless `symmetric` is given.
    Declined,
    /// They are always there.
    Always,
}

impl Way {
    /// The way of a quantizer; `None` for one whose parameters say nothing of a grid. What is special is told here, the rest
    /// follows from the names of the parameters.
    pub fn of(entry: &Entry) -> Option<Self> {
        let schema = entry.schema();
        let has = |parameter: &str| !schema["properties"][parameter].is_null();
        let zero = match (has("asymmetric"), has("symmetric")) {
            (true, _) => Zero::Asked,
            (_, true) => Zero::Declined,
            _ => Zero::Always,
        };
        match entry.info.name {
            "smoothquant" => Some(Self::Activations {
                weights: "bits",
                activations: "activation_bits",
                symmetric: true,
            }),
            "repquant" => Some(Self::Activations {
                weights: "w_bits",
                activations: "a_bits",
                symmetric: false,
            }),
            "shiftaddllm" => Some(Self::Nowhere(
                "its packed form holds the matrices only and lies beside decoded weights: no format that refit exports has its \
                 codebook, so nothing shrinks on disk",
            )),
            _ if has("target") && has("bpw") => Some(Self::Sized),
            _ if has("bits") && has("target_bpw") => Some(Self::Mean(zero)),
            _ if has("bits") && has("group") && has("rank") => Some(Self::Compensated(zero)),
            _ if has("bits") && has("group") => Some(Self::Uniform(zero)),
            _ => None,
        }
    }

    /// Whether the method can make a file.
    pub fn makes(self, file: &File) -> bool {
        let zero = match self {
            Self::Uniform(zero) | Self::Compensated(zero) => zero,
            // One group size for a model undoes what several were chosen for.
            Self::Mean(_) if file.export.to == Target::Gptq => return false,
            Self::Mean(zero) => zero,
            _ => return false,
        };
        zero != Zero::Always || !file.uniform.symmetric
    }

    /// The parameters that make a file.
    ///
    /// # Errors
    /// None: the grids of files divide every row.
    pub fn parameters(self, file: &File, files: &Files) -> Result<Map<String, Value>> {
        let mut parameters = Map::new();
        let mut set = |key: &str, value: Value| drop(parameters.insert(key.to_owned(), value));
        set("bits", json!(file.uniform.bits));
        let zero = match self {
            Self::Mean(zero) => {
                set("target_bpw", json!(files.counted_bits(file.uniform)?));
                Some(zero)
            }
            Self::Uniform(zero) | Self::Compensated(zero) => {
                set("group", json!(file.uniform.group));
                Some(zero)
            }
            _ => None,
        };
        match (zero, file.uniform.symmetric) {
            (Some(Zero::Asked), false) => set("asymmetric", json!(true)),
            (Some(Zero::Declined), true) => set("symmetric", json!(true)),
            _ => {}
        }
        if file.dtype != OutputType::Auto {
            set("dtype", json!(file.dtype));
        }
        Ok(parameters)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::method::Family;
    use crate::registry;

    #[test]
    fn every_post_training_quantizer_can_be_told() {
        for entry in registry::all() {
            let path = entry.info.taxonomy.path;
            if path.starts_with(&["quantization", "post-training"]) {
                assert_eq!(entry.info.family, Family::Quantize);
                assert!(Way::of(entry).is_some(), "{}", entry.info.name);
            }
        }
    }

    #[test]
    fn ways_follow_from_the_parameters() {
        let way = |name: &str| Way::of(registry::get(name).unwrap());
        assert_eq!(way("gptq"), Some(Way::Uniform(Zero::Asked)));
        assert_eq!(way("awq"), Some(Way::Uniform(Zero::Declined)));
        assert_eq!(way("hqq"), Some(Way::Uniform(Zero::Always)));
        assert_eq!(way("finequant"), Some(Way::Mean(Zero::Asked)));
        assert_eq!(way("fit"), Some(Way::Sized));
        assert_eq!(way("lorc"), Some(Way::Compensated(Zero::Asked)));
        assert_eq!(way("lora"), None);
    }
}
