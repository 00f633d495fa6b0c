"""`groundkern doctor --model M`: its family, where its visual tokens are, and the objectives
that work; why the others do not."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "try everything that training does with a model, and say what works"
EXAMPLE = (640, 480)  # pixels of the image that is drawn if none is given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `doctor`."""
    parser.add_argument("--model", required=True, help="folder of a model with its processor")
    parser.add_argument(
        "--image", type=Path, nargs="+", default=[], help="images to try (default: one is drawn)"
    )
    parser.add_argument(
        "--gradients",
        action="store_true",
        help="run every objective backwards too, which needs memory for all gradients",
    )
    parser.add_argument("--output", type=Path, default=Path("doctor.html"), help="page to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu", help="for example cuda")
    parser.add_argument("--attn-implementation", default="sdpa", help="as in transformers")


def run(arguments: argparse.Namespace) -> int:
    """Prints what was found and writes the page.

    Returns:
        The exit status: 1 if the model cannot be trained with images.

    Raises:
        ConfigError, SampleError: the model or an image cannot be loaded.
    """
    from PIL import Image, ImageDraw

    from groundkern.hf import examine
    from groundkern.trainer.data.images import image_size, load_rgb
    from groundkern.trainer.doctor.page import STEPS, Findings, write
    from groundkern.trainer.loading import open_model
    from groundkern.trainer.progress import progress

    names, images = [], []
    for path in arguments.image:
        size = image_size(path, where=str(path), field="image")
        images.append(load_rgb(path, size, where=str(path), field="image"))
        names.append(path.name)
    if not images:
        images, names = [Image.new("RGB", EXAMPLE, "white")], ["an example"]
        ImageDraw.Draw(images[0]).rectangle((60, 50, 300, 220), fill="firebrick")
    model, processor = open_model(
        arguments.model,
        attn_implementation=arguments.attn_implementation,
        dtype=arguments.dtype,
    )
    model.to(arguments.device).eval()
    with progress("examine", total=len(STEPS), unit="step") as bar:
        found = examine(
            model,
            processor,
            images,
            geometry=_geometry(model, processor),
            gradients=arguments.gradients,
            tell=lambda name: bar.update(),
        )
    findings = Findings.of(arguments.model, model, found, dict(zip(names, images, strict=True)))
    lines = list(findings.lines())
    width = max(len(name) for name, _ in lines)
    for name, verdict in lines:
        print(f"{name:<{width}} {verdict}")
    write(arguments.output, findings)
    print(f"Page: {arguments.output}")
    return 0 if found.trainable else 1


def _geometry(model: Any, processor: Any) -> Any:
    """Measured if the family has no table; None for one that cannot be measured, which `examine`
    then says."""
    from groundkern.trainer.config import ConfigError
    from groundkern.trainer.geometry import geometry_of

    try:
        return geometry_of(model, processor)
    except ConfigError:
        return None
