//! The chat programs in examples/: WebSocket libraries with their default options. Each program
//! chats, loses its connection, and sees the node restart.

use std::fs::File;
use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::json;

use super::examples::example;
use crate::common::process::{Directory, Process, installed, make_fifo};
use crate::common::{Client, Node, Proxy, Redis};

/// A chat program, and the messages that it should have printed.
struct Chat {
    process: Process,
    stdin: File,
    messages: Vec<String>,
    _directory: Directory,
}

impl Chat {
    fn start(mut command: Command, port: u16) -> Chat {
        let directory = Directory::new();
        let fifo = directory.path().join("stdin");
        make_fifo(&fifo);
        // Opening it for reading alone would wait for a writer.
        let stdin = File::options().read(true).write(true).open(&fifo).expect("a FIFO");
        command.args([&format!("ws://127.0.0.1:{port}/ws/robot"), "chat"]);
        command.stdin(stdin.try_clone().expect("a descriptor"));
        let process = Process::spawn("chat", command.stdout(Stdio::piped()).stderr(Stdio::piped()));
        Chat { process, stdin, messages: Vec::new(), _directory: directory }
    }

    async fn prints(&self, wanted: &str) {
        let found = self.process.line(wanted, |line| (line == wanted).then_some(())).await;
        found.unwrap_or_else(|ended| panic!("{ended}"));
    }

    async fn prints_message(&mut self, sender: &str, text: &str) {
        self.messages.push(format!("{sender}: {text}"));
        self.prints(&self.messages[self.messages.len() - 1]).await;
    }

    fn has_missed(&self) -> bool {
        self.process.output().contains(&"! messages may be missing".into())
    }
}

async fn publish(node: &Node, text: &str) {
    node.publish("chat", &json!({"sender": "backend", "text": text})).await;
}

async fn chats_and_resumes(command: Command) {
    let redis = Redis::start(&[]).await;
    let node = Node::on(&redis, &["--drain-timeout", "1s"]).await;
    let proxy = Proxy::to(node.public.port()).await;
    publish(&node, "before").await;
    let mut chat = Chat::start(command, proxy.port());
    chat.prints_message("backend", "before").await;

    let mut alice = Client::plain(&node, "alice", "chat").await;
    alice.send("hi").await;
    chat.prints_message("alice", "hi").await;
    chat.stdin.write_all("grüße\n".as_bytes()).expect("it reads");
    assert_eq!(alice.next_event().await.1, json!({"sender": "alice", "text": "hi"}));
    assert_eq!(alice.next_event().await.1, json!({"sender": "robot", "text": "grüße"}));
    chat.prints_message("robot", "grüße").await;

    proxy.cut();
    publish(&node, "after a cut").await;
    chat.prints_message("backend", "after a cut").await;

    node.signal("TERM");
    node.ended().await;
    let node = Node::on(&redis, &[]).await;
    proxy.lead_to(node.public.port());
    publish(&node, "after a restart").await;
    chat.prints_message("backend", "after a restart").await;
    chat.stdin.write_all(b"still here\n").expect("it reads");
    chat.prints_message("robot", "still here").await;
    assert!(!chat.has_missed());

    redis.client().await.call(&["FLUSHALL"]).await;
    chat.prints("! messages may be missing").await;
    publish(&node, "after a loss").await;
    chat.prints_message("backend", "after a loss").await;
    let output = chat.process.output();
    let printed: Vec<_> = output.iter().filter(|line| !line.starts_with("! ")).collect();
    assert_eq!(printed, chat.messages.iter().collect::<Vec<_>>(), "each once, in order");
}

async fn python(program: &str) {
    let mut command = Command::new(installed("python/bin/python"));
    command.arg(example("python").join(program));
    chats_and_resumes(command).await;
}

async fn node(program: &str) {
    let directory = installed("node/node_modules").with_file_name("");
    std::fs::copy(example("node").join(program), directory.join(program)).expect("target/ is writable");
    let mut command = Command::new("node");
    command.arg(directory.join(program));
    chats_and_resumes(command).await;
}

#[tokio::test]
async fn websockets_of_python_chats_and_resumes() {
    python("chat_websockets.py").await;
}

#[tokio::test]
async fn websocket_client_of_python_chats_and_resumes() {
    python("chat_websocket_client.py").await;
}

#[tokio::test]
async fn aiohttp_chats_and_resumes() {
    python("chat_aiohttp.py").await;
}

#[tokio::test]
async fn ws_of_node_chats_and_resumes() {
    node("chat_ws.mjs").await;
}

#[tokio::test]
async fn reconnecting_websocket_chats_and_resumes() {
    node("chat_reconnecting.mjs").await;
}
