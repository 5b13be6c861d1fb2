// A chat client with the library reconnecting-websocket: node chat_reconnecting.mjs [URL] [CHANNEL]
// Sends each line of stdin and prints each message. Reconnects, and continues after the last message.
// In a page leave out the option WebSocket, and take lines from a form.

import { createInterface } from "node:readline";
import ReconnectingWebSocket from "reconnecting-websocket";
import WebSocket from "ws";

const FINAL_CODES = [1002, 1003, 1007, 4001, 4003, 4010, 4400, 4401, 4403]; // retrying would fail in the same way

const [url = "ws://127.0.0.1:8080/ws/alice", channel = "chat"] = process.argv.slice(2);
let lastEventId = ""; // empty: a newcomer, who gets the last 10 messages

// Called before each attempt, so that each continues after the last message.
const address = () => `${url}?${new URLSearchParams({ channel, history: 10, lastEventId })}`;
const socket = new ReconnectingWebSocket(address, [], { WebSocket });

socket.addEventListener("message", ({ data }) => {
  const frame = JSON.parse(data);
  if (frame.id !== undefined) {
    lastEventId = frame.id;
    console.log(`${frame.sender}: ${frame.text}`);
  } else if (["welcome", "reset", "ping"].includes(frame.type)) {
    lastEventId = frame.lastEventId;
    if (frame.type === "welcome") console.error("connected");
    if (frame.type === "reset" || frame.recovered === false) console.error("messages may be missing");
  } else if (frame.type === "error") {
    console.error(frame.message);
  }
});
socket.addEventListener("close", ({ code, reason }) => {
  console.error(`disconnected: ${code} ${reason}`);
  if (FINAL_CODES.includes(code)) socket.close(); // no further attempt
});

// What is sent while there is no connection is sent once there is one.
createInterface({ input: process.stdin }).on("line", (line) => socket.send(line));
