"""A small OpenAI-compatible server that answers with one of our own models, or misbehaves in one chosen way."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


def ours(messages):
    """OpenAI's messages as ChatModel takes them."""
    out = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            content = [
                {"type": "image", "image": part["image_url"]["url"]} if part["type"] == "image_url" else part
                for part in content
            ]
        out.append({"role": message["role"], "content": content})
    return out


def answer(model, request, *, with_bytes=True, pieces=False):
    """The body of a chat completion; `pieces` spells tokens as the vocabulary does, with their blanks."""
    messages = ours(request["messages"])
    reply = model.chat(messages, max_new_tokens=request["max_tokens"])
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": reply.text},
        "finish_reason": reply.finish,
    }
    if request.get("logprobs"):
        inputs = model.inputs(messages)
        values = torch.log_softmax(model.logits(inputs, positions=[-1])[0], -1)
        best, ids = values.topk(request["top_logprobs"])
        listed = []
        for value, index in zip(best.tolist(), ids.tolist(), strict=True):
            text = model.spec.tokenizer.decode([index], skip_special_tokens=False)
            if pieces:
                text = (model.spec.tokenizer.id_to_token(index) or "").replace("\u2581", " ")
            one = {"token": text, "logprob": value}
            listed.append(one | ({"bytes": list(text.encode())} if with_bytes else {}))
        choice["logprobs"] = {"content": [{**listed[0], "top_logprobs": listed}]}
    usage = {"prompt_tokens": reply.usage["prompt_tokens"], "completion_tokens": len(reply.token_ids)}
    return {"object": "chat.completion", "model": request["model"], "choices": [choice], "usage": usage}


class Mock:
    """What a test may turn: `model` answers; `change(body)` alters each answer; `raw(path)` replaces all of it."""

    def __init__(
        self, model=None, *, names=("tiny",), change=None, raw=None, key=None, with_bytes=True, pieces=False
    ):
        self.model, self.names, self.change, self.raw = model, list(names), change, raw
        self.key, self.with_bytes, self.pieces = key, with_bytes, pieces
        self.requests = []
        self.lock = threading.Lock()  # one model, one thread at a time
        self.url = ""


@contextlib.contextmanager
def serving(mock):
    """Serve on a free port of this machine; yields the mock, whose `url` says where."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def send(self, status, body, headers=()):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(OSError):  # a client that has read enough hangs up
                self.wfile.write(data)

        def handle_one(self, request):
            mock.requests.append((self.path, request, self.headers.get("Authorization")))
            if mock.key is not None and self.headers.get("Authorization") != f"Bearer {mock.key}":
                self.send(401, {"error": {"message": "Unauthorized"}})
                return
            if mock.raw is not None:
                given = mock.raw(self.path, request)
                if given is not None:
                    self.send(*given)
                    return
            if self.path == "/v1/models":
                self.send(200, {"data": [{"id": name, "object": "model"} for name in mock.names]})
            elif self.path == "/v1/chat/completions":
                with mock.lock:
                    body = answer(mock.model, request, with_bytes=mock.with_bytes, pieces=mock.pieces)
                self.send(200, mock.change(body) if mock.change else body)
            else:
                self.send(404, {"detail": "Not Found"})

        def do_GET(self):
            self.handle_one(None)

        def do_POST(self):
            self.handle_one(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    mock.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield mock
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
