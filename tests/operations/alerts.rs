//! The alert rules, checked by Prometheus's promtool, which is in Debian's package prometheus;
//! tests/run.sh installs it. That their metrics exist is a test in tests/units/docs.rs.

use std::process::Command;

const RULES: &str = include_str!("../../grafana/alerts.yml");
const TESTS: &str = include_str!("alerts.yml");

/// Runs promtool, which must not complain. Returns its output.
fn promtool(arguments: &[&str]) -> String {
    let output = Command::new("promtool").args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).output();
    let output = output.expect("promtool is there: apt install prometheus, or tests/run.sh");
    let texts = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    let text = texts.concat();
    assert!(output.status.success(), "promtool {arguments:?} says:\n{text}");
    text
}

fn alerts() -> Vec<&'static str> {
    RULES.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect()
}

#[test]
fn alert_rules_pass_promtool() {
    let output = promtool(&["check", "rules", "--lint=all", "--lint-fatal", "grafana/alerts.yml"]);
    assert!(output.contains(&format!("{} rules found", alerts().len())), "{output}");
}

#[test]
fn each_alert_fires_alone() {
    promtool(&["test", "rules", "tests/operations/alerts.yml"]);
    for alert in alerts() {
        let fires = format!(r#"exp_samples: [{{ labels: 'ALERTS{{alertname="{alert}", alertstate="firing""#);
        assert!(TESTS.contains(&fires), "{alert} has no test in tests/operations/alerts.yml");
    }
    assert!(TESTS.contains("exp_samples: []"), "a node without faults");
}
