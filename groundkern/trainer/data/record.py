"""What a line of a data file may say (docs/data/data-format.md): fields and their types."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from groundkern.hf.data.example import LARGEST_WEIGHT

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
Weight = Annotated[Number, Field(ge=0, le=LARGEST_WEIGHT)]
Index = Annotated[int, Field(strict=True, ge=0)]
Text = Annotated[str, Field(min_length=1)]
Interval = tuple[Number, Number]


def _as_list(value: Any) -> Any:
    """A number alone as a list of it."""
    return [value] if isinstance(value, int | float) else value


class StrictModel(BaseModel):
    """Refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PartRecord(StrictModel):
    type: Literal["image", "video", "text"]
    text: str = ""


class MessageRecord(StrictModel):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | list[PartRecord]
    train: Annotated[bool, Field(strict=True)] = True


class SpanRecord(StrictModel):
    text: Text | None = None
    occurrence: Index = 0
    char_span: tuple[Index, Index] | None = None
    turn: Index | None = None


class PlaceRecord(StrictModel):
    image: Index | None = None
    coord: Literal["pixel", "unit", "per_mille"] = "pixel"
    order: Literal["xyxy", "xywh"] = "xyxy"


class MomentRecord(StrictModel):
    time: Annotated[Number, Field(ge=0)] | None = None
    frame: Index | None = None
    box: tuple[Number, Number, Number, Number]


class RegionRecord(SpanRecord, PlaceRecord):
    video: Index | None = None
    time: Interval | Annotated[list[Interval], Field(min_length=1)] | None = None
    frame: Index | None = None
    share: Annotated[list[Positive] | None, BeforeValidator(_as_list)] = None
    spread: Annotated[list[Number] | None, BeforeValidator(_as_list)] = None
    box: tuple[Number, Number, Number, Number] | None = None
    points: Annotated[list[tuple[Number, Number]], Field(min_length=1)] | None = None
    polygon: Annotated[list[tuple[Number, Number]], Field(min_length=3)] | None = None
    polyline: Annotated[list[tuple[Number, Number]], Field(min_length=2)] | None = None
    mask: Any = None  # a path or run lengths: `find_rasters` looks at it
    mask_value: Index | None = None
    heat: Text | None = None
    track: Annotated[list[MomentRecord], Field(min_length=2)] | None = None
    weight: Weight = 1.0


class WordRecord(PlaceRecord):
    text: Text
    box: tuple[Number, Number, Number, Number]
    weight: Weight = 1.0


class PhraseRecord(SpanRecord):
    subject: Text | None = None
    weight: Weight = 1.0


class VideoRecord(StrictModel):
    path: str
    fps: Annotated[Number, Field(gt=0)] | None = None
    frames: Annotated[int, Field(strict=True, ge=1)] | None = None
    start: Annotated[Number, Field(ge=0)] | None = None
    end: Annotated[Number, Field(gt=0)] | None = None


def _named(video: Any) -> Any:
    return {"path": video} if isinstance(video, str) else video


class SampleRecord(StrictModel):
    id: str | Annotated[int, Field(strict=True)] | None = None
    meta: dict[str, Any] = {}
    task: str = ""
    images: list[str] = []
    videos: list[Annotated[VideoRecord, BeforeValidator(_named)]] = []
    messages: Annotated[list[MessageRecord], Field(min_length=1)]
    tools: list[dict[str, Any]] = []
    regions: list[RegionRecord] = []
    words: list[WordRecord] = []
    phrases: list[PhraseRecord] = []
    grounding_weight: Weight = 1.0
    answers: list[Text] = []
    metrics: list[str] = []
