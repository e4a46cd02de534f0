"""A server of language models in a thread of the test: answers are a function of path and body."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from prefopt.inference.generate import end_token_ids


class Asked(list):
    """What was asked: (path, body, headers) of each request; `address` is where."""

    address: str


@contextmanager
def serving(answer: Callable[[str, dict[str, Any] | None], Any]) -> Iterator[Asked]:
    """The server, while the block runs. `answer(path, body)` gives what is sent as JSON, or (status, JSON or text)."""
    asked = Asked()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(None)

        def do_POST(self):
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, body):
            asked.append((self.path, body, dict(self.headers)))
            result = answer(self.path, body)
            status, content = result if isinstance(result, tuple) else (200, result)
            self.send_response(status)
            if status == 302:
                self.send_header("Location", content)
            text = content if isinstance(content, str) else json.dumps(content)
            self.end_headers()
            # Who asked may have given up.
            with suppress(BrokenPipeError):
                self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    asked.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def vllm(name: str, model: Any, tokenizer: Any, **of_model: Any) -> Callable[[str, dict[str, Any] | None], Any]:
    """As vLLM's server answers, from one forward per token: ids in and out, seeds, ends, biases, likelihoods of prompts."""
    ends_of_model = end_token_ids(model, tokenizer)

    def logps(ids):
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].log_softmax(-1)

    def answer(path, body):
        if path == "/v1/models":
            return {"data": [{"id": name, **of_model}]}
        assert path == "/v1/completions"
        if body["model"] != name:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        ids, new, random = list(body["prompt"]), [], torch.Generator().manual_seed(body.get("seed", 0))
        choice = {"finish_reason": "length"}
        if "prompt_logprobs" in body:
            known = logps(ids)
            rest = [{str(token): {"logprob": known[t, token].item()}} for t, token in enumerate(ids[1:])]
            choice["prompt_logprobs"] = [None, *rest]
        ends = body.get("stop_token_ids", []) + ([] if body.get("ignore_eos") else ends_of_model)
        while len(new) < body["max_tokens"]:
            scores = logps(ids + new)[-1]
            for token, bias in body.get("logit_bias", {}).items():
                scores[int(token)] += bias
            if temperature := body.get("temperature", 1.0):
                new.append(int(torch.multinomial((scores / temperature).softmax(-1), 1, generator=random)))
            else:
                new.append(int(scores.argmax()))
            if new[-1] in ends:
                choice["finish_reason"] = "stop"
                break
        if body.get("return_token_ids"):
            choice["token_ids"] = new
        return {"choices": [{**choice, "text": tokenizer.decode(new, skip_special_tokens=True)}]}

    return answer
