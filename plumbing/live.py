"""The live page: what runs have logged so far, served to a browser on this machine.

    /                            the page, live.html
    /runs                        a JSON list: the settings of each run that the page needs
    /runs/1?from=BYTES&mark=MARK  the new part of the log of run 1 (runs count from 0)

Only this machine can connect, nothing is ever written, and a run is addressed by its number, never
by a path. The page asks once a second.
"""
import io
import json
import os
import re
import sys
import webbrowser
import zlib
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from plumbing.commands import UserError
from plumbing.files import open_regular
from plumbing.logs import read_settings

PAGE = Path(__file__).with_name("live.html")
ADDRESS = "127.0.0.1"
# The default port, and how many ports are tried from there on if it is taken.
PORT, PORTS = 8765, 20
# A longer log is sent in pieces of this many bytes.
MOST_BYTES = 4_000_000
# A mark is a checksum of this many bytes of a log. Any two logs differ there, at least in the
# seconds that updates took.
MARKED_BYTES = 1000
# How many seconds a browser may take to send its request.
PATIENCE = 10
LOG_REQUEST = re.compile(r"/runs/([0-9]{1,4})(?:\?from=([0-9]{1,15})&mark=([0-9a-f]{1,8}))?")
# A hostile web site may point its own name to this machine, so that the reader's browser asks for
# the logs. Such requests carry that name as their Host and are refused.
LOCAL_HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
# The page may run its own script and query this server, but load nothing else.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src "
                               "'unsafe-inline'; img-src data:; connect-src 'self'; "
                               "base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store"}


# ---- runs --------------------------------------------------------------------------------------

def describe(folder):
    """The settings of a run that the page needs. Raises UserError if the folder holds no run."""
    settings = read_settings(folder)
    description = {"name": settings["name"][:40], "size": settings["size"][:20],
                   "kind": "meta" if settings.get("meta") else "vanilla",
                   "text": settings.get("corpus_sha256")}
    for name in ("steps", "seed", "vocab_size", "n_way", "inner_steps", "unigram", "bigram"):
        value = settings.get(name)
        usable = isinstance(value, (int, float)) and abs(value) < 1e15  # false for NaN
        description[name] = value if usable else None
    if description["n_way"]:
        description["chance"] = 1 / description["n_way"]
    return description


def open_log(path):
    """The log of a run, opened for reading; an empty one if there is none (any more)."""
    try:
        return open_regular(path)
    except (UserError, OSError):
        return io.BytesIO()


def new_lines(path, start, mark):
    """The new part of a log, from byte `start` on, as a dict:

    from   where the lines begin: `start`, or 0 if the log has been replaced, which shows when the
           bytes before `start` do not have the checksum `mark`
    lines  their text; an incomplete last line is left for the next request
    next, mark  what to send with the next request
    more   whether there may be more to read now
    """
    with open_log(path) as log:
        if start and mark_before(log, start) != mark:
            start = 0
        log.seek(start)
        content = log.read(MOST_BYTES)
        more = len(content) == MOST_BYTES
        length = content.rfind(b"\n") + 1
        if more and not length:
            length = MOST_BYTES  # a very long line: skip this piece of it
        lines = content[:length].decode("utf-8", errors="replace").split("\n")[:-1]
        end = start + length
        return {"from": start, "lines": lines, "next": end, "mark": mark_before(log, end),
                "more": more}


def mark_before(log, end):
    """The checksum, in hexadecimal, of the bytes before `end` in an open log."""
    begin = max(0, end - MARKED_BYTES)
    log.seek(begin)
    return f"{zlib.crc32(log.read(end - begin)):x}"


# ---- the server --------------------------------------------------------------------------------

class Handler(BaseHTTPRequestHandler):
    """Answers a request. Methods other than GET have no do_ method, so they are refused."""
    timeout = PATIENCE

    def do_GET(self):
        if not LOCAL_HOST.fullmatch(self.headers.get("Host", "")):
            return self.send_error(HTTPStatus.FORBIDDEN)
        if self.path == "/":
            return self.reply(HTTPStatus.OK, "text/html", PAGE.read_bytes())
        if self.path == "/runs":
            return self.reply_json(self.server.describe_runs())
        found = LOG_REQUEST.fullmatch(self.path)
        if not found or int(found[1]) >= len(self.server.folders):
            return self.send_error(HTTPStatus.NOT_FOUND)
        folder = self.server.folders[int(found[1])]
        start, mark = int(found[2] or 0), found[3]
        self.reply_json(new_lines(folder / "metrics.jsonl", start, mark))

    def reply_json(self, value):
        self.reply(HTTPStatus.OK, "application/json", json.dumps(value).encode())

    def reply(self, status, kind, content):
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_error(self, code, message=None, explain=None):
        """Also called by the base class, for requests that it cannot read."""
        if code == HTTPStatus.NOT_IMPLEMENTED:
            code = HTTPStatus.METHOD_NOT_ALLOWED
        status = HTTPStatus(code)
        self.close_connection = True
        self.reply(status, "text/plain", f"{status.value} {status.phrase}\n".encode())

    def log_message(self, *args):
        """Print nothing: the page asks every second."""


class Server(ThreadingHTTPServer):
    """Serves the runs in folders. Raises UserError if one is not a run, OSError if the port cannot
    be used."""
    # On Windows this would share a port with another server instead of finding it taken.
    allow_reuse_address = os.name == "posix"
    allow_reuse_port = False

    def __init__(self, folders, port):
        self.folders = folders
        self.descriptions = [describe(folder) for folder in folders]
        super().__init__((ADDRESS, port), Handler)

    def describe_runs(self):
        """A description of each run; the last one known, if its folder is gone or damaged."""
        for number, folder in enumerate(self.folders):
            try:
                self.descriptions[number] = describe(folder)
            except (UserError, OSError):
                pass
        return self.descriptions

    def handle_error(self, request, client_address):
        """A browser that disconnects, or waits for too long, is not an error."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


def open_server(folders, port):
    """A Server on this port. With None it is PORT or, if that is taken, the next free one. Raises
    UserError."""
    ports = range(PORT, PORT + PORTS) if port is None else [port]
    for candidate in ports:
        try:
            server = Server(folders, candidate)
        except OSError as error:
            reason = error.strerror
            continue
        if port is None and candidate != PORT:
            print(f"note: port {PORT} is taken", file=sys.stderr)
        return server
    raise UserError(f"port {candidate} cannot be used ({reason}): choose another --port")


def has_display():
    if sys.platform in ("darwin", "win32"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def serve(folders, port=None):
    """Serve the live page of the runs in folders (paths) until Ctrl-C. Raises UserError."""
    with open_server(folders, port) as server:
        port = server.server_address[1]
        address = f"http://{ADDRESS}:{port}/"
        print(f"{address}   (Ctrl-C stops the server)", flush=True)
        if has_display():
            webbrowser.open(address)
        else:
            print(f"from another machine: run ssh -L {port}:{ADDRESS}:{port} THIS-MACHINE there, "
                  "then open the same address", flush=True)
        server.serve_forever()
