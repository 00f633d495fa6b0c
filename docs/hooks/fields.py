"""What griffe is told of NamedTuples and dataclasses: a signature, and comments as descriptions.

A NamedTuple gets the signature that typing gives it. The comment behind a field,
`lse: Tensor  # [N, Hq] fp32`, is what the page says of it, unless the docstring has its own Args.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Class, Docstring, Extension, Function, Parameter, ParameterKind, Parameters

COMMENT = re.compile(r"^    (\w+): [^#]*?  # (.+)$", re.MULTILINE)
WITH_ARGS = re.compile(r"^ *(?:Args|Attributes):$", re.MULTILINE)


class Fields(Extension):
    def on_class(self, *, cls: Class, **_: Any) -> None:
        named_tuple = any(str(base).endswith("NamedTuple") for base in cls.bases)
        if named_tuple and "__init__" not in cls.members:
            self._add_signature(cls)
        if named_tuple or any("dataclass" in str(each.value) for each in cls.decorators):
            self._add_comments(cls)

    def _add_signature(self, cls: Class) -> None:
        kind = ParameterKind.positional_or_keyword
        found = [
            Parameter(name, annotation=field.annotation, kind=kind, default=field.value)
            for name, field in cls.attributes.items()
            if field.annotation is not None
        ]
        own = Parameter("self", annotation=None, kind=kind, default=None)
        made = Function("__init__", parameters=Parameters(own, *found), returns=None)
        cls.set_member("__init__", made)

    def _add_comments(self, cls: Class) -> None:
        text = cls.docstring.value if cls.docstring else ""
        comments = dict(COMMENT.findall(cls.source))
        if WITH_ARGS.search(text) or not comments:
            return
        lines = (
            f"    {name} ({field.annotation}): {comments[name]}"
            for name, field in cls.attributes.items()
            if name in comments
        )
        value = "\n".join([text.rstrip(), "", "Attributes:", *lines]).strip()
        if cls.docstring:
            cls.docstring.value = value
        else:
            cls.docstring = Docstring(value, parent=cls)
