"""The command line: `boxteacher train | recipes | evaluate | predict | convert | export | demo`."""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NoReturn

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
    from boxteacher.engine.recipes import find_recipe
    from boxteacher.engine.settings import TrainSettings
    from boxteacher.engine.train import train

    values: dict[str, Any] = {}
    if arguments.recipe is not None:
        values = {**find_recipe(arguments.recipe).settings, "output": Path("runs") / arguments.recipe}
    for field in fields(TrainSettings):
        given = getattr(arguments, field.name)
        if given is not None:
            values[field.name] = tuple(given) if isinstance(given, list) else given
    missing = [f"--{name}" for name in ("model", "output") if name not in values]
    if missing:
        raise InputError(f"{' and '.join(missing)} must be given: add that, or a --recipe, which has both")
    print(train(TrainSettings(**values)))


def _recipes(arguments: argparse.Namespace) -> None:
    from boxteacher.engine.recipes import find_recipe, recipe_names

    names = recipe_names()
    for name in names:
        print(f"{name:{max(map(len, names))}}  {find_recipe(name).summary}")


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


def _convert(arguments: argparse.Namespace) -> None:
    from boxteacher.engine.convert import convert

    print(convert(arguments.source, arguments.destination))


def _export(arguments: argparse.Namespace) -> None:
    from boxteacher.engine.export import export

    size = None if arguments.image_size is None else tuple(arguments.image_size)
    print(export(arguments.checkpoint, arguments.output, image_size=size, image=arguments.image))


def _demo(arguments: argparse.Namespace) -> None:
    from boxteacher.engine.demo import run_demo

    evaluation, picture = run_demo(arguments.output, steps=arguments.steps)
    print(evaluation.table)
    print(f"masks drawn on validation images: {picture}")
    print(json.dumps(evaluation.metrics))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for all other bad input, without the usage before it."""
        self.exit(_EXIT_BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="boxteacher", description="Instance segmentation from boxes alone: train, evaluate, predict."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands.add_parser("train", help="train a segmenter on a folder of images and boxes"))
    commands.add_parser("recipes", help="list what `train --recipe` knows").set_defaults(command=_recipes)
    _add_evaluate(commands.add_parser("evaluate", help="COCO's average precision on the validation split"))
    _add_predict(commands.add_parser("predict", help="draw masks on images"))
    _add_convert(commands.add_parser("convert", help="released weights to a checkpoint of this library"))
    _add_export(commands.add_parser("export", help="state dict, torch.export program or ONNX of a segmenter"))
    _add_demo(commands.add_parser("demo", help="a data set of its own, boxes alone, masks in minutes"))
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_train)
    add = parser.add_argument
    add("--recipe", help="settings of a whole run, which other options change (see `boxteacher recipes`)")
    add("--model", help="condinst, solov2, mask2former, mask_rcnn, or another package's")
    add("--backbone", help="resnet50 (default), swin_t, resnet50_caffe, efficientnet_lite0, … (see README)")
    add("--data", type=Path, required=True, help="folder with annotations/ and the images (COCO format)")
    add("--output", type=Path, help="folder of this run, without another (default of a recipe: runs/RECIPE)")
    add(
        "--supervision",
        choices=("teacher", "box", "mask"),
        help="teacher (default): boxes, colours and pseudo masks; box: boxes and colours; mask: drawn masks",
    )
    add(
        "--weights",
        type=_weights,
        help="a file, of the backbone or of the whole model; 'imagenet' (default; downloaded once) or 'none'",
    )
    add("--seed", type=int, help="of everything random (default 0)")
    add("--device", help="auto (default), cpu, cuda, cuda:1, …")
    add("--workers", type=_count, help="processes that load images (default 2)")
    add("--warmup-steps", type=_count, help="of the colour-pairwise loss (default: a fifth of the run)")
    add("--pseudo-warmup-steps", type=_count, help="of the losses from pseudo masks (default: the whole run)")
    add("--momentum", type=float, help="of the teacher (default: a memory of a tenth of the run)")
    add("--iou-threshold", type=float, help="least IoU of a pseudo mask's box with its box (default 0.5)")
    add(
        "--teacher-size",
        type=_positive,
        nargs="*",
        metavar="PIXELS",
        help="shortest and greatest longest side of the teacher's images (default: the student's images)",
    )
    add(
        "--teacher-dtype",
        choices=("float32", "bfloat16"),
        help="what the teacher computes in (default float32)",
    )
    add(
        "--teacher-interval",
        type=_positive,
        help="optimizer steps from one question to the teacher to the next (default 1)",
    )
    add(
        "--quality-at",
        choices=("grid", "image"),
        help="where a pseudo mask's quality is measured: on the mask grid (default) or at the image's pixels",
    )
    _add_images(parser.add_argument_group("images").add_argument)
    _add_optimization(parser.add_argument_group("optimization").add_argument)


def _add_images(add: Callable[..., Any]) -> None:
    add("--batch-size", type=_positive, help="images per step (default 4)")
    add("--image-size", type=_positive, help="longest side in pixels (default 512)")
    add(
        "--shortest-side",
        type=_positive,
        nargs="*",
        metavar="PIXELS",
        help="draw the shortest side from these, the longest being at most --image-size (default: off)",
    )
    add(
        "--augmentation",
        choices=("none", "strong", "stronger"),
        help="of the student's view under the teacher: none; colours; colours and blur (default stronger)",
    )
    add("--mask-samples", type=_positive, help="masks per image in training (default: the segmenter's own)")


def _add_optimization(add: Callable[..., Any]) -> None:
    add("--steps", type=_positive, help="optimizer steps (default 5000)")
    add("--optimizer", choices=("adamw", "sgd"), help="adamw (default), or sgd with momentum 0.9")
    add("--lr", type=float, help="highest learning rate (default 3e-4)")
    add("--backbone-lr-factor", type=float, help="of the backbone's learning rate (default 1)")
    add("--lr-warmup-steps", type=_count, help="of the learning rate (default: a twentieth, at most 500)")
    add(
        "--lr-steps",
        type=_positive,
        nargs="*",
        metavar="STEP",
        help="the learning rate falls to a tenth after each; without any, in a cosine (default)",
    )
    add("--weight-decay", type=float, help="of linear and convolutional layers' weights (default 0.05)")
    add("--gradient-clip", type=float, help="greatest norm of the gradient, 0 for any (default 10)")


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


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_convert)
    parser.add_argument("source", type=Path, metavar="IN", help="released weights, .pth or .pkl")
    parser.add_argument("destination", type=Path, metavar="OUT", help="file to write; must not exist")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_export)
    parser.add_argument("checkpoint", type=Path, help="RUN/last.pt")
    parser.add_argument(
        "output",
        type=Path,
        help="file to write, which must not exist: .pt (plain state dict), .pt2 (torch.export) or .onnx",
    )
    parser.add_argument(
        "--image-size",
        type=_positive,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="that .pt2 and .onnx take images of (default: the longest side of training, twice)",
    )
    parser.add_argument("--image", type=Path, help="to check the file with (default: random pixels)")


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
