"""Whether the kit passes correct networks, whatever the seed of their weights.

python -m tests.benchmarks.kit_seeds --networks example condinst --seeds 30
"""

import argparse
import time

import torch

from boxteacher.errors import ProtocolError
from boxteacher.testing import InconclusiveError, check_provider
from tests.kit_networks import NETWORKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--first-seed", type=int, default=0)
    arguments = parser.parse_args()
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for name in arguments.networks:
            torch.manual_seed(seed)
            model = NETWORKS[name]()
            start = time.perf_counter()
            try:
                check_provider(model)
                verdict = "passes"
            except (ProtocolError, InconclusiveError) as error:
                verdict = f"{type(error).__name__}: {error}"
            print(f"{name:24} seed {seed:2} {time.perf_counter() - start:4.0f} s  {verdict}", flush=True)


if __name__ == "__main__":
    main()
