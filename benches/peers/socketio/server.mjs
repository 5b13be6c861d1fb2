// The chat of the Socket.IO tutorial, with the Redis adapter as its documentation sets it up.
import { createServer } from "node:http";
import { createAdapter } from "@socket.io/redis-adapter";
import Redis from "ioredis";
import { Server } from "socket.io";

const publisher = new Redis(process.env.REDIS_URL);
const subscriber = publisher.duplicate();
const http = createServer();
const io = new Server(http, { adapter: createAdapter(publisher, subscriber) });

io.on("connection", (socket) => {
  socket.on("chat message", (message) => io.emit("chat message", message));
});

http.listen(Number(process.env.PORT), "127.0.0.1");
