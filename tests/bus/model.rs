//! A model of the Redis bus, checked with many more random histories than real servers allow.

use std::process::Command;

#[test]
fn model_of_the_bus_keeps_the_promise() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/model/bussim.py");
    let output = Command::new("python3").args([model, "proof", "1500"]).output().expect("python3 runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
}
