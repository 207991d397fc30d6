//! What a recipe may say, and what is said of one that is wrong.

use super::*;

fn read(text: &str) -> Result<Config> {
    parse(Path::new("their.yaml"), text, false)
}

fn error(text: &str) -> String {
    read(text).unwrap_err().to_string()
}

const TIES: &str = "merge_method: ties\nbase_model: base\nmodels:\n  - model: a\n    parameters: {weight: 0.5, density: [1, 0.5]}\n  - model: b\n    parameters: {weight: 1}\nparameters: {normalize: true, int8_mask: true}\ndtype: bfloat16\n";

#[test]
fn a_recipe_is_told_from_refits_own() {
    assert!(is_mergekit(TIES));
    assert!(is_mergekit("merge_method: [\n"));
    assert!(is_mergekit("slices:\n  - sources: []\n"));
    assert!(!is_mergekit("name: x\nsteps: []\n"));
    assert!(!is_mergekit("- 1\n"));
}

#[test]
fn models_are_listed_once_and_the_base_first() {
    let config = read(TIES).unwrap();
    assert_eq!(config.models(), ["base", "a", "b"]);
    assert_eq!(config.dtype, Some(DType::BF16));
    assert!(config.whole && config.warnings.is_empty());
    let revision = TIES.replace("model: a", "model: {model: {path: o/a, revision: v2}}");
    assert_eq!(read(&revision).unwrap().models()[1], "o/a@v2");
}

#[test]
fn unknown_names_get_the_nearest() {
    let swap = |from: &str, to: &str| error(&TIES.replace(from, to));
    assert!(swap("merge_method: ties", "merge_method: tise").contains("did you mean `ties`"));
    assert!(
        swap("merge_method: ties", "merge_method: dare-tis").contains("did you mean `dare_ties`")
    );
    assert!(swap("density", "densty").contains("did you mean `density`"));
    assert!(swap("base_model", "base_modle").contains("did you mean `base_model`"));
    assert!(swap("bfloat16", "bflot16").contains("did you mean `bfloat16`"));
    assert!(swap("- model: b", "- modle: b").contains("did you mean `model`"));
    // A parameter of another method is no mistake worth stopping for.
    let config = read(&TIES.replace("normalize: true", "t: 0.5")).unwrap();
    assert!(config.warnings[0].contains("`t` has no effect on ties"), "{:?}", config.warnings);
    let lenient = parse(Path::new("x"), &TIES.replace("density", "densty"), true).unwrap();
    assert!(lenient.warnings[0].contains("densty"));
}

#[test]
fn what_is_not_read_is_refused_in_words() {
    assert!(error("merge_method: linear\nexperts: []\nmodels: []\n").contains("mergekit-moe"));
    assert!(error("merge_method: linear\nmodules: {a: {models: []}}\n").contains("not read yet"));
    assert!(error("merge_method: linear\n").contains("exactly one of"));
    assert!(error("models: [{model: a}]\n").contains("merge_method"));
    assert!(error(&TIES.replace("model: a", "model: a+lora")).contains("merge-adapter"));
    let slices = |range: &str| {
        error(&format!("merge_method: passthrough\nslices:\n  - sources: [{{model: a{range}}}]\n"))
    };
    assert!(slices("").contains("layer_range"));
    assert!(slices(", layer_range: [4, 2]").contains("above FROM"));
    assert!(error("a: 1\na: 2\nmerge_method: x\n").contains("malformed YAML"));
}
