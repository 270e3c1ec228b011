//! `bench --transport rdma` on the device that `PAGECOPY_RDMA` names, as short as it can be: that figures and ratios come out,
//! whatever they are.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::real::{Scratch, skipped};

/// How long it may take. perftest alone takes some ten seconds of it.
const LIMIT: Duration = Duration::from_secs(60);

/// A figure of the only run.
fn figure(figures: &Value) -> f64 {
    let only = figures.as_array().filter(|runs| runs.len() == 1);
    let value = only.and_then(|runs| runs[0].as_f64());
    value.unwrap_or_else(|| panic!("no figure of one run: {figures}"))
}

/// The ratio in words that begin with it.
fn ratio(words: &str) -> f64 {
    let first = words.split(' ').next().unwrap_or_default();
    first
        .parse()
        .unwrap_or_else(|_| panic!("no ratio: {words:?}"))
}

fn assert_about(told: f64, ours: f64, theirs: f64) {
    let expected = ours / theirs;
    assert!((told - expected).abs() < 0.006, "{told} for {expected}");
}

#[test]
fn rdma_bench_says_figures_and_ratios() {
    let rails = std::env::var("PAGECOPY_RDMA").unwrap_or_default();
    let Some(on) = rails.split(',').next().filter(|on| !on.is_empty()) else {
        return skipped("PAGECOPY_RDMA names no address of an RDMA device");
    };
    let scratch = Scratch::new();
    let file = scratch.files().join("bench.json");
    let begun = Instant::now();
    let output = Command::new(env!("CARGO_BIN_EXE_bench"))
        .args(["--transport", "rdma", "--on", on, "--sizes", "65536"])
        .args(["--seconds", "0.2", "--pairs", "1", "--json"])
        .arg(&file)
        .output()
        .expect("the bench starts");
    println!("took {:?}", begun.elapsed());
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let complaints = String::from_utf8_lossy(&output.stderr);
    println!("{said}{complaints}");
    assert!(output.status.success(), "{}", output.status);
    assert!(begun.elapsed() < LIMIT);
    let report: Value =
        serde_json::from_slice(&fs::read(&file).expect("its figures")).expect("JSON");
    let line = |begin: &str| -> Vec<String> {
        let found = said.lines().find_map(|line| line.strip_prefix(begin));
        let found = found.unwrap_or_else(|| panic!("no line {begin:?}"));
        found.split("; ").map(str::to_owned).collect()
    };
    for (index, what) in ["writes", "reads"].into_iter().enumerate() {
        let speeds = &report["bulk"][index]["mib_s"];
        let [rdma, tcp, perftest] = ["rdma", "tcp", "perftest"].map(|way| figure(&speeds[way]));
        assert!(rdma > 0.0 && tcp > 0.0 && perftest > 0.0, "{speeds}");
        let words = line(&format!("{what} of 65536 bytes: "));
        assert_about(ratio(&words[0]), rdma, perftest);
        assert_about(ratio(&words[1]), rdma, tcp);
    }
    let [rdma, tcp, perftest] =
        ["rdma", "tcp", "ib_read_lat"].map(|way| figure(&report["page_us"][way]));
    assert!(rdma > 0.0 && tcp > 0.0 && perftest > 0.0, "{report}");
    let words = line("a page of 4096 bytes, read: ");
    assert_about(ratio(&words[0]), rdma, perftest);
    assert_about(ratio(&words[1]), rdma, tcp);
}
