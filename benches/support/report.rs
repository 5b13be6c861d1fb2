//! Medians, ratios, and tables in Markdown.

/// The middle value; for an even number of values, the mean of the middle two.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        len if len % 2 == 1 => sorted[middle],
        _ => (sorted[middle - 1] + sorted[middle]) / 2.0,
    }
}

pub fn micros(value: f64) -> String {
    format!("{value:.2} µs")
}

/// The ratio of the medians, with the lowest and highest ratio of a round.
pub fn ratio(pairs: &[(f64, f64)]) -> String {
    let ratios: Vec<f64> = pairs.iter().map(|(ours, baseline)| ours / baseline).collect();
    let ours: Vec<f64> = pairs.iter().map(|pair| pair.0).collect();
    let baseline: Vec<f64> = pairs.iter().map(|pair| pair.1).collect();
    let low = ratios.iter().copied().fold(f64::INFINITY, f64::min);
    let high = ratios.iter().copied().fold(0.0, f64::max);
    format!("{:.2} ({low:.2}–{high:.2})", median(&ours) / median(&baseline))
}

/// Prints a table in Markdown.
pub fn table(head: &[&str], rows: &[Vec<String>]) {
    println!("| {} |", head.join(" | "));
    println!("|{}", "---|".repeat(head.len()));
    for row in rows {
        println!("| {} |", row.join(" | "));
    }
}
