// Connects with a WebSocket class of a package, to an address where nothing listens and to a node:
//   node node.mjs ws|undici URL_OF_NOTHING URL_OF_A_NODE
// undici is the WebSocket of Node 22. Prints what happens, and ends once both channels had a gap.

import { Fanfare } from "./fanfare.mjs";

const [name, nothing, url] = process.argv.slice(2);
const { WebSocket } = await import(name);

const unreachable = new Fanfare(nothing, { WebSocket });
unreachable.on("error", ({ code, message }) => {
  console.log(`error ${code}: ${message}`);
  unreachable.close();
});

const client = new Fanfare(url, { WebSocket, gapDelay: 100 });
let connections = 0;
client.on("message", ({ text }) => console.log(`message ${text}`));
const room = client.subscribe("room.1");
room.on("message", ({ channel, text }) => console.log(`${channel} ${text}`));
const gaps = [client, room].map((source) => new Promise((resolve) => source.on("gap", resolve)));
Promise.all(gaps).then(() => {
  console.log("gaps");
  client.close();
});
client.on("state", ({ state }) => state === "live" && console.log(`connection ${++connections}`));
await client.send("hello"); // waits for the connection
await room.send("hello");
console.log("sent");
const texts = ["x".repeat(100_000), "after it"]; // a node takes 64 KiB
console.log("codes", ...await Promise.all(texts.map((text) => client.send(text).catch(({ code }) => code))));
