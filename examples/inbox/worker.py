"""A worker of a fanfare inbox: moderates what clients send, and publishes the result.

Start as many as you like with the same group: they share the messages. Each message is worked on at
least once. If a worker dies, another one takes its messages over; a message that fails five times
goes to a dead-letter stream.
"""

import argparse
import json
import logging
import os
import signal
import time
import uuid

import redis

BATCH = 10  # messages taken at once
BLOCK_MS = 2000  # how long a read waits for messages
TRIES = 5  # then a message goes to the dead-letter stream
BAD_WORDS = {"spam", "scam"}

log = logging.getLogger("worker")


def moderate(message: dict) -> tuple[dict, str]:
    """The event to publish, and the user it is for; empty for all subscribers.

    This is the place for your logic: look the user up, store the message, ask a model. It may run
    twice for one message, so use the message's key or id to make that harmless.
    """
    event = json.loads(message["event"])
    text = event.get("text")
    if not isinstance(text, str):
        raise ValueError("a message without text")
    if BAD_WORDS & set(text.lower().split()):
        return {"rejected": text, "reason": "this chat has no place for that"}, message["user"]
    return event, message.get("to", "")


class Worker:
    def __init__(self, client: redis.Redis, channel: str, prefix: str, group: str, take_over_ms: int):
        self.client = client
        self.channel_key = f"{prefix}:{{{channel}}}"
        self.stream = f"{self.channel_key}:inbox"
        self.dead_letters = f"{self.stream}:dead"
        self.group = group
        self.name = uuid.uuid4().hex
        self.take_over_ms = take_over_ms
        self.next_take_over = 0.0
        self.stopping = False

    def stop(self, *_) -> None:
        self.stopping = True

    def run(self) -> None:
        """Works until it is stopped. Redis may be away or restarted meanwhile."""
        log.info("started")
        while not self.stopping:
            try:
                for message_id, fields in self.take_over() or self.read():
                    self.handle(message_id, fields)
            except redis.exceptions.ResponseError as error:
                if not str(error).startswith(("NOGROUP", "UNBLOCKED")):
                    log.warning("redis rejects a command: %s", error)
                    time.sleep(1)
                self.create_group()
            except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
                log.warning("redis is away: %s", error)
                time.sleep(0.5)
        log.info("stopped")

    def create_group(self) -> None:
        """From the start of the stream, so that it skips no message."""
        try:
            self.client.xgroup_create(self.stream, self.group, id="0", mkstream=True)
        except redis.exceptions.RedisError as error:
            if not str(error).startswith("BUSYGROUP"):
                log.warning("no group: %s", error)
                time.sleep(0.5)

    def read(self) -> list:
        found = self.client.xreadgroup(self.group, self.name, {self.stream: ">"}, count=BATCH, block=BLOCK_MS)
        return found[0][1] if found else []

    def take_over(self) -> list:
        """Messages that a worker has taken and not finished: it died, or they failed."""
        if time.monotonic() < self.next_take_over:
            return []
        _, found, _ = self.client.xautoclaim(
            self.stream, self.group, self.name, min_idle_time=self.take_over_ms, count=BATCH
        )
        if not found:
            self.next_take_over = time.monotonic() + self.take_over_ms / 1000
        return found

    def handle(self, message_id: str, fields: dict) -> None:
        try:
            event, user = moderate(fields)
            self.publish(message_id, event, user)
        except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError):
            raise  # it stays in the list of this worker, and is taken over later
        except Exception as error:
            tries = self.tries(message_id)
            log.warning("message %s failed, try %d: %r", message_id, tries, error)
            if tries >= TRIES:
                self.finish(message_id, {**fields, "error": repr(error)})
            return
        self.finish(message_id)
        log.info("handled %s", message_id)

    def tries(self, message_id: str) -> int:
        pending = self.client.xpending_range(self.stream, self.group, min=message_id, max=message_id, count=1)
        return pending[0]["times_delivered"] if pending else 0

    def publish(self, message_id: str, event: dict, user: str) -> None:
        """With the message's id as idempotency key: if this worker dies after it has published, the
        next one publishes nothing twice (for ten minutes)."""
        self.client.fcall(
            "fanfare_publish", 1, self.channel_key, json.dumps(event, ensure_ascii=False), user, f"inbox:{message_id}"
        )

    def finish(self, message_id: str, dead_letter: dict | None = None) -> None:
        """Deletes a message, which also makes room in the inbox."""
        with self.client.pipeline(transaction=True) as commands:
            if dead_letter is not None:
                commands.xadd(self.dead_letters, {**dead_letter, "id": message_id}, maxlen=10_000)
            commands.xack(self.stream, self.group, message_id)
            commands.xdel(self.stream, message_id)
            commands.execute()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("channel")
    parser.add_argument("--prefix", default="fanfare", help="the nodes' --redis-prefix")
    parser.add_argument("--group", default="workers")
    parser.add_argument("--take-over", type=float, default=30, metavar="SECONDS",
                        help="how long a message may be worked on before another worker takes it over")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    url = os.environ.get("REDIS_URL", "redis://127.0.0.1")
    # A read waits for BLOCK_MS, so a connection without an answer for longer is broken.
    client = redis.Redis.from_url(url, decode_responses=True, socket_timeout=BLOCK_MS / 1000 + 3)
    worker = Worker(client, options.channel, options.prefix, options.group, int(options.take_over * 1000))
    signal.signal(signal.SIGTERM, worker.stop)
    signal.signal(signal.SIGINT, worker.stop)
    worker.run()


if __name__ == "__main__":
    main()
