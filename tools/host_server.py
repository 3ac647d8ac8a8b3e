"""Run a real ComfyUI as a subprocess and drive it over its HTTP and websocket interface.

    with HostServer(Path("~/comfy/ComfyUI").expanduser(), base, {"pack": pack_folder}) as server:
        result = server.run(graph)
        result.raise_for_error()
        print(result.outputs)

Models, input, output, custom nodes, user data and database all lie in the server's base directory. ComfyUI's own
folder is only read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import websocket

Graph = dict[str, dict[str, Any]]
END_MESSAGES = ("execution_success", "execution_error", "execution_interrupted")


class HostError(RuntimeError):
    """The server did not start, stopped by itself, or did not answer in time."""


class GraphError(RuntimeError):
    """A graph was refused or failed; the text names the node and what it said."""


@dataclasses.dataclass
class Progress:
    """One progress message: `value` of `maximum` steps of node `node` are done."""

    node: str
    value: float
    maximum: float


@dataclasses.dataclass
class RunResult:
    """The result of one queued graph.

    status: "success", "error" (a node raised), "interrupted" or "invalid" (refused before it ran).
    outputs: per node id, the output that its UI received.
    cached: ids of the nodes whose earlier results were reused.
    executed: ids of the nodes that ran, in order.
    previews: preview images received while the graph ran, as they came.
    announced: messages that belong to no graph, other packs' among them, as (kind, data).
    errors: per node id, the messages of its exception or of its failed validation.
    """

    status: str
    outputs: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    cached: list[str] = dataclasses.field(default_factory=list)
    executed: list[str] = dataclasses.field(default_factory=list)
    progress: list[Progress] = dataclasses.field(default_factory=list)
    previews: list[bytes] = dataclasses.field(default_factory=list)
    announced: list[tuple[str, Any]] = dataclasses.field(default_factory=list)
    errors: dict[str, str] = dataclasses.field(default_factory=dict)
    traceback: str = ""
    seconds: float = 0.0

    def raise_for_error(self) -> RunResult:
        """Return the result itself. Raises GraphError unless the whole graph ran to its end."""
        if self.status != "success" or self.errors:
            raise GraphError(f"graph ended as '{self.status}': {self.errors}\n{self.traceback}")
        return self


def host_version(comfyui: Path) -> str:
    """Return the version of the ComfyUI in this folder."""
    for line in (comfyui / "comfyui_version.py").read_text().splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise HostError(f"{comfyui / 'comfyui_version.py'} names no version")


def host_python() -> str:
    """Return the interpreter for the server: $COMFYUI_PYTHON, else the running one, which has the pack's packages."""
    return os.environ.get("COMFYUI_PYTHON") or sys.executable


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return cast(int, probe.getsockname()[1])


class HostServer:
    """A ComfyUI process, started by `with` or `start()` and ended with it.

    comfyui: folder of the ComfyUI.
    base: its base directory; created where it is missing, kept when the server ends.
    packs: folders of node packs to link into custom_nodes, by their names there.
    environment: variables added to the process's own.
    arguments: further arguments for `main.py`.
    cpu: whether it computes on the CPU, even where there is a GPU.
    start_timeout, run_timeout: seconds until a start or a graph counts as hanging.
    """

    def __init__(
        self,
        comfyui: Path,
        base: Path,
        packs: dict[str, Path],
        environment: dict[str, str] | None = None,
        arguments: Sequence[str] = (),
        start_timeout: float = 300,
        run_timeout: float = 300,
        cpu: bool = True,
    ) -> None:
        self.comfyui = comfyui.resolve()
        self.base = base.resolve()
        self.packs = packs
        self.environment = environment or {}
        self.arguments = [*(["--cpu"] if cpu else []), *arguments]
        self.start_timeout = start_timeout
        self.run_timeout = run_timeout
        self.log_path = self.base / "server.log"
        self.client_id = uuid.uuid4().hex
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: websocket.WebSocket | None = None
        self._port = 0

    def __enter__(self) -> HostServer:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def port(self) -> int:
        """The port of 127.0.0.1 that the server listens on."""
        return self._port

    @property
    def input_folder(self) -> Path:
        return self.base / "input"

    @property
    def output_folder(self) -> Path:
        return self.base / "output"

    def models_folder(self, kind: str) -> Path:
        return self.base / "models" / kind

    def log(self) -> str:
        """Return all that the server has printed since its first start."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def start(self) -> None:
        """Start the process and wait until it serves. Raises HostError, with the end of its log, if it does not."""
        for name in ("input", "output", "temp", "user", "custom_nodes", "models/checkpoints"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        for name, folder in self.packs.items():
            link = self.base / "custom_nodes" / name
            if not link.exists():
                link.symlink_to(folder.resolve(), target_is_directory=True)
        self._port = _free_port()
        command = [
            host_python(), "-u", str(self.comfyui / "main.py"),
            "--port", str(self._port), "--disable-auto-launch", "--disable-api-nodes",
            "--base-directory", str(self.base), "--database-url", f"sqlite:///{self.base / 'user' / 'comfyui.db'}",
            *self.arguments,
        ]  # fmt: skip
        # Existing bytecode is read. A cache of its own would compile PyTorch at each start.
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"} | self.environment
        # Keep the test's import path out of the server.
        environment.pop("PYTHONPATH", None)
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.base,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                # Ctrl-C on the terminal reaches the caller alone, which then stops the server in order.
                start_new_session=True,
            )
        try:
            self._wait_until_serving()
            self._socket = websocket.create_connection(
                f"ws://127.0.0.1:{self._port}/ws?clientId={self.client_id}", timeout=self.run_timeout
            )
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the process, by force after 20 seconds."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def restart(self) -> None:
        """End the process and start a fresh one on the same base directory."""
        self.stop()
        self.start()

    def _wait_until_serving(self) -> None:
        deadline = time.monotonic() + self.start_timeout
        while True:
            self._check_alive()
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, OSError):
                if time.monotonic() > deadline:
                    raise HostError(
                        f"ComfyUI did not serve within {self.start_timeout:.0f} s; its log ends:\n{self._log_tail()}"
                    ) from None
                time.sleep(0.3)

    def _check_alive(self) -> None:
        if self._process is None:
            raise HostError("the server is not running; call start() first")
        code = self._process.poll()
        if code is not None:
            raise HostError(f"ComfyUI ended with exit code {code}; its log ends:\n{self._log_tail()}")

    def _log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log().splitlines()[-lines:])

    def _request(self, path: str, data: Any = None) -> Any:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}{path}", data=body, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=self.run_timeout) as response:  # noqa: S310 - only this server
            answer = response.read()
        return json.loads(answer) if answer.strip() else None

    def get(self, path: str) -> Any:
        """Return the JSON answer to a GET of this path."""
        return self._request(path)

    def post(self, path: str, data: Any) -> Any:
        """Return the JSON answer to a POST of this path."""
        return self._request(path, data)

    def interrupt(self) -> None:
        """Cancel the graph that is running."""
        self.post("/interrupt", {})

    def cancel(self, timeout: float = 20) -> None:
        """Cancel the graph that is running and wait, `timeout` seconds at most, until it has ended."""
        self.interrupt()
        deadline = time.monotonic() + timeout
        while self.get("/queue")["queue_running"] and time.monotonic() < deadline:
            time.sleep(0.1)

    @property
    def process_id(self) -> int:
        """The running server's process id."""
        assert self._process is not None
        return self._process.pid

    def run(
        self, graph: Graph, on_progress: Callable[[Progress], None] | None = None, workflow: Any = None
    ) -> RunResult:
        """Queue an API-format graph and follow it to its end.

        on_progress: called with every progress message, while the graph runs.
        workflow: the graph as the page would send it along; packs read their settings there.
        """
        started = time.monotonic()
        page = {} if workflow is None else {"extra_data": {"extra_pnginfo": {"workflow": workflow}}}
        try:
            answer = self.post("/prompt", {"prompt": graph, "client_id": self.client_id, **page})
        except urllib.error.HTTPError as error:
            refusal = json.loads(error.read())
            return RunResult("invalid", errors=_validation_errors(refusal))
        result = self._follow(answer["prompt_id"], on_progress)
        # Output nodes that fail validation are left out of the run; the others still run.
        result.errors |= _validation_errors(answer)
        result.seconds = time.monotonic() - started
        return result

    def _follow(self, prompt_id: str, on_progress: Callable[[Progress], None] | None) -> RunResult:
        result = RunResult("running")
        deadline = time.monotonic() + self.run_timeout
        while result.status == "running":
            message = self._receive(deadline)
            if isinstance(message, bytes):
                result.previews.append(message)
                continue
            kind, data = message["type"], message["data"]
            if data.get("prompt_id") != prompt_id:
                if "prompt_id" not in data:
                    result.announced.append((kind, data))
                continue
            if kind == "execution_cached":
                result.cached = list(data["nodes"])
            elif kind == "executing" and data["node"] is not None:
                result.executed.append(data["node"])
            elif kind == "executed" and data["output"]:
                result.outputs[data["node"]] = data["output"]
            elif kind == "progress":
                progress = Progress(data["node"], data["value"], data["max"])
                result.progress.append(progress)
                if on_progress is not None:
                    on_progress(progress)
            elif kind == "execution_error":
                result.errors[data["node_id"]] = f"{data['exception_type']}: {data['exception_message']}"
                result.traceback = "".join(data["traceback"])
            if kind in END_MESSAGES:
                result.status = kind.removeprefix("execution_")
        self._wait_for_history(prompt_id, deadline)
        return result

    def _receive(self, deadline: float) -> Any:
        assert self._socket is not None
        while True:
            self._socket.settimeout(2)
            try:
                message = self._socket.recv()
            except websocket.WebSocketTimeoutException:
                self._check_alive()
                if time.monotonic() > deadline:
                    self.interrupt()  # so that the next graph does not wait for this one
                    raise HostError(
                        f"the graph did not end within {self.run_timeout:.0f} s; the log ends:\n{self._log_tail()}"
                    ) from None
                continue
            except (websocket.WebSocketException, OSError) as error:
                time.sleep(1)
                self._check_alive()
                raise HostError(f"the connection broke ({error}); the log ends:\n{self._log_tail()}") from error
            return message if isinstance(message, bytes) else json.loads(message)

    def _wait_for_history(self, prompt_id: str, deadline: float) -> None:
        # The end message is sent before the run is taken off the queue; a next interrupt would hit it there.
        while prompt_id not in self.get(f"/history/{prompt_id}"):
            if time.monotonic() > deadline:
                raise HostError(f"the run {prompt_id} never reached the history")
            time.sleep(0.05)


def _validation_errors(answer: dict[str, Any]) -> dict[str, str]:
    errors = {
        node: "; ".join(f"{error['message']}: {error['details']}" for error in report["errors"])
        for node, report in (answer.get("node_errors") or {}).items()
    }
    if not errors and answer.get("error"):
        errors["graph"] = f"{answer['error']['message']}: {answer['error']['details']}"
    return errors
