// What must type-check, and what must not. Never run.

import WebSocket from "ws";
import { Fanfare, type FanfareError, type FanfareEvent, type FanfareSubscription } from "./fanfare.mjs";

const client = new Fanfare("ws://127.0.0.1:8080/ws/alice", {
  channel: "news",
  history: 10,
  lastEventId: localStorage.getItem("last"),
  token: async () => "a token",
  gapDelay: 1_000,
  WebSocket,
});
new Fanfare(new URL("wss://host/ws/alice"), { WebSocket: globalThis.WebSocket });

const off: () => void = client.on("message", (event: FanfareEvent, { recovered }) => recovered && event.text);
client.on("state", (change) => change.state === "waiting" && change.delay.toFixed());
client.on("error", (error: FanfareError | Error) => error.message);
client.on("gap", ({ lastEventId, from }) => [lastEventId.toFixed(), from === "reset"]);
const id: number | string = await client.send("text"); // a string from an inbox
for (const message of [{ text: "to all" }, { text: "to one", to: "bob" }, { data: [1], to: "bob" }]) client.send(message);

client.send({ text: "to a channel", channel: "room.1" });

const room: FanfareSubscription = client.subscribe("room.1", { lastEventId: localStorage.getItem("room"), history: 10 });
room.on("message", ({ channel, text }, { recovered }) => [channel, text, recovered]);
room.on("state", (change) => change.state === "closed" && (change.code === "forbidden" || change.code === 4403));
const position: number | null = room.lastEventId;
await room.send({ data: 1 });
room.close();
new Fanfare("/ws/alice", { channel: null }).setToken(async () => "a token");
client.setToken("another token");

type Order = { order: number };
client.subscribe<Order>("orders").on("message", ({ order }) => order.toFixed());
new Fanfare<Order>("/ws/alice").on("message", ({ order }) => order.toFixed());

// @ts-expect-error either text or data
client.send({ text: "a", data: 1 });
// @ts-expect-error neither
client.send({ to: "bob" });
// @ts-expect-error no text
client.send({ text: 1 });
// @ts-expect-error no such option
new Fanfare("/ws/alice", { lastEventID: 1 });
// @ts-expect-error no such event
client.on("open", () => {});
// @ts-expect-error not a WebSocket
new Fanfare("/ws/alice", { WebSocket: URL });

// @ts-expect-error no channel
client.subscribe();
// @ts-expect-error an option of the client
client.subscribe("room.1", { token: "a token" });
// @ts-expect-error not its own channel
room.send({ text: "a", channel: "room.2" });
// @ts-expect-error read-only
room.channel = "room.2";
// @ts-expect-error not opened by itself
new FanfareSubscription("room.1");

export { id, off, position };
