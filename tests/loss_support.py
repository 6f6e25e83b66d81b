"""Random masks with the inputs of the two pair losses."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from boxteacher.grid import MaskGrid, neighbor_offsets
from boxteacher.losses import (
    BoxRegions,
    affinity_relation,
    color_relation,
    pair_sums,
)
from boxteacher.targets import color_similarity


@dataclass(frozen=True)
class Scene:
    """Masks with the inputs of the two pair losses."""

    logits: Tensor  # (M, h, w)
    extents: Tensor  # (M, 4)
    image_index: Tensor  # (M,)
    valid: Tensor  # (B, h, w)
    similarity: Tensor  # (B, 8, h, w)
    pseudo_masks: Tensor  # (M, h, w)

    def pair_sums(self) -> tuple[Tensor, Tensor]:
        return pair_sums(
            self.logits,
            BoxRegions(self.extents, self.image_index, self.valid),
            [
                color_relation(self.similarity, self.image_index, 0.5),
                affinity_relation(self.pseudo_masks, torch.arange(len(self.logits)), 0.5),
            ],
        )

    def flip(self, dimension: int) -> "Scene":
        """The mirror image; `dimension` is 1 for top and bottom, 2 for left and right."""
        size = self.logits.shape[dimension]
        first, end = dimension - 1, dimension + 1
        extents = self.extents.clone()
        extents[:, first], extents[:, end] = size - self.extents[:, end], size - self.extents[:, first]
        offsets = neighbor_offsets()
        mirrored = [
            offsets.index((-down, right) if dimension == 1 else (down, -right)) for down, right in offsets
        ]
        return replace(
            self,
            logits=self.logits.flip(dimension),
            extents=extents,
            valid=self.valid.flip(dimension),
            similarity=self.similarity.flip(dimension + 1)[:, mirrored],
            pseudo_masks=self.pseudo_masks.flip(dimension),
        )


def random_scene(
    masks: int, height: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Scene:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    sides = torch.tensor([height, width])
    first = (random(masks, 2) * sides).long()  # (M, 2)
    end = first + (random(masks, 2) * (sides + 1 - first)).long()  # some boxes have no cell at all
    bottom = int(torch.randint(height, (), generator=generator))
    valid = torch.ones(2, height, width, dtype=torch.bool)
    valid[1, bottom:] = False
    images = [(random(3, height, width) * 0.03).float() for _ in range(2)]
    return Scene(
        logits=(6 * random(masks, height, width) - 3).to(dtype),
        extents=torch.cat([first, end], 1),
        image_index=torch.randint(2, (masks,), generator=generator),
        valid=valid,
        similarity=color_similarity(images, valid, MaskGrid(1, height, width)),
        pseudo_masks=random(masks, height, width) < 0.5,
    )
