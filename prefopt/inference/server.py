"""A language model behind an address: a running `vllm serve`, or any server that speaks OpenAI's API. Without torch."""

import http.client
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from prefopt.errors import UserError

logger = logging.getLogger(__name__)
T, R = TypeVar("T"), TypeVar("R")

# The name that OpenAI's own client reads, and with it every server's documentation.
KEY = "OPENAI_API_KEY"
# A server that is busy, starting again or behind a proxy that is.
PASSING = {408, 425, 429, 500, 502, 503, 504}


class Server:
    """One server, asked with patience: what may pass is asked again, anything else is an error of one sentence.

    The API key is `OPENAI_API_KEY` of the environment, where that is set.

    Args:
        address: "http://host:8000" or with the path that the API begins at ("https://host/api/v1"); default: "/v1".
        timeout: seconds to wait for an answer.
        tries: how often the same is asked before it is given up; the waits between double from `wait` seconds on.

    Raises:
        UserError: the address is none, or holds a password.

    >>> Server("http://localhost:8000").address, Server("https://host/api/v1/").address
    ('http://localhost:8000/v1', 'https://host/api/v1')
    """

    def __init__(self, address: str, *, timeout: float = 600.0, tries: int = 5, wait: float = 1.0) -> None:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise UserError(f"engine: {address!r} is no address; expected one like http://localhost:8000")
        if parts.username or parts.password:
            raise UserError(f"engine: leave the password out of the address, and put a key into {KEY}")
        self.address = address.rstrip("/") if parts.path.strip("/") else f"{address.rstrip('/')}/v1"
        self.timeout, self.tries, self.wait = timeout, tries, wait
        # The key would go on to where a redirection leads.
        self._opener = build_opener(_NoRedirection)

    def models(self) -> list[dict[str, Any]]:
        """What the server serves: `id` of each, and of vLLM `root` (the folder) and `max_model_len`."""
        # Whether anybody is there is answered at once.
        found = self.ask("/models", tries=1).get("data")
        if not isinstance(found, list):
            raise UserError(f"{self.address}/models: not the answer of a server that speaks OpenAI's API")
        return [model for model in found if isinstance(model, dict)]

    def model(self, *names: str) -> dict[str, Any]:
        """The served model that has one of the names as its `id`, or as the folder that vLLM has loaded.

        Raises:
            UserError: none has; another model is not asked in its place.
        """
        served = self.models()
        wanted = {os.path.realpath(name) for name in names if os.path.exists(name)}
        for model in served:
            root = str(model.get("root") or "")
            if model.get("id") in names or root in names or (root and os.path.realpath(root) in wanted):
                return model
        raise UserError(
            f"{self.address} serves {', '.join(str(model.get('id')) for model in served) or 'no model'}, and not {names[0]}; "
            f"start it with that model (vLLM: --served-model-name {names[0]}, of an adapter --lora-modules {names[0]}=FOLDER)"
        )

    def ask(self, path: str, body: dict[str, Any] | None = None, *, tries: int | None = None) -> dict[str, Any]:
        """The answer to a request, a GET without a body.

        Raises:
            UserError: the server refuses it, or nothing answers after all tries.
        """
        url, tries = self.address + path, tries or self.tries
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        for number in range(1, tries + 1):
            pause = self.wait * 2 ** (number - 1)
            try:
                with self._opener.open(Request(url, data, headers), timeout=self.timeout) as reply:
                    return dict(json.load(reply))
            except HTTPError as error:
                reason = _refusal(error)
                if error.code not in PASSING:
                    raise UserError(f"{url}: {reason}") from None
                pause = max(pause, _seconds(error.headers.get("Retry-After")))
            except (OSError, http.client.HTTPException, ValueError, TypeError) as error:
                reason = self._silence(error)
            if number < tries:
                logger.warning("%s: %s; asked again in %g s (%d of %d)", url, reason, pause, number + 1, tries)
                time.sleep(pause)
        times = "" if tries == 1 else f", {tries} times"
        raise UserError(f"{url}: {reason}{times}; start the server, or name its address in `engine`")

    def choice(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The one answer of a completion, written or said."""
        choices = self.ask(path, body).get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise UserError(f"{self.address}{path}: an answer without choices")
        return choices[0]

    def chat(self, model: str, messages: Sequence[dict[str, Any]], *, max_tokens: int, **options: Any) -> str:
        """What the model says to messages; `temperature` is 0 unless `options` has another.

        >>> Server("http://localhost:8000").chat("m", [{"role": "user", "content": "Hi"}], max_tokens=8)  # doctest: +SKIP
        'Hello!'
        """
        body = {"model": model, "messages": list(messages), "max_tokens": max_tokens, "temperature": 0.0, **options}
        return str((self.choice("/chat/completions", body).get("message") or {}).get("content") or "")

    def _silence(self, error: Exception) -> str:
        """Why there was no answer."""
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, ConnectionRefusedError):
            return "nothing answers there (connection refused)"
        if isinstance(reason, TimeoutError):
            return f"no answer within {self.timeout:g} s"
        if isinstance(reason, ValueError | TypeError):
            return "the answer is no JSON"
        return f"no answer ({reason})"


def in_parallel(ask: Callable[[T], R], questions: Iterable[T], workers: int) -> list[R]:
    """`ask` of all questions, `workers` of them at a time; the first error ends it, and what was not asked yet is not.

    >>> in_parallel(lambda x: x * x, [1, 2, 3], workers=2)
    [1, 4, 9]
    """
    pool = ThreadPoolExecutor(max_workers=max(1, workers))
    try:
        return list(pool.map(ask, questions))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class _NoRedirection(HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _refusal(error: HTTPError) -> str:
    """What the server says of a request that it does not take."""
    text = error.read(4000).decode("utf-8", "replace").strip()
    try:
        said = json.loads(text)
        said = said.get("error", said)
        text = said if isinstance(said, str) else str(said.get("message", said))
    except (ValueError, AttributeError):
        text = text.splitlines()[0] if text else str(error.reason)
    remedy = f"; put the server's key into the environment as {KEY}" if error.code in (401, 403) else ""
    return f"{error.code} {text[:300]}{remedy}"


def _seconds(text: str | None) -> float:
    """Of a `Retry-After`, which may also be a date, at most a minute.

    >>> _seconds("2"), _seconds(None), _seconds("Wed, 21 Oct 2026 07:28:00 GMT"), _seconds("9999")
    (2.0, 0.0, 0.0, 60.0)
    """
    return min(float(text), 60.0) if text and text.isdigit() else 0.0
