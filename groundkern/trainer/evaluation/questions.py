"""What of a sample the model is asked: the chat before the last assistant turn, which is the gold.

Earlier assistant turns stay in the chat as they are written in the data; a user turn behind the
last assistant's has no gold and is left out, with its images and videos.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from PIL import Image

from groundkern.hf.data.calling import rendered
from groundkern.hf.data.example import GroundedExample, is_trained, message_text
from groundkern.hf.data.texts import TextRules
from groundkern.hf.data.video import Video
from groundkern.trainer.data.images import SampleError


@dataclass(frozen=True)
class Question:
    """A chat that ends where the model has to answer.

    Args:
        text: the chat as the model's template renders it.
        images: PIL images, in the order of their placeholders.
        name: what error messages call the sample.
        videos: in the order of their placeholders.
    """

    text: str
    images: tuple[Image.Image, ...]
    name: str
    videos: tuple[Video, ...] = ()


class Asking:
    """Makes questions for one model.

    Args:
        processor: the model's.
        allowed: special tokens that messages may hold as text.

    Raises:
        ValueError: `allowed` names what is no special token.
    """

    def __init__(self, processor: Any, allowed: tuple[str, ...] = ()) -> None:
        self._processor = processor
        self._rules = TextRules(processor.tokenizer, processor, allowed)
        self._all = TextRules(processor.tokenizer, processor)

    def question(self, example: GroundedExample) -> Question:
        """The question of a sample.

        Raises:
            SampleError: nothing is asked before the answer, a text that holds a special token, or a
                chat that the template does not take.
        """
        last = last_answer(example.messages)
        asked = GroundedExample(
            example.images,
            example.chat()[:last],
            tools=example.tools,
            name=example.name,
            videos=example.videos,
        )
        if not any(message["role"] == "user" for message in asked.messages):
            raise SampleError(f"{example.name}: expected a question before the answer, got none")
        parts = Counter(part["type"] for m in asked.messages for part in m["content"])
        try:
            self._rules.check(asked, example.name)
            text = rendered(self._processor, asked.messages, asked.tools, asks=True)
        except Exception as error:  # a chat template raises whatever its author wrote
            reason = str(error).replace("`", "").removeprefix(f"{example.name}: ")
            raise SampleError(f"{example.name}: {reason}") from None
        images, videos = example.images[: parts["image"]], example.videos[: parts["video"]]
        return Question(text, images, example.name, videos)

    def plain(self, text: str) -> str:
        """A text without what the tokenizer reads as special tokens, and without outer spaces."""
        while token := self._all.special(text):
            if token not in text:  # found in a normalised form alone
                break
            text = text.replace(token, "")
        return text.strip()


def last_answer(messages: list[dict[str, Any]]) -> int:
    """The index of the last assistant message that is no mere context; its text is the gold."""
    return max(i for i, message in enumerate(messages) if is_trained(message))


def asked_text(messages: list[dict[str, Any]]) -> str:
    """What the user asked last before the answer, for people to read."""
    before = messages[: last_answer(messages)]
    users = [message_text(message) for message in before if message["role"] == "user"]
    return users[-1] if users else ""
