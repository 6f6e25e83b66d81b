"""The command line: boxteacher train | recipes | evaluate | predict | convert | export | demo."""

import argparse
import io
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn

from boxteacher import __version__
from boxteacher.errors import InputError

_EXIT_BAD_INPUT = 2
_EXIT_DIVERGED = 3
_EXIT_INTERRUPTED = 130  # as a shell reports Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    It is 0, 2 for bad input or a file that cannot be read or written, 3 for a loss that is not finite, or 130
    after Ctrl-C.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path that the terminal cannot show ends no command
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        options = vars(_parser().parse_args(argv))
        command = options.pop("command")
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        command(**options)
    except InputError as error:
        return _failed(f"error: {_last_line(error)}", error, _EXIT_BAD_INPUT)
    except OSError as error:
        message = f"error: {error}: check the path, its permissions and the disk"
        return _failed(message, error, _EXIT_BAD_INPUT)
    except FloatingPointError as error:
        return _failed(f"stopped: {error}", error, _EXIT_DIVERGED)
    except KeyboardInterrupt as error:
        return _failed("interrupted", error, _EXIT_INTERRUPTED)
    return 0


def _failed(message: str, error: BaseException, code: int) -> int:
    """Prints one line, with what a run has noted about its checkpoint, and returns the exit code."""
    print("; ".join([f"boxteacher: {message}", *getattr(error, "__notes__", [])]), file=sys.stderr)
    return code


def _last_line(error: InputError) -> str:
    """The message itself, which a DataLoader's worker wraps in its stack trace."""
    return str(error).strip().splitlines()[-1].removeprefix("boxteacher.errors.InputError: ")


def _train(recipe: str | None, **given: Any) -> None:
    from boxteacher.engine.recipes import find_recipe
    from boxteacher.engine.settings import TrainSettings
    from boxteacher.engine.train import train

    if recipe is not None:
        given = {**find_recipe(recipe).settings, "output": Path("runs") / recipe, **given}
    required = [field.name for field in fields(TrainSettings) if field.default is MISSING]
    missing = [f"--{name}" for name in required if name not in given]
    if missing:
        raise InputError(f"{' and '.join(missing)} must be given (with --recipe only --data)")
    print(train(TrainSettings(**given)))


def _recipes() -> None:
    from boxteacher.engine.recipes import find_recipe, recipe_names

    names = recipe_names()
    for name in names:
        print(f"{name:{max(map(len, names))}}  {find_recipe(name).summary}")


def _evaluate(**options: Any) -> None:
    from boxteacher.engine.evaluate import evaluate

    evaluation = evaluate(**options)
    print(evaluation.table)
    print(json.dumps(evaluation.metrics))


def _predict(**options: Any) -> None:
    from boxteacher.engine.predict import predict

    print(predict(**options))


def _convert(**options: Any) -> None:
    from boxteacher.engine.convert import convert

    print(convert(**options))


def _export(**options: Any) -> None:
    from boxteacher.engine.export import export

    print(export(**options))


def _demo(**options: Any) -> None:
    from boxteacher.engine.demo import run_demo

    evaluation, picture = run_demo(**options)
    print(evaluation.table)
    print(f"masks on validation images: {picture}")
    print(json.dumps(evaluation.metrics))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Prints one line, without the usage, as for all other bad input."""
        self.exit(_EXIT_BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    from boxteacher.engine.options import add_options
    from boxteacher.engine.settings import TrainSettings

    parser = _Parser(
        prog="boxteacher", description="Instance segmentation from boxes alone: train, evaluate, predict."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add_command(run: Callable[..., None], help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(run.__name__.removeprefix("_"), help=help)
        command.set_defaults(command=run)
        return command

    train = add_command(_train, "train a segmenter on images with boxes")
    train.add_argument("--recipe", help="name of a recipe (see `boxteacher recipes`)")
    add_options(train, TrainSettings)
    add_command(_recipes, "list the recipes for `train --recipe`")

    evaluate = add_command(_evaluate, "compute COCO's average precision on the validation split")
    evaluate.add_argument("checkpoint", type=Path, help="checkpoint, such as RUN/last.pt")
    evaluate.add_argument("--data", type=Path, required=True, help="folder with annotations/ and the images")
    evaluate.add_argument("--device", default="auto", help="device: auto (default), cpu, cuda, …")
    evaluate.add_argument(
        "--workers", type=_at_least(0), default=2, help="number of processes that load images (default: 2)"
    )
    evaluate.add_argument(
        "--max-detections",
        type=_at_least(1),
        help="maximum number of detections per image (default: the run's, or as many as an image has objects "
        "if that is more); figures of COCO's own 100 are beside those of more",
    )

    refinement_help = "refinement of masks: color or none (default: as the run was made with)"
    evaluate.add_argument("--refinement", choices=("color", "none"), help=refinement_help)

    predict = add_command(_predict, "predict masks: images overlaid with masks, and COCO results")
    predict.add_argument("checkpoint", type=Path, help="checkpoint, such as RUN/last.pt")
    predict.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGE", help="image file, or folder of images"
    )
    predict.add_argument("--output", type=Path, required=True, help="folder for the images and results.json")
    predict.add_argument(
        "--score-threshold", type=float, default=0.6, help="minimum score, 0 to 1 (default: 0.6)"
    )
    predict.add_argument(
        "--max-detections", type=_at_least(1), help="maximum number of objects per image (default: the run's)"
    )
    predict.add_argument("--device", default="auto", help="device: auto (default), cpu, cuda, …")

    predict.add_argument("--refinement", choices=("color", "none"), help=refinement_help)

    convert = add_command(_convert, "convert released weights to a checkpoint")
    convert.add_argument("source", type=Path, metavar="IN", help="released weights, .pth or .pkl")
    convert.add_argument("destination", type=Path, metavar="OUT", help="new file")

    export = add_command(_export, "export a segmenter as state dict, torch.export program or ONNX")
    export.add_argument("checkpoint", type=Path, help="checkpoint, such as RUN/last.pt")
    export.add_argument("output", type=Path, help="new file: .pt (state dict), .pt2 (torch.export) or .onnx")
    export.add_argument(
        "--image-size",
        type=_at_least(1),
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="image size of .pt2 and .onnx (default: a square of the longest side in training)",
    )
    export.add_argument("--image", type=Path, help="image to check the file with (default: random pixels)")

    demo = add_command(_demo, "render a data set, train on its boxes alone, evaluate and draw masks")
    demo.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder (default: runs/demo)")
    demo.add_argument("--steps", type=_at_least(1), default=400, help="optimizer steps (default: 400)")
    return parser


def _at_least(minimum: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        return int(text)

    return number


if __name__ == "__main__":
    sys.exit(main())
