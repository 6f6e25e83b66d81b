"""The command line: `boxteacher train | evaluate | predict | demo`."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Literal

from boxteacher import __version__
from boxteacher.errors import InputError

_EXIT_BAD_INPUT = 2
_EXIT_DIVERGED = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 2 for bad input, 3 for a loss that is not finite."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        arguments.command(arguments)
    except InputError as error:
        print(f"boxteacher: error: {_last_line(error)}", file=sys.stderr)
        return _EXIT_BAD_INPUT
    except OSError as error:
        print(f"boxteacher: error: {error}: check the path, its permissions and the disk", file=sys.stderr)
        return _EXIT_BAD_INPUT
    except FloatingPointError as error:
        print(f"boxteacher: stopped: {error}", file=sys.stderr)
        return _EXIT_DIVERGED
    return 0


def _last_line(error: InputError) -> str:
    """The message; a DataLoader's worker wraps it in its own stack trace."""
    return str(error).strip().splitlines()[-1].removeprefix("boxteacher.errors.InputError: ")


def _train(arguments: argparse.Namespace) -> None:
    from boxteacher.engine.train import TrainSettings, train

    given = {field.name: getattr(arguments, field.name) for field in fields(TrainSettings)}
    settings = TrainSettings(**{name: value for name, value in given.items() if value is not None})
    print(train(settings))


def _evaluate(arguments: argparse.Namespace) -> None:
    from boxteacher.engine.evaluate import evaluate

    evaluation = evaluate(
        arguments.checkpoint, arguments.data, device=arguments.device, workers=arguments.workers
    )
    print(evaluation.table)
    print(json.dumps(evaluation.metrics))


def _predict(arguments: argparse.Namespace) -> None:
    from boxteacher.engine.predict import predict

    print(
        predict(
            arguments.checkpoint,
            arguments.images,
            arguments.output,
            score_threshold=arguments.score_threshold,
            device=arguments.device,
        )
    )


def _demo(arguments: argparse.Namespace) -> None:
    from boxteacher.engine.demo import run_demo

    evaluation, picture = run_demo(arguments.output, steps=arguments.steps)
    print(evaluation.table)
    print(f"masks drawn on validation images: {picture}")
    print(json.dumps(evaluation.metrics))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="boxteacher", description="Instance segmentation from boxes alone: train, evaluate, predict."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands.add_parser("train", help="train a segmenter on a folder of images and boxes"))
    _add_evaluate(commands.add_parser("evaluate", help="COCO's average precision on the validation split"))
    _add_predict(commands.add_parser("predict", help="draw masks on images"))
    _add_demo(commands.add_parser("demo", help="a data set of its own, boxes alone, masks in minutes"))
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_train)
    add = parser.add_argument
    add("--model", required=True, help="condinst, solov2, mask2former, mask_rcnn, or another package's")
    add("--backbone", default="resnet50", help="resnet18 … resnet152, efficientnet_lite0, or a timm network")
    add("--data", type=Path, required=True, help="folder with annotations/ and the images (COCO format)")
    add("--output", type=Path, required=True, help="folder of this run; must not hold another run")
    add(
        "--supervision",
        choices=("teacher", "box", "mask"),
        help="teacher (default): boxes, colours and pseudo masks; box: boxes and colours; mask: drawn masks",
    )
    add("--steps", type=_positive, help="optimizer steps (default 5000)")
    add("--batch-size", type=_positive, help="images per step (default 4)")
    add("--image-size", type=_positive, help="longest side in pixels (default 512)")
    add("--lr", type=float, help="highest learning rate of AdamW (default 3e-4)")
    add(
        "--weights",
        type=_weights,
        help="of the backbone: a file, 'imagenet' (default; downloaded once) or 'none'",
    )
    add("--seed", type=int, help="of everything random (default 0)")
    add("--device", help="auto (default), cpu, cuda, cuda:1, …")
    add("--workers", type=_count, help="processes that load images (default 2)")
    add("--warmup-steps", type=_count, help="of the colour-pairwise loss (default: a fifth of the run)")
    add("--pseudo-warmup-steps", type=_count, help="of the losses from pseudo masks (default: the whole run)")
    add("--momentum", type=float, help="of the teacher (default: a memory of a tenth of the run)")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_evaluate)
    parser.add_argument("checkpoint", type=Path, help="RUN/last.pt")
    parser.add_argument("--data", type=Path, required=True, help="folder with annotations/ and the images")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, …")
    parser.add_argument("--workers", type=_count, default=2, help="processes that load images (default 2)")


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_predict)
    parser.add_argument("checkpoint", type=Path, help="RUN/last.pt")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument("--output", type=Path, required=True, help="folder for pictures and results.json")
    parser.add_argument("--score-threshold", type=float, default=0.6, help="least score shown (default 0.6)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, …")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_demo)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="default runs/demo")
    parser.add_argument("--steps", type=_positive, default=400, help="optimizer steps (default 400)")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is less than 0")
    return number


def _weights(text: str) -> Path | Literal["imagenet", "none"]:
    if text == "imagenet" or text == "none":
        return text  # type: ignore[return-value]
    return Path(text)


if __name__ == "__main__":
    sys.exit(main())
