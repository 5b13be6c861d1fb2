"""A chat client with the library websocket-client: python chat_websocket_client.py [URL] [CHANNEL]

Sends each line of stdin and prints each message. Reconnects, and continues after the last message.
"""

import json
import random
import sys
import threading
import time
from urllib.parse import urlencode

from websocket import WebSocketApp, WebSocketException

FINAL_CODES = {1002, 1003, 1007, 4001, 4003, 4010, 4400, 4401, 4403}  # retrying would fail in the same way


class Chat:
    app = None
    last_event_id = ""  # empty: a newcomer, who gets the last 10 messages
    close_code = None

    def receive(self, url: str, channel: str):
        while self.close_code not in FINAL_CODES:
            query = {"channel": channel, "history": 10, "lastEventId": self.last_event_id}
            self.app = WebSocketApp(
                f"{url}?{urlencode(query)}", on_message=self.on_message, on_close=self.on_close
            )
            self.app.run_forever()
            time.sleep(random.uniform(0, 3))  # not all clients at once

    def on_message(self, app: WebSocketApp, text: str):
        frame = json.loads(text)
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

    def on_close(self, app: WebSocketApp, code: int | None, reason: str | None):
        self.close_code = code
        print(f"disconnected: {reason}", file=sys.stderr)

    def send(self, text: str):
        try:
            self.app.send_text(text)
        except (AttributeError, OSError, WebSocketException):
            print("not sent: there is no connection", file=sys.stderr)


def main(url: str = "ws://127.0.0.1:8080/ws/alice", channel: str = "chat"):
    chat = Chat()

    def read_lines():
        for line in sys.stdin:
            chat.send(line.rstrip("\n"))

    threading.Thread(target=read_lines, daemon=True).start()
    chat.receive(url, channel)


main(*sys.argv[1:])
