"""The student's view: changed in color and sharpness, never in geometry."""

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.transforms import v2

from boxteacher.precision import full_precision

_BLUR_KERNEL = 3  # pixels, as in the released code


class StrongAugmentation(nn.Module):
    """Photometric augmentation, sampled for each image by itself and computed on the image's device.

    Color jitter (brightness, contrast, saturation 0.4, hue 0.1) with probability 0.8, grayscale with 0.2,
    Gaussian blur (3 × 3, sigma 0.1 to 2 pixels) with 0.5, as in BoxTeacher, Sec. 4.1.

    Args:
        blur: probability of the blur, in [0, 1].
    """

    def __init__(self, *, blur: float = 0.5) -> None:
        super().__init__()
        self.color = v2.Compose(
            [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), v2.RandomGrayscale(p=0.2)]
        )
        self.blur = v2.RandomApply([v2.GaussianBlur(_BLUR_KERNEL, sigma=(0.1, 2.0))], p=blur)

    def forward(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Images (3, H_i, W_i), RGB in [0, 1], to as many of the same sizes and range."""
        with full_precision(images[0].device):
            return [self._augmented(image) for image in images]

    def _augmented(self, image: Tensor) -> Tensor:
        image = self.color(image)
        # The blur mirrors the image at its border, so a thinner one cannot be blurred.
        return self.blur(image) if min(image.shape[-2:]) > _BLUR_KERNEL // 2 else image
