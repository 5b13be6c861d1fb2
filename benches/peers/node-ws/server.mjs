// The broadcast example of ws, with Redis Pub/Sub between servers by ioredis.
import Redis from "ioredis";
import WebSocket, { WebSocketServer } from "ws";

const CHANNEL = "ws_broadcast";
const publisher = new Redis(process.env.REDIS_URL);
const subscriber = new Redis(process.env.REDIS_URL);
await subscriber.subscribe(CHANNEL);

const server = new WebSocketServer({ host: "127.0.0.1", port: Number(process.env.PORT) });

server.on("connection", (socket) => {
  socket.on("error", console.error);
  socket.on("message", (message) => publisher.publish(CHANNEL, message.toString()));
});

subscriber.on("message", (_channel, message) => {
  for (const client of server.clients) {
    if (client.readyState === WebSocket.OPEN) client.send(message);
  }
});
