//! A broadcast server of an afternoon: a task per client, and tokio's broadcast channel between
//! them. With a second argument, `batch`, a client that is behind gets all that waits in one write.

use std::env;
use std::error::Error;

use futures_util::{SinkExt, StreamExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::select;
use tokio::sync::broadcast::{self, Sender};
use tokio_tungstenite::accept_async;
use tokio_tungstenite::tungstenite::{Message, Utf8Bytes};

/// Events that wait for the slowest client. One that is further behind is disconnected.
const CAPACITY: usize = 4096;

type Outcome = Result<(), Box<dyn Error + Send + Sync>>;

#[tokio::main]
async fn main() -> Outcome {
    let mut arguments = env::args().skip(1);
    let address = arguments.next().ok_or("the address to listen on is missing")?;
    let batch = arguments.next().is_some_and(|argument| argument == "batch");
    let listener = TcpListener::bind(address).await?;
    let (events, _) = broadcast::channel(CAPACITY);
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(serve(stream, events.clone(), batch));
    }
}

async fn serve(stream: TcpStream, events: Sender<Utf8Bytes>, batch: bool) -> Outcome {
    stream.set_nodelay(true)?;
    let mut received = events.subscribe();
    let (mut sink, mut messages) = accept_async(stream).await?.split();
    loop {
        select! {
            event = received.recv() => {
                sink.feed(Message::Text(event?)).await?;
                while batch && let Ok(event) = received.try_recv() {
                    sink.feed(Message::Text(event)).await?;
                }
                sink.flush().await?;
            }
            message = messages.next() => match message {
                Some(Ok(Message::Text(text))) => drop(events.send(text)),
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Ok(()),
            },
        }
    }
}
