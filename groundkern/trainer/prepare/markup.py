"""XML annotation files, read safely: no document type, so no entities; bounded, or streamed.

A document type can name entities that grow without bound or read other files. No annotation tool
writes one, so a file that has one is refused.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.dataset import MAX_LINE
from groundkern.trainer.data.images import SampleError

_CHUNK = 1 << 16
_FORBIDDEN = ("<!DOCTYPE", "<!ENTITY")


def plain_xml(data: bytes | str) -> Element:
    """The root of a short XML text, UTF-8.

    Raises:
        ValueError: one sentence: not UTF-8, a document type, not XML.
    """
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8 text, got {error.reason}") from None
    if any(word in text for word in _FORBIDDEN):
        raise ValueError("expected no document type")
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"expected XML, got none ({error})") from None


def xml_children(path: Path) -> Iterator[Element]:
    """The elements right below the root of an XML file, one in memory at a time.

    Raises:
        ConfigError: the file cannot be read.
        SampleError: not UTF-8, not XML, a document type, or an element of more than 16 Mi
            characters; names the file.
    """
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    parser = ElementTree.XMLPullParser(("start", "end"))
    root, depth, since, before = None, 0, 0, ""
    try:
        with path.open("rb") as file:
            while True:
                data = file.read(_CHUNK)
                text = decode(data, not data)
                if any(word in before + text for word in _FORBIDDEN):
                    raise SampleError(f"{path.name}: expected no document type")
                before = text[-len(max(_FORBIDDEN, key=len)) :]
                since += len(text)
                if since > MAX_LINE:
                    wanted = f"elements of at most {MAX_LINE} characters"
                    raise SampleError(f"{path.name}: expected {wanted}, got more")
                parser.feed(text) if data else parser.close()
                for event, element in parser.read_events():
                    root = element if root is None else root
                    depth += 1 if event == "start" else -1
                    if event == "end" and depth == 1:
                        yield element
                        root.clear()
                        since = 0
                if not data:
                    return
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise SampleError(f"{path.name}: expected UTF-8 text ({error.reason})") from None
    except ElementTree.ParseError as error:
        raise SampleError(f"{path.name}: expected XML ({error})") from None
