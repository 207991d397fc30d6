use std::cell::RefCell;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

fn claim(run: fn(&mut ClaimContext) -> Result<(), BoxError>) -> Claim {
    Claim {
        method: "sample",
        question: "Is two less than three?",
        paper: "arXiv:0000.00000",
        assets: &["builtin:tiny"],
        minutes: 0.1,
        seeds: &[0, 1, 2],
        run,
    }
}

fn two_against_three(cx: &mut ClaimContext) -> Result<(), BoxError> {
    cx.param("size", 7);
    for seed in cx.seeds().to_vec() {
        for (arm, value) in [("two", 2.0), ("three", 3.0)] {
            cx.arm(arm, seed, |trial| {
                trial.record("loss", value + seed as f64);
                Ok(())
            })?;
        }
    }
    let gaps = cx.difference("two", "three", "loss");
    cx.check("two < three in every seed", gaps.iter().all(|g| *g < 0.0), format!("{gaps:?}"));
    Ok(())
}

#[test]
fn a_claim_that_holds_is_reproduced_and_survives_json() {
    let report = claim(two_against_three).run(&RunOptions::default());
    assert_eq!((report.verdict, report.trials.len()), (Verdict::Reproduced, 6));
    assert!(report.trials.iter().all(|t| t.cost.seconds > 0.0));
    let dir = tempfile::tempdir().unwrap();
    let [markdown, json] = report.write(dir.path()).unwrap();
    assert_eq!(Report::read(&json).unwrap(), report);
    let page = std::fs::read_to_string(markdown).unwrap();
    for wanted in [
        "**Verdict: reproduced**",
        "| two | 2.000 | 3.000 | 4.000 | 3.000 ± 1.000 |",
        "| two < three in every seed | yes |",
        "`refit claim sample` on `builtin:tiny`",
        "size = 7",
    ] {
        assert!(page.contains(wanted), "{wanted} is missing from\n{page}");
    }
}

#[test]
fn quick_takes_the_first_seed_and_says_so() {
    let options = RunOptions { quick: true, ..RunOptions::default() };
    let report = claim(two_against_three).run(&options);
    assert_eq!((report.seeds.clone(), report.trials.len()), (vec![0], 2));
    assert!(report.to_markdown().contains("quick version"));
    assert_eq!(report.command, "refit claim sample --quick");
}

#[test]
fn a_check_that_fails_is_not_shown_with_its_reason() {
    let report = claim(|cx| {
        cx.record("arm", 0, "loss", f64::INFINITY);
        let shown = cx.value("arm", 0, "loss") == Some(f64::INFINITY);
        assert!(cx.mean("absent", "loss").is_nan());
        cx.check("the loss is finite", !shown, "it is not");
        cx.likely_reason("the model is too small");
        Ok(())
    })
    .run(&RunOptions::default());
    assert_eq!(report.verdict, Verdict::NotShown);
    assert_eq!(report.reason.as_deref(), Some("the model is too small"));
    let again: Report = serde_json::from_str(&report.to_json()).unwrap();
    assert_eq!(again.trials[0].get("loss"), Some(f64::INFINITY));
    assert!(report.to_markdown().contains("| the loss is finite | **no** |"));
}

#[test]
fn errors_and_panics_are_failures_without_paths() {
    let report = claim(|cx| cx.arm("a", 4, |_| Err("/home/someone/x/model.gguf: gone".into())))
        .run(&RunOptions::default());
    assert_eq!(report.verdict, Verdict::FailedToRun);
    assert_eq!(report.reason.as_deref(), Some("a, seed 4: model.gguf: gone"));
    let report = claim(|_| panic!("boom")).run(&RunOptions::default());
    assert_eq!(report.verdict, Verdict::FailedToRun);
    assert!(report.reason.unwrap().contains("boom"));
    let report = claim(|cx| cx.asset("pypi:x").map(|_| ())).run(&RunOptions::default());
    assert!(report.reason.unwrap().contains("pypi:x"));
    let report = claim(|_| Ok(())).run(&RunOptions::default());
    assert_eq!(report.verdict, Verdict::NotShown);
}

static RUNS: AtomicUsize = AtomicUsize::new(0);

fn counted(cx: &mut ClaimContext) -> Result<(), BoxError> {
    for seed in cx.seeds().to_vec() {
        cx.arm("arm", seed, |trial| {
            RUNS.fetch_add(1, Ordering::SeqCst);
            trial.record("loss", f64::NEG_INFINITY);
            Ok(())
        })?;
    }
    cx.check("always", true, "");
    Ok(())
}

#[test]
fn finished_trials_are_kept_and_a_cut_line_is_run_again() {
    let dir = tempfile::tempdir().unwrap();
    let said = RefCell::new(Vec::new());
    let progress = |line: &str| said.borrow_mut().push(line.to_string());
    let options = RunOptions {
        work: Some(dir.path().to_path_buf()),
        progress: &progress,
        ..RunOptions::default()
    };
    let run = |options: &RunOptions| {
        let before = RUNS.load(Ordering::SeqCst);
        let report = claim(counted).run(options);
        assert_eq!(report.verdict, Verdict::Reproduced);
        (RUNS.load(Ordering::SeqCst) - before, report)
    };
    let (first, report) = run(&options);
    let (second, again) = run(&options);
    assert_eq!((first, second), (3, 0));
    assert_eq!(report, again);
    assert!(said.borrow().iter().any(|line| line.contains("kept from an earlier run")));

    let journal = dir.path().join("sample/trials.jsonl");
    let text = std::fs::read_to_string(&journal).unwrap();
    std::fs::write(&journal, &text[..text.trim_end().len() - 10]).unwrap();
    assert_eq!(run(&options).0, 1);
    assert_eq!(run(&options).0, 0);

    let fresh =
        RunOptions { work: Some(dir.path().to_path_buf()), fresh: true, ..RunOptions::default() };
    assert_eq!(run(&fresh).0, 3);
    let quick =
        RunOptions { work: Some(dir.path().to_path_buf()), quick: true, ..RunOptions::default() };
    assert_eq!(run(&quick).0, 1);
}
