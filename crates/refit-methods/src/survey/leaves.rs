//! The leaves of the survey's taxonomy.

/// A leaf that a compression tool should have something in.
#[derive(Clone, Copy, Debug)]
pub struct Leaf {
    /// From the general to the particular; methods whose path begins so stand here, unless a longer leaf takes them.
    pub path: &'static [&'static str],
    /// What belongs here, in a few words.
    pub about: &'static str,
    /// Methods of other cells that do this, too, by a parameter.
    pub offered: Option<Offer>,
    /// Why nothing stands here, where no method does and no paper of the scope will.
    pub gap: Option<&'static str>,
}

/// A parameter that takes methods into a cell.
#[derive(Clone, Copy, Debug)]
pub struct Offer {
    /// The cell of the methods.
    pub within: &'static [&'static str],
    /// The parameter.
    pub parameter: &'static str,
    /// A value of it, as it is typed.
    pub value: &'static str,
}

const fn leaf(path: &'static [&'static str], about: &'static str) -> Leaf {
    Leaf { path, about, offered: None, gap: None }
}

/// The families, which are the first steps of the leaves' paths.
pub const FAMILIES: &[&str] = &[
    "quantization",
    "pruning",
    "distillation",
    "compact-architecture",
    "dynamic-networks",
    "acceleration",
];

/// Every leaf, family by family.
pub const LEAVES: &[Leaf] = &[
    Leaf {
        offered: Some(Offer { within: &["quantization"], parameter: "group", value: "row" }),
        ..leaf(
            &["quantization", "basics"],
            "uniform grids with or without zero points, a scale for a row or for a group",
        )
    },
    leaf(&["quantization", "post-training", "weight-only"], "weights in a few bits, no training"),
    leaf(
        &["quantization", "post-training", "weights and activations"],
        "weights and activations in a few bits, no training",
    ),
    leaf(
        &["quantization", "training-aware"],
        "training that knows of the rounding, and adapters on quantized weights",
    ),
    Leaf {
        gap: Some(
            "the decoding cache is kept in 32-bit floats; codes of 8 or 4 bits per token are the standard to add",
        ),
        ..leaf(&["quantization", "cache"], "the decoding cache in a few bits")
    },
    leaf(&["pruning", "unstructured"], "single weights become zero"),
    Leaf {
        offered: Some(Offer { within: &["pruning"], parameter: "pattern", value: "2:4" }),
        ..leaf(&["pruning", "semi-structured"], "N of every M weights become zero")
    },
    leaf(&["pruning", "structured"], "heads, channels or blocks go"),
    leaf(&["pruning", "recovery data"], "which data a pruned model recovers on"),
    Leaf {
        gap: Some(
            "no method that only distils: those that learn from a teacher's logits or features factorize or prune before, and \
             stand there (pela, minitron)",
        ),
        ..leaf(&["distillation", "white-box"], "learning from a teacher's logits or features")
    },
    leaf(&["distillation", "black-box"], "learning from what a teacher writes"),
    leaf(
        &["compact-architecture", "attention"],
        "attention that costs less than the square of the length",
    ),
    leaf(&["compact-architecture", "low-rank"], "shared parameters and products of thin matrices"),
    leaf(&["compact-architecture", "search"], "one training for networks of many sizes"),
    leaf(&["dynamic-networks", "mixture of experts"], "experts made, routed to and served"),
    leaf(&["dynamic-networks", "early exit"], "fewer layers for easy tokens"),
    leaf(&["dynamic-networks", "token reduction"], "fewer tokens"),
    Leaf {
        gap: Some(
            "no method of its own: weight-only quantizers take the matrices of experts like any others, and none knows how \
             often an expert is used",
        ),
        ..leaf(&["dynamic-networks", "compressed experts"], "quantizing or pruning by expert")
    },
    leaf(&["acceleration", "formats"], "files for the engines that serve models"),
    leaf(
        &["acceleration", "communication"],
        "work that goes on while devices exchange activations",
    ),
];
