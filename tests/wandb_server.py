"""A server on this machine that takes what the client of Weights & Biases sends, for tests of what arrives.

It answers the requests that wandb 0.31 makes for runs, resumed runs, ``wandb sync`` and saved workspaces, and keeps
everything in memory. It is not that server: whatever it was not written for gets an error.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "somebody"


@dataclass
class StoredRun:
    """What arrived of one run.

    Attributes:
        fields: display name, group, type, configuration and project as they were last sent.
        files: the lines of the streamed files; ``wandb-history.jsonl`` holds the logged rows.
        exit_code: None as long as it did not end.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[int, str]] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for _, line in sorted(self.files.get("wandb-history.jsonl", {}).items())]

    @property
    def summary(self) -> dict[str, Any]:
        lines = self.files.get("wandb-summary.json", {})
        return json.loads(lines[max(lines)]) if lines else {}


class Server(ThreadingHTTPServer):
    """Runs by their identifiers, views by their names, and the paths of uploaded files."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs: dict[str, StoredRun] = {}
        self.views: dict[str, dict[str, Any]] = {}
        self.uploads: dict[str, bytes] = {}
        self.unanswered: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer({})

    def do_PUT(self) -> None:
        self.server.uploads[self.path] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        if self.path.endswith("/file_stream"):
            self._stream(self.path.split("/")[-2], json.loads(body))
        elif self.path == "/graphql":
            self._graphql(json.loads(body))
        else:
            # Telemetry.
            self._answer({})

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length")
        if length is not None:
            body = self.rfile.read(int(length))
        else:
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _answer(self, tree: Any) -> None:
        body = json.dumps(tree).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, name: str, sent: dict[str, Any]) -> None:
        run = self.server.runs[name]
        for file, part in (sent.get("files") or {}).items():
            lines = run.files.setdefault(file, {})
            lines.update(enumerate(part["content"], start=part["offset"]))
        if sent.get("complete"):
            run.exit_code = sent.get("exitcode")
        self._answer({"exitcode": None, "limits": {}})

    def _graphql(self, sent: dict[str, Any]) -> None:
        found = re.search(r"\b(?:query|mutation)\s+(\w+)", sent["query"])
        operation = found[1] if found else "?"
        variables = sent.get("variables") or {}
        answer = getattr(self, f"_{operation}", None)
        if answer is None:
            self.server.unanswered.append(operation)
            self._answer({"data": None, "errors": [{"message": f"{operation} is not known here"}]})
        else:
            self._answer({"data": answer(variables.get("input", variables))})

    # What follows is named as the client names its requests.

    def _Viewer(self, sent: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        viewer = {"id": "1", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer}

    _GetDefaultEntity = _Viewer

    def _ServerFeaturesQuery(self, sent: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"serverInfo": {"features": []}}

    def _RunStoppedStatus(self, sent: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"project": {"run": {"stopped": False}}}

    def _RunResumeStatus(self, sent: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        name, run = sent["name"], self.server.runs.get(sent["name"])
        model: dict[str, Any] = {"id": "P", "name": sent.get("project"), "entity": {"id": "E", "name": ENTITY}}
        if run is None:
            return {"model": model | {"bucket": None}}
        history = [line for _, line in sorted(run.files.get("wandb-history.jsonl", {}).items())]
        events = [line for _, line in sorted(run.files.get("wandb-events.jsonl", {}).items())]
        bucket = {
            "id": _identifier(name),
            "name": name,
            "displayName": run.fields.get("displayName"),
            "summaryMetrics": json.dumps(run.summary),
            "logLineCount": len(run.files.get("output.log", {})),
            "historyLineCount": len(history),
            "eventsLineCount": len(events),
            "historyTail": json.dumps(history[-1:]),
            "eventsTail": json.dumps(events[-1:]),
            "config": run.fields.get("config", "{}"),
            "tags": [],
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {"model": model | {"bucket": bucket}}

    def _UpsertBucket(self, sent: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        name = sent["name"]
        new = name not in self.server.runs
        run = self.server.runs.setdefault(name, StoredRun())
        run.fields |= {key: value for key, value in sent.items() if value}
        project = {"id": "P", "name": run.fields.get("project"), "entity": {"id": "E", "name": ENTITY}}
        bucket = {
            "id": _identifier(name),
            "name": name,
            "displayName": run.fields.get("displayName") or name,
            "description": "",
            "config": run.fields.get("config", "{}"),
            "sweepName": None,
            "historyLineCount": len(run.files.get("wandb-history.jsonl", {})),
            "project": project,
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": new}}

    def _CreateRunFiles(self, sent: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        files = [{"name": file, "uploadUrl": f"{self.server.url}/{sent['run']}/{file}"} for file in sent["files"]]
        return {"createRunFiles": {"runID": sent["run"], "uploadHeaders": [], "files": files}}

    def _UpsertView2(self, sent: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        name = sent["name"]
        self.server.views[name] = sent | {"spec": json.loads(sent["spec"])}
        return {"upsertView": {"view": {"id": f"view-{name}", "name": name}, "inserted": True}}


def _identifier(name: str) -> str:
    return base64.b64encode(name.encode()).decode()
