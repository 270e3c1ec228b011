//! `/metrics` as Prometheus' own tool sees it, the dashboard that is drawn from it, and health.

use std::collections::BTreeSet;
use std::process::Command;

use serde_json::Value;

use super::harness::{Daemon, fed};

const DASHBOARD: &str = include_str!("../../../scripts/grafana.json");

/// Runs promtool, which must have nothing to say.
fn promtool(arguments: &[&str], input: &str) {
    let output = fed(Command::new("promtool").args(arguments), input);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && said.is_empty(),
        "{said}{}",
        String::from_utf8_lossy(&output.stdout)
    );
}

fn has(metrics: &str, line: &str) -> bool {
    metrics.lines().any(|other| other == line)
}

#[test]
fn promtool_passes_the_metrics_and_a_failure_counts() {
    let daemon = Daemon::start("metrics");
    let answer = daemon.get("/metrics");
    assert!(
        answer
            .header("content-type")
            .starts_with("text/plain; version=0.0.4"),
        "{answer:?}"
    );
    promtool(&["check", "metrics"], &answer.body);
    let failed = r#"pagecopy_migrations_total{result="failed",side="source"} "#;
    assert!(has(&answer.body, &format!("{failed}0")), "{answer:?}");
    daemon.fail("web");
    let after = daemon.get("/metrics").body;
    promtool(&["check", "metrics"], &after);
    assert!(has(&after, &format!("{failed}1")), "{after}");
    assert!(
        has(
            &after,
            r#"pagecopy_migrations{side="source",state="migrating"} 0"#
        ),
        "{after}"
    );
    let version = env!("CARGO_PKG_VERSION");
    assert!(
        has(
            &after,
            &format!(r#"pagecopy_build_info{{version="{version}"}} 1"#)
        ),
        "{after}"
    );
}

/// All queries of the dashboard.
fn queries(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(members) => {
            for (name, member) in members {
                match member.as_str().filter(|_| name == "expr") {
                    Some(query) => found.push(query.to_owned()),
                    None => queries(member, found),
                }
            }
        }
        Value::Array(all) => all.iter().for_each(|one| queries(one, found)),
        _ => {}
    }
}

#[test]
fn the_dashboard_asks_for_what_there_is() {
    let mut all = Vec::new();
    queries(&serde_json::from_str(DASHBOARD).unwrap(), &mut all);
    assert!(all.len() >= 10, "{all:?}");
    // As Prometheus would parse them: each as a rule.
    let rules: Vec<Value> = all
        .iter()
        .enumerate()
        .map(|(number, query)| {
            let expr = query
                .replace("$__rate_interval", "5m")
                .replace("$instance", ".*");
            serde_json::json!({ "record": format!("query:{number}"), "expr": expr })
        })
        .collect();
    // JSON is YAML.
    let file = std::env::temp_dir().join(format!("pagecopy-rules-{}.yml", std::process::id()));
    let groups = serde_json::json!({ "groups": [{ "name": "dashboard", "rules": rules }] });
    std::fs::write(&file, groups.to_string()).unwrap();
    promtool(&["check", "rules", file.to_str().unwrap()], "");
    std::fs::remove_file(file).unwrap();

    // The source has all of them; those of one migration are there while it runs.
    let source = include_str!("../../src/api/metrics.rs");
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let names: BTreeSet<&str> = all
        .iter()
        .flat_map(|query| query.split(|c: char| !is_part(c)))
        .filter(|word| word.starts_with("pagecopy_"))
        .collect();
    for name in &names {
        let base = ["_bucket", "_sum", "_count"]
            .iter()
            .find_map(|end| name.strip_suffix(end));
        let base = base
            .filter(|base| base.ends_with("_seconds"))
            .unwrap_or(name);
        assert!(
            source.contains(&format!("\"{base}\"")),
            "there is no metric {name}"
        );
    }
    assert!(names.len() >= 10, "{names:?}");
}

#[test]
fn health_and_readiness() {
    let daemon = Daemon::start("health");
    for path in ["/healthz", "/readyz"] {
        let health = daemon.get(path).json();
        assert_eq!(health["name"], "a");
        assert_eq!(health["version"], env!("CARGO_PKG_VERSION"));
    }
    // Its journals have nowhere to go.
    std::fs::remove_dir_all(daemon.dir.join("state")).unwrap();
    let unready = daemon.ask("GET", "/readyz", &[], "");
    assert_eq!(unready.status, 503, "{unready:?}");
    assert_eq!(
        unready.json()["type"],
        "urn:problem-type:pagecopy:not-ready"
    );
    assert!(
        unready.json()["detail"]
            .as_str()
            .unwrap()
            .contains("state-dir"),
        "{unready:?}"
    );
    daemon.get("/healthz");
}
