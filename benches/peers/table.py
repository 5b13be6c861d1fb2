"""Prints the results of benches/peers/run as a Markdown table: table.py DIRECTORY CONNECTIONS PEER...

A cell is the median of the rounds whose phase is not void. Where all are void it says VOID: the load
generator was what limited the server."""

import json
import statistics
import sys
from pathlib import Path

HEAD = [
    "server",
    "CPU per delivery, live",
    "p99, live",
    "deliveries/s, 16 in flight",
    "64",
    "256",
    "memory per connection",
    "storm: all back after",
    "failures",
]


def rate(value):
    if value >= 1e6:
        return f"{value / 1e6:.2f} M"
    return f"{value / 1e3:.1f} k" if value >= 1e4 else f"{value:.0f}"


def latency(micros):
    return f"{micros / 1e3:.1f} ms" if micros < 1e5 else f"{micros / 1e6:.2f} s"


def size(value):
    return f"{value:.0f} B" if abs(value) < 10_000 else f"{value / 1024:.1f} KiB"


def cell(found, show):
    """`found`: pairs of a value, or None, and whether the phase is void."""
    known = [(value, void) for value, void in found if value is not None]
    good = [value for value, void in known if not void]
    if good:
        return show(statistics.median(good))
    return f"{show(statistics.median(value for value, _ in known))} VOID" if known else "–"


def failures(runs, errors):
    counts = {}
    for run in runs:
        for phase in run["phases"]:
            for what in ["lost", "repeated"]:
                counts[what] = counts.get(what, 0) + phase[what]
            for what in ["not_published", "refused", "closed"]:
                for reason, count in phase[what].items():
                    name = f"{what.replace('_', ' ')} ({reason})"
                    counts[name] = counts.get(name, 0) + count
    texts = [f"{count:,} {what}" for what, count in counts.items() if count]
    texts += [" ".join(error.split()) for error in errors]
    return ", ".join(texts).replace("|", "/") or "none"


def row(directory, connections, peer):
    runs, memory, errors = [], [], []
    for error in sorted(directory.glob(f"*.{peer}.error")):
        errors.append(error.read_text())
    for file in sorted(directory.glob(f"*.{peer}.json")):
        if not file.stat().st_size:
            continue
        run = json.loads(file.read_text())
        runs.append(run)
        before = int(file.with_suffix(".before").read_text())
        idle = [phase for phase in run["phases"] if phase["phase"].startswith("idle")]
        memory += [((phase["server_anonymous_bytes"] - before) / connections, False) for phase in idle]

    def of(phase, figure):
        phases = [one for run in runs for one in run["phases"] if one["phase"].startswith(phase)]
        return [(figure(one), one["void"]) for one in phases]

    live_cpu = of("rate", lambda phase: phase["server_cpu_us_per_delivery"])
    return [
        peer,
        # The server's own CPU time, whatever the load generator had.
        cell([(value, False) for value, _ in live_cpu], lambda value: f"{value:.2f} µs"),
        cell(of("rate", lambda phase: phase["latency_us"]["p99"]), latency),
        *(
            cell(of(f"saturate {events} ", lambda phase: phase["deliveries_per_second"]), rate)
            for events in [16, 64, 256]
        ),
        cell(memory, size),
        cell(of("storm", lambda phase: phase["reconnected_seconds"]), lambda value: f"{value:.2f} s"),
        failures(runs, errors),
    ]


def main():
    directory, connections, peers = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    print("|", " | ".join(HEAD), "|")
    print("|" + "---|" * len(HEAD))
    for peer in peers:
        print("|", " | ".join(row(directory, connections, peer)), "|")


main()
