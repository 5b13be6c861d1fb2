"""Signs events for a server with the HTTP API of Pusher Channels, which `fanfare bench` can't: each
POST to this program is signed and passed on.

    sign.py PORT http://HOST:PORT APP_ID KEY SECRET
"""

import hashlib
import hmac
import sys
import time
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import urlsplit

PORT, SERVER, APP_ID, KEY, SECRET = sys.argv[1:]
PATH = f"/apps/{APP_ID}/events"
server = HTTPConnection(urlsplit(SERVER).netloc)


def signed(body):
    """The path and query of a request with this body."""
    query = f"auth_key={KEY}&auth_timestamp={int(time.time())}&auth_version=1.0"
    query += f"&body_md5={hashlib.md5(body).hexdigest()}"
    text = f"POST\n{PATH}\n{query}"
    signature = hmac.new(SECRET.encode(), text.encode(), hashlib.sha256).hexdigest()
    return f"{PATH}?{query}&auth_signature={signature}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server.request("POST", signed(body), body, {"Content-Type": "application/json"})
        answer = server.getresponse()
        text = answer.read()
        self.send_response(answer.status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


HTTPServer(("127.0.0.1", int(PORT)), Handler).serve_forever()
