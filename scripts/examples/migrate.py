#!/usr/bin/env python3
"""migrate.py VM QMP HOST:PORT: moves a guest by pagecopyd's API, as an orchestrator would, with Python's own library.

PAGECOPY_API is the API's socket. Ends as `pagecopy migrate` does: 0 moved, 1 failed, 3 cancelled, 4 in doubt.
"""

import http.client
import json
import os
import socket
import sys
import time
import uuid

API = os.environ.get("PAGECOPY_API", "/run/pagecopy/api.sock")
EXIT = {"completed": 0, "cancelled": 3, "in-doubt": 4}


class Connection(http.client.HTTPConnection):
    """HTTP over the API's unix socket."""

    def __init__(self):
        super().__init__("localhost")

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(API)


class Refused(Exception):
    """An answer that is a problem of RFC 9457."""

    def __init__(self, problem):
        super().__init__(f"{problem['detail']}\nwhat to do: {problem['remedy']}")
        self.type = problem["type"]


def ask(method, path, body=None, headers=None):
    """Sends a request, and returns the answer to read from."""
    connection = Connection()
    text = None if body is None else json.dumps(body)
    connection.request(method, path, text, {"Content-Type": "application/json", **(headers or {})})
    answer = connection.getresponse()
    if answer.status >= 400:
        raise Refused(json.load(answer))
    return answer


def begin(vm, qmp, to):
    """Begins a migration once, however often the request must be sent. Its id."""
    key = str(uuid.uuid4())
    for attempt in range(5):
        try:
            request = {"vm": vm, "qmp": qmp, "to": to}
            return json.load(ask("POST", "/v1/migrations", request, {"Idempotency-Key": key}))["id"]
        except (OSError, http.client.HTTPException):
            if attempt == 4:
                raise
            time.sleep(2**attempt)


def events(migration):
    """The events of a migration up to `finished`; a connection that breaks is made again."""
    seen = 0
    while True:
        try:
            for line in ask("GET", f"/v1/migrations/{migration}/events"):
                if not line.startswith(b"data:"):
                    continue
                event = json.loads(line[5:])
                # What has been comes again with each connection, in order, but for progress.
                if event["at_ms"] < seen:
                    continue
                seen = event["at_ms"]
                yield event
                if event["event"] == "finished":
                    return
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(1)


def main():
    if len(sys.argv) != 4:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        migration = begin(*sys.argv[1:])
        print(f"migration {migration}", flush=True)
        for event in events(migration):
            if event["event"] == "state":
                print(event["state"], flush=True)
            elif event["event"] == "round":
                print(f"round {event['round']}: {event['decision']}", flush=True)
            elif event["event"] == "finished":
                print(f"{event['status']}: {event['error'] or ''}", flush=True)
                return EXIT.get(event["status"], 1)
    except Refused as refused:
        print(f"refused: {refused}", file=sys.stderr)
    except OSError as error:
        print(f"pagecopyd cannot be reached at {API}: {error}", file=sys.stderr)
    return 1


sys.exit(main())
