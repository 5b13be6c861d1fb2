"""The publish/subscribe example of uWebSockets, by its Python binding: the C++ library does the
handshakes, the frames and the fan-out, Python runs once per published message."""

import os

from socketify import App, AppListenOptions, CompressOptions, OpCode

CHANNEL = "broadcast"
app = App()
app.ws(
    "/ws/:id",
    {
        "compression": CompressOptions.DISABLED,
        "max_payload_length": 1 << 20,
        # Above this many bytes that wait for a client, events for it are dropped. Default: 64 KiB.
        "max_backpressure": 16 << 20,
        "idle_timeout": 120,
        "open": lambda ws: ws.subscribe(CHANNEL),
        "message": lambda _ws, message, _opcode: app.publish(CHANNEL, message, OpCode.TEXT),
    },
)
app.listen(AppListenOptions(port=int(os.environ["PORT"]), host="127.0.0.1"))
# app.run() polls the sockets from asyncio, without a pause while there are events. Nothing here needs
# asyncio: the library's own loop sleeps until a socket is ready, as it does in C++.
app.loop.uv_loop.run()
