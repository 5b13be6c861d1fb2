//! `fanfare bench`: what it measures on fanfare, and that it notices every fault of a bad server.

use std::net::SocketAddr;
use std::process::{Command, Output};

use futures_util::{SinkExt, StreamExt};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::{broadcast, mpsc};
use tokio_tungstenite::accept_async;
use tokio_tungstenite::tungstenite::Message;

use crate::common::process::Directory;
use crate::common::{Node, within};

async fn bench(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fanfare"));
    command.arg("bench").args(args);
    let ended = tokio::task::spawn_blocking(move || command.output());
    within("the bench to end", ended).await.expect("a thread").expect("the binary can be run")
}

/// The JSON of a run, which has ended with success unless it was void.
async fn measure(args: &[&str]) -> Value {
    let output = bench(&[args, &["--json"]].concat()).await;
    let results: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
    let is_void = results["phases"].as_array().expect("phases").iter().any(|phase| phase["void"] == true);
    // Beside other tests the generator may get too little CPU for its figures, not for its judgement.
    assert_eq!(output.status.code(), Some(if is_void { 3 } else { 0 }), "{output:?}");
    assert_eq!(results["problems"].as_array().map(Vec::len), Some(0), "{results:#}");
    results
}

#[tokio::test]
async fn measures_every_phase_of_fanfare() {
    let node = Node::start(&[]).await;
    let url = format!("ws://{}/ws/{{i}}", node.public);
    let phases = "connect, rate 50/s 1s, storm 50% 200ms, churn 40/s 1s, stall 10% 500ms, leave";
    let results = measure(&[&url, "--connections", "40", "--processes", "2", "--phases", phases]).await;
    assert!(results["server"].as_str().unwrap().starts_with("fanfare (pid "), "{results:#}");
    let phase = |number: usize| &results["phases"][number];
    // The client that publishes receives, too.
    assert_eq!(phase(0)["clients"], 41);
    assert_eq!(phase(1)["deliveries"], 41 * phase(1)["published"].as_u64().unwrap());
    assert!(phase(1)["latency_us"]["p99"].as_u64().unwrap() > 0);
    assert!(phase(1)["server_cpu_seconds"].as_f64().unwrap() > 0.0);
    assert!(phase(2)["reconnected_seconds"].as_f64().unwrap() > 0.0);
    assert_eq!((&phase(2)["resumed"], &phase(2)["notices"]), (&20.into(), &0.into()), "{results:#}");
    assert!(phase(3)["published"].as_u64().unwrap() > 0);
    assert_eq!(phase(5)["clients"], 0);
}

#[tokio::test]
async fn clients_connect_to_urls_in_turn() {
    let node = Node::start(&[]).await;
    let (url, nowhere) = (format!("ws://{}/ws/{{i}}", node.public), "ws://127.0.0.1:1/ws/{i}");
    let phases = "connect, rate 50/s 200ms";
    let output = bench(&[&url, nowhere, "--connections", "10", "--phases", phases, "--json"]).await;
    let results: Value = serde_json::from_slice(&output.stdout).unwrap();
    let [connect, rate] = results["phases"].as_array().unwrap().as_slice() else { panic!("{results:#}") };
    let refused: u64 = connect["refused"].as_object().unwrap().values().filter_map(Value::as_u64).sum();
    assert_eq!((&connect["clients"], refused), (&6.into(), 5), "{results:#}");
    assert_eq!(rate["deliveries"], 6 * rate["published"].as_u64().unwrap());
}

#[tokio::test]
async fn publishes_by_http_in_a_closed_loop() {
    let node = Node::start(&[]).await;
    let (url, publish) = (
        format!("ws://{}/ws/{{i}}?channel=a", node.public),
        format!("http://{}/publish?channel=a", node.admin),
    );
    let directory = Directory::new();
    let svg = directory.path().join("run.svg");
    let phases = "connect, saturate 8 1s";
    let args = ["--connections", "10", "--publish", &publish, "--phases", phases, "--svg"];
    let results = measure(&[&[&*url], &args[..], &[svg.to_str().unwrap()]].concat()).await;
    let saturated = &results["phases"][1];
    assert_eq!(saturated["deliveries"], 11 * saturated["published"].as_u64().unwrap());
    assert!(std::fs::read_to_string(svg).unwrap().starts_with("<svg"));
}

#[tokio::test]
async fn divides_clients_among_channels_and_users() {
    let node = Node::start(&[]).await;
    let publish = |query: &str| format!("http://{}/publish?{query}={{channel}}", node.admin);
    for (path, publish) in
        [("/ws/{i}?channel={channel}", publish("channel")), ("/ws/{channel}", publish("to"))]
    {
        let url = format!("ws://{}{path}", node.public);
        let args = ["--connections", "12", "--channels", "4", "--publish", &publish];
        let phases = ["--phases", "connect, rate 100/s 400ms"];
        let results = measure(&[&[&*url], &args[..], &phases].concat()).await;
        // Three clients each, and the one that shows what is in flight, in channel 0.
        let (events, deliveries) = (&results["phases"][1]["published"], &results["phases"][1]["deliveries"]);
        let (events, deliveries) = (events.as_u64().unwrap(), deliveries.as_u64().unwrap());
        assert_eq!((events > 30, deliveries), (true, 3 * events + events / 4), "{results:#}");
    }
}

#[tokio::test]
async fn rejected_events_and_clients_fail_a_run() {
    let node = Node::start(&["--max-message-rate", "1", "--max-connections", "3"]).await;
    let url = format!("ws://{}/ws/{{i}}", node.public);
    let output = bench(&[&url, "--connections", "5", "--phases", "connect, saturate 64 1s", "--json"]).await;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let results: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(results["phases"][0]["refused"]["HTTP 503"], 3, "{results:#}");
    let rejected = results["phases"][1]["not_published"].as_object().unwrap();
    assert!(rejected.keys().any(|reason| reason.contains("rate limit exceeded")), "{results:#}");
}

#[tokio::test]
async fn every_fault_of_a_server_is_noticed() {
    for fault in [Fault::None, Fault::Drop, Fault::Double, Fault::Swap, Fault::Stop] {
        let addr = faulty_server(fault).await;
        let url = format!("ws://{addr}/");
        let phases = "connect, rate 50/s 200ms";
        let output = bench(&[&url, "--connections", "1", "--phases", phases, "--json"]).await;
        let results: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
        let phase = &results["phases"][1];
        let (lost, repeated) = match fault {
            Fault::None => (0, 0),
            Fault::Drop => (1, 0),
            Fault::Double => (0, 1),
            Fault::Swap => (1, 1), // a gap, and then an event that comes too late
            Fault::Stop | Fault::ForgetNewcomers => (phase["published"].as_u64().unwrap() - 4, 0),
        };
        assert_eq!(
            (&phase["lost"], &phase["repeated"]),
            (&lost.into(), &repeated.into()),
            "{fault:?}: {results:#}"
        );
        assert_eq!(output.status.code() == Some(1), fault != Fault::None, "{fault:?}: {output:?}");
    }
}

#[tokio::test]
async fn newcomers_without_events_are_noticed() {
    for fault in [Fault::None, Fault::ForgetNewcomers] {
        let addr = faulty_server(fault).await;
        let url = format!("ws://{addr}/");
        let output =
            bench(&[&url, "--connections", "1", "--phases", "connect, churn 10/s 300ms", "--json"]).await;
        let results: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
        let lost = u64::from(fault == Fault::ForgetNewcomers);
        assert_eq!(results["phases"][1]["lost"], lost, "{fault:?}: {results:#}");
    }
}

#[tokio::test]
async fn clients_that_never_become_ready_are_noticed() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("ws://{}/", listener.local_addr().expect("it is bound"));
    let silent = tokio::spawn(async move {
        let mut streams = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            streams.push(stream);
        }
    });
    let output = bench(&[&url, "--connections", "2", "--resume", "none", "--phases", "connect"]).await;
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && text.contains("not ready after 8 s"), "{output:?}");
    silent.abort();
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    Drop,
    Double,
    Swap,
    Stop,
    /// Clients that join later get nothing.
    ForgetNewcomers,
}

/// A server that sends each message to all clients. The client that publishes gets every event,
/// the other one does not: the fault is at the fifth event.
async fn faulty_server(fault: Fault) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let addr = listener.local_addr().expect("it is bound");
    let (everyone, _) = broadcast::channel::<(usize, String)>(1000);
    tokio::spawn(async move {
        let mut number = 0;
        while let Ok((stream, _)) = listener.accept().await {
            // The first connection asks whether the server can resume.
            tokio::spawn(serve(stream, number, everyone.clone(), fault));
            number += 1;
        }
    });
    addr
}

async fn serve(
    stream: tokio::net::TcpStream,
    number: usize,
    everyone: broadcast::Sender<(usize, String)>,
    fault: Fault,
) {
    let mut events = everyone.subscribe();
    let Ok(socket) = accept_async(stream).await else { return };
    let (mut sink, mut source) = socket.split();
    let (sender, mut outgoing) = mpsc::unbounded_channel::<String>();
    tokio::spawn(async move {
        while let Some(text) = outgoing.recv().await {
            if sink.send(Message::text(text)).await.is_err() {
                return;
            }
        }
    });
    tokio::spawn(async move {
        let mut kept = None;
        while let Ok((from, text)) = events.recv().await {
            let event: usize = usize::from_str_radix(&text[3..9], 36).expect("a mark");
            let times = match (from == number, fault, event) {
                (true, ..) => 1,
                (_, Fault::Drop, 5) => 0,
                (_, Fault::Stop, 5..) => 0,
                // The first three: one asks whether clients can resume, one publishes, one receives.
                (_, Fault::ForgetNewcomers, _) if number > 2 => 0,
                (_, Fault::Double, 5) => 2,
                (_, Fault::Swap, 5) => {
                    kept = Some(text);
                    continue;
                }
                _ => 1,
            };
            for _ in 0..times {
                let _ = sender.send(text.clone());
            }
            if let Some(kept) = kept.take() {
                let _ = sender.send(kept);
            }
        }
    });
    while let Some(Ok(message)) = source.next().await {
        if let Message::Text(text) = message {
            let _ = everyone.send((number, text.to_string()));
        }
    }
}
