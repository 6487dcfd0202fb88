"""Other schedules of one trajectory as bare loops: model calls without noise, loss, metrics or optimizer.

What `throughput.py` compares an update of TailorPO with, to their favour. F: a guided forward of one latent, B: a
backward pass.

    naive      TailorPO as its equations read, nothing shared between its terms    50 F + 10 B, 11 pictures scored
    d3po       the official schedule: a pair of chains, then every step trained   120 F + 40 B,  2 pictures scored
    minimal    the network calls of this package's inline update                   30 F +  5 B
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from tailorpo.plan.accounting import Calls

STEPS, TRAINED = 20, 5


class BareLoops:
    """The model calls of other schedules, and nothing else."""

    def __init__(self, calls: Calls, rows: int) -> None:
        self.calls, self.model, self.rows = calls, calls.model, rows
        self.guidance_scale = calls.guidance_scale

    def network(self, rows: int, *, graph: bool = False, reference: bool = False) -> Tensor:
        """One network call."""
        cond = self.calls.network.conditioning(rows)
        with torch.set_grad_enabled(graph), self.model.reference() if reference else nullcontext():
            return self.model.predict(self.calls.latents(rows), 500, cond, guidance_scale=self.guidance_scale)

    @torch.no_grad()
    def score(self, rows: int, *, draft: bool = False) -> None:
        """Pictures decoded and scored."""
        decode = self.model.decode_draft if draft else self.model.decode
        images = decode(self.calls.latents(rows))
        for reward in self.calls.rewards:
            assert reward.score is not None
            reward.score(images)

    def naive(self, *, scored: bool = True) -> None:
        """TailorPO as its equations read: (1 + 2) F, then 2 F with a graph, 2 F of the reference and 2 B."""
        rows = self.rows
        for k in range(STEPS):
            self.network(rows)
            if k % (STEPS // TRAINED) == 2:
                self.network(2 * rows)
                if scored:
                    self.score(2 * rows, draft=True)
                winner, loser = self.network(rows, graph=True), self.network(rows, graph=True)
                self.network(rows, reference=True)
                self.network(rows, reference=True)
                (winner.sum() - loser.sum()).backward()
        if scored:
            self.score(rows)

    def d3po(self, *, scored: bool = True) -> None:
        """D3PO's official schedule: 2 T F of sampling; 2 T F with a graph, 2 T F of the reference and 2 T B."""
        rows = self.rows
        for _ in range(STEPS):
            self.network(2 * rows)
        if scored:
            self.score(2 * rows)
        for _ in range(STEPS):
            first, second = self.network(rows, graph=True), self.network(rows, graph=True)
            self.network(rows, reference=True)
            self.network(rows, reference=True)
            (first.sum() - second.sum()).backward()

    def minimal(self) -> None:
        """TailorPO's network calls of an inline update: 20 F, of which 5 with a graph, 5 F for siblings, 5 F, 5 B."""
        rows = self.rows
        known = False
        for k in range(STEPS):
            trained = k % (STEPS // TRAINED) == 2
            output = None if known else self.network(rows, graph=trained)
            known = trained
            if trained:
                self.network(2 * rows)
                self.network(rows, reference=True)
                assert output is not None
                output.sum().backward()
