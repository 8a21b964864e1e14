"""What a step was fed, compared with the sampler's draw: epsilon holds only for steps that were fed Poisson draws."""

from __future__ import annotations

import numpy as np
import torch

from dptune.keystream import FIXED, SECRET
from dptune.micro_batch import Items
from dptune.ranks import Gather, Reduce
from dptune.sampling import NOT_SHOWN, PoissonSampler, checksum_of_items


class FedItems:
    """Number and checksum of the drawn units that the current step was fed.

    Args:
        sampler: makes the draws; None compares nothing.
        noise_key: the kind of key that this rank's noise comes from. Ranks tell each other with what they were fed.
        gather, reduce, world_size: communication between ranks, as of `PrivateStep`.
    """

    def __init__(
        self,
        sampler: PoissonSampler | None,
        *,
        noise_key: str = SECRET,
        gather: Gather | None = None,
        reduce: Reduce | None = None,
        world_size: int = 1,
    ) -> None:
        self._sampler = sampler
        self._gather, self._reduce, self._world_size = gather, reduce, world_size
        self._fed = np.zeros(2, dtype=np.int64)  # of this rank
        self._own_key = self._noise_key = noise_key

    @property
    def sampler_name(self) -> str:
        """How batches were drawn, in words for the ledger and the report."""
        return NOT_SHOWN if self._sampler is None else self._sampler.name

    @property
    def noise_key(self) -> str:
        """The kind of key of the noise, in words for the ledger: fixed if it is fixed on any rank."""
        return self._noise_key

    def named(self, items: Items | None, units: int) -> np.ndarray:
        """(number, checksum) of the items of one micro-batch of so many units, int64 [2]. Adds nothing.

        Raises:
            RuntimeError: there is a sampler but no items, or there are more items than units.
        """
        if items is None:
            if self._sampler is not None:
                raise RuntimeError("name the drawn items of each micro-batch: this step has a sampler")
            return np.zeros(2, dtype=np.int64)
        if len(items) > units:
            raise RuntimeError(f"{len(items)} items in a micro-batch of {units} units")
        return np.array([len(items), checksum_of_items(np.asarray(items, dtype=np.int64))])

    def add(self, named: np.ndarray) -> None:
        """Count a micro-batch, as `named` measured it, when its gradients are in the sum."""
        self._fed = self._fed + named

    def require_draw(self, device: torch.device) -> None:
        """Compare what all ranks were fed with the oldest unused draw, and begin anew. Every rank must call this.

        Args:
            device: where ranks communicate.

        Raises:
            RuntimeError: they were fed something else, or there is no unused draw.
        """
        if self._sampler is None:
            return
        fed = torch.from_numpy(np.append(self._fed, self._own_key != SECRET)).to(device)
        if self._world_size > 1 and self._gather is not None:
            fed = self._gather(fed).view(self._world_size, -1).sum(0)
        elif self._world_size > 1 and self._reduce is not None:
            fed = self._reduce(fed)
        number, checksum, fixed_keys = fed.tolist()
        self._sampler._use(number, checksum)
        self._noise_key = FIXED if fixed_keys else SECRET
        self._fed = np.zeros(2, dtype=np.int64)
