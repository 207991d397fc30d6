//! The papers that make refit's scope.

/// A paper that refit's scope is made of.
#[derive(Clone, Copy, Debug)]
pub struct ScopePaper {
    /// The name of its method, as it is or will be registered.
    pub name: &'static str,
    /// The cell in which it stands until a method of that name is registered, whose own path then counts.
    pub path: &'static [&'static str],
    /// Verbs that carry it out, where it is a study of practice and no method.
    pub verbs: &'static [&'static str],
}

const fn paper(name: &'static str, path: &'static [&'static str]) -> ScopePaper {
    ScopePaper { name, path, verbs: &[] }
}

const fn study(name: &'static str, verbs: &'static [&'static str]) -> ScopePaper {
    ScopePaper { name, path: &["reuse", "practice"], verbs }
}

const WEIGHT_ONLY: &[&str] = &["quantization", "post-training", "weight-only"];
const WITH_ACTIVATIONS: &[&str] = &["quantization", "post-training", "weights and activations"];
const UNSTRUCTURED: &[&str] = &["pruning", "unstructured"];
const STRUCTURED: &[&str] = &["pruning", "structured"];
const ATTENTION: &[&str] = &["compact-architecture", "attention"];
const SEARCH: &[&str] = &["compact-architecture", "search"];
const MERGING: &[&str] = &["reuse", "merging"];
const CONTINUAL: &[&str] = &["reuse", "continual learning"];
const UNLEARNING: &[&str] = &["reuse", "unlearning"];
const SECURITY: &[&str] = &["reuse", "security"];
const CONVERSION: &[&str] = &["reuse", "architecture conversion"];
const PRETRAINING: &[&str] = &["reuse", "pretraining"];

/// Every paper of the scope, once: those that the survey's taxonomy has a cell for, then the others.
pub const SCOPE: &[ScopePaper] = &[
    // The survey's axis.
    paper("lorc", WEIGHT_ONLY),
    paper("finequant", WEIGHT_ONLY),
    paper("shiftaddllm", WEIGHT_ONLY),
    paper("repquant", WITH_ACTIVATIONS),
    paper("bct", WITH_ACTIVATIONS),
    paper("llm-qfa", &["quantization", "training-aware"]),
    paper("dsnot", UNSTRUCTURED),
    paper("spdf", UNSTRUCTURED),
    paper("sms", UNSTRUCTURED),
    paper("perp", UNSTRUCTURED),
    paper("ast", &["pruning", "semi-structured"]),
    paper("pat", STRUCTURED),
    paper("minitron", STRUCTURED),
    paper("optin", STRUCTURED),
    paper("paser", &["pruning", "recovery data"]),
    paper("pela", &["compact-architecture", "low-rank"]),
    paper("trans-lora", &["distillation", "black-box"]),
    paper("wrap", &["distillation", "black-box"]),
    paper("liger", ATTENTION),
    paper("s4", ATTENTION),
    paper("lssar", ATTENTION),
    paper("sltrain", &["compact-architecture", "low-rank"]),
    paper("bignas", SEARCH),
    paper("sortednet", SEARCH),
    paper("todm", SEARCH),
    paper("sn-net", SEARCH),
    paper("emov2", SEARCH),
    paper("read-me", &["dynamic-networks", "mixture of experts"]),
    paper("m2r2", &["dynamic-networks", "early exit"]),
    paper("pyra", &["dynamic-networks", "token reduction"]),
    paper("ladder-residual", &["acceleration", "communication"]),
    // The axis of reuse.
    paper("compeft", &["reuse", "update compression"]),
    paper("d2nwg", &["reuse", "weight generation"]),
    paper("data-ablation", MERGING),
    paper("dynamic-logit-fusion", &["reuse", "ensembling"]),
    paper("ewa", MERGING),
    paper("model-assembling", MERGING),
    paper("model-soups", MERGING),
    paper("opcm", MERGING),
    paper("points", MERGING),
    paper("rws", MERGING),
    paper("hft", &["adaptation", "partial"]),
    paper("loki", &["adaptation", "outputs"]),
    paper("unified-peft", &["adaptation", "parameter-efficient"]),
    paper("weight-compander", &["adaptation", "regularization"]),
    paper("cl-code-ood", CONTINUAL),
    paper("clr", CONTINUAL),
    paper("cmt", CONTINUAL),
    paper("contracon", CONTINUAL),
    paper("dkvb", CONTINUAL),
    paper("gen-vs-disc", CONTINUAL),
    paper("mos", CONTINUAL),
    paper("nmc", CONTINUAL),
    paper("reloop2", CONTINUAL),
    paper("slm", CONTINUAL),
    paper("bt2", &["reuse", "compatible embeddings"]),
    paper("oca", &["reuse", "compatible embeddings"]),
    paper("concept-unlearn", UNLEARNING),
    paper("concept-vectors", UNLEARNING),
    paper("s3t", UNLEARNING),
    paper("talking-heads", &["reuse", "interpretation"]),
    paper("solo", CONVERSION),
    paper("swin-v2", CONVERSION),
    paper("codegen2", PRETRAINING),
    paper("continual-pretrain", PRETRAINING),
    paper("galore", &["adaptation", "full"]),
    paper("itool", &["reuse", "tool use"]),
    paper("loss-reweight", PRETRAINING),
    paper("multilevel", PRETRAINING),
    paper("repeat-crisis", PRETRAINING),
    paper("repeated-data", PRETRAINING),
    paper("rewarm", PRETRAINING),
    paper("vega-mt", PRETRAINING),
    paper("first-rerank", &["reuse", "ranking"]),
    paper("cabage", SECURITY),
    paper("cetad", SECURITY),
    paper("robust-teacher", SECURITY),
    study("compression-survey", &["map", "advise"]),
    study("model-reengineering", &["inspect", "compare", "explain"]),
    study("model-reuse", &["card", "lineage", "scan", "explain"]),
];
