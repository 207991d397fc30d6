//! Two processes over MPI on this machine: they write what one would, and end together. Run by `scripts/mpi.sh`, which installs
//! Open MPI where it can.

#![cfg(all(feature = "mpi", unix))]

mod common;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{Place, Ran, contents};
use refit_store::Artifact;

/// Largest difference of a value of the adapter from what one process writes, after 6 updates at a rate of 1e-3: a fiftieth of
/// what one update moves it. Sums of f32 in another order differ in their last bits, and Adam makes steps of the same size of
/// small gradients. Values of `A` are up to 0.07, those of `B` up to 0.004.
const CLOSE: f32 = 2e-5;

/// Three rows a batch, so that one process has two of them and the other one; examples have different lengths.
const TRAIN: &[&str] = &[
    "apply",
    "lora",
    "builtin:tiny",
    "--data",
    "lesson.jsonl",
    "--steps",
    "6",
    "--batch",
    "3",
    "--accumulate",
    "2",
    "--rank",
    "4",
    "--clip",
    "0.5",
    "--learning-rate",
    "1e-3",
    "--checkpoint-every",
    "2",
];

fn place() -> Place {
    let place = Place::new();
    let rows: String = (0..24)
        .map(|i| {
            let completion = "and the tide came in again ".repeat(1 + i % 5);
            format!("{{\"prompt\": \"On day {i} the keeper wrote:\", \"completion\": \"{completion}\"}}\n")
        })
        .collect();
    place.write("lesson.jsonl", rows);
    place
}

/// `mpirun` with one process per command, each a shell script in which `$REFIT` is the binary.
fn launch(place: &Place, scripts: &[&str]) -> Command {
    let like = place.command();
    let mut command = Command::new("mpirun");
    command.current_dir(place.path("")).args(["--allow-run-as-root", "--oversubscribe"]);
    for (key, value) in like.get_envs() {
        match value {
            Some(value) => command.env(key, value),
            None => command.env_remove(key),
        };
    }
    // A container may forbid one process to read another's memory; Open MPI then warns and copies.
    command.env("OMPI_MCA_btl_vader_single_copy_mechanism", "none");
    command.env("REFIT", env!("CARGO_BIN_EXE_refit"));
    for (i, script) in scripts.iter().enumerate() {
        if i > 0 {
            command.arg(":");
        }
        command.args(["-n", "1", "sh", "-c", script]);
    }
    command
}

/// What two processes that run `"$REFIT" ARGUMENTS` end with; a run that hangs is a failure.
fn two(place: &Place, arguments: &str) -> Ran {
    let script = format!("exec \"$REFIT\" {arguments}");
    finish(launch(place, &[&script, &script]))
}

fn finish(mut command: Command) -> Ran {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("mpirun");
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > Duration::from_secs(180) {
            child.kill().unwrap();
            panic!(
                "the processes did not end: {:?}",
                Ran::of(child.wait_with_output().unwrap()).err
            );
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ran::of(child.wait_with_output().unwrap())
}

fn train(out: &str) -> String {
    format!("{} -o {out}", TRAIN.join(" "))
}

/// How often the command itself complained.
fn complaints(ran: &Ran) -> usize {
    ran.err.lines().filter(|line| line.starts_with("error:")).count()
}

fn adapter(dir: &Path) -> Artifact {
    Artifact::open(dir.join("adapter_model.safetensors")).unwrap()
}

/// The files of an output that do not bear its name.
fn learned(place: &Place, out: &str) -> Vec<(String, Vec<u8>)> {
    let all = contents(&place.path(out)).into_iter();
    let files: Vec<_> = all.filter(|(name, _)| name != "README.md").collect();
    assert!(files.iter().any(|(name, _)| name == "adapter_model.safetensors"));
    files
}

#[test]
fn two_processes_write_what_one_does() {
    let place = place();
    place.run(&[TRAIN, &["--text", "builtin:kjv", "-o", "one"]].concat()).code(0);
    let ran = two(&place, &format!("--json {} --text builtin:kjv", train("two")));
    assert_eq!(ran.out.lines().count(), 1, "one process speaks:\n{}", ran.out);
    let found = ran.json();
    assert_eq!(found["report"]["processes"], 2);
    let card = |dir: &str| std::fs::read_to_string(place.path(dir).join("README.md")).unwrap();
    assert!(found["report"]["held_out_perplexity_after"].is_f64(), "{found}");
    assert!(card("two").contains("processes: 2"));
    assert!(
        card("two").contains("mpirun -n 2 refit apply lora") && !card("one").contains("mpirun")
    );
    let (one, two_) = (adapter(&place.path("one")), adapter(&place.path("two")));
    let (mut worst, mut moved) = (0.0f32, 0.0f32);
    assert_eq!(one.tensors().len(), two_.tensors().len());
    for tensor in one.tensors() {
        let (a, b) = (one.read_f32(&tensor.name).unwrap(), two_.read_f32(&tensor.name).unwrap());
        assert_eq!(a.len(), b.len(), "{}", tensor.name);
        worst = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(worst, f32::max);
        if tensor.name.contains("lora_B") {
            moved = b.iter().fold(moved, |m, x| m.max(x.abs()));
        }
    }
    println!("largest difference {worst:e}, largest value of B {moved:e}");
    assert!(moved > 1e-3, "something was learned: {moved}");
    assert!(worst < CLOSE, "{worst}");
    let left: Vec<String> = place.names().into_iter().filter(|n| n.starts_with('.')).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_stopped_run_of_two_goes_on_to_the_same_bytes() {
    let place = place();
    assert_eq!(two(&place, &train("whole")).code(0).code, 0);
    let again = two(&place, &train("again"));
    assert_eq!(again.code, 0);
    assert!(learned(&place, "whole") == learned(&place, "again"), "twice the same");

    // Process 1 dies once the first checkpoint is there.
    let checkpoint = ".stopped.refit-training/step-000000002.ckpt.safetensors";
    let run = format!("exec \"$REFIT\" {}", train("stopped"));
    let dies = format!(
        "\"$REFIT\" {} & until [ -e {checkpoint} ] || [ -e stopped ]; do sleep 0.005; done; kill -9 $!; wait $!",
        train("stopped")
    );
    let start = Instant::now();
    let ran = finish(launch(&place, &[&run, &dies]));
    assert!(start.elapsed() < Duration::from_secs(60), "the other process ended, too");
    if place.path("stopped").exists() {
        panic!("the run was over before it could be killed: {}", ran.err);
    }
    assert_ne!(ran.code, 0);
    two(&place, &train("stopped")).code(0);
    assert!(learned(&place, "stopped") == learned(&place, "whole"));
}

#[test]
fn an_error_is_said_once_and_ends_both() {
    let place = place();
    // On both: the same mistake.
    let ran = two(&place, &train("out").replace("lesson.jsonl", "missing.jsonl"));
    assert_eq!((ran.code, complaints(&ran)), (2, 1), "{}", ran.err);
    assert!(ran.err.contains("missing.jsonl"), "{}", ran.err);
    let ran = two(&place, &train("out").replace("--batch 3", "--batch 1"));
    assert_eq!((ran.code, complaints(&ran)), (2, 1), "{}", ran.err);
    assert!(ran.err.contains("--batch 2 or more"), "{}", ran.err);
    let layered =
        "apply galore builtin:tiny --data lesson.jsonl --per-layer --clip 0 --steps 2 -o out";
    let ran = two(&place, layered);
    assert_eq!((ran.code, complaints(&ran)), (2, 1), "{}", ran.err);
    assert!(ran.err.contains("--per-layer"), "{}", ran.err);
    let ran = two(&place, &train("out").replace("--batch", "--bach"));
    assert_eq!((ran.code, complaints(&ran)), (2, 1), "{}", ran.err);

    // On one of them: other data, missing data, and a checkpoint that cannot be written.
    place.write("other.jsonl", "{\"prompt\": \"a\", \"completion\": \"b\"}\n");
    let (own, other) = (train("out"), train("out").replace("lesson", "other"));
    let exec = |arguments: &str| format!("exec \"$REFIT\" {arguments}");
    let ran = finish(launch(&place, &[&exec(&own), &exec(&other)]));
    assert_eq!((ran.code, complaints(&ran)), (2, 1), "{}", ran.err);
    assert!(ran.err.contains("process 1 does not have the training data"), "{}", ran.err);
    let missing = train("out").replace("lesson.jsonl", "missing.jsonl");
    let ran = finish(launch(&place, &[&exec(&own), &exec(&missing)]));
    assert_eq!((ran.code, complaints(&ran)), (2, 1), "{}", ran.err);
    assert!(ran.err.contains("missing.jsonl"), "{}", ran.err);
    assert_eq!(place.names(), ["lesson.jsonl", "other.jsonl"], "nothing is left");
    // A directory where the first checkpoint's temporary file would be. (A limit on files would stop MPI's own.)
    std::fs::create_dir_all(place.path(".out.refit-training/.step-000000002.partial")).unwrap();
    let ran = two(&place, &own);
    assert_eq!((ran.code, complaints(&ran)), (3, 1), "{}", ran.err);
    assert!(ran.err.contains("step-000000002"), "{}", ran.err);
}

#[test]
fn work_for_one_process_is_refused() {
    let place = place();
    for arguments in [
        "inspect builtin:tiny",
        "apply rtn builtin:tiny --bits 4 --group 64 -o out",
        "eval builtin:tiny --text builtin:kjv",
    ] {
        let ran = two(&place, arguments);
        assert_eq!((ran.code, complaints(&ran)), (2, 1), "{}", ran.err);
        assert!(ran.err.contains("2 processes were started"), "{}", ran.err);
    }
    assert_eq!(place.names(), ["lesson.jsonl"]);
    let dry = two(&place, &format!("{} --dry-run", train("out")));
    assert!(dry.out.matches("would be applied").count() == 1, "{}", dry.out);
    assert_eq!(place.names(), ["lesson.jsonl"]);
}
