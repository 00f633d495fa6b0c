"""Questions to any OpenAI-compatible endpoint: retried, cached on disk, tokens counted.

The base URL and the key come from OPENAI_BASE_URL and OPENAI_API_KEY and are never written
anywhere. Retries with back-off are the openai package's own (429, 5xx, timeouts, lost connections;
it honours Retry-After).
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groundkern.trainer.config import ConfigError
from groundkern.trainer.prepare.pipeline import write_image as write_bytes
from groundkern.trainer.prepare.reading import plain_json
from groundkern.trainer.prepare.shards import own_output

if TYPE_CHECKING:
    import argparse

    from openai import OpenAI

USAGE = "usage.jsonl"


class EndpointError(BaseException):
    """The endpoint does not serve: a reason to stop the run, as Ctrl-C is, and not a bad sample."""


class RefusedRequest(ValueError):
    """This one request cannot be answered, however long one waits."""


@dataclass(frozen=True)
class ChatSettings:
    """Which model is asked, and how.

    Args:
        model: as the endpoint names it.
        cache: folder of answers by request, and of `usage.jsonl`.
        temperature: of sampling.
        max_retries: of one request, with back-off.
        timeout: seconds that one request may take.
    """

    model: str
    cache: Path
    temperature: float = 0.0
    max_retries: int = 6
    timeout: float = 120.0


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `chat_settings` and `show_usage` read."""
    group = parser.add_argument_group(
        "endpoint", "OPENAI_BASE_URL and OPENAI_API_KEY say where it is; --workers ask at once"
    )
    group.add_argument("--model", help="model to ask, as the endpoint names it")
    group.add_argument("--temperature", type=float, default=0.0, help="of sampling")
    group.add_argument("--attempts", type=int, default=2, help="tries for an answer that is valid")
    group.add_argument("--max-retries", type=int, default=6, help="of a request that fails")
    group.add_argument("--timeout", type=float, default=120.0, help="seconds for one request")
    group.add_argument("--cache", type=Path, help="folder of answers (default: OUTPUT.cache)")
    group.add_argument("--price-in", type=float, default=0.0, help="per million tokens asked")
    group.add_argument("--price-out", type=float, default=0.0, help="per million tokens answered")


FREE_TO_CHANGE = ("max_retries", "timeout", "cache", "price_in", "price_out")


def chat_settings(arguments: argparse.Namespace) -> ChatSettings:
    """The settings of `add_chat_arguments`, once the endpoint can be asked at all.

    Raises:
        ConfigError: no model or key given, or the openai package is not there.
    """
    if not arguments.model:
        raise ConfigError("--model: expected the name of a model of the endpoint, got none")
    output = own_output(arguments)
    folder = arguments.cache or output.with_name(output.name + ".cache")
    settings = ChatSettings(
        arguments.model, folder, arguments.temperature, arguments.max_retries, arguments.timeout
    )
    _client(settings)
    folder.mkdir(parents=True, exist_ok=True)
    return settings


def ask(settings: ChatSettings, messages: list[dict[str, Any]]) -> str:
    """The model's answer to a chat, from the cache if it was given before.

    Args:
        settings: see `ChatSettings`.
        messages: in the chat-completions form.

    Raises:
        RefusedRequest: the endpoint cannot answer this request, or cut its answer short.
        EndpointError: it cannot be reached, or refuses everything.
    """
    path = answer_path(settings, messages)
    if (answer := _cached(path)) is not None:
        return answer
    answer, usage = _complete(settings, _request(settings, messages))
    _count(settings.cache, usage)
    if answer is None:
        raise RefusedRequest("the model gave no whole answer (cut short, filtered, or empty)")
    write_bytes(path, json.dumps({"answer": answer, "usage": usage}).encode())
    return answer


def answer_path(settings: ChatSettings, messages: list[dict[str, Any]]) -> Path:
    """The file of a chat's answer in the cache."""
    text = json.dumps(_request(settings, messages), sort_keys=True).encode()
    digest = hashlib.sha256(text).hexdigest()
    return settings.cache / digest[:2] / f"{digest}.json"


def _request(settings: ChatSettings, messages: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "model": settings.model,
        "messages": messages,
        "temperature": settings.temperature,
    }


def _cached(path: Path) -> str | None:
    """The answer in a file of the cache; None: it is not there, or the file is damaged."""
    try:
        answer = plain_json(path.read_bytes())["answer"]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    return answer if isinstance(answer, str) and answer else None


def usage_so_far(folder: Path) -> dict[str, int]:
    """Requests answered by the endpoint, and tokens of them, since the cache folder was made.

    A line that was cut off (the machine stopped, the disk was full) is not counted.
    """
    total = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}
    path = folder / USAGE
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            counted = plain_json(line).items()
        except (ValueError, AttributeError):
            continue
        for name, number in counted:
            if name in total and type(number) is int and number >= 0:
                total[name] += number
    return total


def show_usage(arguments: argparse.Namespace, folder: Path, before: dict[str, int]) -> None:
    """Prints what this run asked and what it cost, and the same for all runs of the cache."""
    total = usage_so_far(folder)
    run = {name: total[name] - before[name] for name in total}
    for title, usage in (("this run", run), ("with earlier runs", total)):
        cost = usage["prompt_tokens"] * arguments.price_in
        cost += usage["completion_tokens"] * arguments.price_out
        print(
            f"{usage['requests']:>12,}  requests, {usage['prompt_tokens']:,} tokens in, "
            f"{usage['completion_tokens']:,} out, cost {cost / 1e6:.4f}, {title}"
        )


def _complete(settings: ChatSettings, request: dict) -> tuple[str | None, dict[str, int]]:
    """One request; the answer (None: cut short or empty) and its usage."""
    import openai

    client = _client(settings)
    try:
        reply = client.chat.completions.create(**request)
    except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
        raise RefusedRequest(f"the endpoint refused the request ({_safe(error)})") from None
    except openai.APIStatusError as error:
        if error.status_code == 413:
            raise RefusedRequest(f"the endpoint refused the request ({_safe(error)})") from None
        raise EndpointError(_stop(error)) from None
    except (openai.APIError, ValueError) as error:  # ValueError: not JSON
        raise EndpointError(_stop(error)) from None
    choices = getattr(reply, "choices", None)
    if not isinstance(choices, list) or not choices or choices[0].message is None:
        raise EndpointError(_stop("an answer that is no chat completion"))
    usage = getattr(reply, "usage", None)
    counted = {"requests": 1}
    for name in ("prompt_tokens", "completion_tokens"):
        counted[name] = getattr(usage, name, None) or 0
    whole = choices[0].finish_reason in ("stop", None)
    return (choices[0].message.content or None) if whole else None, counted


def _count(folder: Path, usage: dict[str, int]) -> None:
    """Appends a line for one request in one write, so that lines of processes do not mix."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / USAGE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(descriptor, json.dumps(usage).encode() + b"\n")
    finally:
        os.close(descriptor)


def _stop(error: object) -> str:
    return f"the endpoint failed ({_safe(error)}); the same command continues from here"


def _safe(error: object) -> str:
    """The message on one line, short, and without the key, should the endpoint echo it."""
    text = " ".join(str(error).split())
    key = os.environ.get("OPENAI_API_KEY")
    text = text.replace(key, "***") if key else text
    return text if len(text) <= 300 else text[:297] + "..."


@cache
def _client(settings: ChatSettings) -> OpenAI:
    try:
        import openai
    except ImportError:
        raise ConfigError("--model: needs the package openai (pip install openai)") from None
    if not os.environ.get("OPENAI_API_KEY"):
        raise ConfigError(
            "OPENAI_API_KEY: expected a key, got none (any text for a server that asks for none)"
        )
    return openai.OpenAI(max_retries=settings.max_retries, timeout=settings.timeout)
