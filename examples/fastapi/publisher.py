"""A FastAPI backend: an order that is posted here reaches every client in the channel `orders`."""

import asyncio
import os
import uuid
from contextlib import asynccontextmanager

import httpx
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

# The admin listener of any node. Nodes on one Redis publish to the clients of all of them.
ADMIN_URL = os.environ.get("ADMIN_URL", "http://127.0.0.1:9080")
ADMIN_KEY = os.environ.get("ADMIN_KEY")  # the content of the node's --admin-key file, if it has one

RETRY_DELAYS = (0.2, 1.0, 3.0)  # seconds


@asynccontextmanager
async def lifespan(app: FastAPI):
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"} if ADMIN_KEY else {}
    # Longer than the node's --publish-timeout, so that the node answers first.
    async with httpx.AsyncClient(base_url=ADMIN_URL, headers=headers, timeout=10) as client:
        app.state.admin = client
        yield


app = FastAPI(lifespan=lifespan)


async def publish(channel: str, event: dict, to: str | None = None) -> int:
    """Publishes an event, to all subscribers or to one user, and returns its id.

    After a 504 or a lost connection it is unknown whether the event was published. All attempts
    carry the same idempotency key, so a retry never publishes it twice.
    """
    params = {"channel": channel} if to is None else {"channel": channel, "to": to}
    headers = {"Idempotency-Key": str(uuid.uuid4())}
    for delay in (*RETRY_DELAYS, None):
        try:
            answer = await app.state.admin.post("/publish", params=params, json=event, headers=headers)
            if answer.status_code not in (503, 504):
                answer.raise_for_status()
                return answer.json()["id"]
        except httpx.TransportError:
            pass
        if delay is not None:
            await asyncio.sleep(delay)
    raise HTTPException(503, "the event could not be published")


class Order(BaseModel):
    item: str
    quantity: int = 1


@app.post("/orders", status_code=201)
async def create_order(order: Order):
    # A real backend stores the order before it publishes it.
    return {"id": await publish("orders", {"order": order.model_dump()})}
