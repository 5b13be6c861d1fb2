"""The chat server of FastAPI and redis-py tutorials: a list of sockets in the process, and a task
that sends them what arrives on a Redis channel. LISTENER=sleep is the loop with a pause of 10 ms
after each look at the subscription, which many of them have."""

import asyncio
import os
from contextlib import asynccontextmanager

import redis.asyncio as redis
from fastapi import FastAPI, WebSocket, WebSocketDisconnect

CHANNEL = "ws_broadcast"


class ConnectionManager:
    def __init__(self):
        self.active_connections: list[WebSocket] = []

    async def connect(self, websocket: WebSocket):
        await websocket.accept()
        self.active_connections.append(websocket)

    def disconnect(self, websocket: WebSocket):
        if websocket in self.active_connections:
            self.active_connections.remove(websocket)

    async def broadcast(self, message: str):
        # A copy, and a try: without them one client that leaves ends the listener.
        for connection in list(self.active_connections):
            try:
                await connection.send_text(message)
            except (WebSocketDisconnect, RuntimeError):
                self.disconnect(connection)


manager = ConnectionManager()
client = redis.from_url(os.environ["REDIS_URL"], decode_responses=True)


async def listen(pubsub):
    async for message in pubsub.listen():
        if message["type"] == "message":
            await manager.broadcast(message["data"])


async def listen_with_sleep(pubsub):
    while True:
        message = await pubsub.get_message(ignore_subscribe_messages=True)
        if message:
            await manager.broadcast(message["data"])
        await asyncio.sleep(0.01)


@asynccontextmanager
async def lifespan(_app):
    pubsub = client.pubsub()
    await pubsub.subscribe(CHANNEL)
    listener = listen_with_sleep if os.environ.get("LISTENER") == "sleep" else listen
    task = asyncio.create_task(listener(pubsub))
    yield
    task.cancel()


app = FastAPI(lifespan=lifespan)


@app.websocket("/ws/{client_id}")
async def websocket_endpoint(websocket: WebSocket, client_id: str):
    await manager.connect(websocket)
    try:
        while True:
            text = await websocket.receive_text()
            await client.publish(CHANNEL, f"Client #{client_id} says: {text}")
    except WebSocketDisconnect:
        manager.disconnect(websocket)
