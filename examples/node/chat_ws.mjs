// A chat client with the library ws: node chat_ws.mjs [URL] [CHANNEL]
// Sends each line of stdin and prints each message. Reconnects, and continues after the last message.

import { createInterface } from "node:readline";
import WebSocket from "ws";

const FINAL_CODES = [1002, 1003, 1007, 4001, 4003, 4010, 4400, 4401, 4403]; // retrying would fail in the same way

const [url = "ws://127.0.0.1:8080/ws/alice", channel = "chat"] = process.argv.slice(2);
let lastEventId = ""; // empty: a newcomer, who gets the last 10 messages
let socket;

function connect() {
  const query = new URLSearchParams({ channel, history: 10, lastEventId });
  socket = new WebSocket(`${url}?${query}`);
  socket.on("message", (data) => onFrame(JSON.parse(data)));
  socket.on("error", ({ message }) => console.error(`error: ${message}`)); // a close follows
  socket.on("close", (code, reason) => {
    console.error(`disconnected: ${code} ${reason}`);
    if (FINAL_CODES.includes(code)) process.exit(1);
    setTimeout(connect, Math.random() * 3000); // not all clients at once
  });
}

function onFrame(frame) {
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
}

createInterface({ input: process.stdin }).on("line", (line) => {
  if (socket.readyState === WebSocket.OPEN) socket.send(line);
  else console.error("not sent: there is no connection");
});
connect();
