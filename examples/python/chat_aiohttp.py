"""A chat client with the library aiohttp: python chat_aiohttp.py [URL] [CHANNEL]

Sends each line of stdin and prints each message. Reconnects, and continues after the last message.
"""

import asyncio
import random
import sys
import threading

from aiohttp import ClientError, ClientSession, WSMsgType

FINAL_CODES = {1002, 1003, 1007, 4001, 4003, 4010, 4400, 4401, 4403}  # retrying would fail in the same way


class Chat:
    socket = None
    last_event_id = ""  # empty: a newcomer, who gets the last 10 messages

    async def receive(self, session: ClientSession, url: str, channel: str):
        while True:
            query = {"channel": channel, "history": 10, "lastEventId": self.last_event_id}
            try:
                async with session.ws_connect(url, params=query) as self.socket:
                    async for message in self.socket:
                        if message.type == WSMsgType.TEXT:
                            self.on_frame(message.json())
                print(f"disconnected: {self.socket.close_code}", file=sys.stderr)
                if self.socket.close_code in FINAL_CODES:
                    return
            except (OSError, ClientError) as error:
                print(f"disconnected: {error}", file=sys.stderr)
            await asyncio.sleep(random.uniform(0, 3))  # not all clients at once

    def on_frame(self, frame: dict):
        kind = frame.get("type")
        if "id" in frame:
            self.last_event_id = frame["id"]
            print(f"{frame.get('sender')}: {frame.get('text')}", flush=True)
        elif kind in ("welcome", "reset", "ping"):
            self.last_event_id = frame["lastEventId"]
            if kind == "welcome":
                print("connected", file=sys.stderr)
            if kind == "reset" or frame.get("recovered") is False:
                print("messages may be missing", file=sys.stderr)
        elif kind == "error":
            print(frame["message"], file=sys.stderr)

    async def send(self, text: str):
        try:
            await self.socket.send_str(text)
        except (AttributeError, ConnectionError):
            print("not sent: there is no connection", file=sys.stderr)


async def main(url: str = "ws://127.0.0.1:8080/ws/alice", channel: str = "chat"):
    chat, loop = Chat(), asyncio.get_running_loop()

    def read_lines():
        for line in sys.stdin:
            asyncio.run_coroutine_threadsafe(chat.send(line.rstrip("\n")), loop)

    threading.Thread(target=read_lines, daemon=True).start()
    async with ClientSession() as session:
        await chat.receive(session, url, channel)


asyncio.run(main(*sys.argv[1:]))
