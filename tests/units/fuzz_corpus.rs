//! Runs the seeds of the fuzz targets through their bodies, so that fixed faults stay fixed.

#[path = "../../fuzz/bodies.rs"]
mod bodies;

fn run(target: &str, body: impl Fn(&[u8])) {
    let directory = format!("{}/fuzz/seeds/{target}", env!("CARGO_MANIFEST_DIR"));
    let mut seeds = 0;
    for entry in std::fs::read_dir(&directory).expect(&directory) {
        let path = entry.expect("a directory's entry").path();
        let seed = std::fs::read(&path).expect("a file");
        eprintln!("{}", path.display()); // shown when it panics
        body(&seed);
        // Every prefix is a seed as well.
        for end in 0..seed.len().min(300) {
            body(&seed[..end]);
        }
        seeds += 1;
    }
    assert!(seeds >= 10, "{seeds} seeds in {directory}");
}

#[test]
fn requests() {
    run("request", bodies::request);
}

#[test]
fn frames() {
    run("frames", bodies::frames);
}

#[test]
fn bus() {
    run("bus", bodies::bus);
}
