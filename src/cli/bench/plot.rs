//! `--svg`: latency and deliveries over time, and the percentiles of latency.

use std::fmt::Write;

use hdrhistogram::Histogram;

use super::result::{Second, rate, shown_latency};

const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 220.0;
const LEFT: f64 = 80.0;
const TOP: f64 = 40.0;
const GAP: f64 = 70.0;

const BLUE: &str = "#0072b2";
const ORANGE: &str = "#d55e00";

/// One line of a plot, and its name.
struct Line {
    name: &'static str,
    color: &'static str,
    points: Vec<(f64, f64)>,
}

/// Draws a run. `phases` are the names of the phases and the seconds at which they started.
pub fn draw(title: &str, seconds: &[Second], phases: &[(String, f64)], latencies: &Histogram<u64>) -> String {
    let mut svg = String::new();
    let height = TOP + 3.0 * (HEIGHT + GAP);
    let width = LEFT + WIDTH + 40.0;
    let _ = writeln!(
        svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" \
         font-size=\"12\"><rect width=\"100%\" height=\"100%\" fill=\"#fff\"/><text x=\"{LEFT}\" y=\"22\" \
         font-size=\"15\">{}</text>",
        escaped(title)
    );
    let end = seconds.last().map_or(1.0, |second| second.at).max(1.0);
    let over_time =
        |value: fn(&Second) -> f64| seconds.iter().map(|second| (second.at, value(second))).collect();
    let latency = [
        Line { name: "p50", color: BLUE, points: over_time(|second| second.p50 as f64) },
        Line { name: "p99", color: ORANGE, points: over_time(|second| second.p99 as f64) },
    ];
    let deliveries =
        [Line { name: "deliveries/s", color: BLUE, points: over_time(|second| second.deliveries as f64) }];
    let micros = |value: f64| shown_latency(value as u64);
    plot(&mut svg, 0, "Latency by second of the run", &latency, end, micros, |at| format!("{at:.0} s"));
    plot(&mut svg, 1, "Deliveries by second of the run", &deliveries, end, rate, |at| format!("{at:.0} s"));
    for (number, (name, at)) in phases.iter().enumerate() {
        let x = LEFT + at / end * WIDTH;
        let bottom = TOP + 2.0 * HEIGHT + GAP;
        let _ = writeln!(
            svg,
            "<path d=\"M{x:.1} {TOP}V{bottom}\" stroke=\"#bbb\" stroke-dasharray=\"3 3\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" fill=\"#555\" font-size=\"10\">{}</text>",
            x.min(LEFT + WIDTH),
            TOP + HEIGHT + 32.0 + 10.0 * (number % 3) as f64,
            escaped(name)
        );
    }
    // Each step to the right is a tenth of the slower deliveries: 90 %, 99 %, 99.9 % …
    let shares = (0..=40).map(|step| f64::from(step) / 10.0);
    let points = shares.map(|nines| (nines, latencies.value_at_quantile(1.0 - 10_f64.powf(-nines)) as f64));
    let percentiles = [Line { name: "all phases", color: BLUE, points: points.collect() }];
    let share = |nines: f64| format!("{} %", 100.0 - 100.0 * 10_f64.powf(-nines));
    plot(&mut svg, 2, "Percentiles of latency", &percentiles, 4.0, micros, share);
    svg += "</svg>\n";
    svg
}

/// Draws the plot of this row, with values from 0 to the highest of its lines.
fn plot(
    svg: &mut String,
    row: usize,
    title: &str,
    lines: &[Line],
    end: f64,
    shown_value: impl Fn(f64) -> String,
    shown_at: impl Fn(f64) -> String,
) {
    let top = TOP + row as f64 * (HEIGHT + GAP);
    let bottom = top + HEIGHT;
    let values = lines.iter().flat_map(|line| line.points.iter().map(|(_, value)| *value));
    let most = values.fold(1.0, f64::max);
    let _ = writeln!(svg, "<text x=\"{LEFT}\" y=\"{:.1}\" font-weight=\"bold\">{title}</text>", top + 14.0);
    for step in 0..=4 {
        let part = f64::from(step) / 4.0;
        let (x, y) = (LEFT + part * WIDTH, bottom - part * (HEIGHT - 24.0));
        let _ = writeln!(
            svg,
            "<path d=\"M{LEFT} {y:.1}h{WIDTH}\" stroke=\"#e5e5e5\"/><text x=\"{:.1}\" y=\"{:.1}\" \
             text-anchor=\"end\">{}</text><text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            LEFT - 8.0,
            y + 4.0,
            shown_value(most * part),
            bottom + 18.0,
            shown_at(end * part)
        );
    }
    for (number, line) in lines.iter().enumerate() {
        let Line { name, color, points } = line;
        let place = |(at, value): &(f64, f64)| {
            format!("{:.1},{:.1}", LEFT + at / end * WIDTH, bottom - value / most * (HEIGHT - 24.0))
        };
        let points: Vec<String> = points.iter().map(place).collect();
        let _ = writeln!(
            svg,
            "<polyline fill=\"none\" stroke=\"{color}\" stroke-width=\"1.6\" points=\"{}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" fill=\"{color}\" text-anchor=\"end\">{name}</text>",
            points.join(" "),
            LEFT + WIDTH - 90.0 * number as f64,
            top + 14.0
        );
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::bench::worker::histogram;

    #[test]
    fn draws_every_second() {
        let second = |at: u32| Second { at: at.into(), clients: 1, deliveries: 10, p50: 5, p99: 9 };
        let seconds: Vec<Second> = (1..=7).map(second).collect();
        let svg = draw("a < b", &seconds, &[("rate".into(), 2.0)], &histogram());
        let first = svg.split("points=\"").nth(1).unwrap().split('"').next().unwrap();
        assert_eq!(first.split(' ').count(), 7);
        assert!(svg.contains("a &lt; b") && svg.contains("99.9 %") && svg.matches("<svg").count() == 1);
    }
}
