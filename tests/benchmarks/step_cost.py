"""What the teacher costs: a BoxTeacher step over the student's own box-supervised step.

    python -m tests.benchmarks.step_cost

CondInst R-50, two 320 × 320 images with six boxes each, forward, backward and optimizer step. Both steps take
turns in one process, on one network, so the ratio holds on a noisy machine.
"""

import argparse
import statistics
import time

import torch
from torch import nn

from boxteacher import BoxSupervised, BoxTeacher
from boxteacher_adapters.condinst import CondInst
from boxteacher_adapters.parts.backbones import build_backbone


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--size", type=int, default=320)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    student = CondInst(build_backbone("resnet50", "none"), num_classes=80)
    # Scores above the threshold, so that the teacher has candidates to draw, as a trained one has.
    nn.init.constant_(student.box_head.class_logits.bias, 0.0)
    models = {"box": BoxSupervised(student).train(), "teacher": BoxTeacher(student).train()}
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-6)

    images = [torch.rand(3, arguments.size, arguments.size) for _ in range(2)]
    corners = torch.rand(2, 6, 2) * 0.5 * arguments.size  # (2, 6, 2)
    sides = (0.15 + 0.35 * torch.rand(2, 6, 2)) * arguments.size  # (2, 6, 2)
    targets = [
        {"boxes": torch.cat([corner, corner + side], 1), "labels": torch.randint(80, (6,))}
        for corner, side in zip(corners, sides, strict=True)
    ]

    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(arguments.rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            losses = model(images, targets)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            if turn:  # the first turn warms up
                seconds[name].append(time.perf_counter() - start)
    ratios = [teacher / box for teacher, box in zip(seconds["teacher"], seconds["box"], strict=True)]
    for name, values in seconds.items():
        print(f"{name:8} {statistics.median(values):.3f} s")
    print(f"ratio    {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
