// Follows a channel and prints each event as a line of JSON: node client.mjs [URL] [CHANNEL]

import WebSocket from "ws";
import { Fanfare } from "./fanfare.mjs"; // curl -o fanfare.mjs http://127.0.0.1:8080/fanfare.js

const [url = "ws://127.0.0.1:8080/ws/reporter", channel = "orders"] = process.argv.slice(2);
const client = new Fanfare(url, { channel, WebSocket }); // Node has its own only from version 22 on

client.on("message", (event) => console.log(JSON.stringify(event)));
// Events may be missing: load the state again from where it is stored.
client.on("gap", ({ lastEventId }) => console.error(`gap before ${lastEventId}`));
// The client reconnects by itself and continues after the last event.
client.on("state", ({ state, reason }) => console.error(reason ? `${state}: ${reason}` : state));
client.on("error", ({ code, message }) => console.error(`error ${code}: ${message}`));

process.once("SIGINT", () => client.close());
