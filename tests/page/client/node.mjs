// Connects with a WebSocket class of a package, to an address where nothing listens and to a node:
//   node node.mjs ws|undici URL_OF_NOTHING URL_OF_A_NODE
// undici is the WebSocket of Node 22. Prints what happens, and ends with the first gap.

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
client.on("gap", () => {
  console.log("gap");
  client.close();
});
client.on("state", ({ state }) => state === "live" && console.log(`connection ${++connections}`));
await client.send("hello"); // waits for the connection
console.log("sent");
const texts = ["x".repeat(100_000), "after it"]; // a node takes 64 KiB
console.log("codes", ...await Promise.all(texts.map((text) => client.send(text).catch(({ code }) => code))));
